"""Pictures of a packed set: thumbnails of its frames and fields, and charts. See `flow.browse`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flow.canvas import new_figure, to_svg
from flow.codec import dequantise, encode_rgb
from flow.colors import color_wheel, flow_colors
from flow.page import Picture
from flow.survey import PackedSet
from flow.untrusted import printable
from flow.video import resize

Image = npt.NDArray[np.uint8]

#: Longer side of a thumbnail, and its JPEG quality: 101 classes make a page of 3 MB.
THUMB_PX = 160
_THUMB_QUALITY = 80

#: Displacement that has full colour at least: what is smaller is noise of the method, and of the JPEGs.
_MIN_SCALE_PX = 0.1

_ABSENT_GREY = 225
_MAX_BARS = 120


def contact_sheet(packed: PackedSet, labels: Sequence[int], per_class: int, seed: int) -> list[Picture]:
    """Some videos of each class, drawn by a seed: the middle frame and its flow, see `tile`."""
    drawn = [(label, number) for label in labels for number in packed.draw_videos(label, seed)[:per_class].tolist()]
    return [_picture(packed, label, number) for label, number in tqdm(drawn, "pictures", unit="video", disable=None)]


def _picture(packed: PackedSet, label: int, number: int) -> Picture:
    num_frames = int(packed.num_frames[number])
    t = (num_frames - 1) // 2  # of two frames the first, which has a field
    frame = packed.read_frame(number, t)
    components = packed.read_field(number, t)
    class_name, (video_id,) = packed.classes[label], packed.video_ids([number])
    words = [class_name, printable(video_id.removeprefix(f"{class_name}/"))]
    size = packed.arrays["videos"][number]
    image = _thumb(_absent(size) if frame is None else frame)
    words += [f"frame {t} of {num_frames}"] if num_frames > 1 else []
    words += ["it cannot be read"] if frame is None else []
    if components is not None:
        flow, scale_px = field_thumbs([(_thumb(codes), lo, hi) for codes, (lo, hi, _) in components])
        words.append(f"±{scale_px:.2g} px/frame")
        image = tile(image, *flow)
    elif packed.num_fields[number]:
        words.append("its field cannot be read")
        image = tile(image, *[_thumb(_absent(size))] * 3)
    return Picture(encode_rgb(image, _THUMB_QUALITY), "image/jpeg", " · ".join(words))


def _absent(size: np.void) -> Image:
    """What stands for an image that cannot be read."""
    return np.full((int(size["height"]), int(size["width"]), 3), _ABSENT_GREY, np.uint8)


def _thumb(image: Image) -> Image:
    """An image (H, W[, 3]) scaled to THUMB_PX; of an absurdly long one the beginning."""
    short_px, long_px = sorted(image.shape[:2])
    return resize(image, max(1, round(THUMB_PX * short_px / long_px)))[:THUMB_PX, :THUMB_PX]


def field_thumbs(components: Sequence[tuple[Image, float, float]]) -> tuple[list[Image], float]:
    """A field as pictures (h, w, 3): in colour, dx and dy in grey; and the displacement at full scale, px/frame.

    components: codes (h, w), lo and hi of dx and dy. Full scale is the 99th percentile of the displacements' lengths.
    """
    field = np.stack([dequantise(codes, lo, hi) for codes, lo, hi in components])
    scale_px = max(_MIN_SCALE_PX, float(np.quantile(np.hypot(*field), 0.99)))
    greys = np.repeat(0.5 + 0.5 * field[..., None] / scale_px, 3, axis=-1)
    images = [flow_colors(field, scale_px), *greys]
    return [(255 * np.clip(image, 0, 1)).round().astype(np.uint8) for image in images], scale_px


def tile(frame: Image, color: Image, dx: Image, dy: Image) -> Image:
    """Frame and colour-coded flow, below them dx and dy, as one picture."""
    gap = 4
    column = np.full((len(frame), gap, 3), 255, np.uint8)
    above, below = (np.concatenate([left, column, right], axis=1) for left, right in ((frame, color), (dx, dy)))
    return np.concatenate([above, np.full((gap, above.shape[1], 3), 255, np.uint8), below])


# --- charts ------------------------------------------------------------------------------------------------------


def draw_legend() -> Picture:
    """The colour wheel and the scale of grey."""
    figure = new_figure(4.6, 1.9)
    wheel = figure.add_axes((0.09, 0.16, 0.28, 0.68))
    wheel.imshow(color_wheel(161), extent=(-1, 1, 1, -1))
    wheel.set_axis_off()
    for x, y, text, across, up in ((1.08, 0, "right", "left", "center"), (-1.08, 0, "left", "right", "center"),
                                   (0, 1.1, "down", "center", "top"), (0, -1.1, "up", "center", "bottom")):  # fmt: skip
        wheel.text(x, y, text, ha=across, va=up, fontsize=9, clip_on=False)
    grey = figure.add_axes((0.56, 0.46, 0.38, 0.14))
    grey.imshow(np.linspace(0, 1, 256)[None], cmap="gray", vmin=0, vmax=1, aspect="auto", extent=(-1, 1, 0, 1))
    grey.set_xticks([-1, 0, 1], ["−s", "0", "+s"], fontsize=9)
    grey.set_yticks([])
    grey.set_title("dx (right), dy (down)", fontsize=9)
    return Picture(to_svg(figure), "image/svg+xml", "Colour: where to, and by its strength how far; white is still.")


def draw_frames(lengths: dict[str, Any]) -> Picture:
    """Histogram of frames per video."""
    edges, counts = lengths["histogram"]["edges"], lengths["histogram"]["counts"]
    figure = new_figure(5, 2.8, layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="tab:blue", edgecolor="white", linewidth=0.5)
    axes.set_xlabel("frames")
    axes.set_ylabel("videos")
    axes.locator_params(integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    return Picture(to_svg(figure), "image/svg+xml", "Videos by their number of frames")


def draw_motion(classes: Sequence[dict[str, Any]]) -> Picture:
    """Motion of each class as bars, most first; of the classes that move most."""
    moving = sorted((c for c in classes if c["motion"]), key=lambda c: c["motion"]["px_per_frame"])
    caption = "Mean length of the displacements of each class"
    if len(moving) > _MAX_BARS:
        caption += f", of the {_MAX_BARS} that move most"
    moving = moving[-_MAX_BARS:]
    figure = new_figure(5, 0.6 + 0.2 * len(moving), layout="constrained")
    axes = figure.subplots()
    names = [name if len(name := c["name"]) <= 28 else f"{name[:27]}…" for c in moving]
    for key, color, label in (
        ("px_per_frame", "0.8", "all"),
        ("less_mean_px_per_frame", "tab:blue", "less the field's mean"),
    ):
        axes.barh(range(len(moving)), [c["motion"][key] for c in moving], color=color, label=label, height=0.7)
    axes.set_yticks(range(len(moving)), names, fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, len(moving) - 0.4)
    axes.set_xlabel("px/frame")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return Picture(to_svg(figure), "image/svg+xml", caption)
