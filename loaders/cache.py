"""A packed set that lies in a store, on this machine's disk: whole shards, fetched when they are needed.

    CACHE/lock                               held while room is made, a file appears or is taken away
    CACHE/KEY/dataset.json, splits/*.txt     KEY: a hash of dataset.json, so a set that is packed anew is another one
    CACHE/KEY/index.bin, shard-000000.tar    as published: their SHA-256 is that of dataset.json
    CACHE/KEY/shard-000001.tar.N.part        of N bytes in the end; what is there is kept and goes on

All processes of a machine share it. Its files never have more than a bound of bytes, parts counted as what they will
be; the least recently used ones make room. Locks are those of the system on open files, and end with their process:

    shared       a shard that is being read, an open set's index: not taken away, or it would take room unseen
    exclusive    a part that is being fetched: whoever else needs it waits for it

A thread that waits, for room or for a shard, holds no lock on another: so somebody always goes on.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flow.dataset import parse_dataset
from flow.index import INDEX_NAME
from flow.shard import ShardError, write_bytes
from flow.store import PIECE_BYTES, Store, StoreError
from flow.untrusted import MAX_JSON_BYTES, MAX_LIST_BYTES

#: A server may be away for two minutes; train.timeout_s ends a wait earlier.
_PAUSES_S = (0.2, 1.0, 3.0, 8.0, 15.0, 30.0, 60.0)
#: Longest wait for room that files in use take, s, and time between two looks. A shard is read in milliseconds.
_ROOM_PATIENCE_S = 60.0
_LOOK_S = 0.05
_PART = re.compile(r"\.([0-9]{1,18})\.part")


@dataclass(frozen=True)
class Published:
    """A file as dataset.json describes it."""

    num_bytes: int
    sha256: str


def default_folder() -> Path:
    """Where shards are cached if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "two-stream"


