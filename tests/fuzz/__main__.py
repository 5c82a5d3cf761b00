"""The campaign: `python -m tests.fuzz [--seconds 1800] [--seed S] [TARGET ...]`.

Targets take turns, each in a child process (tests.fuzz.child) with limits on time and memory, until the seconds are
used up. Counts go to fuzz.json, in full after the last turn and as a partial result after each one.
Exit code 1: something was found; the inputs are named.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import add_out, result_path, write_result
from flow.command import Parser, did_you_mean, say
from tests.fuzz.child import LIMIT_MB, TIMEOUT_S
from tests.fuzz.targets import TARGETS

#: What a campaign must last to count.
FULL_S = 1800
CHILD = ["-m", "tests.fuzz.child"]
_STATS = {"runs": r"stat::number_of_executed_units:\s+(\d+)", "peak_rss_mb": r"stat::peak_rss_mb:\s+(\d+)"}
_STATS |= {"edges": r"^#\d+\t.* cov: (\d+)"}
_PULSE = r"^#(\d+)\t"


def take_turn(name: str, work: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Run one child; what it counted: seconds, runs, peak_rss_mb, edges of our code that were reached, and how it
    ended: "done" or a cause of death."""
    command = [sys.executable, *CHILD, name, "--work", work, "--seconds", seconds, "--seed", seed]
    log, start = work / f"{name}.log", time.monotonic()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # writing files to a disk takes longer than reading them
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as folder, open(log, "wb") as file:
        environment = {**os.environ, "TMPDIR": folder}
        child = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = child.wait(seconds + 4 * TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            child.kill()
            child.wait()
    text = log.read_text("utf-8", "replace")
    counted = {key: [int(n) for n in re.findall(pattern, text, re.MULTILINE)] for key, pattern in _STATS.items()}
    counted["runs"] = counted["runs"] or [int(n) for n in re.findall(_PULSE, text, re.MULTILINE)]
    causes = [word for word in ("timeout", "out-of-memory") if f": {word}" in text]
    ended = "done" if code == 0 and counted["peak_rss_mb"] else "hang" if code is None else [*causes, "crash"][0]
    numbers = {key: max(values, default=0) for key, values in counted.items()}
    if ended != "done":
        (work / "crashers" / f"{name}-{seed}.log").write_text(text)
    return {"seconds": round(time.monotonic() - start, 1), **numbers, "ended": ended}


def findings(work: Path) -> list[dict[str, Any]]:
    """What children noted, each (target, place) once."""
    path = work / "findings.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(record["target"], record["place"]): record for record in reversed(records)}.values())


def summary(turns: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of turns, and what was found in them."""
    seconds, runs = sum(turn["seconds"] for turn in turns), sum(turn["runs"] for turn in turns)
    ends = [turn["ended"] for turn in turns]
    return {
        "seconds": round(seconds, 1),
        "runs": runs,
        "runs_per_s": round(runs / max(seconds, 0.1), 1),
        "peak_rss_mb": max((turn["peak_rss_mb"] for turn in turns), default=0),
        "edges": max((turn["edges"] for turn in turns), default=0),
        "exceptions": len(found),
        "crashes": ends.count("crash"),
        "timeouts": ends.count("timeout") + ends.count("hang"),
        "out_of_memory": ends.count("out-of-memory"),
    }


def campaign(names: list[str], work: Path, out: Path, seconds: float, turn_s: float, seed: int) -> int:
    """Let targets take turns; how much was found."""
    config = {"seconds": seconds, "turn_s": turn_s, "seed": seed, "targets": names}
    config |= {"limit_mb": LIMIT_MB, "timeout_s": TIMEOUT_S, "atheris": version("atheris")}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rounds = max(1, round(seconds / turn_s / len(names)))
    share = seconds / rounds / len(names)
    for number in tqdm(range(rounds * len(names)), desc="turns", unit="turn", disable=None):
        name = names[number % len(names)]
        turn = take_turn(name, work, share, seed + number)
        turns[name].append(turn)
        found = findings(work)
        by_target = {
            key: summary(value, [one for one in found if one["target"] == key]) for key, value in turns.items() if value
        }
        total = summary([turn for value in turns.values() for turn in value], found)
        places = [{key: one[key] for key in ("target", "place", "input")} for one in found]
        complete = number + 1 == rounds * len(names)
        write_result(out, config, complete=complete, total=total, targets=by_target, findings=places)
        say(f"{name}: {turn['runs']:,} runs in {turn['seconds']:.0f} s, {turn['ended']}")
    for one in found:
        print(f"{one['target']}: {one['place']}: {work / 'crashers' / one['input']}\n{one['traceback']}")
    bad = sum(total[key] for key in ("exceptions", "crashes", "timeouts", "out_of_memory"))
    print(
        f"inputs: {total['runs']:,}, findings: {bad}; {out}" + (f"; inputs and logs in {work}/crashers" if bad else "")
    )
    return bad


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m tests.fuzz",
        description="Feed mutated files to every reader.",
        epilog="exit code: 0 nothing was found; 1 something was, the inputs are named; 130 stopped",
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all: {' '.join(TARGETS)}")
    parser.add_argument(
        "--seconds", type=float, default=FULL_S, metavar="S", help="of the whole campaign (default %(default)s)"
    )
    parser.add_argument("--turn", type=float, default=45, metavar="S", help="length of a turn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the mutations (default %(default)s)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder of corpus and findings (default: a temporary one, kept)"
    )
    add_out(parser, "fuzz")
    options = parser.parse_args(argv)
    if unknown := set(options.targets) - set(TARGETS):
        near = did_you_mean(min(unknown), TARGETS)
        parser.error(f"unknown target {min(unknown)!r}; there are {', '.join(TARGETS)}.{near}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("Atheris is not installed: pip install -e '.[fuzz]'.")
    names = options.targets or list(TARGETS)
    work = options.work or Path(tempfile.mkdtemp(prefix="fuzz-"))
    work.mkdir(parents=True, exist_ok=True)
    out = result_path(options.out, "fuzz", quick=options.seconds < FULL_S, partial=len(names) < len(TARGETS))
    print(f"seed {options.seed}, corpus and findings in {work}", flush=True)
    try:
        return int(campaign(names, work, out, options.seconds, options.turn, options.seed) > 0)
    except KeyboardInterrupt:
        print(f"interrupted; what was counted stands in {out.with_suffix('.partial.json')}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
