"""The index file: where every frame and component of a packed set lies, in one file that is memory mapped.

The tars are the truth; the index is a cache, always built from them alone (`python -m flow.verify --rebuild-index`).

    8 bytes "2STREAM2" | CRC-32 of JSON header, videos and names, u4 | length of the header, u4 | JSON header | arrays,
    each aligned to 64 bytes

    videos   (num_videos,) VIDEO, sorted by id         names    uint8, the ids in UTF-8, one after the other
    rgb      (num_rows,) RGB_ENTRY                     dx, dy, and if packed bdx, bdy: (num_rows,) FIELD_ENTRY

Frame t of a video is row `first_row + t` of every kind; a field that does not exist has size 0. An entry's CRC-32 is
that of the JPEG, going on over the entry's range and mean, combined with the entry's place: what is read shows whether
the entry is damaged, so that nobody has to read gigabytes of entries first.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flow.clips import MemberPlace, range_bytes, read_clips
from flow.dataset import check_classes, check_shards, no_packed_set, read_dataset
from flow.shard import (
    CLIP_FRAMES,
    ENTRY,
    GROUPS,
    KINDS,
    RGB_ENTRY,
    ClipEntry,
    ShardError,
    check_video_id,
    member_name,
    publish,
)
from flow.untrusted import MAX_FRAME_PX, MAX_JSON_BYTES, open_regular, parse_json

INDEX_NAME = "index.bin"
MAGIC = b"2STREAM2"
_HEAD = struct.Struct("<8sII")
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
_DTYPES: dict[str, np.dtype[Any]] = {"videos": VIDEO, "names": np.dtype(np.uint8), **ENTRY}


def scan_shards(root: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of the index, read from a folder's tars. Raises ShardError for damaged or clashing ones."""
    paths = sorted(Path(root).glob("shard-*.tar"))
    if not paths:
        raise ShardError(f"{root} holds no shard-*.tar. Pack a data set there with `python -m flow.pack`.")
    return scan_clips([(path.name, path.stat().st_size, read_clips(path)) for path in paths])


def scan_clips(shards: Sequence[tuple[str, int, Iterable[ClipEntry]]]) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of the index, from name, bytes and clips of every shard. Raises ShardError as `scan_shards`."""
    videos: dict[str, tuple[int, list[ClipEntry]]] = {}
    for number, (name, _, found) in enumerate(tqdm(shards, desc="indexing", unit="shard", delay=1, disable=None)):
        for video_id, clips in _videos(name, found):
            if video_id in videos:
                raise ShardError(f"{video_id} stands in {shards[videos[video_id][0]][0]} and again in {name}.")
            videos[video_id] = number, clips
    if not videos:
        raise ShardError("The shards hold no video.")

    classes = {clips[0].class_name: clips[0].class_id for _, clips in videos.values()}
    labels = {name: label for label, name in enumerate(sorted(classes))}
    header = {
        "classes": [{"name": name, "official_id": classes[name]} for name in sorted(classes)],
        "shards": [{"name": name, "bytes": num_bytes} for name, num_bytes, _ in shards],
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
        _extend_crc32(arrays[kind])
        arrays[kind]["crc32"] ^= _place_mask(kind, np.arange(len(arrays[kind])))
    return header, arrays


def _extend_crc32(entries: npt.NDArray[Any]) -> None:
    """Let the CRC-32 of entries (num_rows,), which is that of their JPEG, go on over their range and mean.

    As `zlib.crc32(range_bytes(entry), crc32)` does it for one, byte by byte by the table, but for all at a time.
    """
    table = ~np.array([zlib.crc32(bytes([byte]), 0xFFFFFFFF) for byte in range(256)], np.uint32)
    exists = entries["size"] > 0
    ranges = entries.view(np.uint8).reshape(len(entries), -1)[:, RGB_ENTRY.itemsize :]
    crc32 = ~entries["crc32"]
    for byte in ranges.T:
        crc32 = table[(crc32 ^ byte) & 0xFF] ^ (crc32 >> 8)
    entries["crc32"] = np.where(exists, ~crc32, 0)


def take_entries(table: npt.NDArray[Any], kind: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Entries in some rows of a kind's table: a copy whose CRC-32 are those of the members with their ranges; or, of a
    table of such entries, with what a table has."""
    entries = table[rows]
    entries["crc32"] ^= _place_mask(kind, rows)
    return entries


