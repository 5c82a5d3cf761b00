"""The shuffle pool: for sets too large for a machine's disk, samples are drawn from a part of the shards that moves on.

All shards that hold training videos come by in an infinite sequence q = 0, 1, 2, ..., epoch after epoch, each epoch in
an order of its own. At step s the pool holds P of them, entries [h, h + P), and every S steps one is exchanged:

    N = 6 shards, P = 3, S = 2       q         0 1 2 3 4 5   6 7 8 ...
                                     shard     d a f c b e   b d a       two epochs, two orders
    step 0, 1   h = 0                         [d a f]
    step 2, 3   h = 1                           [a f c]
    step 10     h = 5                                  [e   b d]

    the ring, place q mod P          step 0  d a f     step 2  c a f     step 4  c b f

A new shard takes the place in the ring of the one that it replaces, so the others keep theirs. The ring is cut into as
many equal parts of probability as windows are born in a step, and each is drawn from its own part (`draw.draw_pooled`).
A rank's slice of the global batch is therefore drawn from an arc of the ring that hardly moves, and one machine of W
needs about 1/W of the pool. Which samples are drawn does not depend on W.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from loaders.draw import Ints, Population, draw_shard_order
from loaders.index import Index


@dataclass(frozen=True)
class Pooled:
    """The videos of a shuffle pool, as they lie in its ring, shard after shard.

    video (n,) number in the population   upto (n,) probability of it and those before it, up to 1
    label (n,) class, as in `Population.start`
    shards, counts (at most P,): the shards in the index, and how many of the videos each holds
    """

    video: Ints
    label: Ints
    upto: npt.NDArray[np.float64]
    shards: Ints
    counts: Ints


@dataclass(frozen=True)
class Table:
    """Which class and shard each video of a training list is of, kept in the order of shards.

    video (n,): number in the population, shard after shard. label (n,): its class, 0 to num_classes - 1.
    shards (N,): numbers in the index. start (N + 1,): shard i holds video[start[i] : start[i + 1]].
    """

    video: Ints
    label: Ints
    shards: Ints
    start: Ints
    num_classes: int

    @classmethod
    def of(cls, shard: Ints, label: Ints) -> "Table":
        """shard, label (n,) of the population's videos, label from 0 without gaps."""
        video, sizes = np.argsort(shard, kind="stable"), np.bincount(shard)
        shards = np.flatnonzero(sizes)
        return cls(video, label[video], shards, np.append(0, np.cumsum(sizes[shards])), int(label.max()) + 1)


class ShardPool:
    """The pools of a training list, as functions of seed and step. num_shards, num_steps: P and S, 1 <= P < N.

    States are made once and remembered: the cost is that of the pool's videos, not of the set's.
    """

    def __init__(self, table: Table, num_shards: int, num_steps: int):
        assert 1 <= num_shards < len(table.shards) and num_steps >= 1
        self.table, self.num_shards, self.num_steps = table, num_shards, num_steps
        self._order = lru_cache(3)(lambda seed, epoch: draw_shard_order(seed, epoch, len(table.shards)))
        self._state = lru_cache(4)(self._make)

    def at(self, seed: int, step: int) -> Pooled:
        """The pool of a step, from before step 0 too."""
        return self._state(seed, step // self.num_steps)

    def ring(self, seed: int, first: int) -> Ints:
        """(P,) shards, numbers in the table, of entries [first, first + P), by their place in the ring.

        -1 for one that stands in the pool twice, across the border of two epochs, at the place of its later entry.
        """
        epoch, at = divmod(first, len(self.table.shards))
        entries = self._order(seed, epoch)[at : at + self.num_shards]
        if missing := self.num_shards - len(entries):
            later = self._order(seed, epoch + 1)[:missing]
            entries = np.concatenate([entries, np.where(np.isin(later, entries), -1, later)])
        return np.roll(entries, first % self.num_shards)

    def _make(self, seed: int, first: int) -> Pooled:
        """Every class of the pool as likely as any, every video of a class in the pool as any of that class."""
        table, ring = self.table, self.ring(seed, first)
        held = ring[ring >= 0]
        counts = table.start[held + 1] - table.start[held]
        numbers = np.repeat(table.start[held] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        label = table.label[numbers]
        share = 1 / np.maximum(np.bincount(label, minlength=table.num_classes), 1)
        upto = np.cumsum(share[label])
        return Pooled(table.video[numbers], label, upto / upto[-1], table.shards[held], counts)


def least_pool(label: Ints, shard: Ints) -> int:
    """The fewest shards that hold as many videos as there are classes, on average. label, shard (n,): of the videos."""
    return -(-len(np.unique(label)) * len(np.unique(shard)) // len(shard))


def pooled(videos: Population, index: Index, num_shards: int, num_steps: int) -> Population:
    """The same videos, to be drawn from a pool of num_shards shards of which one is exchanged every num_steps steps.

    0, or as many shards as hold the list: from all of it, as without a pool. Raises ValueError for a pool that holds
    fewer videos than there are classes: at no time could every class be drawn.
    """
    if num_shards < 0 or num_steps < 1:
        raise ValueError(f"A pool of {num_shards} shards, one exchanged every {num_steps} steps: at least 0, and 1.")
    if not num_shards:
        return videos
    shard, num_classes = index.shard[videos.rows], len(videos.start) - 1
    label = np.repeat(np.arange(num_classes), np.diff(videos.start))
    num_held = len(np.unique(shard))
    if num_shards >= num_held:
        return videos
    if num_shards < (least := least_pool(label, shard)):
        raise ValueError(
            f"data.pool_shards={num_shards} of {num_held} shards hold about {num_shards * len(shard) // num_held} "
            f"videos, expected at least one for each of the {num_classes} classes. "
            f"Take {least} shards or more, or 0 for all."
        )
    return replace(videos, pool=ShardPool(Table.of(shard, label), num_shards, num_steps))
