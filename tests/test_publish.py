"""Packs into a store: what ends there is what a folder would hold, nothing is computed twice, nobody is overwritten.

The store is fsspec's in memory, or one that fails; real servers are in tests/scale."""

import itertools
import json
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from flow import images, pack, pool, publish, resume, verify
from flow.clips import read_clips
from flow.dataset import read_dataset
from flow.husk import read_husk, write_husk
from flow.index import scan_clips, write_index
from flow.shard import ShardError, write_json
from flow.store import Store, StoreError
from tests.conftest import InThisProcess
from tests.test_images import write_folder
from tests.test_pack import contents

CLIPS = ["--size", "48", "--videos-per-shard", "2", "--workers", "1"]
fresh = itertools.count()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(pool, "_Pool", InThisProcess)


@pytest.fixture
def url(monkeypatch):
    """URL of a store in memory."""
    monkeypatch.setattr(publish, "Store", store_of)
    return f"memory:///bucket{next(fresh)}/set"


def store_of(url, **_):
    return Store(url, filesystem=None if url.startswith("http") else fsspec.filesystem("memory"), pauses_s=(0.0, 0.0))


def stored(url):
    """Content of all files of a store."""
    store = store_of(url)
    return {name: store.read(name, 0, num_bytes) if num_bytes else b"" for name, num_bytes in store.names().items()}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, packed_demo):
    """Six videos, one of them bad."""
    root = tmp_path_factory.mktemp("publish") / "videos"
    for number, path in enumerate(sorted((packed_demo.parent / "videos").glob("*/*.avi"))[::4][:5]):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.parent.name)
        if number == 3:
            (root / path.parent.name / "bad.avi").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def local(videos, tmp_path_factory):
    """The videos packed into a folder."""
    out = tmp_path_factory.mktemp("local") / "set"
    assert pack.main(["--videos", str(videos), "--out", str(out), *CLIPS]) == 1
    return out


def run(videos, url, *options):
    return pack.main(["--videos", str(videos), "--out", url, *CLIPS, *options])


def without_seconds(dataset):
    return {key: value for key, value in dataset.items() if key != "summary"}


def assert_same(url, folder):
    """The store has the files of the folder, byte for byte, but for the seconds that packing took."""
    found = stored(url)
    assert sorted(found) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    datasets = json.loads(found.pop("dataset.json")), json.loads((folder / "dataset.json").read_bytes())
    assert without_seconds(datasets[0]) == without_seconds(datasets[1])
    for name, content in found.items():
        assert content == (folder / name).read_bytes(), name


# --- husks -------------------------------------------------------------------------------------------------------


def test_an_index_of_husks_is_that_of_the_shards(packed, tmp_path):
    shards = sorted(packed.glob("shard-*.tar"))
    for shard in shards:
        write_husk(shard, tmp_path / shard.name)
        for husk, clip in zip(read_husk(tmp_path / shard.name), read_clips(shard), strict=True):
            assert (
                vars(husk) | {"entries": 0} == vars(clip) | {"entries": 0}
                and husk.entries.keys() == clip.entries.keys()
            )
            for kind, (first, rows) in clip.entries.items():
                assert husk.entries[kind][0] == first and np.array_equal(husk.entries[kind][1], rows)
                assert husk.entries[kind][1].dtype == rows.dtype
    husks = [(shard.name, shard.stat().st_size, read_husk(tmp_path / shard.name)) for shard in shards]
    write_index(tmp_path, *scan_clips(husks))
    assert (tmp_path / "index.bin").read_bytes() == (packed / "index.bin").read_bytes()


