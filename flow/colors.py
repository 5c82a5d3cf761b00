"""Displacement as colour: what a field looks like."""

import numpy as np
import numpy.typing as npt

#: The colour wheel of Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011: pure hues, and
#: where they stand in 55ths of a turn, from "to the right" over "down"; those between are mixed linearly.
WHEEL_AT = (0, 15, 21, 25, 36, 49, 55)
WHEEL_RGB = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0))


def flow_colors(field: npt.NDArray[np.float32], max_px: float) -> npt.NDArray[np.float64]:
    """Colours of displacements: hue says where to, saturation how far.

    White does not move; max_px has the full hue; what is longer is darkened, as it is off the scale.
    field (2, H, W) px/frame -> RGB (H, W, 3) in [0, 1]. Raises ValueError unless max_px is positive.
    """
    if not max_px > 0:
        raise ValueError(f"max_px={max_px}: the length in px that has full colour is positive.")
    place = np.arctan2(field[1], field[0]) / (2 * np.pi) % 1 * WHEEL_AT[-1]
    hue = np.stack([np.interp(place, WHEEL_AT, channel) for channel in zip(*WHEEL_RGB, strict=True)], axis=-1)
    length = (np.hypot(field[0], field[1]) / max_px)[..., None]
    return np.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue)


def color_wheel(side_px: int) -> npt.NDArray[np.float64]:
    """The legend of `flow_colors`: a disc of all displacements up to max_px, RGB (side_px, side_px, 3) in [0, 1]."""
    steps = np.linspace(-1, 1, side_px, dtype=np.float32)
    disc = np.stack(np.meshgrid(steps, steps))
    return np.where(np.hypot(*disc)[..., None] <= 1, flow_colors(disc, 1), 1)
