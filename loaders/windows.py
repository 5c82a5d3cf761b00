"""Decode once, stack many: the pool of decoded windows that stacks are cut from, on the device.

A window is decoded whole when its first stack is due, and kept until its last one was; `loaders.draw` decides when. For
n samples a step the pool holds up to n * SPREAD windows of 2 (L + k - 1) H W bytes: 3.0 GB for n = 256, k = 8, L = 10
and frames of 256x341 px.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from loaders.affine import image_affine
from loaders.batch import StreamSpec
from loaders.draw import SPREAD, Draw, Ints
from loaders.graph import to_device
from loaders.region import Patch

#: Birth and number of a window.
Key = tuple[int, int]


@dataclass(frozen=True)
class NewWindows:
    """Windows that the batch of a step needs and the pool does not hold: keys, and video and first field (n,)."""

    step: int
    keys: list[Key]
    video: Ints
    first: Ints


def keys_of(draw: Draw) -> list[Key]:
    """The window of each sample."""
    return [(birth, number) for birth, number in draw.window.tolist()]


def last_step(key: Key, spec: StreamSpec) -> int:
    """Step after which a window is surely not used again: the end of the block of its last use."""
    return (key[0] // SPREAD + spec.stacks_per_window) * SPREAD - 1


def plan_windows(draws: Iterator[Draw], start_step: int, spec: StreamSpec) -> Iterator[tuple[Draw, NewWindows]]:
    """Each batch with the windows to decode for it. The first batches of a loader need more: the pool is empty."""
    held: set[Key] = set()
    for step, draw in enumerate(draws, start_step):
        keys = keys_of(draw)
        slot = {key: i for i, key in enumerate(keys) if key not in held}
        slots = np.array(list(slot.values()), np.int64)
        yield draw, NewWindows(step, list(slot), draw.video[slots], draw.first[slots])
        held |= slot.keys()
        held = {key for key in held if last_step(key, spec) > step}


class WindowPool:
    """Decoded windows by key, on the device. At most `max_pixels` a frame.

    Windows are copied out of the graph's outputs: a whole output would live as long as its last window does, with all
    the memory that the largest batch so far has needed. Their memory, each piece large enough for any window, is used
    again and again.
    """

    def __init__(self, spec: StreamSpec, max_pixels: int):
        self._spec = spec
        self._num_frames = spec.window_steps * len(spec.kinds)
        self._max_bytes = self._num_frames * max_pixels
        self._windows: dict[Key, torch.Tensor] = {}  # (window_steps * 2, H, W, 1) uint8, views of pieces of memory
        self._memory: dict[Key, torch.Tensor] = {}
        self._free: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def num_bytes(self) -> int:
        """Memory of all windows, used or free."""
        return (len(self._memory) + len(self._free)) * self._max_bytes

    def add(self, new: NewWindows, frames: Any) -> None:
        """Take in a graph's output: a DALI tensor list with the frames of the windows, one window after the other."""
        whole = torch.from_dlpack(frames.as_tensor()) if frames.is_dense_tensor() else None
        for i, key in enumerate(new.keys):
            places = range(i * self._num_frames, (i + 1) * self._num_frames)
            if whole is not None:
                found = whole[places.start : places.stop]
                _copy(found, self._empty(key, found.shape, found.device))
            else:  # frames of several sizes, though of one within a window
                parts = [torch.from_dlpack(frames[place]) for place in places]
                window = self._empty(key, torch.Size((len(parts), *parts[0].shape)), parts[0].device)
                for part, frame in zip(parts, window, strict=True):
                    _copy(part, frame)

    def stacks(self, draw: Draw) -> list[torch.Tensor]:
        """The frames (2L, H, W, 1) that each sample is cut from; views of the windows."""
        kinds, steps = len(self._spec.kinds), self._spec.steps
        begin = ((draw.tau - draw.first) * kinds).tolist()
        return [self._windows[key][at : at + steps * kinds] for key, at in zip(keys_of(draw), begin, strict=True)]

    def drop_used(self, step: int) -> None:
        """Forget the windows that no batch after that step needs; their memory is free for others."""
        for key in [key for key in self._windows if last_step(key, self._spec) <= step]:
            del self._windows[key]
            self._free.append(self._memory.pop(key))

    def _empty(self, key: Key, shape: torch.Size, device: torch.device) -> torch.Tensor:
        memory = self._free.pop() if self._free else torch.empty(self._max_bytes, dtype=torch.uint8, device=device)
        self._memory[key] = memory
        self._windows[key] = memory[: shape.numel()].view(shape)
        return self._windows[key]


def cut_stacks(stacks: list[torch.Tensor], patch: Patch, codes: torch.Tensor) -> torch.Tensor:
    """Copy each sample's patch from its frames (2L, H, W, 1) to the upper left of codes[i], of which codes
    (n, 2L, side, side, 1) uint8 has enough for any."""
    places = zip(stacks, patch.start.tolist(), patch.size.tolist(), strict=True)
    for i, (stack, (y, x), (height, width)) in enumerate(places):
        _copy(stack[:, y : y + height, x : x + width], codes[i, :, :height, :width])
    return codes


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy; on the CPU by numpy, for torch would wake threads of its own, which spin on the cores that decode."""
    if target.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def to_inputs(codes: torch.Tensor, draw: Draw, entries: Any, spec: StreamSpec, patch: Patch) -> torch.Tensor:
    """Network inputs (n, 2L, crop, crop) float32 from `cut_stacks`: in torch what the stack graph does on the CPU.

    entries (n, L, 2): the index entries of the samples.
    """
    affine = np.stack(image_affine(entries, draw.mirror, draw.alpha, spec)).astype(np.float32)  # (2, n * 2L, 1)
    shift, width = to_device(affine.reshape(2, len(draw), spec.num_images, 1, 1), codes.device)
    codes = codes.squeeze(-1)
    if spec.size_px is not None:
        crops = _resize(codes, patch, spec.crop_px, draw.mirror)
    else:
        mirror = to_device(draw.mirror, codes.device)[:, None, None, None]
        crops = torch.where(mirror, codes.flip(-1), codes).float()
    return crops.sub_(shift).div_(width)


def _resize(codes: torch.Tensor, patch: Patch, crop_px: int, mirror: npt.NDArray[np.bool_]) -> torch.Tensor:
    """The crops (n, 2L, crop, crop) float32, mirrored where asked for, made from patches in the upper left of codes
    (n, 2L, side, side) uint8."""
    pixel = (patch.end - patch.begin) / crop_px  # (n, 2) stored px
    centres = patch.begin[:, :, None] + (np.arange(crop_px) + 0.5) * pixel[:, :, None] - 0.5  # (n, 2, crop)
    centres = centres.clip(0, patch.size[:, :, None] - 1)  # what lies beyond a patch is left over from others
    centres[mirror, 1] = centres[mirror, 1, ::-1]
    unit = centres * (2 / (codes.shape[-1] - 1)) - 1  # of grid_sample: -1 is the first pixel, 1 the last one
    y, x = to_device(np.ascontiguousarray(unit.astype(np.float32).swapaxes(0, 1)), codes.device)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (n, crop, crop, 2)
    return F.grid_sample(codes.float(), grid, padding_mode="border", align_corners=True)
