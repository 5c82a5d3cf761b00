"""Folders of JPEGs that other tools extracted: which videos they hold, and which file is which frame or field.

    DIR/Archery/v_Archery_g01_c01/img_00001.jpg, flow_x_00001.jpg, flow_y_00001.jpg      denseflow, mmaction2
    DIR/v_Archery_g01_c01/...                     flat, as TSN's tools: a list tells the class
    FRAMES/v_Archery_g01_c01/frame000001.jpg      frames in a tree of their own, and the fields either as above or
    DIR/u/v_Archery_g01_c01/frame000001.jpg       in two more, u and v, as gpu_flow writes them

Numbers begin with 0 or 1, with any zeros before them; frames and fields each count from their own first one. T frames
go with T-1 fields. What does not fit is named, and its video left out: a hole is never closed by guessing.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flow.catalog import Lists, Video, walk
from flow.command import nearest_path
from flow.image_sources import IMAGE_EXTENSIONS
from flow.shard import check_class_name, check_video_id

#: How names begin, before the number, and the kind of member that they are.
FRAMES = {"img_": "rgb", "image_": "rgb", "frame_": "rgb", "frame": "rgb"}
FIELDS = {"flow_x_": "dx", "flow_y_": "dy", "x_": "dx", "y_": "dy"}

_KINDS = {"rgb": "frames", "dx": "x components", "dy": "y components"}
_AGAIN = "Extract the video again."

#: A folder, or the tree of such folders, and how the names of the files in it begin.
Place = tuple[Path, Mapping[str, str]]


@dataclass(frozen=True)
class FlowDir(Video):
    """A video in folders of JPEGs. path: the first of them.

    places: all of them, which need not be there. listing: a hash of the images' names, and of the sizes of the first
    and the last in each. problem: why it cannot be packed, if that shows from outside.
    """

    places: tuple[Place, ...]
    listing: str
    problem: str


@dataclass(frozen=True)
class FlowFiles:
    """The files of a video: T frames, and the components (x, y) of T-1 fields."""

    frames: list[Path]
    fields: list[tuple[Path, Path]]


def list_flow_dirs(flow_dir: Path, frames_dir: Path | None, lists: Lists | None) -> list[FlowDir]:
    """All videos, sorted by id: folders that hold images, in any of the trees.

    lists: tell the class of a video without a class folder; one that they do not hold has a `problem`.
    Raises ValueError for unusable folders and names, and without lists for a video without a class folder.
    """
    trees = _trees(flow_dir, frames_dir)
    ids = set(lists.unused).union(*lists.splits.values()) if lists else set()
    counts = Counter(PurePosixPath(video_id).name for video_id in ids)
    official = {name: video_id for video_id in ids if counts[name := PurePosixPath(video_id).name] == 1}
    found: dict[str, dict[Path, Path]] = {}  # id -> tree -> folder in it
    digests: dict[Path, str] = {}
    for root, _ in trees:
        for folder, images in _image_folders(root):
            video_id = _video_id(root, folder, official if lists else None)
            other = found.setdefault(video_id, {}).setdefault(root, folder)
            if other != folder:
                raise ValueError(f"{other} and {folder} have the same id {video_id!r}. Remove one of them.")
            digests[folder] = _digest(folder, images)
    if not found:
        raise ValueError(f"{flow_dir} holds no folders of images. Give the folder that holds the videos' folders.")
    videos = []
    for video_id in sorted(found):
        root, folder = next(iter(found[video_id].items()))
        places = tuple((found[video_id].get(tree, tree / folder.relative_to(root)), names) for tree, names in trees)
        listing = " ".join(digests.get(place, "-") for place, _ in places)
        class_name = PurePosixPath(video_id).parent.name
        problem = "" if class_name else _problem(video_id, official)
        videos.append(FlowDir(video_id, class_name, folder, places, listing, problem))
    return videos


def _trees(flow_dir: Path, frames_dir: Path | None) -> list[Place]:
    for folder in (flow_dir, frames_dir):
        if folder is not None and not folder.is_dir():
            what = "Give the folder that holds the videos' folders."
            raise ValueError(f"{folder} is no folder. {what}{nearest_path(folder)}")
    if (flow_dir / "u").is_dir() and (flow_dir / "v").is_dir():
        if frames_dir is None:
            raise ValueError(f"{flow_dir} holds fields alone, in u and v: give the frames' folder as --frames-dir.")
        return [(flow_dir / "u", {"frame": "dx"}), (flow_dir / "v", {"frame": "dy"}), (frames_dir, FRAMES)]
    if frames_dir is None:
        return [(flow_dir, FIELDS | FRAMES)]
    return [(flow_dir, FIELDS), (frames_dir, FRAMES)]


def _image_folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder that holds images, and their names. Other files, such as logs, are passed over."""
    for folder, names in walk(root):
        if images := [name for name in names if _is_image(name)]:
            yield Path(folder), images


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _video_id(root: Path, folder: Path, official: Mapping[str, str] | None) -> str:
    """Id of the video in a folder: the path below the root, or of a flat one the id that the lists have."""
    name = folder.relative_to(root).as_posix()
    if name == ".":
        raise ValueError(f"{root} holds images itself. Give the folder that holds the videos' folders.")
    check_video_id(name)
    if "/" not in name and official is None:
        raise ValueError(
            f"{folder} lies in no class folder. Give the official lists as --splits, which tell the classes, or sort "
            f"the folders into class folders: Class/{name}."
        )
    video_id = name if official is None or "/" in name else official.get(name, name)
    if "/" in video_id:
        check_class_name(PurePosixPath(video_id).parent.name)
    return video_id


