"""Which videos a data set has, of which class, and in which official split: folders and list files, no video is opened.

    Archery/v_Archery_g01_c01.avi     class Archery, id Archery/v_Archery_g01_c01

The id is the path below the data set's folder, without the extension, so that a list finds a video that was converted
from .avi to .mp4. The class is the name of the folder that holds the video.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from flow.command import did_you_mean, nearest_path
from flow.shard import check_class_name, check_video_id
from flow.untrusted import MAX_JSON_BYTES, read_lines
from flow.video import VIDEO_EXTENSIONS

TEST_SHARE = 0.3


@dataclass(frozen=True)
class Video:
    video_id: str
    class_name: str
    path: Path


Item = TypeVar("Item", bound=Video)


@dataclass(frozen=True)
class Lists:
    """What the list files of a data set say, whether or not the videos are there.

    official_ids: class name -> number, where the data set's authors number their classes.
    splits: "split1_train", "split1_test", ... -> video ids. unused: ids that the lists name for no side of a split.
    """

    official_ids: dict[str, int] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Catalog:
    """A data set on disk. Videos are sorted by id; splits name only videos that are present.

    missing: ids that a list names and the folder lacks. unlisted: ids in the folder that no list names; they are part
    of the data set, but of none of its splits.
    """

    name: str
    videos: list[Video]
    official_ids: dict[str, int]
    splits: dict[str, list[str]]
    missing: list[str]
    unlisted: list[str]


def read_catalog(root: Path, splits_dir: Path | None = None, dataset: str | None = None, seed: int = 0) -> Catalog:
    """Describe the data set in the folder `root`.

    dataset: "ucf101" or "hmdb51", whose list files lie in `splits_dir`; "folder", a seeded split by class folders, or
    None to tell by the files' names.
    Raises ValueError for unusable names, contradictory lists, or lists that name none of the videos.
    """
    videos = list_videos(root)
    name, lists = read_lists(splits_dir, dataset)
    return match(name, root, videos, lists or Lists(splits=split_by_folder(videos, seed)))


def read_lists(splits_dir: Path | None, dataset: str | None) -> tuple[str, Lists | None]:
    """Name of a data set and its official lists, which "folder" does not have. Arguments as of `read_catalog`."""
    dataset = dataset or _detect(splits_dir)
    if dataset == "folder":
        if splits_dir is not None:
            raise ValueError(f"The dataset 'folder' makes its own split; it does not read the lists in {splits_dir}.")
        return dataset, None
    if dataset not in LIST_READERS:
        near = did_you_mean(dataset, [*LIST_READERS, "folder"])
        raise ValueError(f"dataset {dataset!r} is unknown; there are {', '.join(LIST_READERS)} and folder.{near}")
    if splits_dir is None:
        raise ValueError(f"The dataset {dataset!r} needs its official list files: give their folder as --splits.")
    _check_lists_folder(splits_dir)
    return dataset, LIST_READERS[dataset](splits_dir)


def list_videos(root: Path, extensions: Set[str] = VIDEO_EXTENSIONS, what: str = "video") -> list[Video]:
    """All videos below a folder, or files of other extensions, sorted by id. Hidden files and folders are passed over.

    Raises ValueError for a folder without videos, a video without a class folder, two files that differ in the
    extension only, and names that no shard can hold.
    """
    if not root.is_dir():
        what = "Give the folder that holds the class folders (Class/clip.avi)."
        raise ValueError(f"{root} is no folder. {what}{nearest_path(root)}")
    videos: dict[str, Video] = {}
    for path in _files(root, extensions):
        relative = path.relative_to(root)
        video_id = relative.with_suffix("").as_posix()
        if len(relative.parts) < 2:
            raise ValueError(
                f"{path} lies in no class folder. Expected Class/{path.name} below {root}: sort files that lie flat, "
                "as ImageNet's validation images are published, into class folders."
            )
        check_video_id(video_id)
        check_class_name(path.parent.name)
        if video_id in videos:
            raise ValueError(f"{videos[video_id].path} and {path} have the same id {video_id!r}. Remove one of them.")
        videos[video_id] = Video(video_id, path.parent.name, path)
    if not videos:
        raise ValueError(f"{root} holds no {what} files; known extensions are {' '.join(sorted(extensions))}.")
    return [videos[video_id] for video_id in sorted(videos)]


def _files(root: Path, extensions: Set[str]) -> Iterator[Path]:
    for folder, files in walk(root):
        for name in files:
            if Path(name).suffix.lower() in extensions:
                yield Path(folder, name)


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder and every one below it, with the names of its files in order. Hidden ones are passed over."""
    seen = set()
    bar = tqdm(os.walk(root, followlinks=True), desc=f"listing {root.name}", unit="folder", delay=1, disable=None)
    for folder, folders, files in bar:
        # Links are followed, since data sets are often linked together; but not in circles.
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        yield folder, sorted(name for name in files if not name.startswith("."))


