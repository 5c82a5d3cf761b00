"""`size_px`: frames rescaled on the device, displacements with them, against plain numpy, torch and known motions."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flow import fields as oracle
from flow import video
from flow.codec import Codec
from loaders import dali_loader, pipeline, reference, windows
from loaders.batch import FLOW_SCALE, StreamSpec
from loaders.dali_loader import DaliLoader
from loaders.draw import Draw
from loaders.index import open_index
from loaders.pipeline import Graph
from loaders.region import crops, largest_patch, stored_patch
from loaders.rescale import check_crop, frame_sizes, settled
from loaders.source import Source
from tests.conftest import pack_arrays, random_video, smooth_noise
from tests.test_loaders import describe, take, to_codes, tolerance

#: num_frames, height, width. Asked for at 72 px, the first two grow, the third stays, the last two shrink.
VIDEOS = {"a/wide": (16, 60, 80), "a/tall": (14, 90, 64), "b/same": (15, 72, 97), "b/large": (14, 96, 120)}
VIDEOS["b/odd"] = (13, 83, 131)
SIZE = 72
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPECS = [
    StreamSpec(stream="spatial", crop_px=56, size_px=SIZE),
    StreamSpec(stream="spatial", crop_px=72, size_px=SIZE, rgb_frames=11),
    StreamSpec(stream="temporal", L=4, crop_px=56, size_px=SIZE),
    StreamSpec(stream="temporal", L=4, crop_px=72, size_px=SIZE, bidirectional=True, subtract_mean=False),
    StreamSpec(stream="temporal", L=5, crop_px=48, size_px=SIZE, stacking="trajectory"),
    StreamSpec(stream="temporal", L=4, crop_px=48, size_px=SIZE, stacking="trajectory", bidirectional=True),
    StreamSpec(stream="temporal", L=3, crop_px=60, size_px=SIZE, stacks_per_window=4),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A packed set of frames of several sizes."""
    rng = np.random.default_rng(5)
    videos = {name: (*random_video(rng, *shape), random_video(rng, *shape)[1]) for name, shape in VIDEOS.items()}
    return open_index(pack_arrays(tmp_path_factory.mktemp("mixed") / "set", videos))


def name_of(spec):
    return f"{describe(spec)}-{spec.crop_px}px-k{spec.stacks_per_window}"


def check_equal(ours, plain, spec, index, device):
    """As codes do without rescaling; but displacements grow with the frame, by at most 72 / 60."""
    for a, b in zip(ours, plain, strict=True):
        assert (a.draw.video == b.draw.video).all() and torch.equal(a.labels.cpu(), b.labels)
        difference = np.abs(to_codes(a, spec, index) - to_codes(b, spec, index)).max()
        assert difference < 1.2 * tolerance(spec, device)


