"""Damaged files of a packed set, and readers that hang: always an error that names the place, or the sound tensors."""

import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow.codec import Codec
from flow.pool import run_pool
from flow.shard import KINDS
from flow.verify import ShardTask, verify_shard
from loaders import dali_loader
from loaders.batch import Batch, StreamSpec
from loaders.index import open_index
from loaders.source import Source
from tests.conftest import pack_arrays, random_video
from tests.faults import Fault

#: Large enough for a decoder that is shown damaged bytes to end its process.
NUM_JPEGS = 640
NUM_BATCHES = 2
SPECS = {
    "spatial": StreamSpec(stream="spatial", crop_px=56),
    "temporal": StreamSpec(stream="temporal", L=10, crop_px=56),
    "bi-directional": StreamSpec(stream="temporal", L=10, crop_px=56, bidirectional=True),
    "windows": StreamSpec(stream="temporal", L=10, crop_px=56, stacks_per_window=4),
}
#: Three videos of each class: two damaged places leave one.
SHAPES = {"run/long": (70, 64, 85), "run/b": (40, 64, 85), "run/c": (18, 64, 85)}
SHAPES |= {"walk/a": (20, 64, 113), "walk/b": (16, 90, 64), "walk/c": (30, 64, 96)}
SHARD_ERRORS = ("ShardError", "SampleError")


def make_set(root: Path, rng: np.random.Generator, codec: Codec | None = None) -> Path:
    """Pack a small set with frames and fields in both directions, in two shards."""
    videos = {}
    for video_id, shape in SHAPES.items():
        frames, fields = random_video(rng, *shape)
        videos[video_id] = frames, fields, fields[::-1]
    return pack_arrays(root, videos, codec or Codec(), videos_per_shard=3)


@dataclass(frozen=True)
class Load:
    """Batches to load, in a process that may die. options: as keyword arguments of the loader."""

    root: Path
    spec: str
    options: tuple[tuple[str, object], ...] = ()


