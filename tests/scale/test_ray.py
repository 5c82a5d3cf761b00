"""flow.pack on a real Ray cluster, of nodes that join, die, lack a file system, or have another version."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers import free_port, need

from flow import demo, pack, ray_node
from flow.catalog import list_videos
from flow.ray_engine import RayEngine
from tests import deadly
from tests.deadly import GpuTask
from tests.faults import processes
from tests.test_pack import contents

ROOT = Path(__file__).resolve().parent.parent.parent
OPTIONS = ["--size", "64", "--videos-per-shard", "3"]


@dataclass
class Node:
    """A process of `ray start`, and all that it started."""

    process: subprocess.Popen

    def works(self):
        """Whether a task runs there."""
        return any(
            f"ray::{ray_node.work.__name__}".encode() in _command(pid) for pid in processes.tree(self.process.pid)
        )

    def end(self, *, kill=False):
        """As `ray stop` does, or at once."""
        family = processes.tree(self.process.pid)
        if not kill:
            self.process.terminate()
            processes.wait_until(lambda: self.process.poll() is not None, 10)
        processes.kill(family)
        self.process.wait()


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Cluster:
    """A head without a core, so that all work is done on nodes that are added."""

    def __init__(self, folder):
        self._folder, self._port = folder, free_port()
        self.address = f"127.0.0.1:{self._port}"
        options = [f"--port={self._port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
        self.head = self._start(["--head", *options, "--num-cpus=0"], os.environ)

    def _start(self, options, environment, shadow=()):
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block", *options]
        ray += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
        if shadow:
            need(os.geteuid() == 0 and shutil.which("unshare"), "unshare, with the right to mount,")
            # A mount namespace of its own, in which these folders are others, and empty
            mounts = " && ".join(f"mount -t tmpfs none '{folder}'" for folder in shadow)
            ray = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *ray]
        log = self._folder / f"log{secrets.token_hex(4)}"
        with open(log, "wb") as output:
            node = Node(subprocess.Popen(ray, stdout=output, stderr=output, env=environment, cwd="/"))
        if (
            not processes.wait_until(
                lambda: b"Ray runtime started" in log.read_bytes() or node.process.poll() is not None, 60
            )
            or node.process.poll() is not None
        ):
            node.end(kill=True)
            raise AssertionError(log.read_text())
        return node

    @contextmanager
    def node(self, *options, shadow=(), code=ROOT):
        environment = {**os.environ, "PYTHONPATH": str(code)}
        node = self._start([f"--address={self.address}", "--num-cpus=1", *options], environment, shadow)
        try:
            yield node
        finally:
            node.end()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    need(importlib.util.find_spec("ray"), "ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("RAY_USAGE_STATS_ENABLED", "0"),
            ("RAY_AUTH_MODE", "token"),
            ("RAY_AUTH_TOKEN", secrets.token_hex(32)),
            ("PYTHONPATH", str(ROOT)),
        ):
            patch.setenv(name, value)
        cluster = Cluster(tmp_path_factory.mktemp("ray"))
        try:
            yield cluster
        finally:
            cluster.head.end(kill=True)


@pytest.fixture(scope="module")
def worker(cluster):
    """A node with a core, from the first test that asks for it on."""
    with cluster.node() as node:
        yield node


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A dozen clips, real ones if there are some."""
    root = tmp_path_factory.mktemp("clips") / "videos"
    if data := os.environ.get("TWOSTREAM_DATA"):
        for video in list_videos(Path(data) / "ucf101_mini" / "videos")[::20][:12]:
            (root / video.class_name).mkdir(parents=True, exist_ok=True)
            shutil.copy(video.path, root / video.class_name)
    else:
        demo.generate(root, num_train=1, num_test=1)
        shutil.rmtree(root / "splits")
    return root


@pytest.fixture(scope="module")
def local(videos, tmp_path_factory):
    """What the local engine makes of them."""
    out = tmp_path_factory.mktemp("local") / "set"
    assert pack.main(arguments(videos, out)) == 0
    return out


