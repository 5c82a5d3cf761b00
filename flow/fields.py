"""What a displacement field means: numpy definitions that every faster path is compared with.

A field is float32 (2, H, W) in px/frame: component 0 is dx (to the right), component 1 is dy (down).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def mirror_field(field: Array) -> Array:
    """Field of the horizontally mirrored video: the image is flipped, and what moved right now moves left.

    field (2, H, W) px/frame -> (2, H, W) px/frame. Mirroring twice is the identity.
    """
    mirrored = field[:, :, ::-1].copy()
    mirrored[0] *= -1
    return mirrored


def field_mean(field: Array) -> Array:
    """Mean displacement vector of a field (2, H, W): (2,) float32 px/frame. Summed in float64."""
    return field.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)


def subtract_mean(field: Array, mean: Array | None = None) -> Array:
    """Remove the global motion, mostly the camera's: the field (2, H, W) less its mean vector (2,).

    The mean is that of the *whole* field as extracted, so a crop of a field needs it passed in.
    Simonyan & Zisserman 2014, sec. 3.1.
    """
    return field - (field_mean(field) if mean is None else mean)[:, None, None]


def stack_fields(fields: Array, tau: int, L: int) -> Array:
    """Optical-flow stacking, eq. (1): L consecutive fields from tau on, as channels.

        fields   d_0 d_1 d_2 d_3 d_4          (num_frames - 1 of them)
        tau=1, L=3   [d_1 d_2 d_3]  ->  channels dx_1 dy_1 dx_2 dy_2 dx_3 dy_3

    fields (T-1, 2, H, W) px/frame -> (2L, H, W) px/frame. Raises ValueError if the stack leaves the video.
    Simonyan & Zisserman 2014, sec. 3.1.
    """
    num_fields, _, height, width = fields.shape
    if not 0 <= tau <= num_fields - L:
        raise ValueError(
            f"tau={tau} with L={L} needs fields {tau}..{tau + L - 1}, the video has 0..{num_fields - 1}. "
            f"Take tau in [0, {num_fields - L}]."
        )
    # (L, 2, H, W) -> (2L, H, W)
    return fields[tau : tau + L].reshape(2 * L, height, width)


def sample_bilinear(field: Array, points: Array) -> Array:
    """Field (2, H, W) at points (2, ...), x and y in px, 0 <= x <= W - 1, 0 <= y <= H - 1: (2, ...), bilinear."""
    height, width = field.shape[1:]
    x, y = points
    x0 = np.clip(np.floor(x), 0, max(width - 2, 0)).astype(np.int64)
    y0 = np.clip(np.floor(y), 0, max(height - 2, 0)).astype(np.int64)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    right, down = x - x0, y - y0
    above = field[:, y0, x0] * (1 - right) + field[:, y0, x1] * right
    below = field[:, y1, x0] * (1 - right) + field[:, y1, x1] * right
    return (above * (1 - down) + below * down).astype(np.float32)


def rescale_image(image: Array, height: int, width: int) -> Array:
    """Image (C, H, W) at another size, (C, height, width): bilinear, without antialiasing.

    A value stands for the centre of a square pixel; beyond the outermost centres it stays what it is there.
    """
    rows, columns = (
        np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        for new, old in zip((height, width), image.shape[1:], strict=True)
    )
    return sample_bilinear(image, np.stack(np.meshgrid(columns, rows)))


def rescale_field(field: Array, height: int, width: int) -> Array:
    """Field of the video whose frames are rescaled: (2, H, W) px/frame -> (2, height, width) px/frame of that size."""
    factor = np.array([width / field.shape[2], height / field.shape[1]], np.float32)
    return rescale_image(field, height, width) * factor[:, None, None]


def trajectory_points(fields: Array) -> Array:
    """Where each pixel of the first frame is in the frame of each field: p_1 .. p_L of eq. (2).

        p_1 = (u, v),  p_k = p_{k-1} + d_{tau+k-2}(p_{k-1})

    A point that would leave the frame stays at its border. fields (L, 2, H, W) px/frame, *raw*: a field less its mean
    vector moves nothing to where it is seen next -> (L, 2, H, W), x and y in px. Simonyan & Zisserman 2014, sec. 3.1.
    """
    height, width = fields.shape[2:]
    border = np.array([width - 1, height - 1], np.float32)[:, None, None]
    points = [np.stack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32)]
    for field in fields[:-1]:
        points.append(np.clip(points[-1] + sample_bilinear(field, points[-1]), 0, border))
    return np.stack(points)


def stack_trajectories(fields: Array, tau: int, L: int) -> Array:
    """Trajectory stacking, eq. (2): as `stack_fields`, with each field sampled along the trajectories from tau on.

    fields (T-1, 2, H, W) px/frame, raw -> (2L, H, W) px/frame. A field's mean, if it is to be subtracted, is
    subtracted from the samples. Raises ValueError if the stack leaves the video.
    """
    stack = stack_fields(fields, tau, L)
    stack = stack.reshape(L, 2, *stack.shape[1:])
    sampled = [sample_bilinear(field, points) for field, points in zip(stack, trajectory_points(stack), strict=True)]
    return np.concatenate(sampled)


def stack_bidirectional(
    forward: Array, backward: Array, tau: int, L: int, stack: Callable[[Array, int, int], Array] = stack_fields
) -> Array:
    """Bi-directional stacking: the motion from the middle frame tau to both sides.

        frames     0   1   2   3   4        forward   d_0 .. d_3, d_t from frame t to t+1
        tau=2, L=4         d_2 d_3          backward  b_1 .. b_4, b_t from frame t to t-1
                       b_1 b_2         ->   channels  d_2 d_3 b_2 b_1, dx and dy of each

    forward, backward (T-1, 2, H, W) px/frame: d_0 .. d_{T-2} and b_1 .. b_{T-1}; stack: `stack_fields` or
    `stack_trajectories` -> (2L, H, W) px/frame. Raises ValueError for an odd L, or if the stack leaves the video.
    Simonyan & Zisserman 2014, sec. 3.1.
    """
    half, last = L // 2, len(backward)
    if L % 2 or not half <= tau <= last - half:
        raise ValueError(f"tau={tau}, L={L}: L is even, and tau in [L/2, T-1-L/2] = [{half}, {last - half}].")
    # b_tau, b_{tau-1}, ...: the backward fields in the order in which time runs back.
    return np.concatenate([stack(forward, tau, half), stack(backward[::-1], last - tau, half)])
