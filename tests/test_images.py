"""flow.images: image sets of every kind become videos of one frame, and the loaders deliver their pixels."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
import webdataset

from flow import images
from flow.clips import read_clips
from flow.image_sources import read_source
from flow.resume import locked
from flow.verify import verify
from flow.video import import_cv2, read_frames, write_video
from loaders import dali_loader, reference
from loaders.batch import RGB_MEAN, RGB_STD, StreamSpec
from loaders.index import open_index
from loaders.views import VIEWS, view_crop
from tests import deadly
from tests.test_pack import contents
from tests.test_video import moving_frames, replace_frame

cv2 = import_cv2()
SIZE = 48
CLASSES = {"ant": 5, "bee": 4, "cat": 2}
CLASS_IDS = {"ant": 2, "bee": 0, "cat": 1}


def picture(number):
    """An RGB image; sides and contents differ from number to number."""
    return moving_frames(1, 64 + 8 * (number % 3), 104 - 8 * (number % 5), seed=number)[0]


def png(image):
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


def stored(image, size=SIZE):
    """What should come out of the shards for an RGB image: scaled, and through JPEG. Nothing of ours has a part."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    small = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    return cv2.imdecode(cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1], 1)[:, :, ::-1]


def write_folder(root):
    """Class folders of images. Returns id -> (class, RGB image)."""
    expected = {}
    for class_name, count in CLASSES.items():
        (root / class_name).mkdir(parents=True)
        for i in range(count):
            name = f"{class_name}/{class_name}.{i}"
            expected[name] = class_name, picture(len(expected))
            (root / f"{name}.PNG").write_bytes(png(expected[name][1]))
    return expected


def write_tar(path, samples, **options):
    """samples: [(member name, bytes)]."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_tars(root):
    """Three WebDataset tars, sorted by class, as three writers make them. Returns id -> (class, RGB image)."""
    root.mkdir()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in sorted(CLASS_IDS, key=CLASS_IDS.get)))
    expected = {}
    for number, (class_name, count) in enumerate(CLASSES.items()):
        samples = []
        for i in range(count):
            key = f"some.folder/{i:06d}" if number == 1 else f"./{i:06d}"
            expected[f"t-{number}/{key.removeprefix('./')}"] = class_name, picture(len(expected))
            samples += [
                (f"{key}.cls", b"%d\n" % CLASS_IDS[class_name]),
                (f"{key}.png", png(picture(len(expected) - 1))),
            ]
            samples.append((f"{key}.json", b"{}"))
        write_tar(root / f"t-{number}.tar", samples, format=[tarfile.PAX_FORMAT, tarfile.GNU_FORMAT][number % 2])
    return expected


def write_videos(root):
    """Class folders of videos; every third frame is expected. Returns id -> (class, RGB image)."""
    expected = {}
    for number, (class_name, name, num_frames) in enumerate(
        [("ant", "a", 7), ("ant", "b", 2), ("bee", "c", 9), ("bee", "d", 10), ("cat", "e", 3)]
    ):
        (root / class_name).mkdir(parents=True, exist_ok=True)
        path = root / class_name / f"{name}.avi"
        write_video(path, moving_frames(num_frames, 72, 96, seed=number))
        for t, frame in enumerate(read_frames(path)):
            if t % 3 == 0:
                expected[f"{class_name}/{name}/{t:06d}"] = class_name, frame
    return expected


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Kind -> (options of the command, id -> (class, RGB image))."""
    root = tmp_path_factory.mktemp("sources")
    folder, tars, videos = write_folder(root / "folder"), write_tars(root / "tars"), write_videos(root / "videos")
    return {
        "folder": (["--train", f"{root}/folder", "--per-shard", "4"], folder),
        "tars": (["--train", f"{root}/tars", "--classes", f"{root}/tars/classes.txt", "--per-shard", "3"], tars),
        "videos": (["--train", f"{root}/videos", "--every", "3", "--per-shard", "2"], videos),
    }


def run(out, options, *more):
    return images.main([*options, "--out", str(out), "--size", str(SIZE), *more])


@pytest.fixture(scope="module")
def packed(sources, tmp_path_factory):
    """Kind -> folder of the packed set. Not to be changed."""
    root = tmp_path_factory.mktemp("packed")
    for kind, (options, _) in sources.items():
        assert run(root / kind, options, "--workers", "2") == 0
    return {kind: root / kind for kind in sources}


KINDS = pytest.mark.parametrize("kind", ["folder", "tars", "videos"])


