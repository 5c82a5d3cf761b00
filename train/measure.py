"""What a results file says of a row of the tables, and of the difference of two: mean, interval, number of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from train.fuse import source_group
from train.plan import ALL_SPLITS
from train.record import Book, Entry, parse_bits
from train.statistics import bootstrap_pct, mean_pct
from train.tables import TABLES, Comparison, Fusion, Table, source_name

Floats = npt.NDArray[np.float64]
Metric = Literal["accuracy", "top-5 error"]

#: Seeds that it takes to claim an order: two that agree may do so by chance.
MIN_SEEDS = 3


@dataclass(frozen=True)
class Measure:
    """Mean in percent, or in points if it is a difference, over splits and seeds, with its 95 % interval.

    num_seeds: of the split that has the fewest. num_sources: of which the test videos are cut; one gives no interval.
    """

    pct: float
    low: float
    high: float
    num_runs: int
    num_seeds: int
    num_sources: int
    splits: tuple[int, ...]

    @property
    def shows_order(self) -> bool:
        """Of a difference: whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Samples:
    """values (seeds, V): of the test videos of all splits, NaN where a seed lacks a split; groups (V,): their sources;
    weights (V,): such that every split counts the same, as in the mean over splits.
    """

    values: Floats
    groups: list[str]
    weights: Floats


def newest(book: Book) -> list[Entry]:
    """What counts: of each run and fusion the newest setting, and of that on each split the newest test list."""
    digests = {entry.name: entry.digest for entry in book.runs.values()}  # the newest is the last
    found = [entry for entry in book.runs.values() if entry.digest == digests[entry.name]]
    lists = {(entry.name, entry.split): entry.test_list for entry in found}
    return [entry for entry in found if entry.test_list == lists[entry.name, entry.split]]


def splits_of(book: Book, table: Table) -> tuple[int, ...]:
    """Splits that our numbers of a table are over: at full scale the table's own, at mini scale all."""
    return table.splits if book.scale == "full" else ALL_SPLITS


def entries_of(book: Book, source: str | Fusion, splits: Sequence[int] = ALL_SPLITS) -> list[Entry]:
    """The source's tested runs that count, on these splits."""
    name = source_name(source)
    return [entry for entry in newest(book) if entry.name == name and entry.correct and entry.split in splits]


def gather(book: Book, entries: Sequence[Entry], metric: Metric = "accuracy") -> Samples:
    """Values by seed and test video. entries: of one source, and on each split of one list."""
    seeds = sorted({entry.seed for entry in entries})
    lists = {entry.split: entry.test_list for entry in entries}
    values, groups, weights = [], [], []
    for split, key in sorted(lists.items()):
        ids = book.lists[key]["video_ids"]
        part = np.full((len(seeds), len(ids)), np.nan)
        for entry in entries:
            if entry.split == split:
                row = parse_bits(entry.correct) if metric == "accuracy" else 1 - parse_bits(entry.top5)
                part[seeds.index(entry.seed)] = row
        values.append(part)
        groups += [source_group(video_id) for video_id in ids]
        weights.append(np.full(len(ids), 1 / len(ids)))
    return Samples(np.concatenate(values, axis=1), groups, np.concatenate(weights))


def measure(
    book: Book, source: str | Fusion, metric: Metric = "accuracy", splits: Sequence[int] = ALL_SPLITS
) -> Measure | None:
    """Accuracy, or top-5 error, of a source on these splits; None without a run, or without top-5 results."""
    entries = entries_of(book, source, splits)
    if not entries or (metric == "top-5 error" and not entries[-1].top5):
        return None
    return _summarise(gather(book, entries, metric), entries)


def compare(book: Book, comparison: Comparison, splits: Sequence[int] = ALL_SPLITS) -> Measure | None:
    """Difference in points, paired video by video over the splits and seeds that both sides have; None without any."""
    better, than = (
        {(entry.split, entry.seed, entry.test_list): entry for entry in entries_of(book, source, splits)}
        for source in (comparison.better, comparison.than)
    )
    common = sorted(set(better) & set(than))
    if not common:
        return None
    a, b = (gather(book, [side[key] for key in common]) for side in (better, than))
    return _summarise(Samples(a.values - b.values, a.groups, a.weights), [better[key] for key in common])


def _summarise(samples: Samples, entries: Sequence[Entry]) -> Measure:
    low, high = bootstrap_pct(samples.values, samples.groups, samples.weights)
    seeds = Counter(entry.split for entry in entries)
    return Measure(
        pct=mean_pct(samples.values, samples.weights),
        low=low,
        high=high,
        num_runs=len(entries),
        num_seeds=min(seeds.values()),
        num_sources=len(set(samples.groups)),
        splits=tuple(sorted(seeds)),
    )


def paper_difference(table: Table, comparison: Comparison) -> float:
    """The same difference in the paper's numbers, in points, of the tables over the same splits."""
    paper = {cell.source: cell.paper_pct for other in TABLES if other.splits == table.splits for cell in other.cells}
    return paper[comparison.better] - paper[comparison.than]


def reading(difference: Measure) -> str:
    """Whether the interval shows an order, and whether it is the paper's, which is positive in all comparisons."""
    if difference.num_sources == 1:
        return "one source: no claim"
    if difference.num_seeds < MIN_SEEDS:
        return f"{'one seed' if difference.num_seeds == 1 else f'{difference.num_seeds} seeds'}: no claim"
    if not difference.shows_order:
        return "no order shown"
    return "shown, as in the paper" if difference.pct > 0 else "shown, against the paper"
