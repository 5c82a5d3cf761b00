"""What is fuzzed: functions of a file's bytes that read it as the program does, and check what was accepted.

The suite and the fuzzer call them by `tests.fuzz.judge.attempt`.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from flow import catalog, flow_dirs, flow_files, image_sources, images, verify
from flow.clips import read_clips
from flow.fragment import FragmentReport
from flow.index import build_index, load_index
from flow.shard import ShardError, shard_name
from flow.video import VIDEO_EXTENSIONS, read_frames
from loaders.batch import StreamSpec
from loaders.index import open_index
from loaders.source import Source
from tests.fuzz import mutate, seeds
from tests.fuzz.judge import Refused

_EXTENSIONS = sorted(VIDEO_EXTENSIONS)
#: Between the files of a target that reads several.
NEXT_FILE = b"\n====\n"


@cache
def folder() -> Path:
    """Where this process writes the files that are read."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def _set(name: str) -> Path:
    """A folder for one target, that holds a sound packed set."""
    return shutil.copytree(seeds.packed_set(True), folder() / name)


def _put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


# --- packed sets -------------------------------------------------------------------------------------------------


def read_index(data: bytes) -> None:
    """The bytes are index.bin: everything that it says is looked up."""
    root = _set("index")
    _put(root / "index.bin", data)
    _use(root)


def read_dataset_json(data: bytes) -> None:
    """The bytes are dataset.json, the shards and index sound."""
    root = _set("dataset_json")
    _put(root / "dataset.json", data)
    _use(root)


def read_shard(data: bytes) -> None:
    """The bytes are a shard of its own: verified, indexed, and used with a dataset.json that fits it."""
    root = folder() / "shard"
    path = _put(root / shard_name(0), data)
    for rest in ("index.bin", "dataset.json"):
        (root / rest).unlink(missing_ok=True)
    report = verify.verify_shard(verify.ShardTask(root, path.name, len(data), None, deep=True))
    accepted = _accepts(path)
    assert accepted or report.damages, "a shard that read_clips refuses, verified"
    _complete(root)
    num_damaged = _use(root)
    assert bool(num_damaged) <= bool(report.damages), "a damaged member, verified"


def _accepts(path: Path) -> bool:
    try:
        for _ in read_clips(path):
            pass
    except ShardError:
        return False
    return True


def _complete(root: Path) -> None:
    """Make a packed set of a folder that holds the first shard alone."""
    build_index(root)
    header, arrays = load_index(root)
    shards = [{**shard, "sha256": "0" * 64} for shard in header["shards"]]
    dataset = {"classes": header["classes"], "num_videos": len(arrays["videos"]), "shards": shards}
    sound = json.loads((seeds.packed_set(True) / "dataset.json").read_bytes())
    _put(root / "dataset.json", json.dumps({**sound, **dataset}).encode())


def read_clip_json(data: bytes) -> None:
    """The bytes are a clip's JSON, in a tar with right headers and the other members of a sound one."""
    header, _, rest = seeds.clip_parts(backward=b'"bdx"' in data)
    header = mutate.sealed(header[:124] + b"%011o\0" % len(data) + header[136:])
    read_shard(header + data + bytes(-len(data) % 512) + rest)


def _use(root: Path) -> int:
    """Open a packed set, hold it against what an index promises, and read every member; how many are damaged."""
    index = open_index(root)
    rows = np.arange(index.num_videos)
    ids = index.video_ids(rows)
    assert index.video_ids(index.rows(ids)) == ids
    assert len(index.fingerprint) == 16
    assert all(0 <= label < len(index.classes) for label in index.labels.tolist())
    assert all(0 <= shard < len(index.shards) for shard in index.shard.tolist())
    for table in index.entries.values():
        assert ((0 <= index.first_row) & (index.first_row + index.num_frames <= len(table))).all()
    for name in index.splits():
        assert set(index.split(name).tolist()) <= set(rows.tolist())
    return sum(_damaged(index, spec) for spec in _SPECS if set(spec.kinds + spec.backward_kinds) <= set(index.entries))


_SPECS = (StreamSpec(stream="spatial", crop_px=8), StreamSpec(stream="temporal", L=2, crop_px=8))
_SPECS += (StreamSpec(stream="temporal", L=2, crop_px=8, bidirectional=True),)
_SPECS += (StreamSpec(stream="temporal", L=2, crop_px=8, stacking="trajectory"),)


def _damaged(index, spec: StreamSpec) -> int:
    """How many samples of a stream are refused as damaged. All the others' bytes are those of the CRC."""
    source, damaged = Source(index, spec), 0
    fits = index.num_frames >= spec.frames_needed + spec.frames_before
    for video in np.flatnonzero(fits).tolist():
        for tau in range(spec.frames_before, int(index.num_frames[video]) - spec.frames_needed + 1)[:64]:
            try:
                encoded = source.read(np.array([video]), np.array([tau]), spec.steps)
                assert all(len(image) > 4 for image in encoded.images())
                source.release(encoded)
            except ShardError:
                damaged += 1
    source.close()
    return damaged


