"""The paper's figures from packed data and runs, a PNG each: `python -m train.figures NAME ... [--out FILE.png]`.

flow DATA VIDEO         Fig. 2: two frames, the flow between them, its components, and their usual colour coding
stacking DATA VIDEO     Fig. 3: what a stack holds of a point, at its place or along its trajectory
filters RUN             Fig. 4: the first layer's filters
confusion RUN           Fig. 5: confusion matrix
recall RUN              Fig. 6: recall of each class
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flow.canvas import DPI, new_figure, save_png
from flow.command import Parser, describe_error, did_you_mean, nearest_path
from flow.untrusted import printable, read_json
from train.flow_figures import draw_flow, draw_stacking
from train.results import Ints, per_class_recall
from train.settings import STREAMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_RESULTS_BYTES = 1 << 29
#: Of a class's name anywhere, and as a tick's label, which would leave the figure no room.
_MAX_NAME_CHARS, _MAX_LABEL_CHARS = 80, 30

# --- what is drawn -----------------------------------------------------------------------------------------------


def filter_sheet(weights: npt.NDArray[np.float32], gap: int = 1) -> npt.NDArray[np.float32]:
    """Filters (F, C, k, k) side by side: row c, column j is channel c of filter j, in [-1, 1]; NaN in the gaps.

    A filter is divided by its own largest absolute value, so its channels can be compared, and 0 stays 0.
    """
    num_filters, num_channels, side, _ = weights.shape
    largest = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    tiles = np.pad(weights / np.maximum(largest, 1e-12), ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    # (F, C, k, k) -> (C, k, F, k) -> (C * k, F * k)
    sheet = tiles.transpose(1, 2, 0, 3).reshape(num_channels * (side + gap), num_filters * (side + gap))
    return sheet[:-gap, :-gap]


def confusion_shares(confusion: Ints) -> npt.NDArray[np.float64]:
    """Counts (K, K) -> shares of each true class, a row; NaN in rows of classes without test videos."""
    totals = confusion.sum(1, keepdims=True)
    return np.divide(confusion, totals, out=np.full(confusion.shape, np.nan), where=totals > 0)


def sorted_recalls(confusion: Ints, classes: Sequence[str]) -> list[tuple[str, float]]:
    """Classes and their recalls in [0, 1], best first; without those that have no test videos."""
    pairs = zip(classes, per_class_recall(confusion), strict=True)
    return sorted(
        ((name, recall) for name, recall in pairs if recall is not None), key=lambda pair: (-pair[1], pair[0])
    )


# --- reading -----------------------------------------------------------------------------------------------------


def read_confusion(results: Path, method: str) -> tuple[Ints, list[str], str]:
    """Confusion matrix (K, K), classes and a caption from a run folder or its results.json.

    Raises FileNotFoundError if there are no results, ValueError if there is no such method; with one stream alone
    "average" is that stream's.
    """
    path = results / "results.json" if results.is_dir() else results
    if not path.exists():
        what = "run `python -m train.fuse RUN` on its run first."
        raise FileNotFoundError(f"no results at {path}: {what}{nearest_path(results)}")
    try:
        content = read_json(path, MAX_RESULTS_BYTES)
        methods = dict(content["methods"])
        name = next(iter(methods)) if method == "average" and len(methods) == 1 else method
        found = methods.get(name)
        if found is not None:
            share = f"{found['accuracy_pct']:.1f} % of {found['num_videos']} videos"
            caption = printable(f"{found.get('title', name)}, {content['split_list']}: {share}")
            classes = [printable(name, _MAX_NAME_CHARS) for name in content["classes"]]
            confusion = np.array(found["confusion"], np.int64).reshape(len(classes), len(classes))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no results.json ({error!r:.200}); write it with `python -m train.fuse`.") from None
    if found is None:
        near = did_you_mean(method, methods)
        raise ValueError(f"{path} has no method {method!r}; it has {', '.join(methods)}.{near}")
    return confusion, classes, caption


# --- drawing -----------------------------------------------------------------------------------------------------


def draw_filters(run: Path, path: Path, *, stream: str = "temporal") -> Path:
    """`filters_figure` as a PNG."""
    return save_png(filters_figure(run, stream), path)


def draw_confusion(results: Path, path: Path, *, method: str = "average") -> Path:
    """`confusion_figure` as a PNG."""
    return save_png(confusion_figure(results, method), path)


def draw_recall(results: Path, path: Path, *, method: str = "average") -> Path:
    """`recall_figure` as a PNG."""
    return save_png(recall_figure(results, method), path)


def filters_figure(run: Path, stream: str) -> Figure:
    """Fig. 4: the first convolution's filters of a run's net, a column each; a row for each input channel.

    Raises FileNotFoundError if the stream has no checkpoint, ValueError if its first layer has no k x k filters.
    """
    from train.checkpoint import load_checkpoint
    from train.engine import CHECKPOINT

    checkpoint = load_checkpoint(run / stream / CHECKPOINT)
    name, weights = next(item for item in checkpoint.net.items() if item[0].endswith(".weight"))
    if weights.ndim != 4:
        raise ValueError(f"{run / stream}: {name} is of shape {tuple(weights.shape)}; filters are (F, C, k, k).")
    num_filters, num_channels, side, _ = weights.shape
    sheet = filter_sheet(weights.float().numpy())
    # Whole pixels for each weight: 96 filters are about 13 inches wide, fewer are drawn larger.
    scale = max(2, round(min(0.3, 13 / num_filters) * DPI / (side + 1)))
    height_in, width_in = (scale * pixels / DPI for pixels in sheet.shape)
    left, bottom, top = 0.5, 0.3, 0.1
    figure = new_figure(max(6.5, left + width_in + 0.1), bottom + height_in + top)  # the caption's width at least
    total_in = figure.get_size_inches()
    axes = figure.add_axes((left / total_in[0], bottom / total_in[1], width_in / total_in[0], height_in / total_in[1]))
    axes.imshow(np.ma.masked_invalid(sheet), cmap="gray", vmin=-1, vmax=1, interpolation="none", aspect="auto")
    tile_pt = 72 * scale * (side + 1) / DPI
    rows = np.arange(num_channels) * (side + 1) + (side - 1) / 2
    axes.set_yticks(rows, channel_names(stream, num_channels, checkpoint.config), fontsize=min(9, 0.8 * tile_pt))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    caption = f"{num_filters} filters of {side} x {side}; grey: 0, white: positive, each filter on its own scale"
    figure.text(left / total_in[0], 0.1 / total_in[1], caption, fontsize=9)
    return figure


def channel_names(stream: str, num_channels: int, config: dict[str, Any]) -> list[str]:
    """Names of a net's input channels: dx1, dy1, dx2, ...; bdx1, ... of backward fields; R, G, B of frames."""
    if stream == "spatial":
        return [f"{'RGB'[c % 3]}{c // 3 + 1 if num_channels > 3 else ''}" for c in range(num_channels)]
    L = num_channels // 2
    ahead = L // 2 if config.get("data.bidirectional") else L
    steps = [("", k + 1) if k < ahead else ("b", k + 1 - ahead) for k in range(L)]
    return [f"{kind}d{axis}{k}" for kind, k in steps for axis in "xy"]


