"""Packs that are killed, again and again, and go on.

A kill is aimed at a phase of the pack, as the folder shows it, and comes a drawn time after the phase began:

    start -> fragment -> commit -> index -> lists -> end        of a folder; "end": dataset.json is there, the work
                                                                 folder not gone yet
"""

import json
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flow import demo
from flow.catalog import list_videos
from flow.codec import encode_rgb
from flow.video import read_frames
from tests.faults import Fault
from tests.faults.processes import is_running, kill, start, tree, wait_until, workers

#: Phase -> seconds after its beginning within which a kill comes.
PHASES = {"start": 1.0, "fragment": 0.2, "commit": 0.03, "index": 0.005, "lists": 0.003, "end": 0.005}
EARLY = ("start", "fragment", "commit")

#: Seconds that a pack took, which no two packs share.
_SECONDS = ("flow_s_per_pair", "s_per_pair", "s_per_frame")


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a packed set by its name; dataset.json without the seconds."""
    return {str(path.relative_to(out)): content_of(path) for path in sorted(out.rglob("*")) if path.is_file()}


def content_of(path: Path) -> bytes:
    if path.name != "dataset.json":
        return path.read_bytes()
    dataset = json.loads(path.read_text())
    for key in _SECONDS:
        dataset["summary"].pop(key, None)
    return json.dumps(dataset).encode()


class Reader(threading.Thread):
    """An outsider who opens whatever has a final name, all the while, and compares it with what it has to be."""

    def __init__(self, out: Path, expected: dict[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.wrong: set[str] = set()
        self.num_read = 0
        self._out, self._expected = out, expected
        self._done = threading.Event()
        self._seen: dict[Path, tuple[int, ...]] = {}

    def run(self) -> None:
        while not self._done.wait(0.002):
            for path in self._out.rglob("*"):
                name = path.relative_to(self._out)
                if name.parts[0] != ".pack" and name.suffix != ".tmp":
                    self._look_at(path, str(name))

    def _look_at(self, path: Path, name: str) -> None:
        try:
            stat = path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if not path.is_file() or self._seen.get(path) == seen:
                return
            content = content_of(path)
        except FileNotFoundError:
            return
        except ValueError:  # of JSON
            content = b""
        self._seen[path] = seen
        self.num_read += 1
        if content != self._expected.get(name):
            self.wrong.add(name)

    def __enter__(self) -> "Reader":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def phase(out: Path, since: float) -> str:
    """What the run that began at `since` (s, wall clock) has reached."""

    def fresh(*patterns: str) -> bool:
        for pattern in patterns:
            for path in out.glob(pattern):
                try:
                    if path.stat().st_mtime >= since:
                        return True
                except FileNotFoundError:
                    pass
        return False

    if (out / "dataset.json").exists():
        return "end"
    if fresh("splits/*"):
        return "lists"
    if fresh("index.bin", "index.bin.tmp"):
        return "index"
    if fresh("shard-*.tar", "shard-*.tar.tmp"):
        return "commit"
    return "fragment" if fresh(".pack/run-*/*") else "start"


class KilledPack:
    """A pack under attack."""

    def __init__(self, module: str, arguments: list[object], out: Path, rng: np.random.Generator) -> None:
        self._module, self._arguments, self._out, self._rng = module, [*arguments, "--out", out], out, rng
        self._process: Any = None
        self._since = 0.0
        self._mourned = False

    def strike(self, target: str) -> str | None:
        """Start the pack if it does not run, and kill it, or a process of it, in a phase. What was done, in words; None
        if the pack was done before."""
        if self._process is None or self._process.poll() is not None:
            self._since = time.time()
            self._process = start(self._module, self._arguments)
            self._mourned = False
        order = list(PHASES)
        wait_until(
            lambda: (
                self._process.poll() is not None or order.index(phase(self._out, self._since)) >= order.index(target)
            )
        )
        time.sleep(self._rng.uniform(0, PHASES[target]))
        # A process that dies a second time over a video makes the video a bad one, as it has to.
        victims = ["everything", "the parent", "a worker"][: 2 if self._mourned or target not in EARLY else 3]
        victim = victims[self._rng.integers(len(victims))]
        family, hit = tree(self._process.pid), phase(self._out, self._since)
        helpers = workers(self._process.pid)
        if self._process.poll() is not None:
            return None
        if victim == "a worker" and not helpers:
            victim = "the parent"
        if victim == "a worker":
            kill([helpers[self._rng.integers(len(helpers))]])
            self._mourned = True
            return f"{victim} in phase {hit}"
        kill([self._process.pid, *(helpers if victim == "everything" else ())])
        self._process.communicate()
        if not wait_until(lambda: not any(map(is_running, family))):
            raise RuntimeError(f"processes outlive {victim} by a minute")
        return f"{victim} in phase {hit}"

    def finish(self) -> str:
        """Let the pack run to its end; what is wrong with that, or nothing."""
        process = self._process
        if process is None or process.poll() is not None:
            process = start(self._module, self._arguments)
        output = process.communicate(timeout=120)[0]
        return "" if process.returncode == 0 else f"exit code {process.returncode}: {output[-300:]}"


def attack(
    module: str, arguments: list[object], folder: Path, rng: np.random.Generator, num_kills: int
) -> Iterator[Fault]:
    """Kill a pack so often in a row, then let it end, and compare."""
    folder.mkdir()
    undisturbed, out = folder / "undisturbed", folder / "killed"
    output = start(module, [*arguments, "--out", undisturbed]).communicate()[0]
    expected = contents(undisturbed)
    if "dataset.json" not in expected:
        raise RuntimeError(f"the undisturbed pack failed: {output}")
    num_early = max(1, 2 * num_kills // 3)
    targets = [str(rng.choice(EARLY)) for _ in range(num_early)]
    targets += [str(rng.choice([name for name in PHASES if name not in EARLY])) for _ in range(num_kills - num_early)]
    pack = KilledPack(module, arguments, out, rng)
    with Reader(out, expected) as reader:
        done: list[str] = []
        for number, target in enumerate(targets):
            killed = pack.strike(target)
            if killed is None:
                break
            done.append(killed)
            if number < num_kills - 1:
                yield Fault(f"{module} killed: {killed}", survived=not reader.wrong, note=str(reader.wrong))
        failure = pack.finish()
        wait_until(lambda: "dataset.json" in {path.name for path in reader._seen})
    found = contents(out)
    notes = [failure, *(f"seen half written: {name}" for name in sorted(reader.wrong))]
    notes += [f"differs: {name}" for name in sorted(expected.keys() ^ found.keys())]
    notes += [f"differs: {name}" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    if len(done) < num_kills:
        notes.append(f"the pack was done after {len(done)} of {num_kills} kills")
    lost = sum(name.endswith(".tar") and found.get(name) != content for name, content in expected.items())
    what = f"{module} killed: {done[-1] if done else 'never'}; {len(done)} times in a row, then the same bytes"
    yield Fault(what, survived=not any(notes), lost=lost, note="; ".join(filter(None, notes)))


def pack_arguments(folder: Path, rng: np.random.Generator, num_train: int) -> list[object]:
    """Arguments of a flow.pack of 6 (num_train + 1) generated videos, each a shard."""
    demo.generate(folder / "videos", num_train=num_train, num_test=1, num_frames=8, seed=int(rng.integers(99)))
    arguments = ["--videos", folder / "videos", "--splits", folder / "videos/splits", "--dataset", "ucf101"]
    return [*arguments, "--size", 64, "--videos-per-shard", 1, "--workers", 2]


def image_arguments(folder: Path) -> list[object]:
    """Arguments of a flow.images of the frames of a folder's videos, four to a shard."""
    for video in list_videos(folder / "videos"):
        target = folder / "images" / video.class_name
        target.mkdir(parents=True, exist_ok=True)
        for t, frame in enumerate(islice(read_frames(video.path, 96), 4)):
            (target / f"{video.path.stem}_{t}.jpg").write_bytes(encode_rgb(frame, 90))
    return ["--train", folder / "images", "--size", 64, "--per-shard", 4, "--workers", 2]


def killed_pack(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """flow.pack, and in the full form flow.images."""
    arguments = pack_arguments(folder, rng, 1 if short else 5)
    yield from attack("flow.pack", arguments, folder / "pack", rng, 3 if short else 30)
    if not short:
        yield from attack("flow.images", image_arguments(folder), folder / "image_pack", rng, 20)


CASES = {"killed pack": killed_pack}
