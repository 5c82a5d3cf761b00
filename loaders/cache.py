"""A packed set that lies in a store, on this machine's disk: whole shards, fetched when they are needed.

    CACHE/lock                               held while room is made, a file appears or is taken away
    CACHE/KEY/dataset.json, splits/*.txt     KEY: a hash of dataset.json, so a set that is packed anew is another one
    CACHE/KEY/index.bin, shard-000000.tar    as published: their SHA-256 is that of dataset.json
    CACHE/KEY/shard-000001.tar.N.part        of N bytes in the end; what is there is kept and goes on

All processes of a machine share it. Its files never have more than a bound of bytes, parts counted as what they will
be; the least recently used ones make room. Other files in the folder are not looked at, whatever their names. Locks are
those of the system on open files, and end with their process:

    shared       a shard that is being read, an open set's index: not taken away, or it would take room unseen
    exclusive    a part that is being fetched: whoever else needs it waits for it

A thread that waits, for room or for a shard, holds no lock on another: so somebody always goes on.
"""

import fcntl
import hashlib
import os
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
from loaders.cache_files import CachedFile, claimed, digest_of, is_at, mark_used, progress_of, scan, write_at

#: A server may be away for two minutes; train.timeout_s ends a wait earlier.
_PAUSES_S = (0.2, 1.0, 3.0, 8.0, 15.0, 30.0, 60.0)
#: Longest wait for room that files in use take, s, while nothing is fetched by anybody, and time between two looks. A
#: shard is read in milliseconds, but its fetch may take minutes.
_ROOM_PATIENCE_S = 60.0
_LOOK_S = 0.05
#: A file that was marked as used so shortly before is not marked again when it is opened, as most shards are for every
#: batch. What is asked for ahead of need is marked each time.
_FRESH_NS = 10**9
#: A shard that is not what was published is not fetched again so soon, s: who goes past damage may ask at every step.
_WRONG_S = 300.0


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
        self._paths = {name: str(self.folder / name) for name in self._files}  # joined once: each read needs one
        self.shard_names = [shard["name"] for shard in dataset["shards"]]
        self._sound: set[tuple[str, int]] = set()
        self._wrong: dict[str, tuple[float, str]] = {}  # until when, and what is wrong
        own = (file.num_bytes for name, file in self._files.items() if name not in set(self.shard_names))
        self.own_bytes = len(content) + sum(own)
        self._content = content
        with self._plainly():
            self._make_folder()
            if (self.folder / "dataset.json").read_bytes() != content:
                write_bytes(self.folder / "dataset.json", content)

    def _make_folder(self) -> None:
        """Have the set's folder, also where it was deleted: without dataset.json it would not be looked at."""
        (self.folder / "splits").mkdir(parents=True, exist_ok=True)
        if not (self.folder / "dataset.json").is_file():
            write_bytes(self.folder / "dataset.json", self._content)

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
            mark_used(self._paths[name])
        except FileNotFoundError:
            return False
        return True

    def lists(self) -> list[str]:
        """Names of the set's lists, such as "split1_train"."""
        return sorted(Path(name).stem for name in self._files if name.startswith("splits/"))

    def num_cached(self, names: list[str]) -> int:
        """How many of these files are there."""
        return sum((self.folder / name).is_file() for name in names)

    def open_file(self, name: str) -> int:
        """Descriptor of a file, fetched if it is not there, which keeps it from being taken away until it is closed.

        The thread holds no other one. Raises ShardError for what is not as published, FileNotFoundError if the store
        lacks it, StoreError, OSError if the disk is full or cannot be written.
        """
        while True:
            try:
                file = os.open(self._paths[name], os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                fetched = self._fetched(name, _ROOM_PATIENCE_S, lambda: False)
                if fetched is None:
                    continue
                file = fetched
            try:
                fcntl.flock(file, fcntl.LOCK_SH)
                found = os.fstat(file)
                if found.st_nlink:
                    if time.time_ns() - found.st_mtime_ns > _FRESH_NS:
                        mark_used(file)
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
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS has exclusive locks on such files only
        except FileNotFoundError:
            return True  # what was read is not there any more
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            copy = name, os.fstat(file).st_ino
            if copy in self._sound:
                return False
            with suppress(OSError):  # a place that cannot be read is no better
                if digest_of(file, os.fstat(file).st_size).hexdigest() == self._files[name].sha256:
                    self._sound.add(copy)
                    return False
            if name != INDEX_NAME:  # which open sets keep for as long as they live
                fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(file, path):
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
        until, wrong = self._wrong.get(name, (0.0, ""))
        if time.monotonic() < until:
            raise ShardError(wrong)
        with self._plainly():
            file = self._reserve(name, patience_s)
            if file is None:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # whoever fetches it lets go when it is whole, or is at its end
                if is_at(file, self._part(name)) and self._fill(file, name, stopped):
                    with self._locked():
                        if is_at(file, self._part(name)):
                            os.replace(self._part(name), self.folder / name)
                            mark_used(file)
                            self._sound = {copy for copy in self._sound if copy[0] != name}
                if is_at(file, self.folder / name):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
            return None

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.{self._files[name].num_bytes}.part"

    def _reserve(self, name: str, patience_s: float) -> int | None:
        """Descriptor of a file's part, for which there is room. None if it is whole meanwhile; or with patience of 0 s
        there is no room. Raises StoreError if there is none, and for so long nobody fetches anything."""
        path, part, num_bytes = self.folder / name, self._part(name), self._files[name].num_bytes
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{self.url}/{name} has {num_bytes / 1e9:.3g} GB, the cache {self._root} may hold "
                f"{self.max_bytes / 1e9:.3g} GB. Raise data.cache_gb."
            )
        until, before = 0.0, None
        while True:
            with self._locked():
                if path.exists():
                    return None
                found = list(scan(self._root))
                if part.exists() or self._make_room(num_bytes, found):
                    self._make_folder()
                    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not patience_s:
                return None
            if (now := progress_of(found)) != before:  # what others fetch is theirs until it is whole
                until, before = time.monotonic() + patience_s, now
            elif time.monotonic() > until:
                raise StoreError(
                    f"{self.url}/{name}: no room for its {num_bytes / 1e9:.3g} GB in the cache {self._root}, whose "
                    f"{self.max_bytes / 1e9:.3g} GB are all in use. Raise data.cache_gb, or give this run a data.cache "
                    "of its own."
                )
            time.sleep(_LOOK_S)

    def _make_room(self, num_bytes: int, found: list[CachedFile]) -> bool:
        """Take the least recently used of the files away until so many bytes fit in; none if that is not enough.
        Whether they fit."""
        missing = sum(file.num_bytes for file in found) + num_bytes - self.max_bytes
        if missing > sum(file.num_bytes for file in found if file.may_go):
            return False
        chosen: list[tuple[int, Path]] = []
        try:
            for old in sorted((file for file in found if file.may_go), key=lambda file: file.used_ns):
                if missing <= 0:
                    break
                if (file := claimed(old.path)) is not None:
                    chosen.append((file, old.path))
                    missing -= old.num_bytes
            if missing <= 0:
                for _, path in chosen:
                    path.unlink(missing_ok=True)
            return missing <= 0
        finally:
            for file, _ in chosen:
                os.close(file)

    def _fill(self, file: int, name: str, stopped: Callable[[], bool]) -> bool:
        """Fetch what a part lacks; whether it is whole then. Raises ShardError if it is not what was published."""
        published = self._files[name]
        found = ""
        for _ in range(2):
            done = os.fstat(file).st_size
            digest = digest_of(file, done)
            while done < published.num_bytes:
                if stopped():
                    return False
                piece = self._store.read(name, done, min(done + PIECE_BYTES, published.num_bytes))
                digest.update(piece)
                write_at(file, piece, done)
                done += len(piece)
            if (found := digest.hexdigest()) == published.sha256:
                os.fsync(file)  # or a machine that loses power may find other bytes under the name
                return True
            os.ftruncate(file, 0)  # what was there before may have been wrong
        wrong = (
            f"{self.url}/{name}: its SHA-256 is {found}, dataset.json says {published.sha256}; fetched twice. Publish "
            "it again, from a set that `python -m flow.verify` finds whole."
        )
        self._wrong[name] = time.monotonic() + _WRONG_S, wrong
        raise ShardError(wrong)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all threads and processes; nobody waits for anything else meanwhile."""
        path = self._root / "lock"
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if is_at(file, path):  # or the folder was taken away meanwhile
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
