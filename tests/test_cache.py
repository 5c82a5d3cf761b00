"""The cache: what is read through it is what was published, and it never takes more room than it may."""

import fcntl
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flow import verify
from flow.shard import ShardError
from flow.store import StoreError
from loaders import ahead as ahead_module
from loaders import cache as cache_module
from loaders import cache_files, dali_loader, index, reference
from loaders.ahead import ahead
from loaders.batch import StreamSpec
from loaders.cache import ShardCache, default_folder
from loaders.draw import Population, draw_batch, population
from loaders.request import requests
from loaders.shard_pool import pooled
from loaders.source import SampleError, Source
from tests.conftest import pack_arrays
from tests.remote import Folder, assert_same, described, list_files, made_up_set, published, store_of
from train.sets import check_cache, held_shards

ROOT = Path(__file__).parent.parent
GB = 10**9
SPATIAL = StreamSpec(stream="spatial", crop_px=56)
TEMPORAL = StreamSpec(stream="temporal", L=10, crop_px=56)


@pytest.fixture(scope="module")
def root(tmp_path_factory, arrays):
    """A set of six shards, each of one video, ready to be published."""
    root = pack_arrays(tmp_path_factory.mktemp("published") / "set", arrays, videos_per_shard=1)
    list_files(root)
    return root


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "log")


def open_cached(root, cache, folder, max_bytes=GB):
    return index._open_cached(ShardCache.open(f"test://{root}", cache, max_bytes, store_of(root, folder)))


def bytes_of(cache):
    """What a cache holds, parts as what they will be."""
    return sum(file.num_bytes for file in cache_files.scan(cache))


# --- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [dali_loader, reference], ids=["dali", "reference"])
@pytest.mark.parametrize("spec", [SPATIAL, TEMPORAL], ids=["spatial", "temporal"])
def test_batches_are_those_of_the_folder_though_the_cache_holds_two_shards(root, tmp_path, folder, spec, module):
    local = index.open_index(root)
    largest = sorted(local.shard_bytes)[-2:]
    cached = open_cached(root, tmp_path / "cache", folder, sum(largest) + cached_overhead(root))
    rows = local.split("split1_train")
    for make, num in ((module.train_loader, 6), (module.view_loader, 10)):
        means = {"batch_size": 8} | ({"seed": 3} if make is module.train_loader else {"num_taus": 2})
        with make(local, rows, spec, **means) as expected, make(cached, rows, spec, **means) as found:
            for _ in range(num):
                assert_same(next(found), next(expected))
    assert folder.asked("shard-000000.tar") > local.shard_bytes[0]  # it was taken away, and came back


def cached_overhead(root):
    """Bytes that a cache keeps of a set beside its shards."""
    return sum(path.stat().st_size for path in [*root.glob("*.json"), *root.glob("*.bin"), *root.glob("splits/*")])


def test_an_index_says_where_the_set_lies(root, tmp_path, folder):
    cached, local = open_cached(root, tmp_path / "cache", folder), index.open_index(root)
    assert local.location == str(root) and cached.location == f"test://{root}"
    assert cached.fingerprint == local.fingerprint and cached.splits() == local.splits() == [
        "split1_test",
        "split1_train",
    ]
    with pytest.raises(ValueError, match=r"test://.*/set has no list 'split9'; it has split1_test, split1_train"):
        cached.split("split9")
    with pytest.raises(ValueError, match=r"test://.*/set holds no video 'run/none'"):
        cached.rows(["run/none"])


def test_each_file_is_fetched_once_whatever_the_number_of_threads(root, tmp_path, folder):
    cached = open_cached(root, tmp_path / "cache", folder)
    draws = [draw_batch(0, step, population(cached, cached.split("all"), SPATIAL), SPATIAL, 16) for step in range(8)]
    source = Source(cached, SPATIAL)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda draw: source.release(source.read(draw.video, draw.tau, 1)), draws))
    source.close()
    again = open_cached(root, tmp_path / "cache", folder)
    used = {cached.shards[shard] for draw in draws for shard in cached.shard[draw.video]}
    assert len(used) > 1 and again.cache.num_cached(sorted(used)) == len(used)
    for name, num_bytes in zip(cached.shards, cached.shard_bytes, strict=True):
        assert folder.asked(name) == (num_bytes if name in used else 0)
    assert folder.asked("index.bin") == (root / "index.bin").stat().st_size
    assert folder.asked("dataset.json") == 2 * (root / "dataset.json").stat().st_size  # at every opening


