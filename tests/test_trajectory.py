"""Trajectories: closed-form motions, the decoded region, and both loaders on generated videos."""

import cv2
import numpy as np
import pytest
import torch

from flow import fields as oracle
from flow.demo import draw_texture
from flow.pack import pack
from flow.video import write_video
from loaders import dali_loader
from loaders import inputs as graph_inputs
from loaders.batch import FLOW_SCALE, StreamSpec
from loaders.draw import Draw
from loaders.index import open_index
from loaders.region import Region, reachable, whole_frames
from loaders.source import Source
from loaders.trajectory import follow
from tests.conftest import pack_arrays, smooth_noise

HEIGHT, WIDTH, L = 96, 128, 8
FRAME = np.array([[HEIGHT, WIDTH]] * 3)
ANGLE = 0.03  # radians a frame
CENTRE = np.array([WIDTH / 2, HEIGHT / 2])[:, None, None]


def pixels():
    return np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))).astype(np.float64)


def rotated(points, angle):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.einsum("ij,jhw->ihw", turn, points - CENTRE) + CENTRE


def rotation_field():
    return (rotated(pixels(), ANGLE) - pixels()).astype(np.float32)


def inside(k):
    """Pixels whose trajectory has not met the border by its k-th point."""
    farthest = np.hypot(*(pixels() - CENTRE))
    return farthest < HEIGHT / 2 - 1 if k else np.ones((HEIGHT, WIDTH), bool)


def test_a_constant_motion_is_sampled_ever_further_on():
    motion = np.array([1.5, -0.75], np.float32)
    fields = np.broadcast_to(motion[:, None, None], (L, 2, HEIGHT, WIDTH)).copy()
    border = np.array([WIDTH - 1, HEIGHT - 1])[:, None, None]
    for k, points in enumerate(oracle.trajectory_points(fields)):
        expected = np.clip(pixels() + k * motion[:, None, None], 0, border)
        np.testing.assert_allclose(points, expected, atol=1e-4)
    assert np.array_equal(oracle.stack_trajectories(fields, 0, L), oracle.stack_fields(fields, 0, L))


def test_a_rotation_is_followed_around_its_centre():
    """The field is affine, so bilinear samples of it are exact: p_k is the pixel turned k - 1 times."""
    fields = np.stack([rotation_field()] * L)
    stack = oracle.stack_trajectories(fields, 0, L).reshape(L, 2, HEIGHT, WIDTH)
    for k, points in enumerate(oracle.trajectory_points(fields)):
        expected = rotated(pixels(), k * ANGLE)
        assert np.abs(points - expected)[:, inside(k)].max() < 1e-3
        np.testing.assert_allclose(
            stack[k][:, inside(k)], (rotated(expected, ANGLE) - expected)[:, inside(k)], atol=1e-4
        )
    same_place = oracle.stack_fields(fields, 0, L).reshape(L, 2, HEIGHT, WIDTH)
    assert np.abs(same_place - stack)[-1].max() > 0.2  # what eq. (1) would give instead


