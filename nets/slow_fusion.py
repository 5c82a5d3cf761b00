"""Slow fusion of Karpathy et al. 2014, the paper's baseline on RGB frames (sec. 6): time shrinks layer by layer.

    frames  0  1  2  3  4  5  6  7  8  9 10
    conv1  [0  1  2  3  4]                      extent 5, stride 2: 4 maps
                 [2  3  4  5  6]
                       [4  5  6  7  8]
                             [6  7  8  9 10]
    conv2  maps  [0 1] [2 3]                    extent 2, stride 2: 2 maps
    conv3        [0 1]                          extent 2, stride 2: 1 map, of all frames; from here on it is one image

Their net takes 10 frames, with an extent of 4 in conv1: 4, 2 and 1 maps likewise. The paper takes 11, and does not say
how; an extent of 5 at the same stride leaves none of them out. Weights are shared over the positions in time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Extent and stride in time of conv1, conv2 and conv3.
MERGES = ((5, 2), (2, 2), (2, 2))
NUM_FRAMES = 11


class MergeFrames(nn.Module):
    """Puts the time steps that a convolution sees at once side by side, as channels of one image.

    (num_steps * N, C, H, W) -> (num_merged * N, extent * C, H, W), time step after time step. With a convolution of
    extent * C channels behind it, that is a convolution in space and time, by 2-D kernels, which are the fast ones.
    With time outermost what is put together lies in one piece, in any memory format.
    """

    def __init__(self, num_steps: int, extent: int, stride: int) -> None:
        super().__init__()
        self.num_steps, self.extent, self.stride = num_steps, extent, stride
        self.num_merged = (num_steps - extent) // stride + 1

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unflatten(0, (self.num_steps, -1)).unbind()
        begins = range(0, self.num_merged * self.stride, self.stride)
        return torch.cat([torch.cat(steps[begin : begin + self.extent], dim=1) for begin in begins])


def merge_layers(num_frames: int) -> list[nn.Module]:
    """What stands before conv1, conv2 and conv3; nothing if there is 1 frame. ValueError for other than 1 or 11."""
    if num_frames == 1:
        return [nn.Identity() for _ in MERGES]
    if num_frames != NUM_FRAMES:
        raise ValueError(f"num_frames={num_frames}: a net sees 1 frame, or {NUM_FRAMES} by slow fusion.")
    layers: list[nn.Module] = []
    for extent, stride in MERGES:
        layers.append(MergeFrames(num_frames, extent, stride))
        num_frames = (num_frames - extent) // stride + 1
    return layers
