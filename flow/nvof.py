"""The optical flow engine of NVIDIA GPUs through DALI; a vector for every pixel needs compute capability 8 (Ampere)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def

#: A vector for every pixel, and the engine's best quality.
DEFAULTS: dict[str, Any] = {"output_grid": 1, "preset": 0.0}

Operator = Callable[[Any], Any]


class NvofFlow:
    """Fields of up to `batch_pairs` pairs of frames of one size, by an operator of DALI on GPU number `device_id`.

    operator: maps sequences of two RGB frames (2, H, W, 3) to vectors (1, H, W, 2). device_id: None is the CPU.
    """

    def __init__(self, operator: Operator, device_id: int | None, batch_pairs: int) -> None:
        # One batch is fed for every run: nothing may be asked for ahead of it.
        @pipeline_def(batch_size=batch_pairs, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
        def build() -> Any:
            return operator(fn.external_source(name="pairs", layout="FHWC", dtype=types.UINT8, ndim=4))

        self._pipeline: Pipeline = build()
        self._pipeline.build()

    def __call__(self, grey0: npt.NDArray[np.uint8], grey1: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Fields (N, 2, H, W) float32 px/frame of the pairs grey0[i], grey1[i], (N, H, W) uint8.

        Raises RuntimeError, of DALI, if the GPU cannot compute it.
        """
        # DALI's vectors lead from the second frame of a sequence to the first. The engine takes four channels: of grey
        # images DALI would fill a quarter of its buffer.
        pairs = np.repeat(np.stack((grey1, grey0), 1)[..., None], 3, axis=-1)
        self._pipeline.feed_input("pairs", list(pairs))
        (vectors,) = self._pipeline.run()
        fields = np.asarray(vectors.as_cpu().as_array(), np.float32)  # (N, 1, H, W, 2)
        return np.ascontiguousarray(fields[:, 0].transpose(0, 3, 1, 2))


def flow_engine(parameters: dict[str, Any]) -> Operator:
    """The operator that asks the GPU's engine; without hints, so nothing is handed from pair to pair."""

    def operator(pairs: Any) -> Any:
        return fn.optical_flow(pairs.gpu(), image_type=types.RGB, **parameters)

    return operator
