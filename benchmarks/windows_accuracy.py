"""Does decoding once and stacking many cost accuracy? The temporal net on real clips with k = 1, 4 and 8.

    python benchmarks/windows_accuracy.py --data PACKED [--k 1 4 8] [--splits 1 2 3] [--seeds 0 1 2] [--runs DIR]

Everything but `data.stacks_per_window` is the same: config, seeds and number of samples. Trains what is not trained
yet, pools the splits, and pairs the runs video by video; intervals as in accuracy.py. The schedule is shorter than that
of ucf101_mini, so that 27 runs fit into two hours of two cores.
"""

import signal
import sys
from pathlib import Path
from typing import Any

from accuracy import collect
from common import add_out, errors_in_a_line, result_path, write_result
from trained import Arm, compare, list_runs, train_missing

import numpy as np  # isort: skip

from flow.command import Parser
from loaders.index import open_index
from train.config import read_config, to_flat
from train.fuse import source_group
from train.log import read_log

OVERRIDES = (
    "train.streams=[temporal]",
    "temporal.steps=400",
    "temporal.milestones=[250,350]",
    "eval.num_taus_train=1",  # nothing is fused here
)


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Accuracy of the temporal net by stacks per window.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="packed data set with its splits")
    parser.add_argument("--config", default="ucf101_mini", metavar="NAME", help="of the runs (default %(default)s)")
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[1, 4, 8],
        metavar="K",
        help="stacks of a window; the first is what the others are held to (default: 1 4 8)",
    )
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="official ones (default: 1 2 3)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the runs (default: 0 1 2)"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/windows"), metavar="DIR", help="of the runs (default %(default)s)"
    )
    add_out(parser, "windows_accuracy")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train.launch")
    options = parser.parse_intermixed_args(argv)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: ends the run in work too
    index = open_index(options.data)
    splits = [f"split{split}" for split in options.splits]
    arms = [Arm(f"k{k}", options.data, (f"data.stacks_per_window={k}",)) for k in options.k]
    schedule = [*OVERRIDES, *options.overrides]
    runs = list_runs(arms, options.runs, options.config, options.splits, options.seeds, schedule)
    train_missing(runs)
    correct: dict[str, np.ndarray] = {}
    waits: dict[str, float] = {}
    for arm in arms:
        methods, ids, _ = collect(options.runs / arm.name, index, splits, options.seeds)
        correct[arm.name] = methods["temporal"].mean(0)
        logs = [read_log(run.folder / "temporal" / "log.jsonl") for run in runs if run.folder.parent.name == arm.name]
        waits[arm.name] = float(np.median([line["data_wait_pct"] for log in logs for line in log]))
    groups = np.array([source_group(video_id) for video_id in ids])
    compared = compare(correct, groups)
    rows: list[dict[str, Any]] = [{"k": k, **compared[f"k{k}"], "data_wait_pct": waits[f"k{k}"]} for k in options.k]
    resolved = {key: v for key, v in to_flat(read_config(runs[0].folder / "config.yaml")).items() if key != "data.root"}
    config: dict[str, Any] = {"dataset": index.fingerprint, "resolved": resolved, "overrides": options.overrides}
    config |= {"splits": options.splits, "seeds": options.seeds}
    counts = {"num_videos": len(ids), "num_sources": len(set(groups)), "num_seeds": len(options.seeds)}
    out = result_path(options.out, "windows_accuracy")
    write_result(out, config, **counts, chance_pct=100 / len(index.classes), rows=rows)
    for row in rows:
        print(row)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
