"""Draws charts of the results: `python benchmarks/charts.py` writes benchmarks/results/NAME.png for every NAME.json
of which it knows how, and which is there."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, errors_in_a_line
from matplotlib.figure import Figure

from flow.command import Parser

PAPER = (4, 3.2)  # GPUs and speed-up (sec. 5)
OURS, PEERS, REFERENCE, CEILINGS = "#c0392b", "#5d7289", "#a9b6c2", "#ffffff"


def throughput_chart(result: dict[str, Any]) -> Figure:
    """Samples/s of every row, a panel a stream; the line spans the slowest and the fastest round.

    Bars of ceilings far above everything else are cut off at the frame, with their value beside it.
    """
    shown = [row for row in result["rows"] if "error" not in row]
    streams = list(dict.fromkeys(row["stream"] for row in shown))
    panels = [[row for row in shown if row["stream"] == stream] for stream in streams]
    figure = Figure(figsize=(9, 1.2 + 0.3 * sum(map(len, panels))), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[len(rows) for rows in panels])[:, 0]
    for axis, stream, rows in zip(axes, streams, panels, strict=True):
        _bars(axis, rows)
        inputs = f"stacks of {result['config']['L']} flow fields" if stream == "temporal" else "RGB frames"
        axis.set_title(f"{stream}: {inputs} of {result['config']['crop_px']} px, float32", loc="left", fontsize=10)
    axes[-1].set_xlabel("samples per second: median of the rounds, slowest and fastest round; hatched: ceilings")
    machine, config = result["machine"], result["config"]
    where = f"GPU {', '.join(machine['gpus'])}" if config["device"] == "cuda" else "CPU"
    figure.suptitle(
        f"Loader throughput, batches of {config['batch_size']} on the {where}, {config['cores']} cores of "
        f"{machine['cpu']}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    return figure


def _bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    rates = [row["samples_per_s"] for row in rows]
    usual = [rate["max"] for row, rate in zip(rows, rates, strict=True) if not row["name"].startswith("ceiling")]
    limit = 1.25 * min(2 * max(usual, default=float("inf")), max(rate["max"] for rate in rates))
    for place, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        name, is_ceiling = row["name"], row["name"].startswith("ceiling")
        color = OURS if name.startswith("ours") else CEILINGS if is_ceiling else PEERS
        axis.barh(
            place,
            rate["median"],
            color=REFERENCE if name == "reference" else color,
            edgecolor="#808080" if is_ceiling else "none",
            hatch="////" if is_ceiling else None,
            height=0.72,
        )
        whisker = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
        axis.errorbar(rate["median"], place, xerr=whisker, color="black", capsize=2.5, linewidth=1)
        cut = rate["max"] > 0.88 * limit
        axis.text(
            0.992 * limit if cut else rate["max"] + 0.008 * limit,
            place,
            f"{rate['median']:,.0f}" + (" →" if rate["median"] > limit else ""),
            va="center",
            ha="right" if cut else "left",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5} if cut else None,
        )
    axis.set_yticks(range(len(rows)), [f"{row['name']}{f' ({s})' if (s := row['setting']) else ''}" for row in rows])
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.set(xlim=(0, limit), ylim=(len(rows) - 0.4, -0.6))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.spines[["top", "right", "left"]].set_visible(False)


def scaling_chart(result: dict[str, Any]) -> Figure:
    """Speed-up against n, measured and projected, beside the ideal and the paper's."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    projected = [row for row in result["projection"] if row["gradient_compression"] == "none"]
    most = max(row["n"] for row in projected + result["rows"])
    axes.plot([1, most], [1, most], color="0.7", label="ideal")
    for data, color in (("resident", "tab:blue"), ("loader", "tab:orange")):
        rows = [row for row in projected if row["data"] == data]
        label = f"projection (not measured), {data}"
        axes.plot([r["n"] for r in rows], [r["speedup"] for r in rows], "--", color=color, alpha=0.6, label=label)
        for mode, marker in (("strong", "o"), ("weak", "^")):
            rows = [row for row in result["rows"] if (row["mode"], row["data"]) == (mode, data)]
            points = [row["n"] for row in rows], [row["speedup"] for row in rows]
            axes.plot(*points, marker, color=color, label=f"measured, {mode} scaling, {data}")
    axes.plot(*PAPER, "k*", markersize=11, label="the paper, 4 Titan GPUs: 3.2")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.set_xlabel(f"devices; one is {result['device']}")
    axes.set_ylabel("speed-up")
    axes.set_title(f"Global batch {result['config']['train.batch_size']}, divided (strong) or each (weak)")
    axes.legend(fontsize="small", loc="upper left")
    axes.grid(alpha=0.3)
    return figure


def scale_chart(result: dict[str, Any]) -> Figure:
    """Simulated speed-up of extraction and of training input against the number of nodes, a panel each."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, lines, title in (
        (left, _scale_lines(result["extraction"], _extraction_name), "extraction"),
        (right, _scale_lines(result["training"], _training_name), "training input"),
    ):
        most = max(row["nodes"] for line in lines.values() for row in line)
        axes.plot([1, most], [1, most], color="0.7", label="ideal")
        for name, line in lines.items():
            axes.plot([row["nodes"] for row in line], [row["speedup"] for row in line], ".-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.set_xlabel("nodes")
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(fontsize="x-small", loc="upper left")
        axes.grid(alpha=0.3)
    left.set_ylabel("speed-up to one node")
    figure.suptitle("Simulated, not measured on more than one machine", x=0.01, ha="left", fontsize=11)
    return figure


def _scale_lines(rows: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    """Name of a line -> its rows; those without a name are not drawn."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if called := name(row):
            lines.setdefault(called, []).append(row)
    return lines


def _extraction_name(row: dict[str, Any]) -> str:
    ways = {"driver": "", "shared": ", a file system for all"}
    return f"{row['method']}, {row['set']}{ways[row['through']]}" if row["set"] in ("ucf101", "kinetics700") else ""


def _training_name(row: dict[str, Any]) -> str:
    more = (", bfloat16" if row["compression"] == "bfloat16" else "") + (f", k = {row['k']}" if row["k"] > 1 else "")
    return f"{row['kind']}, {row['scaling']}, {row['card_gbit']:.0f} Gbit/s{more}"


CHARTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "loader_throughput": throughput_chart,
    "scaling": scaling_chart,
    "scale_model": scale_chart,
}


def draw_chart(name: str, path: Path) -> Path:
    """Draw the chart of a result beside it. name: of the chart, a key of CHARTS; path: the result's JSON."""
    drawn = path.with_suffix(".png")
    CHARTS[name](json.loads(path.read_text())).savefig(drawn, dpi=150)
    return drawn


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    Parser(description="Draw the documents' charts from benchmarks/results.").parse_args(argv)
    for name in CHARTS:
        if (RESULTS / f"{name}.json").exists():
            print(f"drew {draw_chart(name, RESULTS / f'{name}.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
