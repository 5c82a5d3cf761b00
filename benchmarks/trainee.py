"""A net in training as train.launch trains it, and its loader, timed: what train_step.py and scaling.py share."""

import argparse
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import add_data, choose_crop_px

from loaders.batch import Batch
from loaders.index import Index
from train.config import from_flat
from train.dist import World
from train.engine import loader_module, loader_options, update
from train.meter import GpuTimeline, Meter
from train.model import build_net, build_optimizer, stream_spec
from train.settings import Config

#: Option -> its default on GPUs, and on a CPU.
Defaults = dict[str, tuple[Any, Any]]

#: Too small for weights that see one batch again and again to leave the range of usual numbers.
LEARNING_RATE = 1e-4

#: More than a loader has ready when nobody took a batch for a while.
QUEUED_BATCHES = 8


class Trainee:
    """A temporal net with its optimizer, trained as train.launch trains it."""

    def __init__(self, config: Config, num_classes: int, world: World):
        self.config, self.world = config, world
        self.net = build_net(config, "temporal", num_classes, world.device)
        self.optimizer = build_optimizer(self.net, config)
        if config.train.compile:
            self.net.compile()
        sending = {"bucket_mb": config.train.bucket_mb, "gradient_compression": config.train.gradient_compression}
        self.model = world.wrap(self.net.train(), **sending)
        self.step = 0

    def masks(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Dropout masks of the next step, for this process's slice of it."""
        world, seed = self.world, self.config.train.seed
        size = len(batch.labels) * world.world_size
        return self.net.draw_masks(seed, self.step, batch_size=size, rank=world.rank, world_size=world.world_size)

    def train(self, batch: Batch) -> None:
        """One update; on a GPU it is only queued."""
        update(self.model, self.optimizer, LEARNING_RATE, batch, self.masks(batch), self.config)
        self.step += 1


def time_steps(trainee: Trainee, batches: Iterator[Batch], steps: int, warm_up: int) -> dict[str, float]:
    """{"step_s", "samples_per_s", "data_wait_pct"} of a group of steps; the samples are those of all processes."""
    world = trainee.world
    for _ in range(warm_up):
        trainee.train(next(batches))
    wait_for(world.device)
    world.barrier()
    meter = Meter(GpuTimeline() if world.device.type == "cuda" else None)
    for _ in range(steps):
        batch = meter.next(batches)
        trainee.train(batch)
        meter.count(len(batch.labels) * world.world_size)
    wait_for(world.device)
    rates = meter.lap()
    return {"step_s": len(batch.labels) * world.world_size / rates["samples_per_s"], **rates}


def time_part(trainee: Trainee, batch: Batch, steps: int, warm_up: int) -> dict[str, float]:
    """{"num_samples", "step_s", "hidden_s"} of a device's share of a batch, resident; see `scaling_model.Parts`."""
    marks: list[Any] = []
    on_gpu = batch.inputs.is_cuda

    def mark(*_: Any) -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()

    weight = trainee.net.full6.weight
    hooks = [weight.register_post_accumulate_grad_hook(mark), trainee.optimizer.register_step_pre_hook(mark)]
    step_s = time_steps(trainee, repeat(batch), steps, warm_up)["step_s"]
    for hook in hooks:
        hook.remove()
    pairs = list(zip(marks[::2], marks[1::2], strict=True))[warm_up:]
    hidden = [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairs]
    return {"num_samples": len(batch.labels), "step_s": step_s, "hidden_s": median(hidden)}


def time_all_reduce(world: World, num_values: int, compression: str) -> float:
    """Seconds to sum as many values as there are gradients, with nothing beside it. Median of five."""
    dtype = torch.bfloat16 if compression == "bfloat16" else torch.float32
    values, times = torch.zeros(num_values, dtype=dtype, device=world.device), []
    for _ in range(6):
        wait_for(world.device)
        world.barrier()
        start = time.perf_counter()
        world.sum(values)
        wait_for(world.device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def wait_for(device: torch.device) -> None:
    """Return when all queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def open_loader(config: Config, index: Index, world: World) -> Any:
    """The project's training loader under this config."""
    rows, spec = index.split(f"{config.data.split}_train"), stream_spec(config, "temporal")
    options = {"seed": config.train.seed, "batch_size": config.train.batch_size, **loader_options(config, world)}
    return loader_module(config).train_loader(index, rows, spec, **options)


def loader_rate(batches: Iterator[Batch], device: torch.device, seconds: float) -> float:
    """Samples/s of one process's loader when nothing else runs."""
    for _ in range(QUEUED_BATCHES):
        next(batches)
    wait_for(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches).labels)
    wait_for(device)
    return count / (time.perf_counter() - start)


def copied(batch: Batch, size: int | None = None) -> Batch:
    """The first `size` samples of a training batch, in memory of their own: they outlive the loader."""
    return Batch(inputs=batch.inputs[:size].clone(), labels=batch.labels[:size].clone(), draw=batch.draw)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def make_config(options: argparse.Namespace, data: Path, **more: Any) -> Config:
    """The run's config; `more` is written section__key=value."""
    values = {
        "data.root": str(data),
        "data.split": options.split,
        "data.L": options.L,
        "data.crop_px": options.crop_px,
        "model.width": options.width,
        "train.batch_size": options.batch_size,
    }
    return from_flat({**values, **{key.replace("__", "."): value for key, value in more.items()}})


def add_arguments(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """The arguments that both benchmarks share; `fill` gives those that are left out."""
    said = {name: f"{a} on GPUs, {b} on a CPU" if a != b else f"{a}" for name, (a, b) in defaults.items()}
    add_data(parser)
    parser.add_argument("--split", default="split1", metavar="NAME", help="official split (default %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"global batch (default {said['batch_size']})")
    parser.add_argument(
        "--width", type=float, metavar="X", help=f"factor on the net's channels and units (default {said['width']})"
    )
    parser.add_argument(
        "--crop-px",
        type=int,
        metavar="PX",
        help=f"side of the input (default {said['crop_px']}, or what fits into smaller frames)",
    )
    parser.add_argument("--L", type=int, default=10, metavar="N", help="fields of a stack (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved (default %(default)s)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"of a group, whose mean is one figure (default {said['steps']})"
    )
    parser.add_argument("--warm-up", type=int, metavar="N", help=f"steps before a group (default {said['warm_up']})")
    parser.add_argument("--quick", action="store_true", help="one short round of a tiny net: does it run?")


def fill(options: argparse.Namespace, defaults: Defaults, on_gpu: bool) -> bool:
    """Give the options that were left out their defaults; --quick overrules sizes and times.

    Returns whether the crop is another than the default, as it is for smaller frames.
    """
    usual = {name: values[0 if on_gpu else 1] for name, values in defaults.items()}
    if not options.quick:
        options.crop_px = choose_crop_px(options.data, options.crop_px, usual["crop_px"])
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    other_crop = bool(options.crop_px != usual["crop_px"])
    if options.quick:
        vars(options).update(batch_size=8, width=1 / 32, crop_px=48, L=3)
        vars(options).update(rounds=1, steps=2, warm_up=1, loader_seconds=0.1)
    return other_crop
