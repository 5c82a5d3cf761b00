"""Packed sets in a bucket: what a pack sends there as it goes on, and `python -m flow.publish DIR s3://bucket/set`.

A pack works in a folder, as one without a store does (`flow.resume`). A thread sends every shard that is whole, and
what is then left of it here is its husk. The packing waits when more than a few shards wait: the folder stays small.
At the end come index, lists and reports, then dataset.json: where it exists, the set is complete.

    finished            noted, the tar in the folder             what a stopped pack has still to send
    published           its husk in the folder, and no tar       never computed again, unless the store has lost it
"""

import argparse
import hashlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flow.command import Parser, describe_error, say, tidy_end
from flow.dataset import describe_files, no_packed_set, read_dataset
from flow.husk import read_husk, write_husk
from flow.index import INDEX_NAME, scan_clips, write_index
from flow.resume import (
    BAD_NAME,
    MISSING_NAME,
    WORK_FOLDER,
    Target,
    begin,
    clear,
    compare_settings,
    husk_path,
    is_finished,
    locked,
    parse_table,
    read_state,
)
from flow.shard import json_bytes, shard_name
from flow.shard import publish as give_name
from flow.store import PIECE_BYTES, Store, is_url
from flow.untrusted import MAX_JSON_BYTES, MAX_LIST_BYTES, read_bounded

logger = logging.getLogger(__name__)

#: Whole shards that wait to be sent, with the one on its way, before packing waits too.
_MAX_WAITING = 3
#: Waits between attempts to send a shard, s: nobody may be there at night to start a pack again.
_PAUSES_S = (0.2, 1.0, 3.0, 8.0, 30.0, 60.0)


# --- where a pack goes -------------------------------------------------------------------------------------------


@contextmanager
def open_target(out: Path | str, work: Path | None = None) -> Iterator[Target]:
    """Where a pack goes, held against other packs: a folder, or a URL, and then a folder `work` for what is not sent.

    Raises ValueError if a web server is to be written to, or `work` is given for a folder; StoreError, ImportError.
    """
    if not is_url(out):
        if work is not None:
            raise ValueError(f"--work {work} is for --out s3://...: a pack into a folder works there. Leave it out.")
        Path(out).mkdir(parents=True, exist_ok=True)
        with locked(Path(out) / WORK_FOLDER):
            yield Target(Path(out))
        return
    store = Store(str(out), pauses_s=_PAUSES_S)
    there = Store(str(out)).names()  # now, in less time: a wrong URL leaves no folder behind
    folder = work or work_folder(str(out))
    folder.mkdir(parents=True, exist_ok=True)
    target = StoreTarget(store, folder, there)
    try:
        with locked(folder / WORK_FOLDER):
            try:
                yield target
            finally:
                target.close()
    finally:
        with suppress(OSError):  # it is not empty: the pack is not complete, or there is more than ours
            folder.rmdir()


def work_folder(url: str) -> Path:
    """Where a pack into a store works unless it is told: ./packing-set for s3://bucket/set."""
    return Path(f"packing-{url.rstrip('/').rpartition('/')[2]}")


