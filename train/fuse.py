"""Late fusion of the streams and the final table: `python -m train.fuse RUN [RUN_B]`.

Two ways (sec. 2): the average of the softmax scores, and a multi-class linear SVM on stacked L2-normalised scores. The
SVM, with its C, is fitted on the *training* videos' scores; test videos are only predicted. Caution: the nets have seen
the training videos, so those scores are over-confident: they hardly show which stream errs where, and where the nets
fit their training set perfectly the SVM has nothing to learn.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GroupKFold
from sklearn.svm import LinearSVC

from flow.shard import write_bytes, write_json
from train.config import STREAMS, FuseConfig, read_config
from train.evaluate import scores_path
from train.scores import Scores, check_aligned, read_scores

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TITLES = {
    "spatial": "Spatial ConvNet",
    "temporal": "Temporal ConvNet",
    "average": "Two-stream, averaging",
    "svm": "Two-stream, SVM",
}


@dataclass(frozen=True)
class Results:
    """Predictions of each method for the same test videos.

    predicted: method ("spatial", "temporal", "average", "svm") -> (V,) classes. svm_C: the C that cross-validation
    chose; svm_accuracy: C -> accuracy in cross-validation on training videos; None and empty without fusion.
    """

    video_ids: list[str]
    labels: Ints
    classes: list[str]
    split_list: str
    dataset: str
    predicted: dict[str, Ints]
    svm_C: float | None
    svm_accuracy: dict[float, float]


# --- the two ways ------------------------------------------------------------------------------------------------


def average(streams: Sequence[Floats]) -> Floats:
    """Mean of the streams' softmax scores: list of (V, K) -> (V, K), rows sum to 1."""
    return np.mean(streams, axis=0)


def svm_features(streams: Sequence[Floats]) -> Floats:
    """Each stream's score vector divided by its L2 norm, stacked: list of S times (V, K) -> (V, S * K)."""
    return np.concatenate([scores / np.linalg.norm(scores, axis=1, keepdims=True) for scores in streams], axis=1)


def source_group(video_id: str) -> str:
    """Name shared by the videos cut from one source, which cross-validation must not divide.

    UCF-101   Archery/v_Archery_g01_c04                         -> Archery/v_Archery_g01
    HMDB-51   wave/Fellowship_5_wave_u_cm_np1_fr_med_0          -> Fellowship_5
    others    the video id: every video is a group of its own
    """
    if match := re.fullmatch(r"(.+_g\d+)_c\d+", video_id):
        return match[1]
    folder, _, stem = video_id.rpartition("/")
    if match := re.fullmatch(r"(.+)_[fhlu]_(?:cm|nm)_np\d_(?:fr|ba|le|ri)_(?:goo|med|bad)_\d+", stem):
        return match[1].removesuffix(f"_{folder}")
    return video_id


def choose_C(
    features: Floats, labels: Ints, groups: Sequence[str], config: FuseConfig
) -> tuple[float, dict[float, float]]:
    """The best C, of equals the smallest, and the accuracy of every C in cross-validation whose folds divide no group.

    Raises ValueError if there are fewer than two groups.
    """
    num_folds = min(config.folds, len(set(groups)))
    if num_folds < 2:
        raise ValueError("all training videos come from one source; cross-validation of the SVM needs at least two.")
    folds = list(GroupKFold(num_folds, shuffle=True, random_state=0).split(features, labels, groups))
    accuracy: dict[float, float] = {}
    for C in sorted(config.C):
        num_correct = 0
        for fit, held_out in folds:
            predicted = fit_svm(features[fit], labels[fit], C).predict(features[held_out])
            num_correct += int((predicted == labels[held_out]).sum())
        accuracy[C] = num_correct / len(labels)
    return max(accuracy, key=lambda C: (accuracy[C], -C)), accuracy


def fit_svm(features: Floats, labels: Ints, C: float) -> LinearSVC:
    """Multi-class linear SVM of Crammer and Singer on features (V, D) with labels (V,)."""
    svm = LinearSVC(multi_class="crammer_singer", C=C, random_state=0, max_iter=10_000)
    with warnings.catch_warnings():
        # Nets that tell nothing apart, and a high C, may need more iterations: cross-validation judges what came out.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return svm.fit(features, labels)


