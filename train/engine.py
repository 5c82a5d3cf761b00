"""Training of one stream: one plain loop."""

from __future__ import annotations

import importlib
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from loaders.batch import Batch, StreamSpec
from loaders.draw import check_batch_size, check_crop, population
from loaders.index import Index
from loaders.source import Source
from nets.cnn_m import CNNM, output_px
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.config import Config, to_flat
from train.dist import World
from train.log import TrainLog
from train.meter import GpuTimeline, Meter
from train.schedule import learning_rate

logger = logging.getLogger(__name__)

#: Name of the checkpoint in a stream's folder.
CHECKPOINT = "checkpoint.pt"

#: A GPU's tensor cores want it; on a CPU it makes a training step up to 1.8 times faster.
MEMORY_FORMAT = torch.channels_last


def stream_spec(config: Config, stream: str) -> StreamSpec:
    """What the stream's loader delivers under this config."""
    data = config.data
    return StreamSpec(
        stream=stream,
        L=data.L,
        crop_px=data.crop_px,
        subtract_mean=data.subtract_mean,
        color_jitter=data.color_jitter,
        random_mirror=data.random_mirror,
        stacks_per_window=data.stacks_per_window if stream == "temporal" else 1,
    )


def loader_module(config: Config) -> Any:
    """The module with the configured `train_loader` and `view_loader`."""
    names = {"dali": "loaders.dali_loader", "reference": "loaders.reference"}
    return importlib.import_module(names[config.data.loader])  # DALI is imported only where it is used


def loader_options(config: Config, world: World) -> dict[str, Any]:
    """The arguments that `train_loader` and `view_loader` share."""
    return {
        "rank": world.rank,
        "world_size": world.world_size,
        "device": world.device.type,  # the process has chosen its GPU already
        "num_threads": config.data.num_threads or world.num_threads,
        "decoder": config.data.decoder,
    }


def build_net(config: Config, stream: str, num_classes: int, device: torch.device) -> CNNM:
    """The stream's net on the device; its initial weights depend on the config alone."""
    net = CNNM(
        stream_spec(config, stream).num_channels,
        num_classes,
        width=config.model.width,
        input_px=config.data.crop_px,
        dropout=config.stream(stream).dropout,
        second_lrn=stream == "spatial",
        seed=config.train.seed,
    )
    net.to(device)
    return net.to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload]


def build_optimizer(net: nn.Module, config: Config) -> torch.optim.SGD:
    """SGD with the configured momentum and weight decay; the learning rate is set anew at each step."""
    return torch.optim.SGD(net.parameters(), momentum=config.train.momentum, weight_decay=config.train.weight_decay)


def compute_logits(net: nn.Module, inputs: Tensor, masks: tuple[Tensor, ...] | None, config: Config) -> Tensor:
    """One forward pass in the configured precision. Returns logits (N, num_classes) float32."""
    kind = inputs.device.type
    bfloat16 = config.train.precision == "bfloat16" or (config.train.precision == "auto" and kind == "cuda")
    with torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
        # Autocast would convert the type anyway; with the layout it is one pass over the batch.
        dtype = torch.bfloat16 if bfloat16 else inputs.dtype
        return net(inputs.to(dtype, memory_format=MEMORY_FORMAT), masks).float()


def check_stream(config: Config, stream: str, index: Index, world_size: int) -> None:
    """Raise ValueError if the packed set cannot give the stream what the config asks for, or not to so many ranks."""
    spec = stream_spec(config, stream)
    check_batch_size(config.train.batch_size, world_size, spec)
    output_px(spec.crop_px)
    Source(index, spec).close()  # are its members there?
    population(index, index.split(f"{config.data.split}_train"), spec)
    check_crop(index, index.split(f"{config.data.split}_test"), spec)