def test_a_damaged_husk_is_told(packed, tmp_path):
    husk = tmp_path / "shard-000000.husk"
    write_husk(packed / "shard-000000.tar", husk)
    content = husk.read_bytes()
    for damaged in (b"", content[:-30], content[:100], bytes([*content[:200], content[200] ^ 1, *content[201:]])):
        husk.write_bytes(damaged)
        with pytest.raises(ValueError, match="husk is damaged.*Take it away, and run the command again"):
            list(read_husk(husk))
    for at in {*range(100), *range(0, len(content), len(content) // 300)}:
        husk.write_bytes(content[:at] + bytes([content[at] ^ 0x81]) + content[at + 1 :])
        with pytest.raises(ValueError, match="husk is damaged"):
            list(read_husk(husk))


# --- packing into a store ----------------------------------------------------------------------------------------


def test_a_pack_into_a_store_is_that_into_a_folder(videos, local, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(videos, url) == 1
    output = capsys.readouterr().out
    assert "Packing in packing-set: " in output and f"1 bad videos were left out: {url}/bad_videos.txt" in output
    assert_same(url, local)
    assert list(tmp_path.iterdir()) == [], "the work folder is left"
    assert run(videos, url) == 1 and f"{url} was complete: nothing to do" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert run(videos, url, "--backward") == 2 and "backward: False before, True now" in capsys.readouterr().err


def test_images_go_to_a_store_too(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images")
    options = ["--train", str(tmp_path / "images"), "--size", "16", "--per-shard", "4", "--workers", "1"]
    assert images.main([*options, "--out", "local"]) == images.main([*options, "--out", url]) == 0
    assert_same(url, tmp_path / "local")


class Failing:
    """A file system that fails from some upload on, or at one name."""

    def __init__(self, allowed, name="shard-"):
        self._fs, self.allowed, self.name = fsspec.filesystem("memory"), allowed, name

    def __getattr__(self, attribute):
        return getattr(self._fs, attribute)

    def put_file(self, local, remote, **options):
        if self.name in remote:
            if self.allowed <= 0:
                raise ConnectionError("the cable is out")
            self.allowed -= 1
        self._fs.put_file(local, remote, **options)

    def pipe_file(self, path, content):
        if self.name in path:
            raise ConnectionError("the cable is out")
        self._fs.pipe_file(path, content)


@pytest.mark.parametrize("allowed, name", [(0, "shard-"), (2, "shard-"), (0, "index.bin"), (0, "dataset.json")])
def test_a_store_that_goes_away_costs_no_shard(videos, local, url, tmp_path, monkeypatch, capsys, allowed, name):
    """What is whole is kept, and never computed again; what is published is kept as a husk."""
    monkeypatch.chdir(tmp_path)
    broken = Failing(allowed, name)
    monkeypatch.setattr(publish, "Store", lambda url, **_: Store(url, filesystem=broken, pauses_s=(0.0, 0.0)))
    assert run(videos, url) == 2
    error = capsys.readouterr().err
    assert "3 attempts failed" in error and "The same command goes on from here" in error and error.count("error:") == 1
    assert "dataset.json" not in stored(url)
    work = tmp_path / "packing-set"
    num_shards = len(list(local.glob("shard-*.tar")))
    num_husks = allowed if name == "shard-" else num_shards
    assert len(list(work.glob(".pack/*.husk"))) == num_husks == sum("shard-" in name for name in stored(url))
    kept = [*work.glob(".pack/shard-*"), *work.glob("shard-*.tar")]
    before = {path: path.stat().st_mtime_ns for path in kept if path.suffix != ".tar"}
    assert not {husk.stem for husk in work.glob(".pack/*.husk")} & {tar.stem for tar in work.glob("*.tar")}
    with monkeypatch.context() as patch:  # as far as it goes
        patch.setattr(publish.StoreTarget, "end", lambda _: None)
        patch.setattr(publish, "Store", store_of)
        assert run(videos, url) == 1
        assert all(path.stat().st_mtime_ns == at for path, at in before.items()), "a shard was packed again"
    monkeypatch.setattr(publish, "Store", store_of)
    assert run(videos, url) == 1 and list(tmp_path.iterdir()) == []
    assert_same(url, local)


def test_packing_waits_for_a_slow_store(videos, url, tmp_path, monkeypatch):
    """No more than a few tars are ever in the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publish, "_MAX_WAITING", 1)
    committed, counts, put = threading.Event(), [], publish.put_shard
    monkeypatch.setattr(
        resume, "commit_shard", lambda *arguments, commit=resume.commit_shard: (commit(*arguments), committed.set())[0]
    )

    def put_slowly(*arguments):
        committed.clear()
        committed.wait(2)  # for one more shard, if it comes
        counts.append(len(list(Path("packing-set").glob("shard-*.tar"))))
        put(*arguments)

    monkeypatch.setattr(publish, "put_shard", put_slowly)
    assert run(videos, url, "--videos-per-shard", "1") == 1
    assert len(counts) == 5 and max(counts) == 2


def test_a_shard_that_the_store_has_lost_is_packed_again(videos, local, url, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(publish, "put_rest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(videos, url)
    fsspec.filesystem("memory").rm(f"{url.removeprefix('memory://')}/shard-000001.tar")
    assert run(videos, url) == 1 and "shard-000001.tar is there no more" in caplog.text
    assert_same(url, local)


def test_another_pack_in_the_same_place_is_noticed(videos, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stranger, put_rest = b"of another pack", publish.StoreTarget.build_index
    with monkeypatch.context() as patch:
        patch.setattr(
            publish.StoreTarget,
            "build_index",
            lambda target: (put_rest(target), store_of(url).put_bytes(stranger, "shard-000001.tar")),
        )
        assert run(videos, url) == 2
    error = capsys.readouterr().err
    assert "shard-000001.tar is not what was sent. Does another pack go there?" in error
    assert "dataset.json" not in stored(url)
    assert run(videos, url) == 1, "the same command packs it again"


def test_a_shard_that_no_pack_made_is_noticed_before_work_and_at_the_end(
    videos, local, url, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    store, build_index = store_of(url), publish.StoreTarget.build_index
    with monkeypatch.context() as patch:
        patch.setattr(
            publish.StoreTarget,
            "build_index",
            lambda target: (build_index(target), store.put_bytes(b"", "shard-000099.tar")),
        )
        assert run(videos, url) == 2
    message = "shard-000099.tar is of no shard of this pack. Remove it from the bucket, or choose another --out"
    assert message in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_shards", lambda *_, **__: pytest.fail("work is begun"))
        assert run(videos, url) == 2 and message in capsys.readouterr().err
    fsspec.filesystem("memory").rm(f"{url.removeprefix('memory://')}/shard-000099.tar")
    assert run(videos, url) == 1
    assert_same(url, local)


def test_reports_that_lay_in_the_store_are_no_part_of_a_set(videos, packed_demo, local, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bad_videos.txt", "missing_videos.txt"):
        store_of(url).put_bytes(b"Old/video\tof another set\n", name)
    good = shutil.copytree(videos, tmp_path / "videos", ignore=shutil.ignore_patterns("bad.avi"))
    assert run(good, url) == 0, "there is nothing bad"
    assert stored(url)["bad_videos.txt"] == stored(url)["missing_videos.txt"] == b""
    copy = f"{url}-copied"
    store_of(copy).put_bytes(b"Old/video\tof another set\n", "missing_videos.txt")
    publish.publish(local, copy)
    assert stored(copy)["missing_videos.txt"] == b""
    assert stored(copy)["bad_videos.txt"] == (local / "bad_videos.txt").read_bytes()


def test_what_is_not_this_packs_is_left_alone(videos, local, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refused(*arguments):
        before = sorted(tmp_path.rglob("*"))
        assert run(videos, *arguments) == 2 and sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    assert "a web server's files are read, and cannot be" in refused("https://127.0.0.1:9/set")
    assert "--work w is for --out s3://" in refused("set", "--work", "w")
    Path("full").mkdir()
    Path("full", "letter.txt").touch()
    assert "full holds 'letter.txt', and no pack into" in refused(url, "--work", "full")
    shutil.copytree(local, "packed")
    assert "packed holds 'bad_videos.txt', and no pack into" in refused(url, "--work", "packed")
    store_of(url).put_bytes(b"shard", "shard-000000.tar")
    assert "holds shards, but no dataset.json, and packing-set is no work folder" in refused(url)
    assert contents(tmp_path / "packed") == contents(local)


def test_a_work_folder_is_that_of_one_url_and_no_set(videos, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(publish, "put_rest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(videos, url)
    other = url.replace("bucket", "basket")
    assert run(videos, other) == 2
    error = capsys.readouterr().err
    assert f"packing-set was begun with other settings; url: '{url}' before, '{other}' now" in error
    assert "choose another --work DIR." in error
    assert run(videos, "packing-set") == 2 and f"url: '{url}' before, None now" in capsys.readouterr().err
    assert verify.main(["packing-set"]) == 2
    assert run(videos, other, "--work", "own") == 1, "which is another pack"
    assert run(videos, url) == 1


# --- copying a set -----------------------------------------------------------------------------------------------


def test_a_copied_set_is_the_set(local, url, capsys):
    assert publish.main([str(local), url]) == 0 and "3 shards were sent" in capsys.readouterr().out
    assert_same(url, local)
    assert stored(url)["dataset.json"] == (local / "dataset.json").read_bytes()
    assert publish.main([str(local), url]) == 0 and "was complete" in capsys.readouterr().out


def test_a_copy_goes_on_and_trusts_only_what_it_has_read(local, url, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(publish, "put_rest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish.publish(local, url)
    assert len(stored(url)) == 3
    size = (local / "shard-000001.tar").stat().st_size
    store_of(url).put_bytes(bytes(size), "shard-000001.tar")
    assert publish.publish(local, url) == 1
    assert_same(url, local)


def test_a_copy_of_what_is_no_set_or_on_another_is_refused(local, packed, url, tmp_path, capsys):
    assert publish.main([str(tmp_path), url]) == 2 and "it has no dataset.json" in capsys.readouterr().err
    root = shutil.copytree(local, tmp_path / "set")
    content = bytearray((root / "shard-000002.tar").read_bytes())
    content[5000] ^= 1
    (root / "shard-000002.tar").write_bytes(content)
    with pytest.raises(ValueError, match="shard-000002.tar: SHA-256 is"):
        publish.publish(root, url)
    assert sorted(stored(url)) == ["shard-000000.tar", "shard-000001.tar"]
    store_of(url).put_bytes(b"", "shard-000003.tar")
    with pytest.raises(ValueError, match="shard-000003.tar is of another set"):
        publish.publish(local, url)
    store_of(url).put_bytes(b"{}", "dataset.json")
    with pytest.raises(ValueError, match="holds another packed set"):
        publish.publish(local, url)
    with pytest.raises(ValueError, match="describe.*it is old, or lists have changed. Run .*--rebuild-index"):
        publish.publish(packed, url)


# --- what dataset.json says of files -----------------------------------------------------------------------------


def test_lists_are_described_when_the_index_is_rebuilt(local, url, tmp_path):
    root = shutil.copytree(local, tmp_path / "set")
    files = read_dataset(root)["files"]
    assert [entry["name"] for entry in files] == ["index.bin", "splits/split1_test.txt", "splits/split1_train.txt"]
    own = root / "splits" / "mine.txt"
    own.write_text("")
    (root / "splits" / ".hidden.txt").touch()
    assert verify.verify(root, num_workers=1).damages == [], "a list of one's own is no damage"
    with pytest.raises(ValueError, match="lists have changed"):
        publish.publish(root, url)
    assert verify.main([str(root), "--rebuild-index", "--workers", "1"]) == 0
    assert len(read_dataset(root)["files"]) == 4 and publish.publish(root, url) == 3
    own.unlink()
    assert ["splits/mine.txt: is missing since" in line for line in verify.verify(root, num_workers=1).damages] == [
        True
    ]
    test = root / "splits" / "split1_train.txt"
    test.write_text("".join(reversed(test.read_text().splitlines(True))))
    assert len(verify.verify(root, num_workers=1).damages) == 2
    assert verify.main([str(root), "--rebuild-index", "--workers", "1"]) == 0
    assert verify.verify(root, num_workers=1).damages == []


def test_sets_without_a_description_open_and_get_one(packed, tmp_path):
    root = shutil.copytree(packed, tmp_path / "set")
    assert "files" not in read_dataset(root) and verify.verify(root, num_workers=1).damages == []
    assert verify.main([str(root), "--rebuild-index", "--workers", "1"]) == 0
    assert len(read_dataset(root)["files"]) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"name": "splits/../../x.txt"},
        {"name": "/etc/passwd"},
        {"name": "splits/.x.txt"},
        {"name": "splits/a\nb.txt"},
        {"name": "shard-000000.tar"},
        {"name": 1},
        {"bytes": "1"},
        {"sha256": "x"},
        None,
    ],
)
def test_a_strangers_description_names_nothing_outside(local, tmp_path, change):
    dataset = read_dataset(local)
    dataset["files"][1] = change and {**dataset["files"][1], **change}
    write_json(tmp_path / "dataset.json", dataset)
    with pytest.raises(ShardError, match="dataset.json is damaged"):
        read_dataset(tmp_path)


def test_uploads_end_with_the_first_error():
    sent = []

    def send(number):
        sent.append(number)
        if number == 1:
            raise StoreError("gone")

    uploads = publish._Uploads(send, lambda _: None)
    with pytest.raises(StoreError, match="gone"):
        for number in range(10):
            uploads.add(number)
    with pytest.raises(StoreError, match="gone"):
        uploads.wait()
    assert sent == [0, 1]
    uploads.close()