def test_a_set_that_is_packed_anew_does_not_meet_old_shards(packed, root, tmp_path, folder):
    other = published(packed, tmp_path / "other")
    first, second = (open_cached(folder_, tmp_path / "cache", folder) for folder_ in (root, other))
    assert first.cache.folder != second.cache.folder
    for name, shared in (("shard-000000.tar", root), ("shard-000001.tar", other)):
        of = first if shared is root else second
        file = of.cache.open_file(name)
        assert os.pread(file, 1 << 30, 0) == (shared / name).read_bytes()
        os.close(file)


# --- the bound ---------------------------------------------------------------------------------------------------

SIZES = [100, 100, 150, 30, 200, 70]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.sampled_from(["open", "close", "fetch", "touch"]), st.integers(0, 5)), max_size=40),
    room=st.integers(220, 700),
)
def test_the_least_recently_used_go_never_an_open_one_never_more_than_the_bound(steps, room, tmp_path_factory):
    """Held against a list of names in the order of their use."""
    base = tmp_path_factory.mktemp("bound")
    root = made_up_set(base / "set", [bytes([number]) * size for number, size in enumerate(SIZES)])
    names = [f"shard-{number:06}.tar" for number in range(len(SIZES))]
    overhead = cached_overhead(root)
    cache = ShardCache.open("test:/", base / "cache", room + overhead, store_of(root, Folder(base / "log")))
    used: OrderedDict[int, None] = OrderedDict()
    opened: dict[int, int] = {}

    def make_room(number):
        left = OrderedDict(used)
        for oldest in used:
            if sum(SIZES[i] for i in left) + SIZES[number] > room and oldest not in opened:
                del left[oldest]
        if sum(SIZES[i] for i in left) + SIZES[number] > room:
            return False  # and nothing was taken away in vain
        for gone in set(used) - set(left):
            del used[gone]
        return True

    for action, number in steps:
        if action == "open":
            if number in opened:
                continue
            if number not in used and not make_room(number):
                with suppress_patience(), pytest.raises(StoreError, match=r"no room for its .* Raise data.cache_gb"):
                    cache.open_file(names[number])
                continue
            opened[number] = cache.open_file(names[number])
            assert os.pread(opened[number], 1000, 0) == (root / names[number]).read_bytes()
        elif action == "close":
            if number in opened:
                os.close(opened.pop(number))
            continue
        elif action == "fetch":
            cache.fetch(names[number], lambda: False)
            if number not in used and not make_room(number):
                continue
        elif action == "touch":
            assert cache.touch(names[number]) == (number in used)
            if number not in used:
                continue
        used[number] = None
        used.move_to_end(number)
        assert {name for name in names if (cache.folder / name).exists()} == {names[i] for i in used}
        assert bytes_of(base / "cache") <= room + overhead
    for file in opened.values():
        os.close(file)


def test_a_file_that_goes_between_its_opening_and_its_lock_is_fetched_again(tmp_path, folder, monkeypatch):
    """Else it would be read, and take room, while nobody counts it."""
    root = made_up_set(tmp_path / "set", [b"a" * 1000])
    cache = ShardCache.open("test:/", tmp_path / "cache", GB, store_of(root, folder))
    os.close(cache.open_file("shard-000000.tar"))
    flock = fcntl.flock

    def late(file, operation):
        monkeypatch.undo()
        (cache.folder / "shard-000000.tar").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    file = cache.open_file("shard-000000.tar")
    assert cache_files.is_at(file, cache.folder / "shard-000000.tar")
    os.close(file)


