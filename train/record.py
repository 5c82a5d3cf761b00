"""The results file of the experiments: every run's and fusion's correctness by test video, and what made it.

    scale      "mini" or "full"
    configs    digest -> the resolved config, defaults included, without split, seed and machine
    lists      key -> {data, split_list, dataset, num_classes, video_ids}: a test list, stored once
    made_on    key -> {machine, versions, commit}
    runs       one Entry each, the newest last

The report needs nothing else. Several processes may add to one file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from flow.resume import hold
from flow.shard import write_json
from flow.untrusted import read_json
from train.plan import Scale
from train.results import TOP, Results

_MAX_BOOK_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What came of one run or fusion.

    name: the config's, or the fusion's. digest: of the setting, see train.plan. correct, top5: a character of 0 and 1
    for each video of the list, whether the class of the highest score, or one of the five highest, was the right one;
    top5 is empty for five classes or fewer, and both are for a run without a test. test_list, made_on: keys in the
    file. seconds: of the process that ended it; resumed: it had gone on from a checkpoint, and took longer in all.
    """

    name: str
    split: int
    seed: int
    digest: str
    steps: int
    seconds: float
    resumed: bool
    gpus: int
    accuracy_pct: float | None
    test_list: str
    correct: str
    top5: str
    made_on: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.split, self.seed


@dataclass(kw_only=True)
class Book:
    """Content of a results file, its runs by (name, split, seed)."""

    scale: Scale
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    lists: dict[str, dict[str, Any]] = field(default_factory=dict)
    made_on: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[tuple[str, int, int], Entry] = field(default_factory=dict)

    def has(self, name: str, split: int, seed: int, digest: str) -> bool:
        """Whether there is a result of this very setting."""
        entry = self.runs.get((name, split, seed))
        return entry is not None and entry.digest == digest

    def agrees(self, configs: dict[str, dict[str, Any]]) -> bool:
        """Whether configs {digest: values} are as in this book, of the digests and keys that both know.

        Digests leave out what is at its default; where a default has changed, digests are equal and values are not.
        """
        stored = {digest: self.configs.get(digest, {}) for digest in configs}
        return all(
            configs[digest].get(key, value) == value for digest in configs for key, value in stored[digest].items()
        )

    def update(self, other: Book) -> None:
        """Take in what another book holds; it replaces results of the same name, split and seed.

        Results of a config that has other values there, since a default has changed, go, and so do their fusions.
        """
        outdated = {digest for digest, config in other.configs.items() if not self.agrees({digest: config})}
        names = {entry.name for entry in self.runs.values() if entry.digest in outdated}
        for key, entry in list(self.runs.items()):
            if not names.isdisjoint(entry.name.partition(":")[0].split("+")):
                del self.runs[key]
        for part in ("configs", "lists", "made_on"):
            getattr(self, part).update(getattr(other, part))
        for key, entry in other.runs.items():
            self.runs.pop(key, None)
            self.runs[key] = entry  # last: the newest


def correctness(results: Results, method: str) -> tuple[str, str]:
    """(correct, top5) of a method, as in an Entry."""
    scores, labels = results.scores[method], results.labels
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    right = best == labels[:, None]
    top5 = right.any(1) if scores.shape[1] > TOP else right[:, :0].any(1)[:0]
    return _bits(right[:, 0]), _bits(top5)


def _bits(right: npt.NDArray[np.bool_]) -> str:
    return "".join("01"[value] for value in right.astype(int))


def parse_bits(bits: str) -> npt.NDArray[np.float64]:
    """ "0110" -> (4,) array of 0.0 and 1.0."""
    return np.array([float(bit) for bit in bits])


def list_of(results: Results, data: str) -> dict[str, dict[str, Any]]:
    """The test list of results as a book keeps it: {key: description}. data: name of the data set."""
    content = {
        "data": data,
        "split_list": results.split_list,
        "dataset": results.dataset,
        "num_classes": len(results.classes),
        "video_ids": results.video_ids,
    }
    return {f"{data}/{results.split_list}/{results.dataset[:8]}": content}


def make_key(content: Any) -> str:
    """A short name for something that is stored once: it follows from the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


# --- the file ----------------------------------------------------------------------------------------------------


def read_book(path: Path, scale: Scale | None = None) -> Book:
    """Read a results file; with a scale, one that is not there yet is empty. ValueError if it is of another scale."""
    if scale is not None and not path.exists():
        return Book(scale=scale)
    try:
        content = read_json(path, _MAX_BOOK_BYTES)
        entries = [_entry(row) for row in content.pop("runs")]
        book = Book(**content, runs={entry.key: entry for entry in entries})
        tables = (book.configs, book.lists, book.made_on)
        if not all(isinstance(part, dict) and all(isinstance(v, dict) for v in part.values()) for part in tables):
            raise ValueError("configs, lists and made_on hold tables")
        if strange := [e.key for e in entries if e.made_on not in book.made_on or e.test_list not in {"", *book.lists}]:
            raise ValueError(f"{strange[0]} refers to what is not there")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no results file of train.experiments ({error!r:.300}); name another.") from error
    if scale not in (None, book.scale):
        raise ValueError(f"{path} holds results at scale {book.scale}, not {scale}; name another file by --results.")
    return book


def _entry(row: dict[str, Any]) -> Entry:
    """A row of a results file. Raises ValueError or TypeError for one that `write_book` would not have written."""
    entry = Entry(**row)
    for name, hint in get_type_hints(Entry).items():
        value = getattr(entry, name)
        if not isinstance(value, hint) and not (isinstance(value, int) and issubclass(float, hint)):
            raise TypeError(f"{name}={value!r:.40} of a run is of type {type(value).__name__}")
    if {*entry.correct, *entry.top5} - {"0", "1"}:
        raise ValueError(f"correct and top5 of {entry.key} are of 0 and 1")
    return entry


def write_book(book: Book, path: Path) -> None:
    """Store a book, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**asdict(book), "runs": [asdict(entry) for entry in book.runs.values()]})


def add_to_book(path: Path, news: Book) -> Book:
    """Merge new results into the file, which other processes may do at the same time. Returns what it holds now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path.with_name(f".{path.name}.lock"), wait=True):
        book = read_book(path, news.scale)
        book.update(news)
        write_book(book, path)
    return book
