"""One video becomes one fragment: the tar members of its clips, in a file of their own. The work of a pack's process.

    frames     0     1     2    ...   63 |  64   ...        a clip holds 64 frames
    forward    d_0   d_1   d_2   ...  d_63 | d_64   ...        d_t needs frame t+1: a clip is written at the next one's
    backward         b_1   b_2   ...  b_63 | b_64   ...        first frame; b_t stands with frame t

The video is streamed; in memory are the frames and fields of a few batches, and the encoded members of one clip. Where
the flow method runs on a GPU, a thread reads and computes the next batch while this one is encoded: cores are left for
it. On the CPU the thread would only take time from the other processes.
"""

import os
import secrets
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from flow.camera import CameraError, estimate_camera, subtract_camera
from flow.codec import Codec, check_rgb, coding_error, encode_component, encode_rgb
from flow.extract import Field, FlowMethod, Grey, flow_method
from flow.overlap import ahead
from flow.pool import worker_number
from flow.shard import CLIP_FRAMES, Clip, Member, write_clip
from flow.video import Frame, import_cv2, read_frames, to_grey


@dataclass(frozen=True)
class Recipe:
    """How a video becomes frames and fields, and these JPEGs.

    size_px: smaller side of the frames. method: of flow; None computes no fields. parameters: of it, in the place of
    its defaults. camera: subtract its motion. backward: also fields from each frame to the one before. num_gpus: the
    method runs on one of so many, every process's own, or on the CPU for 0.
    """

    size_px: int
    method: str | None
    codec: Codec
    parameters: Mapping[str, Any] = field(default_factory=dict)
    camera: bool = False
    backward: bool = False
    num_gpus: int = 0


@dataclass(frozen=True)
class FragmentTask:
    """A video, where its fragment goes, and how it is made."""

    path: Path
    video_id: str
    class_name: str
    class_id: int | None
    fragment: Path
    recipe: Recipe

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What is read for it."""
        return (self.path,)


@dataclass
class Totals:
    """What was packed. Of one video, or by `add` of many.

    num_uncompensated: fields that were left as they are, since the camera's motion could not be told.
    float32_bytes: of the fields before encoding. error_sum_px: sum of |decoded - extracted| over error_count values.
    """

    num_videos: int = 0
    num_frames: int = 0
    num_fields: int = 0
    num_uncompensated: int = 0
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
    """What became of a run of items: totals, and the reasons why some cannot be packed: item id -> reason.

    failure: why there is no fragment, if its process failed, and not an item.
    """

    totals: Totals = field(default_factory=Totals)
    bad: dict[str, str] = field(default_factory=dict)
    failure: str = ""


@contextmanager
def fragment_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name when it is written; after an error there is none."""
    # Of this attempt: another one, of this machine or one given up for dead, may still be at the same items.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def encode_frame(frame: npt.NDArray[np.uint8], quality: int | None) -> bytes:
    """JPEG of an RGB frame (H, W, 3) uint8, decoded once as proof. Raises ValueError if it does not survive that."""
    jpeg = encode_rgb(frame, quality)
    check_rgb(jpeg, *frame.shape[:2])
    return jpeg


def reason(error: Exception) -> str:
    """An error as one line of a report."""
    return " ".join(str(error).split())


def write_fragment(task: FragmentTask) -> FragmentReport:
    """Pack one video into `task.fragment`. An unusable video leaves no file and is reported, not raised."""
    start = time.perf_counter()
    try:
        with fragment_file(task.fragment) as file:
            frames = read_frames(task.path, task.recipe.size_px)
            totals = write_frames(frames, task.recipe, task.video_id, task.class_name, task.class_id, file)
    except (ValueError, import_cv2().error) as error:
        return FragmentReport(bad={task.video_id: reason(error)})
    except Exception as error:
        error.add_note(f"while packing {task.path}")
        raise
    totals.video_s = time.perf_counter() - start
    return FragmentReport(totals)


def write_frames(
    frames: Iterator[Frame], recipe: Recipe, video_id: str, class_name: str, class_id: int | None, file: BinaryIO
) -> Totals:
    """Append the members of a video given by its frames (H, W, 3) uint8, one at least, to a fragment."""
    return _FragmentWriter(frames, recipe, (video_id, class_name, class_id), file).run()


def read_steps(frames: Iterator[Frame], recipe: Recipe) -> Iterator["Step"]:
    """Frames of a video with the fields between them, as a pack with this recipe has them before it encodes them."""
    return chain.from_iterable(_StepReader(frames, recipe, Totals()).batches())


class Step(NamedTuple):
    """A frame (H, W, 3), and the fields (2, H, W) px/frame between it and the one before, d_{t-1} and b_t, if any."""

    frame: Frame
    forward: Field | None
    backward: Field | None


