"""The flat DALI graphs: a batch of n samples is n * num_images JPEGs through one decoder and one affine operator.

    train   jpeg ─ decode the crop only ─ [resize] ─ flip ─ affine ──────────────── float32
    test    jpeg ─ decode the frame ─┬─ [resize] ─ 5 crops, plain and mirrored ──── 10 x float32
    decode  jpeg ─ decode the frame ─┴───────────────────────────────────────────── uint8, for the pool of windows
    field   jpeg ─ decode a region ─ [resize] ─ pad ─ px/frame ──────────────────── float32, for trajectories
    stack   crop, uint8 ─ [resize] ─ flip ─ affine ──────────────────────────────── float32, from that pool

Frames are resized where the spec asks for another size than they are stored at, and the operator is in the graph only
then: from the part of the stored frame that the crop needs, and to float32, so that codes are not rounded again.

A textbook graph has a decoder branch for each of the 2L channels and a concatenation; here the channels are samples of
the batch, and the output, (n * num_images, ...) in one piece, is *viewed* as (n, num_images * c, h, w).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def

from loaders.batch import StreamSpec
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


#: Element type and number of dimensions of an input.
InputTypes = list[tuple[Any, int]]


def _jpeg_types(graph: Graph) -> InputTypes:
    """Element type and number of dimensions of what `inputs.decode_inputs` gives for an image."""
    return [(types.UINT8, 1), (types.BOOL, 0)][: 2 if graph.decoder == "shared" else 1]


def _affine_types(spec: StreamSpec) -> InputTypes:
    dimensions = int(spec.stream == "spatial")
    return [(types.INT32, 0), (types.FLOAT, dimensions), (types.FLOAT, dimensions)]


def _resize_types(spec: StreamSpec, *elements: Any) -> InputTypes:
    """Pairs y, x, which are there only if frames are resized."""
    return [] if spec.size_px is None else [(element, 1) for element in elements]


def train_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph of training batches: one output, float32 on the device, (batch_size * num_images, crop, crop, 1) of
    components or (batch_size * num_images, 3, crop, crop) of RGB.

    feed gives the next `inputs.train_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.num_images))
    def build() -> Any:
        resize_types = _resize_types(spec, types.INT32, types.FLOAT, types.FLOAT)
        jpeg, (start, *affine), resize = _external(
            feed, _jpeg_types(graph), [(types.INT32, 1), *_affine_types(spec)], resize_types
        )
        crop = [spec.crop_px, spec.crop_px]
        image = _decode_crop(jpeg, spec, graph, start=start, shape=resize[0] if resize else crop)
        if resize:
            image = _resized(image, crop, *resize[1:])
        return _affine(image, spec, *affine)

    return _built(build())


def decode_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph that only decodes windows, at most batch_size at a time: one output, (H, W, c) uint8 on the device a frame.

    feed gives the next `inputs.decode_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.window_steps * len(spec.kinds)))
    def build() -> Any:
        (jpeg,) = _external(feed, _jpeg_types(graph))
        return _decode(fn.decoders.image, jpeg, spec, graph)

    return _built(build())


def stack_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph from crops to training batches, on the CPU; the output is that of `train_pipeline`.

    feed gives the next `inputs.stack_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(Graph(num_threads=graph.num_threads), batch_size * spec.num_images))
    def build() -> Any:
        resize_types = _resize_types(spec, types.INT32, types.FLOAT, types.FLOAT)
        (codes, *affine), resize = _external(feed, [(types.UINT8, 3), *_affine_types(spec)], resize_types)
        if resize:
            patch = fn.slice(codes, start=[0, 0], shape=resize[0], axes=[0, 1])
            codes = _resized(patch, [spec.crop_px, spec.crop_px], *resize[1:])
        return _affine(codes, spec, *affine)

    return _built(build())


def field_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph of raw fields: one output, (batch_size * num_images, H, W, 1) float32 px/frame on the device, padded to the
    largest region of the batch.

    feed gives the next `inputs.field_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.num_images))
    def build() -> Any:
        jpeg, (start, size), affine, resize = _external(
            feed,
            _jpeg_types(graph),
            [(types.INT32, 1)] * 2,
            [(types.FLOAT, 0)] * 2,
            _resize_types(spec, *[types.FLOAT] * 3),
        )
        image = _decode_crop(jpeg, spec, graph, start=start, shape=size)
        if resize:
            image = _resized(image, *resize)
        return _scaled(fn.pad(image, axes=[0, 1]), *affine)

    return _built(build())


def view_pipeline(spec: StreamSpec, graph: Graph, batch_size: int, feed: Feed) -> Pipeline:
    """Graph of test batches: every frame is decoded once, and gives the ten outputs of VIEWS.

    feed gives the next `inputs.view_inputs`, or raises StopIteration.
    """

    @pipeline_def(**_options(graph, batch_size * spec.num_images))
    def build() -> Any:
        jpeg, (mean, std, mirrored_std), resize = _external(
            feed, _jpeg_types(graph), [(types.FLOAT, 1)] * 3, _resize_types(spec, types.FLOAT)
        )
        image = _decode(fn.decoders.image, jpeg, spec, graph)
        if resize:
            image = _resized(image, *resize)
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


def _external(feed: Feed, *groups: InputTypes) -> list[list[Any]]:
    """Inputs from Python in groups, not copied: what feed returns has to live until the batch is out."""
    inputs = list(chain(*groups))
    arguments: dict[str, Any] = {
        "dtype": [dtype for dtype, _ in inputs],
        "ndim": [ndim for _, ndim in inputs],
        "layout": ["HWC" if ndim == 3 else "" for _, ndim in inputs],
    }
    fed = iter(fn.external_source(source=feed, num_outputs=len(inputs), no_copy=True, **arguments))
    return [list(islice(fed, len(group))) for group in groups]


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


def _resized(image: Any, size: Any, begin: Any = None, end: Any = None) -> Any:
    """What lies between the borders begin and end of an image, or all of it, at another size, float32."""
    arguments = {"minibatch_size": Pipeline.current().max_batch_size}  # one launch, by default one for 32 images
    return fn.resize(image, size=size, roi_start=begin, roi_end=end, dtype=types.FLOAT, antialias=False, **arguments)


def _on_device(image: Any, graph: Graph) -> Any:
    """Codes cross to the GPU as uint8, a quarter of the bytes of the result."""
    return image.gpu() if graph.device == "cuda" else image


def _affine(image: Any, spec: StreamSpec, mirror: Any, scale: Any, shift: Any) -> Any:
    """Cropped codes to network inputs, mirrored where asked for; scale and shift as in `inputs.stack_inputs`.

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