def confusion_figure(results: Path, method: str = "average") -> Figure:
    """Fig. 5: the confusion matrix, each row divided by its class's test videos. results: a run or its results.json."""
    confusion, classes, caption = read_confusion(results, method)
    K = len(classes)
    side_in = min(13.0, max(3.5, 0.45 * K))
    font_pt = min(9.0, 0.75 * 72 * side_in / K)
    figure = new_figure(side_in + 2.2, side_in + 1.4, layout="constrained")
    axes = figure.subplots()
    shares = confusion_shares(confusion)
    drawn = axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=1, interpolation="none")
    axes.set_facecolor("0.85")
    if font_pt >= 5:
        axes.set_xticks(range(K), _labels(classes), rotation=90, fontsize=font_pt, parse_math=False)
        axes.set_yticks(range(K), _labels(classes), fontsize=font_pt, parse_math=False)
    if K <= 20:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                color = "white" if shares[i, j] > 0.6 else "black"
                axes.text(j, i, str(count), ha="center", va="center", fontsize=9, color=color)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(caption, fontsize=10, parse_math=False)
    figure.colorbar(drawn, shrink=0.5, pad=0.02, label="share of the class's videos")
    return figure


def _labels(names: Sequence[str]) -> list[str]:
    """Names as tick labels."""
    return [name if len(name) <= _MAX_LABEL_CHARS else f"{name[:_MAX_LABEL_CHARS]}…" for name in names]


