"""Decode once, stack many: the pool of decoded windows that stacks are cut from, on the device.

A window is decoded whole when its first stack is due, and kept until its last one was; `loaders.draw` decides when. For
n samples a step the pool holds up to n / k * (k + 1) * SPREAD windows of 2 (L + k - 1) H W bytes: 3.8 GB for n = 256,
k = 8, L = 10 and frames of 256x341 px.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loaders.affine import image_affine
from loaders.batch import StreamSpec
from loaders.draw import SPREAD, Draw, Ints

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
    """Decoded windows by key: (window_steps * 2, H, W, 1) uint8 tensors on the device."""

    def __init__(self, spec: StreamSpec):
        self._spec = spec
        self._windows: dict[Key, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._windows)

    def add(self, new: NewWindows, frames: Any) -> None:
        """Take in a graph's output: a DALI tensor list with the frames of the windows, one window after the other."""
        size = self._spec.window_steps * len(self._spec.kinds)
        if frames.is_dense_tensor():
            windows = torch.from_dlpack(frames.as_tensor()).unflatten(0, (len(new.keys), size)).unbind()
        else:  # of several sizes, so that they do not lie in one piece
            windows = tuple(
                torch.stack([torch.from_dlpack(frames[i * size + j]) for j in range(size)])
                for i in range(len(new.keys))
            )
        self._windows.update(zip(new.keys, windows, strict=True))

    def stacks(self, draw: Draw) -> list[torch.Tensor]:
        """The frames (2L, H, W, 1) that each sample is cut from; views of the windows."""
        kinds, steps = len(self._spec.kinds), self._spec.steps
        begin = ((draw.tau - draw.first) * kinds).tolist()
        return [self._windows[key][at : at + steps * kinds] for key, at in zip(keys_of(draw), begin, strict=True)]

    def drop_used(self, step: int) -> None:
        """Forget the windows that are of no use after that step."""
        self._windows = {key: window for key, window in self._windows.items() if last_step(key, self._spec) > step}


def cut_stacks(stacks: list[torch.Tensor], draw: Draw, entries: Any, spec: StreamSpec) -> torch.Tensor:
    """Network inputs (n, 2L, crop, crop) float32 on the stacks' device: what the stack graph computes on the CPU.

    stacks: n times (2L, H, W, 1) uint8. entries (n, L, 2): their index entries.
    """
    device, side = stacks[0].device, spec.crop_px
    affine = np.stack(image_affine(entries, draw.mirror, draw.alpha, spec)).astype(np.float32)  # (2, n * 2L, 1)
    shift, width = torch.from_numpy(affine.reshape(2, len(draw), spec.num_images, 1, 1)).to(device)
    inputs = torch.empty((len(stacks), spec.num_images, side, side), device=device)
    for i, (stack, (y, x), mirror) in enumerate(zip(stacks, draw.crop.tolist(), draw.mirror.tolist(), strict=True)):
        codes = stack[:, y : y + side, x : x + side, 0]
        inputs[i] = codes.flip(-1) if mirror else codes
    return inputs.sub_(shift).div_(width)
