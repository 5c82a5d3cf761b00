"""Class scores of videos, keyed by video id: what evaluation writes and fusion reads."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flow.command import nearest_path
from flow.shard import write_bytes
from flow.untrusted import open_regular


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


#: What a file of anything may come to.
_WRONG = (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, RuntimeError, MemoryError)


def read_scores(path: Path) -> Scores:
    """Raises FileNotFoundError if there is no such file, ValueError if it is not one of `write_scores`."""
    if not path.is_file():
        what = "run `python -m train.evaluate RUN` on its run first."
        raise FileNotFoundError(f"no scores at {path}: {what}{nearest_path(path.parent)}")
    try:
        with open_regular(path) as file:
            content = _read_npz(file)
        values: dict[str, Any] = {name: v.item() if v.ndim == 0 else v for name, v in content.items()}
        scores = Scores(**values)
        _check(scores)
    except (*_WRONG, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no score file ({error!r:.300}); delete it and evaluate again.") from error
    return scores


def _read_npz(file: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    """The arrays of Scores in a .npz file as `np.savez` writes it: no pickle, and nothing that is larger than the file,
    which neither a compressed member nor a header that claims another shape could promise. Raises what it comes to.
    """
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for part in fields(Scores):
            info = archive.getinfo(f"{part.name}.npy")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"{info.filename} is compressed")
            with archive.open(info) as member:
                content = io.BytesIO(member.read())
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError(f"{info.filename} is of another version than 1.0")
            shape, by_column, dtype = _read_header(content)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != content.getbuffer().nbytes - content.tell():
                raise ValueError(f"{info.filename} claims shape {shape} of {dtype}, which its bytes are not")
            flat = np.frombuffer(content.getbuffer(), dtype, offset=content.tell())
            arrays[part.name] = flat.reshape(shape, order="F" if by_column else "C")
    return arrays


def _read_header(content: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array. Numpy reads the header as a Python literal, whatever that brings to light."""
    try:
        return np.lib.format.read_array_header_1_0(content)
    except Exception as error:
        raise ValueError(f"an array's header is none: {error!r:.200}") from error


def _check(scores: Scores) -> None:
    """Raise ValueError, or what else comes of it, unless scores are what the docstring of Scores says."""
    num_videos, num_classes = scores.scores.shape
    kinds = {"video_ids": "U", "labels": "i", "scores": "f", "num_views": "i", "classes": "U"}
    shapes = {"classes": (num_classes,), "scores": (num_videos, num_classes)}
    for name, kind in kinds.items():
        array = getattr(scores, name)
        if array.dtype.kind != kind or array.shape != shapes.get(name, (num_videos,)):
            raise ValueError(f"{name} are {array.dtype} of shape {array.shape}")
    for name in ("stream", "split_list", "dataset", "checkpoint"):
        if not isinstance(getattr(scores, name), str):
            raise ValueError(f"{name} is no text")
    if not (np.isfinite(scores.scores).all() and (scores.scores >= 0).all()):
        raise ValueError("a score is negative or not finite")
    if not (np.abs(scores.scores.sum(1) - 1) < 1e-3).all():
        raise ValueError("the scores of a video do not sum to 1")
    if not (num_classes and (scores.labels >= 0).all() and (scores.labels < num_classes).all()):
        raise ValueError(f"a label lies outside the {num_classes} classes")


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
