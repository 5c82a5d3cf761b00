"""What the processes of flow_extraction.py do, over and over: a flow method, or what surrounds it in a pack."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from flow_accuracy import Setting, code, measure, read_pairs
from pack_parts import PACK_METHOD

import cv2  # isort: skip
import numpy as np

from flow.catalog import list_videos
from flow.codec import Codec
from flow.extract import flow_method
from flow.video import read_frames, to_grey


def choose_clips(videos: Path, count: int) -> list[Path]:
    """So many clips of the folder, at equal spacing in the order of their ids."""
    found = [video.path for video in list_videos(videos)]
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)]


def write_pairs(clips: list[Path], size_px: int, path: Path) -> list[int]:
    """Store the first two frames (pairs, 2, H, W, 3) uint8 of clips of the first one's size; (pairs, H, W)."""
    pairs = [np.stack(list(islice(read_frames(clip, size_px), 2))) for clip in clips]
    pairs = [pair for pair in pairs if pair.shape == pairs[0].shape]
    np.save(path, np.stack(pairs))
    return [len(pairs), *pairs[0].shape[1:3]]


def read_greys(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """First and second frames of stored pairs: two arrays (pairs, H, W) uint8."""
    pairs = np.load(path)
    first, second = (np.stack([to_grey(pair[i]) for pair in pairs]) for i in (0, 1))
    return first, second


def flow_work(setting: Setting, device: str, pairs: Path, truth: Path | None, number: int) -> Iterator[Any]:
    """A method on all pairs, in each step equally often: once, or so often that a batch is full. device "cuda" is GPU
    `number`."""
    name, parameters = setting
    method = flow_method(name, f"{device}:{number}" if device == "cuda" else device, parameters)
    grey0, grey1 = read_greys(pairs)
    order = np.tile(np.arange(len(grey0)), -(-method.batch_pairs // len(grey0)))
    batches = [order[at : at + method.batch_pairs] for at in range(0, len(order), method.batch_pairs)]
    fields = method.batch(grey0, grey1) if number == 0 else []
    method.batch(grey0[batches[0]], grey1[batches[0]])
    yield {
        "flow": method.metadata(),
        "batch_pairs": method.batch_pairs,
        "bytes_per_field": float(np.mean([code(field, Codec())[1] for field in fields])) if number == 0 else None,
        "epe_mean_px": measure(method, read_pairs(truth))["epe_mean_px"] if truth and number == 0 else None,
    }
    while True:
        for batch in batches:
            method.batch(grey0[batch], grey1[batch])
        yield len(order)


def decode_work(clips: list[Path], size_px: int, number: int) -> Iterator[Any]:
    """Frames of whole clips as `flow_work` wants them; each process begins with another clip."""
    cv2.setNumThreads(1)  # as in a pack
    yield {}
    while True:
        for clip in clips[number % len(clips) :] + clips[: number % len(clips)]:
            for frame in read_frames(clip, size_px):
                to_grey(frame)
                yield 1


def jpeg_work(pairs: Path, number: int) -> Iterator[Any]:
    """The JPEGs of a pair, from RGB and codes in memory."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, Codec().quality]
    frames, (grey0, grey1) = np.load(pairs)[:, 0], read_greys(pairs)
    fields = flow_method(PACK_METHOD).batch(grey0, grey1)
    codes = [[cv2.normalize(part, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U) for part in field] for field in fields]
    yield {}
    while True:
        for frame, components in zip(frames, codes, strict=True):
            for image in (frame, *components):
                cv2.imencode(".jpg", image, quality)
            yield 1
