"""docs/cluster/train.sbatch on a real Slurm of two nodes, which are network namespaces; and what it asks of srun."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import namespaces
import numpy as np
import pytest
from namespaces import ROOT, Network, wait_until

from tests.conftest import pack_arrays, random_video
from tests.tiny import tiny_overrides
from train.log import read_log

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
SHAPES = {"run/a": (9, 64, 85), "run/b": (8, 64, 85), "walk/a": (8, 64, 85), "walk/b": (9, 64, 85)}
SCRIPT = ROOT / "docs" / "cluster" / "train.sbatch"

CONFIG = """
ClusterName=small
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={first.name} NodeAddr={first.address} CPUs=64 Gres=gpu:8
NodeName={second.name} NodeAddr={second.address} CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES State=UP
"""

missing = [program for program in PROGRAMS if not shutil.which(program)]
REASON = f"needs Slurm (munge, slurmctld, slurmd, slurm-client): no {', '.join(missing)}" if missing else None
REASON = REASON or namespaces.why_not()


@contextmanager
def names_of(machines):
    """Every machine knows the others by name, as those of a cluster do."""
    lines = "".join(f"{machine.address} {machine.name}\n" for machine in machines)
    folders = [Path("/etc/netns") / machine.name for machine in machines]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(tmp_path):
    """(first machine, environment) of a cluster of two nodes of 64 cores and 8 GPUs each, none of which is there."""
    if REASON:
        (pytest.fail if os.environ.get("REQUIRE_SCALE") == "1" else pytest.skip)(REASON)
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    for number in range(8):
        (folder / f"gpu{number}").touch()  # Slurm asks for a device, and does not open it
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # there are none in such a namespace
    with Network() as machines, names_of(machines):
        first, second = machines
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, first=first, second=second))
        environment = {"SLURM_CONF": str(folder / "slurm.conf")}

        def start(machine, program, *words):
            named = 'hostname "$0" && exec "$@"'
            unshare = ["unshare", "--uts", "sh", "-c", named, machine.name, program, *words]
            return machine.start(folder / f"{program}-{machine.name}.txt", *unshare, **environment)

        files = ("key-file", "socket", "log-file", "pid-file", "seed-file")
        munge = [f"--{file}={folder}/munge.{file.partition('-')[0]}" for file in files]
        started = [start(first, "munged", "--foreground", "--force", *munge)]
        wait_until((folder / "munge.socket").exists, *started)
        started.append(start(first, "slurmctld", "-D"))
        started += [start(machine, "slurmd", "-D", "-N", machine.name) for machine in machines]

        def ask(*words):
            words = ["ip", "netns", "exec", first.name, *words]
            return subprocess.run(words, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)

        try:
            wait_until(lambda: ask("sinfo", "--noheader", "-o", "%D %t").stdout == "2 idle\n", *started)
            yield ask
        finally:
            for process in reversed(started):
                process.kill()
                process.wait()


def test_the_script_trains_on_two_nodes(slurm, tmp_path):
    rng = np.random.default_rng(7)
    pack_arrays(tmp_path / "set", {name: random_video(rng, *shape) for name, shape in SHAPES.items()})
    settings = tiny_overrides(tmp_path / "set", train__streams="[temporal]", temporal__lr=1e-4, eval__num_taus=0)
    words = [*settings, "eval.num_taus_train=0", "--run", str(tmp_path / "run"), "--gpus", "0", "--procs", "1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    export = f"--export=ALL,PYTHONPATH={ROOT},PATH={path}"
    submitted = slurm("sbatch", "--wait", export, str(SCRIPT), *words)
    output = "\n".join(file.read_text() for file in tmp_path.glob("two-stream-*.txt"))
    assert submitted.returncode == 0, submitted.stderr + output
    assert "2 processes on 2 machines" in output
    assert [record["step"] for record in read_log(tmp_path / "run" / "temporal" / "log.jsonl")] == list(range(1, 11))
