"""A video with its flow beside it and bars of scores below, to be looked at.

    frame t | flow from frame t-1 to t, as colour
    -----------------------------------------
    Archery  ==================  0.91
    Surfing  ==                  0.06
    0:03             full colour: 8 px/frame

The only module that writes video for people, as H.264, and that draws text into frames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flow.colors import flow_colors
from flow.command import nearest_path
from flow.fragment import Recipe, read_steps
from flow.video import Frame, VideoError, resize

#: Smaller side of the frame, in px, and the longest that its other side may become.
SIDE_PX, LONGEST_PX = 320, 1280
#: Displacement that has full colour, as a part of the frame's smaller side: 8 px/frame at 256 px.
FULL_COLOUR = 8 / 256

_LINE_PX, _MARGIN_PX, _FONT_PX = 30, 12, 18

#: Names and scores in [0, 1], best first.
Bars = Sequence[tuple[str, float]]


def render(frames: Iterator[Frame], recipe: Recipe, bars_at: Callable[[int], Bars], path: Path, fps: float) -> None:
    """Write a video as MP4 (H.264): frames, flow beside them, bars below.

    Args:
        frames: RGB (H, W, 3) uint8 of one size, at the recipe's; recipe: how flow is computed, if it is at all.
        bars_at: of a frame's number, the bars to be drawn with it; as many each time.
    Raises VideoError if the file cannot be written; then there is none.
    """
    write_mp4(path, _pictures(frames, recipe, bars_at, fps), fps)


def _pictures(frames: Iterator[Frame], recipe: Recipe, bars_at: Callable[[int], Bars], fps: float) -> Iterator[Frame]:
    full_px = FULL_COLOUR * recipe.size_px
    legend = "" if recipe.method is None else f"full colour: {full_px:g} px/frame"
    for t, step in enumerate(read_steps(frames, recipe)):
        views = [step.frame]
        if recipe.method is not None:
            still = np.zeros((2, *step.frame.shape[:2]), np.float32)
            colours = flow_colors(still if step.forward is None else step.forward, full_px)
            views.append(np.rint(255 * colours).astype(np.uint8))
        short, long = sorted(step.frame.shape[:2])
        side_px = max(1, min(SIDE_PX, LONGEST_PX * short // long))
        picture = np.concatenate([resize(view, side_px) for view in views], axis=1)
        panel = _panel(tuple(bars_at(t)), int(t / fps), legend, picture.shape[1])
        yield np.concatenate([picture, panel])


@lru_cache(4)
def _panel(bars: tuple[tuple[str, float], ...], second: int, legend: str, width: int) -> Frame:
    """Bars, and below them the time and a legend: (H, width, 3) uint8."""
    from PIL import Image, ImageDraw

    height = 2 * _MARGIN_PX + (len(bars) + 1) * _LINE_PX
    image = Image.new("RGB", (width, height), (24, 24, 24))
    draw, font = ImageDraw.Draw(image), _font()
    name_px, number_px = int(0.42 * width), 5 * _FONT_PX
    bar_px = width - name_px - number_px - 2 * _MARGIN_PX
    for i, (name, score) in enumerate(bars):
        y = _MARGIN_PX + i * _LINE_PX
        colour = (255, 255, 255) if i == 0 else (170, 170, 170)
        draw.text((_MARGIN_PX, y), _shortened(name, draw, font, name_px - _MARGIN_PX), fill=colour, font=font)
        box = (_MARGIN_PX + name_px, y + 4, _MARGIN_PX + name_px + max(1, round(score * bar_px)), y + _LINE_PX - 8)
        draw.rectangle(box, fill=(64, 160, 255) if i == 0 else (90, 110, 130))
        draw.text((width - number_px + _MARGIN_PX, y), f"{score:.2f}", fill=colour, font=font)
    time = f"{second // 60}:{second % 60:02d}"
    for text, x, anchor in ((time, _MARGIN_PX, "ld"), (legend, width - _MARGIN_PX, "rd")):
        draw.text((x, height - _MARGIN_PX), text, fill=(120, 120, 120), font=font, anchor=anchor)
    return np.asarray(image)


@lru_cache(1)
def _font() -> Any:
    """A font with Latin, Greek and Cyrillic letters, which matplotlib brings along."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _FONT_PX)


def _shortened(text: str, draw: Any, font: Any, width: int) -> str:
    """The text, or as much of it as has room, with an ellipsis."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def check_mp4(path: Path) -> None:
    """Raise VideoError unless a video could be written there."""
    if path.suffix.lower() != ".mp4":
        raise VideoError(f"{path}: the video is written as MP4; give a name that ends in .mp4.")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.F_OK):
        if path.parent.is_dir():
            raise VideoError(f"{path} cannot be written: it is a folder, or its folder is read-only.")
        raise VideoError(f"{path} cannot be written: its folder is not there.{nearest_path(path.parent)}")


def write_mp4(path: Path, frames: Iterable[Frame], fps: float) -> None:
    """Write RGB frames (H, W, 3) uint8 as H.264 in MP4, which gets its name when it is whole.

    A last row or column that makes a side odd is left out: the format's colours have half the resolution.
    Raises VideoError if the name does not end in .mp4, there is no frame, or it cannot be written.
    """
    import av

    check_mp4(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream: Any = None
            for frame in frames:
                height, width = (side - side % 2 for side in frame.shape[:2])
                if stream is None:
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
                container.mux(stream.encode(picture))
            if stream is None:
                raise VideoError(f"{path}: a video needs at least one frame")
            container.mux(stream.encode())
        os.replace(temporary, path)
    except (OSError, av.FFmpegError) as error:
        raise VideoError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
