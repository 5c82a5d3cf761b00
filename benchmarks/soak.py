"""Does anything grow over time, and does Ctrl-C end it all: the loader alone, then training, each for half of the time.

    python benchmarks/soak.py [--data PACKED] [--minutes 30] [--every 5] [--quick]

Each part is a command of its own, of which the whole tree of processes is sampled: resident memory, the private part of
it, shared memory, open files, threads, processes. A line is fitted to what was sampled after the warm-up, a fifth of
the time. `flat` means that it rises over that time by less than 3 % of the median of memory, and by less than one of
whatever is counted. At the end comes Ctrl-C, as from a terminal: to all processes of the part at once. The exit code is
1 if anything is not flat, or is left.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    add_data,
    add_out,
    choose_crop_px,
    demo_set,
    describe_data,
    errors_in_a_line,
    result_path,
    write_result,
)

import numpy as np  # isort: skip
import psutil  # isort: skip
from tqdm import tqdm

from flow.command import Parser
from loaders import dali_loader
from loaders.batch import StreamSpec
from loaders.index import open_index

PARTS = ["loader", "training"]
WARM_UP = 0.2
MAX_RISE_PCT = 3.0
MAX_RISE_COUNT = 1.0
NUM_SAMPLES = 200
#: How long a part may take to end.
END_S = 30.0
#: What is sampled of a tree of processes, and its key in /proc/PID/status where it is one of memory.
MEMORY = {"resident_bytes": "VmRSS", "private_bytes": "RssAnon", "shared_memory_bytes": "RssShmem"}
COUNTS = ("open_files", "threads", "processes")
SHARED_MEMORY = "/dev/shm/"


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def sample(pid: int) -> dict[str, float]:
    """What a tree of processes holds at this moment."""
    found = dict.fromkeys((*MEMORY, *COUNTS), 0.0)
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            num_files = process.num_fds()
        except (psutil.Error, OSError):
            continue  # gone by now
        values = dict(line.split(":", 1) for line in lines)
        if "VmRSS" not in values:
            continue  # a zombie
        for name, key in MEMORY.items():
            found[name] += int(values[key].split()[0]) * 1024
        found["open_files"] += num_files
        found["threads"] += int(values["Threads"])
        found["processes"] += 1
    return found


def judge(samples: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For whatever is sampled: median after the warm-up, slope per hour, rise over the time fitted, and the verdict.

    samples: with time_s, at least two after the warm-up.
    """
    seconds = np.array([row["time_s"] for row in samples])
    late = seconds >= seconds[0] + WARM_UP * (seconds[-1] - seconds[0])
    span_s = seconds[late][-1] - seconds[late][0]
    verdicts = {}
    for name in (*MEMORY, *COUNTS):
        values = np.array([row[name] for row in samples])[late]
        slope = np.polyfit(seconds[late] - seconds[late][0], values, 1)[0]
        median, rise = float(np.median(values)), float(slope * span_s)
        bound = MAX_RISE_PCT / 100 * median if name in MEMORY else MAX_RISE_COUNT
        verdicts[name] = {"median": median, "per_hour": float(slope * 3600), "rise": rise, "flat": rise <= bound}
    return verdicts


def interrupt(process: subprocess.Popen) -> dict[str, Any]:
    """Ctrl-C: seconds until the last process is gone, exit code, and the processes that were left."""
    family = tree(process.pid)
    start_s = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)  # not by psutil, which would keep the exit code to itself
    psutil.wait_procs(family[1:], timeout=END_S)
    exit_s = time.monotonic() - start_s
    orphans = [other for other in family if other.is_running() and other.status() != psutil.STATUS_ZOMBIE]
    for other in orphans:
        other.kill()
    return {"exit_s": exit_s, "exit_code": process.wait(), "orphans": len(orphans)}


def shared_files(pid: int) -> set[str]:
    """Files of shared memory that a tree of processes has mapped, and that still have a name."""
    found = set()
    for process in tree(pid):
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {line[line.index(SHARED_MEMORY) :] for line in lines if SHARED_MEMORY in line}
    return {path for path in found if not path.endswith("(deleted)")}


