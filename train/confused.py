"""The test videos that a run confuses worst, with a look at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flow.codec import encode_rgb
from flow.colors import flow_colors
from flow.page import Block, Columns, Grid, Picture, Text
from flow.untrusted import printable
from flow.video import resize
from loaders.index import Index
from train.flow_figures import read_fields, read_frames
from train.results import Results
from train.sets import open_set
from train.settings import Config

#: Smaller side of a thumbnail.
SIDE_PX = 160
_QUALITY = 80
_LINE_GREY = 200


@dataclass(frozen=True)
class Confused:
    """A test video that was taken for another class, and the scores of both."""

    video_id: str
    true: str
    predicted: str
    true_score: float
    score: float

    @property
    def said(self) -> str:
        return f"{self.true} ({self.true_score:.2f}) taken for {self.predicted} ({self.score:.2f})"


def worst_confused(results: Results, method: str, num: int = 12) -> list[Confused]:
    """The misclassified videos whose predicted class is furthest above the true one, by their scores, worst first."""
    scores, predicted = results.scores[method], results.predicted[method]
    rows = np.arange(len(scores))
    margin = scores[rows, predicted] - scores[rows, results.labels]
    wrong = np.flatnonzero(predicted != results.labels)
    names = [printable(name) for name in results.classes]
    return [
        Confused(
            video_id=results.video_ids[v],
            true=names[results.labels[v]],
            predicted=names[predicted[v]],
            true_score=float(scores[v, results.labels[v]]),
            score=float(scores[v, predicted[v]]),
        )
        for v in wrong[np.argsort(-margin[wrong], kind="stable")][:num]
    ]


def show_confused(videos: Sequence[Confused], config: Config, fingerprint: str) -> list[Block]:
    """Pictures of the videos, from the run's packed set if it is the one of this fingerprint; else a table."""
    try:
        index = open_set(config)
        if index.fingerprint != fingerprint:
            raise ValueError(
                f"{index.location} holds another packed set, {index.fingerprint}, than the run's, {fingerprint}."
            )
    except (ValueError, OSError) as error:
        rows = [[v.true, f"{v.true_score:.2f}", v.predicted, f"{v.score:.2f}", printable(v.video_id)] for v in videos]
        return [
            Grid(["true class", "score", "taken for", "score", "video"], rows),
            Text(f"Without pictures, for the packed data set is not at hand: {printable(error, 600)}"),
        ]
    side_px = int(min(index.heights.min(), index.widths.min()))
    max_px = max(1, round(side_px / 64))
    has_flow = "dx" in index.entries
    colours = (
        f" and the flow from it to the next, as colour: hue is direction, white no motion, full colour {max_px} "
        "px/frame; what is faster is darkened"
    )
    return [
        Text(f"Each with its middle frame{colours if has_flow else ''}."),
        Columns([_show(video, index, max_px) for video in videos]),
    ]


def _show(video: Confused, index: Index, max_px: float) -> Block:
    caption = f"{video.said}: {printable(video.video_id)}"
    try:
        return Picture(thumbnail(index, video.video_id, max_px), "image/jpeg", caption)
    except (ValueError, OSError) as error:  # a damaged shard, say
        return Text(f"{caption}. Not shown: {printable(error, 600)}")


def thumbnail(index: Index, video_id: str, max_px: float) -> bytes:
    """JPEG of a video's middle frame and, beside it, of its colour-coded flow, if it has any.

    Raises ValueError if the set lacks the video or a member is damaged, OSError if a shard cannot be read.
    """
    (row,) = index.rows([video_id])
    num_fields = int(index.num_frames[row]) - 1
    t = num_fields // 2
    images = [resize(read_frames(index, row, t, 1)[0], SIDE_PX)]
    if num_fields and "dx" in index.entries:
        colors = flow_colors(read_fields(index, row, t, 1)[0], max_px)
        images.append(resize((255 * colors).astype(np.uint8), SIDE_PX))
    # A grey line around each, for flow is often as white as the page.
    framed = [np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=_LINE_GREY) for image in images]
    return encode_rgb(np.concatenate(framed, axis=1), _QUALITY)
