"""The shard format: plain WebDataset tars of clips. The only module that spells a member name.

    Archery/v_Archery_g01_c01/0000.json            what the clip holds: size and CRC-32 of every member, ranges, means
    Archery/v_Archery_g01_c01/0000.000.rgb.jpg     frames 0..63
    Archery/v_Archery_g01_c01/0000.000.dx.jpg      d_0, d_1, ...: dx, dy, dx, dy, ... so that a stack is one read
    Archery/v_Archery_g01_c01/0000.000.dy.jpg
    Archery/v_Archery_g01_c01/0000.001.bdx.jpg     backward fields, if packed: b_t maps frame t to t-1
    Archery/v_Archery_g01_c01/0001.json            the next 64 frames: frame 64 is 0001.000

A clip is one WebDataset sample; a video lies whole in one shard, its clips in order. A fragment is the tar members of
one video in a file of their own; a shard is the concatenation of fragments and the end-of-archive blocks.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flow.untrusted import MAX_FRAME_PX, open_regular, parse_json

FORMAT_VERSION = 1
CLIP_FRAMES = 64
#: Largest number that a data set's authors may give a class.
MAX_CLASS_ID = (1 << 31) - 1

#: Member kinds in the order in which a clip holds them; kinds of one group alternate.
GROUPS = (("rgb",), ("dx", "dy"), ("bdx", "bdy"))
KINDS = tuple(kind for group in GROUPS for kind in group)

#: Where a member lies in its shard, and what its bytes must be; fields also have the range and mean, in px/frame. The
#: CRC-32 is that of the JPEG in a clip's JSON; in the index it goes on over the entry's `range_bytes`.
RGB_ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
FIELD_ENTRY = np.dtype([*RGB_ENTRY.descr, ("lo", "<f4"), ("hi", "<f4"), ("mean", "<f4")])
ENTRY = {kind: RGB_ENTRY if kind == "rgb" else FIELD_ENTRY for kind in KINDS}

_BLOCK = tarfile.BLOCKSIZE
_MAX_JSON_BYTES = 1 << 20
_MAX_NAME_BYTES = 4096
_MAX_CLASS_CHARS = 255
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class ShardError(ValueError):
    """A packed data set is damaged. The message names shard, member and byte offset as far as they are known."""


@dataclass(frozen=True)
class Member:
    """One encoded image of a clip; lo, hi and mean (px/frame) only for components of a field."""

    jpeg: bytes
    lo: float = 0.0
    hi: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True)
class ClipHeader:
    """What a clip's JSON says besides its members. `first_frame` is a multiple of 64; sizes in px."""

    video_id: str
    class_name: str
    class_id: int | None
    first_frame: int
    num_frames: int
    is_last: bool
    height: int
    width: int


@dataclass(frozen=True)
class Clip(ClipHeader):
    """Up to 64 consecutive frames to be written. members: kind -> frame number in the video -> member.

    Field d_t stands with frame t (t <= T-2), backward field b_t with frame t (t >= 1).
    """

    members: dict[str, dict[int, Member]]


@dataclass(frozen=True)
class ClipEntry(ClipHeader):
    """A clip found in a shard. entries: kind -> (first frame, array of RGB_ENTRY or FIELD_ENTRY)."""

    entries: dict[str, tuple[int, npt.NDArray[Any]]]


def check_video_id(video_id: str) -> None:
    """Refuse ids that are no safe relative path, or that a WebDataset reader would skip or split. ValueError."""
    parts = video_id.split("/")
    if len(video_id.encode("utf-8", "surrogateescape")) > 3000:
        raise ValueError(f"Video id {video_id[:60]!r}...: longer than 3,000 bytes. Shorten the file's path.")
    for part in parts:
        if not part or part.startswith(".") or _NO_NAME.search(part):
            raise ValueError(
                f"Video id {video_id!r}: part {part!r} is empty, begins with a dot, or holds a backslash, a control "
                "character or bytes that are not UTF-8. Rename the file."
            )
        if part.startswith("__") and part.endswith("__"):
            raise ValueError(
                f"Video id {video_id!r}: WebDataset readers skip names like {part!r}, of the form __x__. Rename it."
            )