class ShardCache:
    """The cached files of one set. Any number of threads and processes may use it.

    folder: of the set. content: of its dataset.json. max_bytes: bound on all that the cache holds, of other sets too.
    own_bytes: what the set takes beside its shards.
    """

    _index_file: int | None = None

    def __init__(self, store: Store, root: Path, max_bytes: int, content: bytes):
        dataset = parse_dataset(content, f"{store.url}/dataset.json")
        self._store, self._root, self.max_bytes = store, root, max_bytes
        self.url = store.url
        self.folder = root / hashlib.sha256(content).hexdigest()[:32]
        self._files = _published(dataset, store.url)
        self.shard_names = [shard["name"] for shard in dataset["shards"]]
        self._sound: set[tuple[str, int]] = set()
        own = (file.num_bytes for name, file in self._files.items() if name not in set(self.shard_names))
        self.own_bytes = len(content) + sum(own)
        with self._plainly():
            (self.folder / "splits").mkdir(parents=True, exist_ok=True)
            path = self.folder / "dataset.json"
            if not path.is_file() or path.read_bytes() != content:
                write_bytes(path, content)

    @classmethod
    def open(cls, url: str, root: Path, max_bytes: int, store: Store | None = None) -> Self:
        """The cache of a set, with all of it but the shards. store: another one than the URL's.

        Raises ValueError if there is no set, or one that cannot be cached or is larger than the cache; StoreError,
        ShardError for what is not as it was published; OSError for a folder that cannot be written.
        """
        asked = store or Store(url)
        try:
            content = asked.read_small("dataset.json", MAX_JSON_BYTES)
        except FileNotFoundError:
            raise ValueError(f"{url} is no packed data set: it has no dataset.json. Check the URL.") from None
        cache = cls(store or Store(url, pauses_s=_PAUSES_S), root, max_bytes, content)
        cache._hold_index()
        for name in cache._files:
            if name.startswith("splits/"):
                os.close(cache.open_file(name))
        return cache

    def _hold_index(self) -> None:
        """Fetch the index, and keep it from being taken away while this lives."""
        self._let_go()
        self._index_file = self.open_file(INDEX_NAME)

    def _let_go(self) -> None:
        if self._index_file is not None:
            os.close(self._index_file)
            self._index_file = None

    __del__ = _let_go

    def touch(self, name: str) -> bool:
        """Whether a file is there; then it is now the one most recently used."""
        try:
            _touch(self.folder / name)
        except FileNotFoundError:
            return False
        return True

    def num_cached(self, names: list[str]) -> int:
        """How many of these files are there."""
        return sum((self.folder / name).is_file() for name in names)

    def open_file(self, name: str) -> int:
        """Descriptor of a file, fetched if it is not there, which keeps it from being taken away until it is closed.

        The thread holds no other one. Raises ShardError for what is not as published, FileNotFoundError if the store
        lacks it, StoreError, OSError if the disk is full or cannot be written.
        """
        path = self.folder / name
        while True:
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                fetched = self._fetched(name, _ROOM_PATIENCE_S, lambda: False)
                if fetched is None:
                    continue
                file = fetched
            try:
                fcntl.flock(file, fcntl.LOCK_SH)
                if _is_at(file, path):
                    _touch(file)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # taken away meanwhile

    def fetch(self, name: str, stopped: Callable[[], bool]) -> None:
        """Fetch a file ahead of need: not if there is no room at once, and no further once `stopped`. Raises as
        `open_file`."""
        if not self.touch(name) and (file := self._fetched(name, 0.0, stopped)) is not None:
            os.close(file)

    def repair(self, name: str) -> bool:
        """Whether a file, in which damage was found, is another one than was published; then it is taken away."""
        path = self.folder / name
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True  # what was read is not there any more
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            copy = name, os.fstat(file).st_ino
            if copy in self._sound:
                return False
            with suppress(OSError):  # a place that cannot be read is no better
                if _digest(file, os.fstat(file).st_size).hexdigest() == self._files[name].sha256:
                    self._sound.add(copy)
                    return False
            if name != INDEX_NAME:  # which open sets keep for as long as they live
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                path.unlink()
            return True
        finally:
            os.close(file)

    def repair_index(self) -> bool:
        """The same of the index, which then is fetched again."""
        self._let_go()
        repaired = self.repair(INDEX_NAME)
        self._hold_index()
        return repaired

    def _fetched(self, name: str, patience_s: float, stopped: Callable[[], bool]) -> int | None:
        """Descriptor of a file that was not there and now is, unless it is None: then look again."""
        with self._plainly():
            file = self._reserve(name, patience_s)
            if file is None:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # whoever fetches it lets go when it is whole, or is at its end
                if _is_at(file, self._part(name)) and self._fill(file, name, stopped):
                    with self._locked():
                        if _is_at(file, self._part(name)):
                            os.replace(self._part(name), self.folder / name)
                            _touch(file)
                            self._sound = {copy for copy in self._sound if copy[0] != name}
                if _is_at(file, self.folder / name):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
            return None

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.{self._files[name].num_bytes}.part"

    def _reserve(self, name: str, patience_s: float) -> int | None:
        """Descriptor of a file's part, for which there is room. None if it is whole meanwhile; or after a wait of 0 s
        there is no room. Raises StoreError if there is none after a longer one."""
        path, part, num_bytes = self.folder / name, self._part(name), self._files[name].num_bytes
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{self.url}/{name} has {num_bytes / 1e9:.3g} GB, the cache {self._root} may hold "
                f"{self.max_bytes / 1e9:.3g} GB. Raise data.cache_gb."
            )
        until = time.monotonic() + patience_s
        while True:
            with self._locked():
                if path.exists():
                    return None
                if part.exists() or self._make_room(num_bytes):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not patience_s:
                return None
            if time.monotonic() > until:
                raise StoreError(
                    f"{self.url}/{name}: no room for its {num_bytes / 1e9:.3g} GB in the cache {self._root}, whose "
                    f"{self.max_bytes / 1e9:.3g} GB are all in use. Raise data.cache_gb, or give this run a data.cache "
                    "of its own."
                )
            time.sleep(_LOOK_S)

    def _make_room(self, num_bytes: int) -> bool:
        """Take the least recently used files away until so many bytes fit in; whether they do."""
        found = list(_scan(self._root))
        used = sum(file.num_bytes for file in found)
        for old in sorted(found, key=lambda file: file.used_ns):
            if used + num_bytes <= self.max_bytes:
                break
            if old.may_go and _take_away(old.path):
                used -= old.num_bytes
        return used + num_bytes <= self.max_bytes

    def _fill(self, file: int, name: str, stopped: Callable[[], bool]) -> bool:
        """Fetch what a part lacks; whether it is whole then. Raises ShardError if it is not what was published."""
        published = self._files[name]
        found = ""
        for _ in range(2):
            done = os.fstat(file).st_size
            digest = _digest(file, done)
            while done < published.num_bytes:
                if stopped():
                    return False
                piece = self._store.read(name, done, min(done + PIECE_BYTES, published.num_bytes))
                digest.update(piece)
                _write(file, piece, done)
                done += len(piece)
            if (found := digest.hexdigest()) == published.sha256:
                os.fsync(file)  # or a machine that loses power may find other bytes under the name
                return True
            os.ftruncate(file, 0)  # what was there before may have been wrong
        raise ShardError(
            f"{self.url}/{name}: its SHA-256 is {found}, dataset.json says {published.sha256}; fetched twice. Publish "
            "it again, from a set that `python -m flow.verify` finds whole."
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all threads and processes; nobody waits for anything else meanwhile."""
        path = self._root / "lock"
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_at(file, path):  # or the folder was taken away meanwhile
                    yield
                    return
            finally:
                os.close(file)

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Say of the disk's errors what may be done."""
        try:
            yield
        except OSError as error:
            if isinstance(error, StoreError | FileNotFoundError) or error.errno is None:
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}: the cache of {self.url} cannot be written. Free space, lower data.cache_gb, or "
                "choose another folder as data.cache",
                error.filename or str(self._root),
            ) from error


