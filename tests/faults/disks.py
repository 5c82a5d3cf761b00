"""Disks that are full, or read-only, while packs and runs write to them.

Full is a limit on the size of a file, and a small tmpfs where this process may mount one; read-only wants the latter.
What cannot be injected is said. After the error, space is made, and the same command has to end with what an
undisturbed one makes.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import Fault
from tests.faults.packing import content_of, contents, pack_arguments
from tests.faults.processes import kill, start, tree, wait_until
from tests.tiny import tiny_overrides

ROOM = "64m"


@dataclass(frozen=True)
class Job:
    """A command that writes a folder. option: the one that names it. harvest: what must be as if undisturbed, from
    the folder."""

    module: str
    arguments: list[object]
    option: str
    harvest: Callable[[Path], dict[str, bytes]]

    def start(self, out: Path, **options: Any) -> subprocess.Popen:
        return start(self.module, [*self.arguments, self.option, out], **options)

    def run(self, out: Path, **options: Any) -> tuple[int, str]:
        process = self.start(out, **options)
        output = process.communicate(timeout=120)[0]
        return process.returncode, output


@dataclass(frozen=True)
class NotInjected(Fault):
    """A fault that this machine does not allow: it is told, but not counted."""


# --- what is run --------------------------------------------------------------------------------------------------


def pack_job(folder: Path, rng: np.random.Generator) -> Job:
    return Job("flow.pack", pack_arguments(folder, rng, 1), "--out", contents)


def training_job(folder: Path, rng: np.random.Generator) -> Job:
    code, output = pack_job(folder, rng).run(folder / "packed")
    if code:
        raise RuntimeError(f"the pack to train on failed: {output}")
    overrides = tiny_overrides(folder / "packed", train__streams="[spatial]", eval__num_taus=0, eval__num_taus_train=0)
    return Job("train.launch", ["--gpus", 0, "--config", "demo", *overrides], "--run", trained)


def trained(run: Path) -> dict[str, bytes]:
    """The last checkpoint's weights, by their names."""
    import torch

    net = torch.load(run / "spatial/checkpoint.pt", weights_only=True)
    return {"/".join(map(str, key)): value for key, value in _tensors(net, ())}


def _tensors(tree: Any, at: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], bytes]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, (*at, key))
    elif hasattr(tree, "numpy"):
        yield at, tree.numpy().tobytes()


# --- disks --------------------------------------------------------------------------------------------------------