def test_files_that_are_not_the_caches_are_never_counted_nor_taken_away(tmp_path, folder):
    root = made_up_set(tmp_path / "set", [b"a" * 1000, b"b" * 1000])
    base, key = tmp_path / "cache", "0123456789abcdef" * 2
    cache = ShardCache.open("test:/", base, 1000 + cached_overhead(root), store_of(root, folder))
    os.close(cache.open_file("shard-000000.tar"))
    with_dataset = [f"ucf101/{name}" for name in ("dataset.json", "shard-000000.tar", "index.bin")]
    in_ours = [f"{cache.folder.name}/{name}" for name in ("UCF101.tar", "x.7.part", "splits/shard-000009.tar")]
    foreign = [
        *("UCF101.tar", "index.bin", "shard-000000.tar", "film.mp4.900.part", "downloads/shard-000000.tar"),
        *(*with_dataset, f"{key}/shard-000000.tar", f"{key}/index.bin", f"below/{key}/dataset.json"),
        *(f"below/{key}/shard-000000.tar", *in_ours, f"{cache.folder.name}/more/shard-000000.tar"),
    ]
    for name in foreign:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"x" * 5000)
        os.utime(base / name, (1, 1))
    (base / ("f" * 32)).symlink_to(base / "ucf101")
    os.close(cache.open_file("shard-000001.tar"))
    assert not (cache.folder / "shard-000000.tar").exists()
    assert [name for name in foreign if not (base / name).exists()] == []
    assert bytes_of(base) == 1000 + cached_overhead(root)


def test_room_is_waited_for_while_others_fetch_and_not_once_they_stand_still(tmp_path, folder, monkeypatch):
    root = made_up_set(tmp_path / "set", [b"a" * 1000, b"b" * 1000])
    cache = ShardCache.open("test:/", tmp_path / "cache", 1000 + cached_overhead(root), store_of(root, folder))
    part = cache._part("shard-000000.tar")
    clock = [0.0]
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: clock[0])
    sleeps = []
    with open(part, "wb") as fetched:
        fcntl.flock(fetched, fcntl.LOCK_EX)  # as whoever fetches it

        def sleep(_):
            clock[0] += 0.9 * cache_module._ROOM_PATIENCE_S
            sleeps.append(clock[0])
            if len(sleeps) <= 10:
                os.write(fetched.fileno(), b"a")

        monkeypatch.setattr(cache_module.time, "sleep", sleep)
        with pytest.raises(StoreError, match="no room for its"):
            cache.open_file("shard-000001.tar")
    assert len(sleeps) == 12
    assert part.exists()


class suppress_patience:
    """No wait for room: nobody else will make any."""

    def __enter__(self):
        self.usual, cache_module._ROOM_PATIENCE_S = cache_module._ROOM_PATIENCE_S, 1e-9

    def __exit__(self, *_):
        cache_module._ROOM_PATIENCE_S = self.usual


def test_parts_that_nobody_fetches_make_room_and_count_as_what_they_will_be(tmp_path, folder):
    root = made_up_set(tmp_path / "set", [b"a" * 100, b"b" * 100])
    cache = ShardCache.open("test:/", tmp_path / "cache", 150 + cached_overhead(root), store_of(root, folder))
    part = cache._part("shard-000000.tar")
    part.write_bytes(b"aa")
    assert bytes_of(tmp_path / "cache") == 100 + cached_overhead(root)
    os.close(cache.open_file("shard-000001.tar"))
    assert not part.exists()


def test_a_shard_or_index_larger_than_the_cache_is_an_error(tmp_path, folder):
    root = made_up_set(tmp_path / "set", [b"a" * 10_000])
    cache = ShardCache.open("test:/set", tmp_path / "cache", 9_990, store_of(root, folder))
    with pytest.raises(ValueError, match=r"/shard-000000.tar has 1e-05 GB, the cache .* may hold 9.99e-06 GB"):
        cache.open_file("shard-000000.tar")
    with pytest.raises(ValueError, match="/index.bin has 5e-09 GB"):
        ShardCache.open("test:/set", tmp_path / "other", 4, store_of(root, folder))


