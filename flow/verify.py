"""Is a packed data set what was written? `python -m flow.verify DIR [--deep]`, and `--rebuild-index`.

    shard       bytes and SHA-256                  against dataset.json
    member      size, CRC-32, coded image size     against the clip's JSON; with --deep it is decoded
    index       every entry                        against the tars
    splits      every video id                     against the index; as dataset.json has it, its SHA-256

Every damage is named, and what lies behind it in the shard is still checked. An index is rebuilt from sound tars only:
the CRC-32 in the clips' JSON is of the bytes as they were packed, so that rebuilding cannot launder damage.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from flow.clips import MemberPlace, decode_image, read_clips, read_image
from flow.command import Parser, describe_error, nearest_path
from flow.dataset import describe_files, no_packed_set, read_dataset
from flow.index import build_index, image_places, load_index, scan_shards, video_ids
from flow.pool import default_num_workers, run_pool
from flow.shard import CLIP_FRAMES, KINDS, ShardError, member_name, write_json
from flow.untrusted import read_lines


@dataclass(frozen=True)
class ShardTask:
    """A shard to check. num_bytes, sha256: of dataset.json, or None if only the tar itself can be asked."""

    root: Path
    name: str
    num_bytes: int | None
    sha256: str | None
    deep: bool


@dataclass
class ShardReport:
    num_members: int = 0
    damages: list[str] = field(default_factory=list)


def verify(root: Path, deep: bool = False, num_workers: int | None = None) -> ShardReport:
    """Check a packed data set. Returns the number of images checked and a line for every damage found.

    Raises ValueError if the folder holds no complete pack.
    """
    dataset = _read_dataset(root)
    if dataset is None:
        raise ValueError(no_packed_set(root))
    tasks = [ShardTask(root, shard["name"], shard["bytes"], shard["sha256"], deep) for shard in dataset["shards"]]
    report = _verify_shards(tasks, num_workers)
    known = {task.name for task in tasks}
    for path in sorted(root.glob("shard-*.tar")):
        if path.name not in known:
            report.damages.append(f"{path.name}: is no part of this data set: dataset.json does not name it.")
    damages = _verify_index(root, dataset)
    report.damages += damages or _verify_files(root, dataset)
    return report


def rebuild_index(root: Path, num_workers: int | None = None) -> ShardReport:
    """Build the index again from the tars alone, if they are sound; the report says whether they are.

    What dataset.json says of the index and of the lists of videos, which may have changed too, is written anew.
    """
    dataset = _read_dataset(root)
    shards = {shard["name"]: shard for shard in (dataset or {"shards": []})["shards"]}
    names = sorted({path.name for path in root.glob("shard-*.tar")} | set(shards))
    if not names:
        raise ValueError(f"{root} holds no shard-*.tar: no packed data set.{nearest_path(root)}")
    entries = [shards.get(name, {"bytes": None, "sha256": None}) for name in names]
    tasks = [
        ShardTask(root, name, entry["bytes"], entry["sha256"], deep=False)
        for name, entry in zip(names, entries, strict=True)
    ]
    report = _verify_shards(tasks, num_workers)
    if not report.damages:
        build_index(root)
        if dataset is not None:
            write_json(root / "dataset.json", {**dataset, "files": describe_files(root)})
    return report


def _read_dataset(root: Path) -> dict[str, Any] | None:
    try:
        return read_dataset(root)
    except FileNotFoundError:
        return None


def _verify_shards(tasks: list[ShardTask], num_workers: int | None) -> ShardReport:
    total = ShardReport()
    reports: dict[str, ShardReport] = {}
    with tqdm(total=len(tasks), desc="checking", unit="shard", disable=None) as bar:
        for task, report in run_pool(verify_shard, tasks, num_workers or default_num_workers()):
            reports[task.name] = report or ShardReport(damages=[f"{task.name}: ends the process that reads it."])
            bar.update()
    for _, report in sorted(reports.items()):
        total.num_members += report.num_members
        total.damages += report.damages
    return total


def verify_shard(task: ShardTask) -> ShardReport:
    """Check one shard: its hash, then every image, as far as its tar can be read, and beyond that by the index."""
    report = ShardReport()
    path = task.root / task.name
    wrong = size_damage(path, task.num_bytes)
    report.damages += [wrong] if wrong else []
    if not path.is_file():
        return report
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not wrong and task.sha256 not in (None, digest):
            report.damages.append(f"{task.name}: SHA-256 is {digest}, {task.sha256} was written.")
        seen = set()
        try:
            for place in _places_in_tar(path):
                seen.add(place.offset)
                _check(file, task, place, report)
        except ShardError as error:
            report.damages.append(str(error))
            for place in _places_in_index(task):
                if place.offset not in seen:
                    _check(file, task, place, report)
    return report


def size_damage(path: Path, num_bytes: int | None) -> str:
    """What is wrong with a shard's file, before it is read; "" if it is there, with as many bytes as were written."""
    if not path.is_file():  # a FIFO or device is none
        return f"{path.name}: is missing. Restore it from a copy, or pack the set again."
    found = path.stat().st_size
    return "" if num_bytes in (None, found) else f"{path.name}: has {found} bytes, {num_bytes} were written."


def _check(file: BinaryIO, task: ShardTask, place: MemberPlace, report: ShardReport) -> None:
    report.num_members += 1
    try:
        content = read_image(file, place)
        if task.deep:
            decode_image(content, place)
    except ShardError as error:
        report.damages.append(str(error))


def _places_in_tar(path: Path) -> Iterator[MemberPlace]:
    for clip in read_clips(path):
        for kind, (first, entries) in clip.entries.items():
            for frame, row in enumerate(entries, first):
                number = clip.first_frame // CLIP_FRAMES
                name = member_name(clip.video_id, number, kind, frame - clip.first_frame)
                place = int(row["offset"]), int(row["size"]), int(row["crc32"])
                yield MemberPlace(path.name, name, kind, *place, b"", clip.height, clip.width)


def _places_in_index(task: ShardTask) -> Iterator[MemberPlace]:
    """The images of a shard by the index; none if that is damaged too, which its own check reports."""
    try:
        header, arrays = load_index(task.root)
    except ShardError:
        return
    numbers = [number for number, shard in enumerate(header["shards"]) if shard["name"] == task.name]
    for number in np.flatnonzero(np.isin(arrays["videos"]["shard"], numbers)):
        frames = np.arange(int(arrays["videos"]["num_frames"][number]))
        for kind in (kind for kind in KINDS if kind in arrays):
            yield from image_places(header, arrays, int(number), kind, frames)


def _verify_index(root: Path, dataset: dict[str, Any]) -> list[str]:
    """Hold the index against the tars, and dataset.json and the splits against the index."""
    rebuild = f"Rebuild it: `python -m flow.verify {root} --rebuild-index`."
    try:
        header, arrays = load_index(root)
    except ShardError as error:
        return [str(error)]
    try:
        fresh_header, fresh = scan_shards(root)
    except ShardError:
        return []  # named with its shard
    damages = [
        f"index: {name} differs from the tars. {rebuild}"
        for name in sorted(arrays.keys() | fresh.keys())
        if name not in arrays or name not in fresh or not np.array_equal(arrays[name], fresh[name])
    ]
    damages += [
        f"index: {key} are not those of the tars. {rebuild}"
        for key, value in fresh_header.items()
        if header.get(key) != value
    ]
    if dataset["classes"] != fresh_header["classes"] or dataset["num_videos"] != len(fresh["videos"]):
        damages.append("dataset.json: classes or number of videos are not those of the tars. Pack the set again.")
    known = set(video_ids(fresh))
    for path in sorted((root / "splits").glob("*.txt")):
        strange = [video_id for video_id in read_lines(path) if video_id and video_id not in known]
        damages += [f"splits/{path.name}: {video_id!r} is in no shard." for video_id in strange]
    return damages


def _verify_files(root: Path, dataset: dict[str, Any]) -> list[str]:
    """Hold index and lists against what dataset.json says of them: whoever reads the set from a store refuses others.

    Lists that it does not name are the user's own.
    """
    found = {entry["name"]: entry for entry in describe_files(root)}
    return [
        f"{entry['name']}: {'has changed' if entry['name'] in found else 'is missing'} since dataset.json was written. "
        f"Restore it; or, if that was you: `python -m flow.verify {root} --rebuild-index`."
        for entry in dataset.get("files", [])
        if found.get(entry["name"]) != entry
    ]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m flow.verify",
        description="Check every byte of a packed data set, and name what is damaged.",
        epilog="examples:\n"
        "  python -m flow.verify packed --deep\n"
        "  python -m flow.verify packed --rebuild-index\n\n"
        "exit code: 0 sound; 1 damaged; 2 there is nothing to check, the message says why",
    )
    parser.add_argument("root", type=Path, metavar="DIR", help="folder of a packed data set")
    parser.add_argument("--deep", action="store_true", help="decode every image too")
    parser.add_argument(
        "--rebuild-index",
        action="store_true",
        help="build the index again from the tars alone, and let dataset.json describe it and the lists in splits/",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    options = parser.parse_args(argv)
    try:
        if options.rebuild_index:
            report = rebuild_index(options.root, options.workers)
        else:
            report = verify(options.root, options.deep, options.workers)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    for line in report.damages:
        print(line)
    print(f"{options.root}: {report.num_members:,} images checked, {len(report.damages):,} damages")
    if options.rebuild_index:
        print("The index was not touched: the tars are damaged." if report.damages else "The index was rebuilt.")
    return int(bool(report.damages))


if __name__ == "__main__":
    sys.exit(main())
