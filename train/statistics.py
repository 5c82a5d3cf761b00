"""Intervals of accuracies: what a few test videos, cut from fewer sources, and a few seeds can tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Numbers that a block of draws may hold at a time: ImageNet's validation set has 50,000 sources.
BLOCK = 1 << 22


def bootstrap_pct(
    values: npt.NDArray[np.floating],
    groups: npt.NDArray[np.str_] | npt.NDArray[np.integer] | Sequence[str],
    weights: npt.NDArray[np.floating] | None = None,
    draws: int = 10_000,
) -> list[float]:
    """95 % interval, in percent, of a mean over test videos, or over seeds x test videos.

    Videos cut from one source are alike, so whole groups of them are resampled, with replacement; and, independently,
    whole seeds, since a good or bad start moves all videos of a run together. With one seed the interval tells of the
    choice of test videos alone.

    Args:
        values: (V,) or (seeds, V), such as correctness, or its difference between two runs; NaN where there is none.
        groups: (V,) the source of each video.
        weights: (V,) of each video in the mean; default: equal.
    """
    table = np.atleast_2d(values).astype(np.float64)
    weights = np.ones(table.shape[1]) if weights is None else weights
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    there = ~np.isnan(table)
    sums, counts = (
        np.stack([np.bincount(group, row, len(names)) for row in part])  # (seeds, groups)
        for part in (np.where(there, table, 0) * weights, there * weights)
    )
    rng = np.random.default_rng(0)
    means = []
    while draws:
        size = min(draws, max(1, BLOCK // len(names)))
        drawn = rng.integers(0, len(names), (size, len(names)))
        times = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size).T  # (seeds, size)
        total, count = (
            sum(t * row[drawn].sum(1) for t, row in zip(times, part, strict=True)) for part in (sums, counts)
        )
        with np.errstate(invalid="ignore"):  # a draw without any value has no mean
            means.append(total / count)
        draws -= size
    return [float(100 * q) for q in np.nanquantile(np.concatenate(means), [0.025, 0.975])]


def mean_pct(values: npt.NDArray[np.floating], weights: npt.NDArray[np.floating] | None = None) -> float:
    """The mean that `bootstrap_pct` gives the interval of, in percent."""
    table = np.atleast_2d(values)
    weights = np.ones(table.shape[1]) if weights is None else weights
    return float(100 * np.nansum(table * weights) / (~np.isnan(table) * weights).sum())
