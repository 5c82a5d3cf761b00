"""Camera motion between two frames as a homography, and the field less it: what moves in the scene remains.

    d'(x) = d(x) - (H x - x)        H maps where a point of the background is in frame t to where it is in frame t+1

The paper names camera motion compensation as the missing ingredient (Simonyan & Zisserman 2014, sec. 7); improved dense
trajectories (Wang & Schmid 2013) estimate H by RANSAC over matches at corners, taken from the dense flow, and over
SURF matches. Here it is the corners and their flow alone. Measured with DIS on 135 pairs of 29 UCF-101 and HMDB-51
clips at 256 px, and on 40 generated pairs: the frame warped back by H is 2.54 grey levels off, with SIFT matches
besides 2.56, ORB 2.61, without H 3.20; H itself 0.03 px, with SIFT 0.02, ORB 0.03; it takes 3 ms a pair, with SIFT 96,
ORB 21. And where the flow misses a motion, subtracting the true one would not repair the field.

Deterministic: RANSAC begins with the same seed in every call.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from flow.extract import Field, Grey
from flow.video import import_cv2

MODELS = ("homography",)

#: Shi-Tomasi corners: at most so many, with this share of the strongest one's response, so far apart.
CORNERS, RESPONSE, DISTANCE_PX = 500, 0.001, 8
#: A match this near to H is an inlier.
THRESHOLD_PX = 0.3
#: H is trusted with so many inliers, and this share of all. On the real pairs, H forward and H backward are up to
#: 0.9 px apart above that share, and mostly more than 1 px below: water, crowds, blur.
MIN_INLIERS, MIN_SHARE = 20, 0.2
#: ... and if it moves no corner of the frame by more than this share of the frame's smaller side.
MAX_SHIFT = 0.25

Homography = npt.NDArray[np.float64]


class CameraError(ValueError):
    """Two frames do not show how the camera moved."""


def camera_metadata(model: str | None) -> dict[str, Any] | None:
    """What `dataset.json` records under "flow", "camera". Raises ValueError for an unknown model."""
    if model is None:
        return None
    if model not in MODELS:
        raise ValueError(f"camera {model!r} is unknown; there is {', '.join(MODELS)}.")
    parameters = {
        "corners": CORNERS,
        "response": RESPONSE,
        "distance_px": DISTANCE_PX,
        "threshold_px": THRESHOLD_PX,
        "min_inliers": MIN_INLIERS,
        "min_share": MIN_SHARE,
        "max_shift": MAX_SHIFT,
    }
    library = {"library": "opencv-contrib-python", "version": import_cv2().__version__}
    return {"model": model, "parameters": parameters, **library}


def estimate_camera(grey: Grey, field: Field) -> Homography:
    """H (3, 3) of the camera, from a frame (H, W) uint8 and its field (2, H, W) px/frame.

    Raises CameraError if too little of the frame moves like one plane.
    """
    cv2 = import_cv2()
    found = cv2.goodFeaturesToTrack(grey, CORNERS, RESPONSE, DISTANCE_PX)
    corners = np.empty((0, 2), np.float32) if found is None else found.reshape(-1, 2)
    if len(corners) < MIN_INLIERS:
        raise CameraError(f"{len(corners)} corners, expected {MIN_INLIERS} or more: the frame shows too little.")
    columns, rows = corners.astype(np.intp).T
    matches = corners + field[:, rows, columns].T
    homography, inliers = cv2.findHomography(corners, matches, cv2.USAC_FAST, THRESHOLD_PX)
    num_inliers = 0 if homography is None else int(np.count_nonzero(inliers))
    if num_inliers < max(MIN_INLIERS, MIN_SHARE * len(corners)):
        raise CameraError(f"{num_inliers} of {len(corners)} corners move alike: no camera's motion stands out.")
    _check_shift(homography, *grey.shape)
    return np.asarray(homography, np.float64)


def _check_shift(homography: Homography, height: int, width: int) -> None:
    """Raise CameraError for an H that no camera's motion from one frame to the next explains."""
    corners = np.array([(x, y, 1) for x in (0, width - 1) for y in (0, height - 1)], np.float64).T
    x, y, depth = homography @ corners
    limit_px = MAX_SHIFT * min(height, width)
    if not np.hypot(x / depth - corners[0], y / depth - corners[1]).max() <= limit_px:  # NaN is refused too
        raise CameraError(f"a corner of the frame would move by more than {limit_px:.0f} px.")


def camera_motion(homography: Homography, height: int, width: int) -> Field:
    """H x - x at every pixel x of a frame: (2, height, width) float32 px/frame, to 1e-4 px."""
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    across, down, depth = (row[0] * x + (row[1] * y + row[2]) for row in homography.astype(np.float32))
    across /= depth
    across -= x
    down /= depth
    down -= y
    return np.stack([across, down])


def subtract_camera(field: Field, homography: Homography) -> Field:
    """The field (2, H, W) px/frame relative to the background that moves by H."""
    return field - camera_motion(homography, *field.shape[1:])