def _digest(folder: Path, images: Sequence[str]) -> str:
    # The size of every file would take minutes to ask; a folder that was extracted anew shows in two.
    sizes = [str((folder / name).stat().st_size) for name in (images[0], images[-1])]
    return hashlib.sha256("\n".join([*images, *sizes]).encode("utf-8", "surrogateescape")).hexdigest()


def _problem(name: str, official: Mapping[str, str]) -> str:
    alike = {known.lower(): known for known in official}.get(name.lower())
    remedy = f"It is like {alike}: rename it if it is that one." if alike else "Put it into a class folder."
    return f"lies in no class folder, and the lists hold its name for no class, or for several. {remedy}"


# --- the files of a video ----------------------------------------------------------------------------------------


def find_files(places: Sequence[Place], extra_field: str | None = None) -> FlowFiles:
    """The files of a video in their order; none is opened.

    extra_field: which of T fields of T frames is left out, "first" or "last"; with None they are an error.
    Raises ValueError that names the first file that is missing or should not be there.
    """
    files: dict[str, dict[int, Path]] = {kind: {} for kind in _KINDS}
    for folder, begins in places:
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            if _is_image(name) and not name.startswith("."):
                kind, number = _parse(name, begins)
                other = next(iter(files[kind].values()), folder / name)
                if number in files[kind] or _begin(other) != _begin(folder / name):
                    other = files[kind].get(number, other)
                    raise ValueError(f"holds {other.name} and {name}: which of them is meant? Take one kind away.")
                files[kind][number] = folder / name
    for kind, numbered in files.items():
        _check_numbers(kind, numbered, places)
    _check_pairs(files["dx"], files["dy"])
    frames = [files["rgb"][number] for number in sorted(files["rgb"])]
    fields = [(files["dx"][number], files["dy"][number]) for number in sorted(files["dx"])]
    if len(fields) == len(frames) and extra_field is not None:
        fields = fields[1:] if extra_field == "first" else fields[:-1]
    _check_counts(frames, fields)
    return FlowFiles(frames, fields)


def _parse(name: str, begins: Mapping[str, str]) -> tuple[str, int]:
    """Kind and number of a file."""
    found = re.fullmatch(r"(.*?)([0-9]+)(\.\w+)", name)
    if not found or found[1] not in begins:
        expected = ", ".join(f"{begin}00001.jpg" for begin in begins)
        raise ValueError(f"holds {name}, expected only names like {expected}. Take it away.")
    if found[3].lower() not in (".jpg", ".jpeg"):
        raise ValueError(f"holds {name}: only JPEGs can be packed as they are. Extract the video again, as JPEG.")
    return begins[found[1]], int(found[2])


def _begin(path: Path) -> str:
    return path.stem.rstrip("0123456789")


def _sibling(path: Path, number: int) -> str:
    """Name that a file would have with another number."""
    begin = _begin(path)
    return f"{begin}{number:0{len(path.stem) - len(begin)}d}{path.suffix}"


def _check_numbers(kind: str, files: Mapping[int, Path], places: Sequence[Place]) -> None:
    """Raise ValueError unless the numbers go up by one from 0 or 1."""
    if not files:
        folder, begins = next((folder, begins) for folder, begins in places if kind in begins.values())
        expected = " or ".join(f"{begin}00001.jpg" for begin in begins if begins[begin] == kind)
        raise ValueError(f"has no {_KINDS[kind]}: expected {expected}, ... in {folder}. {_AGAIN}")
    first = min(files)
    if first > 1:
        raise ValueError(
            f"lacks {_sibling(files[first], 1)}: {files[first].name} is the first, expected number 0 or 1. {_AGAIN}"
        )
    for number in range(first, max(files)):
        if number not in files:
            later = files[min(n for n in files if n > number)].name
            raise ValueError(f"lacks {_sibling(files[first], number)}, but has {later}. {_AGAIN}")


def _check_pairs(x: Mapping[int, Path], y: Mapping[int, Path]) -> None:
    """Raise ValueError unless every component has its counterpart."""
    for number in sorted(x.keys() ^ y.keys())[:1]:
        there, other = (x, y) if number in x else (y, x)
        missing = _sibling(next(iter(other.values())), number)
        raise ValueError(f"lacks {missing}, but has {there[number].name}. {_AGAIN}")


def _check_counts(frames: list[Path], fields: list[tuple[Path, Path]]) -> None:
    """Raise ValueError unless there are T >= 2 frames and T-1 fields."""
    if len(fields) == len(frames) - 1 > 0:
        return
    have = f"{len(frames)} frames and {len(fields)} fields, expected one field less than frames"
    if len(fields) == len(frames) > 1:
        first, last = fields[0][0].name, fields[-1][0].name
        raise ValueError(
            f"has {have}. Either {first} leads to {frames[0].name}, since TSN's dense_flow leaves out the first frame, "
            f"or {last} leads to a frame that is not there. Say which field to leave out: --extra-field first, or last."
        )
    file = fields[-1][0] if 0 < len(fields) < len(frames) else frames[-1]
    number = int(file.stem.removeprefix(_begin(file)))
    raise ValueError(f"lacks {_sibling(file, number + 1)}: it has {have}. {_AGAIN}")
