"""Scores over the time of a video: as lines of text, as a figure, and drawn below the video itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flow.canvas import new_figure, save_png
from flow.render import Bars, render
from flow.video import read_frames
from train.predictor import Predictor, Timeline, main_method, progress

#: Classes that have a line of their own in the figure.
MAX_LINES = 8
RUNNING_TOP = 3


def spans(timeline: Timeline) -> list[tuple[float, float, str, float]]:
    """Stretches of time with one best class: (start and end in s, class, mean of its scores), one after the other.

    A window stands for the time from halfway to the one before to halfway to the next.
    """
    scores = timeline.scores[main_method(timeline.scores)]
    best = scores.argmax(1)
    begins = np.flatnonzero(np.diff(best, prepend=-1))
    ends = [*begins[1:], len(best)]
    last = timeline.num_frames / timeline.fps
    return [
        (
            begin * timeline.every / timeline.fps,
            last if end == len(best) else end * timeline.every / timeline.fps,
            timeline.classes[best[begin]],
            float(scores[begin:end, best[begin]].mean()),
        )
        for begin, end in zip(begins.tolist(), map(int, ends), strict=True)
    ]


def draw_timeline(timeline: Timeline, path: Path) -> Path:
    """Scores of the classes that are best at some time, over time. Returns the path of the PNG."""
    scores = timeline.scores[main_method(timeline.scores)]
    best = np.bincount(scores.argmax(1), minlength=scores.shape[1])
    order = np.lexsort((-scores.max(0), -best))  # best for the longest time; of equals, the highest score
    shown = [k for k in order[:MAX_LINES] if best[k]]
    figure = new_figure(min(16.0, max(6.0, 4 + len(scores) / 40)), 3.2, layout="constrained")
    axes = figure.subplots()
    for k in shown:
        axes.plot(timeline.times_s, scores[:, k], label=timeline.classes[k], marker="." if len(scores) < 60 else "")
    left_out = int((best > 0).sum()) - len(shown)
    title = f"{timeline.video.name}{f'; {left_out} more classes are best at some time' if left_out else ''}"
    axes.set(xlabel="time, s", ylabel="score", ylim=(0, 1), xlim=(0, timeline.num_frames / timeline.fps))
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in figure.legend(loc="outside right upper", fontsize=9).get_texts():
        text.set_parse_math(False)
    return save_png(figure, path)


def check_apart(path: Path, videos: Iterable[Path]) -> None:
    """Raise ValueError if a file to be written is one of the videos."""
    for video in videos:
        if path.exists() and video.exists() and path.samefile(video):
            raise ValueError(f"{path} would be written over the video {video}. Give another name.")


def render_timeline(predictor: Predictor, timeline: Timeline, path: Path) -> Path:
    """Write the timeline's video with its flow beside it and the top three of each window below. Returns the path.

    Raises VideoError if the file cannot be written, ValueError if that is the video itself.
    """
    check_apart(path, [timeline.video])
    scores = timeline.scores[main_method(timeline.scores)]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :RUNNING_TOP]

    def bars_at(t: int) -> Bars:
        window = min(t // timeline.every, len(scores) - 1)
        return [(timeline.classes[k], float(scores[window, k])) for k in best[window]]

    frames = read_frames(timeline.video, predictor.recipe.size_px)
    shown = progress(frames, timeline.video, "rendering", timeline.num_frames)
    render(shown, predictor.recipe, bars_at, path, timeline.fps)
    return path