def recall_figure(results: Path, method: str = "average") -> Figure:
    """Fig. 6: recall of each class, best first. results: a run folder or its results.json."""
    confusion, classes, caption = read_confusion(results, method)
    names, recalls = zip(*sorted_recalls(confusion, classes), strict=True)
    width_in = min(16.0, max(5.0, 0.5 * len(names)))
    font_pt = min(9.0, 0.8 * 72 * width_in / len(names))
    figure = new_figure(width_in, 4.5, layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(names)), 100 * np.array(recalls), width=0.8, color="tab:blue")
    if font_pt >= 5:
        axes.set_xticks(range(len(names)), _labels(names), rotation=90, fontsize=font_pt, parse_math=False)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 100), ylabel="recall, %")
    axes.set_title(caption, fontsize=10, parse_math=False)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- the command -------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Command line: draw one figure."""
    parser = Parser(
        prog="python -m train.figures",
        description="Draw a figure of the paper from packed data or a run, as PNG.",
        epilog="examples:\n"
        "  python -m train.figures flow packed Archery/v_Archery_g01_c01\n"
        "  python -m train.figures confusion runs/ucf101 --out confusion.png\n"
        "  python -m train.figures flow --help\n\n"
        "exit code: 0 drawn; 1 failed, the last line says why",
    )
    figures = parser.add_subparsers(dest="figure", required=True, metavar="NAME")

    def add(name: str, text: str) -> Parser:
        figure: Parser = figures.add_parser(name, help=text, description=f"Draw {text}.")
        figure.add_argument(
            "--out", type=Path, default=Path(f"{name}.png"), metavar="FILE", help="a .png (default %(default)s)"
        )
        return figure

    for name, text in (("flow", "Fig. 2: flow of two frames"), ("stacking", "Fig. 3: flow and trajectory stacking")):
        figure = add(name, text)
        figure.add_argument("data", type=Path, metavar="DATA", help="folder of a packed data set")
        figure.add_argument("video", metavar="VIDEO", help="id of a video in it, such as Archery/v_Archery_g01_c01")
    figures.choices["flow"].add_argument(
        "--frame", type=int, metavar="T", help="the first of the two (default: the middle one)"
    )
    figures.choices["flow"].add_argument(
        "--box", type=int, nargs=4, metavar=("X", "Y", "W", "H"), help="area, in px (default: that with most motion)"
    )
    figures.choices["stacking"].add_argument(
        "--tau", type=int, metavar="T", help="first frame (default: of the middle stack)"
    )
    figures.choices["stacking"].add_argument(
        "--L", type=int, default=10, metavar="N", help="fields (default %(default)s)"
    )
    figure = add("filters", "Fig. 4: first-layer filters")
    figure.add_argument("run", type=Path, metavar="RUN", help="run folder")
    figure.add_argument("--stream", choices=STREAMS, default="temporal", help="default: %(default)s")
    for name, text in (("confusion", "Fig. 5: confusion matrix"), ("recall", "Fig. 6: recall of each class")):
        figure = add(name, text)
        figure.add_argument("results", type=Path, metavar="RUN", help="run folder, or a results.json")
        figure.add_argument(
            "--method", default="average", metavar="NAME", help="spatial, temporal, average, svm (default %(default)s)"
        )
    options = vars(parser.parse_args(arguments))
    draw: dict[str, Callable[..., Path]] = {
        "flow": draw_flow,
        "stacking": draw_stacking,
        "filters": draw_filters,
        "confusion": draw_confusion,
        "recall": draw_recall,
    }
    try:
        print(f"drew {draw[options.pop('figure')](path=options.pop('out'), **options)}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {describe_error(error)}")


if __name__ == "__main__":
    main()
