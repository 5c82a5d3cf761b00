"""A packed data set, opened: videos, labels, splits, and where every member lies. Memory mapped, shared, read-only."""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.codec import Codec
from flow.index import Arrays, load_index
from flow.shard import FORMAT_VERSION, ShardError

Ints = npt.NDArray[np.int64]


class Index:
    """Tables of a packed data set.

    root: its folder.                              metadata: content of dataset.json
    classes: names, label k is classes[k].         codec: how components are encoded
    labels, num_frames, heights, widths: (num_videos,) int64; sizes in px
    shards, shard_bytes: file names and sizes.     entries: kind -> (num_rows,) RGB_ENTRY or FIELD_ENTRY
    first_row (num_videos,): frame t of video v is row first_row[v] + t of every kind
    """

    def __init__(self, root: Path, metadata: dict[str, Any], header: dict[str, Any], arrays: Arrays):
        self.root = root
        self.metadata = metadata
        self.codec = Codec.from_metadata(metadata["codec"])
        self.classes: list[str] = [c["name"] for c in header["classes"]]
        self.shards: list[str] = [s["name"] for s in header["shards"]]
        self.shard_bytes: list[int] = [s["bytes"] for s in header["shards"]]
        videos = arrays["videos"]
        self._videos, self._names = videos, arrays["names"]
        self.num_videos = len(videos)
        self.entries = {kind: array for kind, array in arrays.items() if kind not in ("videos", "names")}

    @cached_property
    def labels(self) -> Ints:
        return self._videos["label"].astype(np.int64)

    @cached_property
    def num_frames(self) -> Ints:
        return self._videos["num_frames"].astype(np.int64)

    @cached_property
    def heights(self) -> Ints:
        return self._videos["height"].astype(np.int64)

    @cached_property
    def widths(self) -> Ints:
        return self._videos["width"].astype(np.int64)

    @cached_property
    def first_row(self) -> Ints:
        return self._videos["first_row"].astype(np.int64)

    @cached_property
    def shard(self) -> Ints:
        return self._videos["shard"].astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Identity of the packed bytes: changes with any byte of any shard."""
        digests = "".join(shard["sha256"] for shard in self.metadata["shards"])
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    def video_ids(self, rows: Iterable[int]) -> list[str]:
        """Ids of the videos in the given rows."""
        names = []
        for row in rows:
            at, size = int(self._videos["name_at"][row]), int(self._videos["name_bytes"][row])
            names.append(self._names[at : at + size].tobytes().decode())
        return names

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.video_ids(range(self.num_videos)))}

    def rows(self, video_ids: Iterable[str]) -> Ints:
        """Rows of the given videos, in that order. Raises ValueError for a video that is not there."""
        try:
            return np.array([self._row_of[video_id] for video_id in video_ids], np.int64)
        except KeyError as error:
            raise ValueError(
                f"{self.root} holds no video {error}. Check the split file, or pack the set again."
            ) from None

    def splits(self) -> list[str]:
        """Names of the lists in splits/, such as "split1_train"."""
        return sorted(path.stem for path in (self.root / "splits").glob("*.txt"))

    def split(self, name: str) -> Ints:
        """Rows of a list in splits/. Raises ValueError if there is no such list, or it names a missing video."""
        if name not in self.splits():
            raise ValueError(f"{self.root} has no list {name!r}; it has {', '.join(self.splits()) or 'none'}.")
        return self.rows((self.root / "splits" / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1])


def open_index(root: str | Path) -> Index:
    """Open a packed data set.

    Raises ValueError if the folder is none or its encoding is not the one this code reads, and ShardError if metadata,
    index and shards do not belong together.
    """
    root = Path(root)
    try:
        metadata = json.loads((root / "dataset.json").read_bytes())
        version, shards = metadata["format_version"], metadata["shards"]
        described = [(shard["name"], shard["bytes"]) for shard in shards]
    except FileNotFoundError:
        raise ValueError(
            f"{root} is no packed data set: it has no dataset.json. Pack one with `python -m flow.pack`; if a pack was "
            "stopped, run it again to finish."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{root}/dataset.json is damaged: {error!r}. Pack the set again.") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{root} has format version {version}, this code reads {FORMAT_VERSION}. Pack the set again.")
    header, arrays = load_index(root)
    if [(shard["name"], shard["bytes"]) for shard in header["shards"]] != described:
        raise ShardError(
            f"The index of {root} lists other shards than dataset.json. Rebuild it: "
            f"`python -m flow.verify {root} --rebuild-index`."
        )
    for name, num_bytes in described:
        path = root / name
        found = path.stat().st_size if path.exists() else None
        if found != num_bytes:
            raise ShardError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}, dataset.json says {num_bytes} bytes. "
                "Restore the shard from a copy, or pack the set again."
            )
    return Index(root, metadata, header, arrays)
