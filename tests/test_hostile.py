"""Files from strangers, each attack really attempted: it ends in one of our errors, in bounded memory, and reaches
nothing outside its own file. SECURITY.md has the list."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flow import catalog, index, resume, verify
from flow.codec import coded_size, decode_grey, decode_rgb, encode_rgb
from flow.flow_dirs import FlowDirTask, write_flow_dir
from flow.flow_files import list_flow_dirs
from flow.image_sources import Source as ImageSource
from flow.image_sources import read_source
from flow.images import read_image
from flow.shard import ShardError, read_clips, write_json
from flow.untrusted import MAX_JSON_BYTES
from flow.video import VideoError, read_frames, resize, write_video
from loaders.batch import StreamSpec
from loaders.index import open_index
from loaders.source import Source
from tests.conftest import pack_arrays, random_video
from train.checkpoint import load_checkpoint
from train.config import CONFIG_FOLDER, resolve_config
from train.figures import read_confusion
from train.log import read_log
from train.record import read_book
from train.scores import Scores, read_scores, write_scores

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    rng = np.random.default_rng(5)
    videos = {f"a/v{k}": random_video(rng, 12, 48, 64) for k in range(2)}
    return pack_arrays(tmp_path_factory.mktemp("hostile") / "set", videos)


@pytest.fixture
def root(whole, tmp_path):
    """A packed set of two videos, to be damaged."""
    return shutil.copytree(whole, tmp_path / "set")


@contextmanager
def bounded_memory(megabytes=200):
    """Fail if the process takes more memory meanwhile than it has now; the system keeps the highest mark."""

    def mark(kind):
        return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = mark("VmRSS")
    yield
    assert mark("VmHWM") - before < megabytes


class Payload:
    """What a pickle would run: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def bomb(path, num_bytes=1 << 40):
    """A file of a terabyte that takes no room."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(num_bytes)


NOT_REGULAR = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "link to a device": lambda path: os.symlink("/dev/zero", path),
}


def replace(path, kind):
    path.unlink()
    NOT_REGULAR[kind](path)


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
    ranges = row.tobytes()[16:]
    row[key] = value
    if key in ("lo", "mean"):
        member = (root / "shard-000000.tar").read_bytes()[int(row["offset"][0]) :][: int(row["size"][0])]
        assert zlib.crc32(ranges, zlib.crc32(member)) == row["crc32"][0]
        row["crc32"] = zlib.crc32(row.tobytes()[16:], zlib.crc32(member))
    if key == "size" and value == 0:
        row["crc32"] = zlib.crc32(ranges)
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


def tar_of(path, *members):
    """A tar of (name, content, changes of its header)."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


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


# --- lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "../../etc/passwd.avi 1",
        "/etc/passwd.avi 1",
        "a/../../b.avi",
        "a/\x1b[2J.avi",
        "a/b.avi " + "9" * 5000,
        "x" * 5000,
        "a/b",
        "a/.hidden.avi",
    ],
)
def test_a_list_names_no_path_outside(tmp_path, line):
    (tmp_path / "classInd.txt").write_text("1 a\n")
    for side in ("train", "test"):
        (tmp_path / f"{side}list01.txt").write_text(f"a/good.avi 1\n{line}\n")
    with pytest.raises(ValueError, match="list01.txt, line 2"):
        catalog.read_ucf101_lists(tmp_path)
    (tmp_path / "a_test_split1.txt").write_text(f"good.avi 1\n{line}\n")
    with pytest.raises(ValueError, match="a_test_split1.txt, line 2"):
        catalog.read_hmdb51_lists(tmp_path)


