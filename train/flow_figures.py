"""Figures of displacement fields: Fig. 2 of the paper, what a field is, and Fig. 3, what a stack of fields holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flow.canvas import new_figure, save_png, show_image
from flow.codec import decode_component, decode_rgb
from flow.colors import color_wheel, flow_colors
from flow.fields import stack_trajectories, subtract_mean, trajectory_points
from loaders.batch import StreamSpec
from loaders.index import Index, open_index
from loaders.source import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]  # x, y, width, height in px


# --- reading ---------------------------------------------------------------------------------------------------------


def read_frames(index: Index, row: int, first: int, num: int) -> npt.NDArray[np.uint8]:
    """RGB frames (num, H, W, 3) of a video from frame `first` on."""
    source = Source(index, StreamSpec(stream="spatial", rgb_frames=num))
    images = source.read(np.array([row]), np.array([first]), num).images()
    source.close()
    return np.stack([decode_rgb(image.tobytes()) for image in images])


def read_fields(index: Index, row: int, tau: int, L: int) -> Array:
    """Fields d_tau .. d_{tau+L-1} (L, 2, H, W) of a video in px/frame. Raises ValueError if they leave the video."""
    num_fields = int(index.num_frames[row]) - 1
    if L < 1 or not 0 <= tau <= num_fields - L:
        raise ValueError(
            f"{L} fields from frame {tau} on: {index.video_ids([row])[0]} has {num_fields}, from frames 0 to "
            f"{num_fields - 1}. Take another frame, or another video."
        )
    source = Source(index, StreamSpec(stream="temporal", L=L))
    at = np.array([row]), np.array([tau]), L
    images = [image.tobytes() for image in source.read(*at).images()]
    entries = source.entries(*at).reshape(-1)
    source.close()
    components = [
        decode_component(image, float(entry["lo"]), float(entry["hi"]))
        for image, entry in zip(images, entries, strict=True)
    ]
    return np.stack(components).reshape(L, 2, *components[0].shape)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def busiest_box(fields: Array, share: float = 1 / 3) -> Box:
    """The window with most motion, less the camera's: that with the largest sum of squares of fields less their means.

    fields (n, 2, H, W) px/frame; share: of the fields' sides that the window's have.
    """
    energy = np.sum([subtract_mean(field) ** 2 for field in fields], axis=(0, 1), dtype=np.float64)
    h, w = (max(1, round(share * side)) for side in energy.shape)
    table = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = table[h:, w:] - table[:-h, w:] - table[h:, :-w] + table[:-h, :-w]
    y, x = np.unravel_index(sums.argmax(), sums.shape)
    return int(x), int(y), w, h


def _check_box(box: Box, height: int, width: int) -> Box:
    x, y, w, h = box
    if w < 1 or h < 1 or not (0 <= x <= width - w and 0 <= y <= height - h):
        raise ValueError(f"box {x} {y} {w} {h} (x y width height) leaves the frame of {width} x {height} px.")
    return box


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_flow(data: Path, video: str, path: Path, *, frame: int | None = None, box: Box | None = None) -> Path:
    """Fig. 2: frames t and t+1 with an area outlined, its flow as arrows, dx and dy, and the colour coding.

    Args:
        data, video: packed data set and the id of a video in it.
        frame: t; the middle one by default. box: the area in px; by default that with most motion.
    Raises ValueError if there is no such video, frame or area.
    """
    index = open_index(data)
    (row,) = index.rows([video])
    t = int(index.num_frames[row] - 1) // 2 if frame is None else frame
    field = read_fields(index, row, t, 1)[0]
    frames = read_frames(index, row, t, 2)
    height, width = field.shape[1:]
    box = busiest_box(field[None]) if box is None else _check_box(box, height, width)
    span_px = max(0.1, float(np.quantile(np.abs(field), 0.995)))
    long_px = max(0.1, float(np.hypot(*field).max()))

    panel_in = 3.4
    figure = new_figure(3.6 * panel_in, 2 * (panel_in * height / width + 0.4), layout="constrained")
    axes = figure.subplot_mosaic("abc.\ndefw", width_ratios=[1, 1, 1, 0.42])
    for name, image, number in (("a", frames[0], t), ("b", frames[1], t + 1)):
        show_image(axes[name], image, f"({name}) frame {number}")
        _outline(axes[name], box)
    _draw_arrows(axes["c"], frames[0], field, box)
    for name, component, symbol in (("d", field[0], "$d^x$, right"), ("e", field[1], "$d^y$, down")):
        title = f"({name}) {symbol}: black −{span_px:.1f}, white +{span_px:.1f} px"
        show_image(axes[name], component, title, cmap="gray", vmin=-span_px, vmax=span_px)
        _outline(axes[name], box)
    show_image(axes["f"], flow_colors(field, long_px), "(f) direction and length as colour")
    show_image(axes["w"], color_wheel(201), f"radius\n{long_px:.1f} px/frame")
    axes["w"].set_frame_on(False)
    return save_png(figure, path)


def _outline(axes: Axes, box: Box) -> None:
    x, y, w, h = box
    corners = np.array([(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)]) - 0.5
    axes.plot(*corners.T, color="cyan", linewidth=1.5)


def _draw_arrows(axes: Axes, frame: npt.NDArray[np.uint8], field: Array, box: Box) -> None:
    """The close-up: a frame's outlined area with the flow (2, H, W) as arrows, 13 or more across."""
    x, y, w, h = box
    step = max(1, round(min(h, w) / 13))
    us, vs = np.meshgrid(np.arange(x + step // 2, x + w, step), np.arange(y + step // 2, y + h, step))
    dx, dy = field[:, vs, us]
    # The longest but for outliers span one and a half cells, in round numbers.
    gain = 1.5 * step / max(0.1, float(np.quantile(np.hypot(dx, dy), 0.95)))
    gain = float(f"{gain:.1g}")
    show_image(axes, frame.mean(2), f"(c) flow in the area, arrows × {gain:g}", cmap="gray", vmin=-100, vmax=355)
    axes.quiver(us, vs, gain * dx, gain * dy, color="tab:red", angles="xy", scale_units="xy", scale=1, width=0.005)
    axes.set(xlim=(x - 0.5, x + w - 0.5), ylim=(y + h - 0.5, y - 0.5))


def draw_stacking(data: Path, video: str, path: Path, *, tau: int | None = None, L: int = 10) -> Path:
    """Fig. 3: the displacements that L fields hold of some points, each field in a colour: at the points' places on
    the left, eq. (1), along their trajectories on the right, eq. (2).

    tau: first frame; the middle stack by default. Raises ValueError if there is no such video, or the stack leaves it.
    """
    index = open_index(data)
    (row,) = index.rows([video])
    tau = max(0, int(index.num_frames[row]) - 1 - L) // 2 if tau is None else tau
    fields = read_fields(index, row, tau, L)
    frame = read_frames(index, row, tau, 1)[0]
    height, width = fields.shape[2:]
    x, y, w, h = busiest_box(fields)
    points = trajectory_points(fields)
    along = stack_trajectories(fields, 0, L).reshape(fields.shape)
    fixed = np.broadcast_to(points[0], points.shape)
    step = max(1, round(min(h, w) / 5))
    grid = np.s_[y + step // 2 : y + h : step, x + step // 2 : x + w : step]
    reached = (points + along)[:, :, *grid]  # the view is the area, and where its points go
    left, top = np.clip(reached.min((0, 2, 3)), 0, (x, y)) - 0.5
    right, bottom = np.clip(reached.max((0, 2, 3)), (x + w - 1, y + h - 1), (width - 1, height - 1)) + 0.5

    figure = new_figure(11, 0.5 + 4.9 * (bottom - top) / (right - left), layout="constrained")
    from matplotlib import colormaps  # after new_figure has found that it is there

    colors = colormaps["turbo"](np.linspace(0.05, 0.95, L))
    axes = figure.subplots(1, 2)
    titles = ("optical flow stacking (1): at the same place", "trajectory stacking (2): along the trajectory")
    for side, title, starts, vectors in zip(axes, titles, (fixed, points), (fields, along), strict=True):
        show_image(side, frame.mean(2), title, cmap="gray", vmin=-150, vmax=300)
        for k, color in enumerate(colors):
            (us, vs), (dx, dy) = starts[k][:, *grid], vectors[k][:, *grid]
            arrows = dict(angles="xy", scale_units="xy", scale=1, width=0.004, headwidth=4, headlength=4)
            side.quiver(us, vs, dx, dy, color=[color], label=rf"$d_{{\tau+{k}}}$" if k else r"$d_\tau$", **arrows)
            side.plot(us.ravel(), vs.ravel(), ".", color=color, markersize=3)
        side.set(xlim=(left, right), ylim=(bottom, top))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return save_png(figure, path)
