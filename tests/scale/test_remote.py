"""Sets read from real servers, over a proxy that injects faults: what arrives is what lies in the folder."""

import json
import os
import signal
import subprocess
import sys
import threading
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from servers import Fault, faulty_proxy, s3_server, web_server

from flow import demo, pack
from flow.shard import ShardError
from flow.store import StoreError
from loaders import cache, cache_files, dali_loader, reference
from loaders.ahead import AHEAD
from loaders.batch import StreamSpec
from loaders.index import open_index
from loaders.source import SampleError, Source
from tests.remote import assert_same
from tests.tiny import tiny_overrides
from train.sets import check_cache

ROOT = Path(__file__).parent.parent.parent
SPECS = [
    StreamSpec(stream="spatial", crop_px=40),
    StreamSpec(stream="temporal", L=4, crop_px=40),
    StreamSpec(stream="temporal", L=4, crop_px=40, stacks_per_window=4),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Folder of buckets; b/set is a demo set of many small shards, ready to be published; b/many has more of them."""
    base = tmp_path_factory.mktemp("served")
    demo.generate(base / "videos", num_train=3, num_test=2, num_frames=14)
    root = base / "buckets" / "b" / "set"
    root.parent.mkdir(parents=True)
    assert pack.main([
        "--videos", str(base / "videos"), "--splits", str(base / "videos" / "splits"), "--dataset", "ucf101",
        "--size", "48", "--out", str(root), "--videos-per-shard", "5",
    ]) == 0  # fmt: skip
    assert len(list(root.glob("*.tar"))) > 4
    demo.generate(base / "more", num_train=6, num_test=1, num_frames=14)
    assert pack.main([
        "--videos", str(base / "more"), "--splits", str(base / "more" / "splits"), "--dataset", "ucf101",
        "--size", "48", "--out", str(root.parent / "many"), "--videos-per-shard", "1",
    ]) == 0  # fmt: skip
    return base / "buckets"


def num_gets(proxy):
    """How often each shard was asked for."""
    paths = [path for method, path in proxy.seen if method == "GET"]
    return Counter(Path(path.partition("?")[0]).name for path in paths if ".tar" in path)


@pytest.fixture(params=["s3", "http"])
def proxied(request, tmp_path, served, monkeypatch):
    """The set's URL, and the proxy before its server."""
    monkeypatch.setattr(cache, "_PAUSES_S", (0.05, 0.1, 0.2))
    if request.param == "s3":
        server = s3_server(served, monkeypatch, tmp_path / "log")
    else:
        server = web_server(served, tmp_path / "nginx")
    with server as port, faulty_proxy(port) as proxy:
        if request.param == "s3":
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield ("s3://b/set" if request.param == "s3" else f"http://127.0.0.1:{proxy.port}/b/set"), proxy


def half_of(root):
    """GB that hold the set's own files and about half of its shards."""
    return sum(path.stat().st_size for path in root.rglob("*")) / 2e9 + (root / "index.bin").stat().st_size / 1e9


def bytes_in(folder):
    return sum(file.num_bytes for file in cache_files.scan(folder))


@pytest.mark.parametrize("module", [dali_loader, reference], ids=["dali", "reference"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("part", ["whole", "half"])
def test_batches_are_bitwise_those_of_the_folder(proxied, served, tmp_path, module, world_size, part):
    """For training and for views, also where the cache holds but half of the shards, and faults come and go."""
    url, proxy = proxied
    root = served / "b" / "set"
    local = open_index(root)
    cache_gb = 1.0 if part == "whole" else half_of(root)
    remote = [open_index(url, cache=tmp_path / "cache", cache_gb=cache_gb) for _ in range(world_size)]
    faults = [
        fault
        for number in range(len(local.shards))
        for fault in [
            Fault(status=503, only=f"shard-{number:06}"),
            Fault(cut=0.5, only=f"shard-{(number + 1) % len(local.shards):06}"),
            Fault(wait_s=0.2, only=f"shard-{number:06}"),
        ][number % 3 :]
    ]
    proxy.faults.extend(faults)
    rows = local.split("split1_train")
    for spec in SPECS if module is dali_loader else SPECS[:2]:
        for make, means, num in (
            (module.train_loader, {"seed": 3, "batch_size": 16}, 8),
            (module.view_loader, {"num_taus": 3, "batch_size": 4}, 10),
        ):
            for rank in range(world_size):
                means |= {"rank": rank, "world_size": world_size}
                with make(local, rows, spec, **means) as expected, make(remote[rank], rows, spec, **means) as found:
                    for _ in range(num):
                        assert_same(next(found), next(expected))
                        assert bytes_in(tmp_path / "cache") <= cache_gb * 1e9
    if part == "whole":
        left = list(map(id, proxy.faults))
        failed = Counter(f"{fault.only}.tar" for fault in faults if id(fault) not in left and not fault.wait_s)
        asked = num_gets(proxy)
        assert asked == {name: 1 + failed[name] for name in asked}  # each has one piece
        assert set(asked) >= {local.shards[shard] for shard in local.shard[rows]}


@pytest.mark.parametrize("num_stacks", [1, 2])
def test_a_pool_is_drawn_from_through_a_cache_that_does_not_hold_the_set(proxied, served, tmp_path, num_stacks):
    """The smallest cache that is let pass: each shard is fetched about once for each of its stays in the pool."""
    url, proxy = proxied[0].replace("/set", "/many"), proxied[1]
    local = open_index(served / "b" / "many")
    pool_shards, pool_steps, rows = len(local.classes), 8, local.split("split1_train")

    def remote(max_bytes):
        return open_index(url, cache=tmp_path / "cache", cache_gb=max_bytes / 1e9)

    def fits(max_bytes):
        try:
            check_cache([(remote(max_bytes), rows)], pool_shards, 1, pool_steps)
        except ValueError:
            return False
        return True

    most = sum(path.stat().st_size for path in local.root.rglob("*"))
    least = bisect_left(range(most), True, lo=most // 10, key=fits)
    assert least < 0.7 * most
    spec = StreamSpec(stream="temporal", L=4, crop_px=40, stacks_per_window=num_stacks)
    means = {"seed": 5, "batch_size": 8, "pool_shards": pool_shards, "pool_steps": pool_steps}
    num_steps = pool_steps * len(rows)  # a pass
    with dali_loader.train_loader(local, rows, spec, **means) as expected:
        with dali_loader.train_loader(remote(least), rows, spec, **means) as found:
            for _ in range(num_steps):
                assert_same(next(found), next(expected))
                assert bytes_in(tmp_path / "cache") <= least
    asked = num_gets(proxy)
    assert len(asked) > 0.9 * len(rows)
    entered = pool_shards + (num_steps + AHEAD) // pool_steps  # also those that were fetched for steps to come
    assert sum(asked.values()) <= 1.1 * entered


def test_a_flipped_byte_is_fetched_again_and_a_lasting_one_is_an_error(proxied, served, tmp_path):
    url, proxy = proxied
    local, remote = open_index(served / "b" / "set"), open_index(url, cache=tmp_path / "cache")
    proxy.faults.append(Fault(flip=True, only="shard-000001"))
    file = remote.open_shard(1)
    assert os.pread(file, 1 << 30, 0) == (local.root / local.shards[1]).read_bytes()
    os.close(file)
    assert not proxy.faults
    proxy.faults.extend(Fault(flip=True, only="shard-000002") for _ in range(10))
    sha256 = local.metadata["shards"][2]["sha256"]
    with pytest.raises(ShardError, match=rf"{url}/shard-000002.tar: its SHA-256 is \w+, dataset.json says {sha256}"):
        remote.open_shard(2)


def test_a_shard_that_is_not_there_and_a_server_that_stays_away(proxied, tmp_path):
    url, proxy = proxied
    remote = open_index(url, cache=tmp_path / "cache")
    row = int(np.flatnonzero(remote.shard == 3)[0])
    source = Source(remote, SPECS[0])
    proxy.faults.extend(Fault(status=404, only="shard-000003", method=way) for way in ("GET", "HEAD") for _ in range(9))
    with pytest.raises(SampleError, match="shard-000003.tar: .* cannot be read .no such file in the store."):
        source.read(np.array([row]), np.array([0]), 1)
    proxy.faults.clear()
    proxy.faults.extend(Fault(status=503, only="shard-000003") for _ in range(99))
    with pytest.raises(StoreError, match=f"{url}/shard-000003.tar: 4 attempts failed.*Is the server up"):
        source.read(np.array([row]), np.array([0]), 1)
    proxy.faults.clear()
    source.read(np.array([row]), np.array([0]), 1)  # it is back
    source.close()


def test_a_server_that_goes_away_in_the_middle_and_comes_back(served, tmp_path, monkeypatch):
    root = served / "b" / "set"
    local = open_index(root)
    with web_server(served, tmp_path / "a") as first, faulty_proxy(first) as proxy:
        remote = open_index(f"http://127.0.0.1:{proxy.port}/b/set", cache=tmp_path / "cache", cache_gb=half_of(root))
        rows, means = local.split("split1_train"), {"seed": 3, "batch_size": 8}
        with (
            dali_loader.train_loader(local, rows, SPECS[1], **means) as expected,
            dali_loader.train_loader(remote, rows, SPECS[1], **means) as found,
        ):
            assert_same(next(found), next(expected))
            proxy.faults.extend(Fault(status=503) for _ in range(10_000))
            back = threading.Timer(2.0, proxy.faults.clear)
            back.start()
            for _ in range(20):
                assert_same(next(found), next(expected))
            back.join()


def test_a_run_from_a_store_equals_that_from_the_folder(served, tmp_path, monkeypatch):
    """Killed once on the way; weights and scores are equal, and run.json says where it came from."""
    root = served / "b" / "set"

    def train(url, run, kill=False):
        overrides = tiny_overrides(
            url, data__cache=str(tmp_path / "cache"), train__streams="[temporal]", eval__num_taus=2
        )
        command = [sys.executable, "-m", "train.launch", "--gpus", "0", "--run", str(run), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **pipes)
        if kill:
            for line in process.stdout:
                if "training steps" in line:
                    break
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if kill else 0), output
        assert (run / "temporal" / "scores_test.npz").exists() != kill
        return output

    train(root, tmp_path / "local")
    with s3_server(served, monkeypatch, tmp_path / "log"):
        train("s3://b/set", tmp_path / "remote", kill=True)
        output = train("s3://b/set", tmp_path / "remote")
    assert "s3://b/set has" in output and "are in the cache" in output
    local, remote = (
        torch.load(tmp_path / run / "temporal" / "checkpoint.pt", weights_only=True) for run in ("local", "remote")
    )
    assert local["net"].keys() == remote["net"].keys()
    assert all(torch.equal(local["net"][key], remote["net"][key]) for key in local["net"])
    scores = [np.load(tmp_path / run / "temporal" / "scores_test.npz")["scores"] for run in ("local", "remote")]
    np.testing.assert_array_equal(*scores)
    assert json.loads((tmp_path / "remote" / "run.json").read_text())["dataset"]["root"] == "s3://b/set"


def test_webdataset_itself_reads_the_same_members_from_the_server(served, tmp_path):
    """The shards are streamable by any reader of the format."""
    root = served / "b" / "set"
    shards = sorted(path.name for path in root.glob("*.tar"))
    with web_server(served, tmp_path / "nginx") as port:
        urls = [f"http://127.0.0.1:{port}/b/set/{name}" for name in shards]
        found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    expected = list(webdataset.WebDataset([str(root / name) for name in shards], shardshuffle=False, empty_check=False))
    samples, same = (
        [
            {key: value for key, value in sample.items() if key == "__key__" or not key.startswith("__")}
            for sample in own
        ]
        for own in (found, expected)
    )
    assert len(samples) >= open_index(root).num_videos
    assert samples == same
