"""The one affine map between codes and network inputs: range, mean subtraction, mirrored sign and scale together.

    input = (code - shift) / width

A graph's last operator computes it with numbers of each image, so all of it costs nothing extra.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.batch import FLOW_SCALE, PCA_STD, PCA_VECTORS, RGB_MEAN, RGB_STD, StreamSpec

Floats = npt.NDArray[np.float64]


def image_affine(
    entries: npt.NDArray[Any], mirror: npt.NDArray[np.bool_], alpha: npt.NDArray[np.float32], spec: StreamSpec
) -> tuple[Floats, Floats]:
    """Shift and width of every image of a batch.

    entries (n, steps, kinds); mirror (n,); alpha (n, 3). Returns two (n * num_images, channels) float64 arrays, with
    one channel for a component and three for RGB.

    A component's code c stands for lo + c * step px/frame, step = (hi - lo) / 255. The input is
    sign * FLOW_SCALE * (lo + c * step - mean), where sign is -1 for dx of a mirrored sample: after dequantisation, as
    255 - c would be off by one code. Simonyan & Zisserman 2014, sec. 3.1 and 5.
    """
    if spec.stream == "spatial":
        offset = alpha.astype(np.float64) * PCA_STD @ PCA_VECTORS.T  # (n, 3) grey levels
        offset = np.repeat(offset, spec.steps, axis=0)  # the frames of a sample share its colour
        return RGB_MEAN - offset, np.tile(RGB_STD.astype(np.float64), (len(offset), 1))
    lo, hi = entries["lo"].astype(np.float64), entries["hi"].astype(np.float64)
    step = (hi - lo) / 255  # px/frame a code; the codec never writes an empty range
    shift = ((entries["mean"] if spec.subtract_mean else 0) - lo) / step
    sign = np.ones(entries.shape)
    sign[:, :, 0] = np.where(mirror, -1, 1)[:, None]
    width = sign / (FLOW_SCALE * step)
    return shift.reshape(-1, 1), width.reshape(-1, 1)
