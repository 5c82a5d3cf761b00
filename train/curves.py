"""The curves of a run's logs, as charts that stay legible on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flow.canvas import new_figure, to_svg
from flow.page import Block, Columns, Picture, Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More log lines than this are drawn as means over neighbouring ones.
MAX_POINTS = 300

COLORS = {"spatial": "tab:blue", "temporal": "tab:orange"}

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A value of the log lines over the steps. top: of the axis, None for that of the values.

    is_rate: a learning rate, which changes in steps and by factors.
    """

    key: str
    title: str
    top: float | None = None
    is_rate: bool = False


CHARTS = (
    Chart("loss", "Loss of the training batch"),
    Chart("accuracy_pct", "Accuracy on the training batch, %", top=100),
    Chart("lr", "Learning rate", is_rate=True),
    Chart("samples_per_s", "Throughput, samples/s"),
    Chart("data_wait_pct", "Time spent waiting for data, %"),
)


def draw_curves(logs: Mapping[str, Log]) -> list[Block]:
    """A chart for each of CHARTS with a curve for each stream; a sentence where nothing is known of one.

    logs: stream -> the records of its log. Values that are no finite numbers are passed over.
    """
    blocks: list[Block] = []
    most = 1
    for chart in CHARTS:
        curves = {stream: curve for stream, log in logs.items() if (curve := points(log, chart.key))}
        if not curves:
            blocks.append(Text(f"{chart.title}: no line of the logs has `{chart.key}`, which older releases left out."))
            continue
        most = max(most, *(per_point for _, _, per_point in curves.values()))
        blocks.append(Picture(to_svg(_draw(chart, curves)), "image/svg+xml", chart.title))
    means = [Text(f"Each point is the mean over up to {most} lines of the log.")] if most > 1 else []
    return [*means, Columns(blocks)]


def points(log: Log, key: str) -> tuple[list[float], list[float], int] | None:
    """Steps and values of a curve of at most MAX_POINTS points, and how many log lines one is the mean of; None if no
    line has the key.
    """
    pairs = [(record["step"], record[key]) for record in log if _is_number(record.get(key))]
    if not pairs:
        return None
    per_point = math.ceil(len(pairs) / MAX_POINTS)
    groups = [pairs[start : start + per_point] for start in range(0, len(pairs), per_point)]
    # A rate is changed and not blended: of a group of learning rates the last one counts.
    values = [group[-1][1] if key == "lr" else float(np.mean([value for _, value in group])) for group in groups]
    return [float(np.mean([step for step, _ in group])) for group in groups], values, per_point


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not


def _draw(chart: Chart, curves: Mapping[str, tuple[list[float], list[float], int]]) -> Figure:
    figure = new_figure(4.2, 2.6, layout="constrained")
    axes = figure.subplots()
    for stream, (steps, values, _) in curves.items():
        marker = "o" if len(steps) == 1 else None  # a line of one point would not be seen
        style = "steps-pre" if chart.is_rate else "default"
        axes.plot(steps, values, marker=marker, drawstyle=style, linewidth=1.3, color=COLORS.get(stream), label=stream)
    if chart.is_rate:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, chart.top or 1.05 * max(1e-9, *(max(values) for _, values, _ in curves.values())))
    axes.set_xlim(left=0)
    axes.set_xlabel("step", fontsize=9)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return figure
