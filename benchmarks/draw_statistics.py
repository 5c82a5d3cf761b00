"""How near is the draw from a shuffle pool to the paper's, and how many machines need a shard?

    python benchmarks/draw_statistics.py [--data PACKED] [--pool-steps 4] [--pools 16 64] [--quick] [--out DIR]

The paper draws a class uniformly, then a video of it (sec. 5). For pools of several sizes, the probability of every
class and video, averaged over the pools of one epoch and over those of shorter times; how many different videos are
drawn; how many machines fetch a shard while it is in the pool. No sample is drawn: all follows from the tables of the
pools that training takes (seed 0), or of every P/16-th of them. No file is read but the index of --data: the other sets
are tables of labels and shards, made to the sizes of public sets, 32 videos a shard in a seeded shuffle, as `flow.pack`
writes them.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from common import add_out, errors_in_a_line, result_path, write_result

import numpy as np  # isort: skip
import numpy.typing as npt
from tqdm import tqdm

from flow.command import Parser, say
from loaders.draw import Ints
from loaders.index import open_index
from loaders.shard_pool import Pooled, ShardPool, Table

Floats = npt.NDArray[np.float64]
SEED = 0
VIDEOS_PER_SHARD = 32
POOLS = [16, 64, 256, 1024]
WORLD_SIZES = [1, 2, 4, 8, 16, 64]
#: Steps -> over how many stretches of so many, evenly apart in an epoch, the median is taken.
STRETCHES = {100: 20, 1000: 10, 10_000: 3}
#: Of the pools that a shard is in, so many are looked at, evenly apart: one exchange more changes little.
LOOKS = 16
#: Shards whose machines are counted, at most.
MAX_COUNTED = 1024


@dataclass(frozen=True)
class MadeSet:
    """Sizes of a set: its largest class has `unbalance` times as many videos as its smallest, in equal ratios."""

    name: str
    num_videos: int
    num_classes: int
    unbalance: float


#: Of UCF-101 the ratio is its own (100 to 167 videos a class), of the others plausible.
MADE_SETS = [
    MadeSet("UCF-101", 13_320, 101, 1.67),
    MadeSet("Kinetics-700", 650_000, 700, 3.0),
    MadeSet("Sports-1M", 1_130_000, 487, 3.0),
]
QUICK_SETS, QUICK_STRETCHES = [MadeSet("small", 640, 10, 2.0)], {100: 3}


def make_table(made: MadeSet, videos_per_shard: int = VIDEOS_PER_SHARD) -> Table:
    """Labels and shards of a made set."""
    weight = np.geomspace(1, made.unbalance, made.num_classes)
    upto = np.rint(np.cumsum(weight) / weight.sum() * made.num_videos).astype(np.int64)
    label = np.searchsorted(upto, np.arange(made.num_videos), "right")
    place = np.random.default_rng(SEED).permutation(made.num_videos)
    return Table.of(place // videos_per_shard, label)


# --- the draw ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Averages:
    """Over some pools: probability of each video (n,) and class (K,) of a sample; classes that a pool lacks, mean and
    most."""

    video: Floats
    label: Floats
    absent_mean: float
    absent_most: int


def average(pool: ShardPool, heads: Ints) -> Averages:
    """heads: first entries of the pools, all equally long there."""
    table = pool.table
    video, label, absent = np.zeros(len(table.video)), np.zeros(table.num_classes), []
    for head in heads.tolist():
        pooled = pool.at(SEED, head * pool.num_steps)
        video[pooled.video] += np.diff(pooled.upto, prepend=0)
        there = np.bincount(pooled.label, minlength=table.num_classes) > 0
        label += there / there.sum()
        absent.append(int((~there).sum()))
    return Averages(video / len(heads), label / len(heads), float(np.mean(absent)), max(absent))


def different_videos(pool: ShardPool, heads: Ints, batch_size: int, stride: int = 1) -> float:
    """Expected number of different videos that are drawn from some pools, each of which stands for `stride`."""
    log_unseen = np.zeros(len(pool.table.video))
    for head in heads.tolist():
        pooled = pool.at(SEED, head * pool.num_steps)
        log_unseen[pooled.video] += stride * pool.num_steps * log_not_drawn(pooled.upto, batch_size)
    return float(-np.expm1(log_unseen).sum())


def log_not_drawn(upto: Floats, num_windows: int) -> Floats:
    """Logarithm of the probability that a batch lacks a video, for each: of the parts in which it lies, each is drawn
    from once (`draw_pooled`)."""
    begin, end = np.append(0, upto[:-1]) * num_windows, upto * num_windows
    first = np.floor(begin)
    last = np.maximum(np.ceil(end) - 1, first)
    with np.errstate(divide="ignore"):  # log 0 of a video that fills a part
        one = np.log1p(-np.minimum(end - begin, 1))
        two = np.log1p(-np.minimum(first + 1 - begin, 1)) + np.log1p(-np.minimum(end - last, 1))
    return np.where(last == first, one, np.where(last == first + 1, two, -np.inf))


def paper_draw(table: Table) -> tuple[Floats, Floats]:
    """Probability of each video (n,), numbered as in the population, and class (K,)."""
    share = 1 / np.bincount(table.label, minlength=table.num_classes) / table.num_classes
    video = np.empty(len(table.video))
    video[table.video] = share[table.label]
    return video, np.full(table.num_classes, 1 / table.num_classes)


def distance(found: Floats, expected: Floats) -> dict[str, float]:
    """Total variation distance of two distributions, and the largest and smallest ratio of probabilities."""
    ratio = found / expected
    total_variation = float(np.abs(found - expected).sum() / 2)
    return {"total_variation": total_variation, "largest_ratio": float(ratio.max()), "least_ratio": float(ratio.min())}


def draw_row(pool: ShardPool, batch_size: int, stretches: dict[int, int]) -> dict[str, Any]:
    """Distance of the draw to the paper's, over an epoch and over shorter times, and how many videos it shows."""
    table, steps = pool.table, pool.num_steps
    num_shards = len(table.shards)
    video, label = paper_draw(table)
    epoch = average(pool, np.arange(0, num_shards, max(1, pool.num_shards // LOOKS)))
    row: dict[str, Any] = {
        "pool_videos": float(len(table.video) * pool.num_shards / num_shards),
        "epoch_steps": num_shards * steps,
        "samples_per_video_and_epoch": batch_size * steps * num_shards / len(table.video),
        "classes_absent": {"mean": epoch.absent_mean, "most": epoch.absent_most},
        "epoch": {"classes": distance(epoch.label, label), "videos": distance(epoch.video, video)},
        "stretches": [],
    }
    for length, count in stretches.items():
        num_heads = -(-length // steps)
        stride = max(1, min(pool.num_shards // LOOKS, num_heads // 25))
        starts = np.linspace(0, num_shards, count, endpoint=False).astype(np.int64)
        heads = [start + np.arange(0, num_heads, stride) for start in starts.tolist()]
        found = [average(pool, own) for own in heads]
        seen = np.median([different_videos(pool, own, batch_size, stride) for own in heads])
        papers = -np.expm1(batch_size * num_heads * steps * np.log1p(-video)).sum()
        row["stretches"].append(
            {
                "steps": num_heads * steps,
                "count": count,
                "classes": _median([distance(one.label, label) for one in found]),
                "videos": _median([distance(one.video, video) for one in found]),
                "different_videos": {"pool": float(seen), "paper": float(papers), "ratio": float(seen / papers)},
            }
        )
    return row


def _median(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.median([one[key] for one in found])) for key in found[0]}


# --- the machines --------------------------------------------------------------------------------------------------


def log_unfetched(pooled: Pooled, num_ranks: int, batch_size: int) -> tuple[Ints, Ints, Floats]:
    """What a step draws from, piece by piece of the ring: shard (numbers in `pooled.shards`), rank, and logarithm of
    the probability that this piece is not drawn from."""
    ends = pooled.upto[np.cumsum(pooled.counts) - 1]
    edges = np.union1d(np.append(0, ends), np.arange(batch_size + 1) / batch_size)
    middle, length = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    part = (middle * batch_size).astype(np.int64)
    with np.errstate(divide="ignore"):
        log_missed = np.log1p(-np.minimum(length * batch_size, 1))
    return np.searchsorted(ends, middle), part * num_ranks // batch_size, log_missed


def fetch_rows(pool: ShardPool, batch_size: int, first: int = 0) -> list[dict[str, Any]]:
    """For each number of machines: how many of them fetch a shard during its stay in the pool, where each keeps what it
    has fetched until it leaves the pool; and how many shards a machine holds then. Expected values, over the shards of
    an epoch or MAX_COUNTED, from entry `first` of the sequence on."""
    num_shards, most = len(pool.table.shards), max(WORLD_SIZES)
    log_unseen = np.zeros((num_shards, most))  # so far in its stay, by rank
    sizes = [size for size in WORLD_SIZES if size <= pool.num_shards]
    fetches: dict[int, list[float]] = {size: [] for size in sizes}
    held: dict[int, list[Floats]] = {size: [] for size in sizes}
    number_of = {shard: number for number, shard in enumerate(pool.table.shards.tolist())}
    before: set[int] = set()
    for head in range(first - pool.num_shards, first + min(num_shards, MAX_COUNTED) + 1):
        pooled = pool.at(SEED, head * pool.num_steps)
        numbers = np.array([number_of[shard] for shard in pooled.shards.tolist()])
        now = set(numbers.tolist())
        for gone in before - now:
            if head > first:
                for size in sizes:
                    fetches[size].append(float(-np.expm1(_of_ranks(log_unseen[gone], size)).sum()))
            log_unseen[gone] = 0
        before = now
        shard, rank, log_missed = log_unfetched(pooled, most, batch_size)
        np.add.at(log_unseen, (numbers[shard], rank), pool.num_steps * log_missed)
        if head >= first and head % max(1, pool.num_shards // 4) == 0:
            for size in sizes:
                held[size].append(-np.expm1(_of_ranks(log_unseen[numbers], size)).sum(0))
    return [
        {
            "world_size": size,
            "fetches_per_shard": float(np.mean(fetches[size])),
            "held_shards": {"mean": float(np.mean(held[size])), "most": float(np.max(held[size]))},
            "held_pct": 100 * float(np.mean(held[size])) / pool.num_shards,
        }
        for size in sizes
    ]


def _of_ranks(logs: Floats, world_size: int) -> Floats:
    """Logarithms by the most ranks (..., most) added up to those of fewer, (..., world_size)."""
    return logs.reshape(*logs.shape[:-1], world_size, -1).sum(-1)


# --- the program ---------------------------------------------------------------------------------------------------


def measure(
    name: str, table: Table, pools: list[int], batch_size: int, steps: int, quick: bool
) -> list[dict[str, Any]]:
    """A row for each pool that is smaller than the set."""
    rows, stretches = [], QUICK_STRETCHES if quick else STRETCHES
    for num_shards in tqdm([p for p in pools if p < len(table.shards)], desc=name, unit="pool", disable=None):
        pool = ShardPool(table, num_shards, steps)
        row: dict[str, Any] = {"set": name, "videos": len(table.video), "classes": table.num_classes}
        row |= {"shards": len(table.shards), "pool_shards": num_shards, "batch_size": batch_size}
        row |= draw_row(pool, batch_size, stretches) | {"machines": fetch_rows(pool, batch_size)}
        videos, absent = row["epoch"]["videos"]["total_variation"], row["classes_absent"]["mean"]
        say(f"{name} pool={num_shards}  absent classes={absent:.3g}  videos over an epoch={videos:.3g}")
        rows.append(row)
    return rows


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="The draw from a shuffle pool against the paper's.")
    parser.add_argument("--data", metavar="DIR", help="packed data set to look at beside the made ones")
    parser.add_argument(
        "--pool-steps", type=int, default=4, metavar="S", help="steps from exchange to exchange (default %(default)s)"
    )
    parser.add_argument(
        "--pools",
        type=int,
        nargs="+",
        default=POOLS,
        metavar="P",
        help="shards of the made sets' pools (default: 16 to 1024)",
    )
    parser.add_argument("--quick", action="store_true", help="one small set: does it run?")
    add_out(parser, "draw_statistics")
    options = parser.parse_args(argv)
    if options.pool_steps < 1:
        raise ValueError(f"--pool-steps {options.pool_steps}: expected at least 1.")
    if min(options.pools) < 1:
        raise ValueError(f"--pools {min(options.pools)}: expected at least 1 shard.")
    partial = options.data is None or not set(POOLS) <= set(options.pools)
    out = result_path(options.out, "draw_statistics", quick=options.quick, partial=partial)
    rows, dataset = _real_rows(options) if options.data else ([], None)
    for made in QUICK_SETS if options.quick else MADE_SETS:
        pools = [4] if options.quick else options.pools
        rows += measure(made.name, make_table(made), pools, 256, options.pool_steps, options.quick)
    config = {"seed": SEED, "pool_steps": options.pool_steps, "quick": options.quick, "dataset": dataset}
    config |= {"videos_per_shard": VIDEOS_PER_SHARD, "unbalance": {made.name: made.unbalance for made in MADE_SETS}}
    write_result(out, config, rows=rows)
    print(f"written to {out}")
    return 0


def _real_rows(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Rows of a packed set, all its videos, in batches of 64; and its fingerprint."""
    index = open_index(options.data)
    _, label = np.unique(index.labels, return_inverse=True)
    table = Table.of(index.shard, label)
    name = f"{index.num_videos} clips of {index.metadata.get('name')}"
    pools = [4] if options.quick else [4, 8, 16]
    return measure(name, table, pools, 64, options.pool_steps, options.quick), index.fingerprint


if __name__ == "__main__":
    sys.exit(main())
