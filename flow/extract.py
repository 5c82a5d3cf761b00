"""Displacement fields from pairs of frames: a dict of methods, each with the exact parameters it runs with.

What each costs and how far it is off: benchmarks/flow_accuracy.py and flow_extraction.py, and docs/flow.md.

    on the CPU               farneback, dis, tvl1, deepflow     of OpenCV
    on the CPU or a GPU      brox                               of ours (`flow.brox`), the paper's method (sec. 5)
    on a GPU                 nvof                               the GPU's own flow engine, by DALI (`flow.nvof`)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.command import did_you_mean
from flow.video import import_cv2

Grey = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]

DEFAULT_METHOD = "dis"

#: Methods that can run on a GPU; the others run on the CPU alone.
GPU_METHODS = frozenset({"brox", "nvof"})

#: Pairs that one call takes, of frames of up to so many pixels: a CPU's caches hold few, and a GPU wants many for each
#: launch of a kernel.
BATCH_PIXELS = 341 * 256
BROX_BATCH = {"cpu": 4, "cuda": 64}
NVOF_BATCH = 32


@dataclass(frozen=True)
class FlowMethod:
    """A way to compute displacement: `method(grey0, grey1)` maps two frames (H, W) uint8 to the field of grey0.

    The field is (2, H, W) float32 px/frame, channels dx, dy: grey0[y, x] is found again at grey1[y + dy, x + dx].
    `method.batch` does the same for many pairs at once, best for `pairs_at_once` of them. device: "cpu" or "cuda".
    Raises ValueError if the frames differ in shape, or the method yields values that are not finite.
    """

    name: str
    parameters: dict[str, Any]
    library: str
    version: str
    batch_pairs: int
    _calc: Callable[[Grey, Grey], Field]
    device: str = "cpu"

    def __call__(self, grey0: Grey, grey1: Grey) -> Field:
        return self.batch(grey0[None], grey1[None])[0]

    def batch(self, grey0: Grey, grey1: Grey) -> Field:
        """Fields (N, 2, H, W) float32 px/frame of the pairs grey0[i], grey1[i]: two arrays (N, H, W) uint8."""
        if grey0.shape != grey1.shape or grey0.ndim != 3 or grey0.dtype != np.uint8 or grey1.dtype != np.uint8:
            raise ValueError(
                f"grey0 is {grey0.dtype} {grey0.shape}, grey1 {grey1.dtype} {grey1.shape}: expected two uint8 "
                "(N, H, W) of one shape."
            )
        fields = self._calc(grey0, grey1)
        if not np.isfinite(fields).all():
            raise ValueError(f"{self.name} yielded displacements that are not finite, on frames of {grey0.shape[1:]}.")
        return fields

    def pairs_at_once(self, num_pixels: int) -> int:
        """Pairs of frames of so many pixels that a call of `batch` should take: of large ones fewer, for the memory."""
        return max(1, min(self.batch_pairs, self.batch_pairs * BATCH_PIXELS // num_pixels))

    def metadata(self) -> dict[str, Any]:
        """What `dataset.json` records under "flow"."""
        # A CPU and a GPU round differently: where a method runs on both, one pack is computed on one of them.
        where = {"device": self.device} if self.name in GPU_METHODS else {}
        return {
            "method": self.name,
            "parameters": self.parameters,
            "library": self.library,
            "version": self.version,
            **where,
        }


def flow_method(
    name: str = DEFAULT_METHOD, device: str = "cpu", parameters: Mapping[str, Any] | None = None
) -> FlowMethod:
    """A method by its name. Sets OpenCV, and torch if the method is of it, to one thread in this process: packing is
    parallel by video.

    device: "cpu", "cuda" or "cuda:1". parameters: values in the place of the defaults, by the names that `metadata`
    lists; those of one method only.
    Make one for every video: then nothing can be carried over from the video before.
    Raises ValueError for an unknown method or parameter, and for a device that the method cannot use.
    """
    if name not in FLOW_METHODS:
        near = did_you_mean(name, FLOW_METHODS)
        raise ValueError(f"method {name!r} is unknown; there are {', '.join(FLOW_METHODS)}.{near}")
    if device != "cpu" and name not in GPU_METHODS:
        raise ValueError(f"{name} runs on the CPU, not on {device!r}; on a GPU run {', '.join(sorted(GPU_METHODS))}.")
    import_cv2().setNumThreads(1)
    return FLOW_METHODS[name](device, parameters or {})


def method_of(metadata: Mapping[str, Any], device: str = "cpu") -> tuple[str, dict[str, Any]]:
    """Name and parameters of the method that a `dataset.json` records under "flow": what `flow_method` is called with.

    Raises ValueError if there is no such method here, as for flow that another tool computed, or it lacks a parameter.
    """
    name, recorded = metadata["method"], metadata.get("parameters") or {}
    own = flow_method(name, device).parameters
    parameters = {key: value for key, value in recorded.items() if key not in own or own[key] != value}
    flow_method(name, device, parameters)
    return name, parameters


def prove_method(name: str, device: str = "cpu", parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Metadata of a method, once it has computed a field here. To be run in a process of its own, which may die of it.

    Raises ValueError if the method, the parameters or the device are no good.
    """
    method = flow_method(name, device, parameters)
    try:
        method(*sample_pair())
    except Exception as error:  # of OpenCV, torch or DALI: they have no common class
        given = ", ".join(f"{key}={value!r}" for key, value in (parameters or {}).items())
        where = f"{device!r} with {given}" if given else f"{device!r}"
        raise ValueError(f"{name} cannot compute flow on {where}: {error}") from error
    return method.metadata()


