"""Damaged files of a packed set, and readers that hang: always an error that names the place, or the sound tensors."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow.codec import Codec
from flow.dataset import read_dataset
from flow.index import build_index, load_index
from flow.pool import run_pool
from flow.shard import ShardError
from flow.verify import ShardTask, verify_shard
from loaders import dali_loader
from loaders.batch import Batch, StreamSpec
from loaders.draw import Draw
from loaders.index import open_index
from loaders.source import Source
from tests.conftest import pack_arrays, random_video
from tests.faults import Fault
from tests.faults.damage import (
    DAMAGES,
    MIXED_UP,
    UNREAD,
    Place,
    contradicts,
    damage,
    draw_in_tar,
    draw_member,
    draw_span,
    read_entries,
)

#: Large enough for a decoder that is shown damaged bytes to end its process.
NUM_JPEGS = 640
NUM_BATCHES = 2
#: Batches, and samples of one, that go on over damage.
NUM_SKIPPING = 6
SKIPPING_SIZE = 64
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
class Damaged:
    """A damaged copy of the set. says: a pattern that the error's message has, which holds the damaged file's name.
    plain: it may be a ValueError that is no ShardError. ends: no error will not do: the batches need what is damaged.
    shard: whose damage flow.verify has to find as well, if it is one's.
    """

    what: str
    task: Load
    says: str
    plain: bool = False
    ends: bool = True
    shard: str = ""


def damage_copy(kind: str, way: str, sound: Path, root: Path, rng: np.random.Generator) -> Damaged:
    """A copy of the set with a place of a kind damaged, of those that the batches need if they can be."""
    shutil.copytree(sound, root)
    streams = {"rgb": ["spatial"], "bdx": ["bi-directional"], "bdy": ["bi-directional"]}
    name = str(rng.choice(streams.get(kind, ["temporal", "windows"])))
    task, spec, path = Load(root, name), SPECS[name], root / kind
    if kind in UNREAD:
        place = draw_in_tar(root, kind, rng)
        damage(way, place, rng)
        return Damaged(_what(kind, place, way, name), task, "", ends=False, shard=place.path.name)
    if kind == "dataset.json":
        place = draw_span(path, path.stat().st_size, rng)
        damage(way, place, rng, lambda: contradicts(root, sound))
        return Damaged(_what(kind, place, way, name), task, re.escape(str(root)), plain=True, ends=False)
    if kind == "index.bin":  # header and videos; entries are read when they are needed
        videos = load_index(root)[1]["videos"].tobytes()
        place = draw_span(path, path.read_bytes().index(videos) + len(videos), rng)
        damage(way, place, rng)
        return Damaged(_what(kind, place, way, name), task, r"index\.bin")
    entries = read_entries(root, spec, kind.split()[0], 0, NUM_BATCHES, NUM_JPEGS // spec.num_images)
    if kind == "dx entry":
        shard, entry = entries[rng.integers(len(entries))]
        raw, content = entry.tobytes(), (root / "index.bin").read_bytes()
        found = re.search(re.escape(raw[:12]) + b"(?s:.{4})" + re.escape(raw[16:]), content)  # all but the CRC-32
        place = Place(root / "index.bin", found.start(), entry.nbytes)
        damage(way, place, rng)
        return Damaged(_what(kind, place, way, name), task, rf"{shard.name}: \S+\.d[xy]\.jpg at offset \d+: ")
    place = draw_member(entries, rng)
    damage(way, place, rng)
    says = rf"{place.path.name}: \S+\.{kind}\.jpg at offset {place.offset}: "
    if way == "truncated":
        says = rf"{place.path.name}: \d+ bytes, dataset\.json says \d+"
    elif way == "truncated, sizes agree":
        says = rf"{place.path.name}: \S+\.\w+\.jpg at offset \d+: "
    return Damaged(_what(kind, place, way, name), task, says, shard=place.path.name)


def _what(kind: str, place: Place, way: str, spec: str) -> str:
    return f"{kind} at {place.path.name}:{place.offset}: {way}, {spec}"


def mix_up(what: str, sound: Path, other: Path, root: Path) -> Damaged:
    shutil.copytree(sound, root)
    do, says = MIXED_UP[what]
    do(root, other)
    of_dataset = what.startswith("dataset.json")
    return Damaged(what, Load(root, "temporal"), says, plain=of_dataset, ends=what != "dataset.json of another pack")


def damaged_files(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """Every kind of place is damaged in every way: no wrong tensor, no dead process, and the place is named."""
    sound, other = make_set(folder / "sound", rng), make_set(folder / "other", rng)
    expected = dict(_loaded([Load(sound, name) for name in SPECS]))
    assert all(result is not None and not result[1] for result in expected.values())
    damaged = [
        damage_copy(kind, way, sound, folder / f"{kind} {way}", rng)
        for kind, ways in DAMAGES.items()
        for way in rng.permutation(ways)[: 1 if short else None].tolist()
    ]
    names = rng.permutation(list(MIXED_UP))[: 2 if short else None].tolist()
    damaged += [mix_up(name, sound, other, folder / name) for name in names]
    by_task = {one.task: one for one in damaged}
    for task, result in _loaded(list(by_task)):
        yield _judged(by_task[task], sound, result, expected[Load(sound, task.spec)])


Loaded = tuple[list[str], str, str] | None


def _loaded(tasks: list[Load]) -> Iterator[tuple[Load, Loaded]]:
    return run_pool(load, tasks, 1)


def _judged(damaged: Damaged, sound: Path, result: Loaded, expected: Loaded) -> Fault:
    """Whether the outcome is one that was promised."""
    assert expected is not None
    if result is None:
        return Fault(damaged.what, survived=False, note="the process died")
    hashes, error, message = result
    wrong = sum(a != b for a, b in zip(hashes, expected[0], strict=False))
    if wrong:
        return Fault(damaged.what, survived=False, lost=wrong, note="wrong tensors were delivered")
    errors = (*SHARD_ERRORS, "ValueError") if damaged.plain else SHARD_ERRORS
    if error and (error not in errors or not damaged.says or not re.search(damaged.says, message)):
        return Fault(damaged.what, survived=False, note=f"not what was promised: {error}: {message}")
    if not error and (damaged.ends or len(hashes) < NUM_BATCHES):
        return Fault(damaged.what, survived=False, note=f"no error, and {len(hashes)} batches")
    if damaged.shard or not error:
        verified = [line for line in verify(damaged.task.root) if damaged.shard in line]
        if not verified:
            return Fault(damaged.what, survived=False, note="flow.verify does not find it")
    if error:
        return Fault(f"{damaged.what}: {error}")
    return _unread(damaged, sound)


def verify(root: Path) -> list[str]:
    """What flow.verify finds in the shards; before it builds an index, too."""
    shards = read_dataset(root)["shards"]
    tasks = [ShardTask(root, shard["name"], shard["bytes"], shard["sha256"], deep=False) for shard in shards]
    return [line for task in tasks for line in verify_shard(task).damages]


def _unread(damaged: Damaged, sound: Path) -> Fault:
    """Damage that training does not meet and flow.verify finds: whether an index that is built over it tells, too."""
    try:
        build_index(damaged.task.root)
    except ShardError as error:
        if damaged.shard not in str(error):
            return Fault(damaged.what, survived=False, note=f"names no shard: {error}")
        return Fault(f"{damaged.what}: not read, flow.verify and build_index find it")
    if damaged.what.startswith("tar header"):  # a blank for a blank
        same = (damaged.task.root / "index.bin").read_bytes() == (sound / "index.bin").read_bytes()
        return Fault(f"{damaged.what}: not read, means the same, flow.verify finds it", same, note="another index")
    return Fault(f"{damaged.what}: not read, flow.verify finds it")


# --- going on over damage ----------------------------------------------------------------------------------------


def skipped_damage(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]:
    """Some members are damaged: with data.on_damage=skip, samples whose windows need none of them are what they were,
    others are replaced by ones of their class, in the same way on one rank and on two, and after a restart."""
    sound = make_set(folder / "sound", rng)
    names = ["temporal", "windows"] if short else list(SPECS)
    for name in names:
        kinds = SPECS[name].kinds + SPECS[name].backward_kinds
        for round in range(1 if short else 3):
            root = shutil.copytree(sound, folder / f"{name} {round}")
            entries = read_entries(root, SPECS[name], str(rng.choice(kinds)), 1, NUM_SKIPPING, SKIPPING_SIZE)
            places = [draw_member(entries, rng) for _ in range(2)]
            for place in places:
                damage("block zeroed", place, rng)
            yield _skipped(name, root, sound, [(p.path.name, p.offset) for p in places])
            shutil.rmtree(root)


def _skipped(name: str, root: Path, sound: Path, damaged: list[tuple[str, int]]) -> Fault:
    what, spec, steps = f"{name}: {damaged} zeroed", SPECS[name], NUM_SKIPPING
    skip = {"on_damage": "skip", "max_damaged_pct": 50.0}

    def batches(root: Path, start: int = 0, rank: int = 0, world_size: int = 1, **options: object) -> list:
        index = open_index(root)
        with dali_loader.train_loader(
            index, index.split("split1_train"), spec, seed=1, batch_size=SKIPPING_SIZE, rank=rank,
            world_size=world_size, start_step=start, **options,
        ) as loader:  # fmt: skip
            return [(batch, loader.num_replaced) for batch, _ in zip(loader, range(start, steps), strict=False)]

    whole, clean = batches(root, **skip), batches(sound)
    source = Source(open_index(sound), spec)
    wrong = replaced = 0
    for (got, _), (was, _) in zip(whole, clean, strict=True):
        hit = _touches(source, was.draw, damaged)
        differs = (got.inputs != was.inputs).flatten(1).any(1).numpy()
        replaced += int(differs.sum())
        same_draw = (got.draw.video == was.draw.video) & (got.draw.first == was.draw.first)
        wrong += int((differs & ~hit).sum() + (hit & ~differs & same_draw).sum())
        wrong += int((got.labels != was.labels).sum()) + int(_touches(source, got.draw, damaged).sum())
    halves = [batches(root, rank=rank, world_size=2, **skip) for rank in range(2)]
    for step, (got, _) in enumerate(whole):
        both = np.concatenate([half[step][0].inputs.numpy() for half in halves])
        wrong += int((both != got.inputs.numpy()).any(axis=(1, 2, 3)).sum())
    for (again, _), (got, _) in zip(batches(root, start=3, **skip), whole[3:], strict=True):
        wrong += int((again.inputs != got.inputs).any().item())
    source.close()
    counted = whole[-1][1]
    if wrong or not replaced or not counted:
        note = f"{wrong} wrong samples, {replaced} replaced, {counted} counted as that"
        return Fault(what, survived=False, lost=wrong, note=note)
    return Fault(f"{what}: {replaced} samples replaced")


def _touches(source: Source, draw: Draw, damaged: list[tuple[str, int]]) -> np.ndarray:
    """Which samples (n,) of a draw, or their windows, are made from a damaged member."""
    entries = source.stored_entries(draw.video, draw.first, source.spec.window_steps)
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
