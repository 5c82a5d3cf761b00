"""The main job on real clips: both streams and their fusions, pooled over official splits and seeds, with intervals.

    python benchmarks/accuracy.py --data PACKED [--config ucf101_mini] [--splits 1 2 3] [--seeds 0 1 2] [--runs DIR]

Trains what is not trained yet (a run that was stopped goes on), then reads every run's results. The test lists of the
splits share no source video, so their videos are pooled; a video's correctness is averaged over the seeds. Videos cut
from one source are alike, so the intervals, 95 %, are bootstrapped over *sources*, and so are the paired differences.

The floor that a temporal net has to beat is measured beside it: a histogram of flow, per video, with a linear SVM.
"""

import argparse
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from common import add_out, errors_in_a_line, result_path, write_result

import numpy as np  # isort: skip
from sklearn.preprocessing import normalize
from tqdm import tqdm

from flow.clips import read_member
from flow.codec import decode_component
from flow.command import Parser
from flow.fields import subtract_mean
from flow.index import take_entries
from loaders.index import Index, open_index
from train.config import read_config, to_flat
from train.fuse import TITLES, choose_C, fit_svm, source_group
from train.settings import FuseConfig
from train.statistics import bootstrap_pct

NUM_BINS, GRID, STILL_PX = 8, 3, 0.15
FLOOR = "Histogram of flow, linear SVM"


