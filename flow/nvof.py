"""The optical flow engine of NVIDIA GPUs (Turing and later), through DALI: no GPU, no flow."""

from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def

#: A vector for every pixel, and the engine's best quality.
DEFAULTS: dict[str, Any] = {"output_grid": 1, "preset": 0.0}


class NvofFlow:
    """Fields of up to `batch_pairs` pairs of frames of one size, on GPU number `device_id`.

    Raises RuntimeError, of DALI, if there is no such GPU or its engine cannot do it.
    """

    def __init__(self, device_id: int, batch_pairs: int, parameters: dict[str, Any]) -> None:
        @pipeline_def(batch_size=batch_pairs, num_threads=1, device_id=device_id)
        def build() -> Any:
            # A pair is a sequence of two frames; nothing is handed from pair to pair (temporal hints are off).
            pairs = fn.external_source(name="pairs", device="cpu", layout="FHWC", dtype=types.UINT8, ndim=4)
            return fn.optical_flow(pairs.gpu(), image_type=types.GRAY, **parameters)

        self._pipeline: Pipeline = build()
        self._pipeline.build()

    def __call__(self, grey0: npt.NDArray[np.uint8], grey1: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Fields (N, 2, H, W) float32 px/frame of the pairs grey0[i], grey1[i], (N, H, W) uint8."""
        self._pipeline.feed_input("pairs", list(np.stack((grey0, grey1), 1)[..., None]))
        (vectors,) = self._pipeline.run()
        fields = np.asarray(vectors.as_cpu().as_array(), np.float32)  # (N, 1, H, W, 2)
        return np.ascontiguousarray(fields[:, 0].transpose(0, 3, 1, 2))