def sample_pair() -> tuple[Grey, Grey]:
    """Two frames (240, 320) to try a method on: a pattern that moves by 1 px to the right."""
    y, x = np.mgrid[:240, :320]
    grey0, grey1 = ((128 + 60 * np.sin((x - dx) / 5) + 60 * np.cos(y / 7)).astype(np.uint8) for dx in (0, 1))
    return grey0, grey1


def merge_parameters(name: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the given values in their places, in the type of the default. Raises ValueError."""
    merged = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            near = did_you_mean(key, defaults)
            raise ValueError(f"{name} has no parameter {key!r}; there are {', '.join(defaults)}.{near}")
        kind = type(defaults[key])
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{name}: {key}={value!r} is no {kind.__name__}; the default is {defaults[key]!r}.")
        merged[key] = value
    return merged


# --- OpenCV ------------------------------------------------------------------------------------------------------


def _opencv(name: str, parameters: dict[str, Any], calc: Callable[[Grey, Grey], npt.NDArray[np.float32]]) -> FlowMethod:
    """A method of OpenCV: `calc` maps two frames to (H, W, 2)."""

    def batch(grey0: Grey, grey1: Grey) -> Field:
        fields = np.empty((len(grey0), 2, *grey0.shape[1:]), np.float32)
        for field, frame0, frame1 in zip(fields, grey0, grey1, strict=True):
            field[:] = calc(frame0, frame1).transpose(2, 0, 1)
        return fields

    return FlowMethod(name, parameters, "opencv-contrib-python", import_cv2().__version__, 1, batch)


def _farneback(device: str, given: Mapping[str, Any]) -> FlowMethod:
    defaults = {
        "pyr_scale": 0.5, "levels": 5, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.1, "flags": 0
    }  # fmt: skip
    parameters = merge_parameters("farneback", defaults, given)
    cv2 = import_cv2()
    return _opencv(
        "farneback", parameters, lambda grey0, grey1: cv2.calcOpticalFlowFarneback(grey0, grey1, None, **parameters)
    )


def _dis(device: str, given: Mapping[str, Any]) -> FlowMethod:
    cv2 = import_cv2()
    solver = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM)
    return _from_solver("dis", {"preset": "medium"}, solver, given)


def _tvl1(device: str, given: Mapping[str, Any]) -> FlowMethod:
    return _from_solver("tvl1", {}, _contrib("TV-L1").DualTVL1OpticalFlow.create(), given)


def _deepflow(device: str, given: Mapping[str, Any]) -> FlowMethod:
    if given:
        raise ValueError(f"deepflow has no parameters that could be set; got {', '.join(given)}.")
    solver = _contrib("DeepFlow").createOptFlow_DeepFlow()
    return _opencv("deepflow", {}, lambda grey0, grey1: solver.calc(grey0, grey1, None))


def _contrib(what: str) -> ModuleType:
    cv2 = import_cv2()
    if not hasattr(cv2, "optflow"):
        raise ImportError(f"{what} is in OpenCV's contrib modules: install opencv-contrib-python, not opencv-python.")
    module: ModuleType = cv2.optflow
    return module


def _from_solver(name: str, fixed: dict[str, Any], solver: Any, given: Mapping[str, Any]) -> FlowMethod:
    """A method of a solver object; its parameters are asked of it, so that they are those of this OpenCV."""
    keys = [key.removeprefix("get") for key in sorted(dir(solver)) if key.startswith("get") and key != "getDefaultName"]
    for key, value in merge_parameters(name, {key: getattr(solver, f"get{key}")() for key in keys}, given).items():
        getattr(solver, f"set{key}")(value)
    known = {key: getattr(solver, f"get{key}")() for key in keys}
    # A field given in the place of None would be taken for a first guess.
    return _opencv(name, fixed | known, lambda grey0, grey1: solver.calc(grey0, grey1, None))


# --- on a GPU ----------------------------------------------------------------------------------------------------


def _gpu_number(name: str, device: str) -> int:
    """Number of the GPU that a device "cuda" or "cuda:1" means. Raises ValueError if it is not there."""
    import torch

    number = torch.device(device).index or 0
    if number >= torch.cuda.device_count():
        raise ValueError(f"{name} is to run on {device!r}, but torch sees {torch.cuda.device_count()} GPUs.")
    return number


def _brox(device: str, given: Mapping[str, Any]) -> FlowMethod:
    import torch

    from flow.brox import DEFAULTS, VERSION, brox_flow

    parameters = merge_parameters("brox", DEFAULTS, given)
    if device == "cpu":
        place, batch_pairs = torch.device("cpu"), BROX_BATCH["cpu"]
        torch.set_num_threads(1)  # as OpenCV above
    else:
        place, batch_pairs = torch.device("cuda", _gpu_number("brox", device)), BROX_BATCH["cuda"]

    def batch(grey0: Grey, grey1: Grey) -> Field:
        frames0, frames1 = (torch.from_numpy(np.ascontiguousarray(grey)).to(place) for grey in (grey0, grey1))
        fields: Field = brox_flow(frames0, frames1, **parameters).cpu().numpy()
        return fields

    return FlowMethod("brox", parameters, "flow.brox", VERSION, batch_pairs, batch, place.type)


def _nvof(device: str, given: Mapping[str, Any]) -> FlowMethod:
    if device == "cpu":
        raise ValueError("nvof is the flow engine of an NVIDIA GPU; there is none to use. On a CPU take dis or brox.")
    number = _gpu_number("nvof", device)
    from importlib.metadata import version

    from flow.nvof import DEFAULTS

    parameters = merge_parameters("nvof", DEFAULTS, given)
    engine = _nvof_engine(number, tuple(parameters.items()))
    return FlowMethod(
        "nvof", parameters, "nvidia-dali-cuda120", version("nvidia-dali-cuda120"), NVOF_BATCH, engine, "cuda"
    )


@lru_cache(1)
def _nvof_engine(gpu: int, parameters: tuple[tuple[str, Any], ...]) -> Callable[[Grey, Grey], Field]:
    """The engine, opened once in a process: it keeps nothing of the pairs before, and takes its time to open."""
    from flow.nvof import NvofFlow, flow_engine

    return NvofFlow(flow_engine(dict(parameters)), gpu, NVOF_BATCH)


#: name -> factory, called with device and parameters
FLOW_METHODS: dict[str, Callable[[str, Mapping[str, Any]], FlowMethod]] = {
    "farneback": _farneback,
    "dis": _dis,
    "tvl1": _tvl1,
    "deepflow": _deepflow,
    "brox": _brox,
    "nvof": _nvof,
}