def arguments(videos, out, *options):
    return [*map(str, ("--videos", videos, "--out", out)), *OPTIONS, *options]


def run(cluster, videos, out, *options):
    """The pack in a process of its own."""
    given = ["--engine", "ray", "--ray-address", cluster.address, *options]
    return processes.start("flow.pack", arguments(videos, out, *given))


def finish(process):
    return process.wait(120), process.stdout.read()


def shards(out):
    return [path.name for path in out.glob(".pack/shard-*.json")]


def assert_equal(out, local):
    """The same files, and the same hashes in dataset.json, which else holds seconds."""
    assert contents(out) == contents(local)
    first, second = (json.loads((place / "dataset.json").read_text()) for place in (out, local))
    for dataset in (first, second):
        for key in ("flow_s_per_pair", "s_per_pair"):
            dataset["summary"].pop(key)
    # A sum of floats, in the order in which videos are done.
    errors = [dataset["summary"].pop("quantisation_error_mean_px") for dataset in (first, second)]
    assert first == second and errors[0] == pytest.approx(errors[1])


def test_a_node_that_does_not_see_the_pack_sends_its_fragments(cluster, videos, local, tmp_path):
    (tmp_path / "seen").mkdir()
    with cluster.node(shadow=[tmp_path / "seen"]):
        code, output = finish(run(cluster, videos, tmp_path / "seen" / "set"))
    assert code == 0, output
    assert_equal(tmp_path / "seen" / "set", local)


def test_a_node_that_does_not_see_the_videos_is_named(cluster, videos, tmp_path):
    with cluster.node(shadow=[videos]):
        code, output = finish(run(cluster, videos, tmp_path / "set"))
    assert code == 2 and "does not see" in output and str(videos) in output and os.uname().nodename in output