def soak(command: list[str], seconds: float, every_s: float, folder: Path, warm: Path | None = None) -> dict[str, Any]:
    """Run a command for so long, sample it, and end it with Ctrl-C. warm: the clock starts when this file is there.

    Raises RuntimeError with its last words if it ends before.
    """
    mapped: set[str] = set()
    samples: list[dict[str, float]] = []
    log = folder / "output.log"
    with open(log, "wb") as output:
        # Ctrl-C is ignored by what a job in the background starts.
        command = ["env", "--default-signal=INT", *command]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    bar = tqdm(total=round(seconds), unit="s", desc="soaking", disable=None)
    try:
        start_s = None if warm else time.monotonic()
        while start_s is None or time.monotonic() - start_s < seconds or len(samples) < 5:
            time.sleep(every_s if start_s is not None else 0.05)
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            if start_s is None and warm is not None and warm.exists():
                start_s = time.monotonic()
            if start_s is not None:
                samples.append({"time_s": time.monotonic() - start_s, **sample(process.pid)})
                mapped |= shared_files(process.pid)
                bar.update(min(bar.total, round(time.monotonic() - start_s)) - bar.n)
        end = interrupt(process)
    finally:
        bar.close()
        for other in tree(process.pid):
            other.kill()
    verdicts = judge(samples)
    thinned = samples[:: max(1, len(samples) // NUM_SAMPLES)]
    left = sum(map(os.path.exists, mapped))
    return {"seconds": seconds, "verdicts": verdicts, "end": {**end, "shared_memory_left": left}, "samples": thinned}


def is_sound(row: dict[str, Any], quick: bool) -> bool:
    """Whether a part grew in nothing, ended by Ctrl-C, and left nothing. quick: seconds tell nothing about growth."""
    flat = quick or all(verdict["flat"] for verdict in row["verdicts"].values())
    end = row["end"]
    return flat and end["exit_code"] == 130 and not end["orphans"] and not end["shared_memory_left"]


# --- parts --------------------------------------------------------------------------------------------------------


def load(data: Path, crop_px: int, started: Path) -> None:
    """The loader alone, for ever: batches of flow stacks of the whole set."""
    index = open_index(data)
    spec = StreamSpec(stream="temporal", crop_px=crop_px)
    try:
        with dali_loader.train_loader(index, index.split("split1_train"), spec, seed=0, batch_size=32) as loader:
            for _ in loader:
                started.touch()
    except KeyboardInterrupt:
        sys.exit(130)


def parts(options: argparse.Namespace, data: Path, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """Part -> its command, and the file that it makes when it is at work."""
    crop_px = choose_crop_px(data)
    alone = [sys.executable, str(Path(__file__).resolve()), "--part", "loader", "--data", str(data.resolve())]
    alone += ["--crop-px", str(crop_px), "--started", str(folder / "started")]
    run = folder / "run"
    training = [sys.executable, "-m", "train.launch", "--gpus", "0", "--procs", "2", "--run", str(run)]
    training += [
        f"data.root={data.resolve()}",
        f"data.crop_px={crop_px}",
        "model.width=0.0625",
        "train.streams=[temporal]",
        "train.batch_size=16",
    ]
    training += [
        "temporal.steps=1000000",
        "train.log_every=5",
        f"train.checkpoint_every={10 if options.quick else 100}",
    ]
    return {"loader": (alone, folder / "started"), "training": (training, run / "temporal" / "log.jsonl")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add_data(parser)
    parser.add_argument(
        "--minutes", type=float, default=30, metavar="N", help="of both parts together (default %(default)s)"
    )
    parser.add_argument(
        "--every", type=float, default=5, metavar="S", help="seconds from sample to sample (default %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: both)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    add_out(parser, "soak")
    parser.add_argument("--part", choices=["loader"], help=argparse.SUPPRESS)
    parser.add_argument("--crop-px", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.part:
        load(options.data, options.crop_px, options.started)
    partial = options.minutes < 30 or len(options.parts) < len(PARTS)
    less = {"quick": options.quick, "generated": options.data is None, "partial": partial}
    out = result_path(options.out, "soak", **less)
    if options.quick:
        options.minutes, options.every = 0.05, 0.2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = options.data or demo_set(folder, 64 if options.quick else 128)
        config = {"minutes": options.minutes, "every_s": options.every, "warm_up": WARM_UP}
        config |= {"max_rise_pct": MAX_RISE_PCT, "max_rise_count": MAX_RISE_COUNT}
        config |= {"data": describe_data(open_index(data), options.data is None)}
        commands = parts(options, data, folder)
        for name in options.parts:
            command, started = commands[name]
            rows.append({"name": name, **soak(command, 30 * options.minutes, options.every, folder, started)})
            write_result(out, config, complete=len(rows) == len(options.parts), rows=rows)
            print(f"{name}: {json.dumps(rows[-1]['end'])}")
            for quantity, verdict in rows[-1]["verdicts"].items():
                print(f"  {quantity}: {json.dumps(verdict)}")
    print(f"written to {out}")
    return int(not all(is_sound(row, options.quick) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
