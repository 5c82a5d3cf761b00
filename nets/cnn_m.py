"""CNN-M-2048 of Chatfield et al. 2014 as both streams of the paper use it (Fig. 1, sec. 5)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets.dropout import draw_dropout_masks
from nets.slow_fusion import MERGES, merge_layers


class LocalResponseNorm(nn.Module):
    """Response normalisation across channels with the settings of Krizhevsky et al. 2012, sec. 3.3.

        y_c = x_c / (k + alpha * sum_{|j - c| <= n/2} x_j^2) ^ beta        k = 2, n = 5, alpha = 1e-4, beta = 0.75

    Shapes: (N, C, H, W) -> the same. alpha multiplies the *sum*: torch's module divides it by n. Computed in float32
    whatever the input's type: bfloat16 could not resolve alpha against k.

    conv1's map, 96 x 109 x 109, is the largest in the net, and this layer does nothing but pass over it, so passes
    count. The sum over neighbouring channels is a 1x1 convolution with a band matrix, on a CPU several times faster
    than torch's module; the gradient is written out, in a third of the time that autograd's takes. Under torch.compile
    and torch.export the sum is one over shifted channels, which fuses with all the rest: at batch 256 in bfloat16 the
    forward pass then moves 1.2 GB (the input and the output once), and 6 GB around a convolution, which must find its
    input and leave its output in memory as float32.
    """

    k, n, alpha, beta = 2.0, 5, 1e-4, 0.75
    band: Tensor
    offset: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        channel = torch.arange(num_channels)
        near = (channel[:, None] - channel).abs() <= self.n // 2
        self.register_buffer("band", self.alpha * near[:, :, None, None].float(), persistent=False)  # (C, C, 1, 1)
        self.register_buffer("offset", torch.full((num_channels,), self.k), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _Normalise.apply(x, self.band, self.offset)

    def extra_repr(self) -> str:
        return f"k={self.k}, n={self.n}, alpha={self.alpha}, beta={self.beta}"


class _Normalise(torch.autograd.Function):
    """y = x s^-beta with s = k + alpha * near(x^2), where near sums over neighbours; near is its own transpose, so

    dx = dy s^-beta - 2 beta x alpha * near(dy x s^(-beta - 1))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Tensor, offset: Tensor) -> Tensor:
        wide = x.float()
        s = _sum_near(wide * wide, band, offset)
        root = s.rsqrt()
        scale = root.sqrt().mul_(root)  # s^-beta, beta = 3/4 = 1/4 + 1/2
        ctx.save_for_backward(x, s, scale, band)
        return (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, s, scale, band = ctx.saved_tensors
        wide = x.float()
        direct = dy.float() * scale
        through = _sum_near((direct * wide).div_(s), band)
        return direct.addcmul_(wide, through, value=-2 * LocalResponseNorm.beta).to(x.dtype), None, None


def _sum_near(values: Tensor, band: Tensor, offset: Tensor | None = None) -> Tensor:
    """alpha times the sum over each channel and its neighbours of values (N, C, H, W) float32, plus an offset (C,)."""
    if not torch.compiler.is_compiling():
        with torch.autocast(values.device.type, enabled=False):
            return F.conv2d(values, band, offset)
    n, num_channels = LocalResponseNorm.n, values.shape[1]
    padded = F.pad(values, (0, 0, 0, 0, n // 2, n // 2))
    total = padded.narrow(1, 0, num_channels)
    for shift in range(1, n):
        total = total + padded.narrow(1, shift, num_channels)
    total = LocalResponseNorm.alpha * total
    return total if offset is None else total + offset[:, None, None]


class CNNM(nn.Module):
    """CNN-M-2048: five convolutions, two fully connected layers, a softmax layer that is left to the caller.

        conv1 7x7x96 /2   LRN   pool     224 -> 109 -> 54 px
        conv2 5x5x256 /2  LRN*  pool      54 ->  26 -> 13        * only with `second_lrn`
        conv3, conv4 3x3x512              13
        conv5 3x3x512           pool      13 -> 6
        full6 4096, full7 2048            with dropout
        scores num_classes                logits

    ReLU after each hidden layer; pools are 3x3, stride 2, ceiling. With 101 classes at full width and 224 px:
    90,627,813 parameters with 3 channels, 90,707,781 with 20.

    Args:
        num_channels: 3 for the spatial net, a frame; 2L for the temporal net.
        num_classes: of all tasks together; a task's softmax layer is its slice of the last layer (sec. 4).
        width: factor on the channels of every convolution and the units of full6 and full7.
        input_px: side of the square input.
        dropout: ratio of dropped units in full6 and full7, in [0, 1).
        second_lrn: True for the spatial net; the paper's temporal net leaves the second LRN out (sec. 5).
        num_frames: 1, or 11, which the first three convolutions merge: `nets.slow_fusion`.
        seed: of the initial weights (He et al. 2015); no global generator is touched.
    Raises ValueError if `input_px` leaves no pixel after conv5's pool, or `dropout` is out of range.
    """

    def __init__(
        self,
        num_channels: int,
        num_classes: int,
        *,
        width: float = 1.0,
        input_px: int = 224,
        dropout: float = 0.9,
        second_lrn: bool,
        num_frames: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is not a ratio in [0, 1).")
        side_px = output_px(input_px)
        c1, c2, c3, full6, full7 = (max(1, round(units * width)) for units in (96, 256, 512, 4096, 2048))
        self.dropout = dropout
        self.num_dropped_units = (full6, full7)
        self.num_frames = num_frames
        merge1, merge2, merge3 = merge_layers(num_frames)
        seen1, seen2, seen3 = (extent if num_frames > 1 else 1 for extent, _ in MERGES)
        self.features = nn.Sequential(
            OrderedDict(
                merge1=merge1,
                conv1=_conv(seen1 * num_channels, c1, kernel=7, stride=2, padding=0),
                relu1=nn.ReLU(inplace=True),
                lrn1=LocalResponseNorm(c1),
                pool1=_pool(),
                merge2=merge2,
                conv2=_conv(seen2 * c1, c2, kernel=5, stride=2, padding=1),
                relu2=nn.ReLU(inplace=True),
                lrn2=LocalResponseNorm(c2) if second_lrn else nn.Identity(),
                pool2=_pool(),
                merge3=merge3,
                conv3=_conv(seen3 * c2, c3),
                relu3=nn.ReLU(inplace=True),
                conv4=_conv(c3, c3),
                relu4=nn.ReLU(inplace=True),
                conv5=_conv(c3, c3),
                relu5=nn.ReLU(inplace=True),
                pool5=_pool(),
            )
        )
        self.full6 = _linear(c3 * side_px**2, full6)
        self.full7 = _linear(full6, full7)
        self.scores = _linear(full7, num_classes)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            else:
                nn.init.zeros_(parameter)  # a bias

    def draw_masks(
        self, seed: int, step: int, *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, ...]:
        """This rank's dropout masks of full6 and full7 at one step; see `nets.dropout.draw_dropout_masks`."""
        return draw_dropout_masks(
            seed,
            step,
            num_units=self.num_dropped_units,
            ratio=self.dropout,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            device=self.scores.weight.device,
        )

    def forward(self, inputs: Tensor, masks: tuple[Tensor, ...] | None = None) -> Tensor:
        """Inputs (N, num_frames * num_channels, input_px, input_px) -> logits (N, num_classes).

        `masks` are those of `draw_masks` in training, None in a test. Raises ValueError if training lacks them.
        """
        if self.training and masks is None and self.dropout:
            raise ValueError("a training pass needs dropout masks: pass draw_masks(seed, step, ...), or call eval().")
        if self.num_frames > 1:
            inputs = torch.cat(inputs.chunk(self.num_frames, dim=1))  # (num_frames * N, 3, ...), frame after frame
        x = self.features(inputs).flatten(1)  # (N, c3 * output_px ** 2)
        x = F.relu(self.full6(x))
        x = x if masks is None else x * masks[0]
        x = F.relu(self.full7(x))
        x = x if masks is None else x * masks[1]
        return self.scores(x)


def _conv(num_in: int, num_out: int, *, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Module:
    # skip_init leaves the weights unset: the default initialisation would draw from the global generator. It also
    # leaves the CPU its default, where `with torch.device("meta")` asks for shapes without memory.
    device = torch.get_default_device()
    return nn.utils.skip_init(nn.Conv2d, num_in, num_out, kernel, stride=stride, padding=padding, device=device)


def _linear(num_in: int, num_out: int) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, num_in, num_out, device=torch.get_default_device())


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def output_px(input_px: int) -> int:
    """Side of conv5's pooled output for a square input of `input_px`: 6 for 224. ValueError if no pixel is left."""

    def pool(px: int) -> int:
        return (px - 3 + 1) // 2 + 1

    conv1 = (input_px - 7) // 2 + 1
    conv2 = (pool(conv1) + 2 - 5) // 2 + 1
    side_px = pool(pool(conv2))
    if input_px < 7 or side_px < 1:
        raise ValueError(f"input_px={input_px} leaves no pixel after conv5's pool; needs at least 41.")
    return side_px