def test_lists_that_are_no_text_or_too_long_are_refused(tmp_path):
    (tmp_path / "classInd.txt").write_text("1 a\n")
    for content, message in (
        (b"\xff\xfe\n", "no text in UTF-8"),
        (b"a/b.avi 1\n" * (MAX_JSON_BYTES // 8), "expected at most"),
    ):
        for side in ("train", "test"):
            (tmp_path / f"{side}list01.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            catalog.read_ucf101_lists(tmp_path)


# --- configs -----------------------------------------------------------------------------------------------------


def laughs(levels=60):
    lines = ["a0: &a0 [lol, lol]"] + [f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: !!python/object/apply:os.mkdir [pwned]", "expected plain values"),
        ("train: !!python/name:os.system", "expected plain values"),
        ("train: {seed: !!int ''}", "expected plain values"),
        (laughs(), "expected plain values"),
        ("train: {seed: &a 1, batch_size: *a}", "expected plain values"),
        ("train: " + "[" * 500, "not YAML"),
        ("train: {seed: " + "9" * 5000 + "}", "not YAML"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "[Ee]xceeds the limit|number of at most"),
        ("train:\n  ? " + "x" * 50_000 + "\n  : 1", "unknown config key"),
        ("train: {batch_size: 2147483647}", "train.batch_size=.*at most 65536"),
        ("data: {L: 1000000}", "data.L=.*at most 256"),
        ("data: {crop_px: 65500}", "data.crop_px=.*at most 4096"),
        ("data: {size: 65500}", "data.size='65500'"),
        ("data: {stacks_per_window: 99999}", "data.stacks_per_window=.*at most 256"),
        ("model: {width: 1e6}", "model.width=.*at most 16"),
        ("model: {width: .nan}", "model.width=nan"),
        ("temporal: {lr: .inf}", "temporal.lr=inf"),
        ("eval: {num_taus: 1000000000}", "eval.num_taus=.*at most 65536"),
        ("fuse: {C: [" + "1, " * 5000 + "1]}", "fuse.C has 5001 values"),
        ("data: {root: " + "x" * 5000 + "}", "data.root has 5000 characters"),
        ("#" * (1 << 20), "has 1,048,577 bytes, expected at most"),
    ],
    ids=range(21),
)
def test_a_config_runs_nothing_and_asks_for_nothing_absurd(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text + "\n")
    with bounded_memory(), pytest.raises(ValueError, match=message):
        resolve_config("mine.yaml")
    assert os.listdir() == ["mine.yaml"]


def test_a_config_name_leads_nowhere_else(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(ValueError, match="unknown config"):
        resolve_config(os.path.relpath(tmp_path / "secret", CONFIG_FOLDER))


# --- scores, checkpoints, records --------------------------------------------------------------------------------


def good_scores(**changes):
    values = dict(
        video_ids=np.array(["a/v0", "a/v1"]), labels=np.array([0, 1]), scores=np.array([[0.5, 0.5], [0.1, 0.9]]),
        num_views=np.array([250, 250]), classes=np.array(["a", "b"]), stream="spatial", split_list="split1_test",
        dataset="d", checkpoint="c",
    )  # fmt: skip
    return Scores(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.array([0, 2])},
        {"labels": np.array([-1, 0])},
        {"labels": np.array([0.0, 1.0])},
        {"labels": np.array([0])},
        {"scores": np.array([[0.5, 0.5], [np.nan, 1]])},
        {"scores": np.array([[0.5, 0.5], [-1, 2]])},
        {"scores": np.array([[0.5, 0.5], [0.5, 0.9]])},
        {"scores": np.zeros((2, 0))},
        {"scores": np.array(1.0)},
        {"classes": np.array([0, 1])},
        {"stream": 5},
    ],
    ids=str,
)
def test_scores_that_make_no_sense_are_refused(tmp_path, changes):
    write_scores(good_scores(), tmp_path / "scores.npz")
    assert read_scores(tmp_path / "scores.npz").labels.tolist() == [0, 1]
    write_scores(good_scores(**changes), tmp_path / "scores.npz")
    with pytest.raises(ValueError, match="is no score file"):
        read_scores(tmp_path / "scores.npz")


def npz(path, compression=zipfile.ZIP_STORED, **members):
    """A score file with some members' bytes replaced."""
    write_scores(good_scores(), path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**content, **{f"{key}.npy": value for key, value in members.items()}}.items():
            archive.writestr(name, data)


def npy(shape, dtype, content=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + content


def test_a_score_file_neither_runs_nor_allocates_what_it_claims(tmp_path):
    path, made = tmp_path / "scores.npz", tmp_path / "pwned"
    code = io.BytesIO()
    np.save(code, np.array([Payload(made)], object), allow_pickle=True)
    deep = b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 8999 + b"1"
    attacks = [
        {"labels": code.getvalue()},
        {"labels": npy((2,), "|O", pickle.dumps([Payload(made)]))},
        {"scores": npy((1 << 40, 2), "<f8")},
        {"scores": npy((1 << 60, 0), "<f8")},
        {"video_ids": npy((2,), "<U1000000000")},
        {"labels": deep},
        {"labels": b"\x93NUMPY\x02\x00" + struct.pack("<I", (1 << 32) - 1)},
        {"labels": b""},
        {"scores": bytes(10_000_000), "compression": zipfile.ZIP_DEFLATED},
    ]
    for attack in attacks:
        npz(path, **attack)
        with bounded_memory(), pytest.raises(ValueError, match="is no score file"):
            read_scores(path)
    for content in (b"", b"PK\5\6" + bytes(18), pickle.dumps(Payload(made)), np.random.default_rng(0).bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no score file"):
            read_scores(path)
    assert not made.exists()


def test_a_checkpoint_runs_nothing(tmp_path):
    import torch

    path, made = tmp_path / "checkpoint.pt", tmp_path / "pwned"
    torch.save({"format_version": 1, "net": Payload(made)}, path)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)
    assert not made.exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "7", '{"step": "x"}', "\xff"])
