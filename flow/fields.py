"""What a displacement field means: numpy definitions that every faster path is compared with.

A field is float32 (2, H, W) in px/frame: component 0 is dx (to the right), component 1 is dy (down).
"""

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
