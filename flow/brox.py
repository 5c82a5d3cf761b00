"""Brox, Bruhn, Papenberg & Weickert 2004, the paper's flow method (sec. 5), in PyTorch: many pairs at once, any device.

The field w = (u, v) minimises, over the first frame's pixels x,

    sum psi(|I1(x + w) - I0(x)|^2 + gamma |grad I1(x + w) - grad I0(x)|^2) + alpha psi(|grad u|^2 + |grad v|^2),

psi(s^2) = sqrt(s^2 + eps^2), from coarse to fine. Each level of the pyramid warps the second frame by the field so
far, and then repeats: fix the two psi' at the present field (inner iterations); improve the linear system that is left,
in u and v of each pixel together, by red-black successive over-relaxation (solver iterations). One colour's pixels need
the other colour's alone, so each half sweep is a few operations on whole arrays:

    red and black pixels     stored as two arrays of half the width; a red pixel's neighbours are, of black,
      r b r b r b            (y-1, k), (y+1, k), (y, k), and (y, k-1) in even rows, (y, k+1) in odd ones
      b r b r b r

Nothing waits for the device, and no value decides what is computed next.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: OpenCV's names and values (its cuda::BroxOpticalFlow), for grey values in [0, 1]. sigma is the deviation, in px, of
#: the Gaussian that takes noise off the frames beforehand, which OpenCV lacks.
DEFAULTS: dict[str, Any] = {
    "alpha": 0.197,
    "gamma": 50.0,
    "scale": 0.8,
    "inner_iterations": 5,
    "outer_iterations": 150,
    "solver_iterations": 10,
    "sigma": 0.6,
}

#: Of the numerics below; a change of what they yield counts it up, so that no pack mixes two.
VERSION = "1"

EPSILON = 1e-3
OMEGA = 1.95
MIN_SIDE_PX = 16


@torch.no_grad()
def brox_flow(
    frames0: Tensor,
    frames1: Tensor,
    *,
    alpha: float = DEFAULTS["alpha"],
    gamma: float = DEFAULTS["gamma"],
    scale: float = DEFAULTS["scale"],
    inner_iterations: int = DEFAULTS["inner_iterations"],
    outer_iterations: int = DEFAULTS["outer_iterations"],
    solver_iterations: int = DEFAULTS["solver_iterations"],
    sigma: float = DEFAULTS["sigma"],
) -> Tensor:
    """Fields (N, 2, H, W) float32 px, channels dx, dy, of the pairs of frames (N, H, W) uint8, on the frames' device.

    alpha, gamma: weights of the smoothness and of the gradients. scale: of one level of the pyramid to the next.
    inner_iterations: how often psi' is renewed on a level. outer_iterations: levels, at most; the coarsest has a side
    of no less than 16 px. solver_iterations: sweeps for each psi'.
    Raises ValueError if the parameters make no sense.
    """
    if (
        not (alpha > 0 and gamma >= 0 and 0.3 <= scale <= 0.99 and sigma >= 0)
        or min(inner_iterations, outer_iterations, solver_iterations) < 1
    ):
        raise ValueError(
            f"alpha={alpha}, gamma={gamma}, scale={scale}, sigma={sigma}, inner_iterations={inner_iterations}, "
            f"outer_iterations={outer_iterations}, solver_iterations={solver_iterations}: expected alpha > 0, "
            "gamma >= 0, scale in [0.3, 0.99], sigma >= 0 and at least one iteration of each."
        )
    frames = torch.stack((frames0, frames1), 1).float() / 255  # (N, 2, H, W)
    frames = _smooth(frames, sigma)
    sizes = pyramid_sizes(frames.shape[2], frames.shape[3], scale, outer_iterations)
    field = frames.new_zeros(len(frames), 2, *sizes[-1])
    for size in reversed(sizes):
        level = frames
        if size != sizes[0]:
            level = F.interpolate(frames, size, mode="bilinear", antialias=True)
        field = _resize_field(field, size)
        tensor = _motion_tensor(level[:, :1], level[:, 1:], field, gamma)
        field = _minimise(tensor, field, alpha, inner_iterations, solver_iterations)
    return field


def pyramid_sizes(height: int, width: int, scale: float, num_levels: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of the levels, the finest first: at most num_levels, none but the first with a side under 16 px."""
    sizes = [(height, width)]
    while len(sizes) < num_levels:
        factor = scale ** len(sizes)
        size = (round(height * factor), round(width * factor))
        if min(size) < MIN_SIDE_PX:
            break
        sizes.append(size)
    return sizes


def _smooth(frames: Tensor, sigma: float) -> Tensor:
    """Frames (N, C, H, W) under a Gaussian of sigma px."""
    radius = math.ceil(3 * sigma)
    kernel = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-radius, radius + 1)] if radius else [1.0]
    kernel = [tap / sum(kernel) for tap in kernel]
    return _filter(_filter(frames, kernel, 3), kernel, 2)