def test_logs_and_records_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match="file.json, line 1 is damaged"):
        read_log(path)
    with pytest.raises(ValueError, match="file.json is no results file"):
        read_book(path)
    with pytest.raises(ValueError, match="file.json is no results.json"):
        read_confusion(path, "average")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "7", '{"shard": {"name": "../x", "bytes": 0, "sha256": ""}, "totals": {}, "bad": {}}']
)
def test_the_notes_of_a_stopped_pack_are_not_believed(tmp_path, text):
    (tmp_path / ".pack").mkdir()
    (tmp_path / "x").touch()
    resume.state_path(tmp_path, 0).write_text(text)
    assert not resume.is_finished(tmp_path, 0), "that shard is packed again"
    (tmp_path / ".pack/settings.json").write_text(text)
    with pytest.raises(ValueError, match="damaged|begun with other settings"):
        resume.begin(tmp_path, {"seed": 0})


# --- images and videos -------------------------------------------------------------------------------------------

JPEG = encode_rgb(np.zeros((16, 16, 3), np.uint8), 90)


def claiming(jpeg, height, width):
    """The same JPEG, whose header claims another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    changed = jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]
    assert coded_size(changed)[:2] == (height, width)
    return changed


def png(height, width):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image", [claiming(JPEG, 65_500, 65_500), png(65_500, 65_500)], ids=["jpeg", "png"])
def test_an_image_that_claims_gigapixels_is_not_decoded(tmp_path, image):
    (tmp_path / "image.jpg").write_bytes(image)
    with bounded_memory():
        for decode in (decode_rgb, decode_grey):
            with pytest.raises(ValueError, match="bytes that"):
                decode(image)
        with pytest.raises(ValueError, match="no image that OpenCV reads"):
            read_image(ImageSource("a/image", "a", tmp_path / "image.jpg", 0, len(image), None), 64)


def test_a_jpeg_of_a_thousand_scans_is_not_decoded():
    scan = JPEG[JPEG.index(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match="more than 200 scans"):
        decode_rgb(JPEG[:-2] + scan * 1000 + JPEG[-2:])


def test_an_image_too_long_to_be_scaled_is_refused():
    with bounded_memory(), pytest.raises(VideoError, match="too long"):
        resize(np.zeros((1, 60_000, 3), np.uint8), 1000)


@pytest.mark.parametrize("content", [claiming(JPEG, 65_500, 65_500), JPEG + bytes(3_000_000), None])
def test_extracted_jpegs_are_bounded(tmp_path, content):
    folder = tmp_path / "flow" / "a" / "v"
    folder.mkdir(parents=True)
    for name in ("img_00001", "img_00002", "flow_x_00001", "flow_y_00001"):
        (folder / f"{name}.jpg").write_bytes(content or JPEG)
    if content is None:
        replace(folder / "img_00001.jpg", "fifo")
    (video,) = list_flow_dirs(tmp_path / "flow", None, None)
    report = write_flow_dir(FlowDirTask(video, None, tmp_path / "fragment", 20.0, None))
    assert re.search("claims|no regular file", report.bad["a/v"])


def test_image_tars_are_bounded(tmp_path):
    for label in (b"1" * 5000, b"9" * 30, b"1" * 100_000, b"-1"):
        tar_of(tmp_path / "train.tar", ("0.jpg", JPEG, {}), ("0.cls", label, {}))
        with pytest.raises(ValueError, match="train.tar: (sample '0' has class|a header or label claims)"):
            read_source(str(tmp_path / "train.tar"))
    for name in ("../../0", "a/../../0", "a/\x1b[2J"):
        tar_of(tmp_path / "train.tar", (f"{name}.jpg", JPEG, {}), (f"{name}.cls", b"1", {}))
        with pytest.raises(ValueError, match="Video id"):
            read_source(str(tmp_path / "train.tar"))
    tar_of(
        tmp_path / "train.tar",
        ("0.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("0.cls", b"1", {}),
    )
    with pytest.raises(ValueError, match="sample '0' has cls; expected"):
        read_source(str(tmp_path / "train.tar"))
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2
    (tmp_path / "train.tar").write_bytes((name.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")) * 3000)
    with pytest.raises(ValueError, match="train.tar"):
        read_source(str(tmp_path / "train.tar"))


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "real.avi", [np.full((48, 64, 3), 20 * k, np.uint8) for k in range(5)])
    return tmp_path / "real.avi"


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile 'real.avi'\n",
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nreal.avi\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("extension", [".avi", ".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_by_the_name_of_a_video_leads_nowhere(video, kind, extension):
    path = video.with_name(f"list{extension}")
    path.write_text(PLAYLISTS[kind])
    with pytest.raises(VideoError, match="cannot be opened"):
        list(read_frames(path))


def test_without_the_white_list_the_playlist_would_be_read(video, monkeypatch):
    """So that the test before this one proves something."""
    from flow import video as module

    path = video.with_name("list.avi")
    path.write_text(PLAYLISTS["concat"])
    monkeypatch.setattr(module, "_FFMPEG_OPTIONS", "threads;1")
    assert len(list(read_frames(path))) == 5


def test_a_pattern_is_no_name_of_many_files(video):
    for k in range(3):
        (video.parent / f"img_{k:03d}.jpg").write_bytes(JPEG)
    with pytest.raises(VideoError, match="cannot be opened"):
        list(read_frames(video.parent / "img_%03d.jpg"))
    odd = video.rename(video.with_name("img_%03d.avi"))
    assert len(list(read_frames(odd))) == 5, "as a name of one file it is one"


@pytest.mark.parametrize("name", ["| mkdir pwned;.avi", "$(mkdir pwned).avi", "pipe:0.avi", "http:x.avi", "-i.avi"])
def test_no_name_is_a_command(video, monkeypatch, name):
    monkeypatch.chdir(video.parent)
    video.rename(name)
    assert len(list(read_frames(Path(name)))) == 5
    assert os.listdir() == [name]


@pytest.mark.parametrize("size", [(65_500, 65_500), (8192, 4096)])
def test_a_video_that_claims_gigapixels_is_not_decoded(video, size):
    """In its container's headers and in every packet."""
    content = video.read_bytes()
    for old, new in (
        (struct.pack("<II", 64, 48), struct.pack("<II", size[1], size[0])),
        (b"\x08" + struct.pack(">HH", 48, 64), b"\x08" + struct.pack(">HH", *size)),
    ):
        assert old in content
        content = content.replace(old, new)
    video.write_bytes(content)
    with bounded_memory(300), pytest.raises(VideoError, match="too large frames|cannot be opened|is damaged"):
        list(read_frames(video))


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_a_video_that_is_no_regular_file_is_refused(video, kind):
    replace(video, kind)
    with pytest.raises(ValueError, match="no regular file|Is a directory"):
        list(read_frames(video))


# --- the list of all this ----------------------------------------------------------------------------------------


def test_every_test_that_security_md_names_exists():
    named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
    mine = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.M))
    unnamed = mine - {test for _, test in named}
    assert unnamed == {"test_every_test_that_security_md_names_exists"}
