"""A whole pack, and what it is made of alone: decoding and resizing; and flow. All on the same clips, on all cores."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common  # noqa: F401  (puts the checkout on the path)
import numpy as np

from flow import pack
from flow.extract import flow_method
from flow.pool import run_pool
from flow.video import import_cv2, read_frames, to_grey

PACK_METHOD = "dis"
#: Of the pack's time to that of its larger part, both without the start of their processes.
TARGET = 1.3


def decode_clip(clip: Path, size_px: int) -> int:
    """Number of frames of a clip, decoded, resized and made grey."""
    import_cv2().setNumThreads(1)  # as in a pack
    return sum(1 for frame in read_frames(clip, size_px) if to_grey(frame).size)


def flow_clip(greys: Path) -> int:
    """Number of pairs of a clip, whose flow was computed."""
    frames, method = np.load(greys), flow_method(PACK_METHOD)
    return sum(1 for pair in zip(frames[:-1], frames[1:], strict=True) if method(*pair).size)


def do_nothing(_: Path) -> int:
    return 0


class PackParts:
    """A pack of some clips and its parts, each timed as a whole with one process per core."""

    def __init__(self, folder: Path, clips: list[Path], size_px: int, cores: int):
        self._folder, self._size_px, self._cores = folder, size_px, cores
        self._packed = folder / "packed"
        self._clips, self._greys = [], []
        self.pairs = 0
        for number, clip in enumerate(clips):
            copy = folder / "clips" / clip.parent.name / clip.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, copy)
            frames = np.stack([to_grey(frame) for frame in read_frames(clip, size_px)])
            self._clips.append(copy)
            self._greys.append(folder / f"greys{number}.npy")
            np.save(self._greys[-1], frames)
            self.pairs += len(frames) - 1

    def measure(self) -> dict[str, float]:
        """Seconds of the pack, of its parts alone, and of starting and ending the processes."""
        shutil.rmtree(self._packed, ignore_errors=True)  # of the round before
        return {
            "startup_s": self._time(lambda: self._all(do_nothing, self._clips)),
            "decode_resize_s": self._time(lambda: self._all(partial(decode_clip, size_px=self._size_px), self._clips)),
            "flow_s": self._time(lambda: self._all(flow_clip, self._greys)),
            "pack_s": self._time(self._pack),
        }

    def _all(self, function: Callable[[Path], int], paths: list[Path]) -> None:
        if any(result is None for _, result in run_pool(function, paths, self._cores)):
            raise RuntimeError("a process died")

    def _pack(self) -> None:
        options = {"method": PACK_METHOD, "size_px": self._size_px, "num_workers": self._cores, "dataset": "folder"}
        pack.pack(self._folder / "clips", self._packed, **options)

    @staticmethod
    def _time(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def pack_row(rounds: list[dict[str, float]], pairs: int) -> dict[str, Any]:
    """Medians over the rounds, and the pack's time to that of its larger part. `whole_ratio`: as they were measured.
    `ratio`, which is held to the target: both less the start of the processes, so that the number of clips does not
    matter; None where the parts take no longer than that.
    """
    row: dict[str, Any] = {key: median(times[key] for times in rounds) for key in rounds[0]}
    row["whole_ratio"], row["ratio"], met = spread([_ratio(times, 0.0) for times in rounds]), None, None
    if all(max(times["decode_resize_s"], times["flow_s"]) > times["startup_s"] for times in rounds):
        row["ratio"] = spread([_ratio(times, times["startup_s"]) for times in rounds])
        met = row["ratio"]["median"] <= TARGET
    return {"method": PACK_METHOD, "pairs": pairs, **row, "target": TARGET, "met": met}


def _ratio(times: dict[str, float], startup_s: float) -> float:
    return (times["pack_s"] - startup_s) / (max(times["decode_resize_s"], times["flow_s"]) - startup_s)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": median(values), "min": min(values), "max": max(values)}
