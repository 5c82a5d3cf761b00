"""One process and two gloo processes: the same batches, masks, losses and scores."""

import argparse
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from loaders.index import open_index
from tests.tiny import tiny_config, tiny_overrides
from train import dist, machines, meeting, watchdog
from train import launch as train_launch
from train.dist import ProcessFailedError, World, launch
from train.engine import loader_module, loader_options
from train.evaluate import scores_path
from train.interrupt import ending_at_once
from train.log import read_log
from train.machines import Machines, own_address, split_address
from train.model import build_net, compute_logits, stream_spec
from train.scores import read_scores
from train.watchdog import Watchdog

NUM_STEPS = 3


def record_inputs(world, config, folder):
    """Store what this rank's net is given: videos, taus, inputs and dropout masks, (steps, batch slice, ...)."""
    index = open_index(config.data.root)
    net = build_net(config, "temporal", len(index.classes), world.device)
    seen = {"videos": [], "tau": [], "inputs": [], "mask6": [], "mask7": []}
    loader = loader_module(config).train_loader(
        index,
        index.split("split1_train"),
        stream_spec(config, "temporal"),
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        **loader_options(config, world),
    )
    with loader:
        for step in range(NUM_STEPS):
            batch = next(loader)
            masks = net.draw_masks(
                config.train.seed,
                step,
                batch_size=config.train.batch_size,
                rank=world.rank,
                world_size=world.world_size,
            )
            for name, value in zip(seen, (batch.draw.video, batch.draw.tau, batch.inputs, *masks), strict=True):
                seen[name].append(np.asarray(value))
    total = world.sum(torch.tensor([world.rank + 1]))
    np.savez(folder / f"{world.rank}.npz", total=total.numpy(), **{name: np.stack(v) for name, v in seen.items()})


@pytest.mark.dist
def test_two_processes_share_the_batches_and_masks_of_one(packed, tmp_path):
    found = []
    for num_procs in (1, 2):
        folder = tmp_path / str(num_procs)
        folder.mkdir()
        launch(Machines(num_procs=num_procs), record_inputs, tiny_config(packed), folder)
        found.append([dict(np.load(folder / f"{rank}.npz")) for rank in range(num_procs)])
    (whole,), slices = found
    assert (whole.pop("total"), [part.pop("total") for part in slices]) == ([1], [[3], [3]])
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in slices], axis=1), value, err_msg=name)
    assert len(np.unique(whole["videos"])) > 1


@pytest.mark.dist
def test_a_run_of_two_processes_has_the_losses_and_scores_of_one(packed, tmp_path, capfd):
    """Clipped, too, by the norm of the global gradient."""
    for num_procs in (1, 2):
        run = ["--run", str(tmp_path / str(num_procs)), "--gpus", "0", "--procs", str(num_procs)]
        train_launch.main([*run, *tiny_overrides(packed, eval__num_taus=3, train__clip_grad_norm=0.3)])
    assert capfd.readouterr().out.count("Two-stream, SVM") == 2  # one process speaks
    for stream in ("spatial", "temporal"):
        logs = [read_log(tmp_path / str(num_procs) / stream / "log.jsonl") for num_procs in (1, 2)]
        one, two = ([(record["step"], record["loss"], record["lr"]) for record in log] for log in logs)
        np.testing.assert_allclose(one, two, rtol=1e-4)
        right = [sum(8 * record["accuracy_pct"] / 100 for record in log) for log in logs]  # of 10 batches of 8
        assert right[0] > 10 and abs(right[0] - right[1]) <= 1  # where two outputs are as good as equal
        for part in ("train", "test"):
            one, two = (read_scores(scores_path(tmp_path / str(n), stream, part)) for n in (1, 2))
            np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)
            assert one.num_views.tolist() == two.num_views.tolist()


SENDING = {
    "default": {},
    "small buckets": {"bucket_mb": 0.01},
    "one bucket": {"bucket_mb": 1000.0},
    "bfloat16": {"gradient_compression": "bfloat16"},
}


def record_gradients(world, config, folder):
    """Store the gradients that each way of sending leaves after the second pass: the first one orders the buckets."""
    rng = torch.Generator().manual_seed(world.rank)
    inputs = torch.randn(4, 6, 48, 48, generator=rng)
    gradients = {}
    for name, options in SENDING.items():
        net = build_net(config, "temporal", 3, world.device)
        model = world.wrap(net.train(), **options)
        masks = net.draw_masks(0, 0, batch_size=8, rank=world.rank, world_size=2)
        for _ in range(2):
            model.zero_grad()
            compute_logits(model, inputs, masks, config).square().sum().backward()
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).numpy()
    np.savez(folder / f"{world.rank}.npz", **gradients)


