"""Reading shards back: every clip, from tar headers and clip JSONs, and single members, all of it checked."""

import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flow.codec import JPEG_END, coded_size, decode_grey, decode_rgb, max_jpeg_bytes, sound_ranges
from flow.shard import (
    CLIP_FRAMES,
    ENTRY,
    FORMAT_VERSION,
    GROUPS,
    KINDS,
    MAX_CLASS_ID,
    RGB_ENTRY,
    ClipEntry,
    ClipHeader,
    ShardError,
    check_class_name,
    check_video_id,
    member_name,
    member_order,
)
from flow.untrusted import MAX_FRAME_PX, open_regular, parse_json, printable

_BLOCK = tarfile.BLOCKSIZE
_MAX_JSON_BYTES = 1 << 20
_MAX_NAME_BYTES = 4096
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


def read_clips(path: Path) -> Iterator[ClipEntry]:
    """Every clip of a shard, in order, from tar headers and clip JSONs; no image is read.

    Raises ShardError for anything but whole, well-formed clips up to a proper end of the archive.
    """
    members = _tar_members(path)
    for name, offset, size, file in members:
        header, columns = _read_clip_json(path, name, offset, size, file)
        entries = {kind: (column["first"], _entries(kind, column)) for kind, column in columns.items()}
        ranges = {kind: (first, len(array)) for kind, (first, array) in entries.items()}
        for kind, frame in member_order(ranges):
            expected = member_name(header.video_id, header.first_frame // CLIP_FRAMES, kind, frame - header.first_frame)
            found = next(members, None)
            row = entries[kind][1][frame - ranges[kind][0]]
            if found is None or found[0] != expected or found[2] != row["size"]:
                there = f"{printable(found[0])} of {found[2]} bytes" if found else "the end"
                raise ShardError(
                    f"{path.name}: found {there} where the clip's JSON has {expected} of {row['size']} bytes, after "
                    f"{name} at offset {offset}. Pack the set again."
                )
            row["offset"] = found[1]
        yield ClipEntry(**{key: getattr(header, key) for key in ClipHeader.__dataclass_fields__}, entries=entries)


def _tar_members(path: Path) -> Iterator[tuple[str, int, int, BinaryIO]]:
    """(name, offset of the content, size, file) of every member of a tar.

    Unlike `tarfile`, which takes a damaged header for the end of the archive, this raises ShardError.
    """
    with _open_shard(path) as file:
        total = os.fstat(file.fileno()).st_size
        name, at = None, 0
        while True:
            file.seek(at)
            block = file.read(_BLOCK)
            if block == bytes(_BLOCK) and name is None:
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                raise ShardError(f"{path.name}: damaged tar header at offset {at}: {error}.") from None
            content = at + _BLOCK
            if info.size < 0 or content + info.size > total:
                raise ShardError(
                    f"{path.name}: {info.name} at offset {content} claims {info.size} bytes, the shard has {total}. "
                    "It is cut off, or its header is damaged."
                )
            if info.type == tarfile.GNUTYPE_LONGNAME and info.size <= _MAX_NAME_BYTES:
                name = file.read(info.size).rstrip(b"\0").decode("utf-8", "replace")
            elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):  # not a sparse file, which isreg() is, too
                yield name or info.name, content, info.size, file
                name = None
            else:
                raise ShardError(f"{path.name}: {info.name} at offset {at} is no plain file; shards hold only those.")
            at = content + info.size + -info.size % _BLOCK


def _open_shard(path: Path) -> BinaryIO:
    try:
        return open_regular(path, buffering=_BLOCK * 8)
    except ValueError as error:
        raise ShardError(str(error)) from None


