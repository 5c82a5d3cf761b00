"""Does decoding once and stacking many cost accuracy? The temporal net on real clips with k = 1, 4 and 8.

    python benchmarks/windows_accuracy.py --data PACKED [--k 1 4 8] [--splits 1 2 3] [--seeds 0 1 2] [--runs DIR]

Everything but `data.stacks_per_window` is the same: config, seeds and number of samples. Trains what is not trained
yet, pools the splits, and pairs the runs video by video; intervals as in accuracy.py. The schedule is shorter than that
of ucf101_mini, so that 27 runs fit into two hours of two cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from accuracy import collect
from common import RESULTS, write_result

import numpy as np  # isort: skip

from loaders.index import open_index
from train.config import differing_keys, read_config, resolve_config, to_flat
from train.fuse import source_group
from train.log import read_log
from train.statistics import bootstrap_pct

OVERRIDES = [
    "train.streams=[temporal]",
    "temporal.steps=400",
    "temporal.milestones=[250,350]",
    "eval.num_taus_train=1",  # nothing is fused here
]


def train_missing(options: argparse.Namespace, k: int, folder: Path) -> list[Path]:
    """Folders of all runs with one k; those without results are trained, or go on."""
    runs = []
    for seed in options.seeds:
        for split in options.splits:
            run = folder / f"split{split}_seed{seed}"
            runs.append(run)
            overrides = [f"data.root={options.data}", f"data.split=split{split}", f"train.seed={seed}"]
            overrides += [f"data.stacks_per_window={k}", *OVERRIDES, *options.overrides]
            if not (run / "results.json").exists():
                command = ["--gpus", "0", "--config", options.config, "--run", str(run), *overrides]
                subprocess.run([sys.executable, "-m", "train.launch", *command], check=True)
            elif differing := differing_keys(
                read_config(run / "config.yaml"), resolve_config(options.config, overrides)
            ):
                sys.exit(f"{run} was trained with another config: {'; '.join(differing)}. Choose another --runs.")
    return runs


def summarise(values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Mean of values (V,) with its interval over sources, in percent."""
    return {"pct": float(100 * values.mean()), "interval_95_pct": bootstrap_pct(values, groups)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Accuracy of the temporal net by stacks per window.")
    parser.add_argument("--data", type=Path, required=True, help="packed data set with its splits")
    parser.add_argument("--config", default="ucf101_mini")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 8], help="the first is what the others are held to")
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/windows"))
    parser.add_argument("--out", type=Path, default=RESULTS / "windows_accuracy.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train.launch")
    options = parser.parse_intermixed_args(argv)

    index = open_index(options.data)
    splits = [f"split{split}" for split in options.splits]
    correct: dict[int, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for k in options.k:
        runs = train_missing(options, k, options.runs / f"k{k}")
        methods, ids, _ = collect(options.runs / f"k{k}", index, splits, options.seeds)
        correct[k] = methods["temporal"]
        groups = np.array([source_group(video_id) for video_id in ids])
        lines = [line for run in runs for line in read_log(run / "temporal" / "log.jsonl")]
        row = {"k": k, **summarise(correct[k], groups)}
        row["data_wait_pct"] = float(np.median([line["data_wait_pct"] for line in lines]))
        if k != options.k[0]:
            row["difference"] = summarise(correct[k] - correct[options.k[0]], groups)
        rows.append(row)
    resolved = {key: v for key, v in to_flat(read_config(runs[0] / "config.yaml")).items() if key != "data.root"}
    config: dict[str, Any] = {"dataset": index.fingerprint, "resolved": resolved, "overrides": options.overrides}
    config |= {"splits": options.splits, "seeds": options.seeds}
    counts = {"num_videos": len(ids), "num_sources": len(set(groups)), "num_seeds": len(options.seeds)}
    write_result(options.out, config, **counts, chance_pct=100 / len(index.classes), rows=rows)
    for row in rows:
        print(row)
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
