"""Displacement fields from pairs of frames: a dict of methods, each with the exact parameters it runs with.

Measured on one core: mean end-point error over the six Middlebury pairs of known motion, and time per pair at 341x256.

    method      error px   ms per pair
    farneback      0.79          25
    dis            0.33          13      default: the most accurate and the fastest
    tvl1           0.76        2600      0.20 without Urban2, whose 22 px are too much for its five scales

TV-L1 stands nearest to the method of the paper's experiments (Brox et al. 2004; sec. 5), and is the finest on small
motion, but a second and more per pair is a cluster's job.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.video import import_cv2

Grey = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]

DEFAULT_METHOD = "dis"


@dataclass(frozen=True)
class FlowMethod:
    """A way to compute displacement: `method(grey0, grey1)` maps two frames (H, W) uint8 to the field of grey0.

    The field is (2, H, W) float32 px/frame, channels dx, dy: grey0[y, x] is found again at grey1[y + dy, x + dx].
    Raises ValueError if the frames differ in shape, or the method yields values that are not finite.
    """

    name: str
    parameters: dict[str, Any]
    version: str
    _calc: Callable[[Grey, Grey], npt.NDArray[np.float32]]

    def __call__(self, grey0: Grey, grey1: Grey) -> Field:
        if grey0.shape != grey1.shape or grey0.ndim != 2 or grey0.dtype != np.uint8 or grey1.dtype != np.uint8:
            raise ValueError(
                f"grey0 is {grey0.dtype} {grey0.shape}, grey1 {grey1.dtype} {grey1.shape}: expected two uint8 (H, W)."
            )
        field = self._calc(grey0, grey1)  # (H, W, 2)
        if not np.isfinite(field).all():
            raise ValueError(f"{self.name} yielded displacements that are not finite, on frames of {grey0.shape}.")
        return np.ascontiguousarray(field.transpose(2, 0, 1), np.float32)

    def metadata(self) -> dict[str, Any]:
        """What `dataset.json` records under "flow"."""
        return {
            "method": self.name,
            "parameters": self.parameters,
            "library": "opencv-contrib-python",
            "version": self.version,
        }


def flow_method(name: str = DEFAULT_METHOD) -> FlowMethod:
    """A method by its name. Sets OpenCV to one thread in this process: packing is parallel by video.

    Make one for every video: then nothing can be carried over from the video before.
    """
    if name not in FLOW_METHODS:
        raise ValueError(f"method {name!r} is unknown; there are {', '.join(FLOW_METHODS)}.")
    cv2 = import_cv2()
    cv2.setNumThreads(1)
    return FLOW_METHODS[name](cv2)


def _farneback(cv2: ModuleType) -> FlowMethod:
    parameters = {
        "pyr_scale": 0.5, "levels": 5, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.1, "flags": 0
    }  # fmt: skip

    def calc(grey0: Grey, grey1: Grey) -> Field:
        field: Field = cv2.calcOpticalFlowFarneback(grey0, grey1, None, **parameters)
        return field

    return FlowMethod("farneback", parameters, cv2.__version__, calc)


def _dis(cv2: ModuleType) -> FlowMethod:
    solver = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM)
    return _from_solver("dis", {"preset": "medium"}, solver, cv2)


def _tvl1(cv2: ModuleType) -> FlowMethod:
    if not hasattr(cv2, "optflow"):
        raise ImportError("TV-L1 is in OpenCV's contrib modules: install opencv-contrib-python, not opencv-python.")
    return _from_solver("tvl1", {}, cv2.optflow.DualTVL1OpticalFlow.create(), cv2)


def _from_solver(name: str, parameters: dict[str, Any], solver: Any, cv2: ModuleType) -> FlowMethod:
    """A method of a solver object; its parameters are asked of it, so that they are those of this OpenCV."""
    getters = [key for key in sorted(dir(solver)) if key.startswith("get") and key != "getDefaultName"]
    known = {key.removeprefix("get"): getattr(solver, key)() for key in getters}

    def calc(grey0: Grey, grey1: Grey) -> Field:
        field: Field = solver.calc(grey0, grey1, None)  # a field given here would be taken for a first guess
        return field

    return FlowMethod(name, parameters | known, cv2.__version__, calc)


#: name -> factory, called with the cv2 module
FLOW_METHODS: dict[str, Callable[[ModuleType], FlowMethod]] = {"farneback": _farneback, "dis": _dis, "tvl1": _tvl1}
