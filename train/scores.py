"""Class scores of videos, keyed by video id: what evaluation writes and fusion reads."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.shard import write_bytes


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one stream for the videos of one list.

    video_ids   (V,) str             labels     (V,) int64, position in classes
    scores      (V, K) float64       mean softmax over the views, rows sum to 1
    num_views   (V,) int64           views that each row is the mean of
    classes     (K,) str             stream     "spatial" or "temporal"
    split_list  "split1_test"        dataset    fingerprint of the packed data set
    checkpoint  SHA-256 of the checkpoint that scored
    """

    video_ids: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    num_views: npt.NDArray[np.int64]
    classes: npt.NDArray[np.str_]
    stream: str
    split_list: str
    dataset: str
    checkpoint: str


def write_scores(scores: Scores, path: Path) -> None:
    """Store as .npz without pickled objects, atomically."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {part.name: np.asarray(getattr(scores, part.name)) for part in fields(Scores)}
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def score_file(folder: Path, part: str) -> Path:
    """Where a stream's folder keeps the scores of the "test" or "train" list."""
    return folder / f"scores_{part}.npz"


def read_scores(path: Path) -> Scores:
    """Raises FileNotFoundError if there is no such file, ValueError if it is not one of `write_scores`."""
    if not path.is_file():
        raise FileNotFoundError(f"no scores at {path}: run `python -m train.evaluate RUN` on its run first.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {part.name: arrays[part.name] for part in fields(Scores)}
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no score file ({error}); delete it and evaluate again.") from error
    return Scores(**{name: value.item() if value.ndim == 0 else value for name, value in content.items()})


def check_aligned(sources: Mapping[str, Scores]) -> None:
    """Raise ValueError unless all score the same videos, in the same order, of the same packed data set and list."""
    (first, a), *others = sources.items()
    for name, b in others:
        for what in ("dataset", "split_list"):
            if getattr(a, what) != getattr(b, what):
                raise ValueError(
                    f"{first} scores are of {what} {getattr(a, what)}, {name} scores of {getattr(b, what)}; "
                    "only scores of the same videos can be fused."
                )
        if not np.array_equal(a.classes, b.classes):
            raise ValueError(
                f"{first} scores are of {len(a.classes)} classes, {name} scores of {len(b.classes)} others; "
                "only scores of the same classes can be fused."
            )
        if not np.array_equal(a.video_ids, b.video_ids):
            raise ValueError(f"{first} and {name} scores of {a.split_list} name different videos; evaluate again.")