@pytest.mark.dist
def test_buckets_change_no_gradient_and_compression_only_rounds_it(packed, tmp_path):
    launch(Machines(num_procs=2), record_gradients, tiny_config(packed), tmp_path)
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2))
    for name in SENDING:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for name in ("small buckets", "one bucket"):
        np.testing.assert_array_equal(first[name], first["default"], err_msg=name)
    exact, rounded = first["default"], first["bfloat16"]
    assert not np.array_equal(exact, rounded)
    # Each of two terms is rounded to 8 bits, and their sum again; terms may cancel, so the largest sets the scale.
    np.testing.assert_allclose(rounded, exact, rtol=2**-7, atol=2**-8 * np.abs(exact).max())
    assert np.linalg.norm(rounded - exact) < 2**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__bucket_mb": 0}, "train.bucket_mb=0.0 must be positive"),
        ({"train__gradient_compression": "int8"}, "train.gradient_compression='int8' must be one of none, bfloat16"),
    ],
)
def test_impossible_ways_of_sending_are_refused(packed, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(packed, **change)


def die_then_fail(world, message, folder):
    """At first process 1 is killed; after the restart it fails."""
    if world.rank == 1:
        if not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(message)
    world.barrier("what never comes")


@pytest.mark.dist
def test_processes_are_restarted_and_the_failure_of_one_ends_all_and_is_named(capfd, tmp_path):
    with pytest.raises(ProcessFailedError, match="process . of 2 FAILED with exit code .*same command goes on"):
        launch(Machines(num_procs=2, max_restarts=1), die_then_fail, "this is why", tmp_path, timeout_s=30)
    errors = capfd.readouterr().err
    assert (tmp_path / "killed").exists() and "restart 1: going on from the last checkpoint" in errors
    assert "process 1 of 2 failed" in errors
    assert "ValueError: this is why" in errors


def hang(holding_the_gil):
    """A process that notes what it waits for, and waits for ever."""
    logging.getLogger().handlers.clear()  # those that pytest has set up
    dog = Watchdog("process 3 of 4", 0.2)
    dog.note("something else")
    time.sleep(0.5)
    dog.note("the shard that never comes")
    # Called so, the C library's sleep lets no other thread run.
    ctypes.PyDLL(None).sleep(100) if holding_the_gil else time.sleep(100)


@pytest.mark.parametrize("holding_the_gil", [False, True])
def test_a_process_that_hangs_is_ended_and_says_what_it_waited_for(holding_the_gil, capfd, monkeypatch):
    monkeypatch.setattr(watchdog, "_GRACE_S", 0.2)
    monkeypatch.setattr(watchdog, "_TIMER_FACTOR", 1.5)
    process = multiprocessing.get_context("fork").Process(target=hang, args=(holding_the_gil,))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    errors = capfd.readouterr().err
    if holding_the_gil:
        assert "Timeout (0:00:01" in errors and "in hang" in errors
    else:
        assert re.search(r"process 3 of 4 has waited \d s for the shard that never comes", errors)
        assert "the same command goes on from the last checkpoint" in errors.lower()


def suspended(go_on):
    logging.getLogger().handlers.clear()  # those that pytest has set up
    dog = Watchdog("process 0 of 1", 0.5)  # patience: 1.55 s
    dog.note("the end")
    go_on.wait()
    time.sleep(0.3)  # time for several looks of the watchdog
    dog.close()
    os._exit(7)


def test_a_process_that_was_suspended_goes_on(capfd, monkeypatch):
    """As by Ctrl-Z or a scheduler, for longer than it may wait."""
    monkeypatch.setattr(watchdog, "_GRACE_S", 0)
    context = multiprocessing.get_context("fork")
    go_on = context.Event()
    process = context.Process(target=suspended, args=(go_on,))
    process.start()
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(process.pid, signal.SIGCONT)
    go_on.set()
    process.join(60)
    assert process.exitcode == 7 and "has waited" not in capfd.readouterr().err


def handled(answered):
    with ending_at_once():
        signal.signal(signal.SIGUSR1, lambda *_: answered.set())
        os.kill(os.getpid(), signal.SIGUSR1)
        answered.wait()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_signal_that_another_handles_ends_nothing(capfd):
    context = multiprocessing.get_context("fork")
    answered = context.Event()
    process = context.Process(target=handled, args=(answered,))
    process.start()
    process.join(60)
    assert answered.is_set() and process.exitcode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capfd.readouterr().err


def test_a_late_failure_to_meet_is_named(monkeypatch):
    """As when the machine of the endpoint is gone."""

    def lost(options, entry):
        raise RendezvousConnectionError("The connection to the C10d store has failed.")

    monkeypatch.setattr(dist, "elastic_launch", lost)
    with pytest.raises(
        ProcessFailedError, match=r"no longer, at 127.0.0.2:1 \(RendezvousConnectionError\).*on each goes on"
    ):
        launch(Machines(num_procs=1, min_nodes=2, max_nodes=2, rdzv="127.0.0.2:1"), hang)


def test_a_port_that_cannot_be_opened_is_named(monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refused)
    with pytest.raises(ValueError, match="at port 80 and cannot: Permission denied"):
        launch(Machines(num_procs=1, min_nodes=2, max_nodes=2, rdzv="localhost:80"), hang)


@pytest.mark.parametrize("node_rank", [None, 0, 1])
def test_a_port_that_something_else_holds_is_named(monkeypatch, caplog, node_rank):
    """It takes connections, and says nothing."""
    monkeypatch.setattr(meeting, "ANSWER_S", 1.0)
    monkeypatch.setattr(dist, "ANSWER_S", 1.0)
    monkeypatch.setattr(dist, "elastic_launch", None)  # nothing starts
    with socket.create_server(("", 0)) as other:
        rdzv = f"localhost:{other.getsockname()[1]}"
        message = "port .* is taken" if node_rank == 0 else "takes connections and does not answer within 1 s"
        with pytest.raises(ValueError, match=f"--rdzv {rdzv}: .*{message}"):
            launch(Machines(num_procs=1, min_nodes=2, max_nodes=2, node_rank=node_rank, rdzv=rdzv), hang)
    assert ("expecting another launcher" in caplog.text) == (node_rank is None)


#: A launcher whose host is another machine, at a port of which nothing listens.
ELSEWHERE = """
import sys
from train import dist, meeting
from train.machines import Machines
dist.own_address = lambda rdzv: ("127.0.0.1", False)
meeting.PATIENCE_S = float(sys.argv[2])
try:
    dist.launch(Machines(min_nodes=2, max_nodes=2, rdzv=sys.argv[1]), print)
except dist.ProcessFailedError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_waits_for_its_host_can_be_stopped(free_address, number):
    words = [sys.executable, "-c", ELSEWHERE, free_address, "600"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert "waiting up to 600 s for the machine of --rdzv" in process.stderr.readline()
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number and f"stopped by {number.name}" in said


#: Fixed ranks: rank, address.
FIXED = """
import sys
from train import dist
from train.machines import Machines
dist.launch(Machines(min_nodes=3, max_nodes=3, node_rank=int(sys.argv[1]), rdzv=sys.argv[2]), print)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launchers_of_fixed_ranks_that_wait_for_another_can_be_stopped(free_address, number):
    with ExitStack() as stack:

        def start(rank):
            words = [sys.executable, "-c", FIXED, str(rank), free_address]
            process = stack.enter_context(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            while "for all 3 machines" not in (line := process.stderr.readline()):
                assert line, "it ended"
            time.sleep(0.5)  # now it waits
            return process

        def stop(process):
            assert process.poll() is None
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
            assert process.returncode == 128 + number and f"stopped by {number.name}" in said

        host = start(0)
        stop(start(1))
        again = start(1)  # three have come, and one of them twice
        stop(host)
        again.kill()


def test_a_host_that_never_comes_is_named_and_who_can_be_one(free_address):
    words = [sys.executable, "-c", ELSEWHERE, free_address, "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(f"do not find each other, .* {free_address} .*nothing listens there.* `ip address`", done.stderr)


def test_progress_and_rest_keep_a_watchdog_quiet(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self, *what: ended.append(what))
    dog = Watchdog("process 0 of 1", 0.1)  # patience: 1.11 s
    for _ in range(15):
        dog.note("the same words, noted again")
        time.sleep(0.1)
    dog.note(None)
    time.sleep(1.5)
    assert not ended
    dog.note("the end")
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    dog.close()
    assert ended[0][0] == "the end"


THREE = {"min_nodes": 3, "max_nodes": 3, "rdzv": "localhost:29500"}


@pytest.mark.parametrize(
    ("machines", "batch_size", "message"),
    [
        (Machines(num_gpus=99, num_procs=99), 256, r"--gpus 99: this machine has \d+ usable GPUs"),
        (Machines(num_procs=3), 256, "train.batch_size=256 cannot be split evenly over 3 processes"),
        (Machines(num_procs=2, **THREE), 256, "over 6 processes; choose a multiple of 6"),
        (Machines(min_nodes=2, max_nodes=4, rdzv="localhost:1"), 256, "over 3 .* multiple of 2 and of 3 and of 4"),
        (Machines(num_procs=0), 256, "--procs 0 must be at least 1"),
        (Machines(min_nodes=2, max_nodes=2), 256, "--nodes 2 needs --rdzv HOST:PORT"),
        (Machines(min_nodes=3, max_nodes=2), 256, "--nodes 3:2: the least must be at least 1, the most no less"),
        (Machines(min_nodes=0, max_nodes=2), 256, "--nodes 0:2: the least must be at least 1"),
        (Machines(**{**THREE, "rdzv": "node0"}), 256, "--rdzv node0 must be HOST:PORT, such as node0:29500"),
        (Machines(**{**THREE, "rdzv": "node0:65536"}), 256, "--rdzv node0:65536 must be .* a port from 1 to 65535"),
        (Machines(**{**THREE, "rdzv": "no.such.invalid:1"}), 256, "no.such.invalid cannot be reached from here"),
        (Machines(node_rank=3, **THREE), 256, "--node-rank 3 with --nodes 3: ranks go from 0, .* to 2"),
        (Machines(node_rank=-1, **THREE), 256, "--node-rank -1 with --nodes 3"),
        (Machines(node_rank=1, max_restarts=1, **THREE), 256, "neither --nodes MIN:MAX nor --max-restarts"),
        (Machines(node_rank=0, min_nodes=1, max_nodes=2, rdzv="localhost:1"), 256, "--node-rank is for a run"),
    ],
)
def test_impossible_requests_are_refused_before_anything_starts(machines, batch_size, message):
    with pytest.raises(ValueError, match=message):
        machines.check(batch_size)


def test_rank_0_is_on_the_machine_where_they_meet(monkeypatch):
    monkeypatch.setattr(machines, "own_address", lambda rdzv: ("10.0.0.2", False))
    Machines(node_rank=1, **THREE).check(258)
    with pytest.raises(ValueError, match="localhost:29500 is no address of this machine. Rank 0 is the machine of"):
        Machines(node_rank=0, **THREE).check(258)


def test_machines_are_as_asked():
    parser = argparse.ArgumentParser()
    Machines.add_arguments(parser)

    def asked(*words):
        return Machines.from_arguments(parser.parse_args(words))

    assert asked() == Machines() and asked("--procs", "2").world_sizes == [2]
    several = asked("--nodes", "2:4", "--procs", "2", "--rdzv", "h:1", "--rdzv-id", "x", "--max-restarts", "3")
    assert several.world_sizes == [4, 6, 8]
    assert (several.rdzv, several.rdzv_id, several.max_restarts, several.node_rank) == ("h:1", "x", 3, None)
    assert asked("--nodes=3", "--node-rank=0").node_rank == 0
    asked("--nodes=1", "--rdzv=node0:29500").check()  # as the script of a job has it that is given one machine
    for alone in ("--rdzv=node0:29500", "--node-rank=0"):
        with pytest.raises(
            ValueError, match="--rdzv and --node-rank are for several machines: say how many by --nodes"
        ):
            asked(alone)
    for words in ("two", "2:", ":2", "-1", "1:2:3", "²"):
        with pytest.raises(ValueError, match=f"--nodes {words}: a number of machines, such as 4, or MIN:MAX"):
            asked(f"--nodes={words}")


@pytest.mark.parametrize(
    ("rdzv", "expected"),
    [("node0:29500", ("node0", 29500)), ("10.0.0.1:1", ("10.0.0.1", 1)), ("[fd00::1]:65535", ("fd00::1", 65535))],
)
def test_addresses_are_divided(rdzv, expected):
    assert split_address(rdzv) == expected


@pytest.mark.parametrize("rdzv", ["node0:", ":1", "fd00::1", "a b:1", "node0:0", "node0:x", "[]:1"])
def test_what_is_no_address_is_refused(rdzv):
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        split_address(rdzv)


def test_a_machine_meets_itself_by_its_name():
    """A loopback address would stand for another machine elsewhere."""
    assert own_address("localhost:1") == own_address("127.0.0.2:1") == (None, True)


def test_alone_nothing_is_wrapped_or_waited_for():
    world = World(rank=0, world_size=1, device=torch.device("cpu"), num_threads=1)
    net = torch.nn.Linear(1, 1)
    assert world.wrap(net) is net
    assert world.sum(torch.tensor(3)).item() == 3
    world.barrier()
