"""What docs/cluster holds: the command that each file runs is one of ours, and its parts fit together.

tests/scale submits the script to a real Slurm, and holds the manifest against Kubernetes' schema.
"""

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.tiny import tiny_overrides
from train import launch, machines
from train.machines import Machines

CLUSTER = Path(__file__).parent.parent / "docs" / "cluster"
SCRIPT = CLUSTER / "train.sbatch"


def asked(words, packed, monkeypatch):
    """The machines for which a command would train, on a machine with 8 GPUs that knows the other ones."""
    seen = []
    monkeypatch.setattr(machines, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 8)))
    monkeypatch.setattr(machines, "own_address", lambda rdzv: (None, True))
    monkeypatch.setattr(launch, "launch", lambda machines, *_, **__: seen.append(machines))
    python, option, module, *arguments = words
    assert (python, option, module) == ("python", "-m", "train.launch")
    launch.main([*arguments, *tiny_overrides(packed, train__batch_size=96)])
    return seen[0]


@pytest.fixture
def srun(tmp_path):
    """Run the script with a scontrol and an srun that only note what they are asked. Returns the words after srun."""
    bin = tmp_path / "bin"
    bin.mkdir()
    programs = {
        "scontrol": '[ "$*" = "show hostnames node[3-5]" ] && printf "node3\\nnode4\\nnode5\\n"',
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/words; echo "$SRUN_CPUS_PER_TASK" > {tmp_path}/cpus',
    }
    for name, text in programs.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)

    def run(*words, **changes):
        environment = {"PATH": f"{bin}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[3-5]", "SLURM_JOB_NUM_NODES": "3"}
        environment |= {"SLURM_JOB_ID": "123456", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", **changes}
        subprocess.run(["bash", SCRIPT, *words], env=environment, check=True)
        return (tmp_path / "words").read_text().splitlines()

    return run


def test_the_slurm_script_starts_a_run_on_its_nodes(srun, packed, tmp_path, monkeypatch):
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    words = srun("--run", str(tmp_path / "a run"))
    expected = {"num_gpus": 8, "num_procs": 8, "min_nodes": 3, "max_nodes": 3, "max_restarts": 3}
    found = asked(words, packed, monkeypatch)
    assert found == Machines(**expected, rdzv="node3:23456", rdzv_id=found.rdzv_id)
    assert re.fullmatch("123456-[0-9a-f]{8}", found.rdzv_id)
    assert asked(words, packed, monkeypatch) == found  # on the next machine
    for number, others in enumerate(([], ["train.seed=1"])):  # another run at the same port is another job
        elsewhere = [*words, "--run", str(tmp_path / f"run{number}"), *others]
        assert asked(elsewhere, packed, monkeypatch).rdzv_id != found.rdzv_id
    assert (tmp_path / "a run" / "config.yaml").is_file() and (tmp_path / "cpus").read_text() == "64\n"


def test_options_of_the_slurm_script_are_sbatchs_and_come_before_any_command():
    """sbatch reads none after the first command."""
    lines = SCRIPT.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and line[0] != "#")
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) > 5 and max(options) < first
    for number in options:
        assert re.fullmatch(r"# [A-Z].+", lines[number - 1]), f"{lines[number]} is not explained"


def test_the_kubernetes_manifest_starts_a_run_whose_parts_fit_together(packed, tmp_path, monkeypatch):
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    (container,) = pod["spec"]["containers"]
    assert container["command"][:2] == ["sh", "-c"]
    waiting, command = container["command"][2].strip().splitlines()

    words = shlex.split(command)
    assert words.pop(0) == "exec"
    place = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["data"]
    run = words.index("--run") + 1
    assert words[run].startswith(f"{place}/") and words[-1].startswith(f"data.root={place}/")
    words[run] = str(tmp_path / "run")
    found = asked(words, packed, monkeypatch)

    host = f"{job['metadata']['name']}-0.{pod['spec']['subdomain']}"  # of an indexed job's first pod
    (port,) = service["spec"]["ports"]
    assert found.rdzv == f"{host}:{port['port']}" and f"getent hosts {host};" in waiting
    assert found.min_nodes == found.max_nodes == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert found.num_gpus == container["resources"]["limits"]["nvidia.com/gpu"] and found.max_restarts
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}


def test_every_field_of_the_kubernetes_manifest_that_is_a_choice_is_explained():
    lines = (CLUSTER / "kubernetes.yaml").read_text().splitlines()
    fields = (
        "clusterIP selector publishNotReadyAddresses completionMode completions backoffLimit subdomain restartPolicy"
    )
    for field in [*fields.split(), "activeDeadlineSeconds", "image", "command", "nvidia.com/gpu", "cpu", "memory"]:
        (at,) = [number for number, line in enumerate(lines) if line.strip().startswith(f"{field}:")]
        assert lines[at - 1].strip().startswith("# "), f"{field} is not explained"