def seeded_order(ids: list[str], seed: int) -> list[str]:
    """A pseudo-random order that depends on nothing but the ids and the seed: no library's generator, no platform."""
    return sorted(ids, key=lambda video_id: hashlib.sha256(f"{seed}/{video_id}".encode()).digest())


def seeded_shards(items: Sequence[Item], items_per_shard: int, seed: int) -> list[list[Item]]:
    """Items of every shard: a fixed number of the seeded order, bad ones included, since nobody knows them yet."""
    by_id = {item.video_id: item for item in items}
    order = [by_id[video_id] for video_id in seeded_order(list(by_id), seed)]
    return [order[at : at + items_per_shard] for at in range(0, len(order), items_per_shard)]


def split_by_folder(videos: Sequence[Video], seed: int) -> dict[str, list[str]]:
    """One split: of every class 30 % for testing, and at least one video on each side where it has two."""
    classes: dict[str, list[str]] = {}
    for video in videos:
        classes.setdefault(video.class_name, []).append(video.video_id)
    train, test = [], []
    for ids in classes.values():
        order = seeded_order(ids, seed)
        num_test = min(max(1, round(TEST_SHARE * len(ids))), len(ids) - 1)
        test += order[:num_test]
        train += order[num_test:]
    return {"split1_train": sorted(train), "split1_test": sorted(test)}


def match(dataset: str, root: Path, videos: Sequence[Video], lists: Lists) -> Catalog:
    """Hold the lists against the videos that are there. Raises ValueError as `read_catalog` does."""
    present = {video.video_id for video in videos}
    listed = dict.fromkeys(video_id for ids in lists.splits.values() for video_id in ids)
    if present.isdisjoint(listed):
        raise ValueError(
            f"The lists name none of the {len(videos)} videos in {root}. They begin with "
            f"{next(iter(listed), 'nothing')!r}, the folder with {videos[0].video_id!r}: give the folder that holds "
            "the class folders."
        )
    for name, ids in lists.splits.items():
        other = name.replace("_train", "_test")
        if other != name and (both := set(ids) & set(lists.splits.get(other, ()))):
            raise ValueError(f"{min(both)!r} stands in {name} and in {other}; a video is for training or for testing.")
    return Catalog(
        dataset,
        list(videos),
        lists.official_ids,
        {name: [video_id for video_id in ids if video_id in present] for name, ids in lists.splits.items()},
        missing=[video_id for video_id in listed if video_id not in present],
        unlisted=sorted(present - set(listed)),
    )


# --- official list files -----------------------------------------------------------------------------------------


def _detect(splits_dir: Path | None) -> str:
    if splits_dir is None:
        return "folder"
    _check_lists_folder(splits_dir)
    if any(splits_dir.glob("trainlist*.txt")):
        return "ucf101"
    if any(splits_dir.glob("*_test_split*.txt")):
        return "hmdb51"
    raise ValueError(
        f"{splits_dir} holds neither UCF-101's lists (classInd.txt, trainlist01.txt, testlist01.txt) nor HMDB-51's "
        "(<class>_test_split1.txt). Without --splits a seeded split is made."
    )


