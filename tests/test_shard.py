"""The shard format: what independent WebDataset readers see, what names are refused, index against tars."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from flow import shard
from flow.clips import read_clips, read_member
from flow.codec import decode_component, decode_rgb
from flow.index import build_index, load_index, take_entries
from flow.shard import ShardError, check_video_id, commit_shard
from loaders.index import open_index
from tests.conftest import pack_arrays, random_video

STRANGE = [
    "brush_hair/[BHIT]_World!_#1_(+)_&_'quote'_brush_hair_u_nm_np1_ba_goo_0",
    "sit/Müller_straße_日本_sit_f_cm",
    "walk/" + "n" * 145,
    "walk/deep/er/with.dots.in.it",
    "walk/plain",
]


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A set with backward fields and names that break naive readers; one video of 70 frames, two clips."""
    rng = np.random.default_rng(3)
    videos = {}
    for k, video_id in enumerate(STRANGE):
        frames, fields = random_video(rng, 70 if k == 0 else 5, 32, 40)
        videos[video_id] = (frames, fields, -fields)
    return pack_arrays(tmp_path_factory.mktemp("strange") / "set", videos, videos_per_shard=2), videos


def expected_members(videos):
    """{(video id, clip): {extension: kind}} of all members but the JSONs, by the naming rule of the format."""
    expected = {}
    for video_id, (frames, *_) in videos.items():
        for t in range(len(frames)):
            members = expected.setdefault(f"{video_id}/{t // 64:04d}", {"json"})
            members.add(f"{t % 64:03d}.rgb.jpg")
            if t < len(frames) - 1:
                members |= {f"{t % 64:03d}.dx.jpg", f"{t % 64:03d}.dy.jpg"}
            if t > 0:
                members |= {f"{t % 64:03d}.bdx.jpg", f"{t % 64:03d}.bdy.jpg"}
    return expected


def test_the_webdataset_package_reads_every_member(strange):
    root, videos = strange
    found = {}
    for sample in webdataset.WebDataset(sorted(map(str, root.glob("*.tar"))), shardshuffle=False):
        meta = {key for key in sample if not key.startswith("__")}
        assert sample["__key__"] not in found, "the members of a clip are not contiguous"
        found[sample["__key__"]] = meta
        header = json.loads(sample["json"])
        t = header["first_frame"]
        fields = videos[header["video_id"]][1]
        column = header["members"]["dx"]
        dx = decode_component(sample["000.dx.jpg"], column["lo"][0], column["hi"][0])
        assert np.abs(dx - fields[t, 0]).mean() < 0.05
        assert np.isclose(column["mean"][0], fields[t, 0].mean(), atol=1e-5)
        assert np.abs(decode_rgb(sample["000.rgb.jpg"]).astype(int) - videos[header["video_id"]][0][t]).mean() < 6
    assert found == expected_members(videos)


def test_dalis_own_reader_reads_every_member(strange):
    import nvidia.dali.fn as fn
    from nvidia.dali import pipeline_def

    root, videos = strange
    shards = sorted(map(str, root.glob("*.tar")))
    extensions = sorted(set().union(*expected_members(videos).values()))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():
        return tuple(fn.readers.webdataset(paths=shards, ext=extensions, missing_component_behavior="empty"))

    pipeline = graph()
    found = {}
    for _ in range(len(expected_members(videos))):
        sample = {
            extension: np.asarray(output.at(0)).tobytes()
            for extension, output in zip(extensions, pipeline.run(), strict=True)
        }
        header = json.loads(sample["json"])
        key = f"{header['video_id']}/{header['first_frame'] // 64:04d}"
        found[key] = {extension for extension, content in sample.items() if content}
    assert found == expected_members(videos)


def test_plain_tar_lists_the_members_in_order(strange):
    root, _ = strange
    for path in root.glob("*.tar"):
        with tarfile.open(path) as archive:
            names = [member.name for member in archive.getmembers()]
        entries = list(read_clips(path))
        assert len(names) == len(entries) + sum(len(array) for e in entries for _, array in e.entries.values())
        for e in entries:
            for group in (("dx", "dy"), ("bdx", "bdy")):
                offsets = np.stack([e.entries[kind][1]["offset"] for kind in group], axis=1).reshape(-1)
                assert (np.diff(offsets.astype(np.int64)) > 0).all(), "a stack is not one contiguous read"


