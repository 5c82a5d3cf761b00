"""Damage to the files of a packed set: where, and in which way."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow.dataset import read_dataset
from flow.index import load_index, write_index
from flow.shard import KINDS, write_json
from loaders.batch import StreamSpec
from loaders.draw import draw_batch, population
from loaders.index import open_index
from loaders.source import Source


@dataclass(frozen=True)
class Place:
    """Bytes of a file that are to be damaged."""

    path: Path
    offset: int
    size: int


def read_entries(root: Path, spec: StreamSpec, kind: str, seed: int, num_batches: int, batch_size: int) -> list:
    """(shard's path, index entry) of every member of a kind that the first batches are made from, windows whole."""
    index = open_index(root)
    source, videos = Source(index, spec), population(index, index.split("split1_train"), spec)
    backward = kind in spec.backward_kinds
    column = (spec.backward_kinds if backward else spec.kinds).index(kind)
    ahead = spec.chain_steps if spec.backward_kinds else spec.window_steps
    found = {}
    for step in range(num_batches):
        draw = draw_batch(seed, step, videos, spec, batch_size)
        entries = source.stored_entries(draw.video, draw.first, spec.window_steps)[..., column]  # (n, steps)
        for video, row in zip(draw.video, entries[:, ahead:] if backward else entries[:, :ahead], strict=True):
            path = root / index.shards[index.shard[video]]
            found |= {(path, int(entry["offset"])): entry for entry in row}
    return [(path, entry) for (path, _), entry in sorted(found.items(), key=lambda item: item[0])]


def draw_member(entries: list, rng: np.random.Generator) -> Place:
    path, entry = entries[rng.integers(len(entries))]
    return Place(path, int(entry["offset"]), int(entry["size"]))


def draw_span(path: Path, end: int, rng: np.random.Generator) -> Place:
    """64 bytes of a file, before `end`."""
    return Place(path, int(rng.integers(end - 64)), 64)


def draw_in_tar(root: Path, kind: str, rng: np.random.Generator) -> Place:
    """A tar header, or a clip JSON."""
    path = sorted(root.glob("shard-*.tar"))[rng.integers(2)]
    with tarfile.open(path) as tar:
        members = [member for member in tar.getmembers() if kind == "tar header" or member.name.endswith(".json")]
    member = members[rng.integers(len(members))]
    if kind == "tar header":
        return Place(path, member.offset, 512)
    return Place(path, member.offset_data, member.size)


def truncate(place: Place, rng: np.random.Generator) -> None:
    os.truncate(place.path, place.offset + int(rng.integers(place.size)))


def truncate_and_agree(place: Place, rng: np.random.Generator) -> None:
    """Cut a shard off where opening a set does not notice: dataset.json and index say that it has no more."""
    truncate(place, rng)
    root = place.path.parent
    dataset, (header, arrays) = json.loads((root / "dataset.json").read_text()), load_index(root)
    for shard in dataset["shards"] + header["shards"]:
        if shard["name"] == place.path.name:
            shard["bytes"] = place.path.stat().st_size
    write_json(root / "dataset.json", dataset)
    write_index(root, header, arrays)


def flip_bits(place: Place, rng: np.random.Generator) -> None:
    content = bytearray(place.path.read_bytes())
    for bit in rng.choice(place.size * 8, int(rng.integers(1, 9)), replace=False).tolist():
        content[place.offset + bit // 8] ^= 1 << bit % 8
    place.path.write_bytes(content)


def zero_block(place: Place, rng: np.random.Generator) -> None:
    content = bytearray(place.path.read_bytes())
    begin = place.offset + int(rng.integers(place.size))
    end = min(begin + int(rng.integers(16, 512)), place.offset + place.size)
    content[begin:end] = bytes(end - begin)
    place.path.write_bytes(content)


def copy_over(place: Place, rng: np.random.Generator) -> None:
    """Bytes of the same file from elsewhere, as a disk that mixes up its blocks would leave them."""
    content = bytearray(place.path.read_bytes())
    begin = int(rng.integers(len(content) - place.size))
    content[place.offset : place.offset + place.size] = content[begin : begin + place.size]
    place.path.write_bytes(content)


def copy_neighbour(place: Place, rng: np.random.Generator) -> None:
    """One of the things of the same size that stand next to it."""
    content = bytearray(place.path.read_bytes())
    begin = place.offset + place.size * int(rng.choice([-2, -1, 1, 2]))
    content[place.offset : place.offset + place.size] = content[begin : begin + place.size]
    place.path.write_bytes(content)


WAYS: dict[str, Callable[[Place, np.random.Generator], None]] = {
    "bits flipped": flip_bits,
    "block zeroed": zero_block,
    "other bytes": copy_over,
    "truncated": truncate,
    "truncated, sizes agree": truncate_and_agree,
    "neighbour's": copy_neighbour,
}
#: What training does not read.
UNREAD = ("tar header", "clip JSON")
#: Kinds of places, "dx entry" being one of the index, and the ways to damage them.
DAMAGES = {kind: ["bits flipped", "block zeroed", "other bytes", "truncated, sizes agree"] for kind in KINDS}
DAMAGES |= {kind: ["bits flipped", "block zeroed", "other bytes"] for kind in UNREAD}
DAMAGES |= {"dx entry": ["bits flipped", "block zeroed", "neighbour's"]}
DAMAGES |= {"index.bin": list(WAYS)[:4], "dataset.json": list(WAYS)[:4]}
DAMAGES["rgb"] += ["truncated"]


def damage(way: str, place: Place, rng: np.random.Generator, shows: Callable[[], bool] = lambda: True) -> None:
    """Damage a place so that it is another one, and that it shows; what is drawn may leave it as it was."""
    sound = place.path.read_bytes()
    while place.path.read_bytes() == sound or not shows():
        place.path.write_bytes(sound)
        WAYS[way](place, rng)


def contradicts(root: Path, sound: Path) -> bool:
    """Whether a dataset.json cannot be read, or says other things of what can be held against it."""
    try:
        now, was = read_dataset(root), read_dataset(sound)
    except ValueError:
        return True
    return any(now[key] != was[key] for key in ("classes", "num_videos", "shards"))


def swap_shards(root: Path, other: Path) -> None:
    first, second = sorted(root.glob("shard-*.tar"))
    content = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(content)


def other_codec(root: Path, other: Path) -> None:
    path = root / "dataset.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


#: Whole files, and what an error has to say. other: a pack of other videos of the same names and shapes.
MIXED_UP: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "shards swapped": (swap_shards, r"shard-\d{6}\.tar: "),
    "a shard of another pack": (
        lambda root, other: shutil.copy(other / "shard-000001.tar", root),
        r"shard-000001\.tar: ",
    ),
    "the index of another pack": (
        lambda root, other: shutil.copy(other / "index.bin", root),
        r"The index of .* lists other|shard-\d{6}\.tar: \S+\.\w+\.jpg at offset \d+: ",
    ),
    "dataset.json of another pack": (lambda root, other: shutil.copy(other / "dataset.json", root), r"dataset\.json"),
    "dataset.json of another codec version": (other_codec, r"dataset\.json: The data are encoded with"),
    "a shard missing": (lambda root, other: (root / "shard-000000.tar").unlink(), r"shard-000000\.tar: missing"),
    "the index missing": (lambda root, other: (root / "index.bin").unlink(), r"index\.bin"),
    "dataset.json missing": (lambda root, other: (root / "dataset.json").unlink(), r"dataset\.json"),
}