def test_a_training_list_must_fit_in_the_cache(root, tmp_path, folder):
    local = index.open_index(root)
    rows = local.split("split1_train")
    needed = sum(local.shard_bytes) + cached_overhead(root)
    enough = open_cached(root, tmp_path / "a", folder, needed)
    less = open_cached(root, tmp_path / "a", folder, needed - 1)
    check_cache([(local, rows)])
    check_cache([(enough, rows), (local, rows)])
    with pytest.raises(ValueError, match=r"draws from .* GB of shards, and the cache holds data.cache_gb=.*cache_gb.$"):
        check_cache([(less, rows)])  # and with less than one shard beside those that come next there is no pool
    check_cache([(less, rows[:1])])  # of one shard
    with pytest.raises(ValueError, match="5 at a time with those that come next"):
        check_cache([(less, rows)], num_shards=5)
    with pytest.raises(ValueError, match="Raise data.cache_gb"):
        check_cache([(enough, rows), (enough, rows)])


def of_shards(num_shards, size, max_bytes, num_classes=1):
    """What check_cache looks at of a set in a store, of one video a shard."""
    cache, rows = SimpleNamespace(own_bytes=7, max_bytes=max_bytes, url="s3://b/set"), np.arange(num_shards)
    means = {"shard": rows, "shard_bytes": [size] * num_shards, "labels": rows % num_classes}
    return SimpleNamespace(cache=cache, **means), rows


@given(
    sets=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 500)), min_size=1, max_size=3),
    max_bytes=st.integers(50, 60_000),
    num_machines=st.integers(1, 9),
    num_steps=st.integers(1, 40),
)
def test_the_pool_that_is_proposed_fits_and_a_larger_one_does_not(sets, max_bytes, num_machines, num_steps):
    parts = [of_shards(*of_set, max_bytes) for of_set in sets]

    def proposed(pool):
        try:
            check_cache(parts, pool, num_machines, num_steps)
        except ValueError as error:
            found = re.search("data.pool_shards to [0-9]+ to ([0-9]+)", str(error))
            return int(found[1]) if found else 0
        return None

    if (most := proposed(0)) is None:
        assert sum(7 + num * size for num, size in sets) <= max_bytes
    else:
        assert most == 0 or proposed(most) is None
        assert proposed(most + 1) == most


def test_no_pool_is_proposed_that_would_be_too_small_for_the_classes():
    enough, few = of_shards(100, 10, 400, num_classes=20), of_shards(100, 10, 400, num_classes=40)
    with pytest.raises(ValueError, match="Raise data.cache_gb, or set data.pool_shards to [0-9]+ to 30"):
        check_cache([enough], num_steps=32)
    with pytest.raises(ValueError, match=r"Raise data.cache_gb\.$"):
        check_cache([few], num_steps=32)


def test_of_several_sets_a_machine_may_draw_from_one_alone():
    """Their samples lie one after the other in the global batch, and a machine has a slice of it."""
    one, other = of_shards(400, 1000, 80_000), of_shards(400, 100, 80_000)
    check_cache([one], 64, 8, 8)
    with pytest.raises(ValueError, match="Raise data.cache_gb"):
        check_cache([one, other], 64, 8, 8)


def test_the_bound_of_what_a_machine_holds_of_a_pool_is_kept_wherever_it_was_counted():
    file = ROOT / "benchmarks" / "results" / "draw_statistics.json"
    for row in json.loads(file.read_text())["rows"]:
        for held in row["machines"]:
            assert held["held_shards"]["most"] <= held_shards(row["pool_shards"], held["world_size"])
    assert held_shards(1024, 8) < 400


# --- several processes, and their ends ------------------------------------------------------------------------------

FETCH = """
import sys
from pathlib import Path
from loaders import cache as cache_module
from tests.remote import Folder, store_of
cache_module.PIECE_BYTES = 1000
root, cache, log, kill_after = sys.argv[1:]
folder = Folder(log, kill_after=int(kill_after) if kill_after else None)
opened = cache_module.ShardCache.open("test:/", Path(cache), 10**9, store_of(root, folder))
print("ready", flush=True)
sys.stdin.readline()
opened.open_file("shard-000000.tar")
"""