def check_class_name(name: str) -> None:
    """Refuse class names that cannot be printed on one line and drawn. ValueError."""
    if not name.isprintable() or not 1 <= len(name) <= _MAX_CLASS_CHARS:
        raise ValueError(
            f"Class {name[:60]!r} has {len(name)} characters; expected 1 to {_MAX_CLASS_CHARS}, all printable. "
            "Rename it."
        )


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def member_name(video_id: str, clip: int, kind: str | None = None, frame: int = 0) -> str:
    """Name of a member; frame counts within the clip. Without a kind, the clip's JSON."""
    if kind is None:
        return f"{video_id}/{clip:04d}.json"
    return f"{video_id}/{clip:04d}.{frame:03d}.{kind}.jpg"


def _member_order(ranges: dict[str, tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """(kind, frame) of all members after the JSON, in order. ranges: kind -> (first frame, count)."""
    for group in GROUPS:
        if group[0] in ranges:
            first, count = ranges[group[0]]
            for frame in range(first, first + count):
                for kind in group:
                    yield kind, frame


# --- writing -----------------------------------------------------------------------------------------------------


def write_clip(file: BinaryIO, clip: Clip) -> None:
    """Append the members of one clip to a fragment. The bytes depend on nothing but the clip."""
    number = clip.first_frame // CLIP_FRAMES
    columns: dict[str, dict[str, Any]] = {}
    ranges = {}
    for kind, members in clip.members.items():
        frames = sorted(members)
        if not frames:
            continue
        ranges[kind] = (frames[0], len(frames))
        columns[kind] = {
            "first": frames[0],
            "size": [len(members[t].jpeg) for t in frames],
            "crc32": [zlib.crc32(members[t].jpeg) for t in frames],
        }
        if kind != "rgb":
            for key in ("lo", "hi", "mean"):
                columns[kind][key] = [float(np.float32(getattr(members[t], key))) for t in frames]
    header = {
        "format_version": FORMAT_VERSION,
        **{key: getattr(clip, key) for key in ClipHeader.__dataclass_fields__},
        "members": columns,
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    _write_member(file, member_name(clip.video_id, number), text)
    for kind, frame in _member_order(ranges):
        _write_member(
            file, member_name(clip.video_id, number, kind, frame - clip.first_frame), clip.members[kind][frame].jpeg
        )


def _write_member(file: BinaryIO, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    # GNU format: Python's default, PAX, breaks DALI's reader on long and on non-ASCII names.
    file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))
    file.write(content)
    file.write(bytes(-len(content) % _BLOCK))


def commit_shard(fragments: Sequence[Path], path: Path) -> tuple[int, str]:
    """Join fragments into the shard `path`, atomically: until it is whole, no file has its name.

    Returns the shard's bytes and its SHA-256.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w+b") as file:
        for fragment in fragments:
            with open(fragment, "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        file.write(bytes(2 * _BLOCK))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
        num_bytes = file.tell()
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    publish(temporary, path)
    return num_bytes, digest


def publish(temporary: Path, path: Path) -> None:
    """Give a finished, fsynced file its final name, and make the rename itself durable."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


# --- reading -----------------------------------------------------------------------------------------------------


def read_clips(path: Path) -> Iterator[ClipEntry]:
    """Every clip of a shard, in order, from tar headers and clip JSONs; no image is read.

    Raises ShardError for anything but whole, well-formed clips up to a proper end of the archive.
    """
    members = _tar_members(path)
    for name, offset, size, file in members:
        header, columns = _read_clip_json(path, name, offset, size, file)
        entries = {kind: (column["first"], _entries(kind, column)) for kind, column in columns.items()}
        ranges = {kind: (first, len(array)) for kind, (first, array) in entries.items()}
        for kind, frame in _member_order(ranges):
            expected = member_name(header.video_id, header.first_frame // CLIP_FRAMES, kind, frame - header.first_frame)
            found = next(members, None)
            row = entries[kind][1][frame - ranges[kind][0]]
            if found is None or found[0] != expected or found[2] != row["size"]:
                raise ShardError(
                    f"{path.name}: found {f'{found[0]} of {found[2]} bytes' if found else 'the end'} where the clip's "
                    f"JSON has {expected} of {row['size']} bytes, after {name} at offset {offset}. Pack the set again."
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
        raise ShardError(f"{where}: the clip's JSON is damaged ({error}).") from None
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
        and all(  # finite also as float32; NaN is not smaller than anything
            type(v) in (int, float) and abs(v) <= _MAX_FLOAT32
            for key in keys & {"lo", "hi", "mean"}
            for v in column[key]
        )
    )


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
