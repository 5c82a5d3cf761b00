"""A prediction of scale_model.py's simulation, written down first, and then held against a pack on this machine.

    python benchmarks/scale_check.py predict --videos DIR [--from DIR]
    python benchmarks/scale_check.py measure --videos DIR
    python benchmarks/scale_check.py known --videos DIR [--from DIR]

`predict` simulates `flow.pack` of some whole clips by 1 process and by one on every core, from scale_costs.json alone.
`measure` packs these clips, rounds interleaved, and writes what it took beside what was predicted; a later commit than
the prediction shows the order. Seconds by the clock tell also of whatever else ran; CPU seconds of the processes tell
less of it. `known` adds the pack that flow_extraction.json has timed, of other clips and known before: no prediction,
but measured while nothing else ran.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, add_out, errors_in_a_line, result_path, write_result
from flow_works import choose_clips
from pack_parts import spread
from scale_extraction import Cluster, Extraction, Work

from flow.command import Parser
from flow.pack import VIDEOS_PER_SHARD
from flow.pool import default_num_workers
from flow.video import read_header

NAME = "scale_check"
#: Of a full check; one of fewer is a partial result.
CLIPS, ROUNDS = 16, 3


def predict(clips: list[Path], costs: dict[str, Any]) -> list[dict[str, float]]:
    """A row for each number of processes that costs were measured with: seconds by the clock, and of CPU."""
    frames = np.array([read_header(clip).num_frames for clip in clips], float)
    startup = {row["processes"]: row["s"]["median"] for row in costs["startup"]}
    rows = []
    for n in sorted(startup):
        stages = [row["ms_per_frame"]["median"] for row in costs["stages"] if row["processes"] == n]
        each = costs["bytes"]["rgb_frame"] + costs["bytes"]["forward_field"] + costs["bytes"]["tar_per_frame"]
        work = Work(
            frames=frames,
            s_per_frame=sum(stages) / 1e3,
            bytes_per_frame=each,
            videos_per_shard=VIDEOS_PER_SHARD,
            pace=np.array(costs["videos"]["pace"]),
        )
        joined = 1e6 * costs["join"]["mb_per_s"]["max"]
        cluster = Cluster(nodes=1, cores=n, join_bytes_per_s=joined, startup_s=startup[n])
        seconds = [Extraction(work, cluster, seed).run()["seconds"] for seed in range(20)]
        rows.append(
            {"processes": n, "predicted_s": spread(seconds), "predicted_cpu_s": frames.sum() * sum(stages) / 1e3}
        )
    return rows


def pack_once(clips: list[Path], workers: int, folder: Path) -> tuple[float, float]:
    """Seconds of a pack by the clock, and of CPU of its processes and the one that starts them."""
    shutil.rmtree(folder / "packed", ignore_errors=True)
    command = [sys.executable, "-m", "flow.pack", "--videos", str(folder / "clips"), "--out", str(folder / "packed")]
    command += ["--dataset", "folder", "--workers", str(workers)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(clips: list[Path], rows: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """The predicted rows with what was measured, and the prediction's error."""
    found: dict[int, list[tuple[float, float]]] = {row["processes"]: [] for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for clip in clips:
            copy = folder / "clips" / clip.parent.name / clip.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, copy)
        for _ in range(rounds):
            for workers, times in found.items():
                times.append(pack_once(clips, workers, folder))
    measured = []
    for row in rows:
        seconds, cpu = ([turn[i] for turn in found[row["processes"]]] for i in (0, 1))
        error = 100 * (row["predicted_s"]["median"] / spread(seconds)["median"] - 1)
        cpu_error = 100 * (row["predicted_cpu_s"] / spread(cpu)["median"] - 1)
        times = {"measured_s": spread(seconds), "measured_cpu_s": spread(cpu)}
        measured.append({**row, **times, "error_pct": error, "cpu_error_pct": cpu_error})
    return measured


def compare_known(videos: Path, costs: dict[str, Any], extraction: dict[str, Any]) -> dict[str, Any]:
    """The simulation of the pack in flow_extraction.json, and what that took."""
    pack, config = extraction["pack"], extraction["config"]
    clips = choose_clips(videos, config["pack_clips"])
    row = next(row for row in predict(clips, costs) if row["processes"] == config["cores"])
    error = 100 * (row["predicted_s"]["median"] / pack["pack_s"] - 1)
    simulated = {"processes": row["processes"], "clips": len(clips), "simulated_s": row["predicted_s"]}
    return {**simulated, "measured_s": pack["pack_s"], "error_pct": error}


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="What a pack takes, predicted by the simulation, and measured.")
    parser.add_argument("step", choices=["predict", "measure", "known"], help="predict comes first")
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of class folders of videos")
    parser.add_argument("--clips", type=int, default=CLIPS, metavar="N", help="that are packed (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="of measuring (default %(default)s)")
    parser.add_argument(
        "--from", dest="results", type=Path, default=RESULTS, metavar="DIR", help="folder of other results"
    )
    add_out(parser, NAME)
    options: argparse.Namespace = parser.parse_args(argv)
    few = options.clips < CLIPS
    out = result_path(options.out, NAME, partial=few)
    config: dict[str, Any] = {"clips": options.clips, "cores": default_num_workers(), "method": "dis"}
    clips = choose_clips(options.videos, options.clips)
    content: dict[str, Any] = {}
    costs, extraction = (
        json.loads((options.results / f"{name}.json").read_text()) for name in ("scale_costs", "flow_extraction")
    )
    if options.step == "predict":
        rows = predict(clips, costs)
    elif options.step == "known":
        earlier = json.loads(out.read_text())
        config, rows = earlier["config"], earlier["rows"]
        content = {"known": compare_known(options.videos, costs, extraction)}
    else:
        earlier = json.loads(out.read_text())
        if earlier["config"]["clips"] != options.clips:
            raise ValueError(f"--clips {options.clips}: {out} predicts {earlier['config']['clips']}. Predict it first.")
        config |= {"rounds": options.rounds, "load_average": os.getloadavg()[0], "predicted_at": earlier["commit"]}
        out = result_path(options.out, NAME, partial=few or options.rounds < ROUNDS)
        rows = measure(clips, [{k: row[k] for k in PREDICTED} for row in earlier["rows"]], options.rounds)
    write_result(out, config, rows=rows, **content)
    for row in rows:
        print(json.dumps(row))
    print(f"written to {out}")
    return 0


PREDICTED = ("processes", "predicted_s", "predicted_cpu_s")

if __name__ == "__main__":
    sys.exit(main())
