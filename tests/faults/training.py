"""Training that is killed, stopped, interrupted or hung, whose checkpoints are damaged, or whose loss explodes."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tests.faults import Fault
from tests.faults.processes import is_running, tree, wait_until, workers

#: Processes that have imported all before they begin, once for all of them.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["train.launch", "loaders.dali_loader", "torch._dynamo", "tensorboard.summary.writer.record_writer"]
)

STEPS = 14
GUARD_S = 120
#: "Within a second or two", on a busy machine.
PROMPT_S = 5
#: A process that reports nothing for so long has hung; a busy machine's may take seconds to start.
TIMEOUT_S = 8


@dataclass
class Started:
    """A process, and the file that its output goes to."""

    process: multiprocessing.Process
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def wait(self) -> tuple[int | None, str]:
        """Exit code, negative for a signal, None if it does not end; and its output."""
        self.process.join(GUARD_S)
        code = self.process.exitcode
        if code is None:
            for pid in tree(self.pid):
                os.kill(pid, signal.SIGKILL)
        return code, self.output.read_text(errors="replace")


@dataclass
class Job:
    """A small training on a packed set of its own, and its run folders."""

    folder: Path

    def __post_init__(self) -> None:
        from tests.conftest import pack_arrays, random_video

        rng = np.random.default_rng(7)
        shapes = {"run/a": (9, 64, 85), "run/b": (8, 64, 85), "walk/a": (8, 64, 85), "walk/b": (9, 64, 85)}
        pack_arrays(self.folder / "set", {name: random_video(rng, *shape) for name, shape in shapes.items()})
        self.num_outputs = 0

    def arguments(self, run: str, **changes: object) -> list[str]:
        """Of train.launch. changes: config keys, written section__key; procs and max_restarts are options."""
        from tests.tiny import tiny_overrides

        options = [
            f"--{name.replace('_', '-')}={changes.pop(name)}" for name in ("procs", "max_restarts") if name in changes
        ]
        small = {"train__streams": "[temporal]", "temporal__steps": STEPS, "train__checkpoint_every": 3}
        small |= {"eval__num_taus": 0, "eval__num_taus_train": 0, **changes}
        return ["--run", str(self.folder / run), *options, *tiny_overrides(self.folder / "set", **small)]

    def start(self, run: str, sabotage: Callable[[], None] | None = None, **changes: object) -> Started:
        """Start `train.launch`. sabotage: is called in its process before it begins."""
        return self._start(_launch, self.arguments(run, **changes), sabotage)

    def run(self, run: str, sabotage: Callable[[], None] | None = None, **changes: object) -> tuple[int | None, str]:
        return self.start(run, sabotage, **changes).wait()

    def start_ranks(self, run: str, world_size: int, **changes: object) -> list[Started]:
        """Start the processes of a run as the elastic launcher does, which would import everything in each."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        arguments = self.arguments(run, **changes)
        return [
            self._start(_rank, arguments, {"RANK": rank, "LOCAL_RANK": rank, **shared}) for rank in range(world_size)
        ]

    def _start(self, target: Callable, *arguments: object) -> Started:
        self.num_outputs += 1
        output = self.folder / f"output{self.num_outputs}.txt"
        output.touch()
        process = PROCESSES.Process(target=target, args=(output, *arguments))
        process.start()
        return Started(process, output)

    def log(self, run: str) -> list[tuple[int, float]]:
        """(step, loss) of a run, as far as it has come."""
        path = self.folder / run / "temporal" / "log.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [(record["step"], record["loss"]) for record in map(json.loads, lines)]

    def reached(self, run: str, step: int, started: Started) -> bool:
        """Wait until a run has done a step; False if it ended before, or does not get there."""
        wait_until(lambda: self._last_step(run) >= step or not is_running(started.pid), GUARD_S)
        return is_running(started.pid)

    def _last_step(self, run: str) -> int:
        log = self.log(run)
        return log[-1][0] if log else 0

    def checkpoint(self, run: str) -> Path:
        return self.folder / run / "temporal" / "checkpoint.pt"

    def judge(self, what: str, run: str, code: int | None, output: str, tolerance: float = 0) -> Fault:
        """Survived, if the run has ended with the losses and weights of the run "whole"; 0: to the bit."""
        from train.checkpoint import load_checkpoint

        if code != 0:
            return Fault(what, False, note=f"exit code {code}: {output[-2000:]}")
        found, expected = dict(self.log(run)), dict(self.log("whole"))
        lost = sum(
            step not in found or not np.isclose(found[step], loss, rtol=tolerance, atol=0)
            for step, loss in expected.items()
        )
        ours, whole = (load_checkpoint(self.checkpoint(name)).net for name in (run, "whole"))
        differing = [name for name in whole if not torch.allclose(ours[name], whole[name], tolerance, tolerance)]
        return Fault(what, not differing, lost, f"weights differ: {differing}" if differing else "")


