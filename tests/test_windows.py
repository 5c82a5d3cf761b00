"""Decode once, stack many: windowed batches are those of the reference, and the pool keeps no more than it needs."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from loaders import dali_loader, reference
from loaders.batch import FLOW_SCALE, StreamSpec
from loaders.draw import SPREAD, draw_batch, population, slot_draws
from loaders.index import open_index
from loaders.windows import keys_of, plan_windows

K = [2, 4, 8]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def spec_of(k, **changes):
    return StreamSpec(**{"stream": "temporal", "L": 3, "crop_px": 56, "stacks_per_window": k, **changes})


@pytest.fixture(scope="module")
def index(packed):
    return open_index(packed)


@pytest.fixture(scope="module")
def rows(index):
    return index.split("split1_train")


def batches(module, index, rows, spec, count, **options):
    with module.train_loader(index, rows, spec, **{"seed": 3, "batch_size": 16, **options}) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", K)
def test_windowed_batches_equal_the_reference(index, rows, k, device):
    """The reference knows no windows: it reads every stack for itself. Videos here have four sizes."""
    spec = spec_of(k)
    ours = batches(dali_loader, index, rows, spec, 3 * SPREAD, device=device, start_step=5)
    plain = batches(reference, index, rows, spec, 3 * SPREAD, start_step=5)
    widest = max((index.entries[kind]["hi"] - index.entries[kind]["lo"]).max() for kind in spec.kinds)
    tolerance = (2.01 if device == "cuda" else 1e-3) * FLOW_SCALE * widest / 255
    for a, b in zip(ours, plain, strict=True):
        assert a.inputs.shape == (16, 6, 56, 56) and a.inputs.device.type == device
        assert (a.draw.video == b.draw.video).all() and torch.equal(a.labels.cpu(), b.labels)
        assert (a.inputs.cpu() - b.inputs).abs().max() < tolerance


def test_frames_of_one_size_take_the_same_way(packed_demo):
    """Then the decoded frames lie in one piece, and a window is copied out of it as one."""
    index = open_index(packed_demo)
    spec = spec_of(2, crop_px=40)
    ours, plain = (batches(module, index, index.split("split1_train"), spec, 9) for module in (dali_loader, reference))
    assert all((a.inputs - b.inputs).abs().max() < 1e-3 for a, b in zip(ours, plain, strict=True))


def test_what_a_gpu_cuts_equals_what_the_stack_graph_cuts(index, rows):
    """`cut_stacks` is the GPU's way from windows to stacks; here on the CPU, from the same windows."""
    spec = spec_of(4)
    with dali_loader.train_loader(index, rows, spec, seed=3, batch_size=16) as loader:
        loader._make = loader._make_from_windows
        cut = [next(loader) for _ in range(6)]
    for a, b in zip(cut, batches(dali_loader, index, rows, spec, 6), strict=True):
        assert (a.inputs - b.inputs).abs().max() < 1e-4


