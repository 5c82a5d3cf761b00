"""flow.browse: its numbers are those that independent code finds in the tars, its pictures show the stored images, and
damage is named."""

import base64
import json
import re
import shutil
import warnings
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from flow import browse, images, survey
from flow.clips import read_clips
from flow.codec import decode_rgb
from flow.index import INDEX_NAME, load_index, write_index
from tests import test_flow_dirs
from tests.conftest import VIDEOS, pack_arrays
from tests.hostile import NOT_REGULAR, replace
from tests.test_images import CLASSES, write_folder
from tests.test_verify import overwrite, place, shard


class Page(HTMLParser):
    """tags: how often each occurs; text: all that is no markup, in charts too; pictures: caption -> RGB, of JPEGs."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.pictures, self.links, self.jpeg = Counter(), "", {}, [], None
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "img":
            mime, content = re.fullmatch(r"data:(.*?);base64,(.*)", attributes["src"]).groups()
            content = base64.b64decode(content, validate=True)
            if mime == "image/jpeg":
                self.pictures[attributes["alt"]] = decode_rgb(content)
            else:
                assert mime == "image/svg+xml"
                self.text += "".join(ElementTree.fromstring(content).itertext())

    def handle_data(self, data):
        self.text += data


def page(root, tmp_path, *options, code=0):
    out = tmp_path / "page.html"
    assert browse.main([str(root), "--out", str(out), *map(str, options)]) == code
    found = Page(out)
    assert all(link.startswith("data:") for link in found.links) and not found.tags["script"], "needs no network"
    return found


def numbers(root, capsys, *options, code=0):
    assert browse.main([str(root), "--json", *map(str, options)]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    """The message of an error, which is one line."""
    assert browse.main(list(map(str, arguments))) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def count_in_tars(root):
    """Class -> counts and bytes, by clip JSONs and tar headers; and frames of every video."""
    classes, frames = {}, Counter()
    for path in root.glob("shard-*.tar"):
        for clip in read_clips(path):
            sizes = {kind: entries["size"].astype(int) for kind, (_, entries) in clip.entries.items()}
            here = classes.setdefault(clip.class_name, Counter())
            here["num_videos"] += clip.is_last
            here["num_frames"] += clip.num_frames
            here["num_fields"] += len(sizes.get("dx", ()))
            here["rgb_bytes"] += sizes["rgb"].sum()
            here["flow_bytes"] += sum(sizes[kind].sum() for kind in sizes if kind != "rgb")
            frames[clip.video_id] += clip.num_frames
    return classes, frames


def check_counts(found, root):
    classes, frames = count_in_tars(root)
    assert [entry["name"] for entry in found["classes"]] == sorted(classes)
    for entry in found["classes"]:
        assert {key: entry[key] for key in classes[entry["name"]]} == classes[entry["name"]]
    for key in ("num_videos", "num_frames", "num_fields", "rgb_bytes", "flow_bytes"):
        assert found[key] == sum(counts[key] for counts in classes.values())
    assert found["bytes"] == sum(path.stat().st_size for path in root.glob("shard-*.tar"))
    lengths = found["frames_per_video"]
    for end, best in (("shortest", min), ("longest", max)):
        assert lengths[end]["num_frames"] == best(frames.values()) == frames[lengths[end]["video"]]
    assert lengths["mean"] == pytest.approx(np.mean(list(frames.values())))
    edges, counts = lengths["histogram"]["edges"], lengths["histogram"]["counts"]
    assert len(counts) <= 31
    assert counts == [sum(a <= n < b for n in frames.values()) for a, b in zip(edges, edges[1:], strict=False)]
    assert sum(counts) == len(frames)


# --- numbers -----------------------------------------------------------------------------------------------------


def test_counts_and_bytes_are_those_of_the_tars(packed, packed_demo, capsys, monkeypatch):
    monkeypatch.setattr(survey, "_CHUNK", 2)
    found = numbers(packed, capsys, "--sample", 2)
    check_counts(found, packed)
    assert found["num_backward_fields"] == found["num_fields"] == sum(n - 1 for n, *_ in VIDEOS.values())
    assert found["size_px"] == [64, 64] and found["num_verified"] is None and found["damages"] == []
    assert found["splits"] == {"split1_train": len(VIDEOS), "split1_test": len(VIDEOS)}
    assert found["bytes_per_field"] == pytest.approx(found["flow_bytes"] / (2 * found["num_fields"]))

    found = numbers(packed_demo, capsys, "--sample", 2)
    check_counts(found, packed_demo)
    dataset = json.loads((packed_demo / "dataset.json").read_text())
    assert {key: found[key] for key in ("rgb_bytes", "flow_bytes")}.items() <= dataset["summary"].items()
    assert all(found[key] == dataset[key] for key in ("name", "flow", "codec", "backward", "num_frames", "num_fields"))
    assert found["splits"] == {"split1_train": 18, "split1_test": 12}


def test_motion_is_that_of_the_fields(packed, arrays, capsys):
    """Of all fields: the sample is larger than the classes."""
    found = numbers(packed, capsys, "--sample", 1000)
    for entry in found["classes"]:
        fields = [fields for video_id, (_, fields, _) in arrays.items() if video_id.startswith(entry["name"] + "/")]
        motion = entry["motion"]
        assert (motion["num_videos"], motion["num_fields"]) == (len(fields), sum(map(len, fields)))
        for key, less in (("px_per_frame", 0), ("less_mean_px_per_frame", 1)):
            lengths = [
                np.hypot(*(field - less * field.mean((1, 2), keepdims=True))).mean()
                for many in fields
                for field in many
            ]
            assert motion[key] == pytest.approx(np.mean(lengths), abs=0.01)
        assert motion["px_per_frame"] > 1.02 * motion["less_mean_px_per_frame"]


def test_the_sample_is_seeded_and_spread_over_videos(packed_demo, capsys):
    first, again, other = (numbers(packed_demo, capsys, "--sample", 7, "--seed", seed) for seed in (3, 3, 4))
    assert first == again and first != other
    motion = first["classes"][0]["motion"]
    assert (motion["num_fields"], motion["num_videos"], motion["size_px"]) == (7, 5, [48, 48])
    opened = survey.PackedSet(packed_demo)
    for sample in (1, 4, 7, 60, 1000):
        drawn = survey._draw_fields(opened, 0, 0, sample)
        share = Counter(number for number, _ in drawn)
        assert len(set(drawn)) == len(drawn) == min(sample, 5 * 13) and max(share.values()) - min(share.values()) <= 1
        assert len(share) == min(sample, 5) and {t for _, t in drawn} <= set(range(13))
    few = numbers(packed_demo, capsys, "--sample", 7, "--seed", 3, "--classes", "RedUp", "GreenDown")
    assert few["classes"] == [entry for entry in first["classes"] if entry["name"] in ("GreenDown", "RedUp")]


def test_short_videos_are_counted_and_named_and_no_error(packed, tmp_path, capsys):
    found = numbers(packed, capsys)
    assert found["short"] == {
        "L": 10,
        "no_stack": {"num_videos": 1, "first": ["walk/short"]},
        "no_field": {"num_videos": 0, "first": []},
    }
    text = page(packed, tmp_path, "--sample", 1).text
    assert "1 short video" in text and "walk/short" in text and "No damage was found" in text


def test_a_video_of_one_frame_has_no_field(tmp_path, capsys):
    frames, fields = np.zeros((12, 16, 20, 3), np.uint8), np.ones((11, 2, 16, 20), np.float32)
    root = pack_arrays(tmp_path / "set", {"a/long": (frames, fields), "b/single": (frames[:1], fields[:0])})
    found = numbers(root, capsys)
    assert found["short"]["no_field"] == {"num_videos": 1, "first": ["b/single"]}
    assert [entry["motion"] is None for entry in found["classes"]] == [False, True]
    shown = page(root, tmp_path)
    assert [image.shape for image in shown.pictures.values()] == [(260, 324, 3), (128, 160, 3)]
    assert "A single frame, and no field at all: 1 video." in shown.text


# --- pictures ----------------------------------------------------------------------------------------------------

#: Displacement of a whole field in px/frame -> its colour at full strength.
DIRECTIONS = {"right": (3, 0), "left": (-3, 0), "down": (0, 3), "still": (0, 0)}


@pytest.fixture(scope="module")
def directions(tmp_path_factory):
    """A class for each of DIRECTIONS, of one video: all its frames blue, but the middle one green."""
    videos = {}
    for name, vector in DIRECTIONS.items():
        frames = np.full((13, 48, 64, 3), (20, 40, 200), np.uint8)
        frames[6] = (20, 200, 40)
        fields = np.broadcast_to(np.array(vector, np.float32)[:, None, None], (12, 2, 48, 64))
        videos[f"{name}/v"] = frames, fields
    return pack_arrays(tmp_path_factory.mktemp("directions") / "set", videos)


def test_pictures_show_frame_colour_dx_and_dy(directions, tmp_path, capsys):
    found = page(directions, tmp_path)
    assert [caption.split(" · ")[:3] for caption in found.pictures] == [
        [name, "v", "frame 6 of 13"] for name in sorted(DIRECTIONS)
    ]
    for caption, image in found.pictures.items():
        dx, dy = DIRECTIONS[caption.split(" ")[0]]
        assert image.shape == (244, 324, 3) and caption.endswith("±3 px/frame" if dx or dy else "±0.1 px/frame")
        quarters = [image[y : y + 100, x : x + 140] for y in (10, 134) for x in (10, 174)]
        frame, color, grey_x, grey_y = (quarter.mean((0, 1)) for quarter in quarters)
        assert np.abs(frame - (20, 200, 40)).max() < 6, "the middle one"
        for grey, value in ((grey_x, dx), (grey_y, dy)):
            assert np.abs(grey - (127.5 + value / 3 * 127.5)).max() < 4
        red, green, blue = color
        looks = {
            "right": red > 240 and max(green, blue) < 25,
            "left": red < 25 and min(green, blue) > 180,
            "down": red > 240 and 180 < green < 255 and blue < 25,
            "still": color.min() > 245,
        }
        assert looks[caption.split(" ")[0]], color


def test_classes_stand_in_order_each_with_as_many_videos_as_asked_for(packed_demo, tmp_path):
    classes = [entry["name"] for entry in json.loads((packed_demo / "dataset.json").read_text())["classes"]]
    one, two, other = (
        list(page(packed_demo, tmp_path, "--sample", 1, *options).pictures)
        for options in ((), ("--per-class", 2), ("--seed", 1))
    )
    assert [caption.split(" · ")[0] for caption in one] == classes
    assert [caption.split(" · ")[0] for caption in two] == [name for name in classes for _ in range(2)]
    assert set(one) < set(two) and set(one) != set(other)


def test_many_classes_are_cut_off_and_said_so(packed_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(browse, "MAX_CLASSES", 2)
    found = page(packed_demo, tmp_path, "--sample", 1)
    assert len(found.pictures) == 2 and "the first 2 of 6 classes" in found.text and "--classes NAME" in found.text
    found = page(packed_demo, tmp_path, "--sample", 1, "--classes", "RedUp", "RedDown", "GreenUp")
    assert [caption.split(" · ")[0] for caption in found.pictures] == ["GreenUp", "RedDown", "RedUp"]
    assert "the first 2" not in found.text
    assert "has no class 'redup'. Did you mean 'RedUp'?" in refused(capsys, packed_demo, "--json", "--classes", "redup")


# --- other sets --------------------------------------------------------------------------------------------------


def test_images_have_frames_alone(tmp_path, capsys):
    write_folder(tmp_path / "images")
    options = ["--train", str(tmp_path / "images"), "--out", str(tmp_path / "set"), "--size", "48", "--workers", "1"]
    assert images.main(options) == 0
    capsys.readouterr()
    found = numbers(tmp_path / "set", capsys)
    check_counts(found, tmp_path / "set")
    assert found["flow"] is None and found["short"] is None and found["bytes_per_field"] is None
    assert [entry["motion"] for entry in found["classes"]] == [None] * len(CLASSES)
    shown = page(tmp_path / "set", tmp_path, "--per-class", 3)
    assert len(shown.pictures) == 8 and all(max(image.shape) == 160 for image in shown.pictures.values())
    assert "short" not in shown.text.replace("Damaged, short", "") and "Every video has 1 frame" in shown.text


def test_flow_of_other_tools_in_several_sizes(tmp_path, capsys):
    for number, (height, width) in enumerate([(64, 85), (90, 64), (48, 64)]):
        test_flow_dirs.write_video(tmp_path / f"flow/Run/v{number}", 4, height, width, seed=number)
    assert test_flow_dirs.run(tmp_path / "flow", tmp_path / "set", "--workers", 1) == 0
    capsys.readouterr()
    found = numbers(tmp_path / "set", capsys)
    check_counts(found, tmp_path / "set")
    assert found["size_px"] == found["classes"][0]["motion"]["size_px"] == [48, 64]
    assert found["flow"]["method"] == "external"
    shown = page(tmp_path / "set", tmp_path, "--per-class", 9)
    assert len(shown.pictures) == 3 and "48 to 64 px" in shown.text and "files of another tool" in shown.text


def test_strangers_names_are_text(tmp_path, capsys):
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (3, 16, 20, 3), dtype=np.uint8), rng.normal(size=(2, 2, 16, 20)).astype(np.float32)
    names = ["<img src=x onerror=alert(1)>", "$x^2$ & \"q'", "射箭"]
    root = pack_arrays(tmp_path / "set", {f"{name}/<script>{k}": video for k, name in enumerate(names)})
    (root / "bad_videos.txt").write_text("<b>bad\tis <i>cut\x1b[2J off\n" * 25)
    (root / "missing_videos.txt").write_text("a\nb\n")
    (root / "splits/<u>\u202ertl.txt").write_text("")
    left = numbers(root, capsys)["left_out"]
    assert left["num_bad"] == 25 and left["num_missing"] == 2
    assert left["first_bad"][0] == {"video": "<b>bad", "reason": "is <i>cut\x1b[2J off"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = page(root, tmp_path)
    shown = {tuple(caption.split(" · ")[:2]) for caption in found.pictures}
    assert shown == {(name, f"<script>{k}") for k, name in enumerate(names)}
    assert not {"i", "u", "b"} & set(found.tags) and found.tags["img"] == 3 + 2, "and two charts"
    assert "<b>bad: is <i>cut\\x1b[2J off" in found.text and "and 5 more." in found.text
    assert "<u>\\u202ertl: 0" in found.text and all(found.text.count(name) >= 3 for name in names)


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(packed_demo, tmp_path):
    return shutil.copytree(packed_demo, tmp_path / "set")


def test_damage_behind_the_page_is_named_and_the_page_made(copy, tmp_path, capsys):
    name, offset, size = place(copy, 0, "rgb", 6)
    other, *at = place(copy, 1, "dy", 6)
    overwrite(shard(copy), offset + size // 2, b"damage")
    overwrite(shard(copy), at[0] + 2, b"damage")
    found = numbers(copy, capsys, "--sample", 1000, code=1)
    assert found["damaged_videos"] == [other.rsplit("/", 1)[0]] and len(found["damages"]) == 1
    assert sum(entry["motion"]["num_fields"] for entry in found["classes"]) == 30 * 13 - 1
    shown = page(copy, tmp_path, "--per-class", 5, code=1)
    assert "It is damaged: 2 damages" in shown.text and f"{name} at offset {offset}: damaged" in shown.text
    unreadable = [caption for caption in shown.pictures if "cannot be read" in caption]
    assert len(shown.pictures) == 30 and len(unreadable) == 2
    assert f"{other} at offset {at[0]}: damaged" in capsys.readouterr().out


def test_verify_finds_what_the_page_does_not_look_at(copy, capsys):
    name, offset, size = place(copy, 2, "dx", 3)
    overwrite(shard(copy), offset + size // 2, b"damage")
    unseen = ("--sample", 0, "--per-class", 0)
    assert numbers(copy, capsys, *unseen)["damages"] == []
    found = numbers(copy, capsys, *unseen, "--verify", code=1)
    dataset = json.loads((copy / "dataset.json").read_text())
    assert found["num_verified"] == dataset["num_frames"] + 2 * dataset["num_fields"]
    assert len(found["damages"]) == 2 and f"{name} at offset {offset}: damaged" in found["damages"][1]


def test_a_shard_that_is_missing_or_cut_off_is_named(copy, tmp_path, capsys):
    content = shard(copy).read_bytes()
    shard(copy).write_bytes(content[: len(content) // 2])
    found = numbers(copy, capsys, code=1)
    assert f"has {len(content) // 2} bytes, {len(content)} were written" in found["damages"][0]
    assert found["damaged_videos"] and all(entry["num_videos"] == 5 for entry in found["classes"])
    for kind in NOT_REGULAR:
        replace(shard(copy), kind)
        found = numbers(copy, capsys, "--sample", 3, code=1)
        assert found["damages"] == ["shard-000000.tar: is missing. Restore it from a copy, or pack the set again."]
        (shard(copy).rmdir if kind == "folder" else shard(copy).unlink)()
        (copy / "shard-000000.tar").touch()
    shard(copy).unlink()
    shown = page(copy, tmp_path, code=1)
    assert len(shown.pictures) == 6 and all("cannot be read" in caption for caption in shown.pictures)


def test_an_index_that_lies_about_entries_is_named(copy, tmp_path, capsys):
    header, arrays = load_index(copy)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    arrays["dx"]["hi"][0] = np.nan
    arrays["dy"]["size"][1] = 0
    arrays["rgb"]["size"][6] = 1 << 31
    write_index(copy, header, arrays)
    (video_id,) = survey.PackedSet(copy).video_ids([0])
    found = numbers(copy, capsys, "--sample", 1000, code=1)
    assert found["damaged_videos"] == [video_id] and len(found["damages"]) == 2
    assert f"{video_id}/0000.000.dx.jpg at offset" in found["damages"][0]
    assert f"{video_id} has no dy of frame 1. Rebuild it" in found["damages"][1]
    del arrays["rgb"]
    write_index(copy, header, arrays)
    shown = page(copy, tmp_path, "--sample", 1, code=1)
    assert len(shown.pictures) == 6 and "has no rgb of frame 6. Rebuild it" in shown.text


def test_what_cannot_be_browsed_is_one_line(copy, tmp_path, capsys):
    content = (copy / INDEX_NAME).read_bytes()
    (copy / INDEX_NAME).write_bytes(content[:100])
    assert "is damaged" in refused(capsys, copy) and "--rebuild-index" in refused(capsys, copy, "--json")
    (copy / INDEX_NAME).write_bytes(content)
    dataset = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(dataset | {"num_videos": 3}))
    assert "lists other videos than dataset.json" in refused(capsys, copy)
    (copy / "dataset.json").write_text("{")
    assert "dataset.json is damaged" in refused(capsys, copy)
    (copy / "dataset.json").unlink()
    assert "is no packed data set" in refused(capsys, copy)
    assert f"Did you mean '{copy}'?" in refused(capsys, tmp_path / "sett")


def test_options_are_checked_before_the_work(packed_demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(browse, "PackedSet", lambda root: pytest.fail("was opened"))
    assert "lies in no folder" in refused(capsys, packed_demo, "--out", tmp_path / "none/page.html")
    assert "is a folder" in refused(capsys, packed_demo, "--out", tmp_path)
    assert "expected 0 or more" in refused(capsys, packed_demo, "--json", "--seed", -1)
    with pytest.raises(SystemExit, match="2"):
        browse.main([str(packed_demo), "--json", "--out", "x.html"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_the_page_is_written_here_and_nothing_in_the_set(packed_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in packed_demo.rglob("*")}
    assert browse.main([str(packed_demo), "--sample", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "browse.html: 30 videos of 6 classes, 0 damages\n" and captured.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["browse.html"]
    assert {path: path.stat().st_mtime_ns for path in packed_demo.rglob("*")} == before
