"""What packers share: shards joined from fragments, in a pack that may be stopped and then goes on.

The items (videos, images) of every shard are known before one is opened. Processes turn runs of them into fragments; a
shard is joined from its own, in their order, and noted as finished as soon as they are done. So a shard depends on its
items only: a pack that was killed goes on with the next shard, and the bytes depend neither on the number of processes
nor on how long the runs are. At the end come index, splits and reports, then dataset.json: where it exists, the pack is
complete. All this in a folder; what a store asks for besides is in `flow.publish`.

OUT/.pack/lock                held by the running pack
OUT/.pack/settings.json       what the pack was started with; to go on, it must be the same
OUT/.pack/shard-000000.json   a finished shard: size, hash, totals, bad items
OUT/.pack/shard-000000.husk   what is left here of a finished shard that lies in a store, see `flow.husk`
OUT/.pack/run-*/              fragments of the shards in work; of no use to the next run
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from flow.catalog import Item
from flow.command import describe_error
from flow.dataset import describe_files
from flow.devices import Engine
from flow.fragment import FragmentReport, Totals, reason
from flow.index import build_index, load_index, video_ids
from flow.shard import FORMAT_VERSION, commit_shard, shard_name, write_bytes, write_json
from flow.untrusted import MAX_LIST_BYTES, parse_json, read_bounded

WORK_FOLDER = ".pack"
BAD_NAME = "bad_videos.txt"
MISSING_NAME = "missing_videos.txt"

#: What stops every write, and is no video's fault, with what to do about it.
_DISK_ERRORS = {
    errno.ENOSPC: "Make space",
    errno.EDQUOT: "Make space, or have the quota raised",
    errno.EFBIG: "Raise the limit (ulimit -f)",
    errno.EROFS: "Make it writable",
    errno.EIO: "Check the disk",
}

_DEATH = "ends the process that packs it: crashed in the decoder or the flow method, or killed"


class PackTask(Protocol):
    """A run of items: where its fragment goes, and the files, or folders, that are read for it."""

    @property
    def fragment(self) -> Path: ...

    @property
    def inputs(self) -> Sequence[Path]: ...


Task = TypeVar("Task", bound=PackTask)


class Target:
    """Where a pack goes: a folder. One that goes to a store is a `flow.publish.StoreTarget`.

    folder: where shards are made, and what a pack needs to go on is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, settings: dict[str, Any]) -> bool:
        """Start, or go on. Returns whether the pack is complete already. Raises ValueError if it had other settings."""
        return begin(self.folder, settings)

    def committed(self, number: int) -> None:
        """To be told of every shard that is whole and noted as finished."""

    def build_index(self) -> None:
        """Build the index in the folder, from all shards."""
        build_index(self.folder)

    def complete(self, dataset: dict[str, Any]) -> None:
        """Write dataset.json, last of all. All else is in the folder."""
        write_json(self.folder / "dataset.json", dataset)

    def read(self, name: str) -> bytes:
        """A small file of the complete set. Raises FileNotFoundError."""
        return read_bounded(self.folder / name, MAX_LIST_BYTES)

    def end(self) -> None:
        """Remove what a complete pack needs no more."""
        clear(self.folder / WORK_FOLDER)


@dataclass(frozen=True)
class PackReport:
    """dataset: the content of dataset.json. bad: item id -> reason. was_complete: there was nothing to do.

    missing, unlisted: as in `flow.catalog.Catalog`. untested: classes of which nothing is for testing.
    """

    dataset: dict[str, Any]
    bad: dict[str, str]
    missing: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)
    was_complete: bool = False


# --- going on ----------------------------------------------------------------------------------------------------


