"""flow.flow_dirs: other tools' JPEGs packed byte for byte, and everything that does not fit named."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from flow import pack
from flow.catalog import read_hmdb51_lists
from flow.clips import read_clips
from flow.codec import Codec, decode_grey, encode_component, encode_rgb
from flow.flow_files import FIELDS, FRAMES, find_files, list_flow_dirs
from flow.verify import verify
from flow.video import import_cv2
from loaders import dali_loader
from loaders.batch import FLOW_SCALE, StreamSpec
from loaders.index import open_index
from tests.conftest import random_video

BOUND_PX = 8.0
CODEC = Codec(range="fixed", bound_px=BOUND_PX, quality=95)


def write_frames(folder, frames, first=1, name="img_{:05d}.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, first):
        (folder / name.format(number)).write_bytes(encode_rgb(frame, CODEC.quality))


def write_fields(folders, fields, first=1, name="flow_{}_{:05d}.jpg"):
    for folder, axis, components in zip(folders, "xy", fields.swapaxes(0, 1), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for number, component in enumerate(components, first):
            (folder / name.format(axis, number)).write_bytes(encode_component(component, CODEC).jpeg)


def write_video(folder, num_frames=4, height=64, width=85, seed=0):
    """A sound video as TSN's tools name it, but with its first frame."""
    frames, fields = random_video(np.random.default_rng(seed), num_frames, height, width)
    write_frames(folder, frames)
    write_fields((folder, folder), fields)
    return folder


def run(flow_dir, out, *options):
    return pack.main(["--flow-dir", str(flow_dir), "--range", str(BOUND_PX), "--out", str(out), *map(str, options)])


def bad_videos(out):
    return dict(line.split("\t") for line in (out / "bad_videos.txt").read_text().splitlines())


def contents(out):
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "dataset.json"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def members(out):
    """{video id: {kind: [(bytes, index entry), ...] in time order}}, and the clips' headers."""
    found, clips = {}, {}
    for shard in sorted(out.glob("shard-*.tar")):
        content = shard.read_bytes()
        for clip in read_clips(shard):
            clips.setdefault(clip.video_id, []).append(clip)
            for kind, (_, entries) in clip.entries.items():
                images = [(content[e["offset"] : e["offset"] + e["size"]], e) for e in entries]
                found.setdefault(clip.video_id, {}).setdefault(kind, []).extend(images)
    return found, clips


