"""The packed sets of a run: opened as its config says, in a folder or through a cache."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from math import isqrt

import numpy as np
import numpy.typing as npt

from loaders.ahead import AHEAD
from loaders.index import Index, open_index
from loaders.shard_pool import least_pool
from train.settings import Config

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

#: Shards beside those of the pool and those that come next: processes are some steps apart, and one that was drawn from
#: rarely stays a little longer than the least recently used.
_MORE = 8


def open_set(config: Config, root: str = "") -> Index:
    """Open a packed set of a run: `data.root`, or another one. Raises as `open_index` does."""
    return open_index(root or config.data.root, cache=config.data.cache, cache_gb=config.data.cache_gb)


def check_cache(
    parts: Sequence[tuple[Index, Ints]], num_shards: int = 0, num_machines: int = 1, num_steps: int = 1
) -> None:
    """Raise ValueError if the cache cannot hold the shards of training lists, which would be fetched again and again.

    Args:
        parts: a stream's sets, each with the rows of its list. Sets in folders need no cache.
        num_shards: how many shards of each are drawn from at a time; 0: all.
        num_machines: each holds an arc of such a pool, if there is one set; of several it may draw from one alone.
        num_steps: after so many steps a shard of the pool is exchanged.
    """
    cached = [(index.cache, index, rows) for index, rows in parts if index.cache]
    if not cached:
        return
    sizes = [
        np.sort(np.array(index.shard_bytes, np.int64)[np.unique(index.shard[rows])])[::-1] for _, index, rows in cached
    ]
    num_machines = num_machines if len(parts) == 1 else 1
    own, max_bytes = sum(cache.own_bytes for cache, _, _ in cached), cached[0][0].max_bytes

    def needed(pool: int) -> int:
        """Bytes for a pool of so many shards of each set; as many as there are, or 0: without one."""
        held = held_shards(pool, num_machines) + -(-AHEAD // num_steps) + _MORE
        return own + sum(int(of_set[: held if 0 < pool < len(of_set) else None].sum()) for of_set in sizes)

    if needed(num_shards) <= max_bytes:
        return
    fitting = bisect_right(range(1, max(map(len, sizes)) + 1), max_bytes, key=needed)
    urls = ", ".join(cache.url for cache, _, _ in cached)
    drawn_from = f", {num_shards} at a time with those that come next" if num_shards else ""
    least = max(least_pool(index.labels[rows], index.shard[rows]) for _, index, rows in cached)
    pool = f", or set data.pool_shards to {least} to {fitting}" if fitting >= least else ""
    raise ValueError(
        f"{urls}: training draws from {needed(num_shards) / 1e9:.4g} GB of shards{drawn_from}, and the cache holds "
        f"data.cache_gb={max_bytes / 1e9:.4g}. Raise data.cache_gb{pool}."
    )


def held_shards(num_shards: int, num_machines: int) -> int:
    """The most shards of a pool that one of so many machines holds.

    Its part, num_shards / num_machines, and what the ends of its arc add by moving: no more than this bound wherever
    `benchmarks/draw_statistics.py` has counted them.
    """
    return min(num_shards, 2 * -(-num_shards // num_machines) + 2 * isqrt(num_shards))


def log_cached(index: Index, stream: str) -> None:
    """Say how much of a set that lies in a store is on this machine already."""
    if index.cache:
        logger.info(
            "%s: %s has %d shards, %.4g GB; %d of them are in the cache %s",
            stream,
            index.location,
            len(index.shards),
            sum(index.shard_bytes) / 1e9,
            index.cache.num_cached(index.shards),
            index.root,
        )