class StoreTarget(Target):
    """A pack into a store. there: the files that it has already, with their bytes."""

    def __init__(self, store: Store, folder: Path, there: dict[str, int]) -> None:
        super().__init__(folder)
        self._store, self._there = store, there
        self._uploads = _Uploads(self._send, self._bury)

    def begin(self, settings: dict[str, Any]) -> bool:
        """As of Target. Raises ValueError also if shards lie in the store of which the folder knows nothing, or the
        folder holds something else."""
        url, work = self._store.url, self.folder / WORK_FOLDER
        if "dataset.json" in self._there:
            compare_settings(url, parse_table(self.read("dataset.json"), f"{url}/dataset.json"), settings)
            return True
        if not (work / "settings.json").exists():
            if any(name.startswith("shard-") for name in self._there):
                raise ValueError(
                    f"{url} holds shards, but no dataset.json, and {self.folder} is no work folder of its pack. Go on "
                    "with the one that it has (--work DIR, or in the folder where it was started), choose another "
                    "--out, or remove the shards."
                )
            if others := sorted(path.name for path in self.folder.iterdir() if path.name != WORK_FOLDER):
                raise ValueError(
                    f"{self.folder} holds {others[0]!r}, and no pack into {url}. Choose another --work: a new folder."
                )
        begin(self.folder, settings, url)
        self._go_on()
        return False

    def _go_on(self) -> None:
        """Hold what is published against the store, and send what was not. Raises ValueError if more lies there."""
        # A shard is noted before it is sent.
        stems = {path.stem for path in (self.folder / WORK_FOLDER).glob("shard-*")}
        self._check_strange(self._there, {f"{stem}.tar" for stem in stems})
        for husk in sorted((self.folder / WORK_FOLDER).glob("shard-*.husk")):
            number = int(husk.stem.removeprefix("shard-"))
            if is_finished(self.folder, number) and self._has(read_state(self.folder, number)["shard"], self._there):
                (self.folder / shard_name(number)).unlink(missing_ok=True)
            else:
                logger.warning("%s: %s is there no more; it is packed again", self._store.url, shard_name(number))
                husk.unlink()
        for tar in sorted(self.folder.glob("shard-*.tar")):
            number = int(tar.stem.removeprefix("shard-"))
            if is_finished(self.folder, number):
                self.committed(number)

    def _has(self, shard: dict[str, Any], there: dict[str, int]) -> bool:
        return there.get(shard["name"]) == shard["bytes"]

    def committed(self, number: int) -> None:
        """As of Target. Waits while too many shards wait to be sent. Raises what sending one raised."""
        if read_state(self.folder, number)["shard"] is not None:
            self._uploads.add(number)

    def _send(self, number: int) -> None:
        put_shard(self._store, self.folder, read_state(self.folder, number)["shard"])
        write_husk(self.folder / shard_name(number), self._unfinished(number))

    def _bury(self, number: int) -> None:
        """Note that a shard is published."""
        give_name(self._unfinished(number), husk_path(self.folder, number))
        (self.folder / shard_name(number)).unlink()

    def _unfinished(self, number: int) -> Path:
        """A husk, which takes seconds, on its way to its name."""
        husk = husk_path(self.folder, number)
        return husk.with_name(f"{husk.name}.tmp")

    def build_index(self) -> None:
        """As of Target, from the husks. Waits until all shards are published."""
        self._uploads.wait()
        shards = []
        for husk in sorted((self.folder / WORK_FOLDER).glob("shard-*.husk")):
            shard = read_state(self.folder, int(husk.stem.removeprefix("shard-")))["shard"]
            shards.append((shard["name"], shard["bytes"], read_husk(husk)))
        write_index(self.folder, *scan_clips(shards))

    def complete(self, dataset: dict[str, Any]) -> None:
        """As of Target. Raises ValueError if the store has not the shards that were sent, and no others."""
        there = self._store.names()
        lost = [shard["name"] for shard in dataset["shards"] if not self._has(shard, there)]
        known = {shard["name"] for shard in dataset["shards"]}
        if lost:
            raise ValueError(
                f"{self._store.url}: {lost[0]} is not what was sent. "
                "Does another pack go there? Give each its own --out; the same command packs again what is missing."
            )
        self._check_strange(there, known)
        put_rest(self._store, self.folder, dataset, there)

    def _check_strange(self, there: Iterable[str], known: set[str]) -> None:
        if strange := sorted(name for name in there if name.startswith("shard-") and name not in known):
            raise ValueError(
                f"{self._store.url}: {strange[0]} is of no shard of this pack. Remove it from the bucket, or choose "
                "another --out; the same command goes on."
            )

    def read(self, name: str) -> bytes:
        return self._store.read_small(name, MAX_LIST_BYTES)

    def end(self) -> None:
        """As of Target: all that the pack has made in the folder, which may hold nothing of this pack, if anything."""
        settings = self.folder / WORK_FOLDER / "settings.json"
        if settings.exists() and parse_table(read_bounded(settings), settings).get("url") == self._store.url:
            for path in (self.folder / "splits").glob("*.txt"):
                path.unlink()
            with suppress(OSError):
                (self.folder / "splits").rmdir()
            for name in (INDEX_NAME, BAD_NAME, MISSING_NAME):
                (self.folder / name).unlink(missing_ok=True)
            clear(self.folder / WORK_FOLDER)

    def close(self) -> None:
        """Leave the folder as it is: what is on its way is given up."""
        self._uploads.close()


class _Uploads:
    """A thread that sends shards in their order. bury: what to do at once when one is sent; never after `close`."""

    def __init__(self, send: Callable[[int], None], bury: Callable[[int], None]) -> None:
        self._send, self._bury = send, bury
        self._waiting: deque[int] = deque()  # the first is on its way
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._closed = False
        # A daemon: an upload that hangs keeps no command from ending.
        self._thread = threading.Thread(target=self._work, daemon=True)

    def add(self, number: int) -> None:
        """Have a shard sent; waits while there are many. Raises what sending raised."""
        if self._thread.ident is None:
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._waiting) < _MAX_WAITING)
            self._check()
            self._waiting.append(number)
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all are sent. Raises what sending raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._waiting)
            self._check()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._waiting)
                    if self._closed:
                        return
                    number = self._waiting[0]
                self._send(number)
                with self._changed:
                    if self._closed:
                        return
                    self._bury(number)
                    self._waiting.popleft()
                    self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