def digest(batch: Batch) -> str:
    return hashlib.sha256(batch.inputs.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()


def load(task: Load) -> tuple[list[str], str, str]:
    """Hashes of the first batches, and name and message of the error that ended the loading, if one did."""
    found: list[str] = []
    try:
        index = open_index(task.root)
        spec = SPECS[task.spec]
        batch_size = NUM_JPEGS // spec.num_images
        rows = index.split("split1_train")
        options = {"seed": 0, "batch_size": batch_size, **dict(task.options)}
        with dali_loader.train_loader(index, rows, spec, **options) as loader:
            for _ in range(NUM_BATCHES):
                found.append(digest(next(loader)))
    except Exception as error:
        return found, type(error).__name__, str(error)
    return found, "", ""


# --- damage ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Bytes of a file that are to be damaged. kind: a member's, "tar header", "clip JSON", or the file's name."""

    path: Path
    kind: str
    offset: int
    size: int


def draw_place(root: Path, kind: str, rng: np.random.Generator) -> Place:
    """A place of the kind, uniform over those that a set has."""
    if kind in ("index.bin", "dataset.json"):
        return Place(root / kind, kind, 0, (root / kind).stat().st_size)
    path = sorted(root.glob("shard-*.tar"))[rng.integers(2)]
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    if kind == "tar header":
        return Place(path, kind, members[rng.integers(len(members))].offset, 512)
    ending = ".json" if kind == "clip JSON" else f".{kind}.jpg"
    fitting = [member for member in members if member.name.endswith(ending)]
    member = fitting[rng.integers(len(fitting))]
    return Place(path, kind, member.offset_data, member.size)


def truncate(place: Place, rng: np.random.Generator) -> None:
    os.truncate(place.path, place.offset + int(rng.integers(place.size)))


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
    begin = int(rng.integers(len(content) - place.size)) if len(content) > place.size else 0
    content[place.offset : place.offset + place.size] = content[begin : begin + place.size]
    place.path.write_bytes(content)


DAMAGES: dict[str, Callable[[Place, np.random.Generator], None]] = {
    "truncated": truncate,
    "bits flipped": flip_bits,
    "block zeroed": zero_block,
    "other bytes": copy_over,
}


def swap_shards(root: Path, other: Path) -> None:
    first, second = sorted(root.glob("shard-*.tar"))
    content = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(content)


def other_codec(root: Path, other: Path) -> None:
    path = root / "dataset.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


#: Whole files. other: a pack of other videos of the same names and shapes.
MIXED_UP: dict[str, Callable[[Path, Path], object]] = {
    "shards swapped": swap_shards,
    "a shard of another pack": lambda root, other: shutil.copy(other / "shard-000001.tar", root),
    "the index of another pack": lambda root, other: shutil.copy(other / "index.bin", root),
    "dataset.json of another pack": lambda root, other: shutil.copy(other / "dataset.json", root),
    "another codec version": other_codec,
    "a shard missing": lambda root, other: (root / "shard-000000.tar").unlink(),
    "the index missing": lambda root, other: (root / "index.bin").unlink(),
    "dataset.json missing": lambda root, other: (root / "dataset.json").unlink(),
}


def damaged_files(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """Every kind of place is damaged in every way: no wrong tensor, no dead process, and the place is named."""
    sound, other = make_set(folder / "sound", rng), make_set(folder / "other", rng)
    expected = {name: result for name, result in _loaded({name: Load(sound, name) for name in SPECS})}
    assert all(result is not None and not result[1] for result in expected.values())
    tasks, whats = {}, {}
    streams = {"rgb": ["spatial"], "bdx": ["bi-directional"], "bdy": ["bi-directional"]}
    for kind in [*KINDS, "tar header", "clip JSON", "index.bin", "dataset.json"]:
        for damage in rng.permutation(list(DAMAGES))[: 1 if short else None].tolist():
            root = shutil.copytree(sound, folder / f"{kind} {damage}")
            place = draw_place(root, kind, rng)
            DAMAGES[damage](place, rng)
            spec = str(rng.choice(streams.get(kind, ["temporal", "windows"])))
            name = f"{kind} at {place.path.name}:{place.offset}: {damage}, {spec}"
            tasks[name], whats[name] = Load(root, spec), place
    for name in rng.permutation(list(MIXED_UP))[: 2 if short else None].tolist():
        root = shutil.copytree(sound, folder / name)
        MIXED_UP[name](root, other)
        tasks[name], whats[name] = Load(root, "temporal"), None
    for name, result in _loaded(tasks):
        yield _judged(name, tasks[name], whats[name], result, expected[tasks[name].spec])


def _loaded(tasks: dict[str, Load]) -> Iterator[tuple[str, tuple[list[str], str, str] | None]]:
    names = {task: name for name, task in tasks.items()}
    for task, result in run_pool(load, list(tasks.values()), 1):
        yield names[task], result


def _judged(name: str, task: Load, place: Place | None, result: object, expected: object) -> Fault:
    """Whether the outcome is one that was promised."""
    if result is None:
        return Fault(name, survived=False, note="the process died")
    (hashes, error, message), (sound, _, _) = result, expected
    wrong = sum(a != b for a, b in zip(hashes, sound, strict=False))
    if wrong:
        return Fault(name, survived=False, lost=wrong, note="wrong tensors were delivered")
    if error and error not in (*SHARD_ERRORS, "ValueError"):
        return Fault(name, survived=False, note=f"{error}: {message}")
    if error == "SampleError" and not re.search(r"shard-\d{6}\.tar: \S+\.\w+\.jpg at offset \d+: ", message):
        return Fault(name, survived=False, note=f"names no shard, member and offset: {message}")
    if not error and len(hashes) < NUM_BATCHES:
        return Fault(name, survived=False, note="ended early without an error")
    if place and place.path.suffix == ".tar" and place.path.exists():
        sound_shard = task.root.parent / "sound" / place.path.name
        damaged = place.path.read_bytes() != sound_shard.read_bytes()
        if damaged and not verify_shard(_shard_task(task.root, sound_shard)).damages:
            return Fault(name, survived=False, note="flow.verify does not find it")
    return Fault(f"{name}: {error or 'not read'}")


def _shard_task(root: Path, sound: Path) -> ShardTask:
    content = sound.read_bytes()
    return ShardTask(root, sound.name, len(content), hashlib.sha256(content).hexdigest(), deep=False)


# --- going on over damage ----------------------------------------------------------------------------------------


def skipped_damage(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """Some members are damaged: with data.on_damage=skip, samples that need none of them are what they were, others are
    replaced by samples of their class, in the same way on one rank and on two, and after a restart."""
    sound = make_set(folder / "sound", rng)
    names = ["temporal", "windows"] if short else list(SPECS)
    for name in names:
        kinds = SPECS[name].kinds + SPECS[name].backward_kinds
        for round in range(1 if short else 3):
            root = shutil.copytree(sound, folder / f"{name} {round}")
            places = [draw_place(root, str(rng.choice(kinds)), rng) for _ in range(2)]
            for place in places:
                zero_block(place, rng)
            yield _skipped(name, root, sound, [(p.path.name, p.offset) for p in places])
            shutil.rmtree(root)


def _skipped(name: str, root: Path, sound: Path, damaged: list[tuple[str, int]]) -> Fault:
    what, spec, steps = f"{name}: {damaged} zeroed", SPECS[name], 6
    batch_size = 64
    skip = {"on_damage": "skip", "max_damaged_pct": 50.0}

    def batches(root: Path, start: int = 0, rank: int = 0, world_size: int = 1, **options: object) -> list:
        index = open_index(root)
        with dali_loader.train_loader(
            index, index.split("split1_train"), spec, seed=1, batch_size=batch_size, rank=rank, world_size=world_size,
            start_step=start, **options,
        ) as loader:  # fmt: skip
            return [(batch, loader.num_replaced) for batch, _ in zip(loader, range(start, steps), strict=False)]

    whole, clean = batches(root, **skip), batches(sound)
    source = Source(open_index(sound), spec)
    wrong = replaced = 0
    for (got, _), (was, _) in zip(whole, clean, strict=True):
        hit = _touches(source, was.draw, damaged)
        differs = (got.inputs != was.inputs).flatten(1).any(1).numpy()
        replaced += int(differs.sum())
        wrong += int((differs & ~hit).sum()) if spec.stacks_per_window == 1 else 0
        wrong += int((got.labels != was.labels).sum()) + int(_touches(source, got.draw, damaged).sum())
    halves = [batches(root, rank=rank, world_size=2, **skip) for rank in range(2)]
    for step, (got, _) in enumerate(whole):
        both = np.concatenate([half[step][0].inputs.numpy() for half in halves])
        wrong += int((both != got.inputs.numpy()).any(axis=(1, 2, 3)).sum())
    for (again, _), (got, _) in zip(batches(root, start=3, **skip), whole[3:], strict=True):
        wrong += int((again.inputs != got.inputs).any().item())
    source.close()
    counted = whole[-1][1]
    if wrong or bool(replaced) > bool(counted):
        return Fault(what, survived=False, lost=wrong, note=f"{wrong} wrong samples, {counted} counted as replaced")
    return Fault(f"{what}: {replaced} samples replaced")


def _touches(source: Source, draw: object, damaged: list[tuple[str, int]]) -> np.ndarray:
    """Which samples (n,) of a draw are made from a damaged member."""
    entries = source.stored_entries(draw.video, draw.tau, source.spec.steps)
    shards = np.array(source.index.shards)[source.index.shard[draw.video]]
    hit = np.zeros(len(draw), bool)
    for shard, offset in damaged:
        hit |= (shards == shard) & (entries["offset"] == offset).any(axis=(1, 2))
    return hit


def hung_reader(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """A shard that never answers, a FIFO in its place: TimeoutError names it; when it is back, the same batch comes."""
    sound = make_set(folder / "sound", rng)
    for name in ["temporal"] if short else list(SPECS):
        expected, _, _ = load(Load(sound, name))
        root = shutil.copytree(sound, folder / name)
        index, spec = open_index(root), SPECS[name]
        paths = sorted(root.glob("shard-*.tar"))
        for path in paths:
            path.rename(path.with_suffix(".away"))
            os.mkfifo(path)
        rows = index.split("split1_train")
        batch_size = NUM_JPEGS // spec.num_images
        with dali_loader.train_loader(index, rows, spec, seed=0, batch_size=batch_size, timeout_s=1.0) as loader:
            note = ""
            try:
                next(loader)
                note = "no error"
            except TimeoutError as error:
                if not re.search(r"Waited 1 s for .*shard-\d{6}\.tar at offset \d+", str(error)):
                    note = f"the error names no shard: {error}"
            for path in paths:
                fifo = os.open(path, os.O_RDWR)  # lets the threads go that wait for a writer
                path.unlink()
                path.with_suffix(".away").rename(path)
                os.close(fifo)
            found = []
            for _ in range(NUM_BATCHES):
                found.append(digest(_patient_next(loader)))
        lost = sum(a != b for a, b in zip(found, expected, strict=True))
        yield Fault(f"{name}: no shard answers", survived=not note and not lost, lost=lost, note=note)


def _patient_next(loader: Iterator) -> object:
    """The next batch; what was read from the FIFO, nothing, is damage, and asked for again."""
    for _ in range(20):
        try:
            return next(loader)
        except (ValueError, OSError):
            continue
    return next(loader)


CASES = {"damaged files": damaged_files, "skipped damage": skipped_damage, "hung reader": hung_reader}