def svm_predict(
    train: Sequence[Floats], labels: Ints, groups: Sequence[str], test: Sequence[Floats], config: FuseConfig
) -> tuple[Ints, float, dict[float, float]]:
    """Fit the SVM on training videos and predict test videos, whose labels it is never given.

    Args:
        train, test: per stream (V_train, K) and (V_test, K) softmax scores.
        labels, groups: of the training videos.
    Returns the predicted classes (V_test,), the chosen C, and the accuracy of every C in cross-validation.
    """
    features = svm_features(train)
    chosen, accuracy = choose_C(features, labels, groups, config)
    return fit_svm(features, labels, chosen).predict(svm_features(test)), chosen, accuracy


def fuse_runs(runs: Sequence[Path], config: FuseConfig) -> Results:
    """Predictions of each stream, and of both fusions if there are two.

    Args:
        runs: one run folder, or two: the first with the spatial scores, the second with the temporal ones.
    Raises FileNotFoundError if scores are missing, ValueError if they are not of the same videos.
    """
    if len(runs) == 1:
        paths = {stream: runs[0] for stream in STREAMS if scores_path(runs[0], stream, "test").exists()}
        paths = paths or {"spatial": runs[0]}  # reading it reports what is missing
    else:
        paths = dict(zip(STREAMS, runs, strict=True))
    test = [read_scores(scores_path(run, stream, "test")) for stream, run in paths.items()]
    predicted = {scores.stream: scores.scores.argmax(1) for scores in test}
    chosen: float | None = None
    accuracy: dict[float, float] = {}
    if len(test) == 2:
        train = [read_scores(scores_path(run, stream, "train")) for stream, run in paths.items()]
        check_aligned(*test)
        check_aligned(*train)
        predicted["average"] = average([scores.scores for scores in test]).argmax(1)
        groups = [source_group(str(video_id)) for video_id in train[0].video_ids]
        predicted["svm"], chosen, accuracy = svm_predict(_values(train), train[0].labels, groups, _values(test), config)
    first = test[0]
    return Results(
        video_ids=first.video_ids.tolist(),
        labels=first.labels,
        classes=first.classes.tolist(),
        split_list=first.split_list,
        dataset=first.dataset,
        predicted=predicted,
        svm_C=chosen,
        svm_accuracy=accuracy,
    )


def _values(streams: Sequence[Scores]) -> list[Floats]:
    return [scores.scores for scores in streams]


# --- the report --------------------------------------------------------------------------------------------------