def fetching(root, tmp_path, kill_after=""):
    """A process that waits for a line and then fetches the shard in pieces of 1,000 bytes."""
    arguments = [sys.executable, "-c", FETCH, str(root), str(tmp_path / "cache"), str(tmp_path / "log"), kill_after]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_that_need_the_same_shard_fetch_it_once(tmp_path, folder):
    root = made_up_set(tmp_path / "set", [os.urandom(300_000)])
    processes = [fetching(root, tmp_path) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert folder.asked("shard-000000.tar") == 300_000
    assert folder.asked("index.bin") == 5


def test_a_fetch_goes_on_after_a_process_was_killed(tmp_path, folder):
    root = made_up_set(tmp_path / "set", [os.urandom(100_000)])
    process = fetching(root, tmp_path, kill_after="42")  # dataset.json and the index are two
    process.communicate("\n", timeout=60)
    assert process.returncode == -9
    (part,) = (tmp_path / "cache").glob("*/*.part")
    assert part.stat().st_size == 40_000
    process = fetching(root, tmp_path)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert folder.asked("shard-000000.tar") == 101_000  # and the piece that nobody has seen
    (shard,) = (tmp_path / "cache").glob("*/*.tar")
    assert shard.read_bytes() == (root / shard.name).read_bytes()
    assert not list((tmp_path / "cache").glob("*/*.part"))


# --- damage ------------------------------------------------------------------------------------------------------


def test_bytes_that_came_wrong_are_fetched_again_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PIECE_BYTES", 1000)
    root = made_up_set(tmp_path / "set", [os.urandom(10_000), os.urandom(10_000)])
    wrong = [True]

    def change(name, content):
        flip = name == "shard-000000.tar" and wrong.pop() if wrong else False
        return bytes([content[0] ^ 1]) + content[1:] if flip or name == "shard-000001.tar" else content

    folder = Folder(tmp_path / "log", change)
    cache = ShardCache.open("test:/set", tmp_path / "cache", GB, store_of(root, folder))
    wrong = [True]
    file = cache.open_file("shard-000000.tar")
    assert os.pread(file, 20_000, 0) == (root / "shard-000000.tar").read_bytes()
    os.close(file)
    assert folder.asked("shard-000000.tar") == 20_000
    sha256 = described(root, "shard-000001.tar")["sha256"]
    with pytest.raises(
        ShardError, match=rf"shard-000001.tar: its SHA-256 is \w+, dataset.json says {sha256}; .*verify"
    ):
        cache.open_file("shard-000001.tar")
    for ask in (cache.open_file, lambda name: cache.fetch(name, lambda: False)):
        with pytest.raises(ShardError, match="its SHA-256 is"):
            ask("shard-000001.tar")
    assert folder.asked("shard-000001.tar") == 20_000  # no more for some minutes
    later = cache_module.time.monotonic() + 2 * cache_module._WRONG_S
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: later)
    with pytest.raises(ShardError, match="its SHA-256 is"):
        cache.open_file("shard-000001.tar")
    assert folder.asked("shard-000001.tar") == 40_000
    assert not (cache.folder / "shard-000001.tar").exists()


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_a_copy_that_rots_is_fetched_again_and_damage_that_was_published_is_an_error(root, tmp_path, folder):
    cached = open_cached(root, tmp_path / "cache", folder)
    rows = cached.rows(["run/long", "walk/wide"])
    source = Source(cached, SPATIAL)
    expected = [image.tobytes() for image in source.read(rows, np.array([3, 3]), 1).images()]
    places = {}
    for row in rows:
        name = cached.shards[cached.shard[row]]
        places[name] = int(cached.entries["rgb"]["offset"][cached.first_row[row] + 3]) + 500
        flip(cached.cache.folder / name, places[name])
    assert [image.tobytes() for image in source.read(rows, np.array([3, 3]), 1).images()] == expected
    for name in places:
        assert folder.asked(name) == 2 * (root / name).stat().st_size
    source.close()
    damaged = published(root, tmp_path / "damaged")
    name = next(iter(places))
    flip(damaged / name, places[name])
    dataset = json.loads((damaged / "dataset.json").read_text())
    dataset["shards"] = [described(damaged, shard) for shard in cached.shards]
    (damaged / "dataset.json").write_text(json.dumps(dataset))
    source = Source(open_cached(damaged, tmp_path / "cache", folder), SPATIAL)
    before = folder.asked(name)
    for _ in range(2):
        with pytest.raises(SampleError, match=r"run/long/0000.003.rgb.jpg"):
            source.read(rows, np.array([3, 3]), 1)
    assert folder.asked(name) - before == (damaged / name).stat().st_size
    source.close()


