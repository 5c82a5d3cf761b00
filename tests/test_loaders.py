"""Loaders: the DALI graph against the reference, contracts of training and test batches, both streams."""

import os

import numpy as np
import pytest
import torch

from flow import fields as oracle
from flow.codec import Codec
from loaders import dali_loader, reference
from loaders.batch import FLOW_SCALE, RGB_STD, StreamSpec
from loaders.index import open_index
from loaders.pipeline import Graph
from loaders.views import VIEWS, enumerate_views
from tests.conftest import pack_arrays

SPECS = [
    StreamSpec(stream="spatial", crop_px=56),
    StreamSpec(stream="temporal", L=3, crop_px=56),
    StreamSpec(stream="temporal", L=10, crop_px=64, subtract_mean=False),
    StreamSpec(stream="temporal", L=4, crop_px=56, bidirectional=True),
    StreamSpec(stream="temporal", L=5, crop_px=40, stacking="trajectory"),
    StreamSpec(stream="temporal", L=6, crop_px=40, stacking="trajectory", bidirectional=True, subtract_mean=False),
    StreamSpec(stream="spatial", crop_px=56, rgb_frames=11),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def describe(spec):
    steps = spec.L if spec.is_temporal else spec.rgb_frames
    return f"{spec.stream}{steps}{'bi' * spec.bidirectional}-{spec.stacking}"


def tolerance(spec, device):
    """In codes. Along a trajectory small differences grow: its next point depends on the last sample."""
    exact = 2.01 if device == "cuda" else 1e-3
    return 20 * exact if spec.follows_trajectories else exact  # test_trajectory compares the following itself


def take(loader, n):
    with loader:
        return [next(loader) for _ in range(n)]


def to_codes(batch, spec, index):
    """A batch's inputs as grey levels or multiples of the coarsest code, so that tolerances read in codes."""
    inputs = batch.inputs.cpu().numpy()
    if spec.stream == "spatial":
        return inputs * np.tile(RGB_STD, spec.rgb_frames)[:, None, None]
    widest = max((index.entries[kind]["hi"] - index.entries[kind]["lo"]).max() for kind in spec.kinds)
    return inputs / FLOW_SCALE / (widest / 255)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_training_batches_equal_the_reference(packed, spec, device):
    index = open_index(packed)
    rows = index.split("split1_train")
    options = dict(seed=3, batch_size=24, start_step=5)
    ours = take(dali_loader.train_loader(index, rows, spec, device=device, **options), 4)
    plain = take(reference.train_loader(index, rows, spec, **options), 4)
    for a, b in zip(ours, plain, strict=True):
        assert a.inputs.shape == (24, spec.num_channels, spec.crop_px, spec.crop_px)
        assert a.inputs.dtype == torch.float32 and a.inputs.device.type == device
        assert (a.draw.video == b.draw.video).all() and (a.draw.tau == b.draw.tau).all() and a.draw.valid.all()
        assert torch.equal(a.labels.cpu(), b.labels)
        assert np.abs(to_codes(a, spec, index) - to_codes(b, spec, index)).max() < tolerance(spec, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_test_views_equal_the_reference(packed, spec, device):
    index = open_index(packed)
    rows = index.split("split1_test")
    options = dict(num_taus=3, batch_size=8)
    plain = list(reference.view_loader(index, rows, spec, **options))
    with dali_loader.view_loader(index, rows, spec, device=device, **options) as loader:
        assert len(loader) == len(plain) == 10 * -(-len(rows) * 3 // 8)
        for a, b in zip(loader, plain, strict=True):
            assert (
                (a.draw.video == b.draw.video).all()
                and (a.draw.tau == b.draw.tau).all()
                and (a.draw.valid == b.draw.valid).all()
            )
            assert np.abs(to_codes(a, spec, index) - to_codes(b, spec, index)).max() < tolerance(spec, device)


@pytest.mark.parametrize(
    "graph",
    [
        Graph(region=False),
        Graph(decoder="shared", mixed_share=0.3),
        pytest.param(Graph("cuda"), marks=pytest.mark.gpu),
        pytest.param(Graph("cuda", "mixed", region=False), marks=pytest.mark.gpu),
        pytest.param(Graph("cuda", "shared", region=False), marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda s: s.stream)
def test_every_graph_gives_the_same_batches(packed, graph, spec):
    index = open_index(packed)
    options = dict(seed=0, batch_size=16)
    (a,), (b,) = (
        take(dali_loader.train_loader(index, index.split("split1_train"), spec, graph=g, **options), 1)
        for g in (graph, Graph())
    )
    difference = np.abs(to_codes(a, spec, index) - to_codes(b, spec, index)).max()
    assert difference == 0 if graph.device == "cpu" else difference < 2.01


def test_batches_stay_valid_after_later_ones(packed):
    index = open_index(packed)
    loader = dali_loader.train_loader(index, index.split("split1_train"), SPECS[1], seed=0, batch_size=8)
    batches = []
    with loader:
        for _ in range(6):
            batch = next(loader)
            batches.append((batch, batch.inputs.clone()))
    assert all(torch.equal(batch.inputs, copy) for batch, copy in batches)
    assert not torch.equal(batches[0][1], batches[1][1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_inputs_are_the_packed_fields_in_pixels(packed, arrays, bidirectional):
    """Against the arrays that were packed, not against another decoder: order of channels, crop, mean, unit."""
    index = open_index(packed)
    spec = StreamSpec(stream="temporal", L=4, crop_px=60, random_mirror=False, bidirectional=bidirectional)
    (batch,) = take(dali_loader.train_loader(index, index.split("split1_train"), spec, seed=1, batch_size=32), 1)
    from loaders.draw import draw_batch, population

    draw = draw_batch(1, 0, population(index, index.split("split1_train"), spec), spec, 32)
    for i, video_id in enumerate(index.video_ids(batch.draw.video)):
        forward, backward = (np.stack([oracle.subtract_mean(f) for f in part]) for part in arrays[video_id][1:])
        y0, x0 = draw.crop[i]
        tau = int(batch.draw.tau[i])
        stack = oracle.stack_bidirectional(forward, backward, tau, 4) if bidirectional else None
        expected = (oracle.stack_fields(forward, tau, 4) if stack is None else stack)[:, y0 : y0 + 60, x0 : x0 + 60]
        error = np.abs(batch.inputs[i].numpy() / FLOW_SCALE - expected)
        assert error.mean() < 0.05 and error.max() < 0.5, video_id


def test_every_rank_and_world_size_sees_the_same_global_batches(packed):
    index = open_index(packed)
    rows, spec = index.split("split1_train"), SPECS[1]
    whole = take(dali_loader.train_loader(index, rows, spec, seed=9, batch_size=12), 3)
    for world_size in (2, 3):
        parts = [
            take(
                dali_loader.train_loader(index, rows, spec, seed=9, batch_size=12, rank=rank, world_size=world_size),
                3,
            )
            for rank in range(world_size)
        ]
        for step in range(3):
            assert torch.equal(torch.cat([part[step].inputs for part in parts]), whole[step].inputs)


def test_a_resumed_loader_continues_the_sequence(packed):
    index = open_index(packed)
    rows, spec = index.split("split1_train"), SPECS[0]
    whole = take(dali_loader.train_loader(index, rows, spec, seed=2, batch_size=8), 5)
    rest = take(dali_loader.train_loader(index, rows, spec, seed=2, batch_size=8, start_step=3), 2)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(whole[3:], rest, strict=True))


def test_short_videos_are_left_out_of_training_and_repeat_their_last_field_in_tests(packed):
    index = open_index(packed)
    rows, spec = index.split("split1_train"), StreamSpec(stream="temporal", L=5, crop_px=60)
    (short,) = index.rows(["walk/short"])  # 4 frames, 3 fields
    loader = dali_loader.train_loader(index, rows, spec, seed=0, batch_size=64)
    assert loader.num_left_out == 1
    assert short not in take(loader, 1)[0].draw.video
    (batch, *_) = list(dali_loader.view_loader(index, np.array([short]), spec, num_taus=1, batch_size=1))
    stack = batch.inputs[0].reshape(5, 2, 60, 60)
    assert torch.equal(stack[2], stack[3]) and torch.equal(stack[2], stack[4])
    assert not torch.equal(stack[1], stack[2])


@pytest.mark.parametrize("world_size", [2, 3, 5, 40])
def test_ranks_have_the_views_of_one_in_stretches_of_the_list(packed, world_size):
    index = open_index(packed)
    rows = index.split("split1_test")

    def pairs(rank, world_size):
        means = {"num_taus": 4, "batch_size": 3, "rank": rank, "world_size": world_size}
        drawn = [
            np.stack([draw.video, draw.tau], 1)[draw.valid] for draw in enumerate_views(index, rows, SPECS[1], **means)
        ]
        return np.concatenate(drawn).tolist()

    assert sum((pairs(rank, world_size) for rank in range(world_size)), []) == pairs(0, 1)
    assert len(pairs(0, 1)) == 4 * len(rows)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_view_of_every_video_comes_exactly_once(packed, world_size):
    index = open_index(packed)
    rows, spec = index.split("split1_test"), SPECS[1]
    counts = {}
    lengths = set()
    for rank in range(world_size):
        with dali_loader.view_loader(
            index, rows, spec, num_taus=4, batch_size=5, rank=rank, world_size=world_size
        ) as loader:
            batches = list(loader)
            lengths.add(len(batches))
            assert len(batches) == len(loader)
        for view, batch in enumerate(batches):
            for video, tau in zip(batch.draw.video[batch.draw.valid], batch.draw.tau[batch.draw.valid], strict=True):
                counts[video, tau, view % 10] = counts.get((video, tau, view % 10), 0) + 1
    assert len(lengths) == 1
    per_video = {video: sum(n for (v, _, _), n in counts.items() if v == video) for video in rows}
    assert set(per_video.values()) == {40}
    assert {video for video, _, _ in counts} == set(rows)


def test_mirrored_view_is_the_mirrored_field(packed):
    """View k + 5 is view k of the mirrored video, whose left corners are the right ones: flipped, dx negated."""
    index = open_index(packed)
    spec = StreamSpec(stream="temporal", L=2, crop_px=60)
    views = list(dali_loader.view_loader(index, index.rows(["walk/wide"]), spec, num_taus=1, batch_size=1))
    for k in range(5):
        y, x, _ = VIEWS[k]
        assert VIEWS[k + 5] == (y, x, True)
        plain, mirrored = views[k].inputs[0].numpy(), views[k + 5].inputs[0].numpy()
        expected = np.concatenate([oracle.mirror_field(field) for field in plain.reshape(2, 2, 60, 60)])
        assert np.allclose(mirrored, expected, atol=1e-5)


def test_a_fixed_range_and_a_still_field_survive(tmp_path):
    """A component without any motion has no range; dequantisation must not divide by it."""
    frames = np.full((6, 64, 64, 3), 77, np.uint8)
    still = np.zeros((5, 2, 64, 64), np.float32)
    moving = still + np.array([3.0, -1.5], np.float32)[:, None, None]
    for name, codec in (("own", Codec()), ("fixed", Codec(range="fixed", bound_px=20.0))):
        root = pack_arrays(tmp_path / name, {"a/still": (frames, still), "b/moving": (frames, moving)}, codec)
        index = open_index(root)
        spec = StreamSpec(stream="temporal", L=5, crop_px=64, subtract_mean=False, random_mirror=False)
        loader = dali_loader.train_loader(index, index.split("split1_train"), spec, seed=0, batch_size=8)
        (batch,) = take(loader, 1)
        for values, video_id in zip(batch.inputs.numpy() / FLOW_SCALE, index.video_ids(batch.draw.video), strict=True):
            expected = still if video_id == "a/still" else moving
            tolerance = 20 / 255 + 1e-4 if name == "fixed" else 2e-3
            assert np.abs(values.reshape(5, 2, 64, 64) - expected).max() <= tolerance


def test_a_batch_that_ranks_cannot_share_is_refused(packed):
    index = open_index(packed)
    with pytest.raises(ValueError, match="batch of 10 cannot be shared evenly by 4"):
        dali_loader.train_loader(
            index, index.split("split1_train"), SPECS[0], seed=0, batch_size=10, rank=0, world_size=4
        )


def test_a_crop_larger_than_a_video_is_refused(packed):
    index = open_index(packed)
    spec = StreamSpec(stream="spatial", crop_px=224)
    with pytest.raises(ValueError, match="cannot hold crops of 224 px"):
        dali_loader.train_loader(index, index.split("split1_train"), spec, seed=0, batch_size=4)
    with pytest.raises(ValueError, match="None of 6 training videos has the 201 frames"):
        dali_loader.train_loader(
            index, index.split("split1_train"), StreamSpec(stream="temporal", L=200, crop_px=60), seed=0, batch_size=4
        )


@pytest.mark.parametrize("k", [1, 4])
def test_memory_stays_what_it_was(packed, k):
    """After many batches the process holds what it held after some; lost bytes of each batch would be 100 MB and more.

    What may still grow is the number of free windows of each of the four sizes, up to the most that were ever in use.
    """
    index = open_index(packed)
    spec = StreamSpec(stream="temporal", L=4, crop_px=56, stacks_per_window=k)

    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with dali_loader.train_loader(index, index.split("split1_train"), spec, seed=0, batch_size=16) as loader:
        for _ in range(200):
            next(loader)
        before = resident_bytes()
        for _ in range(600):
            next(loader)
        assert resident_bytes() < before + 24e6