@pytest.mark.parametrize("k", K)
def test_every_rank_and_world_size_sees_the_same_global_batches(index, rows, k):
    spec = spec_of(k)
    whole = batches(dali_loader, index, rows, spec, 3, start_step=9)
    for world_size in (2, 16 // k):
        parts = [
            batches(dali_loader, index, rows, spec, 3, start_step=9, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for step in range(3):
            assert torch.equal(torch.cat([part[step].inputs for part in parts]), whole[step].inputs)


@pytest.mark.parametrize("start_step", [1, SPREAD, 11])
def test_a_resumed_loader_continues_the_sequence(index, rows, start_step):
    spec = spec_of(4)
    whole = batches(dali_loader, index, rows, spec, start_step + 6)
    rest = batches(dali_loader, index, rows, spec, 6, start_step=start_step)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(whole[start_step:], rest, strict=True))


@pytest.mark.parametrize("k", K)
def test_a_window_gives_k_stacks_to_k_batches(index, rows, k):
    """Never two to one batch; each stack within the window's L + k - 1 fields; decoded once, when the first is due."""
    spec, count = spec_of(k), 4 * k * SPREAD
    videos = population(index, rows, spec)
    draws = list(islice(slot_draws(videos, spec, seed=1, batch_size=16, slots=(0, 16), start_step=0), count))
    uses, decoded = Counter(), Counter()
    for draw, new in plan_windows(iter(draws), 0, spec):
        keys = keys_of(draw)
        assert len(set(keys)) == len(keys)
        offset = draw.tau - draw.first
        assert (offset >= 0).all() and (offset < k).all()
        uses.update(keys)
        decoded.update(new.keys)
    assert set(decoded.values()) == {1} and decoded.keys() == uses.keys()
    whole = [key for key in uses if 0 <= key[0] < count - (k + 1) * SPREAD]
    assert len(whole) > 100 and {uses[key] for key in whole} == {k}


@pytest.mark.parametrize("k", K)
def test_in_the_long_run_a_stack_costs_its_share_of_a_window(index, rows, k):
    """After the pool has filled, a batch of n stacks needs n / k new windows, and the pool stays bounded."""
    spec, batch_size = spec_of(k), 16
    with dali_loader.train_loader(index, rows, spec, seed=0, batch_size=batch_size) as loader:
        sizes = []
        for _ in range((k + 3) * SPREAD):
            next(loader)
            sizes.append(len(loader._pool))
            memory = loader._pool.num_bytes
    assert max(sizes) <= SPREAD * batch_size
    # videos have four sizes, and still the windows' memory is that of the largest, for as many as are in use
    assert memory <= SPREAD * batch_size * spec.window_steps * 2 * int((index.heights * index.widths).max())
    videos = population(index, rows, spec)
    draws = slot_draws(videos, spec, seed=0, batch_size=batch_size, slots=(0, batch_size), start_step=7)
    new = [len(new.keys) for _, new in islice(plan_windows(draws, 7, spec), (k + 5) * SPREAD)]
    assert new[0] == batch_size and set(new[(k + 1) * SPREAD :]) == {batch_size // k}


@pytest.mark.parametrize("k", [4, 7])
def test_taus_stay_uniform_over_the_starts(index, k):
    """Windows are cut off at a video's ends, and no start is drawn more or less often for it: for every stack."""
    (row,) = index.rows(["walk/wide"])  # 20 frames, 17 starts
    spec = spec_of(k)
    videos = population(index, np.array([row]), spec)
    n, taus = k * 4000, []
    for step in range(6):
        taus.append(draw_batch(0, step, videos, spec, n).tau.reshape(-1, k))
    for j in range(k):
        counts = np.bincount(np.concatenate(taus)[:, j], minlength=17)
        expected = counts.sum() / 17
        assert len(counts) == 17
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)  # five standard deviations


def test_a_video_with_fewer_starts_than_k_serves(index):
    (row,) = index.rows(["sit/[strange] name! #1+"])  # 12 frames: 2 starts with L = 10
    spec = spec_of(8, L=10)
    (batch,) = batches(dali_loader, index, np.array([row]), spec, 1)
    (plain,) = batches(reference, index, np.array([row]), spec, 1)
    assert set(batch.draw.tau) == {0, 1}
    assert (batch.inputs - plain.inputs).abs().max() < 1e-3


def test_crops_and_mirrors_of_a_window_are_its_stacks_own(index, rows):
    spec = spec_of(8)
    draws = [draw_batch(0, step, population(index, rows, spec), spec, 32) for step in range(60)]
    views = {}
    for draw in draws:
        for key, view in zip(keys_of(draw), zip(draw.crop.tolist(), draw.mirror.tolist(), strict=True), strict=True):
            views.setdefault(key, []).append((tuple(view[0]), view[1]))
    whole = [seen for seen in views.values() if len(seen) == 8]
    assert np.mean([len(set(seen)) for seen in whole]) > 7
    assert 0.45 < np.mean([mirror for seen in whole for _, mirror in seen]) < 0.55


def test_windows_are_for_stacks_of_fields_and_whole_batches(index, rows):
    with pytest.raises(ValueError, match="stacks_per_window=2 with stream=spatial"):
        StreamSpec(stream="spatial", stacks_per_window=2)
    with pytest.raises(ValueError, match="batch of 12 cannot be shared evenly by 2 processes, in windows of 4 stacks"):
        dali_loader.train_loader(index, rows, spec_of(4), seed=0, batch_size=12, world_size=2)
    with pytest.raises(ValueError, match="batch of 6 cannot be shared evenly by 1 processes, in windows of 4 stacks"):
        draw_batch(0, 0, population(index, rows, spec_of(4)), spec_of(4), 6)
