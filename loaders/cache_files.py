"""The files of `loaders.cache`: which they are, what they take, and how they are claimed, hashed and marked as used."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow.store import PIECE_BYTES

_KEY = re.compile(r"[0-9a-f]{32}")
#: Names of a set's files, and of their parts: in its folder, and in splits/.
_GOES = re.compile(r"(?:shard-[0-9]{6,}\.tar|index\.bin)(?:\.([0-9]{1,18})\.part)?")
_LIST = re.compile(r"[^/]+\.txt(?:\.([0-9]{1,18})\.part)?")


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache: when it was used, the bytes that it has or will have, those it has, whether it may go."""

    path: Path
    used_ns: int
    num_bytes: int
    num_there: int
    may_go: bool


def scan(root: Path) -> Iterator[CachedFile]:
    """All files of all sets, and no others: the folder may hold anything besides."""
    for folder in _listed(root):
        if _KEY.fullmatch(folder.name) and not folder.is_symlink() and Path(folder.path, "dataset.json").is_file():
            for entry in _listed(folder.path):
                if name := _GOES.fullmatch(entry.name):
                    yield from _cached(entry, name[1], True)
                elif entry.name == "dataset.json":
                    yield from _cached(entry, None, False)
            for entry in _listed(Path(folder.path, "splits")):
                if name := _LIST.fullmatch(entry.name):
                    yield from _cached(entry, name[1], name[1] is not None)


def _listed(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _cached(entry: os.DirEntry[str], will_have: str | None, may_go: bool) -> Iterator[CachedFile]:
    with suppress(FileNotFoundError):
        if entry.is_file(follow_symlinks=False):
            found = os.stat(entry.path)  # an entry's own is of the moment when the folder was listed, or older
            num_bytes = int(will_have) if will_have else found.st_size
            yield CachedFile(Path(entry.path), found.st_mtime_ns, num_bytes, found.st_size, may_go)


def progress_of(files: Iterable[CachedFile]) -> frozenset[tuple[Path, int]]:
    return frozenset((file.path, file.num_there) for file in files)


def claimed(path: Path) -> int | None:
    """Descriptor of a file that nobody else has open now, to be taken away; None if somebody has, or it is gone."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS has exclusive locks on such files only
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return file


def digest_of(file: int, num_bytes: int) -> Any:
    """SHA-256, to be gone on with, of a file's first bytes."""
    digest, at = hashlib.sha256(), 0
    while at < num_bytes and (piece := os.pread(file, min(PIECE_BYTES, num_bytes - at), at)):
        digest.update(piece)
        at += len(piece)
    return digest


def write_at(file: int, piece: bytes, at: int) -> None:
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(file, rest, at)
        rest, at = rest[written:], at + written


def mark_used(file: int | str) -> None:
    """Now is when it was used; the system's own clock for this is too coarse to tell two uses apart."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