def train_stream(config: Config, stream: str, index: Index, folder: Path, world: World) -> None:
    """Train one stream up to its last step, from the folder's checkpoint if there is one.

    Leaves in `folder`: checkpoint.pt, log.jsonl and TensorBoard events. On the CPU a run that was stopped anywhere and
    continued has bitwise the losses of one that was not.
    Raises ValueError if the checkpoint belongs to another data set, FloatingPointError if the loss is not finite.
    """
    train, schedule = config.train, config.stream(stream)
    net = build_net(config, stream, len(index.classes), world.device)
    optimizer = build_optimizer(net, config)
    start_step = _restore(net, optimizer, folder / CHECKPOINT, index)
    _check_same_step(start_step, folder, world)
    logger.info("%s: training steps %d to %d", stream, start_step, schedule.steps)
    if start_step == schedule.steps:
        return
    if train.compile:
        net.compile()
    model = world.wrap(net.train(), bucket_mb=train.bucket_mb, gradient_compression=train.gradient_compression)
    with _train_loader(config, stream, index, start_step, world) as loader, _open_log(folder, start_step, world) as log:
        meter = Meter(GpuTimeline() if world.device.type == "cuda" else None)
        for step in tqdm(
            range(start_step, schedule.steps),
            desc=stream,
            initial=start_step,
            total=schedule.steps,
            disable=None if world.is_main else True,
        ):
            batch = meter.next(loader)
            lr = learning_rate(step, schedule.lr, schedule.milestones)
            masks = net.draw_masks(
                train.seed, step, batch_size=train.batch_size, rank=world.rank, world_size=world.world_size
            )
            loss = update(model, optimizer, lr, batch, masks, config)
            meter.count(train.batch_size)
            done = step + 1
            if done % train.log_every == 0 or done == schedule.steps:
                record = {"step": done, "loss": _finite_mean(loss, stream, done, world), "lr": lr, **meter.lap()}
                if log is not None:
                    log.write(record)
            if done % train.checkpoint_every == 0 or done == schedule.steps:
                _save(net, optimizer, done, config, stream, index, folder, world)


def update(
    model: nn.Module, optimizer: torch.optim.SGD, lr: float, batch: Batch, masks: tuple[Tensor, ...], config: Config
) -> Tensor:
    """One SGD update on this rank's slice of the global batch. Returns the slice's mean loss before it, a scalar.

    Slices are equal, so the mean of the ranks' gradients, which the wrapped model computes, is the global batch's.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = F.cross_entropy(compute_logits(model, batch.inputs, masks, config), batch.labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _finite_mean(loss: Tensor, stream: str, step: int, world: World) -> float:
    """Mean loss of the global batch; on a GPU this waits for the step."""
    mean = world.sum(loss.double()).item() / world.world_size
    if not math.isfinite(mean):
        raise FloatingPointError(f"{stream}: the loss is {mean} at step {step}; lower {stream}.lr.")
    return mean


def _train_loader(config: Config, stream: str, index: Index, start_step: int, world: World) -> Any:
    loader = loader_module(config).train_loader(
        index,
        index.split(f"{config.data.split}_train"),
        stream_spec(config, stream),
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        start_step=start_step,
        **loader_options(config, world),
    )
    if loader.num_left_out:
        logger.warning("%s: %d videos are too short for training and left out", stream, loader.num_left_out)
    return loader


def _open_log(folder: Path, start_step: int, world: World) -> AbstractContextManager[TrainLog | None]:
    if not world.is_main:
        return nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    return TrainLog(folder, start_step)


def _restore(net: nn.Module, optimizer: torch.optim.SGD, path: Path, index: Index) -> int:
    """Load net and optimizer from the checkpoint at `path`, if there is one. Returns the number of updates done."""
    if not path.exists():
        return 0
    checkpoint = load_checkpoint(path, dataset=index.fingerprint)
    net.load_state_dict(checkpoint.net)
    optimizer.load_state_dict(checkpoint.optimizer)
    return checkpoint.step


def _check_same_step(start_step: int, folder: Path, world: World) -> None:
    """Raise ValueError if the processes found different checkpoints: they would train apart, and then hang."""
    steps = torch.zeros(world.world_size, dtype=torch.int64, device=world.device)
    steps[world.rank] = start_step
    found = set(world.sum(steps).tolist())
    if len(found) > 1:
        raise ValueError(
            f"The processes find checkpoints of steps {sorted(found)} in {folder}, each on its own disk. Several "
            "machines need one run folder that all of them see."
        )


def _save(
    net: nn.Module,
    optimizer: torch.optim.SGD,
    step: int,
    config: Config,
    stream: str,
    index: Index,
    folder: Path,
    world: World,
) -> None:
    if world.is_main:
        state = Checkpoint(stream, step, net.state_dict(), optimizer.state_dict(), to_flat(config), index.fingerprint)
        save_checkpoint(state, folder / CHECKPOINT)
    world.barrier()  # nobody reads, or ends, before the file is there
