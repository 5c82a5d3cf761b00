"""flow.camera: the camera's motion goes, what moves in the scene stays; what does not show it is left, and counted."""

import json

import numpy as np
import pytest

from flow import pack
from flow.camera import CameraError, camera_metadata, camera_motion, estimate_camera, subtract_camera
from flow.clips import read_clips
from flow.codec import decode_component
from flow.demo import draw_texture
from flow.extract import flow_method
from flow.video import import_cv2, write_video

HEIGHT, WIDTH = 120, 160
OBJECT = (slice(40, 90), slice(50, 110))
VELOCITY = np.array([4.0, -3.0], np.float32)  # of the object, px/frame

#: A turn by 0.7 degrees with a zoom of 1 %, a shift, and some perspective; and no motion at all.
TURN = np.array([[1.0099, -0.0123, 2.6], [0.0123, 1.0099, -1.8], [2e-5, -3e-5, 1.0]])
REST = np.eye(3)


def film(camera, steps):
    """Grey frames (H, W) uint8 of a texture that moves by H `camera` at every step, and of an object with VELOCITY."""
    cv2 = import_cv2()
    rng = np.random.default_rng(5)
    texture, sprite = draw_texture(rng, 512, 512), draw_texture(rng, 60, 50)
    frames = []
    for k in range(steps + 1):
        place = np.linalg.matrix_power(camera, k) @ [[1, 0, -150], [0, 1, -150], [0, 0, 1]]
        frame = cv2.warpPerspective(texture, place, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_WRAP)
        shift = np.array([[1, 0, OBJECT[1].start + k * VELOCITY[0]], [0, 1, OBJECT[0].start + k * VELOCITY[1]]])
        cv2.warpAffine(sprite, shift, (WIDTH, HEIGHT), frame, borderMode=cv2.BORDER_TRANSPARENT)
        frames.append(frame.round().clip(0, 255).astype(np.uint8))
    return frames


def points(homography):
    """H x - x (2, H, W) from the definition, one point at a time of a coarse grid, and the grid."""
    grid = [(x, y) for y in range(0, HEIGHT, 17) for x in range(0, WIDTH, 17)]
    moved = [homography @ (x, y, 1) for x, y in grid]
    return np.array(grid), np.array([(m[0] / m[2] - x, m[1] / m[2] - y) for m, (x, y) in zip(moved, grid, strict=True)])


def far_from_object():
    """Pixels (H, W) that show the background in both frames, and not the frame's border."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:-10, 10:-10] = True
    mask[OBJECT[0].start - 12 : OBJECT[0].stop + 12, OBJECT[1].start - 12 : OBJECT[1].stop + 12] = False
    return mask


def test_the_motion_is_that_of_the_homography():
    grid, moved = points(TURN)
    motion = camera_motion(TURN, HEIGHT, WIDTH)
    assert motion.shape == (2, HEIGHT, WIDTH) and motion.dtype == np.float32
    assert np.abs(motion[:, grid[:, 1], grid[:, 0]].T - moved).max() < 1e-4
    assert not camera_motion(REST, HEIGHT, WIDTH).any()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("camera", [TURN, REST], ids=["turn", "rest"])
def test_the_background_rests_and_the_object_keeps_its_motion(camera, backward):
    grey0, grey1 = film(camera, 1)
    truth, velocity = camera, VELOCITY
    if backward:
        grey0, grey1, truth, velocity = grey1, grey0, np.linalg.inv(camera), -VELOCITY
    field = flow_method()(grey0, grey1)
    homography = estimate_camera(grey0, field)
    motion = camera_motion(truth, HEIGHT, WIDTH)
    assert np.abs(camera_motion(homography, HEIGHT, WIDTH) - motion).mean() < 0.05
    residual = subtract_camera(field, homography)
    assert np.hypot(*residual)[far_from_object()].mean() < 0.1
    inside = (slice(None), slice(52, 78), slice(66, 94))
    own = velocity[:, None, None] - motion[inside]
    assert np.hypot(*(residual[inside] - own)).mean() < 0.2 < np.hypot(*own).min()


def test_the_estimate_depends_on_the_pair_alone():
    grey0, grey1 = film(TURN, 1)
    field = flow_method()(grey0, grey1)
    first = estimate_camera(grey0, field)
    import_cv2().setRNGSeed(7)
    with pytest.raises(CameraError):
        estimate_camera(grey0, np.random.default_rng(0).normal(0, 5, field.shape).astype(np.float32))
    assert np.array_equal(estimate_camera(grey0, field), first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda grey, motion: (np.full_like(grey, 90), motion), "0 corners, expected 20"),
        (lambda grey, motion: (grey, np.random.default_rng(1).normal(0, 5, motion.shape)), "of .* corners move alike"),
        (lambda grey, motion: (grey, 20 * motion), "would move by more than 30 px"),
        (lambda grey, motion: (grey, -2.2 * np.mgrid[:HEIGHT, :WIDTH][::-1]), "would move by more than 30 px"),
    ],
    ids=["nothing", "noise", "far", "turned over"],
)
def test_what_no_camera_explains_is_refused(make, message):
    grey, field = make(film(REST, 0)[0], camera_motion(TURN, HEIGHT, WIDTH))
    with pytest.raises(CameraError, match=message):
        estimate_camera(grey, field.astype(np.float32))


def test_metadata_name_what_was_done():
    assert camera_metadata(None) is None
    metadata = json.loads(json.dumps(camera_metadata("homography")))
    assert metadata["model"] == "homography" and metadata["parameters"]["threshold_px"] == 0.3
    with pytest.raises(ValueError, match="camera 'affine' is unknown; there is homography"):
        camera_metadata("affine")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of six frames: a camera that turns, and grey walls of changing brightness."""
    root = tmp_path_factory.mktemp("videos")
    frames = {"turn": film(TURN, 5), "wall": [np.full((HEIGHT, WIDTH), 90 + 9 * k, np.uint8) for k in range(6)]}
    for name, greys in frames.items():
        (root / name).mkdir()
        write_video(root / name / "clip.avi", [np.repeat(grey[..., None], 3, 2) for grey in greys])
    return root


