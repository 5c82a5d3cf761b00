"""Injects every fault and counts what survives: `python -m tests.faults [--seed S] [--short] [CASE ...]`.

The last line is `faults injected: N, survived: N, data lost: 0`; the exit code is 1 if it says anything else. Each case
prints its seed; `--seed S CASE` draws the same again, as far as a kill at a drawn moment can be the same.
"""

import os
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common import add_out, result_path, write_result
from flow.command import Parser, did_you_mean, say
from tests.faults import Fault, disks, packing, shards, training

Case = Callable[[np.random.Generator, Path, bool], Iterator[Fault]]
CASES: dict[str, Case] = {}
for _module in (packing, disks, training, shards):
    CASES |= _module.CASES


def run_case(name: str, seed: int, short: bool) -> Iterator[Fault]:
    """The faults of a case. One that raises, or injects nothing, is a fault that was not survived."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    num_faults = 0
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        try:
            for fault in CASES[name](rng, Path(folder), short):
                num_faults += not isinstance(fault, disks.NotInjected)
                yield fault
        except Exception as error:
            traceback.print_exc()
            yield Fault("the case itself", survived=False, note=f"{type(error).__name__}: {error}")
            return
    if not num_faults:
        yield Fault("the case itself", survived=False, note="injected nothing")


def run_and_print(name: str, seed: int, short: bool) -> dict[str, Any]:
    """Row of a case for the table and the results file; a line for every fault as it happens."""
    say(f"{name} (seed {seed})")
    start_s = time.monotonic()
    faults = []
    for fault in run_case(name, seed, short):
        outcome = "survived" if fault.survived and not fault.lost else f"NOT SURVIVED, {fault.lost} lost: {fault.note}"
        if isinstance(fault, disks.NotInjected):
            outcome = "not injected"
        say(f"  {fault.what}: {outcome}")
        faults.append(fault)
    injected = [fault for fault in faults if not isinstance(fault, disks.NotInjected)]
    return {
        "name": name,
        "injected": len(injected),
        "survived": sum(fault.survived for fault in injected),
        "lost": sum(fault.lost for fault in faults),
        "seconds": round(time.monotonic() - start_s, 1),
        "not_injected": [fault.what for fault in faults if fault not in injected],
        "faults": [asdict(fault) for fault in injected],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':<40} injected survived lost seconds"]
    lines += [
        f"{row['name']:<40} {row['injected']:>8} {row['survived']:>8} {row['lost']:>4} {row['seconds']:>7.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m tests.faults",
        description="Inject faults, count what survives.",
        epilog="exit code: 0 all survived, nothing lost; 1 otherwise",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all; {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is random (default: drawn)")
    parser.add_argument("--short", action="store_true", help="the few of each case that `make test` has time for")
    add_out(parser, "faults")
    options = parser.parse_args(argv)
    # Killed processes leave semaphores; what frees them at the end would say so behind the last line.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    if unknown := set(options.cases) - set(CASES):
        near = did_you_mean(min(unknown), CASES)
        parser.error(f"no such case: {', '.join(sorted(unknown))}. Known: {', '.join(CASES)}.{near}")
    names = options.cases or list(CASES)
    seed = np.random.SeedSequence().generate_state(1).item() if options.seed is None else options.seed
    out = result_path(options.out, "faults", quick=options.short, partial=bool(options.cases))
    config = {"seed": seed, "short": options.short, "cases": names}
    rows: list[dict[str, Any]] = []
    for name in tqdm(names, desc="cases", unit="case", disable=None):
        rows.append(run_and_print(name, seed, options.short))
        totals = {key: sum(row[key] for row in rows) for key in ("injected", "survived", "lost", "seconds")}
        write_result(out, config, complete=len(rows) == len(names), **totals, rows=rows)
    print(f"\n{table(rows)}\n\nwritten to {out}")
    injected, survived, lost = (totals[key] for key in ("injected", "survived", "lost"))
    print(f"faults injected: {injected}, survived: {survived}, data lost: {lost}")
    return int(survived != injected or lost > 0)


if __name__ == "__main__":
    sys.exit(main())