@dataclass(frozen=True)
class _Cached:
    """A file of the cache: when it was used, the bytes that it has or will have, and whether it may be taken away."""

    path: Path
    used_ns: int
    num_bytes: int
    may_go: bool


def _scan(root: Path) -> Iterator[_Cached]:
    """All files of all sets."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                stat, part = path.stat(), _PART.search(name)
                num_bytes = int(part[1]) if part else stat.st_size
                yield _Cached(path, stat.st_mtime_ns, num_bytes, bool(part) or name.endswith((".tar", INDEX_NAME)))


def _take_away(path: Path) -> bool:
    """Remove a file unless somebody has it open; whether it is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def _published(dataset: dict[str, Any], url: str) -> dict[str, Published]:
    """name -> what dataset.json says of each shard, of the index and of the lists. Raises ValueError without the last
    two."""
    if "files" not in dataset:
        raise ValueError(
            f"{url} was packed before sets could be read from a store: its dataset.json does not list index.bin. Run "
            "`python -m flow.verify DIR --rebuild-index` on the folder it was made in, then copy it again."
        )
    entries = [*dataset["files"], *dataset["shards"]]
    files = {entry["name"]: Published(entry["bytes"], entry["sha256"]) for entry in entries}
    if INDEX_NAME not in files:
        raise ShardError(f"{url}/dataset.json is damaged: it lists no {INDEX_NAME}. Restore it from a copy.")
    for name, file in files.items():
        if file.num_bytes < 0:
            raise ShardError(
                f"{url}/dataset.json is damaged: {name} has {file.num_bytes} bytes. Restore it from a copy."
            )
        if name.startswith("splits/") and file.num_bytes > MAX_LIST_BYTES:
            raise ValueError(f"{url}/{name} has {file.num_bytes:,} bytes, expected at most {MAX_LIST_BYTES:,}.")
    return files


def _digest(file: int, num_bytes: int) -> Any:
    """SHA-256, to be gone on with, of a file's first bytes."""
    digest, at = hashlib.sha256(), 0
    while at < num_bytes and (piece := os.pread(file, min(PIECE_BYTES, num_bytes - at), at)):
        digest.update(piece)
        at += len(piece)
    return digest


def _write(file: int, piece: bytes, at: int) -> None:
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(file, rest, at)
        rest, at = rest[written:], at + written


def _touch(file: int | Path) -> None:
    """Now is when it was used; the system's own clock for this is too coarse to tell two uses apart."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