# --- JPEG bytes whose CRC is right, in the loader ----------------------------------------------------------------


def read_component(data: bytes) -> None:
    """The bytes are one of the 20 components of a stack that 640 JPEGs of a batch are made of."""
    spec = StreamSpec(stream="temporal", L=seeds.JPEG_STEPS, crop_px=seeds.JPEG_PX // 2, random_mirror=False)
    _load(seeds.jpeg_set(folder() / "component", component=data), spec, 32)


def read_frame(data: bytes) -> None:
    """The bytes are a frame, of which 640 crops are decoded."""
    spec = StreamSpec(stream="spatial", crop_px=seeds.JPEG_PX // 2, random_mirror=False, color_jitter=False)
    _load(seeds.jpeg_set(folder() / "frame", frame=data), spec, 640)


def _load(root: Path, spec: StreamSpec, batch_size: int) -> None:
    """A batch of the real loader, if its source takes the bytes. Equal crops must be equal, or stale memory shows."""
    import torch

    from loaders.dali_loader import train_loader
    from loaders.pipeline import Graph

    index, video = open_index(root), np.array([0])
    Source(index, spec).read(video, video, spec.steps)  # most bytes end here, at a hundredth of the cost
    with train_loader(index, video, spec, seed=0, batch_size=batch_size, graph=Graph(num_threads=2)) as loader:
        batch = next(loader)
        assert bool(torch.isfinite(batch.inputs).all())
        crops = {}
        for image, crop, tau in zip(batch.inputs, batch.draw.crop.tolist(), batch.draw.tau.tolist(), strict=True):
            first = crops.setdefault((*crop, tau), image)
            assert torch.equal(first, image), f"two crops at {crop} differ"


# --- lists, videos, tars of images -------------------------------------------------------------------------------


def read_split_files(data: bytes) -> None:
    """The bytes are the kind of lists, and the files, between NEXT_FILE."""
    kind, *files = data.split(NEXT_FILE)
    path = folder() / "lists"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    names = {b"ucf101": ["classInd.txt", "trainlist01.txt", "testlist01.txt", "trainlist02.txt", "testlist02.txt"]}
    names[b"hmdb51"] = [f"{name}_test_split1.txt" for name in ("run", "walk", "sit")]
    if kind not in names:
        root = _set("lists_of_set")
        _put(root / "splits" / "x.txt", data)
        assert open_index(root).split("x").max(initial=0) < open_index(root).num_videos
        return
    for name, content in zip(names[kind], files, strict=False):
        _put(path / name, content)
    lists = catalog.LIST_READERS[kind.decode()](path)
    videos = [catalog.Video("run/a", "run", path / "a.avi"), catalog.Video("walk/b", "walk", path / "b.avi")]
    found = catalog.match(kind.decode(), path, videos, lists)
    assert {video_id for ids in found.splits.values() for video_id in ids} <= {"run/a", "walk/b"}


def read_video(data: bytes) -> None:
    """The bytes are which file extension, and a video."""
    path = folder() / f"clip{_EXTENSIONS[data[0] % len(_EXTENSIONS)] if data else '.avi'}"
    _put(path, data[1:])
    try:
        shapes = {frame.shape for frame in read_frames(path)}
        assert len(shapes) == 1 and len(shapes.pop()) == 3
    finally:
        path.unlink()


def read_image_tar(data: bytes) -> None:
    """The bytes are a WebDataset tar of images with classes."""
    path = _put(folder() / "images" / "train.tar", data)
    for source in image_sources.read_source(str(path)):
        assert 0 <= source.offset <= source.offset + source.num_bytes <= len(data)


def read_image(data: bytes) -> None:
    """The bytes are an image file that is packed."""
    path = _put(folder() / "image.jpg", data)
    source = image_sources.Source("run/a", "run", path, 0, len(data), None)
    _packed(images.write_images(images.ImagesTask(folder() / "image", [source], 16, 90, None)), folder() / "image")


def read_flow_jpeg(data: bytes) -> None:
    """The bytes are whether a frame, and a JPEG that another tool extracted, which is packed as it is."""
    root, fragment = seeds.flow_folder(folder() / "flow"), folder() / "fragment"
    name = "img_00002.jpg" if data[:1] == b"\1" else "flow_x_00001.jpg"
    sound = (root / "run" / "a" / name).read_bytes()
    try:
        _put(root / "run" / "a" / name, data[1:])
        (video,) = flow_files.list_flow_dirs(root, None, None)
        report = flow_dirs.write_flow_dir(flow_dirs.FlowDirTask(video, None, fragment, 20.0, None))
    finally:
        _put(root / "run" / "a" / name, sound)
    _packed(report, fragment)


def _packed(report: FragmentReport, fragment: Path) -> None:
    """Raise what kept a file from being packed; else make a set of it, whose every member has to be sound."""
    if report.bad:
        raise Refused(*report.bad.values())
    root = folder() / "packed"
    _put(root / shard_name(0), fragment.read_bytes() + bytes(1024))
    _complete(root)
    assert not _use(root), "packed, but refused by the loader"


# --- what a run holds --------------------------------------------------------------------------------------------


def read_score_file(data: bytes) -> None:
    from train.scores import check_aligned, read_scores

    scores = read_scores(_put(folder() / "scores.npz", data))
    check_aligned({"a": scores, "b": scores})
    num_videos, num_classes = len(scores.video_ids), len(scores.classes)
    assert scores.scores.shape == (num_videos, num_classes)
    assert np.allclose(scores.scores.sum(axis=1), 1, atol=1e-2)
    assert ((0 <= scores.labels) & (scores.labels < num_classes)).all()
    assert scores.labels.shape == scores.num_views.shape == (num_videos,)


def read_config_file(data: bytes) -> None:
    from train.config import read_config, short_hash, write_config

    config = read_config(_put(folder() / "config.yaml", data))
    write_config(config, folder() / "again.yaml")
    assert short_hash(read_config(folder() / "again.yaml")) == short_hash(config)


def read_checkpoint(data: bytes) -> None:
    from train.checkpoint import load_checkpoint
    from train.config import from_flat

    checkpoint = load_checkpoint(_put(folder() / "checkpoint.pt", data))
    assert type(checkpoint.step) is int and checkpoint.step >= 0
    assert checkpoint.stream in ("spatial", "temporal")
    from_flat(checkpoint.config)


def read_exported_net(data: bytes) -> None:
    import torch

    from train.export import load_net

    net, about = load_net(_put(folder() / "net.safetensors", data))
    arguments = about["architecture"]["arguments"]
    channels = arguments["num_channels"] * arguments.get("num_frames", 1)
    with torch.inference_mode():
        logits = net(torch.zeros(1, channels, *[arguments.get("input_px", 224)] * 2))
    assert logits.shape[1] >= len(about["outputs"]["classes"]) >= 1


def read_log_file(data: bytes) -> None:
    from train.log import read_log

    for record in read_log(_put(folder() / "log.jsonl", data)):
        assert type(record["step"]) is int


def read_book_file(data: bytes) -> None:
    from train.record import read_book, write_book

    book = read_book(_put(folder() / "book.json", data))
    write_book(book, folder() / "again.json")
    assert read_book(folder() / "again.json").runs.keys() == book.runs.keys()


@dataclass(frozen=True)
class Target:
    """read: ends in success or one of our errors. seeds: sound inputs. mutate: changes that keep them plausible.

    native: bytes reach decoders in C, which may end the process or hang: only a child may do that.
    """

    name: str
    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: mutate.Mutator
    native: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("index", read_index, seeds.indexes, mutate.mutate_index),
        Target("shard", read_shard, seeds.shards, mutate.mutate_tar),
        Target("clip_json", read_clip_json, seeds.clip_jsons, mutate.mutate_json),
        Target("dataset_json", read_dataset_json, seeds.dataset_jsons, mutate.mutate_json),
        Target("component_jpeg", read_component, seeds.components, mutate.mutate_jpeg, native=True),
        Target("frame_jpeg", read_frame, seeds.frames, mutate.mutate_jpeg, native=True),
        Target("split_files", read_split_files, seeds.split_files, mutate.mutate_text),
        Target("video", read_video, seeds.videos, mutate.mutate_bytes, native=True),
        Target("image_tar", read_image_tar, seeds.image_tars, mutate.mutate_tar),
        Target("image", read_image, seeds.images, mutate.mutate_bytes, native=True),
        Target("flow_jpeg", read_flow_jpeg, seeds.flow_jpegs, mutate.mutate_jpeg, native=True),
        Target("scores", read_score_file, seeds.score_files, mutate.mutate_zip),
        Target("config", read_config_file, seeds.configs, mutate.mutate_text),
        Target("checkpoint", read_checkpoint, seeds.checkpoints, mutate.mutate_zip),
        Target("exported_net", read_exported_net, seeds.exported_nets, mutate.mutate_safetensors),
        Target("log", read_log_file, seeds.logs, mutate.mutate_json),
        Target("book", read_book_file, seeds.books, mutate.mutate_json),
    )
}