@KINDS
def test_every_image_is_a_video_of_one_frame(sources, packed, kind):
    expected = dict(sources[kind][1])
    index = open_index(packed[kind])
    ids = index.video_ids(range(index.num_videos))
    assert sorted(ids) == sorted(expected) and list(index.entries) == ["rgb"] and set(index.num_frames) == {1}
    for path in sorted(packed[kind].glob("shard-*.tar")):
        content = path.read_bytes()
        for clip in read_clips(path):
            class_name, image = expected.pop(clip.video_id)
            assert clip.class_name == class_name == index.classes[index.labels[ids.index(clip.video_id)]]
            assert clip.class_id == (CLASS_IDS[class_name] if kind == "tars" else None)
            row = clip.entries["rgb"][1][0]
            jpeg = np.frombuffer(content, np.uint8)[row["offset"] : row["offset"] + row["size"]]
            assert (cv2.imdecode(jpeg, 1)[:, :, ::-1] == stored(image)).all()
    assert not expected


@KINDS
def test_verify_finds_nothing_wrong(sources, packed, kind):
    report = verify(packed[kind], deep=True, num_workers=1)
    dataset = json.loads((packed[kind] / "dataset.json").read_text())
    assert report.damages == [] and report.num_members == dataset["num_videos"] == dataset["num_frames"]
    assert dataset["flow"] is None and dataset["num_fields"] == 0 and dataset["size_px"] == SIZE
    assert dataset["every"] == (3 if kind == "videos" else None) and not (packed[kind] / ".pack").exists()


def test_a_tar_sorted_by_class_comes_out_mixed(packed):
    classes = [{clip.class_name for clip in read_clips(path)} for path in sorted(packed["tars"].glob("*.tar"))]
    assert len(classes) == 4 and sum(len(names) > 1 for names in classes) >= 2


def lists(root):
    return [(root / f"splits/split1_{side}.txt").read_text().split() for side in ("train", "test")]


@KINDS
def test_the_split_is_whole_disjoint_and_by_class(sources, packed, kind):
    train, test = lists(packed[kind])
    assert sorted(train + test) == sorted(sources[kind][1])
    classes = [{sources[kind][1][image_id][0] for image_id in side} for side in (train, test)]
    assert classes[0] == set(CLASSES) and classes[1] == set(CLASSES) - ({"cat"} if kind == "videos" else set())
    if kind == "videos":
        clips = [{image_id.rsplit("/", 1)[0] for image_id in side} for side in (train, test)]
        assert clips[0].isdisjoint(clips[1]) and len(clips[0] | clips[1]) == 5


def test_classes_without_anything_to_test_on_are_counted(sources, packed, capsys):
    assert run(packed["videos"], sources["videos"][0]) == 0
    assert "warning: 1 of 3 classes have nothing to test on" in capsys.readouterr().err
    assert run(packed["folder"], sources["folder"][0]) == 0
    assert "nothing to test on" not in capsys.readouterr().err


def test_val_is_what_is_tested_on(sources, packed, tmp_path):
    (folder, expected), (tars, _) = sources["folder"], sources["tars"]
    assert run(tmp_path / "a", folder, "--val", folder[1]) == 0
    assert lists(tmp_path / "a") == [[f"{side}/{name}" for name in sorted(expected)] for side in ("train", "val")]
    pattern = tars[1] + "/t-{1..2}.tar"
    assert run(tmp_path / "b", tars, "--val", pattern) == 0
    train, test = lists(tmp_path / "b")
    assert len(train) == 11 and len(test) == 6 and all(name.startswith(("val/t-1/", "val/t-2/")) for name in test)
    index = open_index(tmp_path / "b")
    assert {index.classes[label] for label in index.labels[index.rows(test)]} == {"bee", "cat"}


# --- the same bytes ----------------------------------------------------------------------------------------------


@KINDS
def test_neither_workers_nor_tasks_show(sources, packed, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(images, "PER_TASK", 3)
    assert run(tmp_path / "set", sources[kind][0], "--workers", "1") == 0
    assert contents(tmp_path / "set") == contents(packed[kind])


def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(sources, tmp_path):
    out = tmp_path / "set"
    # Large images: there is time to kill it.
    options = [*sources["folder"][0][:2], "--per-shard", "1", "--size", "1200", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "flow.images", *options, "--out", str(out)])
    while not list(out.glob(".pack/shard-*.json")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "dataset.json").exists()
    finished = [out / f"{path.stem}.tar" for path in out.glob(".pack/shard-*.json")]
    before = {path: path.stat().st_mtime_ns for path in finished}
    for folder in (out, tmp_path / "undisturbed"):
        assert images.main([*options, "--out", str(folder)]) == 0
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert before and all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items()), "packed again"