class _StepReader:
    """What a thread may do: reading and flow."""

    def __init__(self, frames: Iterator[Frame], recipe: Recipe, totals: Totals) -> None:
        self._frames, self._recipe, self._totals = frames, recipe, totals

    def batches(self) -> Generator[list[Step], None, None]:
        """All steps of the video, as many at a time as the method takes best."""
        if self._recipe.method is None:
            yield from ([Step(frame, None, None)] for frame in self._frames)
            return
        num_gpus = self._recipe.num_gpus
        device = f"cuda:{worker_number() % num_gpus}" if num_gpus else "cpu"
        method = flow_method(self._recipe.method, device, self._recipe.parameters)
        frames: list[Frame] = []
        greys: list[Grey] = []
        for frame in self._frames:
            frames.append(frame)
            greys.append(to_grey(frame))
            if len(greys) > method.pairs_at_once(greys[0].size):
                yield self._steps(method, frames, greys)
                frames, greys = [], greys[-1:]
        if frames:
            yield self._steps(method, frames, greys)

    def _steps(self, method: FlowMethod, frames: list[Frame], greys: list[Grey]) -> list[Step]:
        """Steps of consecutive frames. greys: theirs, after that of the frame before them, if there is one."""
        if len(greys) < 2:
            return [Step(frames[0], None, None)]
        forward = self._fields(method, greys[:-1], greys[1:])
        backward = self._fields(method, greys[1:], greys[:-1]) if self._recipe.backward else [None] * len(forward)
        steps = list(map(Step, frames[-len(forward) :], forward, backward))
        return steps if len(steps) == len(frames) else [Step(frames[0], None, None), *steps]

    def _fields(self, method: FlowMethod, grey0: list[Grey], grey1: list[Grey]) -> list[Field]:
        start = time.perf_counter()
        fields = method.batch(np.stack(grey0), np.stack(grey1))
        self._totals.flow_s += time.perf_counter() - start
        if self._recipe.camera:
            return [self._less_camera(grey, field) for grey, field in zip(grey0, fields, strict=True)]
        return list(fields)

    def _less_camera(self, grey: Grey, field: Field) -> Field:
        try:
            return subtract_camera(field, estimate_camera(grey, field))
        except CameraError:
            self._totals.num_uncompensated += 1
            return field


class _FragmentWriter:
    """Encoding and writing. State of one video on its way: the open clip, and the totals so far."""

    def __init__(
        self, frames: Iterator[Frame], recipe: Recipe, video: tuple[str, str, int | None], file: BinaryIO
    ) -> None:
        self._recipe, self._video, self._file = recipe, video, file
        self._totals = Totals(num_videos=1)
        self._reader = _StepReader(frames, recipe, self._totals)
        self._clip: dict[str, dict[int, Member]] = {}
        self._size = (0, 0)

    def run(self) -> Totals:
        batches = self._reader.batches()
        with closing(ahead(batches) if self._recipe.num_gpus else batches) as stream:
            for t, step in enumerate(chain.from_iterable(stream)):
                self._add_step(t, step)
        self._write_clip(is_last=True)
        return self._totals

    def _add_step(self, t: int, step: Step) -> None:
        if step.forward is not None:
            self._add_field(("dx", "dy"), t - 1, step.forward)
            if t % CLIP_FRAMES == 0:
                self._write_clip(is_last=False)
        if step.backward is not None:
            self._add_field(("bdx", "bdy"), t, step.backward)
        jpeg = encode_frame(step.frame, self._recipe.codec.quality)
        self._clip.setdefault("rgb", {})[t] = Member(jpeg)
        self._size = step.frame.shape[:2]
        self._totals.num_frames += 1
        self._totals.rgb_bytes += len(jpeg)

    def _add_field(self, kinds: tuple[str, str], t: int, field: Field) -> None:
        for kind, component in zip(kinds, field, strict=True):
            coded = encode_component(component, self._recipe.codec)
            # Decoded at once: it proves the member, and tells what the coding costs.
            error_sum, error_max = coding_error(component, coded)
            mean = float(component.mean(dtype=np.float64))
            self._clip.setdefault(kind, {})[t] = Member(coded.jpeg, coded.lo, coded.hi, mean)
            self._totals.flow_bytes += len(coded.jpeg)
            self._totals.float32_bytes += component.nbytes
            self._totals.error_sum_px += error_sum
            self._totals.error_max_px = max(self._totals.error_max_px, error_max)
            self._totals.error_count += component.size
        self._totals.num_fields += 1

    def _write_clip(self, is_last: bool) -> None:
        frames = self._clip["rgb"]
        video_id, class_name, class_id = self._video
        clip = Clip(
            video_id=video_id,
            class_name=class_name,
            class_id=class_id,
            first_frame=min(frames),
            num_frames=len(frames),
            is_last=is_last,
            height=self._size[0],
            width=self._size[1],
            members=self._clip,
        )
        write_clip(self._file, clip)
        self._clip = {}