# --- what rescaling means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(72, 97), (60, 80), (31, 41), (30, 40), (33, 80)])
def test_the_oracle_is_opencvs_and_torchs_bilinear_interpolation(size):
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (3, 60, 80)).astype(np.float32)
    found = oracle.rescale_image(image, *size)
    by_torch = F.interpolate(torch.from_numpy(image)[None], size, mode="bilinear", align_corners=False)[0].numpy()
    by_opencv = cv2.resize(image.transpose(1, 2, 0), size[::-1], interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
    np.testing.assert_allclose(found, by_torch, atol=5e-3)
    np.testing.assert_allclose(found, by_opencv, atol=5e-3)
    if size == (60, 80):
        assert np.array_equal(found, image)
    if size == (30, 40):  # at half the size each pixel is the mean of four
        np.testing.assert_allclose(found, image.reshape(3, 30, 2, 40, 2).mean(axis=(2, 4)), atol=1e-3)


def test_the_field_of_a_rescaled_rotation_is_the_rotation_there():
    """A field that is affine in place stays so: what is known in closed form at every size, but for the border."""

    def rotation(height, width, per_px):
        y, x = np.mgrid[:height, :width] + 0.5
        return (0.05 * np.stack([-(y - height / 2) * per_px, (x - width / 2) / per_px])).astype(np.float32)

    found = oracle.rescale_field(rotation(60, 80, 1.0), 90, 160)  # x twice, y one and a half times as large
    expected = rotation(90, 160, 160 / 80 / (90 / 60))
    np.testing.assert_allclose(found[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1e-4)


def test_frames_have_the_size_that_packing_at_it_would_give(mixed):
    rows = np.arange(mixed.num_videos)
    for size_px in (60, 71, 72, 97, 128, 240, 256):
        sizes = frame_sizes(mixed, rows, StreamSpec(stream="spatial", size_px=size_px))
        for row, size in zip(rows, sizes.tolist(), strict=True):
            frame = np.zeros((mixed.heights[row], mixed.widths[row]), np.uint8)
            assert video.resize(frame, size_px).shape == tuple(size)


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[3]], ids=name_of)
def test_a_patch_is_what_interpolation_looks_at(mixed, spec):
    """Crops of frames rescaled whole, from the patches alone: enough; one row or column less is not."""
    rng = np.random.default_rng(1)
    video = np.repeat(np.arange(mixed.num_videos), 20)
    free = frame_sizes(mixed, video, spec) - spec.crop_px
    zeros = np.zeros(len(video), np.int64)
    draw = Draw.of_stacks(video, zeros, rng.integers(0, free + 1), zeros.astype(bool))
    region = crops(draw, spec, mixed)
    patch = stored_patch(region, video, mixed)
    assert (patch.size <= largest_patch(spec, mixed, np.arange(mixed.num_videos))).all()
    for row, (y, x), (height, width), (y0, x0), (h, w) in zip(
        video, region.start, region.frame, patch.start, patch.size, strict=True
    ):
        image = rng.uniform(0, 255, (1, mixed.heights[row], mixed.widths[row])).astype(np.float32)
        other = rng.uniform(0, 255, image.shape).astype(np.float32)
        other[:, y0 : y0 + h, x0 : x0 + w] = image[:, y0 : y0 + h, x0 : x0 + w]
        inside = (slice(None), slice(y, y + spec.crop_px), slice(x, x + spec.crop_px))
        cut, expected = (oracle.rescale_image(i, height, width)[inside] for i in (other, image))
        assert np.array_equal(cut, expected)
        assert h <= np.ceil((spec.crop_px - 1) * image.shape[1] / height) + 2


# --- loaders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_training_batches_equal_the_reference(mixed, spec, device):
    """Both ways from one set: larger and smaller, and a video that has the size already."""
    rows, options = np.arange(mixed.num_videos), dict(seed=3, batch_size=16, start_step=5)
    ours = take(dali_loader.train_loader(mixed, rows, spec, device=device, **options), 3)
    plain = take(reference.train_loader(mixed, rows, spec, **options), 3)
    assert {*VIDEOS} == {i for batch in ours for i in mixed.video_ids(batch.draw.video)}
    check_equal(ours, plain, spec, mixed, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.stacks_per_window == 1], ids=name_of)
def test_test_views_equal_the_reference(mixed, spec, device):
    rows, options = np.arange(mixed.num_videos), dict(num_taus=2, batch_size=5)
    plain = list(reference.view_loader(mixed, rows, spec, **options))
    with dali_loader.view_loader(mixed, rows, spec, device=device, **options) as loader:
        check_equal(list(loader), plain, spec, mixed, device)


@pytest.mark.parametrize(
    "graph", [Graph(region=False), Graph(decoder="shared", mixed_share=0.3)], ids=["whole frames", "two decoders"]
)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=name_of)
def test_every_graph_gives_the_same_batches(mixed, spec, graph):
    options = dict(seed=0, batch_size=8)
    (a,), (b,) = (
        take(dali_loader.train_loader(mixed, np.arange(mixed.num_videos), spec, graph=g, **options), 1)
        for g in (graph, Graph())
    )
    assert torch.equal(a.inputs, b.inputs)


def test_what_a_gpu_cuts_equals_what_the_stack_graph_cuts(mixed):
    spec, options = SPECS[-1], dict(seed=3, batch_size=16)
    with dali_loader.train_loader(mixed, np.arange(mixed.num_videos), spec, **options) as loader:
        loader._make = loader._make_from_windows
        cut = [next(loader) for _ in range(6)]
    batches = take(dali_loader.train_loader(mixed, np.arange(mixed.num_videos), spec, **options), 6)
    check_equal(cut, batches, spec, mixed, "cpu")


def samples(index, spec, draw):
    """A training graph's answer to a given draw, in px/frame."""
    with DaliLoader(Source(index, settled(spec, index, draw.video)), iter([draw]), Graph(), len(draw)) as loader:
        return next(loader).inputs.numpy() / FLOW_SCALE