def test_a_node_with_other_code_is_named(cluster, videos, tmp_path):
    shutil.copytree(ROOT / "flow", tmp_path / "code" / "flow", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "code" / "flow" / "codec.py", "a") as file:
        file.write("\n# Another version.\n")
    with cluster.node(code=tmp_path / "code"):
        given = ["--engine", "ray", "--ray-address", cluster.address]
        process = subprocess.run(
            [sys.executable, "-m", "flow.pack", *arguments(videos, tmp_path / "set", *given)],
            cwd=tmp_path,  # Ray adds it to the nodes' path
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert process.returncode == 2, process.stdout + process.stderr
    assert "would pack other bytes: two-stream" in process.stderr and os.uname().nodename in process.stderr


def test_a_task_sees_one_gpu_of_the_cluster_and_the_proof_runs_there(cluster, tmp_path, monkeypatch):
    """Ray is told of two GPUs that are not there."""
    monkeypatch.chdir(ROOT)
    with cluster.node("--num-cpus=2", "--num-gpus=2"):
        with pytest.raises(ValueError, match="gpus=3: the cluster has 2. Ask for as many or fewer"):
            RayEngine("brox", None, 3, cluster.address)
        with RayEngine("brox", None, None, cluster.address) as engine:
            assert engine.num_gpus == 2
            with pytest.raises(ValueError, match="brox is to run on 'cuda:0', but torch sees 0 GPUs"):
                engine.prove({})
        with RayEngine("brox", None, 2, cluster.address) as engine:
            tasks = [GpuTask(tmp_path / str(number)) for number in range(4)]
            seen = {gpu for _, gpu in engine.run(deadly.tell_gpu, tasks)}
    assert seen and seen <= {"0", "1"}


def test_a_video_that_ends_its_process_is_bad_and_takes_no_other_along(cluster, worker, videos, tmp_path, monkeypatch):
    root = classes(videos, tmp_path / "videos")
    monkeypatch.setattr(pack, "write_fragment", deadly.write_or_crash)
    monkeypatch.chdir(ROOT)
    assert pack.main(arguments(root, tmp_path / "ray", "--engine", "ray", "--ray-address", cluster.address)) == 1
    assert list(root.glob("Sit/*.crashed")), "the one that crashes once did not"
    assert pack.main(arguments(root, tmp_path / "local")) == 1  # where it has done so already
    assert_equal(tmp_path / "ray", tmp_path / "local")
    (bad,) = (tmp_path / "ray" / "bad_videos.txt").read_text().splitlines()
    assert bad.startswith("Run/") and "ends the process that packs it" in bad


def test_a_video_on_which_the_gpu_fails_is_tried_again_and_then_bad(cluster, worker, videos, tmp_path, monkeypatch):
    root = classes(videos, tmp_path / "videos")
    monkeypatch.setattr(pack, "write_fragment", deadly.write_or_fail)
    monkeypatch.chdir(ROOT)
    assert pack.main(arguments(root, tmp_path / "set", "--engine", "ray", "--ray-address", cluster.address)) == 1
    (bad,) = (tmp_path / "set" / "bad_videos.txt").read_text().splitlines()
    failure = "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert bad.startswith("Run/") and bad.endswith(f"fails, also when tried again alone: {failure}")


def classes(videos, root):
    """Four of the videos, in the classes that `tests.deadly` knows."""
    for name, video in zip(("Run", "Sit", "Walk", "Walk"), list_videos(videos)[::3], strict=True):
        (root / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(video.path, root / name / f"{video.class_name} {video.path.name}")
    return root


def test_stopped_and_gone_on_with_by_the_other_engine(cluster, worker, videos, local, tmp_path):
    for stop, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        out = tmp_path / str(int(stop))
        process = run(cluster, videos, out)
        assert processes.wait_until(lambda out=out, process=process: shards(out) or process.poll() is not None)
        before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
        os.kill(process.pid, stop)
        found, output = finish(process)
        assert found == code, output
        if stop != signal.SIGKILL:
            stopped = "Stopped. The same command goes on with the shards that are left."
            assert [line for line in output.splitlines() if line][-1] == stopped and "received" not in output, output
        assert processes.wait_until(lambda: not worker.works()), "a task outlives its pack"
        assert before and not (out / "dataset.json").exists()
        assert pack.main(arguments(videos, out)) == 0
        assert_equal(out, local)
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    out = tmp_path / "local first"
    process = processes.start("flow.pack", arguments(videos, out, "--workers", "1"))
    assert processes.wait_until(lambda: shards(out) or process.poll() is not None)
    process.kill()
    finish(process)
    code, output = finish(run(cluster, videos, out))
    assert code == 0, output
    assert_equal(out, local)


def test_a_node_that_is_killed_costs_nothing(cluster, worker, videos, local, tmp_path):
    with cluster.node() as dies:
        process = run(cluster, videos, tmp_path / "set")
        assert processes.wait_until(lambda: shards(tmp_path / "set") or process.poll() is not None)
        assert processes.wait_until(lambda: dies.works() or process.poll() is not None)
        assert process.poll() is None and dies.works(), "there is nothing to kill any more"
        dies.end(kill=True)
        code, output = finish(process)
        assert code == 0, output
    assert worker.process.poll() is None
    assert_equal(tmp_path / "set", local)


def test_without_an_address_a_cluster_is_started_and_ended(cluster, videos, local, tmp_path):
    process = processes.start("flow.pack", arguments(videos, tmp_path / "set", "--engine", "ray", "--workers", "2"))
    assert processes.wait_until(lambda: shards(tmp_path / "set") or process.poll() is not None)
    family = processes.tree(process.pid)
    code, output = finish(process)
    assert code == 0, output
    assert len(output.splitlines()) == 3, f"Ray is heard: {output}"
    assert processes.wait_until(lambda: not any(map(processes.is_running, family)))
    assert_equal(tmp_path / "set", local)
