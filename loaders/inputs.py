"""What the graphs of `pipeline` are fed with, besides the encoded images: numbers of each image, in numpy."""

from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.affine import image_affine
from loaders.batch import StreamSpec
from loaders.draw import Draw, Ints
from loaders.pipeline import Graph
from loaders.region import Patch, Region, crops, reachable, stored_patch, whole_frames
from loaders.request import Request
from loaders.rescale import frame_sizes
from loaders.source import Encoded, Source


def request_inputs(request: Request, encoded: Encoded, source: Source, graph: Graph, views: bool) -> tuple[Any, ...]:
    """What a loader's decoding graph is fed for a request; views: of a test loader."""
    spec, index, draw = source.spec, source.index, request.draw
    if request.new is not None:
        return decode_inputs(encoded, graph)
    entries = source.entries(request.video, request.tau, request.steps)
    if spec.follows_trajectories:
        region = whole_frames(draw, spec, index) if views else reachable(draw, entries, spec, index)
        return field_inputs(encoded, region, stored_patch(region, draw.video, index), entries, spec, graph)
    rescaled = spec.size_px is not None
    if views:
        return view_inputs(
            encoded, draw, entries, spec, graph, frame_sizes(index, draw.video, spec) if rescaled else None
        )
    patch = stored_patch(crops(draw, spec, index), draw.video, index) if rescaled else None
    return train_inputs(encoded, draw, entries, spec, graph, patch)


def train_inputs(
    encoded: Encoded, draw: Draw, entries: Any, spec: StreamSpec, graph: Graph, patch: Patch | None = None
) -> tuple[Any, ...]:
    """For the training graph: `decode_inputs`; y0, x0 (m, 2) int32 of the crops, or if frames are rescaled of the
    patches that crops are made from; and as `stack_inputs`."""
    start = _of_images(draw.crop if patch is None else patch.start, np.int32, spec)
    return *decode_inputs(encoded, graph), start, *_affine_inputs(draw, entries, spec), *_resize_inputs(patch, spec)


def stack_inputs(codes: Any, draw: Draw, entries: Any, spec: StreamSpec, patch: Patch | None = None) -> tuple[Any, ...]:
    """For the stack graph: codes (m, crop, crop, 1) uint8, m = n * num_images; mirror (m,) int32; scale and shift
    float32: (m,) factor and offset of components, or (m, 3) std and mean of RGB.

    If frames are rescaled, codes are patches in the upper left of images of one size, followed by the patches' sizes
    (m, 2) int32, and begin and end of the crops in them, (m, 2) float32.
    """
    return codes, *_affine_inputs(draw, entries, spec), *_resize_inputs(patch, spec)


def decode_inputs(encoded: Encoded, graph: Graph) -> tuple[Any, ...]:
    """For the decode graph: rows (m, longest) uint8; if two decoders share them, also to_gpu (m,) bool."""
    if graph.decoder != "shared":
        return (encoded.rows,)
    given = (np.arange(len(encoded.rows) + 1) * graph.mixed_share).astype(np.int64)  # the GPU's share, evenly spread
    return encoded.rows, np.diff(given).astype(bool)


def view_inputs(
    encoded: Encoded, draw: Draw, entries: Any, spec: StreamSpec, graph: Graph, frame: Ints | None = None
) -> tuple[Any, ...]:
    """For the test graph: `decode_inputs`, mean, std, and the std of the mirrored views; if frames are rescaled, their
    new height and width (m, 2) float32."""
    shift, width = image_affine(entries, np.zeros(len(draw), bool), draw.alpha, spec)
    _, mirrored_width = image_affine(entries, np.ones(len(draw), bool), draw.alpha, spec)
    affine = (v.astype(np.float32) for v in (shift, width, mirrored_width))
    size = () if frame is None else (_of_images(frame, np.float32, spec),)
    return *decode_inputs(encoded, graph), *affine, *size


def field_inputs(
    encoded: Encoded, region: Region, patch: Patch, entries: Any, spec: StreamSpec, graph: Graph
) -> tuple[Any, ...]:
    """For the field graph: `decode_inputs`; start and size (m, 2) int32 of what is decoded of the images; scale and
    shift (m,) float32, px/frame a code and px/frame of code 0; if frames are rescaled, the regions' sizes, and their
    begin and end in what is decoded, (m, 2) float32."""
    start, size = (_of_images(yx, np.int32, spec) for yx in (patch.start, patch.size))
    lo, hi = (entries[key].astype(np.float64).reshape(-1) for key in ("lo", "hi"))
    scale, shift = ((hi - lo) / 255).astype(np.float32), lo.astype(np.float32)
    resize = () if spec.size_px is None else (region.size, patch.begin, patch.end)
    return *decode_inputs(encoded, graph), start, size, scale, shift, *(_of_images(v, np.float32, spec) for v in resize)


def _affine_inputs(draw: Draw, entries: Any, spec: StreamSpec) -> tuple[Any, ...]:
    shift, width = image_affine(entries, draw.mirror, draw.alpha, spec)
    if spec.stream == "temporal":
        width, shift = 1 / width[:, 0], -shift[:, 0] / width[:, 0]
    mirror = np.repeat(draw.mirror.astype(np.int32), spec.num_images)
    return mirror, width.astype(np.float32), shift.astype(np.float32)


def _resize_inputs(patch: Patch | None, spec: StreamSpec) -> tuple[Any, ...]:
    if patch is None or spec.size_px is None:
        return ()
    begin, end = (_of_images(border, np.float32, spec) for border in (patch.begin, patch.end))
    return _of_images(patch.size, np.int32, spec), begin, end


def _of_images(values: npt.NDArray[Any], dtype: Any, spec: StreamSpec) -> npt.NDArray[Any]:
    """What all images of a sample share, (n, 2), for each of them, (m, 2)."""
    return np.repeat(values.astype(dtype), spec.num_images, axis=0)
