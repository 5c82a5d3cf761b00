"""The index file: where every frame and component of a packed set lies, in one file that is memory mapped.

The tars are the truth; the index is a cache, always built from them alone (`python -m flow.verify --rebuild-index`).

    8 bytes "2STREAM1" | 8 bytes header length | JSON header | arrays, each aligned to 64 bytes

    videos   (num_videos,) VIDEO, sorted by id         names    uint8, the ids in UTF-8, one after the other
    rgb      (num_rows,) RGB_ENTRY                     dx, dy, and if packed bdx, bdy: (num_rows,) FIELD_ENTRY

Frame t of a video is row `first_row + t` of every kind; a field that does not exist has size 0.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.shard import ENTRY, KINDS, ClipEntry, ShardError, publish, read_clips

INDEX_NAME = "index.bin"
MAGIC = b"2STREAM1"
VIDEO = np.dtype(
    [
        ("name_at", "<u8"),
        ("name_bytes", "<u4"),
        ("label", "<i4"),
        ("shard", "<i4"),
        ("num_frames", "<u4"),
        ("first_row", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
    ]
)
Arrays = dict[str, npt.NDArray[Any]]


def scan_shards(root: Path, progress: Callable[[Path], object] | None = None) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of the index, read from a folder's tars. Raises ShardError for damaged or clashing ones."""
    paths = sorted(Path(root).glob("shard-*.tar"))
    if not paths:
        raise ShardError(f"{root} holds no shard-*.tar. Pack a data set there with `python -m flow.pack`.")
    videos: dict[str, tuple[int, list[ClipEntry]]] = {}
    for number, path in enumerate(paths):
        for video_id, clips in _videos(path):
            if video_id in videos:
                raise ShardError(f"{video_id} stands in {paths[videos[video_id][0]].name} and again in {path.name}.")
            videos[video_id] = number, clips
        if progress:
            progress(path)
    if not videos:
        raise ShardError(f"The shards in {root} hold no video.")

    classes = {clips[0].class_name: clips[0].class_id for _, clips in videos.values()}
    labels = {name: label for label, name in enumerate(sorted(classes))}
    header = {
        "classes": [{"name": name, "official_id": classes[name]} for name in sorted(classes)],
        "shards": [{"name": path.name, "bytes": path.stat().st_size} for path in paths],
    }
    ids = sorted(videos)
    rows = np.zeros(len(ids), VIDEO)
    names = [video_id.encode() for video_id in ids]
    rows["name_bytes"] = [len(name) for name in names]
    rows["name_at"] = np.cumsum(rows["name_bytes"], dtype=np.uint64) - rows["name_bytes"]
    rows["num_frames"] = [videos[i][1][-1].first_frame + videos[i][1][-1].num_frames for i in ids]
    rows["first_row"] = np.cumsum(rows["num_frames"], dtype=np.uint64) - rows["num_frames"]
    rows["shard"] = [videos[i][0] for i in ids]
    for key, values in (
        ("label", [labels[videos[i][1][0].class_name] for i in ids]),
        ("height", [videos[i][1][0].height for i in ids]),
        ("width", [videos[i][1][0].width for i in ids]),
    ):
        rows[key] = values
    arrays: Arrays = {"videos": rows, "names": np.frombuffer(b"".join(names), np.uint8)}
    present = {kind for _, clips in videos.values() for clip in clips for kind in clip.entries}
    for kind in (kind for kind in KINDS if kind in present):
        arrays[kind] = np.zeros(int(rows["num_frames"].sum(dtype=np.uint64)), ENTRY[kind])
        for video_id, first_row in zip(ids, rows["first_row"].tolist(), strict=True):
            for clip in videos[video_id][1]:
                if kind in clip.entries:
                    first, entries = clip.entries[kind]
                    arrays[kind][first_row + first : first_row + first + len(entries)] = entries
    return header, arrays


def _videos(path: Path) -> Iterator[tuple[str, list[ClipEntry]]]:
    """(id, clips) of every video of a shard; checks that the clips of a video are whole and of one size."""
    clips: list[ClipEntry] = []
    for clip in read_clips(path):
        expected = clips[-1].first_frame + clips[-1].num_frames if clips else 0
        if clip.first_frame != expected or (
            clips
            and (clip.video_id, clip.height, clip.width, clip.class_name)
            != (clips[-1].video_id, clips[-1].height, clips[-1].width, clips[-1].class_name)
        ):
            raise ShardError(
                f"{path.name}: clip of {clip.video_id} at frame {clip.first_frame} where frame {expected} of "
                f"{clips[-1].video_id if clips else 'a video'} should follow. Pack the set again."
            )
        clips.append(clip)
        if clip.is_last:
            yield clip.video_id, clips
            clips = []
    if clips:
        raise ShardError(f"{path.name}: {clips[0].video_id} breaks off after frame {clips[-1].first_frame}.")


def build_index(root: Path, progress: Callable[[Path], object] | None = None) -> None:
    """Build `index.bin` from the tars of a folder, atomically."""
    write_index(root, *scan_shards(root, progress))


def write_index(root: Path, header: dict[str, Any], arrays: Arrays) -> None:
    """Write `index.bin`, atomically; header and arrays are those of `scan_shards`."""
    path = Path(root) / INDEX_NAME
    temporary = path.with_name(path.name + ".tmp")
    places = {}
    at = 0
    for name, array in arrays.items():
        places[name] = {"offset": at, "count": len(array), "bytes": array.itemsize}
        at += array.nbytes + -array.nbytes % 64
    text = json.dumps({**header, "arrays": places}, ensure_ascii=False).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % 64)
    with open(temporary, "wb") as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            file.write(bytes(-array.nbytes % 64))
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def load_index(root: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of a folder's index; the arrays are memory mapped, read-only, and shared between processes.

    Raises ShardError if the file is missing, damaged or of another version.
    """
    path = Path(root) / INDEX_NAME
    remedy = f"Rebuild it: `python -m flow.verify {root} --rebuild-index`."
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise ShardError(f"No index at {path} ({error}). {remedy}") from None
    start = len(MAGIC) + 8
    if content[: len(MAGIC)].tobytes() != MAGIC:
        raise ShardError(f"{path} begins with {content[:8].tobytes()!r}, expected {MAGIC!r}. {remedy}")
    body = start + int.from_bytes(content[len(MAGIC) : start].tobytes(), "little")
    try:
        if body > len(content):
            raise ValueError("it is cut off")
        header = json.loads(content[start:body].tobytes())
        arrays = {}
        for name, place in header["arrays"].items():
            dtype = {"videos": VIDEO, "names": np.dtype(np.uint8), **ENTRY}[name]
            first, end = body + place["offset"], body + place["offset"] + place["count"] * dtype.itemsize
            if not body <= first <= end <= len(content) or place["bytes"] != dtype.itemsize:
                raise ValueError(f"array {name!r} lies outside the file")
            arrays[name] = content[first:end].view(dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged: {error}. {remedy}") from None
    return header, arrays


def video_ids(arrays: Arrays) -> list[str]:
    """Ids of all videos, in the order of the rows."""
    names = arrays["names"].tobytes()
    return [names[at : at + size].decode() for at, size in arrays["videos"][["name_at", "name_bytes"]].tolist()]