def test_a_video_of_the_size_asked_for_is_untouched_in_mixed_company(mixed):
    """Bit for bit: though the graph resizes, the crop's pixels are where they were."""
    (row,) = mixed.rows(["b/same"])
    draw = Draw.of_stacks(np.full(3, row), np.arange(3), np.array([[0, 0], [5, 41], [16, 20]]), np.arange(3) == 1)
    for spec in (SPECS[0], SPECS[2]):
        plain = StreamSpec(stream=spec.stream, L=4, crop_px=56)
        assert np.array_equal(samples(mixed, spec, draw), samples(mixed, plain, draw))


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_is_resized_where_all_listed_frames_have_the_size(mixed, monkeypatch, k):
    def refuse(*_):
        raise AssertionError("frames are resized")

    monkeypatch.setattr(pipeline, "_resized", refuse)
    monkeypatch.setattr(windows, "_resize", refuse)
    same, options = mixed.rows(["b/same"]), dict(seed=0, batch_size=8)
    batches = []
    for size_px in (SIZE, None):
        spec = StreamSpec(stream="temporal", L=3, crop_px=40, size_px=size_px, stacks_per_window=k)
        batches += take(dali_loader.train_loader(mixed, same, spec, **options), 1)
        with dali_loader.view_loader(mixed, same, spec, num_taus=1, batch_size=1) as views:
            batches.append(next(views))
    for a, b in zip(batches[:2], batches[2:], strict=True):
        assert torch.equal(a.inputs, b.inputs)
    spec = StreamSpec(stream="temporal", L=3, crop_px=40, size_px=SIZE, stacks_per_window=k)
    with pytest.raises(AssertionError, match="frames are resized"):
        dali_loader.train_loader(mixed, np.arange(mixed.num_videos), spec, **options)


def test_a_mirrored_grid_gives_the_mirrored_crop(mixed):
    """Bit for bit."""
    spec, video = SPECS[-1], np.arange(mixed.num_videos)
    zeros = np.zeros(len(video), np.int64)
    draw = Draw.of_stacks(video, zeros, np.stack([zeros + 3, zeros], axis=1), video % 2 == 0)
    patch = stored_patch(crops(draw, spec, mixed), video, mixed)
    side = largest_patch(spec, mixed, video)
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(video), 6, side, side), np.uint8))
    found = windows._resize(codes, patch, spec.crop_px, draw.mirror)
    plain = windows._resize(codes, patch, spec.crop_px, np.zeros(len(video), bool))
    for mirror, a, b in zip(draw.mirror, found, plain, strict=True):
        assert torch.equal(a, b.flip(-1) if mirror else b) and not torch.equal(a, b.flip(-1) if not mirror else b)


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """Motion of (3, -1.5) px/frame everywhere, in frames of 240 and 256 px and in one range: as other tools do."""
    videos = {}
    for name, shape in {"a/240": (240, 320), "b/256": (256, 340)}.items():
        fields = np.broadcast_to(np.array([3.0, -1.5], np.float32)[:, None, None], (6, 2, *shape))
        videos[name] = np.zeros((7, *shape, 3), np.uint8), fields, -fields
    root = tmp_path_factory.mktemp("constant") / "set"
    return open_index(pack_arrays(root, videos, Codec(range="fixed", bound_px=20.0)))


@pytest.mark.parametrize("size_px", [240, 256])
@pytest.mark.parametrize(
    "changes", [{}, {"bidirectional": True}, {"stacking": "trajectory"}, {"stacks_per_window": 2}], ids=str
)
def test_a_constant_motion_is_as_many_times_larger_as_its_frame(constant, size_px, changes):
    """The codes of +-20 px hold 3 and -1.5 px to 0.08 px: compared is what each set reads with what it stores."""
    spec = StreamSpec(
        stream="temporal", L=4, crop_px=224, size_px=size_px, subtract_mean=False, random_mirror=False, **changes
    )
    loader = dali_loader.train_loader(constant, np.arange(2), spec, seed=0, batch_size=8)
    stored = np.rint((np.array([3.0, -1.5]) + 20) * 255 / 40) * 40 / 255 - 20
    (batch,) = take(loader, 1)
    heights, widths = constant.heights[batch.draw.video], constant.widths[batch.draw.video]
    assert set(heights) == {240, 256}
    new_widths = np.rint(widths * size_px / heights)
    motion = stored * np.stack([new_widths / widths, size_px / heights], axis=1)  # (n, 2)
    sign = np.where(np.arange(4) < (2 if "bidirectional" in changes else 4), 1, -1)
    expected = np.stack([motion] * 4, axis=1) * sign[None, :, None]
    off = 40 / 255 if "bidirectional" in changes else 0  # codes of -3 and 3 px need not be each other's mirror image
    found = batch.inputs.numpy().reshape(8, 4, 2, 224, 224) / FLOW_SCALE
    assert np.abs(found - expected[..., None, None]).max() < 1e-4 + off


