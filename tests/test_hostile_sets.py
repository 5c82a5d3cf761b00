"""Packed sets from strangers, each attack really attempted: it ends in one of our errors, in bounded memory, and
reaches nothing outside its own file. SECURITY.md has the list."""

import json
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest

from flow import index, verify
from flow.clips import read_clips
from flow.image_sources import read_source
from flow.shard import ShardError, write_json
from loaders.batch import StreamSpec
from loaders.index import open_index
from loaders.source import Source
from tests.conftest import pack_arrays, random_video
from tests.hostile import NOT_REGULAR, bounded_memory, replace, tar_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    rng = np.random.default_rng(5)
    videos = {f"a/v{k}": random_video(rng, 12, 48, 64) for k in range(2)}
    return pack_arrays(tmp_path_factory.mktemp("hostile") / "set", videos)


@pytest.fixture
def root(whole, tmp_path):
    """A packed set of two videos, to be damaged."""
    return shutil.copytree(whole, tmp_path / "set")


def bomb(path, num_bytes=1 << 40):
    """A file of a terabyte that takes no room."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(num_bytes)


# --- index and dataset.json --------------------------------------------------------------------------------------


def test_no_flipped_bit_of_the_index_is_believed(root):
    """Head, header, videos and names: at opening. Entries: when the member is read."""
    path = root / "index.bin"
    content = path.read_bytes()
    header, arrays = index.load_index(root)
    sound = open_index(root)
    (entries_at,) = {content.index(np.asarray(arrays["rgb"]).tobytes())}
    tables_end = content.index(np.asarray(arrays["names"]).tobytes()) + arrays["names"].nbytes
    videos_at = content.index(np.asarray(arrays["videos"]).tobytes())
    rng = np.random.default_rng(0)
    places = {*range(videos_at), *range(videos_at, videos_at + arrays["videos"].nbytes), tables_end - 1}
    for at in rng.choice(sorted(places), 150, replace=False).tolist():
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.integers(8))]) + content[at + 1 :])
        with pytest.raises(ShardError, match="--rebuild-index"):
            open_index(root)
    specs = {"rgb": StreamSpec(stream="spatial", crop_px=32), "dx": StreamSpec(stream="temporal", L=11, crop_px=32)}
    for kind, spec in specs.items():
        begin = content.index(np.asarray(arrays[kind]).tobytes())
        assert begin >= entries_at
        for at in (begin + rng.choice(11 * arrays[kind].itemsize, 60, replace=False)).tolist():
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.integers(8))]) + content[at + 1 :])
            source = Source(open_index(root), spec)
            with pytest.raises(ShardError, match=r"shard-000000.tar: a/v0/0000.0\d\d"):
                for tau in range(12 if kind == "rgb" else 1):
                    source.read(np.array([0]), np.array([tau]), spec.steps)
            source.close()
    path.write_bytes(content)
    assert open_index(root).video_ids(range(2)) == sound.video_ids(range(2))


def change_video(key, value):
    def change(header, arrays):
        arrays["videos"][key][1] = value

    return change


def change_name(name):
    def change(header, arrays):
        arrays["names"] = np.frombuffer(name.ljust(len(arrays["names"]))[: len(arrays["names"])].encode(), np.uint8)

    return change


def change_shard(**values):
    return lambda header, arrays: header["shards"][0].update(values)


INDEX_LIES = {
    "rows beyond the table": change_video("num_frames", 1 << 31),
    "first row far away": change_video("first_row", (1 << 64) - 1),
    "name outside": change_video("name_at", (1 << 64) - 1),
    "label": change_video("label", 1),
    "negative label": change_video("label", -1),
    "shard": change_video("shard", 7),
    "negative shard": change_video("shard", -1),
    "frame of 2^32 px": change_video("width", 1 << 26),
    "frame without rows": change_video("height", 0),
    "path as shard": change_shard(name="../shard-000000.tar"),
    "absolute path": change_shard(name="/etc/passwd"),
    "two lines": change_shard(name="shard-000000.tar\n"),
    "no bytes": change_shard(bytes="many"),
    "half a field": lambda header, arrays: arrays.pop("dy"),
    "fewer rows": lambda header, arrays: arrays.update(dy=arrays["dy"][:-1]),
    "no videos": lambda header, arrays: arrays.update(videos=arrays["videos"][:0]),
    "class that paints the terminal": lambda header, arrays: header["classes"][0].update(name="\x1b[2J"),
    "class of a megabyte": lambda header, arrays: header["classes"][0].update(name="x" * 1_000_000),
    "classes without names": lambda header, arrays: header.update(classes=[1]),
    "no shards": lambda header, arrays: header.update(shards={}),
}


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_an_index_with_a_right_checksum_cannot_lie(root, lie):
    header, arrays = index.load_index(root)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    INDEX_LIES[lie](header, arrays)
    index.write_index(root, header, arrays)
    with pytest.raises(ShardError, match="is damaged: .*--rebuild-index"):
        open_index(root)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", (1 << 64) - 1),
        ("offset", 1 << 40),
        ("size", (1 << 32) - 1),
        ("size", 0),
        ("lo", np.nan),
        ("mean", np.inf),
    ],
)
def test_an_entry_that_points_anywhere_is_refused(root, key, value):
    """Its checksum is right, as far as one can be: nothing is read outside the shard, nor much memory taken."""
    header, arrays = index.load_index(root)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    row = arrays["dx"][0:1]
    ranges, before = row.tobytes()[16:], int(row["size"][0])
    row[key] = value
    if key in ("lo", "mean"):
        member = (root / "shard-000000.tar").read_bytes()[int(row["offset"][0]) :][: int(row["size"][0])]
        row["crc32"] ^= zlib.crc32(ranges, zlib.crc32(member)) ^ zlib.crc32(row.tobytes()[16:], zlib.crc32(member))
    if key == "size" and value == 0:
        member = (root / "shard-000000.tar").read_bytes()[int(row["offset"][0]) :][:before]
        row["crc32"] ^= zlib.crc32(ranges, zlib.crc32(member)) ^ zlib.crc32(ranges)
    index.write_index(root, header, arrays)
    source = Source(open_index(root), StreamSpec(stream="temporal", L=10, crop_px=32))
    with bounded_memory(), pytest.raises(ShardError, match=r"shard-000000.tar: a/v0/0000.000.dx.jpg at offset \d+: "):
        source.read(np.array([0]), np.array([0]), 10)
    source.close()
    with open(root / "shard-000000.tar", "r+b") as file:
        file.write(b"\xff" * 512)  # so that verify goes by the index
    report = verify.verify_shard(verify.ShardTask(root, "shard-000000.tar", None, None, False))
    damaged = "a/v0/0000.000.dx.jpg at offset" in "".join(report.damages)
    assert damaged == (key == "offset" or (key == "size" and value > 0))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/\x1b[2J", "a//b", "a/../b"])
def test_video_ids_of_an_index_are_safe_names(root, name):
    """They are printed, and written to score files."""
    header, arrays = index.load_index(root)
    arrays = {key: np.array(array) for key, array in arrays.items()}
    arrays["names"] = np.frombuffer(f"{name}b".encode(), np.uint8)
    arrays["videos"]["name_at"], arrays["videos"]["name_bytes"] = [0, len(name)], [len(name), 1]
    index.write_index(root, header, arrays)
    with pytest.raises(ShardError, match="A name in the index is none"):
        open_index(root).video_ids(range(2))


@pytest.mark.parametrize("arrays", [[], {"videos": {"offset": -64, "count": 2, "bytes": 44}}, {"names": []}, {"x": {}}])
def test_the_arrays_of_an_index_lie_in_it(root, arrays):
    text = json.dumps({"classes": [], "shards": [], "arrays": arrays}).encode()
    head = struct.pack("<8sII", index.MAGIC, zlib.crc32(text), len(text))
    (root / "index.bin").write_bytes(head + text + bytes(1000))
    with pytest.raises(ShardError, match="is damaged"):
        open_index(root)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"arrays":' * 100_000, b"\xff", b"9" * 5000, b"NaN"])
@pytest.mark.parametrize("file", ["index.bin", "dataset.json"])
def test_json_that_is_nested_too_deep_or_none_is_an_error(root, file, text):
    head = struct.pack("<8sII", index.MAGIC, zlib.crc32(text), len(text)) if file == "index.bin" else b""
    (root / file).write_bytes(head + text)
    with pytest.raises(ShardError, match="is damaged"):
        open_index(root)


def test_files_of_terabytes_are_not_read(root):
    with bounded_memory():
        bomb(root / "splits/split1_train.txt")
        with pytest.raises(ValueError, match="split1_train.txt has 1,099,511,627,776 bytes"):
            open_index(root).split("split1_train")
        for name in ("dataset.json", "index.bin"):
            content = (root / name).read_bytes()
            bomb(root / name)
            with pytest.raises(ShardError, match=name):
                open_index(root)
            (root / name).write_bytes(content)
        head = struct.pack("<8sII", index.MAGIC, 0, (1 << 32) - 1)
        bomb(root / "index.bin")
        with open(root / "index.bin", "r+b") as file:
            file.write(head)
        with pytest.raises(ShardError, match="header claims 4,294,967,295 bytes"):
            open_index(root)


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("file", ["dataset.json", "index.bin", "shard-000000.tar", "splits/split1_train.txt"])
def test_what_is_no_regular_file_neither_hangs_nor_never_ends(root, file, kind):
    replace(root / file, kind)
    with pytest.raises((ValueError, OSError), match="no regular file|is missing|: missing|Is a directory"):
        open_index(root).split("split1_train")


DATASET_LIES = {
    "path as shard": lambda d: d["shards"][0].update(name="../../other/shard-000000.tar"),
    "absolute path": lambda d: d["shards"][0].update(name="/etc/passwd"),
    "no digest": lambda d: d["shards"][0].pop("sha256"),
    "number as name": lambda d: d["shards"][0].update(name=7),
    "list as shard": lambda d: d.update(shards=[[]]),
    "no codec": lambda d: d.pop("codec"),
    "codec of text": lambda d: d.update(codec="jpeg"),
    "flow of text": lambda d: d.update(flow="dis"),
    "stale classes": lambda d: d.update(classes=[]),
    "stale number of videos": lambda d: d.update(num_videos=3),
    "number of videos in words": lambda d: d.update(num_videos="two"),
    "shard twice": lambda d: d.update(shards=d["shards"] * 2),
}


@pytest.mark.parametrize("lie", DATASET_LIES)
def test_a_dataset_json_that_lies_is_refused(root, lie):
    dataset = json.loads((root / "dataset.json").read_text())
    DATASET_LIES[lie](dataset)
    write_json(root / "dataset.json", dataset)
    with pytest.raises(ShardError, match="dataset.json"):
        open_index(root)
    if "stale" not in lie:
        assert verify.main([str(root), "--workers", "1"]) == 2


# --- shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", "SYMTYPE LNKTYPE CHRTYPE BLKTYPE FIFOTYPE DIRTYPE CONTTYPE GNUTYPE_SPARSE".split())
def test_a_shard_holds_plain_files_alone(tmp_path, kind):
    """Nothing is ever unpacked to a path; what is no plain file is an error nevertheless."""
    header = {"type": getattr(tarfile, kind), "linkname": "/etc/passwd"}
    path = tar_of(tmp_path / "shard-000000.tar", ("a/v/0000.json", b"", header))
    with pytest.raises(ShardError, match="no plain file|damaged tar header"):
        list(read_clips(path))


def clip_json(**changes):
    content = {
        "format_version": 1, "video_id": "a/v", "class_name": "a", "class_id": None, "first_frame": 0, "num_frames": 1,
        "is_last": True, "height": 8, "width": 8, "members": {"rgb": {"first": 0, "size": [5], "crc32": [0]}},
    }  # fmt: skip
    return json.dumps({**content, **changes}).encode()


def field(**changes):
    column = {"first": 0, "size": [5], "crc32": [0], "lo": [0.0], "hi": [1.0], "mean": [0.0]}
    return {"members": {"dx": {**column, **changes}, "dy": column}}


@pytest.mark.parametrize(
    "text",
    [
        clip_json(video_id="../../etc/v"),
        clip_json(video_id="/etc/v"),
        clip_json(video_id=7),
        clip_json(class_name="\x1b[2J"),
        clip_json(class_name=["a"]),
        clip_json(class_id=1 << 70),
        clip_json(height=65_500, width=65_500),
        clip_json(height=1 << 70),
        clip_json(first_frame=64 << 70),
        clip_json(members={"rgb": {"first": 0, "size": [0], "crc32": [0]}}),
        clip_json(members={"rgb": {"first": 0, "size": [5] * 10_000, "crc32": [0] * 10_000}}),
        clip_json(members=[]),
        clip_json(**field(lo=[1e39])),
        clip_json(**field(lo=[10**400])),
        clip_json(**field(lo=[float("nan")])),
        clip_json(**field(mean=["0"])),
        clip_json(**field(size=[True])),
        b"[" * 500_000,
        b"{" + b" " * (1 << 20),
        b"null",
    ],
    ids=lambda text: text[-60:].decode(),
)
def test_a_clip_json_that_lies_is_refused(tmp_path, text):
    name = json.loads(text)["video_id"] if text.startswith(b'{"format') else "a/v"
    path = tar_of(
        tmp_path / "shard-000000.tar", (f"{name}/0000.json", text, {}), ("a/v/0000.000.rgb.jpg", b"jpeg!", {})
    )
    with pytest.raises(ShardError, match=r"shard-000000.tar: .*at offset 512"):
        list(read_clips(path))


@pytest.mark.parametrize("kind", [b"0", tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_member_that_claims_terabytes_takes_none(tmp_path, kind):
    info = tarfile.TarInfo("train/000000.jpg")
    info.size, info.type = 1 << 42, kind
    block = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "shard-000000.tar").write_bytes(block + bytes(10240))
    with bounded_memory(), pytest.raises(ShardError, match="claims 4398046511104 bytes, the shard has 10752"):
        list(read_clips(tmp_path / "shard-000000.tar"))
    with bounded_memory(), pytest.raises(ValueError, match="shard-000000.tar"):  # a stranger's WebDataset tar of images
        read_source(str(tmp_path))
