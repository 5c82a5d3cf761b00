"""Which part of a frame trajectories need: the crop, and what its points can reach.

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

#: What rounding in float32 may add to the length of a path, in px.
_SLACK_PX = 1e-2


@dataclass(frozen=True)
class Region:
    """The decoded part of each sample's frame: start, size, and the frame's size, all (n, 2) px, y before x."""

    start: Ints
    size: Ints
    frame: Ints


def whole_frames(draw: Draw, index: Index) -> Region:
    """All of every frame."""
    frame = _frame_sizes(draw, index)
    return Region(np.zeros_like(frame), frame, frame)


def reachable(draw: Draw, entries: npt.NDArray[Any], spec: StreamSpec, index: Index) -> Region:
    """The crop and what its points can reach, within the frame; entries (n, L, 2) are the samples' index entries.

    A point moves at most by the sum of the fields' extremes, the last field's left out, for nothing is sampled after
    it; one pixel more is what bilinear interpolation looks at.
    """
    frame = _frame_sizes(draw, index)
    chains = entries.reshape(len(draw), spec.num_chains, spec.chain_steps, 2)[:, :, :-1]
    back = np.minimum(chains["lo"], 0).sum(axis=2, dtype=np.float64).min(axis=1)[:, ::-1]  # (n, 2): dy, dx
    ahead = np.maximum(chains["hi"], 0).sum(axis=2, dtype=np.float64).max(axis=1)[:, ::-1]
    start = np.floor(draw.crop + back - _SLACK_PX).clip(0).astype(np.int64)
    stop = np.ceil(draw.crop + spec.crop_px + ahead + _SLACK_PX).clip(None, frame).astype(np.int64)
    return Region(start, stop - start, frame)


def _frame_sizes(draw: Draw, index: Index) -> Ints:
    return np.stack([index.heights[draw.video], index.widths[draw.video]], axis=1)