@pytest.mark.parametrize("size_px", [240, 256])
def test_a_constant_motion_is_gone_with_its_mean(constant, size_px):
    """The mean is scaled with the field: what remains is the codes' rounding, 0.08 px, not 3 px * 16/240 = 0.2 px."""
    spec = StreamSpec(stream="temporal", L=4, crop_px=224, size_px=size_px)
    (batch,) = take(dali_loader.train_loader(constant, np.arange(2), spec, seed=0, batch_size=8), 1)
    assert batch.inputs.abs().max() < 0.5 * 40 / 255 * 256 / 240 * FLOW_SCALE + 1e-4


@pytest.fixture(scope="module")
def both_sides(tmp_path_factory):
    """Index of smooth fields, and of the mirrored ones; frames of 60 and of 96 px."""
    rng, indexes = np.random.default_rng(6), []
    videos = {
        name: np.stack([[smooth_noise(rng, shape, 0.5) + shift for shift in (1.5, -1)] for _ in range(7)])
        for name, shape in {"a/60": (60, 80), "b/96": (96, 131)}.items()
    }
    for step in (1, -1):
        packed = {
            name: (np.zeros((8, *fields.shape[2:], 3), np.uint8), fields if step == 1 else mirrored(fields))
            for name, fields in videos.items()
        }
        indexes.append(open_index(pack_arrays(tmp_path_factory.mktemp("sides") / "set", packed)))
    return indexes


def mirrored(fields):
    return np.stack([oracle.mirror_field(field) for field in fields])


@pytest.mark.parametrize("stacking", ["flow", "trajectory"])
def test_a_mirrored_draw_gives_the_mirrored_negated_stack(both_sides, stacking):
    """Training and views: the mirrored video's own crop is the mirrored crop of the video, in the rescaled frame."""
    plain, other = both_sides
    spec = StreamSpec(stream="temporal", L=4, crop_px=56, size_px=SIZE, stacking=stacking)
    video = np.array([0, 1, 0, 1])
    start = np.array([[0, 3], [7, 30], [16, 40], [9, 0]])
    widths = frame_sizes(plain, video, spec)[:, 1]
    there = np.stack([start[:, 0], widths - 56 - start[:, 1]], axis=1)
    a, b = (
        samples(index, spec, Draw.of_stacks(video, video, crop, np.full(4, mirror)))
        for index, crop, mirror in ((plain, start, True), (other, there, False))
    )
    error = np.abs(a - b)
    assert error.mean() < 0.02 and np.abs(a[:, ::2] + b[:, ::2]).mean() > 5 * error[:, ::2].mean()
    unmirrored = samples(plain, spec, Draw.of_stacks(video, video, start, np.zeros(4, bool))).reshape(4, 4, 2, 56, 56)
    expected = np.stack([mirrored(stack) for stack in unmirrored])
    np.testing.assert_allclose(a.reshape(expected.shape), expected, atol=2e-2 if stacking == "trajectory" else 1e-4)

    views = list(dali_loader.view_loader(plain, np.arange(2), spec, num_taus=1, batch_size=2))
    for k in range(5):
        one, two = (views[i].inputs.numpy().reshape(2, 4, 2, 56, 56) for i in (k, k + 5))
        np.testing.assert_allclose(two, np.stack([mirrored(stack) for stack in one]), atol=1e-4)


def test_what_cannot_be_given_is_refused_by_its_size_there(mixed):
    rows = np.arange(mixed.num_videos)
    with pytest.raises(ValueError, match="a/tall is stored at 90x64 px, and 101x72 px at size=72, which cannot hold "):
        check_crop(mixed, mixed.rows(["a/tall"]), StreamSpec(stream="temporal", crop_px=80, size_px=72))
    dali_loader.train_loader(mixed, rows, SPECS[2], seed=0, batch_size=4).close()
    for loader in (dali_loader, reference):
        with pytest.raises(
            ValueError, match="b/large is stored at 96x120 px; size=47 would be less than half.*Ask for 48"
        ):
            loader.view_loader(
                mixed, rows, StreamSpec(stream="spatial", crop_px=40, size_px=47), num_taus=1, batch_size=1
            ).__next__()
    with pytest.raises(ValueError, match="size_px=0 is at least 1"):
        StreamSpec(stream="spatial", size_px=0)