def _read_clip_json(
    path: Path, name: str, offset: int, size: int, file: BinaryIO
) -> tuple[ClipHeader, dict[str, dict[str, Any]]]:
    where = f"{path.name}: {name} at offset {offset}"
    if not name.endswith(".json") or size > _MAX_JSON_BYTES:
        raise ShardError(f"{where}, {size} bytes, where a clip's JSON was expected. Pack the set again.")
    file.seek(offset)
    try:
        content = parse_json(file.read(size))
        version, columns = content.pop("format_version"), content.pop("members")
        header = ClipHeader(**content)
        check_video_id(header.video_id)
        check_class_name(header.class_name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ShardError(f"{where}: the clip's JSON is damaged ({printable(error)}).") from None
    if version != FORMAT_VERSION:
        raise ShardError(f"{where}: format {version!r:.40}, this code reads {FORMAT_VERSION}. Pack the set again.")
    _check_header(where, name, header, columns)
    return header, columns


def _check_header(where: str, name: str, header: ClipHeader, columns: Any) -> None:
    """Refuse a clip JSON whose values do not fit one another. ShardError."""
    integers = (header.first_frame, header.num_frames, header.height, header.width)
    sound = (
        all(type(value) is int for value in integers)
        and type(header.is_last) is bool
        and (header.class_id is None or (type(header.class_id) is int and 0 <= header.class_id <= MAX_CLASS_ID))
        and 0 <= header.first_frame < 1 << 31
        and header.first_frame % CLIP_FRAMES == 0
        and 1 <= header.num_frames <= CLIP_FRAMES
        and 1 <= header.height
        and 1 <= header.width
        and header.height * header.width <= MAX_FRAME_PX
        and name == member_name(header.video_id, header.first_frame // CLIP_FRAMES)
        and isinstance(columns, dict)
        and all(
            (group[0] in columns) == (kind in columns)
            and (kind not in columns or _sound_column(kind, columns[kind], header))
            and columns.get(kind, {}).get("first") == columns.get(group[0], {}).get("first")
            and len(columns.get(kind, {}).get("size", ())) == len(columns.get(group[0], {}).get("size", ()))
            for group in GROUPS
            for kind in group
        )
        and set(columns) <= set(KINDS)
    )
    if not sound:
        raise ShardError(f"{where}: the clip's JSON contradicts itself or its name. Pack the set again.")


def _sound_column(kind: str, column: Any, header: ClipHeader) -> bool:
    keys = {"first", *(ENTRY[kind].names or ())} - {"offset"}
    if not isinstance(column, dict) or set(column) != keys or type(column["first"]) is not int:
        return False
    lists = [column[key] for key in keys - {"first"}]
    return (
        all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists)
        and header.first_frame <= column["first"]
        and column["first"] + len(lists[0]) <= header.first_frame + header.num_frames
        and all(type(v) is int and 0 <= v < 1 << 32 for key in ("size", "crc32") for v in column[key])
        and 0 not in column["size"]
        and all(  # also as float32; NaN is not smaller than anything
            type(v) in (int, float) and abs(v) <= _MAX_FLOAT32
            for key in keys & {"lo", "hi", "mean"}
            for v in column[key]
        )
        and (kind == "rgb" or _sound_ranges(column))
    )


def _sound_ranges(column: dict[str, list[float]]) -> bool:
    lo, hi, mean = (np.array(column[key], np.float32) for key in ("lo", "hi", "mean"))
    return bool(sound_ranges(lo, hi, mean).all())


def _entries(kind: str, column: dict[str, Any]) -> npt.NDArray[Any]:
    array = np.zeros(len(column["size"]), ENTRY[kind])
    for key in set(ENTRY[kind].names or ()) - {"offset"}:
        array[key] = column[key]
    return array


def read_member(path: Path, entry: np.void, name: str) -> bytes:
    """Bytes of the member that an entry of the index stands for, checked. Raises ShardError as `damage` says it."""
    offset, size = int(entry["offset"]), int(entry["size"])
    with _open_shard(path) as file:
        file.seek(offset)
        content = file.read(size)
    if wrong := damage(content, size, int(entry["crc32"]), range_bytes(entry)):
        raise ShardError(f"{path.name}: {name} at offset {offset}: {wrong}")
    return content


def range_bytes(entry: np.void) -> bytes:
    """Range and mean of an index entry as they are stored; nothing for an RGB frame's."""
    return entry.tobytes()[RGB_ENTRY.itemsize :]


def damage(content: bytes | memoryview, size: int, crc32: int, ranges: bytes = b"") -> str:
    """What is wrong with a member's bytes, and with its `range_bytes`; empty if they are what was written.

    crc32: of the content, going on over the ranges.
    """
    found = zlib.crc32(ranges, zlib.crc32(content))
    if len(content) == size and found == crc32:
        return ""
    return (
        f"damaged, {len(content)} of {size} bytes with CRC-32 {found:08x} where {crc32:08x} was written. "
        "Restore the shard from a copy, or pack the set again."
    )


@dataclass(frozen=True)
class MemberPlace:
    """An image of a shard: name, place, and what its bytes must be. ranges: what its CRC-32 goes on over."""

    shard: str
    name: str
    kind: str
    offset: int
    size: int
    crc32: int
    ranges: bytes
    height: int
    width: int

    @property
    def coded_size(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.height, self.width, 3 if self.kind == "rgb" else 1

    @property
    def range_px(self) -> tuple[float, float, float]:
        """lo, hi and mean of a component, px/frame. Raises ShardError for what no field has."""
        lo, hi, mean = np.frombuffer(self.ranges, "<f4")
        if not sound_ranges(lo, hi, mean):
            raise ShardError(f"{self}: its range or mean in the index is none of a field. Rebuild the index.")
        return float(lo), float(hi), float(mean)

    def __str__(self) -> str:
        return f"{self.shard}: {self.name} at offset {self.offset}"


def read_image(file: BinaryIO, place: MemberPlace) -> bytes:
    """Bytes of an image in its shard. Raises ShardError unless CRC-32, coded size and end are what they must be."""
    content = b""  # of what has more bytes than an image, or lies outside the shard, as an index may say
    end = place.offset + place.size
    if place.size <= max_jpeg_bytes(*place.coded_size) and end <= os.fstat(file.fileno()).st_size:
        file.seek(place.offset)
        content = file.read(place.size)
    if wrong := damage(content, place.size, place.crc32, place.ranges):
        raise ShardError(f"{place}: {wrong}")
    try:
        if (found := coded_size(content)) != place.coded_size:
            raise ValueError(f"coded size {found}, expected {place.coded_size} (height, width, channels)")
        if not content.endswith(JPEG_END):
            raise ValueError(f"it ends with {content[-2:].hex()}, a JPEG with {JPEG_END.hex()}")
    except ValueError as error:
        raise ShardError(f"{place} was written damaged: {error}") from None
    return content


def decode_image(content: bytes, place: MemberPlace) -> npt.NDArray[np.uint8]:
    """RGB frame (H, W, 3), or codes (H, W) of a component, of what `read_image` read. Raises ShardError."""
    try:
        image = decode_rgb(content) if place.kind == "rgb" else decode_grey(content)
        if image.shape[:2] != place.coded_size[:2]:
            raise ValueError(f"decoded size {image.shape[:2]}, expected {place.coded_size[:2]} (height, width)")
    except ValueError as error:
        raise ShardError(f"{place} was written damaged: {error}") from None
    return image