def _check_lists_folder(splits_dir: Path) -> None:
    if not splits_dir.is_dir():
        what = "Give the folder of the official list files."
        raise ValueError(f"--splits {splits_dir} is no folder. {what}{nearest_path(splits_dir)}")


def _lines(path: Path) -> Iterator[tuple[str, str, int | None]]:
    """(place for errors, video id or name without extension, number behind it or None) of every line of a list."""
    for number, line in enumerate(read_lines(path, MAX_JSON_BYTES), 1):  # CRLF as published, or LF
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        file, *rest = line.strip().rsplit(None, 1)
        if rest and not _is_number(rest[0]):
            file, rest = line.strip(), []
        name, extension = os.path.splitext(file)
        if not re.fullmatch(r"\.\w+", extension):
            raise ValueError(f"{place}: {line!r:.200} is not a video's file name and a number.")
        try:
            check_video_id(name)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        yield place, name, int(rest[0]) if rest else None


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= 9


def read_ucf101_lists(splits_dir: Path) -> Lists:
    """UCF-101: `classInd.txt` ("1 ApplyEyeMakeup"), `trainlist01.txt` ("Class/v_x.avi 1"), `testlist01.txt`."""
    index = splits_dir / "classInd.txt"
    if not index.is_file():
        raise ValueError(f"{splits_dir} lacks classInd.txt, UCF-101's list of classes.")
    rows = [line.split() for line in read_lines(index, MAX_JSON_BYTES) if line.strip()]
    if not all(len(row) == 2 and _is_number(row[0]) for row in rows):
        raise ValueError(f"{index}: expected a number and a class name in every line.")
    official_ids = {name: int(number) for number, name in rows}
    splits = {}
    for train in sorted(splits_dir.glob("trainlist*.txt")):
        test = splits_dir / train.name.replace("train", "test")
        if not test.is_file() or not (number := train.stem.removeprefix("trainlist")).isdecimal():
            raise ValueError(f"{train} needs its counterpart {test.name}: trainlist01.txt goes with testlist01.txt.")
        for side, path in (("train", train), ("test", test)):
            ids = []
            for place, video_id, label in _lines(path):
                class_name = video_id.split("/")[0]
                official_id = official_ids.get(class_name)
                near = "" if official_id else did_you_mean(class_name, official_ids)
                if official_id is None and (label is not None or near):
                    raise ValueError(f"{place}: {class_name!r} is no class of classInd.txt.{near}")
                if label not in (None, official_id):
                    raise ValueError(f"{place}: label {label} for {class_name!r}, {official_id} in classInd.txt.")
                ids.append(video_id)
            splits[f"split{int(number)}_{side}"] = list(dict.fromkeys(ids))
    if not splits:
        raise ValueError(f"{splits_dir} holds no trainlist01.txt.")
    return Lists(official_ids, splits)


def read_hmdb51_lists(splits_dir: Path) -> Lists:
    """HMDB-51: `<class>_test_split<N>.txt`, lines "<file> 0|1|2": unused, training, test. Classes have no numbers."""
    splits: dict[str, list[str]] = {}
    named = set()
    for path in sorted(splits_dir.glob("*_test_split*.txt")):
        class_name, number = path.stem.rsplit("_test_split", 1)
        sides = [f"split{number}_{side}" for side in ("train", "test")]
        for side in sides:
            splits.setdefault(side, [])
        for place, name, use in _lines(path):
            if use not in (0, 1, 2):
                raise ValueError(f"{place}: {use} after {name!r}; expected 0 (unused), 1 (training) or 2 (test).")
            named.add(f"{class_name}/{name}")
            if use:
                splits[sides[use - 1]].append(f"{class_name}/{name}")
    if not splits:
        raise ValueError(f"{splits_dir} holds no <class>_test_split1.txt.")
    return Lists(splits=splits, unused=sorted(named.difference(*splits.values())))


LIST_READERS: dict[str, Callable[[Path], Lists]] = {"ucf101": read_ucf101_lists, "hmdb51": read_hmdb51_lists}