def _place_mask(kind: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """What CRC-32s in the index are combined with: an entry in the place of another is damage that none would show."""
    place = rows.astype(np.uint64) * np.uint64(len(KINDS)) + np.uint64(KINDS.index(kind))
    return (place * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).astype(np.uint32)


def _videos(shard: str, found: Iterable[ClipEntry]) -> Iterator[tuple[str, list[ClipEntry]]]:
    """(id, clips) of every video of a shard; checks that the clips of a video are whole and of one size."""
    clips: list[ClipEntry] = []
    for clip in found:
        expected = clips[-1].first_frame + clips[-1].num_frames if clips else 0
        if clip.first_frame != expected or (
            clips
            and (clip.video_id, clip.height, clip.width, clip.class_name)
            != (clips[-1].video_id, clips[-1].height, clips[-1].width, clips[-1].class_name)
        ):
            raise ShardError(
                f"{shard}: clip of {clip.video_id} at frame {clip.first_frame} where frame {expected} of "
                f"{clips[-1].video_id if clips else 'a video'} should follow. Pack the set again."
            )
        clips.append(clip)
        if clip.is_last:
            yield clip.video_id, clips
            clips = []
    if clips:
        raise ShardError(f"{shard}: {clips[0].video_id} breaks off after frame {clips[-1].first_frame}.")


def build_index(root: Path) -> None:
    """Build `index.bin` from the tars of a folder, atomically."""
    write_index(root, *scan_shards(root))


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
    text += b" " * (-(_HEAD.size + len(text)) % 64)
    with open(temporary, "wb") as file:
        file.write(_HEAD.pack(MAGIC, _table_crc32(text, arrays), len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            file.write(bytes(-array.nbytes % 64))
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def _table_crc32(text: bytes, arrays: Arrays) -> int:
    return zlib.crc32(arrays["names"].data, zlib.crc32(arrays["videos"].view(np.uint8).data, zlib.crc32(text)))


def load_index(root: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of a folder's index; the arrays are memory mapped, read-only, and shared between processes.

    The header, `videos` and `names` are whole and fit each other; entries are checked where they are read.
    Raises ShardError if the file is missing, damaged, of another version, or contradicts itself.
    """
    path = Path(root) / INDEX_NAME
    remedy = f"Rebuild it: `python -m flow.verify {root} --rebuild-index`."
    try:
        with open_regular(path) as file:
            content = np.memmap(file, np.uint8, mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise ShardError(f"No index at {path} ({error}). {remedy}") from None
    if (magic := content[: len(MAGIC)].tobytes()) != MAGIC:
        raise ShardError(f"{path} begins with {magic!r}, expected {MAGIC!r}: no index, or an old one. {remedy}")
    try:
        _, crc32, length = _HEAD.unpack_from(content.data)
        if length > min(MAX_JSON_BYTES, len(content) - _HEAD.size):
            raise ValueError(f"its header claims {length:,} bytes")
        text, body = content[_HEAD.size : _HEAD.size + length].tobytes(), content[_HEAD.size + length :]
        header = parse_json(text)
        arrays = {kind: _array(body, header["arrays"][kind], _DTYPES[kind]) for kind in header["arrays"]}
        if _table_crc32(text, arrays) != crc32:
            raise ValueError("its tables have another CRC-32 than was written")
        check_classes(header["classes"])
        check_shards(header["shards"])
        _check_tables(arrays, len(header["classes"]), len(header["shards"]))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ShardError(f"{path} is damaged: {error}. {remedy}") from None
    return header, arrays


def load_set(root: Path) -> tuple[dict[str, Any], dict[str, Any], Arrays]:
    """Content of `dataset.json`, and header and arrays of the index, of a packed set; the shards are not looked at.

    Raises ValueError if the folder is no packed set or its encoding is not the one this code reads, and ShardError if
    they are damaged or do not belong together.
    """
    try:
        dataset = read_dataset(root)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(no_packed_set(root)) from None
    header, arrays = load_index(root)
    shards = [[(shard["name"], shard["bytes"]) for shard in side["shards"]] for side in (header, dataset)]
    for what, same in (
        ("shards", shards[0] == shards[1]),
        ("classes", header["classes"] == dataset["classes"]),
        ("videos", len(arrays["videos"]) == dataset["num_videos"]),
    ):
        if not same:
            raise ShardError(
                f"The index of {root} lists other {what} than dataset.json. Rebuild it: "
                f"`python -m flow.verify {root} --rebuild-index`."
            )
    return dataset, header, arrays


def _array(body: npt.NDArray[np.uint8], place: dict[str, Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An array of the index, whose bytes begin with those of the first one."""
    first, end = place["offset"], place["offset"] + place["count"] * dtype.itemsize
    if not 0 <= first <= end <= len(body) or place["bytes"] != dtype.itemsize:
        raise ValueError(f"an array of {place!r:.200} lies outside the file")
    return body[first:end].view(dtype)


def _check_tables(arrays: Arrays, num_classes: int, num_shards: int) -> None:
    """Raise ValueError unless every video has its own names and rows, without a gap, and a class, shard and size."""
    videos, names = arrays["videos"], arrays["names"]
    num_rows = {len(table) for kind, table in arrays.items() if kind in KINDS}
    if not len(videos):
        raise ValueError("it holds no videos")
    name_ends = np.cumsum(videos["name_bytes"], dtype=np.uint64)
    row_ends = np.cumsum(videos["num_frames"], dtype=np.uint64)
    conditions = {  # what would be wrong, and that it is not
        "half a field": all(len({kind in arrays for kind in group}) == 1 for group in GROUPS),
        "names": np.array_equal(videos["name_at"], name_ends - videos["name_bytes"]) and name_ends[-1] == len(names),
        "rows": np.array_equal(videos["first_row"], row_ends - videos["num_frames"])
        and num_rows == {int(row_ends[-1])},
        "empty names or videos": (videos["name_bytes"] > 0).all() and (videos["num_frames"] > 0).all(),
        "classes": (videos["label"] >= 0).all() and (videos["label"] < num_classes).all(),
        "shards": (videos["shard"] >= 0).all() and (videos["shard"] < num_shards).all(),
        "frame sizes": (videos["height"] > 0).all()
        and (videos["width"] > 0).all()
        and (videos["height"].astype(np.uint64) * videos["width"] <= MAX_FRAME_PX).all(),
    }
    if broken := [what for what, holds in conditions.items() if not holds]:
        raise ValueError(f"its tables contradict each other: {', '.join(broken)}")


def decode_names(names: npt.NDArray[np.uint8], videos: npt.NDArray[Any]) -> list[str]:
    """Ids of some videos. Raises ShardError for one that no pack writes."""
    places = zip(videos["name_at"].tolist(), videos["name_bytes"].tolist(), strict=True)
    try:
        ids = [bytes(names.data[at : at + size]).decode() for at, size in places]
        for video_id in ids:
            check_video_id(video_id)
    except ValueError as error:
        raise ShardError(f"A name in the index is none: {error}") from None
    return ids


def image_places(
    header: dict[str, Any], arrays: Arrays, number: int, kind: str, frames: npt.NDArray[np.int64]
) -> Iterator[MemberPlace]:
    """Where images of a kind lie, at some frames of video `number`; what the index does not have is left out."""
    video = arrays["videos"][number]
    (video_id,) = decode_names(arrays["names"], arrays["videos"][number : number + 1])
    shard, size = header["shards"][int(video["shard"])]["name"], (int(video["height"]), int(video["width"]))
    entries = take_entries(arrays[kind], kind, int(video["first_row"]) + frames)
    for frame, row in zip(frames.tolist(), entries, strict=True):
        if row["size"]:
            name = member_name(video_id, frame // CLIP_FRAMES, kind, frame % CLIP_FRAMES)
            place = int(row["offset"]), int(row["size"]), int(row["crc32"])
            yield MemberPlace(shard, name, kind, *place, range_bytes(row), *size)


def video_ids(arrays: Arrays) -> list[str]:
    """Ids of all videos, in the order of the rows."""
    return decode_names(arrays["names"], arrays["videos"])
