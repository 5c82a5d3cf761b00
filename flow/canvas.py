"""What every figure is drawn on: matplotlib without a display. Imported when it is needed, for it takes its time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow.shard import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


def new_figure(width_in: float, height_in: float, **options: Any) -> Figure:
    """An empty figure. Raises ImportError if there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib, which is not installed: pip install matplotlib.") from None
    return Figure(figsize=(width_in, height_in), **options)


def show_image(axes: Axes, image: Any, title: str, **options: Any) -> None:
    """Draw an image (H, W) or RGB (H, W, 3), a pixel's centre at its (x, y), with a title and no ticks."""
    axes.imshow(image, **options)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure, atomically. Returns its path. Raises ValueError unless that ends with .png."""
    if path.suffix != ".png":
        raise ValueError(f"{path}: figures are written as PNG; give a name that ends with .png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with _without_glyph_warnings():
        figure.savefig(content, format="png", dpi=DPI)
    write_bytes(path, content.getvalue())
    return path


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, whose text is text: it takes the reader's font and can be searched."""
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "figure", "font.family": "sans-serif"}):
        with _without_glyph_warnings():  # of the font here, which is not the reader's
            figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """A box in the place of a letter says as much."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield
