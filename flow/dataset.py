"""`dataset.json`, which describes a packed set: read, and held against what packers write.

Its "files" are name, bytes and SHA-256 of the index and of every list of videos: all that is read besides the shards,
where nobody can list a folder. Of a folder it is what was there when it was packed: lists may be added later, and
`python -m flow.verify DIR --rebuild-index` describes them too. Sets packed before it was there lack it.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flow.codec import Codec
from flow.command import folders_with, nearest_path
from flow.shard import FORMAT_VERSION, MAX_CLASS_ID, ShardError, check_class_name
from flow.untrusted import open_regular, parse_json, read_bounded

_SHA256 = re.compile("[0-9a-f]{64}")
_FILE = re.compile(r"index\.bin|splits/[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*\.txt")


def read_dataset(root: Path) -> dict[str, Any]:
    """Content of a folder's `dataset.json`.

    Raises FileNotFoundError, ShardError if it is damaged, and ValueError for an encoding or version that this code does
    not read.
    """
    path = root / "dataset.json"
    try:
        content = read_bounded(path)
    except ValueError as error:
        raise ShardError(_damaged(path, error)) from None
    return parse_dataset(content, path)


def parse_dataset(content: bytes, path: str | Path) -> dict[str, Any]:
    """The same of a file's bytes; path: its name in messages."""
    try:
        dataset = parse_json(content)
        version = dataset["format_version"]
        check_classes(dataset["classes"])
        check_shards(dataset["shards"])
        check_files(dataset.get("files", []))
        whole = (
            type(dataset["num_videos"]) is int
            and isinstance(dataset.get("name"), str | None)
            and isinstance(dataset.get("flow"), dict | None)
            and isinstance(dataset["codec"], dict)
            and all(_SHA256.fullmatch(shard["sha256"]) for shard in dataset["shards"])
        )
        if not whole:
            raise ValueError("a value is of another type than packers write")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(_damaged(path, error)) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r:.40}, this code reads {FORMAT_VERSION}. Pack the set again."
        )
    try:
        Codec.from_metadata(dataset["codec"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dict(dataset)


def _damaged(path: str | Path, error: Exception) -> str:
    return f"{path} is damaged: {error!r:.300}. Restore it from a copy, or pack the set again."


def no_packed_set(root: Path) -> str:
    """What to say of a folder without `dataset.json`: the packed set that may be meant, or how to make one."""
    if re.match(r"(s3|https?):/", str(root)):  # a path has no two slashes
        return f"{root}: a URL, where a folder is expected. Copy the packed set to this machine, and name its folder."
    if near := nearest_path(root):
        return f"{root} is no packed data set: it is not there.{near}"
    if inner := folders_with(root, "dataset.json"):
        return f"{root} is no packed data set: it has no dataset.json. Did you mean {str(inner[0])!r}?"
    return (
        f"{root} is no packed data set: it has no dataset.json. Pack one with `python -m flow.pack`, or images with "
        "`python -m flow.images`; if a pack was stopped, run it again to finish."
    )


def check_classes(classes: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError, TypeError or KeyError unless classes are as `flow.index.scan_shards` makes them."""
    for entry in classes:
        check_class_name(entry["name"])
        number = entry["official_id"]
        if number is not None and not (type(number) is int and 0 <= number <= MAX_CLASS_ID):
            raise ValueError(f"class {entry['name']!r} has the number {number!r:.40}")
    _check_sorted([entry["name"] for entry in classes])


def check_shards(shards: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError, TypeError or KeyError unless shards are as packers write them: no name leaves the folder."""
    for entry in shards:
        is_shard = re.fullmatch(r"shard-[0-9]{6,}\.tar", entry["name"])
        if not is_shard or type(entry["bytes"]) is not int or entry["bytes"] < 0:
            raise ValueError(f"{entry!r:.200} describes no shard-000000.tar")
    _check_sorted([entry["name"] for entry in shards])


def check_files(files: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError, TypeError or KeyError unless files are as `describe_files` makes them: none lies elsewhere."""
    for entry in files:
        sound = _FILE.fullmatch(entry["name"]) and type(entry["bytes"]) is int and _SHA256.fullmatch(entry["sha256"])
        if not sound:
            raise ValueError(f"{entry!r:.200} describes no index.bin and no splits/NAME.txt")
    _check_sorted([entry["name"] for entry in files])


def describe_files(root: Path) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of a folder's index and lists. Raises ValueError for what is no file, OSError."""
    lists = [f"splits/{path.name}" for path in sorted((root / "splits").glob("*.txt"))]
    described = []
    for name in ["index.bin", *filter(_FILE.fullmatch, lists)]:
        with open_regular(root / name) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            described.append({"name": name, "bytes": file.tell(), "sha256": digest.hexdigest()})
    return described


def _check_sorted(names: list[str]) -> None:
    if names != sorted(set(names)):
        raise ValueError(f"its {len(names)} classes, shards or files are not in order, or one stands there twice")
