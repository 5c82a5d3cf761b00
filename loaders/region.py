"""Which part of a frame is needed: of rescaled frames, what interpolation looks at; for trajectories, the crop and what
its points can reach.

The ranges of the fields, which the index knows, say how far that is. So what is sampled from the decoded part is what
would be sampled from the whole frame, also at the crop's border.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.batch import StreamSpec
from loaders.draw import Draw
from loaders.index import Index, Ints
from loaders.rescale import frame_sizes, stored_sizes

#: What rounding in float32 may add to the length of a path, in px.
_SLACK_PX = 1e-2


@dataclass(frozen=True)
class Region:
    """A part of each sample's frame, rescaled if asked for: start, size and frame size, (n, 2) px, y before x."""

    start: Ints
    size: Ints
    frame: Ints


@dataclass(frozen=True)
class Patch:
    """The part of each sample's *stored* frame that a region is made from.

    start, size: what is decoded, (n, 2) px. begin, end: where the region's borders lie in it, (n, 2) px, fractions of
    them where frames are rescaled. All y before x.
    """

    start: Ints
    size: Ints
    begin: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]


def stored_patch(region: Region, video: Ints, index: Index) -> Patch:
    """What of the stored frames of the samples' videos (n,) a region needs; see `rescale` for where pixels lie."""
    stored = stored_sizes(index, video)
    ratio = stored / region.frame  # 1 where nothing is rescaled, and the patch is then the region
    stop = region.start + region.size
    first, last = (region.start + 0.5) * ratio - 0.5, (stop - 0.5) * ratio - 0.5  # the outermost pixels' centres
    start = np.floor(first).astype(np.int64).clip(0)
    end = (np.ceil(last).astype(np.int64) + 1).clip(None, stored)
    return Patch(start, end - start, region.start * ratio - start, stop * ratio - start)


def largest_patch(spec: StreamSpec, index: Index, rows: Ints) -> int:
    """Side in px of what holds the patch of any crop of any listed video."""
    if spec.size_px is None:
        return spec.crop_px
    ratio = (stored_sizes(index, rows) / frame_sizes(index, rows, spec)).max()
    return int((spec.crop_px - 1) * ratio) + 3  # the outermost pixels' distance, and the stored pixels around


def whole_frames(draw: Draw, spec: StreamSpec, index: Index) -> Region:
    """All of every frame."""
    frame = frame_sizes(index, draw.video, spec)
    return Region(np.zeros_like(frame), frame, frame)


def crops(draw: Draw, spec: StreamSpec, index: Index) -> Region:
    """The crop of every sample."""
    return Region(draw.crop, np.full_like(draw.crop, spec.crop_px), frame_sizes(index, draw.video, spec))


def reachable(draw: Draw, entries: npt.NDArray[Any], spec: StreamSpec, index: Index) -> Region:
    """The crop and what its points can reach, within the frame; entries (n, L, 2) are the samples' index entries.

    A point moves at most by the sum of the fields' extremes, the last field's left out, for nothing is sampled after
    it; one pixel more is what bilinear interpolation looks at.
    """
    frame = frame_sizes(index, draw.video, spec)
    chains = entries.reshape(len(draw), spec.num_chains, spec.chain_steps, 2)[:, :, :-1]
    back = np.minimum(chains["lo"], 0).sum(axis=2, dtype=np.float64).min(axis=1)[:, ::-1]  # (n, 2): dy, dx
    ahead = np.maximum(chains["hi"], 0).sum(axis=2, dtype=np.float64).max(axis=1)[:, ::-1]
    start = np.floor(draw.crop + back - _SLACK_PX).clip(0).astype(np.int64)
    stop = np.ceil(draw.crop + spec.crop_px + ahead + _SLACK_PX).clip(None, frame).astype(np.int64)
    return Region(start, stop - start, frame)
