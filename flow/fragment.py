"""One video becomes one fragment: the tar members of its clips, in a file of their own. The work of a pack's process.

    frames     0     1     2    ...   63 |  64   ...        a clip holds 64 frames
    forward    d_0   d_1   d_2   ...  d_63 | d_64   ...        d_t needs frame t+1: a clip is written at the next one's
    backward         b_1   b_2   ...  b_63 | b_64   ...        first frame; b_t stands with frame t

The video is streamed; in memory are two frames and the encoded members of one clip.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from flow.codec import Codec, decode_component, decode_rgb, encode_component, encode_rgb
from flow.extract import FlowMethod, flow_method
from flow.shard import CLIP_FRAMES, Clip, Member, write_clip
from flow.video import import_cv2, read_frames, to_grey


@dataclass(frozen=True)
class FragmentTask:
    """A video, and all that its fragment depends on."""

    path: Path
    video_id: str
    class_name: str
    class_id: int | None
    fragment: Path
    size_px: int
    method: str
    backward: bool
    codec: Codec


@dataclass
class Totals:
    """What was packed. Of one video, or by `add` of many.

    float32_bytes: of the fields before encoding. error_sum_px: sum of |decoded - extracted| over error_count values.
    """

    num_videos: int = 0
    num_frames: int = 0
    num_fields: int = 0
    rgb_bytes: int = 0
    flow_bytes: int = 0
    float32_bytes: int = 0
    error_sum_px: float = 0.0
    error_max_px: float = 0.0
    error_count: int = 0
    flow_s: float = 0.0
    video_s: float = 0.0

    def add(self, other: "Totals") -> None:
        for key, value in vars(other).items():
            mine = getattr(self, key)
            setattr(self, key, max(mine, value) if key == "error_max_px" else mine + value)


@dataclass(frozen=True)
class FragmentReport:
    """What became of a run of items: totals, and the reasons why some cannot be packed: item id -> reason."""

    totals: Totals = field(default_factory=Totals)
    bad: dict[str, str] = field(default_factory=dict)


@contextmanager
def fragment_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name when it is written; after an error there is none."""
    # Of this process: another one may still be dying over the same items.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def encode_frame(frame: npt.NDArray[np.uint8], quality: int) -> bytes:
    """JPEG of an RGB frame (H, W, 3) uint8, decoded once as proof. Raises ValueError if it does not survive that."""
    jpeg = encode_rgb(frame, quality)
    if decode_rgb(jpeg).shape != frame.shape:
        raise ValueError(f"an image of shape {frame.shape} does not survive JPEG")
    return jpeg


def reason(error: Exception) -> str:
    """An error as one line of a report."""
    return " ".join(str(error).split())


def write_fragment(task: FragmentTask) -> FragmentReport:
    """Pack one video into `task.fragment`. An unusable video leaves no file and is reported, not raised."""
    start = time.perf_counter()
    try:
        with fragment_file(task.fragment) as file:
            totals = _FragmentWriter(task, file).run()
    except (ValueError, import_cv2().error) as error:
        return FragmentReport(bad={task.video_id: reason(error)})
    except Exception as error:
        error.add_note(f"while packing {task.path}")
        raise
    totals.video_s = time.perf_counter() - start
    return FragmentReport(totals)


class _FragmentWriter:
    """State of one video on its way: the open clip, and the totals so far."""

    def __init__(self, task: FragmentTask, file: BinaryIO) -> None:
        self._task = task
        self._file = file
        self._method: FlowMethod = flow_method(task.method)
        self._totals = Totals(num_videos=1)
        self._clip: dict[str, dict[int, Member]] = {}
        self._size = (0, 0)

    def run(self) -> Totals:
        previous: npt.NDArray[np.uint8] | None = None
        for t, frame in enumerate(read_frames(self._task.path, self._task.size_px)):
            grey = to_grey(frame)
            if previous is None:
                self._size = grey.shape
            else:
                self._add_field(("dx", "dy"), t - 1, previous, grey)
                if t % CLIP_FRAMES == 0:
                    self._write_clip(is_last=False)
                if self._task.backward:
                    self._add_field(("bdx", "bdy"), t, grey, previous)
            self._add_frame(t, frame)
            previous = grey
        self._write_clip(is_last=True)
        return self._totals

    def _add_frame(self, t: int, frame: npt.NDArray[np.uint8]) -> None:
        jpeg = encode_frame(frame, self._task.codec.quality)
        self._clip.setdefault("rgb", {})[t] = Member(jpeg)
        self._totals.num_frames += 1
        self._totals.rgb_bytes += len(jpeg)

    def _add_field(
        self, kinds: tuple[str, str], t: int, grey0: npt.NDArray[np.uint8], grey1: npt.NDArray[np.uint8]
    ) -> None:
        start = time.perf_counter()
        field = self._method(grey0, grey1)
        self._totals.flow_s += time.perf_counter() - start
        for kind, component in zip(kinds, field, strict=True):
            coded = encode_component(component, self._task.codec)
            # Decoded at once: it proves the member, and tells what the coding costs.
            error = np.abs(decode_component(coded.jpeg, coded.lo, coded.hi) - component)
            mean = float(component.mean(dtype=np.float64))
            self._clip.setdefault(kind, {})[t] = Member(coded.jpeg, coded.lo, coded.hi, mean)
            self._totals.flow_bytes += len(coded.jpeg)
            self._totals.float32_bytes += component.nbytes
            self._totals.error_sum_px += float(error.sum(dtype=np.float64))
            self._totals.error_max_px = max(self._totals.error_max_px, float(error.max()))
            self._totals.error_count += error.size
        self._totals.num_fields += 1

    def _write_clip(self, is_last: bool) -> None:
        frames = self._clip["rgb"]
        clip = Clip(
            video_id=self._task.video_id,
            class_name=self._task.class_name,
            class_id=self._task.class_id,
            first_frame=min(frames),
            num_frames=len(frames),
            is_last=is_last,
            height=self._size[0],
            width=self._size[1],
            members=self._clip,
        )
        write_clip(self._file, clip)
        self._clip = {}
