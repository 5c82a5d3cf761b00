"""Several machines: two launchers in two network namespaces; one is killed and comes again, and nothing is lost."""

import os
import re

import namespaces
import numpy as np
import pytest
import torch
from namespaces import GUARD_S, Network, wait_until

from tests.conftest import pack_arrays, random_video
from tests.tiny import tiny_overrides
from train.checkpoint import load_checkpoint
from train.evaluate import scores_path
from train.log import read_log
from train.scores import read_scores

STEPS = 240
SHAPES = {"run/a": (9, 64, 85), "run/b": (8, 64, 85), "walk/a": (8, 64, 85), "walk/b": (9, 64, 85)}

REASON = namespaces.why_not()


@pytest.fixture(scope="module")
def network():
    if REASON:
        (pytest.fail if os.environ.get("REQUIRE_SCALE") == "1" else pytest.skip)(REASON)
    with Network() as machines:
        yield machines


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """key=value of a training of some seconds, on its packed set."""
    rng = np.random.default_rng(7)
    root = tmp_path_factory.mktemp("packed") / "set"
    pack_arrays(root, {name: random_video(rng, *shape) for name, shape in SHAPES.items()})
    return tiny_overrides(
        root,
        train__streams="[temporal]",
        temporal__steps=STEPS,
        temporal__lr=1e-4,  # fields without a meaning would make the loss explode
        train__checkpoint_every=10,
        train__timeout_s=60,
        eval__num_taus=1,
        eval__num_taus_train=0,
    )


class Run:
    """A run on both machines, in one folder."""

    def __init__(self, folder, network, options, settings):
        self.folder, self.network = folder, network
        self.words = ["--run", str(folder / "run"), "--rdzv", f"{network[0].address}:29500", *options, *settings]
        self.outputs = []

    def start(self, number, *more):
        """The same command on one machine."""
        self.outputs.append(self.folder / f"output{len(self.outputs)}.txt")
        return self.network[number].python(self.outputs[-1], "-m", "train.launch", *self.words, *more)

    def last_step(self):
        log = self.folder / "run" / "temporal" / "log.jsonl"
        steps = re.findall(r'^\{"step": (\d+)', log.read_text(), re.M) if log.exists() else []
        return int(steps[-1]) if steps else 0

    def reaches(self, step, *processes):
        wait_until(lambda: self.last_step() >= step, *processes)
        assert self.last_step() < STEPS

    def ends(self, *processes):
        """Wait; every process has to succeed."""
        codes = [process.wait(GUARD_S) for process in processes]
        assert codes == [0] * len(codes), self.said()

    def said(self):
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in self.outputs)


def result(run):
    """(losses by step, weights, scores) that a run has left."""
    log = read_log(run / "temporal" / "log.jsonl")
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    checkpoint = load_checkpoint(run / "temporal" / "checkpoint.pt")
    assert checkpoint.step == STEPS
    return [record["loss"] for record in log], checkpoint.net, read_scores(scores_path(run, "temporal", "test")).scores


def assert_equal(found, expected):
    """To the bit."""
    assert found[0] == expected[0]
    assert [name for name, value in expected[1].items() if not torch.equal(found[1][name], value)] == []
    np.testing.assert_array_equal(found[2], expected[2])


@pytest.fixture(scope="module")
def whole(network, settings, tmp_path_factory):
    """The result of one machine with two processes, of one core each, that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    words = ["-m", "train.launch", "--run", str(folder / "run"), "--procs", "2", *settings]
    machine = namespaces.Machine(**{**vars(network[0]), "core": ",".join(str(other.core) for other in network)})
    assert machine.python(folder / "output.txt", *words).wait(GUARD_S) == 0, (folder / "output.txt").read_text()
    return result(folder / "run")


def test_two_machines_with_fixed_ranks_are_one_with_two_processes(network, settings, whole, tmp_path):
    run = Run(tmp_path, network, ["--nodes", "2"], settings)
    run.ends(run.start(1, "--node-rank", "1"), run.start(0, "--node-rank", "0"))
    assert_equal(result(tmp_path / "run"), whole)


def test_a_machine_is_killed_and_comes_again_then_the_meeting_point_is_killed(network, settings, whole, tmp_path):
    run = Run(tmp_path, network, ["--nodes", "2", "--max-restarts", "1"], settings)
    first, second = run.start(0), run.start(1)
    run.reaches(35, first, second)
    network[1].kill()
    again = run.start(1)
    wait_until(lambda: "restart 1: going on from the last checkpoint" in run.said(), first, again)
    run.reaches(100, first, again)

    network[0].kill()  # where they meet
    assert again.wait(GUARD_S) == 1
    assert re.search(r"^error: .*the same command on each goes\s+on|^error: process \d of 2 FAILED", run.said(), re.M)
    run.ends(run.start(0), run.start(1))
    assert_equal(result(tmp_path / "run"), whole)


#: A launcher that has imported all, and begins when it may.
WAITING = """
import os, sys, time
from train import launch
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
launch.main(sys.argv[2:])
"""


def test_of_one_or_two_machines_one_is_lost_without_a_word_and_comes_again(network, settings, whole, tmp_path):
    run = Run(tmp_path, network, ["--nodes", "1:2", "--max-restarts", "1"], [*settings, "train.timeout_s=15"])
    first, second = run.start(0), run.start(1)
    run.reaches(35, first, second)
    network[1].unplug()
    network[1].kill()
    second.wait(GUARD_S)
    network[1].plug_in()
    left = run.last_step()
    run.outputs.append(tmp_path / "waiting.txt")
    again = network[1].python(run.outputs[-1], "-c", WAITING, str(tmp_path / "now"), *run.words)
    wait_until(lambda: run.last_step() > left, first, again)  # alone
    assert run.said().count("2 processes on 2 machines") == 1
    (tmp_path / "now").touch()
    run.ends(first, again)
    assert run.said().count("2 processes on 2 machines") == 2
    found = result(tmp_path / "run")
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-3)
    for name, value in whole[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    np.testing.assert_allclose(found[2], whole[2], atol=1e-3)