class Tmpfs:
    """A file system of memory, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", folder], check=True, capture_output=True)

    def set(self, *options: str) -> bool:
        """Change its options; whether that was possible: not, while a file is written, from writable to read-only."""
        command = ["mount", "-o", ",".join(("remount", *options)), self.folder]
        return subprocess.run(command, capture_output=True).returncode == 0

    def __enter__(self) -> "Tmpfs":
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)


def may_mount(folder: Path) -> bool:
    try:
        with Tmpfs(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# --- cases --------------------------------------------------------------------------------------------------------


def check(job: Job, out: Path, code: int, output: str, expected: dict[str, bytes]) -> list[str]:
    """What is wrong with how a command ended that could not write, and with what it had finished."""
    wrong = [f"{path} fills the disk" for path in [*out.glob(".pack/run-*"), *out.glob("shard-*.tar.tmp")]]
    if code == 0 or code < 0:
        wrong.append(f"exit code {code}")
    last = output.strip().splitlines()[-1:] or [""]
    if "Traceback" in output or str(out) not in last[0] or "the same command" not in last[0]:
        wrong.append(f"unclear: {output[-400:]!r}")
    if (out / "bad_videos.txt").exists():
        wrong.append("videos became bad ones")
    for path in out.glob("shard-*.tar"):
        if content_of(path) != expected[path.name]:
            wrong.append(f"{path.name} was harmed")
    return wrong


def recover(job: Job, out: Path, expected: dict[str, bytes]) -> tuple[list[str], int]:
    """What is wrong after the same command has gone on with space; and how much is lost."""
    code, output = job.run(out)
    if code:
        return [f"exit code {code} with space: {output[-400:]!r}"], 1
    found = job.harvest(out)
    differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    return [f"differs: {key}" for key in sorted(differing)], len(differing)


def full_by_limit(job: Job, folder: Path, rng: np.random.Generator, times: int, expected: dict[str, bytes]) -> Any:
    """A file may grow to so many bytes and no more, fewer than its largest has; drawn from small to large."""
    sizes = [path.stat().st_size for path in (folder / "undisturbed").rglob("*") if path.is_file()]
    for number in range(times):
        out, limit = folder / f"limited{number}", int(np.exp(rng.uniform(np.log(100), np.log(0.98 * max(sizes)))))
        code, output = job.run(out, limits=["prlimit", f"--fsize={limit}"])
        wrong = check(job, out, code, output, expected)
        more, lost = recover(job, out, expected)
        yield Fault(f"{job.module}: no file over {limit:,} bytes", not (wrong or more), lost, "; ".join(wrong + more))


def full_disk(job: Job, folder: Path, rng: np.random.Generator, times: int, expected: dict[str, bytes]) -> Any:
    """A file system with a drawn part of the space that the result takes."""
    needed = sum(path.stat().st_size for path in (folder / "undisturbed").rglob("*"))
    for number in range(times):
        with Tmpfs(folder / f"full{number}") as disk:
            pages = max(2, int(rng.uniform(0, 0.9) * needed) >> 12)
            disk.set(f"size={pages * 4}k")
            code, output = job.run(disk.folder / "out")
            wrong = check(job, disk.folder / "out", code, output, expected)
            disk.set(f"size={ROOM}")
            more, lost = recover(job, disk.folder / "out", expected)
        what = f"{job.module}: a disk of {pages * 4} kB, {needed >> 10} kB needed"
        yield Fault(what, not (wrong or more), lost, "; ".join(wrong + more))


def read_only_disk(job: Job, folder: Path, rng: np.random.Generator, times: int, expected: dict[str, bytes]) -> Any:
    """A file system that turns read-only after the command was killed at a drawn moment."""
    for number in range(times):
        with Tmpfs(folder / f"read_only{number}") as disk:
            out = disk.folder / "out"
            process = job.start(out)
            wait_until(lambda out=out, process=process: out.exists() or process.poll() is not None)
            time.sleep(rng.uniform(0, 1.5))
            kill(tree(process.pid))
            process.communicate()
            if not wait_until(lambda disk=disk: disk.set("ro")):
                raise RuntimeError(f"{disk.folder} stays writable")
            complete = (out / "dataset.json").exists()
            code, output = job.run(out)
            wrong = [] if complete else check(job, out, code, output, expected)
            wrong = [what for what in wrong if "fills the disk" not in what]  # it stays where nothing can be removed
            disk.set("rw")
            more, lost = recover(job, out, expected)
        yield Fault(f"{job.module}: a disk that turns read-only", not (wrong or more), lost, "; ".join(wrong + more))


def disks(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """A pack, and in the full form training, on every kind of disk; in the short one where nothing is mounted, once."""
    for make_job, times in [(pack_job, 1)] if short else [(pack_job, 6), (training_job, 3)]:
        place = folder / make_job.__name__
        place.mkdir()
        job = make_job(place, rng)
        code, output = job.run(place / "undisturbed")
        if code:
            raise RuntimeError(f"undisturbed, {job.module} failed: {output}")
        expected = job.harvest(place / "undisturbed")
        yield from full_by_limit(job, place, rng, times, expected)
        if short:
            continue
        if not may_mount(place / "mount"):
            yield NotInjected(f"{job.module}: no full and no read-only disk, this process may not mount one")
            continue
        for kind in (full_disk, read_only_disk):
            yield from kind(job, place, rng, times, expected)


CASES = {"full or read-only disk": disks}
