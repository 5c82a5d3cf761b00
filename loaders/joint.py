"""Batches made up from several data sets: the global batch holds a fixed number of samples of each (sec. 4).

    batch_size = 8, sets of 5 and 3 samples      global slots   0 0 0 0 0 1 1 1
    world_size = 2                               rank 0         0 0 0 0
                                                 rank 1                 0 1 1 1

So a rank may well have no sample of a set: the loss has to be right for that. As with one data set, the sequence of
global batches is the same for any number of ranks, and a function of (seed, step).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from loaders.batch import Batch
from loaders.draw import Draw, rank_slots
from loaders.graph import to_device

Ints = npt.NDArray[np.int64]


def share_batch(weights: Sequence[float], batch_size: int, unit: int = 1) -> list[int]:
    """Samples of each data set in a global batch: in proportion to the weights, in whole units, at least one each.

        weights = 101, 51, batch_size = 256      170, 86

    Rounded to the nearest. Raises ValueError if the batch has no unit for each data set.
    """
    num_units, count = batch_size // unit, len(weights)
    if num_units < count or min(weights) <= 0:
        raise ValueError(
            f"A global batch of {batch_size} cannot hold {unit} or more samples of each of {len(weights)} data sets "
            f"with weights {list(weights)}. Take a larger batch_size."
        )
    exact = np.array(weights, np.float64) / sum(weights) * num_units
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    while shares.sum() != num_units:  # give to, or take from, whoever is farthest from its exact share
        surplus = shares.sum() > num_units
        far = np.where(shares > 1, shares - exact, -np.inf) if surplus else exact - shares
        shares[int(far.argmax())] += -1 if surplus else 1
    return (shares * unit).tolist()


def part_slots(shares: Sequence[int], rank: int, world_size: int) -> list[tuple[int, int]]:
    """Which of each data set's samples a rank has: (begin, end) among its share, begin = end for none."""
    low, high = rank_slots(rank, world_size, sum(shares))
    starts = [sum(shares[:i]) for i in range(len(shares))]
    return [
        (min(max(low - start, 0), share), min(max(high - start, 0), share))
        for start, share in zip(starts, shares, strict=True)
    ]


@dataclass(frozen=True)
class Part:
    """One data set's loader in a joint one. loader: its training batches.

    task: the softmax layer its samples are for. label_map (K,): its labels as numbers of that layer's classes.
    """

    loader: Any
    task: int
    label_map: Ints


class JointLoader:
    """Training batches put together from those of several loaders. Iterates over Batch; close it as any loader.

    opened: closes the loaders.
    """

    def __init__(self, parts: Sequence[Part], opened: ExitStack):
        self._parts = list(parts)
        self._opened = opened
        self._batches: list[Batch] = []  # of the first parts, where a later one failed

    @property
    def num_replaced(self) -> int:
        """Damaged samples that were replaced so far."""
        return sum(part.loader.num_replaced for part in self._parts)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        while len(self._batches) < len(self._parts):
            self._batches.append(next(self._parts[len(self._batches)].loader))
        batches, self._batches = self._batches, []
        labels, tasks = [], []
        for part, batch in zip(self._parts, batches, strict=True):
            labels.append(to_device(part.label_map, batch.labels.device)[batch.labels])
            tasks.append(torch.full_like(batch.labels, part.task))
        return Batch(
            inputs=torch.cat([batch.inputs for batch in batches]),
            labels=torch.cat(labels),
            draw=Draw.concatenate([batch.draw for batch in batches]),
            task=torch.cat(tasks),
        )

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
