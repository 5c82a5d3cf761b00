"""The flat DALI graphs: a batch of n samples is n * num_images JPEGs through one decoder and one affine operator.

    train   jpeg ─ decode the crop only ─ flip ─ affine ──────────────── float32
    test    jpeg ─ decode the frame ─┬─ 5 crops, plain and mirrored ──── 10 x float32
    decode  jpeg ─ decode the frame ─┴───────────────────────────────── uint8, for the pool of windows
    field   jpeg ─ decode a region ─ pad ─ px/frame ─────────────────── float32, for trajectories
    stack   crop, uint8 ─ flip ─ affine ─────────────────────────────── float32, from that pool

A textbook graph has a decoder branch for each of the 2L channels and a concatenation; here the channels are samples of
the batch, and the output, (n * num_images, ...) in one piece, is *viewed* as (n, num_images * c, h, w).
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
from loaders.draw import Draw
from loaders.region import Region
from loaders.source import Encoded
from loaders.views import VIEWS

Feed = Callable[[], tuple[Any, ...]]

#: Batches that a graph works on ahead of need.
QUEUE_DEPTH = 2


@dataclass(frozen=True)
class Graph:
    """How the graph runs on this machine.

    device: "cpu", no driver needed; or "cuda" (the current one).
    decoder: "cpu"; "mixed", DALI's GPU decoder; or "shared", a part of the images by each at the same time.
    region: decode only the crop; where the GPU decoder cannot, whole frames are decoded and cropped afterwards.
    mixed_share: part of the images that "shared" gives to the GPU decoder, in (0, 1). On a machine without a GPU both
    parts go to the CPU.
    hardware_load: part of its images that the GPU decoder gives to the GPU's JPEG unit, in [0, 1].
    """

    device: str = "cpu"
    decoder: str = "cpu"
    region: bool = True
    num_threads: int = 2
    mixed_share: float = 0.5
    hardware_load: float = 0.65

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda") or self.decoder not in ("cpu", "mixed", "shared"):
            raise ValueError(
                f"device={self.device!r} is 'cpu' or 'cuda', decoder={self.decoder!r} is 'cpu', 'mixed' or 'shared'."
            )
        if self.device == "cpu" and self.decoder == "mixed":
            raise ValueError("decoder='mixed' decodes on a GPU; with device='cpu' take decoder='cpu'.")
        if not 0 < self.mixed_share < 1:
            raise ValueError(f"mixed_share={self.mixed_share} is a part of the images, more than 0 and less than 1.")
        if not 0 <= self.hardware_load <= 1:
            raise ValueError(f"hardware_load={self.hardware_load} is a part of the images, from 0 to 1.")


def train_inputs(encoded: Encoded, draw: Draw, entries: Any, spec: StreamSpec, graph: Graph) -> tuple[Any, ...]:
    """What the training graph is fed: `decode_inputs`; the crops' y0, x0 (m, 2) int32; and as `stack_inputs`."""
    start = np.repeat(draw.crop.astype(np.int32), spec.num_images, axis=0)
    return *decode_inputs(encoded, graph), start, *_affine_inputs(draw, entries, spec)


def stack_inputs(codes: Any, draw: Draw, entries: Any, spec: StreamSpec) -> tuple[Any, ...]:
    """What the stack graph is fed: codes (m, crop, crop, 1) uint8, m = n * num_images; mirror (m,) int32; and scale and
    shift float32: (m,) factor and offset of components, or (m, 3) std and mean of RGB."""
    return codes, *_affine_inputs(draw, entries, spec)


def _affine_inputs(draw: Draw, entries: Any, spec: StreamSpec) -> tuple[Any, ...]:
    shift, width = image_affine(entries, draw.mirror, draw.alpha, spec)
    if spec.stream == "temporal":
        width, shift = 1 / width[:, 0], -shift[:, 0] / width[:, 0]
    mirror = np.repeat(draw.mirror.astype(np.int32), spec.num_images)
    return mirror, width.astype(np.float32), shift.astype(np.float32)