def test_an_index_that_rots_in_the_cache_is_fetched_again(root, tmp_path, folder):
    cached = open_cached(root, tmp_path / "cache", folder)
    flip(cached.cache.folder / "index.bin", 20)
    again = open_cached(root, tmp_path / "cache", folder)
    assert again.video_ids(range(6)) == index.open_index(root).video_ids(range(6))
    assert folder.asked("index.bin") == 2 * (root / "index.bin").stat().st_size


def test_a_cache_that_is_deleted_under_a_reader_is_made_again(root, tmp_path, folder):
    cached = open_cached(root, tmp_path / "cache", folder)
    source = Source(cached, SPATIAL)
    rows = np.arange(6)
    expected = [image.tobytes() for image in source.read(rows, np.ones(6, int), 1).images()]
    (tmp_path / "cache").rename(tmp_path / "away")
    assert [image.tobytes() for image in source.read(rows, np.ones(6, int), 1).images()] == expected
    assert cached.splits() == index.open_index(root).splits()
    assert np.array_equal(cached.split("split1_train"), index.open_index(root).split("split1_train"))
    source.close()


def test_a_full_disk_is_a_plain_error_after_which_it_goes_on(root, tmp_path, folder, monkeypatch):
    cached = open_cached(root, tmp_path / "cache", folder)
    source = Source(cached, SPATIAL)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "pwrite", full)
        with pytest.raises(
            OSError, match="No space left on device: the cache of test:.* Free space, lower data.cache_gb"
        ):
            source.read(np.arange(2), np.ones(2, int), 1)
    source.read(np.arange(2), np.ones(2, int), 1)
    source.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written.*data.cache"):
        open_cached(root, tmp_path / "file", folder)


def test_a_shard_that_the_store_lacks_is_named(root, tmp_path, folder, caplog):
    broken = published(root, tmp_path / "broken")
    cached = open_cached(broken, tmp_path / "cache", folder)
    (broken / cached.shards[2]).unlink()
    row = int(np.flatnonzero(cached.shard == 2)[0])
    source = Source(cached, SPATIAL)
    with pytest.raises(SampleError, match=r"shard-000002.tar: .* cannot be read \(no such file in the store\)"):
        source.read(np.array([row]), np.array([0]), 1)
    source.close()
    assert not caplog.records  # no copy is damaged


def test_a_shard_that_is_not_what_was_packed_is_gone_past_if_damage_is(root, tmp_path, folder):
    """As in a folder: the same samples take the place of the same ones."""
    broken = published(root, tmp_path / "broken")
    cached, local = open_cached(broken, tmp_path / "cache", folder), index.open_index(broken)
    (row,) = local.rows(["run/long"])
    name = local.shards[local.shard[row]]
    for entry in local.entries["rgb"][local.first_row[row] : local.first_row[row] + local.num_frames[row]]:
        flip(broken / name, int(entry["offset"]) + 500)
    rows, means = local.split("split1_train"), {"seed": 3, "batch_size": 8}
    with reference.train_loader(cached, rows, SPATIAL, **means) as loader:
        with pytest.raises(SampleError, match=rf"{name}: run/long/.* its SHA-256 is .* fetched twice"):
            for _ in range(9):
                next(loader)
    means |= {"on_damage": "skip", "max_damaged_pct": 50.0}
    with (
        reference.train_loader(local, rows, SPATIAL, **means) as expected,
        reference.train_loader(cached, rows, SPATIAL, **means) as found,
    ):
        for _ in range(9):
            assert_same(next(found), next(expected))
        assert found.num_replaced == expected.num_replaced > 0


