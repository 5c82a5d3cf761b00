"""A pack that was stopped goes on: what it was started with, which shards are finished, and who may work on it.

OUT/.pack/lock                held by the running pack
OUT/.pack/settings.json       what the pack was started with; to go on, it must be the same
OUT/.pack/shard-000000.json   a finished shard: size, hash, totals, bad videos
OUT/.pack/run-*/              fragments of the shards in work; of no use to the next run
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flow.catalog import Catalog
from flow.shard import shard_name, write_json

WORK_FOLDER = ".pack"


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold the folder's lock: two packs into one folder would take each other's fragments away."""
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another pack into {work.parent} is running. Wait, or choose another --out.") from None
        try:
            yield
        finally:
            if os.listdir(work) == ["lock"]:  # the pack is complete, or was refused
                shutil.rmtree(work)


def clear(work: Path) -> None:
    """Remove all but the lock."""
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def input_digest(catalog: Catalog) -> str:
    """One hash of what is packed: ids, sizes of the files, and splits. The contents are not read for it."""
    listing = [[video.video_id, video.path.stat().st_size] for video in catalog.videos]
    return hashlib.sha256(json.dumps([listing, catalog.splits]).encode()).hexdigest()


def begin(out: Path, settings: dict[str, Any]) -> None:
    work = out / WORK_FOLDER
    if (work / "settings.json").exists():
        compare_settings(out, json.loads((work / "settings.json").read_text("utf-8")), settings)
    elif any(out.glob("shard-*.tar")):
        raise ValueError(f"{out} holds shards of no pack that could go on: no dataset.json. Choose another --out.")
    else:
        write_json(work / "settings.json", settings)
    for stray in [*work.glob("run-*"), *work.glob("*.tmp"), *out.glob("shard-*.tar.tmp")]:
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink()


def compare_settings(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flat(before), _flat(now)
    differing = [f"{key}: {old.get(key)!r} before, {new[key]!r} now" for key in new if old.get(key) != new[key]]
    if differing:
        raise ValueError(
            f"{out} was begun with other settings; {'; '.join(differing)}. Repeat the command as it was, or choose "
            "another --out. (input_sha256 stands for the videos' names and sizes, and the splits.)"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with dotted keys: {"flow": {"method": "dis"}} -> {"flow.method": "dis"}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def state_path(out: Path, number: int) -> Path:
    return out / WORK_FOLDER / f"{Path(shard_name(number)).stem}.json"


def is_finished(out: Path, number: int) -> bool:
    """Whether a shard is noted as finished, and its file is still there in its full size."""
    try:
        shard = json.loads(state_path(out, number).read_text("utf-8"))["shard"]
        return shard is None or (out / shard["name"]).stat().st_size == shard["bytes"]
    except FileNotFoundError:
        return False