# --- what is sent ------------------------------------------------------------------------------------------------


def put_shard(store: Store, folder: Path, shard: dict[str, Any]) -> None:
    """Send a shard that dataset.json, or its note, describes. Raises ValueError if it is damaged; StoreError."""
    path = folder / shard["name"]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard["sha256"]:
        raise ValueError(
            f"{path}: SHA-256 is {found}, {shard['sha256']} was written. Check the disk; take the file away, and pack "
            "again, or restore it from a copy."
        )
    store.put(path, shard["name"])


def put_rest(store: Store, folder: Path, dataset: dict[str, Any], there: Container[str]) -> None:
    """Send what belongs to a set besides its shards, and dataset.json last of all. there: names that the store has."""
    for entry in dataset["files"]:
        store.put(folder / entry["name"], entry["name"])
    for name in (BAD_NAME, MISSING_NAME):
        if (folder / name).exists():
            store.put(folder / name, name)
        elif name in there:  # of an earlier set, whose files were not all removed
            store.put_bytes(b"", name)
    store.put_bytes(json_bytes(dataset), "dataset.json")


def publish(root: Path, url: str) -> int | None:
    """Copy a packed set from its folder to a store, or go on with a copy that was stopped.

    A shard that is there in its size is read and hashed, and sent if it differs. Returns how many were sent; None if
    the set was there. Raises ValueError if the folder is no packed set, its dataset.json does not describe its index
    and lists, or another set is there; StoreError, ImportError.
    """
    try:
        dataset = read_dataset(root)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(no_packed_set(root)) from None
    if dataset.get("files") != describe_files(root):
        raise ValueError(
            f"{root}: dataset.json does not describe index.bin and splits/ as they are: it is old, or lists have "
            f"changed. Run `python -m flow.verify {root} --rebuild-index`."
        )
    store = Store(url, pauses_s=_PAUSES_S)
    there = Store(url).names()
    if "dataset.json" in there:
        if store.read_small("dataset.json", MAX_JSON_BYTES) != json_bytes(dataset):
            raise ValueError(f"{store.url} holds another packed set. Choose another URL.")
        return None
    shards = {shard["name"]: shard for shard in dataset["shards"]}
    if strange := sorted(name for name in there if name.startswith("shard-") and name not in shards):
        raise ValueError(f"{store.url}: {strange[0]} is of another set. Choose another URL, or remove it.")
    num_sent = 0
    for name, shard in tqdm(shards.items(), desc="sending", unit="shard", disable=None):
        if there.get(name) != shard["bytes"] or _stored_sha256(store, shard) != shard["sha256"]:
            put_shard(store, root, shard)
            num_sent += 1
    put_rest(store, root, dataset, there)
    return num_sent


def _stored_sha256(store: Store, shard: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for at in range(0, shard["bytes"], PIECE_BYTES):
        digest.update(store.read(shard["name"], at, min(at + PIECE_BYTES, shard["bytes"])))
    return digest.hexdigest()


# --- command -----------------------------------------------------------------------------------------------------


def add_target_options(parser: argparse._ActionsContainer) -> None:
    """The options of packers that say where a pack goes: `open_target` takes them."""
    parser.add_argument(
        "--out",
        type=lambda text: text if is_url(text) else Path(text),
        required=True,
        metavar="DIR",
        help="folder of the packed data set, or s3://bucket/set",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="with --out s3://bucket/set: folder for what is not sent yet, which going on needs (default: packing-set)",
    )


def announce(out: Path | str, work: Path | None) -> None:
    """Say where a pack into a store works."""
    if is_url(out):
        say(f"Packing in {work or work_folder(str(out))}: what is not in {out} yet, and what going on needs.")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m flow.publish",
        description="Copy a packed data set to a bucket, dataset.json last.\n"
        "Stopped, it goes on with the same command.",
        epilog="example:\n"
        "  python -m flow.publish packed s3://bucket/packed\n\n"
        "exit code: 0 it is there; 2 it is not, the message says why; 130, 143 stopped",
    )
    parser.add_argument("root", type=Path, metavar="DIR", help="folder of a packed data set")
    parser.add_argument("url", metavar="URL", help="where it goes: s3://bucket/set")
    options = parser.parse_args(argv)
    with tidy_end():
        try:
            num_sent = publish(options.root, options.url)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {describe_error(error)}", file=sys.stderr)
            return 2
    if num_sent is None:
        print(f"{options.url} was complete: nothing to do.")
    else:
        print(f"{options.url} is complete; {num_sent:,} shards were sent")
    return 0


if __name__ == "__main__":
    sys.exit(main())
