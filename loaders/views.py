"""Which test samples: the 25 stacks of a video, ten views of each (sec. 5), a stretch for each rank."""

from collections.abc import Iterator

import numpy as np

from loaders.batch import StreamSpec
from loaders.draw import Draw
from loaders.index import Index, Ints
from loaders.rescale import check_crop

#: The ten test views: four corners and the centre, plain and mirrored (sec. 5). (y, x, mirrored), where y and x are
#: fractions of the free border; a crop starts at floor(fraction * border).
VIEWS = tuple(
    (y, x, mirrored)
    for mirrored in (False, True)
    for y, x in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))
)


def view_crop(view: tuple[float, float, bool], frame: tuple[int, int], crop_px: int) -> tuple[int, int]:
    """y0, x0 of a view's crop in a frame (height, width)."""
    return int(view[0] * (frame[0] - crop_px)), int(view[1] * (frame[1] - crop_px))


def view_taus(num_frames: int, spec: StreamSpec, num_taus: int) -> Ints:
    """The tau of each test sample of one video, equally spaced from the first that fits to the last (sec. 5).

        num_frames = 31, L = 10, num_taus = 3      tau = 0, 10, 20; of bi-directional stacks 5, 15, 25

    A video shorter than a sample gives tau = 0 throughout, or its middle frame; its last field is repeated.
    """
    last = max(num_frames - spec.frames_needed, 0)
    first = min(spec.frames_before, (num_frames - 1) // 2)
    return first + (np.rint(np.linspace(0, last, num_taus)).astype(np.int64) if num_taus > 1 else np.array([last // 2]))


def enumerate_views(
    index: Index,
    rows: Ints,
    spec: StreamSpec,
    *,
    num_taus: int,
    taus: Ints | None = None,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[Draw]:
    """Test samples of one rank, in batches of (video, tau) pairs; each stands for its ten views.

    taus (len(rows),): a tau for each row, which may come several times, in the place of num_taus for each of them.
    All pairs in list order are cut into runs of batch_size, and each rank has one stretch of them: batch b of rank r is
    run r * num_batches + b. So a rank needs no more shards than those of its own videos. Every rank gives the same
    number of batches; the last ones are padded with invalid copies of the first pair.
    """
    check_crop(index, rows, spec)
    num_taus = num_taus if taus is None else 1
    total = len(rows) * num_taus
    num_batches = num_view_batches(total, batch_size, world_size)
    for batch in range(num_batches):
        pair = (rank * num_batches + batch) * batch_size + np.arange(batch_size)
        valid = pair < total
        pair = np.where(valid, pair, 0)
        video = np.asarray(rows, np.int64)[pair // num_taus]
        if taus is None:
            starts = {int(v): view_taus(int(index.num_frames[v]), spec, num_taus) for v in np.unique(video)}
            tau = np.array([starts[int(v)][p] for v, p in zip(video, pair % num_taus, strict=True)])
        else:
            tau = taus[pair]
        yield Draw.of_stacks(video, tau, np.zeros((batch_size, 2), np.int64), np.zeros(batch_size, bool), valid=valid)


def num_view_batches(num_pairs: int, batch_size: int, world_size: int) -> int:
    """Batches of (video, tau) pairs that each rank gets."""
    return -(-num_pairs // (batch_size * world_size))
