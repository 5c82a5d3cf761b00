"""JPEGs that other tools extracted, to shards: `python -m flow.pack --flow-dir DIR --range PX --out OUT`.

Every file becomes a member, byte for byte. Which files are understood is said in `flow.flow_files`, how a pack that was
stopped goes on in `flow.resume`.

Code c of a component means -PX + c * 2 PX / 255, PX being the bound at which the tool clipped: 20 in dense_flow,
gpu_flow and mmaction2, 32 in denseflow unless it was told otherwise. No motion at all lies between two codes: they
round it to 128, half a code too much (0.08 px at 20); mmaction2's own script rounds down, so that all is half a code
too little on average. Subtracting each field's mean takes both away.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flow.catalog import Catalog, Lists, match, read_lists, seeded_shards, split_by_folder
from flow.codec import JPEG_END, Codec, coded_size, decode_component, decode_rgb, max_jpeg_bytes
from flow.devices import make_engine
from flow.flow_files import FlowDir, find_files, list_flow_dirs
from flow.fragment import FragmentReport, Totals, fragment_file, reason
from flow.index import load_index
from flow.publish import open_target
from flow.resume import (
    MISSING_NAME,
    PackReport,
    finish,
    input_digest,
    read_report,
    write_lines,
    write_shards,
)
from flow.shard import CLIP_FRAMES, Clip, Member, write_clip
from flow.untrusted import MAX_FRAME_PX, read_bounded
from flow.video import import_cv2

#: What dataset.json calls a method that nobody named.
EXTERNAL = "external"


@dataclass(frozen=True)
class FlowDirTask:
    """A video, and all that its fragment depends on."""

    video: FlowDir
    class_id: int | None
    fragment: Path
    bound_px: float
    extra_field: str | None

    @property
    def inputs(self) -> list[Path]:
        """What is read for it."""
        return [folder for folder, _ in self.video.places]


def pack_flow_dirs(
    flow_dir: Path,
    out: Path | str,
    codec: Codec,
    *,
    frames_dir: Path | None = None,
    splits: Path | None = None,
    dataset: str | None = None,
    method: str = EXTERNAL,
    extra_field: str | None = None,
    seed: int = 0,
    videos_per_shard: int = 32,
    num_workers: int | None = None,
    work: Path | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> PackReport:
    """Pack folders of JPEGs, or go on with a pack that was stopped.

    codec: of a fixed range, and no quality. frames_dir: the frames' folder, if they do not lie with the fields.
    out, work, splits, dataset: as of `flow.pack.pack`. method: what the metadata call the method. extra_field: see
    `flow.flow_files.find_files`. engine, ray_address: see `flow.devices.make_engine`.

    Raises ValueError if the folders or the lists are unusable, no video could be packed, or `out` holds a pack with
    other settings or of other files. Bad videos are left out and reported.
    """
    if codec.bound_px is None:
        raise ValueError(
            "range 'per-field': JPEGs of other tools do not tell the range of each field, which they have in common. "
            "Give the bound in px at which the tool clipped, such as --range 20."
        )
    if videos_per_shard < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(f"videos_per_shard={videos_per_shard}, num_workers={num_workers}: expected at least 1 and 1.")
    name, lists = read_lists(splits, dataset)
    videos = list_flow_dirs(flow_dir, frames_dir, lists)
    catalog = match(name, flow_dir, videos, lists or Lists(splits=split_by_folder(videos, seed)))
    problems = {video.video_id for video in videos if video.problem}
    settings: dict[str, Any] = {
        "name": catalog.name,
        "flow": {"method": method, "parameters": {}, "library": None, "version": None, "camera": None},
        "codec": codec.metadata(),
        "size_px": None,
        "backward": False,
        "extra_field": extra_field,
        "seed": seed,
        "videos_per_shard": videos_per_shard,
        "input_sha256": input_digest([[v.video_id, v.listing] for v in videos], catalog.splits),
    }
    with make_engine(engine, None, num_workers, None, ray_address) as processes, open_target(out, work) as target:
        was_complete = target.begin(settings)
        if not was_complete:
            shards = seeded_shards(videos, videos_per_shard, seed)
            make_task = partial(_task, catalog.official_ids, codec.bound_px, extra_field)
            write_shards(shards, target, make_task, write_flow_dir, items_per_task=1, engine=processes, unit="video")
            write_lines(target.folder / MISSING_NAME, catalog.missing)
            summarise = partial(_summary, target.folder, catalog)
            finish(target, len(shards), settings, catalog.splits, summarise, unit="video")
        target.end()
    unlisted = [video_id for video_id in catalog.unlisted if video_id not in problems]
    return read_report(target, missing=catalog.missing, unlisted=unlisted, was_complete=was_complete)


def _task(
    official_ids: dict[str, int], bound_px: float, extra_field: str | None, fragment: Path, videos: Sequence[FlowDir]
) -> FlowDirTask:
    (video,) = videos
    return FlowDirTask(video, official_ids.get(video.class_name), fragment, bound_px, extra_field)


def _summary(out: Path, catalog: Catalog, totals: Totals, num_bytes: int) -> dict[str, int | float]:
    """What was packed. What coding cost nobody knows who lacks the fields before it."""
    videos = load_index(out)[1]["videos"]
    short_px = np.minimum(videos["height"], videos["width"])
    return {
        "videos": totals.num_videos,
        "frames": totals.num_frames,
        "fields": totals.num_fields,
        "bytes": num_bytes,
        "rgb_bytes": totals.rgb_bytes,
        "flow_bytes": totals.flow_bytes,
        "size_px_min": int(short_px.min()),
        "size_px_max": int(short_px.max()),
        "s_per_frame": totals.video_s / totals.num_frames,
        "listed_missing": len(catalog.missing),
    }


def describe_files(dataset: dict[str, Any]) -> list[str]:
    """What a finished pack tells of its files, in lines."""
    figures, bound_px = dataset["summary"], dataset["codec"]["bound_px"]
    low, high = figures["size_px_min"], figures["size_px_max"]
    return [
        f"byte for byte: codes 0..255 are -{bound_px:g}..{bound_px:g} px; flow {figures['flow_bytes'] / 1e6:,.1f} MB",
        f"smaller side {low if low == high else f'{low}..{high}'} px; {figures['s_per_frame'] * 1e3:.1f} ms per frame "
        "on one core",
    ]


# --- work of a process -------------------------------------------------------------------------------------------


def write_flow_dir(task: FlowDirTask) -> FragmentReport:
    """Pack one video into `task.fragment`. An unusable video leaves no file and is reported, not raised."""
    start = time.perf_counter()
    import_cv2().setNumThreads(1)  # the pool runs a process on every core
    try:
        if task.video.problem:
            raise ValueError(task.video.problem)
        with fragment_file(task.fragment) as file, complaints() as heard:
            totals = _write_video(file, task, heard)
    except ValueError as error:
        return FragmentReport(bad={task.video.video_id: reason(error)})
    totals.video_s = time.perf_counter() - start
    return FragmentReport(totals)


def _write_video(file: BinaryIO, task: FlowDirTask, heard: Callable[[], str]) -> Totals:
    files = find_files(task.video.places, task.extra_field)
    reader = _Reader(files.frames[0], task.bound_px, heard)
    height, width = reader.size
    num_frames, totals = len(files.frames), Totals(num_videos=1)
    for first in range(0, num_frames, CLIP_FRAMES):
        last = min(first + CLIP_FRAMES, num_frames)
        members: dict[str, dict[int, Member]] = {"rgb": {}, "dx": {}, "dy": {}}
        for t in range(first, last):
            members["rgb"][t] = reader.frame(files.frames[t])
            if t < len(files.fields):
                members["dx"][t], members["dy"][t] = map(reader.component, files.fields[t])
        clip = Clip(
            video_id=task.video.video_id,
            class_name=task.video.class_name,
            class_id=task.class_id,
            first_frame=first,
            num_frames=last - first,
            is_last=last == num_frames,
            height=height,
            width=width,
            members=members,
        )
        write_clip(file, clip)
        sizes = {kind: sum(len(member.jpeg) for member in column.values()) for kind, column in members.items()}
        totals.rgb_bytes += sizes["rgb"]
        totals.flow_bytes += sizes["dx"] + sizes["dy"]
    totals.num_frames, totals.num_fields = num_frames, len(files.fields)
    return totals


class _Reader:
    """Reads the files of one video as members, each decoded once as proof, all of the first frame's size.

    Raises ValueError that names the file.
    """

    def __init__(self, first: Path, bound_px: float, heard: Callable[[], str]) -> None:
        self._first = first
        self._bound_px = bound_px
        self._heard = heard
        self.size = _header(first, _read_bytes(first))[:2]

    def frame(self, path: Path) -> Member:
        jpeg = _read_bytes(path)
        self._decode(path, jpeg, 3, decode_rgb)
        return Member(jpeg)

    def component(self, path: Path) -> Member:
        jpeg, bound_px = _read_bytes(path), self._bound_px
        values = self._decode(path, jpeg, 1, partial(decode_component, lo=-bound_px, hi=bound_px))
        return Member(jpeg, -bound_px, bound_px, float(values.mean(dtype=np.float64)))

    def _decode(
        self, path: Path, jpeg: bytes, channels: int, decode: Callable[[bytes], npt.NDArray[Any]]
    ) -> npt.NDArray[Any]:
        """The image, if it is what a member has to be."""
        height, width, found = _header(path, jpeg)
        if found != channels:
            what = "a frame is a colour JPEG" if channels == 3 else "a component is a grey JPEG"
            raise ValueError(f"{path.name} has {found} channels, expected {channels}: {what}. Extract the video again.")
        if (height, width) != self.size:
            raise ValueError(
                f"{path.name} is {width}x{height} px, {self._first.name} {self.size[1]}x{self.size[0]}: expected one "
                "size for all of a video. Extract it again."
            )
        if not jpeg.endswith(JPEG_END):
            raise ValueError(
                f"{path.name} ends with {jpeg[-2:].hex()}, a JPEG with {JPEG_END.hex()}: it is cut off, or more was "
                "written behind it. Extract the video again."
            )
        try:
            image = decode(jpeg)
        except (ValueError, import_cv2().error) as error:
            raise ValueError(f"{path.name} cannot be decoded: {error} Extract the video again.") from None
        if wrong := self._heard():
            raise ValueError(f"{path.name} is damaged: {wrong}. Extract the video again.")
        if image.shape[:2] != self.size:
            raise ValueError(
                f"{path.name} is {width}x{height} px, and decoded {image.shape[1]}x{image.shape[0]}: expected no EXIF "
                "orientation. Extract the video again."
            )
        return image


def _header(path: Path, jpeg: bytes) -> tuple[int, int, int]:
    """Coded size of a JPEG. Raises ValueError for what is none, and for one that loaders would refuse."""
    try:
        height, width, channels = coded_size(jpeg)
    except ValueError as error:
        raise ValueError(f"{path.name} is no JPEG: {error} Extract the video again.") from None
    if height * width > MAX_FRAME_PX or len(jpeg) > max_jpeg_bytes(height, width, channels):
        raise ValueError(
            f"{path.name} claims {width}x{height} px in {len(jpeg)} bytes: expected at most {MAX_FRAME_PX:,} px, and "
            "no more bytes than they need. Extract the video again."
        )
    return height, width, channels


def _read_bytes(path: Path) -> bytes:
    try:
        return read_bounded(path, max_jpeg_bytes(1, MAX_FRAME_PX, 3))
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}.") from None


@contextmanager
def complaints() -> Iterator[Callable[[], str]]:
    """Keep what libraries write to stderr. Yields a function that returns it: empty if all is well.

    libjpeg makes something up for a damaged scan, and says so there alone.
    """
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: " ".join(os.pread(file.fileno(), 200, 0).decode("utf-8", "replace").split())
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
