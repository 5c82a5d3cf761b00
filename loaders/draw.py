"""Which training sample, as a pure function of numbers. Randomness enters here and nowhere else.

Draws for the *global* batch are made by every rank, which then takes its slice: 1, 2 or 4 processes train on the same
sequence of global batches, and a resumed run needs one integer, the step.

Decode once, stack many: with k = `stacks_per_window`, a window of L + k - 1 consecutive fields gives k stacks. Slot
q * k + j of every batch holds stack j of a window that was born (its stack 0 used) about j * SPREAD steps before:

    step      0 1 2 3   4 5 6 7   8 9 ...      blocks of SPREAD = 4 steps; m = batch_size / k windows are born a step,
    slot q,0  a b c d   e f g h   i j          here those of one q: a, b, c, ...
    slot q,1  . . . .   c a d b   f h          a block later each is used again, in a drawn order
    slot q,2  . . . .   . . . .   b c          and again: k times in all, in k different batches

Dots are windows born before step 0: drawn like all others, since births may be negative. So a batch remains a function
of (seed, step), and what a resumed run has to decode again are only the windows that are still in use.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loaders.batch import PCA_ALPHA_STD, StreamSpec
from loaders.index import Index
from loaders.rescale import check_crop, frame_sizes

if TYPE_CHECKING:
    from loaders.shard_pool import Pooled, ShardPool

Ints = npt.NDArray[np.int64]

#: Keeps apart under one seed: the draws of the two streams, the orders in which windows are used again, replacements,
#: the orders of shards.
_STREAM_COUNTER = {"spatial": 0, "temporal": 1}
_ORDER_COUNTER = 2
_INSTEAD_COUNTER = {"spatial": 3, "temporal": 4}
_SHARDS_COUNTER = 5

#: Mean number of steps between two stacks of one window.
SPREAD = 4


@dataclass(frozen=True)
class Draw:
    """n samples. All arrays have n rows.

    video  (n,) row of the index          tau    (n,) first frame or field, 0-based; of bi-directional stacks the middle
    crop   (n, 2) y0, x0 in px of the frame, rescaled if asked for; its size is the stream's crop_px
    mirror (n,) bool                      alpha  (n, 3) weights of the colour components
    valid  (n,) bool, False for padding
    window (n, 2) which window the sample is cut from: the step of its birth, its number in that step
    first  (n,) first frame or field of that window
    """

    video: Ints
    tau: Ints
    crop: Ints
    mirror: npt.NDArray[np.bool_]
    alpha: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    window: Ints
    first: Ints

    @classmethod
    def of_stacks(
        cls,
        video: Ints,
        tau: Ints,
        crop: Ints,
        mirror: npt.NDArray[np.bool_],
        alpha: npt.NDArray[np.float32] | None = None,
        valid: npt.NDArray[np.bool_] | None = None,
    ) -> "Draw":
        """Samples that share no window; without colour and all valid unless given."""
        n = len(video)
        return cls(
            video=video,
            tau=tau,
            crop=crop,
            mirror=mirror,
            alpha=np.zeros((n, 3), np.float32) if alpha is None else alpha,
            valid=np.ones(n, bool) if valid is None else valid,
            window=np.stack([np.zeros(n, np.int64), np.arange(n)], axis=1),
            first=tau,
        )

    def __len__(self) -> int:
        return len(self.video)

    def take(self, rows: Ints | slice) -> "Draw":
        """Some of the samples."""
        return Draw(**{f.name: getattr(self, f.name)[rows] for f in fields(Draw)})

    def put(self, rows: Sequence[int], others: "Draw") -> "Draw":
        """The samples with others in the place of some."""
        values = {f.name: getattr(self, f.name).copy() for f in fields(Draw)}
        for name, array in values.items():
            array[list(rows)] = getattr(others, name)
        return Draw(**values)

    @staticmethod
    def concatenate(draws: Sequence["Draw"]) -> "Draw":
        """The samples of several draws, one draw after the other."""
        return Draw(**{f.name: np.concatenate([getattr(draw, f.name) for draw in draws]) for f in fields(Draw)})


@dataclass(frozen=True)
class Population:
    """The videos of a training list that are long enough, grouped by class.

    rows (num_videos,): rows of the index, class after class; class k has rows[start[k] : start[k + 1]].
    num_frames: of those rows. size (num_videos, 2): height and width of the frames that crops are drawn in.
    num_left_out: listed videos that are too short.
    pool: which of them can be drawn at a step; None: all, always.
    """

    rows: Ints
    start: Ints
    num_frames: Ints
    size: Ints
    num_left_out: int
    pool: "ShardPool | None" = None


def population(index: Index, rows: Ints, spec: StreamSpec) -> Population:
    """Group listed videos by class, leaving out those too short for a sample.

    Raises ValueError if none is left, or if a video is smaller than the crop.
    """
    rows = np.asarray(rows, np.int64)
    check_crop(index, rows, spec)
    long_enough = rows[index.num_frames[rows] >= spec.frames_needed]
    if not len(long_enough):
        steps = f"L={spec.L}" if spec.is_temporal else f"rgb_frames={spec.rgb_frames}"
        raise ValueError(
            f"None of {len(rows)} training videos has the {spec.frames_needed} frames that {spec.stream} samples with "
            f"{steps} need. Take fewer, or longer videos."
        )
    by_class = long_enough[np.lexsort((long_enough, index.labels[long_enough]))]
    _, counts = np.unique(index.labels[by_class], return_counts=True)
    return Population(
        rows=by_class,
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        num_frames=index.num_frames[by_class],
        size=frame_sizes(index, by_class, spec),
        num_left_out=len(rows) - len(by_class),
    )


def check_batch_size(batch_size: int, world_size: int, spec: StreamSpec) -> None:
    """Raise ValueError if a global batch does not divide into equal slices of whole windows."""
    k = spec.stacks_per_window
    if batch_size < 1 or batch_size % (world_size * k):
        raise ValueError(
            f"A global batch of {batch_size} cannot be shared evenly by {world_size} processes"
            f"{f', in windows of {k} stacks' if k > 1 else ''}. Take a multiple of {world_size * k}."
        )


def draw_batch(
    seed: int,
    step: int,
    videos: Population,
    spec: StreamSpec,
    batch_size: int,
    draw_born: Callable[[int], Draw] | None = None,
) -> Draw:
    """The global training batch of one step: a pure function of its arguments.

    Each slot: a class, uniform over the classes; a video of it, uniform; tau, uniform over the starts that fit; a crop
    anywhere in the frame; mirrored with probability 1/2; colour weights. Simonyan & Zisserman 2014, sec. 5. With
    several stacks a window that holds for every slot alone; slots of one window share the video and lie near in time.
    With a shuffle pool classes and videos are those of the pool, as `draw_pooled` says.
    draw_born: what is born in a step, remembered, for those who draw step after step.

    Raises ValueError if seed or step is negative, or the batch does not divide into windows.
    """
    k = spec.stacks_per_window
    draw_born = draw_born or (lambda birth: _draw_born(seed, birth, videos, spec, batch_size))
    if seed < 0 or step < 0:
        raise ValueError(f"seed={seed}, step={step}: both count from 0.")
    check_batch_size(batch_size, 1, spec)
    if k == 1:
        return draw_born(step)
    birth = np.stack([_births(seed, step, j, batch_size // k) for j in range(k)], axis=1).reshape(-1)  # slot q * k + j
    steps, group = np.unique(birth, return_inverse=True)
    born = [draw_born(int(b)) for b in steps]
    return Draw.concatenate(born).take(group * batch_size + np.arange(batch_size))


def _births(seed: int, step: int, use: int, num_windows: int) -> Ints:
    """Birth of the window that each q < num_windows uses for the `use`-th time, from 0, in a step: (num_windows,)."""
    block, position = divmod(step, SPREAD)
    if use == 0:
        return np.full(num_windows, step)
    generator = np.random.Generator(np.random.Philox(key=[seed, block], counter=[0, use, 0, _ORDER_COUNTER]))
    order = generator.permuted(np.tile(np.arange(SPREAD), (num_windows, 1)), axis=1)
    return (block - use) * SPREAD + order[:, position]


def _draw_born(seed: int, birth: int, videos: Population, spec: StreamSpec, batch_size: int) -> Draw:
    """All stacks of the windows born in a step: row q * k + j is stack j of window q."""
    num_windows = batch_size // spec.stacks_per_window
    generator = _generator(seed, birth, [0, 0, 0, _STREAM_COUNTER[spec.stream]])
    if videos.pool is None:
        chosen = _of_class(_below(len(videos.start) - 1, num_windows, generator), videos, generator)
    else:
        chosen = draw_pooled(videos.pool.at(seed, birth), num_windows, generator)
    return _draw_windows(chosen, birth, np.arange(num_windows), videos, spec, generator)


def draw_pooled(pooled: "Pooled", num_windows: int, generator: np.random.Generator) -> Ints:
    """A video of the pool for each window, numbers in the population (num_windows,): window q is drawn from the q-th
    of num_windows equal parts of the probability.

        videos, shard after shard      a a b b b c d d d        each as wide as it is likely
        parts of 4 windows             |...|...|...|...|        window 0 is of shard a or b, window 3 of shard d

    Over the windows of a step that makes each class of the pool equally likely, and each video of a class in the pool,
    for a video's shares of the parts add up to its probability. And a rank, whose windows follow one another, draws
    from few shards: which ones does not change with what is drawn, as it would if windows drawn freely were sorted.
    """
    at = (np.arange(num_windows) + generator.random(num_windows)) / num_windows
    found = np.searchsorted(pooled.upto, at, "right")
    return pooled.video[np.minimum(found, len(pooled.video) - 1)]  # a rounded 1 is not below the last


def draw_shard_order(seed: int, epoch: int, num_shards: int) -> Ints:
    """The order in which the shards enter the pool in an epoch, which may be negative: a permutation (num_shards,)."""
    return _generator(seed, epoch, [0, 0, 0, _SHARDS_COUNTER]).permutation(num_shards)


def draw_instead(
    seed: int, window: tuple[int, int], attempt: int, video: int, videos: Population, spec: StreamSpec
) -> Draw:
    """What takes a window's place whose video is damaged: the k stacks of another one, of the same class.

    A pure function of its arguments. window: birth and number of the window, or step and slot of a sample that shares
    none. attempt: 1, or more if what was drawn instead is damaged too. video: row of the index, one of `videos`.
    With a shuffle pool the other one is of the pool of the window's birth, or of all videos if it holds none.
    """
    birth, number = window
    generator = _generator(seed, birth, [0, attempt, number, _INSTEAD_COUNTER[spec.stream]])
    place = np.flatnonzero(videos.rows == video)[:1]  # a list may name a video twice
    label = np.searchsorted(videos.start, place, "right") - 1
    others = np.empty(0, np.int64)
    if videos.pool is not None:
        pooled = videos.pool.at(seed, birth)
        others = pooled.video[(pooled.label == label) & (videos.rows[pooled.video] != video)]
    chosen = others[_below(len(others), 1, generator)] if len(others) else _of_class(label, videos, generator)
    return _draw_windows(chosen, birth, np.array([number]), videos, spec, generator)


def _generator(seed: int, birth: int, counter: list[int]) -> np.random.Generator:
    key = np.array([seed, birth % 2**64], np.uint64)  # births before step 0 are negative
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _below(bounds: Ints | int, size: int, generator: np.random.Generator) -> Ints:
    """Uniform integers in [0, bound)."""
    return (generator.random(size) * bounds).astype(np.int64)


def _of_class(label: Ints, videos: Population, generator: np.random.Generator) -> Ints:
    """A video, its number in the population, of each class in label (m,)."""
    return videos.start[label] + _below(videos.start[label + 1] - videos.start[label], len(label), generator)


def _draw_windows(
    chosen: Ints, birth: int, number: Ints, videos: Population, spec: StreamSpec, generator: np.random.Generator
) -> Draw:
    """The stacks of m windows, k each. chosen (m,): their videos, numbers in the population; number (m,)."""
    k = spec.stacks_per_window
    num_starts = videos.num_frames[chosen] - spec.frames_needed + 1
    tau = _below(num_starts, len(chosen), generator) + spec.frames_before
    first = tau
    if k > 1:
        tau, first = _spread_taus(tau, num_starts, k, generator)
        chosen = np.repeat(chosen, k)
    size = len(chosen)
    y0 = _below(videos.size[chosen, 0] - spec.crop_px + 1, size, generator)
    x0 = _below(videos.size[chosen, 1] - spec.crop_px + 1, size, generator)
    mirror = _below(2, size, generator).astype(bool) & spec.random_mirror
    alpha = generator.normal(0, PCA_ALPHA_STD, (size, 3)).astype(np.float32)
    return Draw(
        video=videos.rows[chosen],
        tau=tau,
        crop=np.stack([y0, x0], axis=1),
        mirror=mirror,
        alpha=alpha * (spec.stream == "spatial" and spec.color_jitter),
        valid=np.ones(size, bool),
        window=np.stack([np.full(size, birth), np.repeat(number, k)], axis=1),
        first=first,
    )


def _spread_taus(tau: Ints, num_starts: Ints, k: int, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """The k taus of each window and its first one, both (num_windows * k,), around a uniform tau (num_windows,).

        num_starts = 9, k = 4      starts   0 1 2 3 4 5 6 7 8
                                   tau=4        2 3 4 5          one of the 4 windows that hold it
                                   tau=8                  7 8    one of them, cut off: 7 and 8 come twice

    A window that reaches beyond the first or last start is cut off there, and its taus repeat. That leaves each stack's
    tau exactly uniform: a cut window is drawn as much less often as its taus repeat more often.
    """
    begin = tau - (generator.random(len(tau)) * k).astype(np.int64)
    first, end = np.maximum(begin, 0), np.minimum(begin + k, num_starts)
    order = generator.permuted(np.tile(np.arange(k), (len(tau), 1)), axis=1)
    width = end - first
    shift = (generator.random(len(tau)) * width).astype(np.int64)  # or the early taus would repeat more often
    offset = (order + shift[:, None]) % width[:, None]
    return (first[:, None] + offset).reshape(-1), np.repeat(first, k)


def rank_slots(rank: int, world_size: int, batch_size: int) -> tuple[int, int]:
    """(begin, end) of a rank's equal slice of a global batch."""
    n = batch_size // world_size
    return rank * n, (rank + 1) * n


def slot_draws(
    videos: Population, spec: StreamSpec, *, seed: int, batch_size: int, slots: tuple[int, int], start_step: int
) -> Iterator[Draw]:
    """Slots (begin, end) of the global batches from start_step on, without end.

    Raises ValueError at once if batch_size does not divide into whole windows.
    """
    check_batch_size(batch_size, 1, spec)
    k = spec.stacks_per_window
    remembered = lru_cache((k + 1) * SPREAD)(lambda birth: _draw_born(seed, birth, videos, spec, batch_size))
    return (
        draw_batch(seed, step, videos, spec, batch_size, remembered).take(slice(*slots)) for step in count(start_step)
    )
