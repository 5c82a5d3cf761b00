"""What scale_costs.py measures with: the coding of a pack, shards, an index of made images, a loader, a checkpoint."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flow_works import read_greys
from pack_parts import PACK_METHOD, spread

import numpy as np  # isort: skip
import torch
from footprint import resident_bytes

from flow.codec import Codec, coding_error, encode_component
from flow.extract import flow_method
from flow.fragment import FragmentTask, Totals, encode_frame, write_fragment
from flow.index import build_index
from flow.pack import VIDEOS_PER_SHARD
from flow.shard import CLIP_FRAMES, Clip, Member, commit_shard, write_clip
from loaders import dali_loader
from loaders.batch import StreamSpec
from loaders.index import Index
from train.checkpoint import Checkpoint, save_checkpoint
from train.model import build_net, build_optimizer
from train.settings import Config

CPU = torch.device("cpu")


def code_work(pairs: Path, number: int) -> Iterator[Any]:
    """What a pack does with every frame and field that it has."""
    codec, frames, (grey0, grey1) = Codec(), np.load(pairs)[:, 0], read_greys(pairs)
    fields = flow_method(PACK_METHOD).batch(grey0, grey1)
    yield {}
    while True:
        for frame, field in zip(frames, fields, strict=True):
            encode_frame(frame, codec.quality)
            for component in field:
                coding_error(component, encode_component(component, codec))
                component.mean(dtype=np.float64)
            yield 1


def timed_fragment(task: FragmentTask) -> tuple[Totals, float]:
    """What was packed of a video, and the CPU seconds that it took."""
    start = time.process_time()
    return write_fragment(task).totals, time.process_time() - start


def measure_bytes(index: Index) -> dict[str, float]:
    """Bytes that a frame takes: its JPEG, its forward field's two, and the rest of the shards."""
    frames = int(index.num_frames.sum())
    each = {kind: int(index.entries[kind]["size"].sum(dtype=np.int64)) for kind in ("rgb", "dx", "dy")}
    fields = int((index.entries["dx"]["size"] > 0).sum())
    rest = sum(index.shard_bytes) - sum(int(table["size"].sum(dtype=np.int64)) for table in index.entries.values())
    pixels = float((index.heights * index.widths * index.num_frames).sum() / frames)
    return {
        "rgb_frame": each["rgb"] / frames,
        "forward_field": (each["dx"] + each["dy"]) / fields,
        "tar_per_frame": rest / frames,
        "pixels": pixels,
    }


def measure_join(fragments: list[Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Joining a shard's number of fragments, again and again, and its hash alone: MB/s by the clock, and of CPU."""
    part = [fragments[i % len(fragments)] for i in range(VIDEOS_PER_SHARD)]
    rates, cpu_rates, hash_rates, num_bytes = [], [], [], 0
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        num_bytes, _ = commit_shard(part, folder / "joined.tar")
        rates.append(num_bytes / 1e6 / (time.perf_counter() - start))
        cpu_rates.append(num_bytes / 1e6 / (time.process_time() - cpu))
        content = (folder / "joined.tar").read_bytes()
        start = time.perf_counter()
        hashlib.sha256(content).digest()
        hash_rates.append(num_bytes / 1e6 / (time.perf_counter() - start))
    found = {"mb_per_s": rates, "mb_per_cpu_s": cpu_rates, "sha256_mb_per_s": hash_rates}
    return {"bytes": num_bytes, **{key: spread(values) for key, values in found.items()}}


def make_small(root: Path, num_frames: int, length: int = 256) -> Path:
    """A shard of so many frames with fields, whose images are a few bytes: an index has nothing to do with them."""
    root.mkdir()
    image, component = Member(b"image"), Member(b"image", -1.0, 1.0, 0.0)
    with open(root / "fragment", "wb") as file:
        for at in range(0, num_frames, length):
            video = (f"class{at % 7}/v_{at:09d}", f"class{at % 7}", None)
            for first in range(0, length, CLIP_FRAMES):
                frames, is_last = range(first, first + CLIP_FRAMES), first + CLIP_FRAMES == length
                fields = frames[:-1] if is_last else frames
                members = {"rgb": dict.fromkeys(frames, image)}
                members |= {kind: dict.fromkeys(fields, component) for kind in ("dx", "dy")}
                write_clip(file, Clip(*video, first, CLIP_FRAMES, is_last, 256, 341, members))
    commit_shard([root / "fragment"], root / "shard-000000.tar")
    (root / "fragment").unlink()
    return root


def index_memory(root: Path) -> dict[str, Any]:
    build_index(root)
    return {"peak_bytes": resident_bytes("VmHWM")}


def measure_loader(index: Index, *, crop_px: int, batch_size: int, cores: int, batches: int) -> dict[str, Any]:
    """Seconds between batches, all of them, after a warm-up that empties what was loaded ahead."""
    spec = StreamSpec(stream="temporal", crop_px=crop_px)
    rows, times = np.arange(index.num_videos), []
    means = {"seed": 0, "batch_size": batch_size, "num_threads": cores}
    with dali_loader.train_loader(index, rows, spec, **means) as loader:
        for _ in range(10):
            next(loader)
        for _ in range(batches):
            start = time.perf_counter()
            next(loader)
            times.append(time.perf_counter() - start)
    rate = batch_size / (sum(times) / len(times))
    return {"samples_per_s": rate, "batch_size": batch_size, "batch_s": sorted(times)}


def measure_checkpoint(folder: Path, rounds: int, width: float) -> dict[str, Any]:
    """Written, fsync included; as after a step, with the momentum of every weight."""
    config = Config()
    config.model.width = width
    net = build_net(config, "temporal", 101, CPU)
    optimizer = build_optimizer(net, config)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    checkpoint = Checkpoint("temporal", 1, net.state_dict(), optimizer.state_dict(), {}, "")
    path, times = folder / "checkpoint.pt", []
    for _ in range(rounds):
        start = time.perf_counter()
        save_checkpoint(checkpoint, path)
        times.append(time.perf_counter() - start)
    gradient = 4 * sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    return {"bytes": path.stat().st_size, "write_s": spread(times), "gradient_bytes": gradient}