def test_the_index_finds_every_member_by_video_and_frame(strange):
    root, videos = strange
    index = open_index(root)
    assert index.video_ids(range(index.num_videos)) == sorted(videos, key=str.encode)
    for video_id, (frames, fields, backward) in videos.items():
        (row,) = index.rows([video_id])
        assert index.num_frames[row] == len(frames)
        assert index.classes[index.labels[row]] == video_id.split("/")[0]
        shard = root / index.shards[index.shard[row]]
        for t in range(len(frames)):
            for kind, field in (("dx", fields[t : t + 1]), ("bdy", backward[t - 1 : t] if t else [])):
                (entry,) = take_entries(index.entries[kind], kind, index.first_row[row : row + 1] + t)
                if not len(field):
                    assert entry["size"] == 0
                    continue
                jpeg = read_member(shard, entry, kind)
                decoded = decode_component(jpeg, entry["lo"], entry["hi"])
                assert np.abs(decoded - field[0][0 if kind == "dx" else 1]).mean() < 0.05


def test_the_index_is_a_function_of_the_tars(strange):
    root, _ = strange
    before = (root / "index.bin").read_bytes()
    (root / "index.bin").write_bytes(b"nonsense")
    with pytest.raises(ShardError, match="expected b'2STREAM2'.*--rebuild-index"):
        load_index(root)
    build_index(root)
    assert (root / "index.bin").read_bytes() == before


def test_index_arrays_are_mapped_not_copied(strange):
    _, arrays = load_index(strange[0])
    assert isinstance(arrays["dx"], np.memmap) and not arrays["dx"].flags.writeable


@pytest.mark.parametrize(
    "video_id",
    ["../up", "/absolute", "a//b", "a/__meta__", "__init__/x", "a/.hidden", "a/new\nline", "a/b\\c", ".", "a/\udc80"],
)
def test_ids_that_readers_skip_or_that_leave_the_folder_are_refused(video_id):
    with pytest.raises(ValueError, match="Rename"):
        check_video_id(video_id)


@pytest.mark.parametrize("video_id", [*STRANGE, "a", "__x/y__", "a..b/c"])
def test_ordinary_and_strange_ids_pass(video_id):
    check_video_id(video_id)


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "a").write_bytes(bytes(512))
    with pytest.raises(FileNotFoundError):
        commit_shard([tmp_path / "a", tmp_path / "missing"], tmp_path / "shard-000000.tar")
    assert not (tmp_path / "shard-000000.tar").exists()


def test_an_ordinary_tar_is_refused_as_a_shard(tmp_path):
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        info = tarfile.TarInfo("notes.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
    with pytest.raises(ShardError, match="notes.txt at offset 512, 5 bytes, where a clip's JSON was expected"):
        build_index(tmp_path)
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match="holds no shard"):
        build_index(tmp_path)


def test_a_video_that_stands_twice_or_breaks_off_is_refused(strange, tmp_path):
    root, _ = strange
    first = (root / "shard-000000.tar").read_bytes()
    (tmp_path / "shard-000000.tar").write_bytes(first)
    (tmp_path / "shard-000001.tar").write_bytes(first)
    with pytest.raises(ShardError, match="stands in shard-000000.tar and again in shard-000001.tar"):
        build_index(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    with tarfile.open(root / "shard-000000.tar") as archive:
        second_clip = next(m for m in archive.getmembers() if m.name.endswith("/0001.json"))
    (tmp_path / "shard-000000.tar").write_bytes(first[: second_clip.offset] + bytes(1024))
    with pytest.raises(ShardError, match="breaks off after frame 0"):
        build_index(tmp_path)


def test_processes_that_write_a_small_file_at_once_do_not_meet(tmp_path, monkeypatch):
    """One publishes while the other is about to: both succeed, and nothing is left."""
    publish = shard.publish

    def publish_after_another(temporary, path):
        monkeypatch.setattr(shard, "publish", publish)
        shard.write_bytes(path, b"another's")
        publish(temporary, path)

    monkeypatch.setattr(shard, "publish", publish_after_another)
    shard.write_bytes(tmp_path / "run.json", b"mine")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"mine"


def test_a_small_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        shard.write_bytes(tmp_path / "run.json", b"mine")
    assert list(tmp_path.iterdir()) == []