def test_a_complete_or_different_pack_is_left_alone(sources, packed, tmp_path, capsys):
    options, before = sources["folder"][0], contents(packed["folder"])
    assert run(packed["folder"], options) == 0 and "nothing to do" in capsys.readouterr().out
    assert run(packed["folder"], options, "--quality", "80", "--seed", "1") == 2
    message = capsys.readouterr().err
    assert all(text in message for text in ("codec.quality: 90 before, 80 now", "seed", "input_sha256"))
    assert run(packed["folder"], sources["videos"][0]) == 2 and contents(packed["folder"]) == before
    with locked(tmp_path / ".pack"):
        assert run(tmp_path, options) == 2


# --- pixels ------------------------------------------------------------------------------------------------------


def test_training_batches_are_crops_of_the_images(sources, packed):
    index = open_index(packed["folder"])
    rows, spec = index.split("split1_train"), StreamSpec(stream="spatial", crop_px=40, color_jitter=False)
    options = dict(seed=1, batch_size=32)
    with dali_loader.train_loader(index, rows, spec, **options) as ours:
        batch, plain = next(ours), next(reference.train_loader(index, rows, spec, **options))
    assert set(batch.draw.video) <= set(rows) and not batch.draw.tau.any() and len(set(batch.labels.tolist())) == 3
    assert np.abs(batch.inputs.numpy() - plain.inputs.numpy()).max() < 1e-4
    ids, expected = index.video_ids(batch.draw.video), sources["folder"][1]
    for image_id, label, (y0, x0), mirror, found in zip(
        ids, batch.labels, batch.draw.crop, batch.draw.mirror, batch.inputs.numpy(), strict=True
    ):
        class_name, image = expected[image_id]
        crop = stored(image)[y0 : y0 + 40, x0 : x0 + 40].astype(np.float32)
        wanted = ((crop[:, ::-1] if mirror else crop) - RGB_MEAN) / RGB_STD
        assert index.classes[label] == class_name
        assert np.abs(found - wanted.transpose(2, 0, 1)).max() < 1e-4
    assert 0 < batch.draw.mirror.sum() < 32 and batch.draw.crop.max() > 8, "not only the centre"


def test_an_image_is_tested_in_ten_views(sources, packed):
    index = open_index(packed["videos"])
    rows, spec = index.split("split1_test"), StreamSpec(stream="spatial", crop_px=40)
    with dali_loader.view_loader(index, rows, spec, num_taus=1, batch_size=len(rows)) as loader:
        batches = list(loader)
    assert len(batches) == len(VIEWS) == 10
    for view, batch in zip(VIEWS, batches, strict=True):
        assert batch.draw.valid.all() and (batch.draw.video == rows).all()
        for image_id, found in zip(index.video_ids(rows), batch.inputs.numpy(), strict=True):
            image = stored(sources["videos"][1][image_id][1])
            y0, x0 = view_crop(view, image.shape[:2], 40)
            wanted = (image[y0 : y0 + 40, x0 : x0 + 40].astype(np.float32) - RGB_MEAN) / RGB_STD
            assert np.abs(found - (wanted[:, ::-1] if view[2] else wanted).transpose(2, 0, 1)).max() < 1e-4


def test_the_webdataset_package_reads_every_image(sources, packed):
    expected = dict(sources["folder"][1])
    for sample in webdataset.WebDataset(sorted(map(str, packed["folder"].glob("*.tar"))), shardshuffle=False):
        header = json.loads(sample["json"])
        class_name, image = expected.pop(header["video_id"])
        found = cv2.imdecode(np.frombuffer(sample["000.rgb.jpg"], np.uint8), 1)[:, :, ::-1]
        assert header["class_name"] == class_name and (found == stored(image)).all()
    assert not expected


