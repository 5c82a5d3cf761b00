"""Trajectory stacking, eq. (2), on the device: each field is sampled where the points of the crop have moved to."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from loaders.batch import FLOW_SCALE, StreamSpec
from loaders.draw import Draw
from loaders.graph import to_device
from loaders.region import Region
from loaders.views import view_crop

Ints = npt.NDArray[np.int64]


def stack_crops(fields: torch.Tensor, draw: Draw, entries: Any, region: Region, spec: StreamSpec) -> torch.Tensor:
    """Training inputs (n, 2L, crop, crop) of the samples' crops, from what was decoded: `follow` has the arguments."""
    samples = follow(fields, draw.crop, (spec.crop_px, spec.crop_px), draw.mirror, region, spec)
    return _to_inputs(samples, draw.mirror, entries, spec)


def stack_frames(fields: torch.Tensor, entries: Any, region: Region, spec: StreamSpec) -> torch.Tensor:
    """Inputs (n, 2L, H, W) of whole frames, not mirrored, which the test views are cut from by `cut_view`."""
    start, mirror = np.zeros_like(region.start), np.zeros(len(region.start), bool)
    return _to_inputs(
        follow(fields, start, (fields.shape[2], fields.shape[3]), mirror, region, spec), mirror, entries, spec
    )


def cut_view(inputs: torch.Tensor, view: tuple[float, float, bool], region: Region, spec: StreamSpec) -> torch.Tensor:
    """One of the ten views of whole frames: inputs (n, 2L, H, W) -> (n, 2L, crop, crop)."""
    side, mirrored = spec.crop_px, view[2]
    crops = []
    for sample, frame in zip(inputs, region.frame.tolist(), strict=True):
        y, x = view_crop(view, (frame[0], frame[1]), side)
        crops.append(sample[:, y : y + side, x : x + side])
    crop = torch.stack(crops)
    if mirrored:
        crop = crop.flip(-1)
        crop[:, ::2] *= -1
    return crop


def follow(
    fields: torch.Tensor,
    start: Ints,
    shape: tuple[int, int],
    mirror: npt.NDArray[np.bool_],
    region: Region,
    spec: StreamSpec,
) -> torch.Tensor:
    """Sample each field along the trajectories that begin at every pixel of a rectangle of the first frame.

    Args:
        fields: (n, 2L, H, W) float32 px/frame, raw: what was decoded of each sample, padded to one size.
        start: (n, 2) y0, x0 of each rectangle in its frame; shape: height and width of all of them.
        mirror: (n,) which rectangles are looked at from right to left. Displacements keep their sign.
        region: where in the frame the fields lie.
    Returns (n, 2L, *shape) px/frame. A point that would leave the frame stays at its border.
    """
    n, (height, width) = len(fields) * spec.num_chains, fields.shape[2:]
    chains = fields.reshape(n, spec.chain_steps, 2, height, width)
    device = fields.device

    def per_chain(yx: npt.NDArray[Any]) -> torch.Tensor:
        """(n, 2) y, x of the samples as x, y of their chains, (n, 1, 1, 2)."""
        values = np.repeat(yx[:, ::-1], spec.num_chains, axis=0).astype(np.float32)
        return to_device(values, device)[:, None, None, :]

    turned = np.stack([np.zeros_like(mirror), mirror], axis=1)
    y, x = (torch.arange(size, dtype=torch.float32, device=device) for size in shape)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2)
    begin = start - region.start + turned * (shape[1] - 1)  # in px of the decoded region
    # From here on in the units of grid_sample: -1 is the region's first pixel, 1 its last one.
    unit = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)], device=device)
    low, high = per_chain(-region.start) * unit - 1, per_chain(region.frame - 1 - region.start) * unit - 1
    points = (per_chain(begin) + per_chain(1 - 2 * turned) * grid).mul_(unit).sub_(1)
    torch.minimum(points, high, out=points)  # what lies beyond a frame is padding
    samples = torch.empty(n, spec.chain_steps, 2, *shape, device=device)
    for step in range(spec.chain_steps):
        sampled = F.grid_sample(chains[:, step], points, padding_mode="border", align_corners=True)
        samples[:, step] = sampled
        if step + 1 < spec.chain_steps:
            points.addcmul_(sampled.permute(0, 2, 3, 1), unit)
            torch.clamp(points, low, high, out=points)
    return samples.view(len(fields), spec.num_channels, *shape)


def _to_inputs(samples: torch.Tensor, mirror: npt.NDArray[np.bool_], entries: Any, spec: StreamSpec) -> torch.Tensor:
    """Subtract the fields' means from samples (n, 2L, h, w), in place; what moves right moves left in a mirror."""
    if spec.subtract_mean:
        mean = np.ascontiguousarray(entries["mean"], np.float32).reshape(len(samples), -1)
        samples -= to_device(mean, samples.device)[:, :, None, None]
    sign = np.ones((len(samples), spec.num_channels, 1, 1), np.float32)
    sign[mirror, ::2] = -1
    return samples.mul_(to_device(sign * np.float32(FLOW_SCALE), samples.device))
