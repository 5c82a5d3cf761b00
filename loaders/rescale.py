"""Frames asked for at another size than they are stored at.

With `StreamSpec.size_px` every frame is thought of as rescaled so that min(H, W) = size_px. Crops are drawn and cut
there, and displacements are in px of it. Pixels are squares, and values stand for their centres:

    stored     |     0     |     1     |     2     |     3     |     4 px
    rescaled   |   0   |   1   |   2   |   3   |   4   |   5   |     6 px; the centre of its pixel 2 is at stored pixel
                                                                     (2 + 1/2) * 4/6 - 1/2 = 1.17: 0.83 of 1, 0.17 of 2

Bilinear, beyond the border the border's value, and no antialiasing: down to half the size each stored pixel still has
its part in the result, and at exactly half it is the mean of four. More than that would skip pixels and is refused.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from loaders.batch import StreamSpec
from loaders.index import Index, Ints


def settled(spec: StreamSpec, index: Index, rows: Ints) -> StreamSpec:
    """The spec, without its size if that is what every listed video is stored at: then nothing is to be rescaled."""
    stored = stored_sizes(index, rows).min(axis=1)
    return replace(spec, size_px=None) if (stored == spec.size_px).all() else spec


def stored_sizes(index: Index, video: Ints) -> Ints:
    """Height and width (n, 2) px of the stored frames of videos."""
    return np.stack([index.heights[video], index.widths[video]], axis=1)


def frame_sizes(index: Index, video: Ints, spec: StreamSpec) -> Ints:
    """Height and width (n, 2) px of the frames that crops of videos are cut from.

    Rounded as in `flow.video.resize`: the smaller side is size_px, the other keeps the aspect, to the nearest pixel.
    """
    stored = stored_sizes(index, video)
    if spec.size_px is None:
        return stored
    return np.maximum(np.rint(stored * spec.size_px / stored.min(axis=1, keepdims=True)).astype(np.int64), 1)


def vector_scale(index: Index, video: Ints, spec: StreamSpec) -> npt.NDArray[np.float64]:
    """Factors (n, 2) of stored dx and dy: displacements are scaled with their frame, W'/W and H'/H."""
    return (frame_sizes(index, video, spec) / stored_sizes(index, video))[:, ::-1]


def check_crop(index: Index, rows: Ints, spec: StreamSpec) -> None:
    """Raise ValueError if a listed video cannot be rescaled to the size asked for, or is then smaller than the crop."""
    if not len(rows):
        raise ValueError("The list of videos is empty. Check the split's file in the packed data set.")
    stored = stored_sizes(index, rows)
    row = int(stored.min(axis=1).argmax())
    if spec.size_px is not None and 2 * spec.size_px < stored[row].min():
        raise ValueError(
            f"{_named(index, rows[row])}; size={spec.size_px} would be less than half of it, where bilinear "
            f"interpolation skips pixels. Ask for {(stored[row].min() + 1) // 2} or more, or pack at that size."
        )
    sizes = frame_sizes(index, rows, spec)
    row = int(sizes.min(axis=1).argmin())
    if sizes[row].min() < spec.crop_px:
        height, width = sizes[row]
        rescaled = "" if spec.size_px is None else f", and {height}x{width} px at size={spec.size_px}"
        remedy = "pack with a larger --size" if spec.size_px is None else "ask for a larger size"
        raise ValueError(
            f"{_named(index, rows[row])}{rescaled}, which cannot hold crops of {spec.crop_px} px. Lower crop_px, or "
            f"{remedy}."
        )


def _named(index: Index, row: int) -> str:
    return f"{index.video_ids([row])[0]} is stored at {index.heights[row]}x{index.widths[row]} px"
