"""The packed sets of a run: opened as its config says, in a folder or through a cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loaders.index import Index, open_index
from train.settings import Config

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

#: Part of the cache that a pool of shards may take; those that come next, and those of tests, take the rest.
_POOL_PART = 0.75
#: What each of W machines holds of a pool, as a multiple of P / W: its arc's ends move (docs/throughput.md).
_ARC = 2


def open_set(config: Config, root: str = "") -> Index:
    """Open a packed set of a run: `data.root`, or another one. Raises as `open_index` does."""
    return open_index(root or config.data.root, cache=config.data.cache, cache_gb=config.data.cache_gb)


def check_cache(parts: Sequence[tuple[Index, Ints]], num_shards: int = 0, num_machines: int = 1) -> None:
    """Raise ValueError if the cache cannot hold the shards of training lists, which would be fetched again and again.

    Args:
        parts: a stream's sets, each with the rows of its list. Sets in folders need no cache.
        num_shards: how many shards of each are drawn from at a time; 0: all.
        num_machines: each holds an arc of such a pool; but all of it without one.
    """
    part = min(1.0, _ARC / num_machines) / _POOL_PART
    cached = [(index.cache, index, rows) for index, rows in parts if index.cache]
    needed, fitting = 0, 0
    for cache, index, rows in cached:
        sizes = sorted((index.shard_bytes[shard] for shard in np.unique(index.shard[rows]).tolist()), reverse=True)
        drawn = sum(sizes[:num_shards] if num_shards else sizes)
        needed += cache.own_bytes + (int(drawn * part) if 0 < num_shards < len(sizes) else drawn)
        fitting = int((cache.max_bytes - cache.own_bytes) / part / sizes[0] / len(cached))
    if not cached or needed <= cached[0][0].max_bytes:
        return
    urls = ", ".join(cache.url for cache, _, _ in cached)
    drawn_from = f", {num_shards} at a time with those that come next" if num_shards else ""
    pool = f", or set data.pool_shards to {fitting} or less" if fitting else ""
    raise ValueError(
        f"{urls}: training draws from {needed / 1e9:.4g} GB of shards{drawn_from}, and the cache holds "
        f"data.cache_gb={cached[0][0].max_bytes / 1e9:.4g}. Raise data.cache_gb{pool}."
    )


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