def flow_histogram(index: Index, row: int) -> np.ndarray:
    """Histogram of flow of a video: (GRID * GRID * (NUM_BINS + 1),), square root of the shares, as is usual for them.

    Each vector of each second field, less the field's mean, votes with its length for its direction, in its cell of a
    3x3 grid; vectors shorter than STILL_PX px vote for "still". Votes are summed over the video.
    """
    histogram = np.zeros((GRID, GRID, NUM_BINS + 1))
    shard = index.root / index.shards[index.shard[row]]
    for frame in range(0, int(index.num_frames[row]) - 1, 2):
        components, means = [], []
        for kind in ("dx", "dy"):
            (entry,) = take_entries(index.entries[kind], kind, index.first_row[row : row + 1] + frame)
            jpeg = read_member(shard, entry, kind)
            components.append(decode_component(jpeg, float(entry["lo"]), float(entry["hi"])))
            means.append(entry["mean"])
        field = subtract_mean(np.stack(components), np.array(means, np.float32))
        length = np.hypot(*field)
        turn = (np.arctan2(field[1], field[0]) / (2 * np.pi) + 0.5 / NUM_BINS) % 1
        bins = np.where(length < STILL_PX, NUM_BINS, (turn * NUM_BINS).astype(int) % NUM_BINS)
        votes = np.where(length < STILL_PX, STILL_PX, length)
        for y, x in np.ndindex(GRID, GRID):
            cell = np.s_[y * length.shape[0] // GRID : (y + 1) * length.shape[0] // GRID,
                         x * length.shape[1] // GRID : (x + 1) * length.shape[1] // GRID]  # fmt: skip
            histogram[y, x] += np.bincount(bins[cell].ravel(), votes[cell].ravel(), NUM_BINS + 1)
    return np.sqrt(histogram.ravel() / histogram.sum())


def floor_predictions(index: Index, splits: list[str]) -> dict[str, np.ndarray]:
    """Split -> predicted classes of its test list, by a linear SVM on histograms; C chosen within the training list."""
    rows = range(index.num_videos)
    features = normalize([flow_histogram(index, row) for row in tqdm(rows, desc="histograms", disable=None)])
    predicted = {}
    for split in splits:
        train, test = index.split(f"{split}_train"), index.split(f"{split}_test")
        groups = [source_group(video_id) for video_id in index.video_ids(train)]
        grid = FuseConfig(C=[0.1, 1.0, 10.0, 100.0, 1000.0])
        best, _ = choose_C(features[train], index.labels[train], groups, grid)
        predicted[split] = fit_svm(features[train], index.labels[train], best).predict(features[test])
    return predicted


def collect(runs: Path, index: Index, splits: list[str], seeds: list[int]) -> tuple[dict[str, np.ndarray], list, dict]:
    """Method -> correctness (seeds, V) of the pooled test videos; their ids; and the pooled confusions."""
    found: dict[str, list[np.ndarray]] = {}
    confusions: dict[str, np.ndarray] = {}
    ids: list[str] = []
    for split in splits:
        results = [json.loads((runs / f"{split}_seed{seed}" / "results.json").read_text()) for seed in seeds]
        if any(r["dataset"] != index.fingerprint or r["video_ids"] != results[0]["video_ids"] for r in results):
            sys.exit(f"runs of {split} in {runs} are of another data set than {index.root}; choose another --runs")
        ids += results[0]["video_ids"]
        labels = np.array(results[0]["labels"])
        for method in results[0]["methods"]:
            predicted = np.array([r["methods"][method]["predicted"] for r in results])  # (seeds, videos)
            found.setdefault(method, []).append((predicted == labels).astype(float))
            counts = confusions.setdefault(method, np.zeros((len(index.classes),) * 2, int))
            np.add.at(counts, (np.broadcast_to(labels, predicted.shape), predicted), 1)
    return {method: np.concatenate(parts, axis=1) for method, parts in found.items()}, ids, confusions


def data_wait_pct(runs: list[Path]) -> dict[str, dict[str, float]]:
    """Stream -> median data_wait_pct and samples_per_s over the log lines of all runs."""
    medians: dict[str, dict[str, float]] = {}
    for stream in ("spatial", "temporal"):
        lines = [json.loads(line) for run in runs for line in (run / stream / "log.jsonl").read_text().splitlines()]
        medians[stream] = {
            key: float(np.median([line[key] for line in lines])) for key in ("data_wait_pct", "samples_per_s")
        }
    return medians


def train_missing(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Folders of all runs, (seed, split) by (seed, split); those without results are trained, or go on."""
    runs = []
    for seed in options.seeds:
        for split in options.splits:
            run = folder / f"split{split}_seed{seed}"
            runs.append(run)
            # A finished run costs seconds; one with another config is refused.
            arguments = ["--gpus", "0", "--config", options.config, "--run", str(run)]
            arguments += [f"data.root={options.data}", f"data.split=split{split}", f"train.seed={seed}"]
            subprocess.run([sys.executable, "-m", "train.launch", *arguments, *options.overrides], check=True)
    return runs


def analyse(correct: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, Any]:
    """Accuracy of every method and the paired difference of every two, each with its interval, in percent."""

    def with_interval(values: np.ndarray) -> dict[str, Any]:
        return {"pct": float(100 * values.mean()), "interval_95_pct": bootstrap_pct(values, groups)}

    titles = {**TITLES, "floor": FLOOR}
    return {
        "methods": {method: {"title": titles[method], **with_interval(v)} for method, v in correct.items()},
        "differences": {f"{a} - {b}": with_interval(correct[a] - correct[b]) for a, b in combinations(correct, 2)},
    }


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Accuracy on real clips, pooled over splits and seeds.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="packed data set with its splits")
    parser.add_argument("--config", default="ucf101_mini", metavar="NAME", help="of the runs (default %(default)s)")
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="official ones (default: 1 2 3)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the runs (default: 0 1 2)"
    )
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/CONFIG)")
    add_out(parser, "accuracy_CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for train.launch")
    options = parser.parse_intermixed_args(argv)

    index = open_index(options.data)
    folder = options.runs or Path("runs") / options.config
    splits = [f"split{split}" for split in options.splits]
    runs = train_missing(options, folder)
    by_seed, ids, confusions = collect(folder, index, splits, options.seeds)
    correct = {method: values.mean(0) for method, values in by_seed.items()}
    floor = floor_predictions(index, splits)
    correct["floor"] = np.concatenate([floor[s] == index.labels[index.split(f"{s}_test")] for s in splits]).astype(
        float
    )
    groups = np.array([source_group(video_id) for video_id in ids])
    result = {
        "num_videos": len(ids),
        "num_sources": len(set(groups)),
        "num_seeds": len(options.seeds),
        "chance_pct": 100 / len(index.classes),
        "classes": index.classes,
        **analyse(correct, groups),
        "confusions": {method: counts.tolist() for method, counts in confusions.items()},
        "training": data_wait_pct(runs),
    }
    out = result_path(options.out, f"accuracy_{Path(options.config).stem}")
    # The data set is named by its bytes, not by where it lies.
    resolved = {key: v for key, v in to_flat(read_config(runs[0] / "config.yaml")).items() if key != "data.root"}
    config: dict[str, Any] = {"dataset": index.fingerprint, "resolved": resolved}
    config |= {"splits": options.splits, "seeds": options.seeds, "overrides": options.overrides}
    write_result(out, config, **result)
    for title, row in [(m["title"], m) for m in result["methods"].values()] + list(result["differences"].items()):
        low, high = row["interval_95_pct"]
        print(f"{title:32} {row['pct']:6.1f}   {low:.1f} to {high:.1f}")
    print(
        f"in %, of {len(ids)} test videos from {len(set(groups))} sources, {len(options.seeds)} seeds; written to {out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