# --- sets of strangers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../index.bin", "splits/../../x.txt", "/etc/passwd", "splits/a/b.txt", "shard-000000.tar", "splits/\n.txt"]
)
def test_no_name_leads_out_of_the_cache(root, tmp_path, folder, name):
    lying = published(root, tmp_path / "lying")
    dataset = json.loads((lying / "dataset.json").read_text())
    dataset["files"].append({"name": name, "bytes": 3, "sha256": "0" * 64})
    (lying / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(ShardError, match="describes no index.bin and no splits/NAME.txt|not in order"):
        open_cached(lying, tmp_path / "cache", folder)
    assert not (tmp_path / "cache").exists()


def test_sets_that_lack_what_a_store_needs_say_what_to_do(packed, root, tmp_path, folder):
    with pytest.raises(ValueError, match=r"does not list index.bin. Run `python -m flow.verify DIR --rebuild-index`"):
        open_cached(packed, tmp_path / "cache", folder)
    with pytest.raises(ValueError, match="no packed data set: it has no dataset.json. Check the URL"):
        open_cached(tmp_path, tmp_path / "cache", folder)
    huge = published(root, tmp_path / "huge")
    dataset = json.loads((huge / "dataset.json").read_text())
    dataset["files"][1]["bytes"] = 1 << 40
    (huge / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(ValueError, match=r"split1_test.txt has 1,099,511,627,776 bytes, expected at most"):
        open_cached(huge, tmp_path / "cache", folder)


def test_commands_that_need_a_folder_say_so(capsys):
    assert verify.main(["s3://bucket/set"]) != 0
    assert "a URL, where a folder is expected" in capsys.readouterr().err


def test_the_cache_lies_where_the_system_wants_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "two-stream"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "two-stream"


# --- ahead of need -----------------------------------------------------------------------------------------------


def test_requests_are_the_same_and_their_shards_are_asked_for_in_order_ahead_of_them(root, tmp_path, folder):
    local = index.open_index(root)
    videos = population(local, local.split("all"), SPATIAL)
    draws = [draw_batch(0, step, videos, SPATIAL, 2) for step in range(80)]

    def asked_for(max_bytes):
        cached = open_cached(root, tmp_path / "cache", folder, max_bytes)
        asked = []

        def ask(shards):
            asked.append(shards)
            return missing

        for number, request in enumerate(ahead(requests(iter(draws), SPATIAL, 0, True), cached, ask)):
            assert request.draw is draws[number]
            yield number, [shard for shards in asked for shard in shards], local.shard[request.video]
            asked.clear()

    missing, ever = [], set()
    for number, asked, shards in asked_for(GB):
        ever |= set(asked)
        assert set(shards) <= ever
        if number % ahead_module._AGAIN:
            continue
        window = draws[number : number + ahead_module.AHEAD + 1]  # all again
        in_order = [int(shard) for draw in window for shard in np.unique(local.shard[draw.video])]
        assert list(dict.fromkeys(asked)) == list(dict.fromkeys(in_order))
    small = (root / "index.bin").stat().st_size + max(local.shard_bytes)
    for number, asked, _ in asked_for(small):
        if number == 0:
            assert len(set(asked)) <= 4  # a request or two fill what may be taken
    missing = [0] * ahead_module._MOST_MISSING
    for number, asked, _ in asked_for(GB):  # no more before these are there
        assert set(asked) - {0} == set(local.shard[draws[number].video]) - {0}
    ordinary = requests(iter(draws), SPATIAL, 0, True)
    assert ahead(ordinary, local, None) is ordinary


def test_what_is_needed_now_comes_before_what_is_needed_later(tmp_path, monkeypatch):
    root = made_up_set(tmp_path / "set", [bytes([number]) for number in range(9)])
    begun, go_on = [], threading.Event()

    def change(name, content):
        if name.endswith(".tar"):
            begun.append(int(name[6:12]))
            go_on.wait(30)
        return content

    cache = ShardCache.open("test:/", tmp_path / "cache", GB, store_of(root, Folder(tmp_path / "log", change)))

    class OfCache:
        shards = cache.shard_names

    OfCache.cache = cache
    monkeypatch.setattr(ahead_module, "_THREADS", 1)
    fetcher = ahead_module.Fetcher(OfCache)
    fetcher.ask([0, 1, 2, 3, 4, 5], now=False)
    while not begun:
        threading.Event().wait(0.01)
    fetcher.ask([4, 8], now=True)
    go_on.set()
    while cache.num_cached(cache.shard_names[:6]) < 6:
        threading.Event().wait(0.01)
    assert begun == [0, 4, 8, 1, 2, 3, 5]
    fetcher.close()
    assert not any(thread.is_alive() for thread in fetcher._threads)


def test_the_threads_of_a_loader_that_nobody_closes_end_with_it(root, tmp_path, folder):
    cached = open_cached(root, tmp_path / "cache", folder)
    loader = reference.train_loader(cached, cached.split("split1_train"), SPATIAL, seed=0, batch_size=4)
    next(loader)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]
    assert any(thread.name.startswith("loader-fetch") for thread in threads)
    del loader
    gc.collect()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_pool_through_a_cache_that_just_holds_it_fetches_each_shard_about_once(tmp_path):
    """With the smallest cache that check_cache passes, on one machine: each shard once for each of its stays."""
    num_shards, pool_shards, pool_steps = 80, 10, 2
    root = made_up_set(tmp_path / "set", [os.urandom(1000)] * num_shards)
    folder = Folder(tmp_path / "log")
    rows = np.arange(num_shards * 8)
    shard = np.random.default_rng(0).permutation(rows) // 8
    videos = Population(rows, np.array([0, 320, 640]), np.full(640, 60), np.full((640, 2), 64), 0)

    def of(max_bytes):
        cache = ShardCache.open("test:/", tmp_path / "cache", max_bytes, store_of(root, folder))
        sizes, labels = [1000] * num_shards, rows // 320
        return SimpleNamespace(cache=cache, shards=cache.shard_names, shard_bytes=sizes, shard=shard, labels=labels)

    held = pool_shards + ahead_module.AHEAD // pool_steps + 8
    index_ = of(cached_overhead(root) + held * 1000)
    check_cache([(index_, rows)], pool_shards, 1, pool_steps)
    with pytest.raises(ValueError):
        check_cache([(of(index_.cache.max_bytes - 1), rows)], pool_shards, 1, pool_steps)
    pool = pooled(videos, index_, pool_shards, pool_steps)
    num_steps = 2 * pool_steps * num_shards
    draws = (draw_batch(0, step, pool, SPATIAL, 32) for step in range(num_steps))
    fetcher = ahead_module.Fetcher(index_)
    for request in ahead(requests(draws, SPATIAL, 0, True), index_, lambda shards: fetcher.ask(shards, now=False)):
        for number in np.unique(shard[request.video]).tolist():
            os.close(index_.cache.open_file(index_.shards[number]))
    fetcher.close()
    fetches = sum(folder.asked(name) for name in index_.shards) / 1000
    entered = pool_shards + num_steps // pool_steps
    assert fetches <= 1.05 * entered


def test_a_small_cache_read_in_order_fetches_each_shard_once(tmp_path):
    """As tests read their videos: what is fetched takes the place of what was left, not of what is read next."""
    num_shards, held = 60, 6
    root = made_up_set(tmp_path / "set", [os.urandom(1000)] * num_shards)
    folder = Folder(tmp_path / "log")
    max_bytes = cached_overhead(root) + held * 1000
    cache = ShardCache.open("test:/", tmp_path / "cache", max_bytes, store_of(root, folder))
    of_video = np.arange(num_shards)
    sizes = [1000] * num_shards
    index_ = SimpleNamespace(cache=cache, shards=cache.shard_names, shard_bytes=sizes, shard=of_video)
    fetcher = ahead_module.Fetcher(index_)

    def ask(shards):
        missing = fetcher.ask(shards, now=False)
        while fetcher._asked:  # a store that answers at once
            time.sleep(0.001)
        return missing

    wanted = (SimpleNamespace(video=np.array([number])) for number in range(num_shards))
    for request in ahead(wanted, index_, ask):
        os.close(cache.open_file(index_.shards[int(request.video[0])]))
    fetcher.close()
    assert [folder.asked(name) for name in index_.shards] == sizes