@contextmanager
def hold(lock_file: Path, *, wait: bool = False) -> Iterator[int | None]:
    """Lock a file, which is made if it is not there. Yields its descriptor; None if another has it and `wait` is not.

    A child that inherits the descriptor (`pass_fds`) holds the lock as long as it lives.
    """
    with open(lock_file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield lock.fileno()


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold a pack's folder: two packs into one folder would take each other's fragments away."""
    work.mkdir(exist_ok=True)
    with hold(work / "lock") as lock:
        if lock is None:
            raise ValueError(f"Another pack into {work.parent} is running. Wait, or choose another --out.")
        try:
            yield
        finally:
            sweep(work)  # on a full disk, what is of no use to the next run makes room
            if os.listdir(work) == ["lock"]:  # the pack is complete, or was refused
                shutil.rmtree(work)


def sweep(work: Path) -> None:
    """Remove what a run that was stopped has left half done."""
    for fragments in work.glob("run-*"):
        shutil.rmtree(fragments, ignore_errors=True)  # a process of a killed pack may still be dying in there
    with suppress(OSError):  # a disk that refuses this says so at the next write
        for stray in [*work.glob("*.tmp"), *work.parent.glob("shard-*.tar.tmp")]:
            stray.unlink()
        token = "[0-9a-f]" * 8  # as `flow.shard.write_bytes` names what it has not finished
        for pattern in (f"dataset.json.{token}.tmp", f"*_videos.txt.{token}.tmp", f"splits/*.txt.{token}.tmp"):
            for stray in work.parent.glob(pattern):
                stray.unlink()


def clear(work: Path) -> None:
    """Remove all but the lock."""
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def input_digest(listing: Sequence[Sequence[Any]], splits: dict[str, list[str]]) -> str:
    """One hash of what is packed: a row of id, file size, ... of every item, and splits. No content is read for it."""
    return hashlib.sha256(json.dumps([listing, splits]).encode()).hexdigest()


def begin(out: Path, settings: dict[str, Any], url: str | None = None) -> bool:
    """As `Target.begin`, in a folder. url: of the store that its shards go to."""
    work = out / WORK_FOLDER
    if (out / "dataset.json").exists():
        compare_settings(out, _read_table(out / "dataset.json"), settings)
        return True
    settings = {"url": url, **settings}
    if (work / "settings.json").exists():
        compare_settings(out, _read_table(work / "settings.json"), settings)
    elif any(out.glob("shard-*.tar")):
        raise ValueError(f"{out} holds shards of no pack that could go on: no dataset.json. Choose another --out.")
    else:
        write_json(work / "settings.json", settings)
    sweep(work)
    return False


def compare_settings(out: Path | str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if a setting is another one. A missing key means None: packs from before it existed lack it."""
    if differing := list(_differing(before, now)):
        other = "--work DIR" if now.get("url") and before.get("url") != now["url"] else "--out"
        raise ValueError(
            f"{out} was begun with other settings; {'; '.join(differing)}. Repeat the command as it was, or choose "
            f"another {other}. (input_sha256 stands for names and sizes of what is packed, and the splits.)"
        )


def _differing(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs, with dotted keys: "flow.method: 'dis' before, 'tvl1' now"."""
    for key, new in now.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {old!r:.200} before, {new!r:.200} now"


def _read_table(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, and ValueError for anything else."""
    return parse_table(read_bounded(path), path)


def parse_table(content: bytes, path: Path | str) -> dict[str, Any]:
    """A JSON object that was read from somewhere. Raises ValueError for anything else."""
    remedy = "Choose another --out, or take this folder away."
    try:
        table = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object. {remedy}")
    return table


def explain(error: Exception, out: Path | str) -> str:
    """What ended a pack, in one line; where the disk did, what to do."""
    remedy = _DISK_ERRORS.get(error.errno or 0) if isinstance(error, OSError) else None
    if not isinstance(error, OSError) or remedy is None:
        return describe_error(error)
    return (
        f"{error.filename or out}: {error.strerror}. {remedy}; what is finished is safe, and the same command goes on "
        "with the shards that are left."
    )


def state_path(out: Path, number: int) -> Path:
    return out / WORK_FOLDER / f"{Path(shard_name(number)).stem}.json"


def husk_path(out: Path, number: int) -> Path:
    return state_path(out, number).with_suffix(".husk")


def is_finished(out: Path, number: int) -> bool:
    """Whether a shard is noted as finished, and its file is still there in its full size, or lies in a store."""
    try:
        shard = read_state(out, number)["shard"]
        if shard is None or husk_path(out, number).exists():
            return True
        return bool((out / shard["name"]).stat().st_size == shard["bytes"])
    except (FileNotFoundError, ValueError):  # a damaged note: the shard is written again
        return False


def read_state(out: Path, number: int) -> dict[str, Any]:
    """The note of a finished shard. Raises FileNotFoundError, and ValueError if it is none."""
    state = _read_table(state_path(out, number))
    try:
        Totals(**state["totals"])
        shard = state["shard"]
        sound = shard is None or (shard["name"] == shard_name(number) and type(shard["bytes"]) is int)
        sound &= isinstance(state["bad"], dict) and (shard is None or isinstance(shard["sha256"], str))
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{state_path(out, number)} is damaged. Take it away, and run the command again.")
    return state


# --- shards ------------------------------------------------------------------------------------------------------


def write_shards(
    shards: Sequence[Sequence[Item]],
    target: Target,
    make_task: Callable[[Path, Sequence[Item]], Task],
    write: Callable[[Task], FragmentReport],
    *,
    items_per_task: int,
    engine: Engine,
    unit: str,
    check: Callable[[], object] | None = None,
) -> None:
    """Write the shards that are not finished yet, in the engine's processes.

    make_task(fragment, items): what `write`, a function of a module, needs to turn a run of up to items_per_task items
    into a fragment. If that ends its process, and does so again when it is repeated alone, the run's items are packed
    one by one, and only the culprit is bad.
    check: with it the same holds for a RuntimeError, if `check` passes then; if it is the machine that fails, and not
    the item, it raises, and the pack can go on later.
    """
    out = target.folder
    todo = [number for number in range(len(shards)) if not is_finished(out, number)]
    run = Path(tempfile.mkdtemp(prefix="run-", dir=out / WORK_FOLDER))
    left = {number: len(shards[number]) for number in todo}
    reports: dict[int, dict[Path, FragmentReport]] = {number: {} for number in todo}
    runs: dict[Path, tuple[int, range]] = {}
    for number in todo:
        runs |= _cut(run, number, range(len(shards[number])), items_per_task)
    total = sum(map(len, shards))
    with tqdm(total=total, initial=total - sum(left.values()), desc="packing", unit=unit, disable=None) as bar:
        while runs:
            tasks = (make_task(path, shards[number][at.start : at.stop]) for path, (number, at) in runs.items())
            crashed: dict[Path, tuple[int, range]] = {}
            with closing(engine.run(write, tasks, check and partial(_failed, check))) as results:
                for task, report in results:
                    number, places = runs[task.fragment]
                    report = report or FragmentReport(failure=_DEATH)
                    if report.failure and len(places) > 1:
                        crashed |= _cut(run, number, places, 1)
                        continue
                    if report.failure:
                        report = FragmentReport(bad={shards[number][places[0]].video_id: report.failure})
                    reports[number][task.fragment] = report
                    bar.update(len(places))
                    left[number] -= len(places)
                    if not left[number]:
                        _commit(out, number, reports.pop(number))
                        target.committed(number)
            runs = crashed


def _failed(check: Callable[[], object], task: Any, error: RuntimeError) -> FragmentReport:
    check()
    return FragmentReport(failure=f"fails, also when tried again alone: {type(error).__name__}: {reason(error)}")


def _cut(folder: Path, number: int, places: range, size: int) -> dict[Path, tuple[int, range]]:
    """Fragment -> (shard, places in it) of runs of `size` items; the fragments' names sort as the items do."""
    parts = [places[at : at + size] for at in range(0, len(places), size)]
    return {folder / f"{number:06d}-{part[0]:06d}": (number, part) for part in parts}


def _commit(out: Path, number: int, reports: dict[Path, FragmentReport]) -> None:
    """Join the fragments of a shard in their order, and note that it is finished."""
    fragments = [path for path in sorted(reports) if reports[path].totals.num_videos]
    shard = None  # where all items are bad; the numbers of the other shards stay as they are
    if fragments:
        num_bytes, digest = commit_shard(fragments, out / shard_name(number))
        shard = {"name": shard_name(number), "bytes": num_bytes, "sha256": digest}
    totals = Totals()
    bad: dict[str, str] = {}
    for report in reports.values():
        totals.add(report.totals)
        bad |= report.bad
    write_json(state_path(out, number), {"shard": shard, "totals": asdict(totals), "bad": bad})
    for fragment in fragments:
        fragment.unlink()


# --- end ---------------------------------------------------------------------------------------------------------


def finish(
    target: Target,
    num_shards: int,
    settings: dict[str, Any],
    splits: Mapping[str, Sequence[str]],
    summarise: Callable[[Totals, int], dict[str, int | float]],
    *,
    item_of: Callable[[str], str] = str,
    unit: str,
) -> None:
    """Index, splits, list of bad items, and last of all dataset.json.

    splits: name -> ids of items. item_of: id of a packed video -> id of the item it comes from.
    summarise(totals, bytes of all shards): what dataset.json says under "summary", besides the number of bad items.
    Raises ValueError if nothing could be packed.
    """
    out = target.folder
    states = [read_state(out, number) for number in range(num_shards)]
    bad = {item: reason for state in states for item, reason in state["bad"].items()}
    write_lines(out / BAD_NAME, [f"{item}\t{bad[item]}" for item in sorted(bad)])
    totals = Totals()
    for state in states:
        totals.add(Totals(**state["totals"]))
    if totals.num_videos == 0:
        first = min(bad)
        raise ValueError(
            f"None of the {len(bad)} {unit}s can be packed; {first} {bad[first]}. All reasons: {out / BAD_NAME}."
        )
    target.build_index()
    header, arrays = load_index(out)
    packed: dict[str, list[str]] = {}
    for video_id in video_ids(arrays):
        packed.setdefault(item_of(video_id), []).append(video_id)
    (out / "splits").mkdir(exist_ok=True)
    for name, items in splits.items():
        ids = [video_id for item in items for video_id in packed.get(item, ())]
        write_lines(out / "splits" / f"{name}.txt", ids, keep=True)
    shards = [state["shard"] for state in states if state["shard"]]
    dataset = {
        "format_version": FORMAT_VERSION,
        **settings,
        "classes": header["classes"],
        "num_videos": totals.num_videos,
        "num_frames": totals.num_frames,
        "num_fields": totals.num_fields,
        "summary": {**summarise(totals, sum(shard["bytes"] for shard in shards)), "bad": len(bad)},
        "shards": shards,
        "files": describe_files(out),
    }
    target.complete(dataset)


def read_report(target: Target, **more: Any) -> PackReport:
    """Report of a complete pack; `more` are fields that stand in no file."""
    try:
        lines = target.read(BAD_NAME).decode().splitlines()
    except FileNotFoundError:
        lines = []
    bad = dict(line.split("\t", 1) for line in lines)
    return PackReport(parse_table(target.read("dataset.json"), "dataset.json"), bad, **more)


def write_lines(path: Path, lines: Sequence[str], keep: bool = False) -> None:
    """One line each, atomically. Without lines there is no file, unless `keep`."""
    if lines or keep:
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)