def decode_inputs(encoded: Encoded, graph: Graph) -> tuple[Any, ...]:
    """What the decode graph is fed: rows (m, longest) uint8; if two decoders share them, also to_gpu (m,) bool."""
    if graph.decoder != "shared":
        return (encoded.rows,)
    given = (np.arange(len(encoded.rows) + 1) * graph.mixed_share).astype(np.int64)  # the GPU's share, evenly spread
    return encoded.rows, np.diff(given).astype(bool)


def view_inputs(encoded: Encoded, draw: Draw, entries: Any, spec: StreamSpec, graph: Graph) -> tuple[Any, ...]:
    """What the test graph is fed: `decode_inputs`, mean, std, and the std of the mirrored views."""
    shift, width = image_affine(entries, np.zeros(len(draw), bool), draw.alpha, spec)
    _, mirrored_width = image_affine(entries, np.ones(len(draw), bool), draw.alpha, spec)
    return *decode_inputs(encoded, graph), *(v.astype(np.float32) for v in (shift, width, mirrored_width))


def field_inputs(encoded: Encoded, region: Region, entries: Any, spec: StreamSpec, graph: Graph) -> tuple[Any, ...]:
    """What the field graph is fed: `decode_inputs`; start and size (m, 2) int32 of the images' regions; scale and shift
    (m,) float32, px/frame a code and px/frame of code 0."""
    start, size = (np.repeat(yx.astype(np.int32), spec.num_images, axis=0) for yx in (region.start, region.size))
    lo, hi = (entries[key].astype(np.float64).reshape(-1) for key in ("lo", "hi"))
    return *decode_inputs(encoded, graph), start, size, ((hi - lo) / 255).astype(np.float32), lo.astype(np.float32)


def _jpeg_types(graph: Graph) -> list[tuple[Any, int]]:
    """Element type and number of dimensions of what `decode_inputs` gives for an image."""
    return [(types.UINT8, 1), (types.BOOL, 0)][: 2 if graph.decoder == "shared" else 1]


def _affine_types(spec: StreamSpec) -> list[tuple[Any, int]]:
    dimensions = int(spec.stream == "spatial")
    return [(types.INT32, 0), (types.FLOAT, dimensions), (types.FLOAT, dimensions)]


def train_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph of training batches: one output, float32 on the device, (batch_size * num_images, crop, crop, 1) of
    components or (batch_size * num_images, 3, crop, crop) of RGB.

    feed gives the next `train_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.num_images))
    def build() -> Any:
        *jpeg, start, mirror, scale, shift = _external(
            feed, [*_jpeg_types(graph), (types.INT32, 1), *_affine_types(spec)]
        )
        image = _decode_crop(jpeg, spec, graph, start=start, shape=[spec.crop_px, spec.crop_px])
        return _affine(image, mirror, scale, shift, spec)

    return _built(build())


def decode_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph that only decodes windows, at most batch_size at a time: one output, (H, W, c) uint8 on the device a frame.

    feed gives the next `decode_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.window_steps * len(spec.kinds)))
    def build() -> Any:
        jpeg = _external(feed, _jpeg_types(graph))
        return _decode(fn.decoders.image, jpeg, spec, graph)

    return _built(build())


def stack_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph from crops to training batches, on the CPU; the output is that of `train_pipeline`.

    feed gives the next `stack_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(Graph(num_threads=graph.num_threads), batch_size * spec.num_images))
    def build() -> Any:
        codes, mirror, scale, shift = _external(
            feed, [(types.UINT8, 3), *_affine_types(spec)], layout=["HWC", "", "", ""]
        )
        return _affine(codes, mirror, scale, shift, spec)

    return _built(build())


def field_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph of raw fields: one output, (batch_size * num_images, H, W, 1) float32 px/frame on the device, padded to the
    largest region of the batch.

    feed gives the next `field_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.num_images))
    def build() -> Any:
        inputs = [*_jpeg_types(graph), (types.INT32, 1), (types.INT32, 1), (types.FLOAT, 0), (types.FLOAT, 0)]
        *jpeg, start, shape, scale, shift = _external(feed, inputs)
        image = _decode_crop(jpeg, spec, graph, start=start, shape=shape)
        return _scaled(fn.pad(image, axes=[0, 1]), scale, shift)

    return _built(build())


