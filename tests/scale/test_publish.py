"""Packing into a real S3 server: the objects are those of a local pack, whatever happens on the way."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from servers import Fault, faulty_proxy, s3_server

from flow import demo, pack, pool, publish, store
from flow.dataset import read_dataset
from flow.store import Store
from tests.conftest import InThisProcess
from tests.faults import processes

OPTIONS = ["--size", "48", "--videos-per-shard", "2", "--workers", "1"]
URL = "s3://bucket/sets/demo"
NUM_SHARDS = 6


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve videos."""
    root = tmp_path_factory.mktemp("videos")
    demo.generate(root / "all", num_train=1, num_test=1, num_frames=12)
    shutil.rmtree(root / "all" / "splits")
    return root / "all"


@pytest.fixture(scope="module")
def local(videos, tmp_path_factory):
    """The videos packed into a folder."""
    out = tmp_path_factory.mktemp("local") / "set"
    assert pack.main(["--videos", str(videos), "--out", str(out), *OPTIONS]) == 0
    return out


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A proxy before an S3 server, and the server's own store. The work folder is packing-demo in tmp_path."""
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "_Pool", InThisProcess)
    monkeypatch.setattr(publish, "_PAUSES_S", (0.05, 0.1, 0.2))
    monkeypatch.setattr(store.Store.__init__, "__kwdefaults__", {"filesystem": None, "pauses_s": (0.05, 0.1, 0.2)})
    with s3_server(tmp_path / "buckets", monkeypatch, tmp_path / "log") as port, faulty_proxy(port) as proxy:
        direct = Store(URL)
        assert direct.names() == {}  # which connects it
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy, direct


def run(videos, *options):
    return pack.main(["--videos", str(videos), "--out", URL, *OPTIONS, *options])


def start(videos, work):
    """The same in a process of its own, to be killed."""
    return processes.start("flow.pack", ["--videos", videos, "--out", URL, "--work", work, *OPTIONS])


def assert_whole(direct, local, complete=False):
    """What is in the bucket is a local pack's, byte for byte but for seconds; dataset.json only with all else."""
    names = direct.names()
    expected = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert names.keys() <= expected, "something else lies there"
    if complete or "dataset.json" in names:
        assert names.keys() == expected
    for name, num_bytes in names.items():
        content = direct.read(name, 0, num_bytes)
        if name == "dataset.json":
            assert json.loads(content) | {"summary": 0} == read_dataset(local) | {"summary": 0}
        else:
            assert content == (local / name).read_bytes(), name
    return names


class Watch:
    """Looks at the bucket and the work folder all the time. max_bytes: of the tars in the folder."""

    def __init__(self, direct, local, work):
        self._direct, self._local, self._work = direct, local, work
        self.looks, self.max_tars, self.error, self._end = 0, 0, None, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        try:
            while not self._end.is_set():
                self.max_tars = max(self.max_tars, len(list(self._work.glob("shard-*.tar*"))))
                assert_whole(self._direct, self._local)
                self.looks += 1
                time.sleep(0.02)
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()
        if self.error:
            raise self.error


def test_objects_are_the_files_of_a_local_pack(videos, local, bucket, tmp_path, capsys):
    proxy, direct = bucket
    with Watch(direct, local, tmp_path / "packing-demo") as watch:
        assert run(videos) == 0
    assert watch.looks > 2
    assert_whole(direct, local, complete=True)
    puts = [path.removeprefix("/bucket/sets/demo/") for method, path in proxy.seen if method == "PUT"]
    assert puts[:NUM_SHARDS] == [f"shard-{number:06d}.tar" for number in range(NUM_SHARDS)]
    assert puts[-1] == "dataset.json" and len(puts) == NUM_SHARDS + 4
    assert not Path("packing-demo").exists()
    assert run(videos) == 0 and f"{URL} was complete" in capsys.readouterr().out


