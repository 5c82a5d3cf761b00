"""What fusion found, as numbers, as results.json and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flow.shard import write_bytes, write_json

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TOP = 5


@dataclass(frozen=True)
class Source:
    """Scores that were fused: their name in the table, where they came from, and their weight in the average."""

    name: str
    folder: str
    checkpoint: str
    weight: float


@dataclass(frozen=True)
class Results:
    """Scores of each method for the same test videos.

    scores: method -> (V, K), the larger the likelier; methods are the sources' names, "average" and "svm".
    titles: method -> its name in the table. svm_C: the C that cross-validation chose; svm_accuracy: C -> accuracy in
    cross-validation on training videos; None and empty without an SVM. no_svm: why there is none though several sources
    were fused, else empty.
    """

    video_ids: list[str]
    labels: Ints
    classes: list[str]
    split_list: str
    dataset: str
    scores: dict[str, Floats]
    titles: dict[str, str]
    sources: list[Source]
    svm_C: float | None
    svm_accuracy: dict[float, float]
    no_svm: str

    @property
    def predicted(self) -> dict[str, Ints]:
        """Method -> classes (V,) of the highest score, of equals the first."""
        return {method: scores.argmax(1) for method, scores in self.scores.items()}


# --- statistics --------------------------------------------------------------------------------------------------


def wilson_interval_pct(num_correct: int, num_videos: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy, in percent (Wilson 1927); unlike the normal one right near 100 %."""
    z = 1.959964
    share = num_correct / num_videos
    centre = share + z * z / (2 * num_videos)
    spread = z * math.sqrt(share * (1 - share) / num_videos + z * z / (4 * num_videos**2))
    scale = 100 / (1 + z * z / num_videos)
    return max(0.0, scale * (centre - spread)), min(100.0, scale * (centre + spread))


def top_pct(scores: Floats, labels: Ints, top: int = TOP) -> float:
    """Percentage of rows whose label is among the `top` highest scores (V, K); of equals the first ones count."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return float(100 * (best == labels[:, None]).any(1).mean())


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
    """Everything but the scores, as plain values for results.json. Top-5 accuracy only where there are more classes."""
    num_videos, num_classes = len(results.labels), len(results.classes)
    methods = {}
    for method, predicted in results.predicted.items():
        num_correct = int((predicted == results.labels).sum())
        confusion = confusion_matrix(results.labels, predicted, num_classes)
        top5 = {"top5_pct": top_pct(results.scores[method], results.labels)} if num_classes > TOP else {}
        methods[method] = {
            "title": results.titles[method],
            "num_correct": num_correct,
            "num_videos": num_videos,
            "accuracy_pct": 100 * num_correct / num_videos,
            **top5,
            "interval_95_pct": list(wilson_interval_pct(num_correct, num_videos)),
            "per_class_recall": per_class_recall(confusion),
            "confusion": confusion.tolist(),
            "predicted": predicted.tolist(),
        }
    return {
        "video_ids": results.video_ids,
        "classes": results.classes,
        "split_list": results.split_list,
        "dataset": results.dataset,
        "sources": [asdict(source) for source in results.sources],
        "weights": [source.weight for source in results.sources],
        "svm_C": results.svm_C,
        "svm_accuracy": results.svm_accuracy,
        "no_svm": results.no_svm,
        "labels": results.labels.tolist(),
        "methods": methods,
    }


# --- the table ---------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """The table in the manner of the paper's Table 3, and confusions and recalls of fusion by averaging.

    Averaging has nothing fitted to it; with one source alone they are that source's.
    """
    num_videos, num_classes = len(results.labels), len(results.classes)
    titles = dict(results.titles)
    if results.svm_C is not None:
        titles["svm"] += f" (C = {results.svm_C:g})"
    width = max(34, *(len(titles[method]) for method in results.scores))
    lines = [f"{results.split_list}, {num_videos} videos, {num_classes} classes", ""]
    lines.append(f"{'':{width}}  correct  accuracy     95 % interval{'      top-5' if num_classes > TOP else ''}")
    for method, predicted in results.predicted.items():
        num_correct = int((predicted == results.labels).sum())
        share, accuracy_pct = f"{num_correct}/{num_videos}", 100 * num_correct / num_videos
        low, high = wilson_interval_pct(num_correct, num_videos)
        top5 = f"  {top_pct(results.scores[method], results.labels):7.1f} %" if num_classes > TOP else ""
        interval = f"{low:5.1f} to {high:5.1f} %"
        lines.append(f"{titles[method]:{width}} {share:>8}  {accuracy_pct:6.1f} %  {interval}{top5}")
    if results.no_svm:
        lines.append(f"no SVM: {results.no_svm}")
    method = "average" if "average" in results.scores else next(iter(results.scores))
    confusion = confusion_matrix(results.labels, results.predicted[method], num_classes)
    return "\n".join([*lines, "", f"{results.titles[method]}:", *confusion_lines(confusion, results.classes)])


def confusion_lines(confusion: Ints, classes: Sequence[str]) -> list[str]:
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