def test_bilinear_samples_equal_opencvs():
    rng = np.random.default_rng(0)
    field = np.stack([smooth_noise(rng, (30, 40)) for _ in range(2)])
    points = rng.uniform(0, 1, (2, 50, 60)).astype(np.float32) * np.array([39, 29], np.float32)[:, None, None]
    expected = [cv2.remap(component, points[0], points[1], cv2.INTER_LINEAR) for component in field]
    np.testing.assert_allclose(oracle.sample_bilinear(field, points), expected, atol=0.02)  # OpenCV: 1/32 px steps
    corners = np.array([[0, 39, 0, 39], [0, 0, 29, 29]], np.float32)
    np.testing.assert_array_equal(oracle.sample_bilinear(field, corners), field[:, [0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize("stack", [oracle.stack_fields, oracle.stack_trajectories])
def test_bidirectional_stacks_are_the_mirror_image_in_time(stack):
    """Played backwards, forward fields become backward ones: the two halves change places."""
    rng = np.random.default_rng(1)
    forward, backward = (
        np.stack([[smooth_noise(rng, (24, 32)) for _ in range(2)] for _ in range(9)]) for _ in range(2)
    )
    whole = oracle.stack_bidirectional(forward, backward, 4, 6, stack)
    played_backwards = oracle.stack_bidirectional(backward[::-1], forward[::-1], 9 - 4, 6, stack)
    assert np.array_equal(whole[:6], played_backwards[6:]) and np.array_equal(whole[6:], played_backwards[:6])
    assert np.array_equal(whole[:2], forward[4]) and np.array_equal(whole[6:8], backward[3])  # d_4, and b_4
    for tau, L in ((2, 6), (7, 6), (4, 5)):
        with pytest.raises(ValueError, match=f"tau={tau}, L={L}: L is even, and tau in"):
            oracle.stack_bidirectional(forward, backward, tau, L, stack)


def test_trajectories_of_the_mirrored_video_are_the_mirrored_ones():
    rng = np.random.default_rng(2)
    fields = np.stack([[smooth_noise(rng, (30, 40), 2) for _ in range(2)] for _ in range(4)])
    mirrored = np.stack([oracle.mirror_field(field) for field in fields])
    stack = oracle.stack_trajectories(fields, 0, 4).reshape(4, 2, 30, 40)
    expected = np.concatenate([oracle.mirror_field(field) for field in stack])
    np.testing.assert_allclose(oracle.stack_trajectories(mirrored, 0, 4), expected, atol=2e-3)


# --- the loaders -------------------------------------------------------------------------------------------------


def one_batch(root, spec, draw_from=None, **options):
    index = open_index(root)
    with dali_loader.train_loader(index, index.split("split1_train"), spec, seed=0, **options) as loader:
        return next(loader)


@pytest.fixture(scope="module")
def turning(tmp_path_factory):
    """A packed set of generated *videos*: a texture that turns, and one that moves by (2, 1) px a frame."""
    folder = tmp_path_factory.mktemp("turning")
    texture = draw_texture(np.random.default_rng(3), 3 * WIDTH, 3 * HEIGHT)
    middle = (1.5 * WIDTH, 1.5 * HEIGHT)

    def frames(t, angle, motion):
        warp = cv2.getRotationMatrix2D(middle, -np.degrees(angle * t), 1)  # OpenCV counts the other way round
        warp[:, 2] += np.array(motion) * t - np.array([WIDTH, HEIGHT])
        return cv2.warpAffine(texture, warp, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC)

    for name, angle, motion in (("turn/a", ANGLE, (0, 0)), ("move/a", 0, (2, 1))):
        (folder / "videos" / name).parent.mkdir(parents=True)
        path = (folder / "videos" / name).with_suffix(".avi")
        write_video(path, (frames(t, angle, motion).astype(np.uint8) for t in range(L + 1)))
    pack(folder / "videos", folder / "packed", size_px=HEIGHT, num_workers=1)
    (folder / "packed" / "splits" / "split1_train.txt").write_text("move/a\nturn/a\n")
    return folder / "packed"


def test_the_motion_of_a_generated_video_is_followed(turning):
    """From video to tensor: flow, codec, graph and trajectories, against what the video is known to do."""
    options = dict(stream="temporal", L=L, crop_px=64, subtract_mean=False, random_mirror=False)
    index = open_index(turning)
    errors = {}
    for stacking in ("trajectory", "flow"):
        batch = one_batch(turning, StreamSpec(stacking=stacking, **options), batch_size=16)
        for video_id, (y, x), inputs in zip(
            index.video_ids(batch.draw.video), batch.draw.crop.tolist(), batch.inputs.numpy(), strict=True
        ):
            fields = inputs.reshape(L, 2, 64, 64) / FLOW_SCALE
            crop = (slice(None), slice(y, y + 64), slice(x, x + 64))
            for k, field in enumerate(fields):
                at = rotated(pixels(), k * ANGLE)
                expected = {"turn/a": rotated(at, ANGLE) - at, "move/a": np.full_like(at, 1) * [[[2]], [[1]]]}
                seen = inside(1)[crop[1:]]
                error = np.abs(field - expected[video_id][crop])[:, seen].mean()
                errors.setdefault((video_id, stacking), []).append((k, error))
    mean = {key: np.mean([error for _, error in found]) for key, found in errors.items()}
    late = {key: np.mean([error for k, error in found if k == L - 1]) for key, found in errors.items()}
    assert mean["move/a", "trajectory"] < 0.1 and mean["turn/a", "trajectory"] < 0.1
    assert late["turn/a", "flow"] > 3 * late["turn/a", "trajectory"]  # eq. (1) does not follow


@pytest.fixture(scope="module")
def motions():
    """Videos whose motion is smooth and has a direction: crops reach far to one side, and never everywhere."""
    rng = np.random.default_rng(4)
    frames = np.zeros((14, HEIGHT, WIDTH, 3), np.uint8)

    def fields():
        waves = [[smooth_noise(rng, (HEIGHT, WIDTH), 0.5) for _ in range(2)] for _ in range(13)]
        return (np.array(waves) + np.array([1.5, -1.0])[:, None, None]).astype(np.float32)

    return {"a/1": (frames, fields(), fields()), "b/1": (frames, fields(), fields())}


@pytest.fixture(scope="module")
def moderate(tmp_path_factory, motions):
    """A packed set of `motions`."""
    return pack_arrays(tmp_path_factory.mktemp("moderate") / "set", motions)


@pytest.mark.parametrize("subtract_mean", [False, True])
@pytest.mark.parametrize("stacking", ["flow", "trajectory"])
@pytest.mark.parametrize(("L", "bidirectional"), [(1, False), (6, False), (2, True), (6, True)])
def test_every_temporal_input_is_the_oracles(moderate, motions, L, stacking, bidirectional, subtract_mean):
    """Against flow.fields on the arrays that were packed; what remains is the error of the codec."""
    spec = StreamSpec(
        stream="temporal", L=L, crop_px=40, stacking=stacking, bidirectional=bidirectional, subtract_mean=subtract_mean
    )
    batch = one_batch(moderate, spec, batch_size=16)
    stack = {"flow": oracle.stack_fields, "trajectory": oracle.stack_trajectories}[stacking]
    assert batch.draw.mirror.any() and not batch.draw.mirror.all()
    for i, video_id in enumerate(open_index(moderate).video_ids(batch.draw.video)):
        _, forward, backward = motions[video_id]
        tau = int(batch.draw.tau[i])
        if bidirectional:
            whole = oracle.stack_bidirectional(forward, backward, tau, L, stack)
            used = [*forward[tau : tau + L // 2], *backward[tau - L // 2 : tau][::-1]]
        else:
            whole, used = stack(forward, tau, L), forward[tau : tau + L]
        if subtract_mean:
            whole = whole - np.concatenate([oracle.field_mean(field) for field in used])[:, None, None]
        y, x = batch.draw.crop[i]
        fields = whole[:, y : y + 40, x : x + 40].reshape(L, 2, 40, 40)
        expected = np.stack([oracle.mirror_field(field) if batch.draw.mirror[i] else field for field in fields])
        error = np.abs(batch.inputs[i].numpy() / FLOW_SCALE - expected.reshape(2 * L, 40, 40))
        assert error.mean() < 0.02 and error.max() < 0.2, (video_id, tau)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_following_is_the_oracles_on_every_device(motions, device):
    """From the same fields, so that no decoder's difference stands between: a region that is off by a pixel shows."""
    fields = motions["a/1"][1][:6]
    spec = StreamSpec(stream="temporal", L=6, crop_px=40, stacking="trajectory")
    whole = oracle.stack_trajectories(fields, 0, 6)
    start = np.array([[3, 70], [50, 0], [20, 40]])
    region = Region(np.array([[0, 10], [25, 0], [0, 0]]), np.array([[96, 118], [71, 128], [96, 128]]), FRAME)
    padded = np.zeros((3, 6, 2, HEIGHT, WIDTH), np.float32)
    for sample, (y, x), (height, width) in zip(padded, region.start, region.size, strict=True):
        sample[..., :height, :width] = fields[..., y : y + height, x : x + width]
    decoded = torch.from_numpy(padded.reshape(3, 12, HEIGHT, WIDTH)).to(device)
    found = follow(decoded, start, (40, 40), np.array([False, True, False]), region, spec).cpu().numpy()
    for i, (y, x) in enumerate(start):
        expected = whole[:, y : y + 40, x : x + 40]
        np.testing.assert_allclose(found[i], expected[:, :, ::-1] if i == 1 else expected, atol=2e-3)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_decoded_is_enough_and_no_more_than_can_be_reached(moderate, monkeypatch, bidirectional):
    spec = StreamSpec(stream="temporal", L=6, crop_px=40, stacking="trajectory", bidirectional=bidirectional)
    ours = one_batch(moderate, spec, batch_size=32)
    index = open_index(moderate)
    with dali_loader.train_loader(index, index.split("split1_train"), spec, seed=0, batch_size=32) as loader:
        entries = loader._entries(ours.draw)
    region = reachable(ours.draw, entries, spec, index)
    assert (region.size < region.frame).any(axis=1).mean() > 0.9  # parts of frames, most of the time
    assert (region.start >= 0).all() and (region.start + region.size <= region.frame).all()

    def instead(find):
        for module in (dali_loader, graph_inputs):  # what is decoded, and where in it the samples are
            monkeypatch.setattr(module, "reachable", find)

    instead(lambda draw, entries, spec, index: whole_frames(draw, spec, index))
    whole = one_batch(moderate, spec, batch_size=32)
    torch.testing.assert_close(ours.inputs, whole.inputs, atol=1e-4, rtol=0)

    def crop_only(draw, entries, spec, index):
        region = whole_frames(draw, spec, index)
        return type(region)(draw.crop, np.full_like(draw.crop, spec.crop_px), region.frame)

    instead(crop_only)
    cut = one_batch(moderate, spec, batch_size=32)
    assert (cut.inputs - whole.inputs).abs().max() > 0.1  # what a crop alone would get wrong


def test_the_region_is_the_crop_where_nothing_moves(moderate):
    index = open_index(moderate)
    spec = StreamSpec(stream="temporal", L=6, crop_px=40, stacking="trajectory")
    crop = np.array([[0, 0], [20, 30]])
    draw = Draw.of_stacks(np.zeros(2, np.int64), np.zeros(2, np.int64), crop, np.zeros(2, bool))
    still = np.zeros((2, 6, 2), [("lo", "f4"), ("hi", "f4")])
    region = reachable(draw, still, spec, index)
    assert (region.start >= crop - 1).all() and (region.size <= 42).all()
    still["hi"][1, 0] = 3, 0  # the first dx of the second sample goes up to 3 px to the right
    moved = reachable(draw, still, spec, index)
    assert (moved.size - region.size).tolist() == [[0, 0], [0, 3]]
    still["hi"][1, 0], still["hi"][1, -1] = (0, 0), (9, 9)  # nothing is sampled behind the last field
    assert (reachable(draw, still, spec, index).size == region.size).all()


def test_points_are_not_followed_through_flow_less_the_cameras_motion(packed):
    index = open_index(packed)
    index.metadata["flow"] = {"camera": {"model": "homography"}}
    Source(index, StreamSpec(stream="temporal", crop_px=32, L=4))
    with pytest.raises(ValueError, match="less the camera's motion.*Take data.stacking=flow, or pack the set without"):
        Source(index, StreamSpec(stream="temporal", crop_px=32, L=4, stacking="trajectory"))