def _filter(images: Tensor, kernel: list[float], axis: int) -> Tensor:
    """Correlate images (N, C, H, W) with an odd number of taps, along rows (axis 3) or columns (axis 2).

    Not by a convolution of torch, which GPUs compute with 10 bits of mantissa by default.
    """
    radius = len(kernel) // 2
    padded = F.pad(images, (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius), mode="replicate")
    sums = torch.zeros_like(images)
    for at, tap in enumerate(kernel):
        if tap:
            sums.add_(padded.narrow(axis, at, images.shape[axis]), alpha=tap)
    return sums


def _resize_field(field: Tensor, size: tuple[int, int]) -> Tensor:
    """A field of px (N, 2, h, w), enlarged to a level's size; the vectors grow with it."""
    height, width = field.shape[2:]
    if (height, width) == size:
        return field
    field = F.interpolate(field, size, mode="bilinear")
    field[:, 0] *= size[1] / width
    field[:, 1] *= size[0] / height
    return field


def _derivatives(images: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of images (N, C, H, W) along x and y, to fourth order."""
    kernel = [1 / 12, -8 / 12, 0, 8 / 12, -1 / 12]
    return _filter(images, kernel, 3), _filter(images, kernel, 2)


def _warp(frame: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
    """The frame (N, 1, H, W) at x + w, bicubic, and where that lies inside it: (N, 1, H, W), 1 or 0."""
    height, width = frame.shape[2:]
    x = torch.arange(width, device=field.device) + field[:, 0]
    y = torch.arange(height, device=field.device)[:, None] + field[:, 1]
    grid = torch.stack((x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1), -1)
    warped = F.grid_sample(frame, grid, mode="bicubic", padding_mode="border", align_corners=True)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return warped, inside[:, None].float()


def _motion_tensor(frame0: Tensor, frame1: Tensor, field: Tensor, gamma: float) -> Tensor:
    """J11, J12, J22, J13, J23, J33 as (6, N, H, W): the linearised data term of an increment d is (d, 1)' J (d, 1).

    Zero where the field leaves the frame: nothing is known of what lies there.
    """
    warped, inside = _warp(frame1, field)
    both = torch.cat((frame0, warped), 1)
    x, y = _derivatives(both)
    t = warped - frame0
    # In space, the mean of both frames' derivatives belongs to the middle of the motion, as their difference does.
    ix, iy = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    ixx, ixy = _derivatives(ix)
    iyy = _derivatives(iy)[1]
    ixt, iyt = x[:, 1:] - x[:, :1], y[:, 1:] - y[:, :1]

    def term(a: Tensor, b: Tensor, ax: Tensor, bx: Tensor, ay: Tensor, by: Tensor) -> Tensor:
        return (a * b + gamma * (ax * bx + ay * by)) * inside

    return torch.stack(
        (
            term(ix, ix, ixx, ixx, ixy, ixy),
            term(ix, iy, ixx, ixy, ixy, iyy),
            term(iy, iy, ixy, ixy, iyy, iyy),
            term(ix, t, ixx, ixt, ixy, iyt),
            term(iy, t, ixy, ixt, iyy, iyt),
            term(t, t, ixt, ixt, iyt, iyt),
        )
    ).squeeze(2)


# --- one level ---------------------------------------------------------------------------------------------------


def _minimise(tensor: Tensor, start: Tensor, alpha: float, inner_iterations: int, solver_iterations: int) -> Tensor:
    """The field (N, 2, H, W) that the linearised energy leads to from `start`, by which the second frame was warped."""
    j11, j12, j22, j13, j23, j33 = tensor
    u0, v0 = start.unbind(1)
    # For w = start + d in the place of d: the same matrix, another right side.
    right = torch.stack((j11 * u0 + j12 * v0 - j13, j12 * u0 + j22 * v0 - j23))
    solver = _Solver(start)
    field = start
    for _ in range(inner_iterations):
        du, dv = (field - start).unbind(1)
        square = du * (j11 * du + 2 * (j12 * dv + j13)) + dv * (j22 * dv + 2 * j23) + j33
        data = square.clamp_(min=0).add_(EPSILON**2).rsqrt_()
        left, up = _diffusivity(field, alpha)
        field = solver.run(data * tensor[:3], data * right, left, up, solver_iterations)
    return field


def _diffusivity(field: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """alpha psi'(|grad u|^2 + |grad v|^2) between each pixel and its left neighbour (N, H, W - 1), upper (N, H - 1, W).

    The derivative across comes from the mean of both pixels' central differences.
    """
    wide = F.pad(field, (1, 1, 1, 1), mode="replicate")
    across_y = (wide[:, :, 2:] - wide[:, :, :-2]) / 4  # half of the central difference, at columns -1 .. W
    across_x = (wide[:, :, :, 2:] - wide[:, :, :, :-2]) / 4

    def weight(along: Tensor, across: Tensor) -> Tensor:
        return along.square_().addcmul_(across, across).sum(1).add_(EPSILON**2).rsqrt_().mul_(alpha)

    return (
        weight(field[..., 1:] - field[..., :-1], across_y[..., 1:-2] + across_y[..., 2:-1]),
        weight(field[:, :, 1:] - field[:, :, :-1], across_x[:, :, 1:-2] + across_x[:, :, 2:-1]),
    )


class _Solver:
    """Successive over-relaxation on one level, from the field `start` (N, 2, H, W) onwards, of the linear system

        (a11 + s) u + a12 v = right_u + sum over neighbours of weight * u,    and alike for v,

    s the sum of the weights. All memory is taken once: new memory costs a CPU more than the arithmetic does.
    """

    def __init__(self, start: Tensor) -> None:
        num_pairs, _, self._height, self._width = start.shape
        # Even sides: a pixel more has weights of zero all around it, and says nothing.
        height, width = self._height + self._height % 2, self._width + self._width % 2
        self._system = start.new_zeros(9, num_pairs, height, width)
        self._halves = [_Half(start.new_empty(11, num_pairs, height, width // 2), colour) for colour in (0, 1)]
        self._field = start.new_zeros(2, num_pairs, height, width)
        self._inside(self._field).copy_(start.transpose(0, 1))
        for half in self._halves:
            half.pack(self._field, half.field)
        first, second = self._halves
        self._updates = [first.update_from(second.field), second.update_from(first.field)]

    def run(self, data: Tensor, right: Tensor, left: Tensor, up: Tensor, num_sweeps: int) -> Tensor:
        """The field (N, 2, H, W) after some sweeps more, valid up to the next run.

        data: a11, a12, a22 as (3, N, H, W). right: (2, N, H, W). left, up: weights as of `_diffusivity`.
        """
        system = self._inside(self._system)
        to_left, to_right, to_up, to_down = system[3:7]
        to_left[..., 1:], to_right[..., :-1], to_up[:, 1:], to_down[:, :-1] = left, left, up, up
        s = to_left + to_right
        s.add_(to_up).add_(to_down)
        d11, d22 = data[0].add(s), s.add_(data[2])
        factor = OMEGA / (d11 * d22).addcmul_(data[1], data[1], value=-1)
        torch.mul(d22, factor, out=system[0])
        torch.mul(d11, factor, out=system[1])
        torch.mul(data[1], factor.neg_(), out=system[2])
        system[7:9] = right
        for half in self._halves:
            half.pack(self._system, half.system)
            half.pick_neighbours()
        for _ in range(num_sweeps):
            for update in self._updates:
                update()
        for half in self._halves:
            half.unpack(half.field, self._field)
        return self._inside(self._field).transpose(0, 1)

    def _inside(self, whole: Tensor) -> Tensor:
        return whole[..., : self._height, : self._width]


class _Half:
    """The pixels of one colour: of row y the pixels x = 2 k + (y + colour) % 2, as arrays (..., H, W / 2).

    memory: (11, N, H, W / 2), for inverse (u, v, cross), weights (left, right, up, down), right side (u, v), field.
    """

    def __init__(self, memory: Tensor, colour: int) -> None:
        self._colour = colour
        self.system, self.field = memory[:9], memory[9:]
        self._inverse, self._cross, self._weights, self._right = memory[:2], memory[2], memory[3:7], memory[7:9]
        self._same = torch.empty_like(memory[2])
        # In rows of one parity the left neighbour stands at the same place of the other colour's array; in those of the
        # other parity it is the right one.
        self._left_rows, self._right_rows = slice(1 - colour, None, 2), slice(colour, None, 2)

    def pack(self, whole: Tensor, half: Tensor) -> None:
        half[..., 0::2, :] = whole[..., 0::2, self._colour :: 2]
        half[..., 1::2, :] = whole[..., 1::2, 1 - self._colour :: 2]

    def unpack(self, half: Tensor, whole: Tensor) -> None:
        whole[..., 0::2, self._colour :: 2] = half[..., 0::2, :]
        whole[..., 1::2, 1 - self._colour :: 2] = half[..., 1::2, :]

    def pick_neighbours(self) -> None:
        """Of the weights to the left and the right, those of the neighbours at the same place."""
        left, right, _, _ = self._weights
        for rows, weight in ((self._left_rows, left), (self._right_rows, right)):
            self._same[..., rows, :] = weight[..., rows, :]

    def update_from(self, other: Tensor) -> Callable[[], None]:
        """A function that renews this colour's field by the present values of the other one's (2, N, H, W / 2)."""
        left, right, up, down = self._weights
        sums = torch.empty_like(self.field)
        terms = (
            (sums[..., 1:, :], up[..., 1:, :], other[..., :-1, :]),
            (sums[..., :-1, :], down[..., :-1, :], other[..., 1:, :]),
            (sums[..., self._left_rows, :-1], right[..., self._left_rows, :-1], other[..., self._left_rows, 1:]),
            (sums[..., self._right_rows, 1:], left[..., self._right_rows, 1:], other[..., self._right_rows, :-1]),
        )
        (u, v), (sum_u, sum_v) = self.field, sums

        def update() -> None:
            torch.addcmul(self._right, self._same, other, out=sums)
            for into, weight, value in terms:
                into.addcmul_(weight, value)
            self.field.mul_(1 - OMEGA).addcmul_(self._inverse, sums)
            u.addcmul_(self._cross, sum_v)
            v.addcmul_(self._cross, sum_u)

        return update