#: video -> num_frames, height, width, first frame's number, first field's number, names of frames and of fields
LAYOUTS = {
    "Run/from_one": (66, 64, 85, 1, 1, "img_{:05d}.jpg", "flow_{}_{:05d}.jpg"),
    "Run/from_zero": (5, 64, 85, 0, 0, "img_{:04d}.jpg", "{}_{:04d}.jpg"),
    "Sit/flow_from_zero": (4, 72, 96, 1, 0, "image_{:06d}.JPG", "{}_{:06d}.jpeg"),
    "Sit/no [zeros]!": (12, 90, 64, 1, 1, "img_{:d}.jpg", "flow_{}_{:d}.jpg"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Videos of several layouts, lengths and sizes."""
    root = tmp_path_factory.mktemp("flow")
    for seed, (video_id, (num_frames, height, width, *numbers, image, field)) in enumerate(LAYOUTS.items()):
        frames, fields = random_video(np.random.default_rng(seed), num_frames, height, width)
        write_frames(root / video_id, frames, numbers[0], image)
        write_fields((root / video_id,) * 2, fields, numbers[1], field)
    (root / "Run/from_one/n_frames").write_text("66")  # is no image
    (root / "Run/from_one/._img_00001.jpg").write_bytes(b"hidden")
    return root


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "set"
    assert run(folders, out, "--videos-per-shard", 2, "--workers", 2, "--method-name", "tvl1") == 0
    return out


def files_of(folders, video_id, kind):
    """A video's files of a kind in time order, found without the code under test."""
    num_frames, _, _, first_frame, first_field, image, field = LAYOUTS[video_id]
    if kind == "rgb":
        return [folders / video_id / image.format(first_frame + t) for t in range(num_frames)]
    return [folders / video_id / field.format(kind[1], first_field + t) for t in range(num_frames - 1)]


def test_members_are_the_files_byte_for_byte(folders, packed):
    found, clips = members(packed)
    assert sorted(found) == sorted(LAYOUTS)
    for video_id, (num_frames, height, width, *_) in LAYOUTS.items():
        for kind in ("rgb", "dx", "dy"):
            files = files_of(folders, video_id, kind)
            assert [jpeg for jpeg, _ in found[video_id][kind]] == [file.read_bytes() for file in files]
        for jpeg, entry in found[video_id]["dx"] + found[video_id]["dy"]:
            mean_code = decode_grey(jpeg).mean(dtype=np.float64)
            assert (entry["lo"], entry["hi"]) == (-BOUND_PX, BOUND_PX)
            assert entry["mean"] == pytest.approx(-BOUND_PX + mean_code * 2 * BOUND_PX / 255, abs=1e-5)
        assert {(c.height, c.width, c.class_name) for c in clips[video_id]} == {(height, width, video_id.split("/")[0])}
        assert [c.is_last for c in clips[video_id]] == [False] * ((num_frames - 1) // 64) + [True]


def test_the_set_is_sound_and_says_what_is_known(packed, folders, capsys):
    report = verify(packed, deep=True)
    assert not report.damages and report.num_members == sum(3 * layout[0] - 2 for layout in LAYOUTS.values())
    dataset = json.loads((packed / "dataset.json").read_text())
    assert Codec.from_metadata(dataset["codec"]) == Codec(range="fixed", bound_px=BOUND_PX, quality=None)
    assert dataset["flow"]["method"] == "tvl1" and dataset["flow"]["library"] is None
    assert (dataset["summary"]["size_px_min"], dataset["summary"]["size_px_max"]) == (64, 72)
    assert not any("ratio" in key or "error" in key for key in dataset["summary"])
    assert run(folders, packed, "--videos-per-shard", 2, "--method-name", "tvl1") == 0
    printed = capsys.readouterr().out
    assert (
        "nothing to do" in printed
        and "83 fields (tvl1)" in printed
        and "-8..8 px" in printed
        and "64..72 px" in printed
    )


def test_nothing_is_encoded_at_a_quality_that_nobody_knows():
    with pytest.raises(ValueError, match="quality=None: files of other tools"):
        encode_rgb(np.zeros((16, 16, 3), np.uint8), Codec(quality=None).quality)


def test_the_number_of_workers_does_not_show(folders, packed, tmp_path):
    assert run(folders, tmp_path / "set", "--videos-per-shard", 2, "--workers", 1, "--method-name", "tvl1") == 0
    assert contents(tmp_path / "set") == contents(packed)


@pytest.mark.parametrize("stream", ["temporal", "spatial"])
def test_training_batches_are_those_of_the_files(folders, packed, stream):
    cv2, index = import_cv2(), open_index(packed)
    spec = StreamSpec(stream=stream, L=3, crop_px=48)
    ids = index.video_ids(range(index.num_videos))
    with dali_loader.train_loader(index, index.split("all"), spec, seed=1, batch_size=16) as loader:
        batch = next(loader)
    assert len(set(batch.draw.video.tolist())) > 2 and batch.draw.mirror.any() and not batch.draw.mirror.all()
    for i, inputs in enumerate(batch.inputs.numpy()):
        video_id, tau, (y0, x0) = ids[batch.draw.video[i]], int(batch.draw.tau[i]), batch.draw.crop[i]
        assert index.classes[batch.labels[i]] == video_id.split("/")[0]
        if stream == "spatial":  # the loaders' own tests compare its values; here, that it is the frame
            image = cv2.imread(str(files_of(folders, video_id, "rgb")[tau]))[y0 : y0 + 48, x0 : x0 + 48, ::-1]
            image = image[:, ::-1] if batch.draw.mirror[i] else image
            assert (
                min(
                    np.corrcoef(x.ravel(), y.ravel())[0, 1]
                    for x, y in zip(inputs, image.transpose(2, 0, 1), strict=True)
                )
                > 0.999
            )
            continue
        for channel, found in enumerate(inputs):
            file = files_of(folders, video_id, ("dx", "dy")[channel % 2])[tau + channel // 2]
            codes = cv2.imread(str(file), cv2.IMREAD_UNCHANGED).astype(np.float64)
            component = (codes - codes.mean()) * 2 * BOUND_PX / 255
            expected = component[y0 : y0 + 48, x0 : x0 + 48]
            if batch.draw.mirror[i]:
                expected = expected[:, ::-1] * (-1 if channel % 2 == 0 else 1)
            np.testing.assert_allclose(found, expected * FLOW_SCALE, atol=1e-3)


def test_real_jpegs_of_another_tool(real_data, tmp_path):
    (tmp_path / "flow/Class").mkdir(parents=True)
    (tmp_path / "flow/Class/v").symlink_to(real_data / "flow_jpegs")
    assert run(tmp_path / "flow", tmp_path / "set") == 0
    found, _ = members(tmp_path / "set")
    for kind, begin, count in (("rgb", "img_", 6), ("dx", "x_", 5), ("dy", "y_", 5)):
        files = [real_data / f"flow_jpegs/{begin}{number:05d}.jpg" for number in range(1, count + 1)]
        assert [jpeg for jpeg, _ in found["Class/v"][kind]] == [file.read_bytes() for file in files]
    assert not verify(tmp_path / "set", deep=True).damages


# --- layouts -----------------------------------------------------------------------------------------------------


def write_lists(folder, *video_ids):
    folder.mkdir()
    classes = {name: number for number, name in enumerate(sorted({i.split("/")[0] for i in video_ids}), 5)}
    (folder / "classInd.txt").write_text("".join(f"{number} {name}\n" for name, number in classes.items()))
    (folder / "trainlist01.txt").write_text("".join(f"{i}.avi {classes[i.split('/')[0]]}\n" for i in video_ids[1:]))
    (folder / "testlist01.txt").write_text(f"{video_ids[0]}.avi\n")
    return folder


def test_lists_tell_the_classes_of_flat_folders(tmp_path, capsys):
    for name in ("v_run_1", "v_Sit_1", "v_stand_1", "v_sit_2"):
        write_video(tmp_path / "flow" / name, 2)
    assert run(tmp_path / "flow", tmp_path / "set") == 2
    assert "v_Sit_1 lies in no class folder. Give the official lists as --splits" in capsys.readouterr().err
    lists = write_lists(tmp_path / "lists", "Run/v_run_1", "Sit/v_sit_1", "Sit/v_sit_2", "Run/v_gone")
    assert run(tmp_path / "flow", tmp_path / "set", "--splits", lists) == 1
    found, clips = members(tmp_path / "set")
    assert sorted(found) == ["Run/v_run_1", "Sit/v_sit_2"] and clips["Sit/v_sit_2"][0].class_id == 6
    assert (tmp_path / "set/splits/split1_test.txt").read_text() == "Run/v_run_1\n"
    assert (tmp_path / "set/missing_videos.txt").read_text() == "Sit/v_sit_1\nRun/v_gone\n"
    reasons = bad_videos(tmp_path / "set")
    assert sorted(reasons) == ["v_Sit_1", "v_stand_1"]
    assert "is like v_sit_1: rename it" in reasons["v_Sit_1"] and "hold its name for no class" in reasons["v_stand_1"]
    assert "stand in no list; they are packed" not in capsys.readouterr().out


def test_lists_tell_the_classes_of_videos_of_no_split_too(tmp_path):
    """HMDB-51 names 395 videos that no split uses. A name in two classes tells neither."""
    (tmp_path / "sit_test_split1.txt").write_text("a.avi 1\nb.avi 2\nc.avi 0\ne.avi 1\n")
    (tmp_path / "run_test_split1.txt").write_text("e.avi 2\n")
    for name in "abcde":
        touch(tmp_path / "flow" / name, "img_00001.jpg")
    videos = list_flow_dirs(tmp_path / "flow", None, read_hmdb51_lists(tmp_path))
    assert [video.video_id for video in videos] == ["d", "e", "sit/a", "sit/b", "sit/c"]
    assert [bool(video.problem) for video in videos] == [True, True, False, False, False]


def test_frames_and_fields_may_stand_in_trees_of_their_own(tmp_path, capsys):
    frames, fields = random_video(np.random.default_rng(0), 3, 64, 85)
    flow, images = tmp_path / "flow", tmp_path / "jpegs"
    for name in ("v_a", "v_b", "v_c"):
        write_fields((flow / "u" / name, flow / "v" / name), fields, name="frame{1:06d}.jpg")
    for name in ("v_a", "v_b", "v_d"):
        write_frames(images / name, frames, name="frame{:06d}.jpg")
    lists = write_lists(tmp_path / "lists", "Run/v_a", "Sit/v_b", "Sit/v_c", "Sit/v_d")
    assert run(flow, tmp_path / "set", "--splits", lists) == 2
    assert "fields alone, in u and v: give the frames' folder as --frames-dir" in capsys.readouterr().err
    assert run(flow, tmp_path / "set", "--splits", lists, "--frames-dir", images) == 1
    found, _ = members(tmp_path / "set")
    for kind, folder in (("rgb", images), ("dx", flow / "u"), ("dy", flow / "v")):
        assert [jpeg for jpeg, _ in found["Sit/v_b"][kind]] == [
            f.read_bytes() for f in sorted((folder / "v_b").iterdir())
        ]
    reasons = bad_videos(tmp_path / "set")
    assert sorted(reasons) == ["Sit/v_c", "Sit/v_d"]
    assert (
        "has no frames: expected img_00001.jpg or" in reasons["Sit/v_c"] and str(images / "v_c") in reasons["Sit/v_c"]
    )
    assert f"has no x components: expected frame00001.jpg, ... in {flow / 'u/v_d'}" in reasons["Sit/v_d"]


def test_fields_of_flow_x_and_flow_y_beside_a_tree_of_frames(tmp_path):
    frames, fields = random_video(np.random.default_rng(0), 3, 64, 85)
    write_fields((tmp_path / "flow/Run/v_a",) * 2, fields)
    write_frames(tmp_path / "frames/Run/v_a", frames, first=0)
    assert run(tmp_path / "flow", tmp_path / "set", "--frames-dir", tmp_path / "frames") == 0
    assert {kind: len(images) for kind, images in members(tmp_path / "set")[0]["Run/v_a"].items()} == {
        "rgb": 3, "dx": 2, "dy": 2
    }  # fmt: skip


# --- what does not fit -------------------------------------------------------------------------------------------


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def names(begin, numbers):
    return [f"{begin}{number:05d}.jpg" for number in numbers]


def find(folder, frames, x, y, *more, extra_field=None):
    touch(folder, *names("img_", frames), *names("flow_x_", x), *names("flow_y_", y), *more)
    return find_files([(folder, FIELDS | FRAMES)], extra_field)


@pytest.mark.parametrize(
    ("frames", "x", "y", "more", "message"),
    [
        ((1, 2, 4), (1, 2), (1, 2), [], "lacks img_00003.jpg, but has img_00004.jpg"),
        ((1, 2, 3), (1, 3), (1, 2), [], "lacks flow_x_00002.jpg, but has flow_x_00003.jpg"),
        ((1, 2, 3), (1, 2), (1,), [], "lacks flow_y_00002.jpg, but has flow_x_00002.jpg"),
        ((0, 1, 2), (1, 2), (0, 1, 2), [], "lacks flow_x_00000.jpg, but has flow_y_00000.jpg"),
        ((2, 3, 4), (1, 2), (1, 2), [], "lacks img_00001.jpg: img_00002.jpg is the first, expected number 0 or 1"),
        (
            (1, 2, 3, 4),
            (1, 2),
            (1, 2),
            [],
            "lacks flow_x_00003.jpg: it has 4 frames and 2 fields, expected one .* less",
        ),
        ((1, 2), (1, 2, 3), (1, 2, 3), [], "lacks img_00003.jpg: it has 2 frames and 3 fields"),
        (
            (0, 1, 2),
            (0, 1, 2),
            (0, 1, 2),
            [],
            "flow_x_00000.jpg leads to img_00000.jpg.*flow_x_00002.jpg leads to a frame",
        ),
        ((1,), (1,), (1,), [], "lacks img_00002.jpg: it has 1 frames and 1 fields"),
        ((), (1,), (1,), [], "has no frames: expected img_00001.jpg or image_00001.jpg"),
        ((1, 2), (1,), (), [], "has no y components: expected flow_y_00001.jpg or y_00001.jpg"),
        ((1, 2), (1,), (1,), ["flow_i_00001.jpg"], "holds flow_i_00001.jpg, expected only names like.*Take it away"),
        ((1, 2), (1,), (1,), ["thumb.png"], "holds thumb.png, expected only names"),
        ((1, 2), (), (), ["x_00001.png"], "holds x_00001.png: only JPEGs can be packed as they are"),
        ((1, 2), (1,), (1,), ["img_1.jpg"], "holds img_00001.jpg and img_1.jpg: which of them is meant"),
        ((1, 2), (1,), (1,), ["x_00002.jpg"], "holds flow_x_00001.jpg and x_00002.jpg: which of them is meant"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, frames, x, y, more, message):
    with pytest.raises(ValueError, match=message):
        find(tmp_path, frames, x, y, *more)


@pytest.mark.parametrize(("extra_field", "kept"), [("first", (2, 3)), ("last", (1, 2))])
def test_one_field_too_many_is_left_out_when_told_which(tmp_path, extra_field, kept):
    files = find(tmp_path, (1, 2, 3), (1, 2, 3), (1, 2, 3), extra_field=extra_field)
    assert [x.name for x, _ in files.fields] == names("flow_x_", kept) and len(files.frames) == 3
    touch(tmp_path, "img_00004.jpg")
    sound = find_files([(tmp_path, FIELDS | FRAMES)], extra_field)
    assert len(sound.fields) == 3, "where the numbers fit nothing is left out"


def damage_one_each(root):
    """A folder of videos of which each has one unusable image, and a sound one; {video id: what the reason says}."""
    frames, fields = random_video(np.random.default_rng(5), 2, 64, 85)
    whole, colour = encode_component(fields[0, 0], CODEC).jpeg, encode_rgb(frames[0], 95)
    small_grey, small = encode_component(fields[0, 0, :48, :64], CODEC).jpeg, encode_rgb(frames[0, :48, :64], 95)
    at = len(whole) // 2
    damages = {
        "colour": ("flow_x_00002.jpg", colour, "has 3 channels, expected 1"),
        "grey": ("img_00003.jpg", whole, "has 1 channels, expected 3"),
        "size": ("flow_y_00003.jpg", small_grey, "is 64x48 px, img_00001.jpg 85x64: expected one size"),
        "frame_size": ("img_00004.jpg", small, "is 64x48 px, img_00001.jpg 85x64: expected one size"),
        "empty": ("img_00001.jpg", b"", "is no JPEG: The bytes begin with nothing"),
        "png": ("flow_x_00001.jpg", b"\x89PNG" + whole, "is no JPEG: The bytes begin with 8950"),
        "cut": ("flow_x_00003.jpg", whole[:-9], "a JPEG with ffd9: it is cut off"),
        "longer": ("flow_x_00003.jpg", whole + b"\0\0", "ends with 0000, a JPEG with ffd9"),
        "hole": ("flow_y_00001.jpg", whole[:at] + bytes(200) + whole[at + 200 :], "is damaged: Corrupt JPEG data"),
        "tables": ("flow_y_00002.jpg", whole[:100] + bytes(200) + whole[300:], "flow_y_00002.jpg"),
    }
    sound = write_video(root / "Good/v")
    for video, (name, content, _) in damages.items():
        shutil.copytree(sound, root / "Bad" / video)
        (root / "Bad" / video / name).write_bytes(content)
    shutil.copytree(sound, root / "Bad/absent")
    (root / "Bad/absent/flow_x_00002.jpg").unlink()
    reasons = {f"Bad/{video}": (name, text) for video, (name, _, text) in damages.items()}
    return reasons | {"Bad/absent": ("lacks flow_x_00002.jpg", "but has flow_x_00003.jpg")}


def test_bad_images_are_named_and_the_rest_is_packed(tmp_path, capfd):
    reasons = damage_one_each(tmp_path / "flow")
    assert run(tmp_path / "flow", tmp_path / "set", "--workers", 2) == 1
    found = bad_videos(tmp_path / "set")
    assert sorted(found) == sorted(reasons)
    assert all(found[video].startswith(name) and text in found[video] for video, (name, text) in reasons.items())
    assert list(members(tmp_path / "set")[0]) == ["Good/v"] and not verify(tmp_path / "set", deep=True).damages
    assert "Corrupt JPEG" not in capfd.readouterr().err, "libjpeg writes where no file is named"


def test_another_extraction_is_not_gone_on_with(tmp_path, capsys):
    write_video(tmp_path / "flow/A/v", seed=0)
    assert run(tmp_path / "flow", tmp_path / "set") == 0
    write_video(tmp_path / "flow/A/v", seed=1)
    assert run(tmp_path / "flow", tmp_path / "set") == 2 and "input_sha256" in capsys.readouterr().err
    assert run(tmp_path / "flow", tmp_path / "set", "--extra-field", "last") == 2
    assert "extra_field: None before, 'last' now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--range", "per-field"], "do not tell the range of each field.*--range 20"),
        (["--method", "dis", "--backward"], "--method, --backward with --flow-dir: the files are packed as they are"),
        (["--quality", "90"], "--quality with --flow-dir"),
        (["--size", "256"], "--size with --flow-dir"),
        (["--workers", "0"], "num_workers=0"),
        (["--frames-dir", "nowhere"], "nowhere is no folder"),
    ],
)
def test_unusable_options_are_explained(tmp_path, capsys, options, message):
    touch(tmp_path / "flow")
    assert run(tmp_path / "flow", tmp_path / "set", *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "set").exists()


def test_videos_and_folders_of_flow_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "set", "--videos", tmp_path)
    assert "not allowed with argument" in capsys.readouterr().err
    assert pack.main(["--videos", str(tmp_path), "--out", str(tmp_path / "set"), "--extra-field", "last"]) == 2
    assert "--extra-field with --videos: it is for --flow-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["img_00001.jpg"], "holds images itself"),
        (["A/log.txt"], "holds no folders of images"),
        (["A/__v__/img_00001.jpg"], "WebDataset readers skip names"),
    ],
)
def test_unusable_folders_are_explained(tmp_path, capsys, files, message):
    for file in files:
        (tmp_path / "flow" / file).parent.mkdir(parents=True)
        (tmp_path / "flow" / file).touch()
    assert run(tmp_path / "flow", tmp_path / "set") == 2 and message in capsys.readouterr().err