def _begin(output: Path) -> None:
    """A process group of its own, and its output in a file."""
    os.setsid()
    file = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)


def _launch(output: Path, arguments: list[str], sabotage: Callable[[], None] | None) -> None:
    _begin(output)
    from train import launch

    if sabotage:
        sabotage()
    launch.main(arguments)


def _rank(output: Path, arguments: list[str], environment: dict[str, object]) -> None:
    _begin(output)
    from train import dist, launch

    os.environ.update({name: str(value) for name, value in environment.items()}, TORCHELASTIC_RESTART_COUNT="0")
    dist.launch = lambda machines, work, *args, timeout_s: dist._in_child("cpu", 1, timeout_s, work, args)
    launch.launch = dist.launch
    launch.main(arguments)


# --- killed ------------------------------------------------------------------------------------------------------


def killed_training(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """SIGKILL at random steps: the same command again, or the launcher's restarts, end with the same weights."""
    job = Job(folder)
    code, output = job.run("whole")
    for number in range(2 if short else 6):
        step = int(rng.integers(1, STEPS))
        started = job.start("again")
        what = f"SIGKILL at step {step}, run {number + 1} of one folder"
        if not job.reached("again", step, started):
            break  # the checkpoint that it went on from was later
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        code, output = job.run("again")
        yield job.judge(what, "again", code, output)
        shutil.rmtree(folder / "again")
    if short:
        return
    for procs, kills in ((1, 4), (2, 6)):
        shutil.rmtree(folder / "whole")
        assert job.run("whole", procs=procs, temporal__steps=5 * STEPS)[0] == 0
        run = f"{procs} processes"
        started = job.start(run, procs=procs, max_restarts=kills, temporal__steps=5 * STEPS)
        whats = []
        for step in np.sort(rng.integers(1, 4 * STEPS, kills)):
            if not job.reached(run, int(step), started):
                break
            victims, log = workers(started.pid), job.checkpoint(run).with_name("log.jsonl")
            victim, file_number = int(rng.integers(len(victims))), log.stat().st_ino
            os.kill(victims[victim], signal.SIGKILL)
            whats.append(f"SIGKILL of process {victim + 1} of {procs} at step {step}, restarted by the launcher")
            restarted = partial(_is_another, log, file_number, started.pid)
            wait_until(restarted, GUARD_S)
        code, output = started.wait()
        for what in whats:
            yield job.judge(what, run, code, output)
        counted = [f"restart {number}:" in output for number in range(1, kills + 1)]
        if len(whats) < kills or not all(counted):
            yield Fault(f"{kills} kills", False, note=f"{len(whats)} were injected, restarts: {counted}")


def _is_another(log: Path, file_number: int, pid: int) -> bool:
    """Whether a run has opened its log anew, or ended."""
    return log.stat().st_ino != file_number or not is_running(pid)


def killed_in_a_save(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """SIGKILL inside the write of a checkpoint, at random byte counts, and between its renames."""
    from train.checkpoint import load_newest

    job = Job(folder)
    assert job.run("whole")[0] == 0
    size = job.checkpoint("whole").stat().st_size
    for number in range(3 if short else 20):
        save = int(rng.integers(2, 6))  # of 5: at steps 3, 6, 9, 12 and the last
        if number % 3:
            at = int(rng.integers(size))
            what, deadly = f"SIGKILL in save {save} after {at:,} of {size:,} bytes", partial(_die_writing, save, at)
        else:
            rename = int(rng.integers(2))
            moment = ("before the former one is renamed", "between the two renames")[rename]
            what, deadly = f"SIGKILL in save {save} {moment}", partial(_die_renaming, 2 * save - 1 + rename)
        run = f"run {number}"
        code, output = job.run(run, deadly)
        if code != -signal.SIGKILL:
            yield Fault(what, False, note=f"it did not die there, but ended with {code}: {output[-1000:]}")
            continue
        found, damaged = load_newest(job.checkpoint(run))
        step = found.step if found else 0
        if damaged or step != 3 * (save - 1):
            yield Fault(what, False, 3 * (save - 1) - step, f"left step {step}, damaged: {damaged}")
            continue
        yield job.judge(what, run, *job.run(run))


def _die_writing(save: int, at: int) -> None:
    """Let the process die in its save number `save`, from 1, when the disk has got `at` bytes."""
    from train import checkpoint

    opened: list[Path] = []

    def deadly_open(path: Path, mode: str) -> object:
        opened.append(path)
        return _Deadly(path, at) if len(opened) == save else open(path, mode)

    checkpoint.open = deadly_open  # type: ignore[attr-defined]


class _Deadly:
    """A file in which the process dies."""

    def __init__(self, path: Path, at: int):
        self._file, self._left = open(path, "wb", buffering=0), at

    def write(self, content: bytes) -> int:
        content = memoryview(content).cast("B")
        if len(content) > self._left:
            self._file.write(content[: self._left])
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= len(content)
        return self._file.write(content)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_Deadly":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _die_renaming(number: int) -> None:
    """Let the process die before its renaming number `number`, from 1, of checkpoints; a save has two."""
    renamed: list[str] = []
    replace = os.replace

    def deadly_replace(source: Path, target: Path) -> None:
        if Path(target).name.startswith("checkpoint.pt"):
            renamed.append(Path(target).name)
            if len(renamed) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = deadly_replace


# --- damaged, or stopped and continued by others -----------------------------------------------------------------


def damaged_newest(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """The newest checkpoint is cut, or bytes are flipped or zeroed: training warns and goes on from the one before."""
    from train.checkpoint import DamagedCheckpointError, load_checkpoint

    job = Job(folder)
    assert job.run("whole")[0] == 0
    for number in range(3 if short else 18):
        run = f"run {number}"
        shutil.copytree(folder / "whole", folder / run)
        path = job.checkpoint(run)
        content = bytearray(path.read_bytes())
        at = int(rng.integers(len(content)))
        if number % 3 == 0:
            what, content = f"cut after {at:,} of {len(content):,} bytes", content[:at]
        elif number % 3 == 1:
            bit = int(rng.integers(8))
            what = f"bit {bit} of byte {at:,} flipped"
            content[at] ^= 1 << bit
        else:
            what = f"4,096 bytes from {at:,} on zeroed"
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        path.write_bytes(content)
        try:
            load_checkpoint(path)
            warning, what = "", f"{what}, where none is read"
        except DamagedCheckpointError:
            warning = "checkpoint.pt is damaged: it is now checkpoint.pt.damaged, and training goes on from the"
        code, output = job.run(run)
        if warning not in output:
            yield Fault(what, False, note=f"no warning: {output[-1000:]}")
            continue
        yield job.judge(what, run, code, output)


def other_number_of_ranks(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """Stopped with 2 processes and continued by 1, and the reverse: the losses and weights of 1 all the way."""
    job = Job(folder)
    assert job.run("whole")[0] == 0
    for number in range(1 if short else 3):
        for first, then in ((2, 1), (1, 2)):
            run, step = f"run {number} {first}", int(rng.integers(4, STEPS))
            started = job.start_ranks(run, first)
            going = job.reached(run, step, started[0])
            for rank in started:
                os.kill(rank.pid, signal.SIGKILL)
                rank.wait()
            what = f"{first} processes to step {max(dict(job.log(run)), default=0)}, then {then}"
            if not going:
                what += ", which had nothing left to train"
            ended = [rank.wait() for rank in job.start_ranks(run, then)]
            yield job.judge(what, run, *ended[0], tolerance=1e-3)


# --- hung, failing, interrupted ----------------------------------------------------------------------------------


def hung_rank(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """A process is stopped (SIGSTOP): every other says what it waits for, and ends."""
    job = Job(folder)
    changes = {"train__timeout_s": TIMEOUT_S, "temporal__steps": 100_000, "train__batch_size": 6}
    for number in range(1 if short else 4):
        world_size = 2 if short else int(rng.integers(2, 4))
        victim, step, run = int(rng.integers(world_size)), int(rng.integers(2, 20)), f"run {number}"
        started = job.start_ranks(run, world_size, **changes)
        if not job.reached(run, step, started[0]):
            yield Fault(f"{world_size} processes", False, note="; ".join(rank.wait()[1][-1000:] for rank in started))
            continue
        os.kill(started[victim].pid, signal.SIGSTOP)
        begin_s = time.monotonic()
        others = [rank for number, rank in enumerate(started) if number != victim]
        verdicts = [rank.wait() for rank in others]
        took_s = time.monotonic() - begin_s
        os.kill(started[victim].pid, signal.SIGKILL)
        silent = [output[-1000:] for code, output in verdicts if code != 1 or "has waited" not in output]
        what = f"process {victim + 1} of {world_size} stopped about step {step}, timeout_s={TIMEOUT_S}"
        survived = not silent and took_s < TIMEOUT_S + 60
        yield Fault(f"{what}: all others ended after {took_s:.1f} s", survived, note="; ".join(silent))
    if not short:
        yield _hung_under_the_launcher(job, rng, changes)


def _hung_under_the_launcher(job: Job, rng: np.random.Generator, changes: dict[str, object]) -> Fault:
    timeout_s = 2 * TIMEOUT_S  # on a busy machine one process is ready to start seconds before the other
    started = job.start("launched", procs=2, **{**changes, "train__timeout_s": timeout_s})
    if not job.reached("launched", int(rng.integers(2, 20)), started):
        return Fault("one process of two stopped under the launcher", False, note=started.wait()[1][-2000:])
    everyone = tree(started.pid)
    os.kill(workers(started.pid)[int(rng.integers(2))], signal.SIGSTOP)
    begin_s = time.monotonic()
    code, output = started.wait()
    took_s = time.monotonic() - begin_s
    note = _left(everyone) or ("" if "has waited" in output and took_s < timeout_s + 60 else output[-2000:])
    what = f"one process of two stopped, timeout_s={timeout_s}: the launcher ended all after {took_s:.1f} s"
    return Fault(what, code == 1 and not note, note=note)


def failing_rank(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """A process dies: the others end too, within a minute, and leave nothing running."""
    job = Job(folder)
    for number in range(1 if short else 6):
        run, victim, step = f"run {number}", int(rng.integers(2)), int(rng.integers(2, 20))
        number_of_signal = int(rng.choice([signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGTERM]))
        launched = number % 2 == 1
        if launched:
            started = job.start(run, procs=2, temporal__steps=100_000)
            job.reached(run, step, started)
            everyone, pid, waiting = tree(started.pid), workers(started.pid)[victim], [started]
        else:
            ranks = job.start_ranks(run, 2, temporal__steps=100_000)
            job.reached(run, step, ranks[0])
            everyone, pid, waiting = [rank.pid for rank in ranks], ranks[victim].pid, [ranks[1 - victim]]
        os.kill(pid, number_of_signal)
        begin_s = time.monotonic()
        verdicts = [one.wait() for one in waiting]
        took_s = time.monotonic() - begin_s
        what = f"{signal.Signals(number_of_signal).name} to process {victim + 1} of 2 at step {step}"
        what += f": {'the launcher' if launched else 'the other'} ended after {took_s:.1f} s"
        note = _left(everyone) or "; ".join(
            output[-1000:] for code, output in verdicts if code != 1 or "fail" not in output.lower()
        )
        yield Fault(what, not note and took_s < 60, note=note)


def interrupt(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """Ctrl-C and SIGTERM at random moments: the end at once, one line, nothing left; then the same command goes on."""
    job = Job(folder)
    begin_s = time.monotonic()
    assert job.run("whole", eval__num_taus=2)[0] == 0
    duration_s = time.monotonic() - begin_s
    for number in range(2 if short else 24):
        sent = signal.SIGINT if number % 2 == 0 else signal.SIGTERM
        procs = 1 if short or number % 3 else 2
        run, shared = f"run {number}", set(os.listdir("/dev/shm"))
        started = job.start(run, procs=procs, eval__num_taus=2)
        wait_until((folder / run / "config.yaml").exists, GUARD_S)
        if procs == 2 and number % 4 < 2:  # their start takes most of the time
            job.reached(run, int(rng.integers(1, STEPS)), started)
        else:
            time.sleep(rng.uniform(0, duration_s))
        everyone = tree(started.pid)
        while not everyone or not is_running(started.pid):  # it was faster: again, and sooner
            duration_s /= 2
            shutil.rmtree(folder / run)
            started = job.start(run, procs=procs, eval__num_taus=2)
            wait_until((folder / run / "config.yaml").exists, GUARD_S)
            time.sleep(rng.uniform(0, duration_s))
            everyone = tree(started.pid)
        os.killpg(started.pid, sent) if sent == signal.SIGINT else os.kill(started.pid, sent)
        begin_s = time.monotonic()
        code, output = started.wait()
        took_s = time.monotonic() - begin_s
        done = max(dict(job.log(run)), default=0)
        what = f"{sent.name} to {procs} process(es), {done} steps done: ended after {took_s:.2f} s"
        if code == 0:
            continue  # it was faster
        left = _left(everyone) or _left_in_memory(shared)
        one_line = (
            output.count("the same command goes on") == 1 and "Traceback" not in output and "leaked" not in output
        )
        if code != 128 + sent or not one_line or left or took_s > PROMPT_S:
            yield Fault(what, False, note=f"exit code {code}, left {left}: {output[-2000:]}")
            continue
        again = job.run(run, eval__num_taus=2)
        yield job.judge(what, run, *again, tolerance=0 if procs == 1 else 1e-3)


def _left(pids: Sequence[int]) -> str:
    """Which of these processes still run, a moment later."""
    wait_until(lambda: not any(map(is_running, pids)), 5)
    return " ".join(f"process {pid} still runs" for pid in pids if is_running(pid))


def _left_in_memory(before: set[str]) -> str:
    """Names in shared memory that were not there before, a moment later, but for those that some process still uses.

    Semaphores do not count: these runs share this program's resource tracker, which removes them at its end.
    """

    def new() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")} - before

    wait_until(lambda: not new(), 5)
    used = ""
    for maps in Path("/proc").glob("[0-9]*/maps") if new() else ():
        with suppress(OSError):
            used += maps.read_text()
    return " ".join(f"/dev/shm/{name}" for name in new() if f"/dev/shm/{name}" not in used)


# --- a loss that explodes ----------------------------------------------------------------------------------------


def nan_loss(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """Weights turn into NaN, or huge at a save, or the learning rate is too high: step, videos, a good checkpoint."""
    from train.checkpoint import load_newest

    job = Job(folder)
    assert job.run("whole")[0] == 0
    for number in range(3 if short else 12):
        run = f"run {number}"
        # Only asked for at saves, the loss is noticed late, and still the first bad step is named.
        log_every = 1 if number % 6 < 3 else 1000
        changes: dict[str, object] = {"train__log_every": log_every}
        sabotage, expected = None, None
        if number % 3 == 0:
            step = int(rng.integers(1, STEPS))
            what, sabotage = f"weights become NaN after step {step}", partial(_spoil_weights, step, float("nan"))
            named, expected = (
                [f"the loss is nan at step {step + 1}", f"not finite after step {step}"],
                (step - 1) // 3 * 3,
            )
        elif number % 3 == 1:
            step = 3 * int(rng.integers(2, 5))
            what, sabotage = f"weights become huge after step {step}, a save", partial(_spoil_weights, step, 1e12)
            named, expected = [f"at step {step + 1}; "], step - 3
        else:
            lr = float(10 ** rng.uniform(3, 9))
            what, named = f"lr={lr:.0f}", ["the loss is ", "weights are not finite"]
            changes["temporal__lr"] = lr
        code, output = job.run(run, sabotage, **changes)
        kept, damaged = load_newest(job.checkpoint(run))
        good = not damaged and (kept is None or all(bool(value.isfinite().all()) for value in kept.net.values()))
        says = any(text in output for text in named) and "videos were run/" in output.replace("walk/", "run/")
        if code != 1 or not says or not good or expected not in (None, kept.step if kept else 0):
            yield Fault(what, False, note=f"exit code {code}, kept {kept and kept.step}: {output[-1500:]}")
        elif sabotage and log_every == 1:  # a passing cause: the same command goes on
            yield job.judge(what, run, *job.run(run, **changes))
        else:
            yield Fault(what)
    if not short:
        code, output = job.run("two", procs=2, temporal__lr=1e8)
        silent = [rank for rank in range(2) if not re.search(f"process {rank} had the videos (run|walk)/", output)]
        note = f"processes {silent} do not name their videos: {output[-3000:]}" if silent else ""
        yield Fault("lr=1e8 in two processes", code == 1 and not silent, note=note)


def _spoil_weights(step: int, factor: float) -> None:
    """Multiply all weights by `factor` after update `step` of this process."""
    from train import engine

    update, done = engine.update, []

    def spoiled(model: torch.nn.Module, *arguments: object) -> object:
        judged = update(model, *arguments)
        done.append(judged)
        if len(done) == step:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter *= factor
        return judged

    engine.update = spoiled


CASES = {
    "killed training": killed_training,
    "kill while a checkpoint is written": killed_in_a_save,
    "damaged newest checkpoint": damaged_newest,
    "other number of ranks": other_number_of_ranks,
    "hung rank": hung_rank,
    "failing rank": failing_rank,
    "interrupt": interrupt,
    "nan loss": nan_loss,
}