def wilson_interval_pct(num_correct: int, num_videos: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy, in percent (Wilson 1927); unlike the normal one right near 100 %."""
    z = 1.959964
    share = num_correct / num_videos
    centre = share + z * z / (2 * num_videos)
    spread = z * math.sqrt(share * (1 - share) / num_videos + z * z / (4 * num_videos**2))
    scale = 100 / (1 + z * z / num_videos)
    return max(0.0, scale * (centre - spread)), min(100.0, scale * (centre + spread))


def confusion_matrix(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """Counts (K, K): row = true class, column = predicted class."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def per_class_recall(confusion: Ints) -> list[float | None]:
    """Share of each class's videos that were recognised, in [0, 1]; None for a class without test videos."""
    totals = confusion.sum(1)
    return [float(confusion[k, k] / totals[k]) if totals[k] else None for k in range(len(confusion))]


def summary(results: Results) -> dict[str, object]:
    """Everything as plain values for results.json."""
    methods = {}
    for method, predicted in results.predicted.items():
        num_correct = int((predicted == results.labels).sum())
        confusion = confusion_matrix(results.labels, predicted, len(results.classes))
        low, high = wilson_interval_pct(num_correct, len(results.labels))
        methods[method] = {
            "num_correct": num_correct,
            "num_videos": len(results.labels),
            "accuracy_pct": 100 * num_correct / len(results.labels),
            "interval_95_pct": [low, high],
            "per_class_recall": per_class_recall(confusion),
            "confusion": confusion.tolist(),
            "predicted": predicted.tolist(),
        }
    plain = {name: value for name, value in asdict(results).items() if name not in ("predicted", "labels")}
    return {**plain, "labels": results.labels.tolist(), "methods": methods}


def report(results: Results) -> str:
    """The table in the manner of the paper's Table 3, and confusions and recalls of fusion by averaging.

    Averaging has nothing fitted to it; with one stream alone they are that stream's.
    """
    lines = [f"{results.split_list}, {len(results.labels)} videos, {len(results.classes)} classes", ""]
    lines.append(f"{'':34}  correct  accuracy  95 % interval")
    for method, predicted in results.predicted.items():
        title = TITLES[method] + (f" (C = {results.svm_C:g})" if method == "svm" else "")
        num_correct, num_videos = int((predicted == results.labels).sum()), len(predicted)
        low, high = wilson_interval_pct(num_correct, num_videos)
        share = f"{num_correct}/{num_videos}"
        lines.append(f"{title:34} {share:>8}  {100 * num_correct / num_videos:6.1f} %  {low:5.1f} to {high:.1f} %")
    method = "average" if "average" in results.predicted else next(iter(results.predicted))
    confusion = confusion_matrix(results.labels, results.predicted[method], len(results.classes))
    return "\n".join([*lines, "", f"{TITLES[method]}:", *_confusion_lines(confusion, results.classes)])


def _confusion_lines(confusion: Ints, classes: Sequence[str]) -> list[str]:
    """Per-class recall, with the whole matrix for up to 12 classes, else the most frequent confusions."""
    recalls = ["     -" if recall is None else f"{100 * recall:5.0f}%" for recall in per_class_recall(confusion)]
    width = max(len(name) for name in classes)
    if len(classes) <= 12:
        width = max(width, len("true / predicted") - 4)
        numbers = "".join(f"{k:>5}" for k in range(len(classes)))
        lines = [f"{'true / predicted':>{width + 4}}{numbers}  recall"]
        for k, name in enumerate(classes):
            counts = "".join(f"{count:>5}" for count in confusion[k])
            lines.append(f"{k:>3} {name:{width}}{counts}  {recalls[k]}")
        return lines
    lines = [f"{name:{width}}  {recall}" for name, recall in zip(classes, recalls, strict=True)]
    errors = confusion - np.diag(np.diag(confusion))
    worst = np.argsort(-errors, axis=None, kind="stable")[:10]
    lines += ["", "most frequent confusions (true -> predicted):"]
    for true, predicted in zip(*np.unravel_index(worst, errors.shape), strict=True):
        if errors[true, predicted]:
            lines.append(f"{errors[true, predicted]:>4}  {classes[true]} -> {classes[predicted]}")
    return lines


def write_results(results: Results, folder: Path) -> list[Path]:
    """Write results.json and results.txt. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", summary(results))
    write_bytes(folder / "results.txt", (report(results) + "\n").encode())
    return [folder / "results.json", folder / "results.txt"]


def main(arguments: list[str] | None = None) -> None:
    """Command line: fuse the score files of one run, or the spatial ones of RUN with the temporal ones of RUN_B."""
    parser = argparse.ArgumentParser(prog="python -m train.fuse", description="Fuse the streams' scores again.")
    parser.add_argument("run", type=Path, help="run folder; of the spatial stream if there are two")
    parser.add_argument("run_b", type=Path, nargs="?", help="run folder of the temporal stream")
    parser.add_argument("--out", type=Path, help="folder for the results; default RUN, or RUN/fused-with-<RUN_B>")
    options = parser.parse_args(arguments)
    runs = [options.run] if options.run_b is None else [options.run, options.run_b]
    out = options.out or (options.run if len(runs) == 1 else options.run / f"fused-with-{options.run_b.resolve().name}")
    try:
        results = fuse_runs(runs, read_config(options.run / "config.yaml").fuse)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report(results))
    print("\nwrote:", *write_results(results, out), sep="\n  ")


if __name__ == "__main__":
    main()
