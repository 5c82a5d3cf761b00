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
import secrets
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1
CLIP_FRAMES = 64
#: Largest number that a data set's authors may give a class.
MAX_CLASS_ID = (1 << 31) - 1

#: Member kinds in the order in which a clip holds them; kinds of one group alternate.
GROUPS = (("rgb",), ("dx", "dy"), ("bdx", "bdy"))
KINDS = tuple(kind for group in GROUPS for kind in group)

#: Where a member lies in its shard, and what its bytes must be; fields also have the range and mean, in px/frame. The
#: CRC-32 is that of the JPEG in a clip's JSON; in the index it goes on over the entry's range and mean.
RGB_ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
FIELD_ENTRY = np.dtype([*RGB_ENTRY.descr, ("lo", "<f4"), ("hi", "<f4"), ("mean", "<f4")])
ENTRY = {kind: RGB_ENTRY if kind == "rgb" else FIELD_ENTRY for kind in KINDS}

_BLOCK = tarfile.BLOCKSIZE
_MAX_CLASS_CHARS = 255
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


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


def member_order(ranges: dict[str, tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """(kind, frame) of all members after the JSON, in order. ranges: kind -> (first frame, count)."""
    for group in GROUPS:
        if group[0] in ranges:
            first, count = ranges[group[0]]
            for frame in range(first, first + count):
                for kind in group:
                    yield kind, frame


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
    for kind, frame in member_order(ranges):
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
    """Write a small file atomically, also if other processes, on this machine or others, write it at the same time."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