def palette_png(indices, palette):
    """PNG of colour type 3: indices (H, W) into palette (N, 3), both uint8."""
    height, width = indices.shape
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def exif(jpeg, orientation):
    """The JPEG with an EXIF segment that holds nothing but an orientation."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff + jpeg[2:]


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """Of the wanted size already, so that what comes out can be told from the arrays alone."""
    rgb = moving_frames(1, SIZE, 64, seed=3)[0]
    grey = rgb[:, :, 0]
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    smooth = np.stack([np.arange(256)] * 3, axis=1).astype(np.uint8)
    alpha = np.dstack([rgb[:, :, ::-1], np.full((SIZE, 64), 7, np.uint8)])
    jpeg = cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    turned = cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[:, :, ::-1]
    cases = {
        "grey.png": (png(np.dstack([grey] * 3)[:, :, :1]), np.dstack([grey] * 3)),
        "greyjpg.jpg": (cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes(), grey[..., None]),
        "palette.png": (palette_png(grey, palette), palette[grey]),
        "palettegrey.png": (palette_png(grey, smooth), grey[..., None]),
        "alpha.png": (cv2.imencode(".png", alpha)[1].tobytes(), rgb),
        "deep.png": (cv2.imencode(".png", rgb[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes(), rgb),
        "upright.jpg": (exif(jpeg, 1), turned),
        "turned.jpg": (exif(jpeg, 6), np.rot90(turned, -1)),
        "mirrored.jpg": (exif(jpeg, 2), turned[:, ::-1]),
    }
    (tmp_path / "a").mkdir()
    for name, (content, _) in cases.items():
        (tmp_path / "a" / name).write_bytes(content)
    for source in read_source(str(tmp_path)):
        found = images.read_image(source, SIZE)
        expected = np.broadcast_to(cases[source.path.name][1], found.shape)
        # A grey JPEG is the only one that was compressed since.
        assert np.abs(found.astype(int) - expected).max() <= (3 if "greyjpg" in source.video_id else 0), source.video_id


def test_cmyk_becomes_rgb(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    image.new("CMYK", (64, SIZE), (0, 255, 255, 0)).save(tmp_path / "a/red.jpg", quality=95)
    found = images.read_image(read_source(str(tmp_path))[0], SIZE)
    assert found.shape == (SIZE, 64, 3) and np.abs(found.astype(int) - (255, 0, 0)).max() < 10


# --- bad images --------------------------------------------------------------------------------------------------


def test_bad_images_are_named_and_the_rest_is_packed(sources, tmp_path, capsys):
    root, out = tmp_path / "images", tmp_path / "set"
    expected = write_folder(root)
    good = (root / "ant/ant.0.PNG").read_bytes()
    bad = {"empty": b"", "text": b"no image " * 99, "cut": good[: len(good) * 3 // 4]}
    bad["long"] = png(np.zeros((1, 1500, 3), np.uint8))
    for name, content in bad.items():
        (root / "cat" / f"{name}.png").write_bytes(content)
    assert run(out, ["--train", str(root)]) == 1
    assert "cat/text is cut off, or no image" in capsys.readouterr().out
    report = dict(line.split("\t") for line in (out / "bad_videos.txt").read_text().splitlines())
    assert sorted(report) == [f"cat/{name}" for name in sorted(bad)] and "1500x1 px is too long" in report["cat/long"]
    assert verify(out, deep=True, num_workers=1).num_members == len(expected)
    assert sorted(sum(lists(out), [])) == sorted(expected)
    assert run(out, ["--train", str(root)], "--skip-bad") == 0
    for path in root.glob("*/*"):
        path.write_bytes(b"")
    assert run(tmp_path / "none", ["--train", str(root)]) == 2
    assert "None of the 15 images can be packed; ant/ant.0 is cut off" in capsys.readouterr().err


def test_a_video_that_breaks_late_leaves_nothing(tmp_path):
    (tmp_path / "videos/a").mkdir(parents=True)
    for name in ("good", "late"):
        write_video(tmp_path / f"videos/a/{name}.avi", moving_frames(70, 48, 64))
    replace_frame(tmp_path / "videos/a/late.avi", 68, b"")
    assert run(tmp_path / "set", ["--train", str(tmp_path / "videos")]) == 1
    index = open_index(tmp_path / "set")
    assert index.video_ids(range(index.num_videos)) == [f"a/good/{t:06d}" for t in range(0, 70, 10)]
    assert verify(tmp_path / "set", num_workers=1).damages == []


def test_an_image_that_kills_its_process_costs_only_itself(sources, tmp_path, monkeypatch):
    options, expected = sources["folder"]
    monkeypatch.setattr(images, "write_images", deadly.write_or_die)
    assert run(tmp_path / "set", options[:2], "--workers", "2") == 1
    assert f"{deadly.DEADLY}\tends the process" in (tmp_path / "set/bad_videos.txt").read_text()
    assert sorted(sum(lists(tmp_path / "set"), [])) == sorted(set(expected) - {deadly.DEADLY})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("folder", ["--every", "5"], "every=5 is for videos"),
        ("folder", ["--classes", os.devnull], "no regular file"),
        ("folder", ["--size", "4"], "size_px=4"),
        ("folder", ["--per-shard", "0"], "per_shard=0"),
        ("folder", ["--quality", "0"], "quality=0"),
        ("videos", ["--every", "0"], "every=0"),
        ("folder", ["--train", "absent"], "absent is not there"),
        ("folder", ["--train", "t-{0..3}.tar"], "t-0.tar is not there"),
        ("folder", ["--train", "t-{0..3.tar"], "nbalanced"),
    ],
)
def test_unusable_options_are_explained(sources, tmp_path, capsys, kind, options, message):
    assert run(tmp_path / "set", sources[kind][0], *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "set").exists()
