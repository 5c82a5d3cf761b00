"""The flat DALI graph: a batch of n samples is n * num_images JPEGs through one decoder and one affine operator.

                        train                                            test
    jpeg (uint8)  ─ decode the crop only ─┐              jpeg ─ decode the frame ─┬─ 5 windows, plain and mirrored
    window        ────────────────────────┤                                      │
    shift, width  ────────────────────────┴─ crop_mirror_normalize ── float32 ───┴─ 10 outputs

A textbook graph has a decoder branch for each of the 2L channels and a concatenation; here the channels are samples of
the batch, and the output, (n * num_images, c, h, w) in one piece, is *viewed* as (n, num_images * c, h, w).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def

from loaders.affine import image_affine
from loaders.batch import StreamSpec
from loaders.draw import VIEWS
from loaders.source import Encoded


@dataclass(frozen=True)
class Graph:
    """How the graph runs on this machine.

    device: "cpu", no driver needed; or "cuda" (the current one).
    decoder: "cpu", or "mixed", DALI's GPU decoder. region: decode only the crop; where the GPU decoder cannot, whole
    frames are decoded and cropped in the next operator.
    """

    device: str = "cpu"
    decoder: str = "cpu"
    region: bool = True
    num_threads: int = 2

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda") or self.decoder not in ("cpu", "mixed"):
            raise ValueError(
                f"device={self.device!r} is 'cpu' or 'cuda', decoder={self.decoder!r} is 'cpu' or 'mixed'."
            )
        if self.device == "cpu" and self.decoder == "mixed":
            raise ValueError("decoder='mixed' decodes on a GPU; with device='cpu' take decoder='cpu'.")


def train_inputs(encoded: Encoded, spec: StreamSpec) -> tuple[Any, ...]:
    """What the training graph is fed: images, window starts (m, 2) int32, shift, width, mirror; m = n * num_images."""
    draw = encoded.draw
    shift, width = image_affine(encoded.entries, draw.mirror, draw.alpha, spec)
    return (
        encoded.images,
        np.repeat(draw.crop.astype(np.int32), spec.num_images, axis=0),
        shift,
        width,
        np.repeat(draw.mirror.astype(np.int32), spec.num_images),
    )


def view_inputs(encoded: Encoded, spec: StreamSpec) -> tuple[Any, ...]:
    """What the test graph is fed: images, shift, width, and the width of the mirrored views."""
    draw = encoded.draw
    shift, width = image_affine(encoded.entries, np.zeros(len(draw), bool), draw.alpha, spec)
    _, mirrored_width = image_affine(encoded.entries, np.ones(len(draw), bool), draw.alpha, spec)
    return encoded.images, shift, width, mirrored_width


def train_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Callable[[], tuple[Any, ...]]) -> Pipeline:
    """Graph of training batches: one output, (batch_size * num_images, c, crop, crop) float32 on the device.

    feed gives the next `train_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(spec, graph, batch_size))
    def build() -> Any:
        jpeg, start, shift, width, mirror = fn.external_source(
            source=feed,
            num_outputs=5,
            dtype=[types.UINT8, types.INT32, types.FLOAT, types.FLOAT, types.INT32],
            ndim=[1, 1, 1, 1, 0],
        )
        window = {"start": start, "shape": [spec.crop_px, spec.crop_px], "axes": [0, 1]}
        if graph.region:
            image = fn.decoders.image_slice(jpeg, **_decoding(spec, graph), **window)
        else:
            image = fn.slice(fn.decoders.image(jpeg, **_decoding(spec, graph)), **window)
        return _normalize(_on_device(image, graph), spec, mean=shift, std=width, mirror=mirror)

    return _built(build())


def view_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Callable[[], tuple[Any, ...]]) -> Pipeline:
    """Graph of test batches: every frame is decoded once, and gives the ten outputs of VIEWS.

    feed gives the next `view_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(spec, graph, batch_size))
    def build() -> Any:
        jpeg, shift, width, mirrored_width = fn.external_source(
            source=feed, num_outputs=4, dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT], ndim=1
        )
        image = _on_device(fn.decoders.image(jpeg, **_decoding(spec, graph)), graph)
        return tuple(
            _normalize(
                image,
                spec,
                mean=shift,
                std=mirrored_width if mirrored else width,
                mirror=int(mirrored),
                crop=(spec.crop_px, spec.crop_px),
                crop_pos_y=y,
                crop_pos_x=x,
                rounding="truncate",
            )
            for y, x, mirrored in VIEWS
        )

    return _built(build())


def _options(spec: StreamSpec, graph: Graph, batch_size: int) -> dict[str, Any]:
    device_id = None
    if graph.device == "cuda":
        import torch

        device_id = torch.cuda.current_device()
    return {
        "batch_size": batch_size * spec.num_images,
        "num_threads": graph.num_threads,
        "device_id": device_id,
        "prefetch_queue_depth": 2,
    }


def _built(pipeline: Pipeline) -> Pipeline:
    pipeline.build()
    return pipeline


def _decoding(spec: StreamSpec, graph: Graph) -> dict[str, Any]:
    """Arguments of every decoder. By default the GPU's upsamples chroma otherwise than libjpeg, far off at edges."""
    color = types.RGB if spec.stream == "spatial" else types.GRAY
    return {"device": graph.decoder, "output_type": color, "jpeg_fancy_upsampling": True}


def _on_device(image: Any, graph: Graph) -> Any:
    """Codes cross to the GPU as uint8, a quarter of the bytes of the result."""
    return image.gpu() if graph.device == "cuda" and graph.decoder == "cpu" else image


def _normalize(image: Any, spec: StreamSpec, **arguments: Any) -> Any:
    return fn.crop_mirror_normalize(image, dtype=types.FLOAT, output_layout="CHW", **arguments)