def run(videos, out, *options):
    size = ["--size", str(HEIGHT), "--workers", "1"]
    return pack.main(["--videos", str(videos), "--out", str(out), "--backward", *size, *options])


def unpack(out):
    """{(video id, kind): components (T-1, H, W) px/frame} of a packed set."""
    found = {}
    for path in out.glob("shard-*.tar"):
        content = path.read_bytes()
        for clip in read_clips(path):
            for kind in ("dx", "dy", "bdx", "bdy"):
                rows = clip.entries[kind][1]
                jpegs = [content[row["offset"] : row["offset"] + row["size"]] for row in rows]
                decoded = [decode_component(j, row["lo"], row["hi"]) for j, row in zip(jpegs, rows, strict=True)]
                found[clip.video_id, kind] = np.stack(decoded)
    return found


def test_a_pack_less_the_cameras_motion(videos, tmp_path, capsys):
    assert run(videos, tmp_path / "raw") == 0 and run(videos, tmp_path / "less", "--camera", "homography") == 0
    assert "camera motion subtracted; 10 fields that do not show it" in capsys.readouterr().out
    raw, less = unpack(tmp_path / "raw"), unpack(tmp_path / "less")
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:-10, 10:30] = True  # the object comes never here
    for kinds in (("dx", "dy"), ("bdx", "bdy")):
        before, after = (np.stack([fields["turn/clip", kind] for kind in kinds]) for fields in (raw, less))
        assert np.hypot(*after)[:, mask].mean() < 0.15 and 10 * 0.15 < np.hypot(*before)[:, mask].mean()
        for kind in kinds:
            assert np.array_equal(raw["wall/clip", kind], less["wall/clip", kind])
    datasets = {name: json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("raw", "less")}
    assert datasets["raw"]["flow"]["camera"] is None and datasets["raw"]["summary"]["fields_uncompensated"] == 0
    assert datasets["less"]["flow"]["camera"] == camera_metadata("homography")
    assert datasets["less"]["summary"]["fields_uncompensated"] == 2 * 5


def test_a_rerun_knows_whether_the_camera_was_subtracted(videos, tmp_path, capsys):
    out = tmp_path / "set"
    assert run(videos, out) == 0
    dataset = json.loads((out / "dataset.json").read_text())
    del dataset["flow"]["camera"]  # as packs from before there was a choice
    (out / "dataset.json").write_text(json.dumps(dataset))
    assert run(videos, out) == 0 and "nothing to do" in capsys.readouterr().out
    assert run(videos, out, "--camera", "homography") == 2
    assert "flow.camera: None before, {'model': 'homography'" in capsys.readouterr().err
    dataset["flow"]["camera"] = camera_metadata("homography")
    (out / "dataset.json").write_text(json.dumps(dataset))
    assert run(videos, out) == 2
    message = capsys.readouterr().err
    assert "flow.camera: {'model': 'homography'" in message and "before, None now" in message