FAULTS = {
    "503": Fault(status=503, method="PUT"),
    "500": Fault(status=500, method="PUT"),
    "cut before it is stored": Fault(lose=0.5, method="PUT"),
    "cut when it is stored": Fault(cut=0.0, method="PUT"),
    "a byte that changes on the way": Fault(flip_sent=True, method="PUT"),
    "a slow answer": Fault(wait_s=0.5, method="PUT"),
    "no answer about its size": Fault(status=503, method="HEAD"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass_leave_no_trace(local, bucket, tmp_path, name):
    """At any file of a set that is copied."""
    proxy, direct = bucket
    for file in ("shard-000001", "shard-000004", "index.bin", "dataset.json"):
        if FAULTS[name].method == "PUT" or file != "dataset.json":
            proxy.faults.append(Fault(**{**vars(FAULTS[name]), "only": file}))
    with Watch(direct, local, tmp_path):
        assert publish.publish(local, URL) == NUM_SHARDS
    assert not proxy.faults, "not all were met"
    assert_whole(direct, local, complete=True)


def test_a_pack_with_all_faults_is_the_same(videos, local, bucket, tmp_path):
    proxy, direct = bucket
    for number, fault in enumerate(FAULTS.values()):
        proxy.faults.append(Fault(**{**vars(fault), "only": f"shard-{number % NUM_SHARDS:06d}"}))
    with Watch(direct, local, tmp_path / "packing-demo"):
        assert run(videos) == 0
    assert not proxy.faults and assert_whole(direct, local, complete=True)


def test_a_slow_store_makes_packing_wait(videos, local, bucket, tmp_path, monkeypatch):
    """So that the folder stays small, whatever the set's size."""
    monkeypatch.setattr(publish, "_MAX_WAITING", 2)
    proxy, direct = bucket
    proxy.faults.extend(Fault(wait_s=2.0, method="PUT", only="shard-") for _ in range(NUM_SHARDS))
    with Watch(direct, local, tmp_path / "packing-demo") as watch:
        assert run(videos) == 0
    assert watch.max_tars == 3 < NUM_SHARDS, "two that wait, and one that is whole and wants to"
    assert_whole(direct, local, complete=True)


def test_a_store_that_stays_away_ends_a_pack_that_then_goes_on(videos, local, bucket, tmp_path, capsys):
    proxy, direct = bucket
    proxy.faults.extend(Fault(status=503, method="PUT", only=f"shard-{n:06d}") for n in (2, 3, 4, 5) for _ in range(99))
    assert run(videos) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith(f"error: {URL}/shard-000002.tar: 4 attempts failed") and "command goes on from here" in error
    )
    assert assert_whole(direct, local).keys() == {"shard-000000.tar", "shard-000001.tar"}
    proxy.faults.clear()
    work = tmp_path / "packing-demo"
    tars, noted = list(work.glob("shard-*.tar")), {path.stem for path in work.glob(".pack/shard-*.json")}
    assert 1 <= len(tars) <= publish._MAX_WAITING + 1 and len(noted) == 2 + len(tars)
    proxy.seen.clear()
    with Watch(direct, local, work):
        assert run(videos) == 0
    puts = [path for method, path in proxy.seen if method == "PUT"]
    assert sum("shard-" in path for path in puts) == NUM_SHARDS - 2, "what was published was sent again"
    assert_whole(direct, local, complete=True)


@pytest.mark.parametrize("only", ["shard-000002", "dataset.json"])
def test_a_killed_pack_goes_on_and_ends_with_the_same_objects(videos, local, bucket, tmp_path, only):
    """Killed when the proxy has the whole of a file, and the pack no answer."""
    proxy, direct = bucket
    work = tmp_path / "packing-demo"
    proxy.faults.append(Fault(wait_s=3.0, method="PUT", only=only))
    with Watch(direct, local, work):
        process = start(videos, work)
        assert processes.wait_until(lambda: any(m == "PUT" and only in p for m, p in proxy.whole), 120)
        processes.kill([process.pid])
        process.communicate()
        assert len(list(work.glob(".pack/shard-*.husk"))) == (NUM_SHARDS if only == "dataset.json" else 2)
        assert processes.wait_until(lambda: any(only in name for name in direct.names()))
    with Watch(direct, local, work):
        again = start(videos, work)
        output = again.communicate()[0]
    assert again.returncode == 0, output
    assert ("was complete" in output) == (only == "dataset.json")
    assert_whole(direct, local, complete=True)
    assert not work.exists()


def test_a_pack_that_is_killed_while_it_sends_leaves_no_part(videos, local, bucket, tmp_path):
    proxy, direct = bucket
    proxy.faults.append(Fault(lose=0.5, wait_s=3.0, method="PUT", only="shard-000001"))
    with Watch(direct, local, tmp_path / "work"):
        process = start(videos, tmp_path / "work")
        assert processes.wait_until(lambda: any(m == "PUT" and "shard-000001" in p for m, p in proxy.seen), 120)
        processes.kill([process.pid])
        process.communicate()
        assert run(videos, "--work", str(tmp_path / "work")) == 0
    assert_whole(direct, local, complete=True)


def test_sigterm_ends_a_pack_at_once_and_it_goes_on(videos, local, bucket, tmp_path):
    proxy, direct = bucket
    work = tmp_path / "work"
    proxy.faults.append(Fault(wait_s=20.0, method="PUT", only="shard-000001"))
    process = start(videos, work)
    assert processes.wait_until(lambda: any(m == "PUT" and "shard-000001" in p for m, p in proxy.seen), 120)
    family = processes.tree(process.pid)
    started = time.monotonic()
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 128 + 15 and output.endswith(
        "The same command goes on with the shards that are left.\n"
    )
    assert time.monotonic() - started < 15, "it waited for the store"
    assert processes.wait_until(lambda: not any(map(processes.is_running, family)))
    assert run(videos, "--work", str(work)) == 0
    assert_whole(direct, local, complete=True)


def test_a_large_file_goes_in_parts_and_appears_whole(bucket, tmp_path):
    proxy, direct = bucket
    content = os.urandom(70_000_000)
    (tmp_path / "large").write_bytes(content)
    proxy.faults.append(Fault(status=503, method="PUT", only="partNumber=2"))
    sizes, end = set(), threading.Event()

    def look():
        while not end.is_set():
            sizes.add(direct.names().get("large"))

    thread = threading.Thread(target=look)
    thread.start()
    Store(URL).put(tmp_path / "large", "large")
    end.set()
    thread.join()
    assert not proxy.faults and sum("partNumber" in path for _, path in proxy.seen) > 3
    assert sizes <= {None, len(content)} and direct.read("large", 0, len(content)) == content


def test_wrong_places_are_told_at_once(videos, bucket, tmp_path, capsys, monkeypatch):
    def refused(*options):
        assert pack.main(["--videos", str(videos), *OPTIONS, *options]) == 2
        assert not list(tmp_path.glob("packing-*"))
        return capsys.readouterr().err

    assert "there is no such bucket; create it, or check the URL" in refused("--out", "s3://nobucket/set")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "access is refused" in refused("--out", URL)
