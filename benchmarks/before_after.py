"""This checkout against another one of the project, side by side: is the loader, or packing, slower than it was?

    git worktree add --detach /tmp/before COMMIT
    python benchmarks/before_after.py --before /tmp/before [--data PACKED] [--videos FOLDER] [--rounds 7] [--quick]

Each measurement is a process of its own, with the one checkout or the other on its path; the two take turns, and which
one begins changes from round to round. `ratio` is this checkout's rate to the other's in the same round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
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
from tqdm import tqdm

from flow.command import Parser
from loaders.index import open_index

#: Runs on what both checkouts have. Arguments: packed set, stream, crop, batch size, batches. Prints samples/s.
LOAD = """
import sys, time
from loaders.batch import StreamSpec
from loaders.dali_loader import train_loader
from loaders.index import open_index
root, stream, (crop_px, batch_size, batches) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
index = open_index(root)
spec = StreamSpec(stream=stream, crop_px=crop_px)
with train_loader(index, index.split("split1_train"), spec, seed=0, batch_size=batch_size) as loader:
    for _ in range(8):  # more than are read ahead
        next(loader)
    start_s = time.perf_counter()
    for _ in range(batches):
        next(loader)
    print(batches * batch_size / (time.perf_counter() - start_s))
"""

#: Arguments: folder of videos, folder to pack into, smaller side in px. Prints frames/s.
PACK = """
import sys, time
from pathlib import Path
from flow.pack import pack
if __name__ == "__main__":
    start_s = time.perf_counter()
    report = pack(Path(sys.argv[1]), Path(sys.argv[2]), size_px=int(sys.argv[3]), num_workers=2)
    print(report.dataset["num_frames"] / (time.perf_counter() - start_s))
"""


def rate(checkout: Path, program: str, *arguments: object) -> float:
    """What a program prints, run in a checkout."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # a file: processes that it spawns import it
        script.write(program)
        script.flush()
        command = [sys.executable, script.name, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        result = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{checkout} fails: {(result.stderr.splitlines() or ['without a word'])[-1]}")
    return float(result.stdout.split()[-1])


def commit_of(checkout: Path) -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True)
    if found.returncode or not (checkout / "loaders").is_dir():
        raise ValueError(f"{checkout} is no checkout of this project. Make one: git worktree add --detach DIR COMMIT")
    return found.stdout.strip()


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Loading and packing of this checkout against another one.")
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="checkout of the other commit")
    add_data(parser)
    parser.add_argument("--videos", type=Path, metavar="DIR", help="class folders to pack (default: generated ones)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default %(default)s")
    parser.add_argument("--batches", type=int, default=60, metavar="N", help="of a turn (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="one round of few batches: does it run?")
    add_out(parser, "before_after")
    options = parser.parse_args(argv)
    less = {"quick": options.quick, "generated": options.data is None or options.videos is None}
    less["partial"] = options.rounds < parser.get_default("rounds")
    out = result_path(options.out, "before_after", **less)
    if options.quick:
        options.rounds, options.batches, options.batch_size = 1, 2, 8
    before = options.before.resolve()
    commit = commit_of(before)
    with tempfile.TemporaryDirectory() as folder:
        if less["generated"]:
            generated = demo_set(Path(folder), 64 if options.quick else 256)
        data, videos = options.data or generated, options.videos or Path(folder) / "videos"
        crop_px = choose_crop_px(data)
        config = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
        config |= {"before_commit": commit, "crop_px": crop_px}
        config |= {"data": describe_data(open_index(data), options.data is None)}
        rows = measure(options, before, (data.resolve(), videos.resolve()), crop_px, Path(folder))
    write_result(out, config, rows=rows)
    for row in rows:
        print(
            f"{row['name']}: {row['after']['median']:,.1f} against {row['before']['median']:,.1f} {row['unit']}, ",
            end="",
        )
        print(f"ratio {row['ratio']['median']:.3f} ({row['ratio']['min']:.3f} to {row['ratio']['max']:.3f})")
    print(f"written to {out}")
    return 0


def measure(
    options: argparse.Namespace, before: Path, inputs: tuple[Path, Path], crop_px: int, folder: Path
) -> list[dict[str, Any]]:
    """A row for each stream's loader, and for packing."""
    data, videos = inputs
    shape = (crop_px, options.batch_size, options.batches)
    side = 64 if options.quick else 256
    cases: list[tuple[str, str, str, tuple[object, ...]]] = [
        (f"loader_{stream}", "samples/s", LOAD, (data, stream, *shape)) for stream in ("temporal", "spatial")
    ]
    cases.append(("pack", "frames/s", PACK, (videos, "OUT", side)))
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in cases}
    for round_ in tqdm(range(options.rounds), desc="rounds", disable=None):
        for name, _, program, arguments in cases:
            turn = {}
            for checkout in (before, ROOT) if round_ % 2 else (ROOT, before):
                target = folder / f"{name}-{round_}-{checkout == ROOT}"
                turn[checkout] = rate(checkout, program, *(target if word == "OUT" else word for word in arguments))
            rates[name].append((turn[before], turn[ROOT]))
    return [
        {
            "name": name,
            "unit": unit,
            "before": spread([old for old, _ in rates[name]]),
            "after": spread([new for _, new in rates[name]]),
            "ratio": spread([new / old for old, new in rates[name]]),
        }
        for name, unit, *_ in cases
    ]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    sys.exit(main())