def view_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph of test batches: every frame is decoded once, and gives the ten outputs of VIEWS.

    feed gives the next `view_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.num_images))
    def build() -> Any:
        *jpeg, mean, std, mirrored_std = _external(feed, [*_jpeg_types(graph), *[(types.FLOAT, 1)] * 3])
        image = _decode(fn.decoders.image, jpeg, spec, graph)
        return tuple(
            fn.crop_mirror_normalize(
                image,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=mean,
                std=mirrored_std if mirrored else std,
                mirror=int(mirrored),
                crop=(spec.crop_px, spec.crop_px),
                crop_pos_y=y,
                crop_pos_x=x,
                rounding="truncate",
            )
            for y, x, mirrored in VIEWS
        )

    return _built(build())


def _options(graph: Graph, batch_size: int) -> dict[str, Any]:
    device_id = None
    if graph.device == "cuda":
        import torch

        device_id = torch.cuda.current_device()
    return {
        "batch_size": batch_size,
        "num_threads": graph.num_threads,
        "device_id": device_id,
        "prefetch_queue_depth": QUEUE_DEPTH,
        "enable_conditionals": graph.decoder == "shared",
    }


def _external(feed: Feed, inputs: list[tuple[Any, int]], **arguments: Any) -> Any:
    """Inputs from Python, not copied: what feed returns has to live until the batch is out."""
    arguments |= {"dtype": [dtype for dtype, _ in inputs], "ndim": [ndim for _, ndim in inputs]}
    return fn.external_source(source=feed, num_outputs=len(inputs), no_copy=True, **arguments)


def _built(pipeline: Pipeline) -> Pipeline:
    pipeline.build()
    return pipeline


def _decode(operator: Any, inputs: Any, spec: StreamSpec, graph: Graph, **arguments: Any) -> Any:
    """Images on the device. By default the GPU's decoder upsamples chroma otherwise than libjpeg, far off at edges."""
    color = types.RGB if spec.stream == "spatial" else types.GRAY
    arguments |= {"output_type": color, "jpeg_fancy_upsampling": True, "hw_decoder_load": graph.hardware_load}
    mixed = "mixed" if graph.device == "cuda" else "cpu"
    if graph.decoder == "shared":
        jpeg, to_gpu = inputs
        if to_gpu:  # decided image by image
            image = operator(jpeg, device=mixed, **arguments)
        else:
            image = _on_device(operator(jpeg, device="cpu", **arguments), graph)
        return image
    image = operator(inputs[0], device=graph.decoder, **arguments)
    return _on_device(image, graph) if graph.decoder == "cpu" else image


def _decode_crop(inputs: Any, spec: StreamSpec, graph: Graph, *, start: Any, shape: Any) -> Any:
    """Crops of images on the device; start y0, x0 and shape height, width in px."""
    crop = {"start": start, "shape": shape, "axes": [0, 1]}
    if graph.region:
        return _decode(fn.decoders.image_slice, inputs, spec, graph, **crop)
    return fn.slice(_decode(fn.decoders.image, inputs, spec, graph), **crop)


def _on_device(image: Any, graph: Graph) -> Any:
    """Codes cross to the GPU as uint8, a quarter of the bytes of the result."""
    return image.gpu() if graph.device == "cuda" else image


def _affine(image: Any, mirror: Any, scale: Any, shift: Any, spec: StreamSpec) -> Any:
    """Cropped codes to network inputs, mirrored where asked for; scale and shift as in `stack_inputs`.

    For components two plain operators: `crop_mirror_normalize`, which does both, takes 1.3 ms of a core for a stack of
    20 at 224 px, these 0.6 ms, and writing the result 0.3 ms. For RGB it also turns (H, W, 3) into (3, H, W).
    """
    if spec.stream == "spatial":
        return fn.crop_mirror_normalize(
            image, dtype=types.FLOAT, output_layout="CHW", mirror=mirror, mean=shift, std=scale
        )
    return _scaled(fn.flip(image, horizontal=mirror), scale, shift)


def _scaled(image: Any, scale: Any, shift: Any) -> Any:
    """scale * image + shift, float32."""
    return fn.brightness_contrast(image, dtype=types.FLOAT, contrast=scale, contrast_center=0.0, brightness_shift=shift)
