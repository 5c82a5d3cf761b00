"""Stores on real servers: what is put is what is read, and faults that pass are not noticed."""

import os
from pathlib import Path

import pytest
from servers import Fault, faulty_proxy, s3_server, web_server

from flow.store import Store, StoreError

CONTENT = os.urandom(3_000_000)
QUICK = (0.05, 0.1, 0.2)


@pytest.fixture
def bucket(tmp_path):
    (tmp_path / "buckets" / "b" / "set").mkdir(parents=True)
    return tmp_path / "buckets" / "b" / "set"


@pytest.fixture(params=["s3", "http"])
def proxied(request, tmp_path, bucket, monkeypatch):
    """A store with a file, behind a proxy."""
    (bucket / "file").write_bytes(CONTENT)
    if request.param == "s3":
        server = s3_server(tmp_path / "buckets", monkeypatch, tmp_path / "log")
    else:
        server = web_server(tmp_path / "buckets", tmp_path / "nginx")
    with server as port, faulty_proxy(port) as proxy:
        if request.param == "s3":
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        url = "s3://b/set" if request.param == "s3" else f"http://127.0.0.1:{proxy.port}/b/set"
        yield Store(url, pauses_s=QUICK), proxy


def test_what_is_read_is_what_lies_there(proxied):
    store, _ = proxied
    assert store.read("file", 0, len(CONTENT)) == CONTENT
    assert store.read("file", 1_000, 2_000) == CONTENT[1_000:2_000]
    assert store.read_small("file", len(CONTENT)) == CONTENT


def test_faults_that_pass_are_not_noticed(proxied):
    store, proxy = proxied
    for fault in (Fault(status=503), Fault(status=500), Fault(cut=0.5), Fault(cut=0.0), Fault(wait_s=0.3)):
        proxy.faults.append(fault)
        assert store.read("file", 10, 1_000_000) == CONTENT[10:1_000_000]
        assert not proxy.faults


def test_faults_that_last_are_errors_that_say_what_to_do(proxied):
    store, proxy = proxied
    proxy.faults.extend(Fault(status=503) for _ in range(100))
    with pytest.raises(StoreError, match=r"bytes 0 to 10 of .*set/file: 4 attempts failed.*Is the server up"):
        store.read("file", 0, 10)
    proxy.faults.clear()
    proxy.faults.append(Fault(status=403))
    with pytest.raises(StoreError, match="access is refused.*credentials"):
        store.read("file", 0, 10)
    assert store.read("file", 0, 10) == CONTENT[:10]


def test_wrong_requests(proxied):
    store, _ = proxied
    with pytest.raises(FileNotFoundError, match="no such file in the store.*set/none"):
        store.read("none", 0, 10)
    with pytest.raises(StoreError, match="it has fewer bytes than asked for: publish it again"):
        store.read("file", len(CONTENT) - 10, len(CONTENT) + 10)
    with pytest.raises(ValueError, match=r"has more than 1,000 bytes"):
        store.read_small("file", 1_000)


def test_what_is_put_appears_whole(tmp_path, bucket, monkeypatch):
    with s3_server(tmp_path / "buckets", monkeypatch, tmp_path / "log"):
        store = Store("s3://b/set", pauses_s=QUICK)
        assert store.names() == {}
        (tmp_path / "file").write_bytes(CONTENT)
        store.put(tmp_path / "file", "shard-000000.tar")
        store.put_bytes(b"{}", "splits/a.txt")
        assert store.names() == {"shard-000000.tar": len(CONTENT), "splits/a.txt": 2}
        assert store.read("shard-000000.tar", 0, len(CONTENT)) == CONTENT
        assert (bucket / "shard-000000.tar").read_bytes() == CONTENT


def test_a_web_server_is_only_read(tmp_path):
    store = Store("http://127.0.0.1:9/set")
    with pytest.raises(ValueError, match="cannot be written. Give an s3:// URL"):
        store.put(Path(__file__), "file")
    with pytest.raises(ValueError, match="cannot be listed"):
        store.names()
    with pytest.raises(ValueError, match="expected a folder, or a URL such as"):
        Store("ftp://host/set")
