"""Draws charts of the results: `python benchmarks/charts.py` writes benchmarks/results/NAME.png for every NAME.json
of which it knows how, and which is there."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
OURS, PEERS, REFERENCE, CEILINGS = "#c0392b", "#5d7289", "#a9b6c2", "#ffffff"


def throughput_chart(result: dict[str, Any]) -> Figure:
    """Samples/s of every row, a panel a stream; the line spans the slowest and the fastest round.

    Bars of ceilings far above everything else are cut off at the frame, with their value beside it.
    """
    streams = list(dict.fromkeys(row["stream"] for row in result["rows"]))
    panels = [[row for row in result["rows"] if row["stream"] == stream] for stream in streams]
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


CHARTS: dict[str, Callable[[dict[str, Any]], Figure]] = {"loader_throughput": throughput_chart}


def draw_charts(folder: Path = RESULTS) -> list[Path]:
    """Draw every chart whose JSON is in the folder, beside it."""
    drawn = []
    for name, chart in CHARTS.items():
        if (folder / f"{name}.json").exists():
            figure = chart(json.loads((folder / f"{name}.json").read_text()))
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=150)
    return drawn


if __name__ == "__main__":
    sys.stdout.writelines(f"drew {path}\n" for path in draw_charts())
