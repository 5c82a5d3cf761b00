"""Which images a set has, of which class and for which side: folders, WebDataset tars, videos. No image is opened.

n01440764/n01440764_10026.JPEG    id and class n01440764/n01440764_10026, n01440764
train-0007.tar: 000017.jpg, cls   id and class train-0007/000017, the number in cls or the name with that number
Archery/v_Archery_g01_c01.avi     a video, of which frames are taken
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from tqdm import tqdm

from flow.catalog import Video, list_videos, split_by_folder
from flow.command import nearest_path
from flow.shard import MAX_CLASS_ID, check_class_name, check_video_id
from flow.untrusted import MAX_JSON_BYTES, open_regular, printable, read_lines
from flow.video import VIDEO_EXTENSIONS

IMAGE_EXTENSIONS = frozenset(".bmp .jpeg .jpg .png .ppm .tif .tiff .webp".split())
TAR_KINDS = ("jpg", "jpeg", "png")
_MAX_HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Source(Video):
    """An image, in a file of its own or in a tar, or a video that gives several: num_bytes of the file, from offset.

    class_id: the number that stands for the class in tars.
    """

    offset: int
    num_bytes: int
    class_id: int | None

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_EXTENSIONS


def read_sources(
    train: str, val: str | None, classes: Path | None, seed: int
) -> tuple[list[Source], dict[str, list[str]]]:
    """All sources, and the lists of their ids. With val, ids begin with `train/` or `val/`, since names may recur."""
    names = None if classes is None else _class_names(classes)
    if val is None:
        sources = read_source(train, names)
        return sources, split_by_folder(sources, seed)
    sides = read_source(train, names, "train/"), read_source(val, names, "val/")
    known, found = ({source.class_name for source in side} for side in sides)
    if strange := sorted(found - known):
        raise ValueError(
            f"{len(strange)} of the {len(found)} classes in {val} are not in {train}: {strange[0]!r}, ... Name the "
            "class folders alike, or the numbers in tars with --classes."
        )
    train_ids, val_ids = ([source.video_id for source in side] for side in sides)
    return [*sides[0], *sides[1]], {"split1_train": train_ids, "split1_test": val_ids}


def _class_names(path: Path) -> list[str]:
    names = [line.strip() for line in "\n".join(read_lines(path, MAX_JSON_BYTES)).rstrip().splitlines()]
    if not names or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{path}: {len(names)} lines, {len(set(names) - {''})} names. Expected another in every line.")
    for name in names:
        check_class_name(name)
    return names


def read_source(source: str, names: list[str] | None = None, prefix: str = "") -> list[Source]:
    """Everything that one SRC holds, sorted by id; no image is decoded. names: of the classes that tars number.

    Raises ValueError for a source that is none of the three kinds, or for unusable names.
    """
    tars = _tars(source)
    if tars:
        return _read_tars(tars, names, prefix)
    if names is not None:
        raise ValueError(f"--classes names the numbers in tars; {source} is a folder, which names its classes.")
    files = list_videos(Path(source), IMAGE_EXTENSIONS | VIDEO_EXTENSIONS, "image or video")
    bar = tqdm(files, desc="asking for sizes", unit="file", delay=1, disable=None)
    found = [Source(prefix + f.video_id, f.class_name, f.path, 0, f.path.stat().st_size, None) for f in bar]
    num_videos = sum(source.is_video for source in found)
    if 0 < num_videos < len(found):
        raise ValueError(
            f"{source} holds {len(found) - num_videos} images and {num_videos} videos. Give folders with either."
        )
    return found


def _tars(source: str) -> list[Path]:
    """The tars of a SRC: itself, those in a folder, or those of a pattern; none for a folder without any."""
    if Path(source).is_dir():
        return sorted(Path(source).glob("*.tar"))
    from braceexpand import braceexpand

    tars = [Path(path) for path in braceexpand(source)]
    if absent := [path for path in tars if not path.is_file()]:
        raise ValueError(
            f"{absent[0]} is not there. SRC is a folder of class folders of images or videos, a tar, a folder of tars, "
            f"or a pattern such as train-{{0000..0145}}.tar.{nearest_path(absent[0])}"
        )
    return tars


def _read_tars(tars: list[Path], names: list[str] | None, prefix: str) -> list[Source]:
    sources: dict[str, Source] = {}
    bar = tqdm(tars, desc="reading labels", unit="tar", delay=1, disable=None)
    for image in (image for tar in bar for image in read_tar(tar, names, prefix)):
        if image.video_id in sources:
            clash = sources[image.video_id].path
            raise ValueError(f"{clash} and {image.path} both hold {image.video_id!r}. Give tars different names.")
        sources[image.video_id] = image
    if not sources:
        raise ValueError(f"{tars[0]} holds no samples; expected members {', '.join(TAR_KINDS)} and cls.")
    return [sources[video_id] for video_id in sorted(sources)]


def read_tar(path: Path, names: list[str] | None, prefix: str = "") -> Iterator[Source]:
    """The images of a WebDataset tar: their places and classes. An image's id is the tar's name and its key.

    Raises ValueError for a damaged tar, and for a sample that is no image with a class.
    """
    from webdataset.tariterators import group_by_keys

    try:
        for sample in group_by_keys(_tar_files(path)):
            key = sample["__key__"]
            kinds = [kind for kind in TAR_KINDS if kind in sample]
            if len(kinds) != 1 or "cls" not in sample:
                members = ", ".join(name for name in sample if not name.startswith("__"))
                raise ValueError(f"sample {key!r} has {members}; expected cls and one of {', '.join(TAR_KINDS)}.")
            video_id = PurePosixPath(f"{prefix}{path.stem}/{key}").as_posix()  # without "./"
            check_video_id(video_id)
            number = int(sample["cls"]) if len(sample["cls"]) <= 32 and sample["cls"].strip().isdigit() else -1
            if not 0 <= number < (len(names) if names else MAX_CLASS_ID):
                known = f"0..{len(names) - 1}, which --classes names" if names else "a number from 0"
                raise ValueError(f"sample {key!r} has class {sample['cls']!r:.40}; expected {known}.")
            offset, num_bytes = sample[kinds[0]]
            yield Source(video_id, names[number] if names else str(number), path, offset, num_bytes, number)
    except (ValueError, tarfile.TarError) as error:
        raise ValueError(f"{path}: {printable(error.args[0])}") from None  # webdataset adds arguments of its own
    except (RecursionError, OverflowError):  # in tarfile, of a chain of long names, and of numbers
        raise ValueError(f"{path}: damaged: tar headers that none writes.") from None


class _Headers(io.BufferedReader):
    """A tar to read headers and labels from. A header may claim a name, or a label, of terabytes: memory would be taken
    for it before the file is found to be shorter."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header or label claims {size} bytes, expected at most {_MAX_HEADER_BYTES:,}.")
        return super().read(size)


def _tar_files(path: Path) -> Iterator[dict[str, Any]]:
    """Members as `webdataset` groups them to samples; the data of an image are its (offset, size) in the tar."""
    raw, num_bytes = cast(io.FileIO, open_regular(path, buffering=0)), path.stat().st_size
    with _Headers(raw) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            if not 0 <= info.size <= num_bytes - info.offset_data:
                raise ValueError(f"damaged, or cut off: a member claims {info.size} bytes, the tar has {num_bytes}.")
            if info.isreg() and not info.issparse():
                label = tar.extractfile(info) if info.name.lower().endswith(".cls") else None
                data = (info.offset_data, info.size) if label is None else label.read()
                yield {"fname": info.name, "data": data, "__url__": str(path)}
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise ValueError(f"damaged, or cut off: no sound tar header at byte {tar.offset}.")
