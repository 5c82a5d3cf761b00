"""Training of one stream: one plain loop."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flow.command import nearest_path
from loaders.batch import Batch
from loaders.draw import check_batch_size
from loaders.index import Index
from loaders.joint import JointLoader, Part, part_slots
from loaders.rescale import check_crop
from loaders.shard_pool import pooled
from loaders.source import Source
from nets.cnn_m import CNNM, output_px
from train.checkpoint import (
    Checkpoint,
    checkpoint_files,
    load_checkpoint,
    load_newest,
    load_state,
    save_checkpoint,
    set_aside,
)
from train.config import from_flat, to_flat
from train.dist import World
from train.guard import Ints, LossGuard
from train.log import TrainLog
from train.meter import GpuTimeline, Meter
from train.model import LAST_LAYER, build_net, build_optimizer, check_init, compute_logits, start_from, stream_spec
from train.schedule import learning_rate
from train.sets import check_cache, log_cached
from train.settings import Config
from train.tasks import (
    Tasks,
    batch_shares,
    check_untouched,
    count_correct,
    open_tasks,
    populations,
    samples_of_tasks,
    tasks_loss,
)

logger = logging.getLogger(__name__)

#: Loss, and number of samples that are right.
LossAndCorrect = tuple[Tensor, Tensor]

#: Keeps the draws of several data sets apart under one seed.
SEEDS_APART = 2**40

#: Name of the checkpoint in a stream's folder.
CHECKPOINT = "checkpoint.pt"


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
        "timeout_s": config.train.timeout_s,
    }


def check_stream(
    config: Config,
    stream: str,
    index: Index,
    world_sizes: Sequence[int],
    folder: Path | None = None,
    *,
    num_procs: int = 1,
) -> None:
    """Raise ValueError if the packed set cannot give the stream what the config asks for, or not to any number of ranks
    that there may be, num_procs on each machine.

    folder: the stream's, whose checkpoint, if it has one, training goes on from.
    """
    spec = stream_spec(config, stream)
    for world_size in world_sizes:
        check_batch_size(config.train.batch_size, world_size, spec)
    output_px(spec.crop_px)
    tasks = open_tasks(config, stream, index)
    for data in tasks.sets:
        Source(data.index, spec).close()  # are its members there?
        if data.test_list:
            check_crop(data.index, data.index.split(data.test_list), spec)
    batch_shares(tasks, config, stream, spec)
    if config.data.pool_shards:
        for data, videos in zip(tasks.sets, populations(tasks, spec), strict=True):
            pooled(videos, data.index, config.data.pool_shards, config.data.pool_steps)
    lists = [(data.index, data.rows) for data in tasks.sets]
    check_cache(lists, config.data.pool_shards, min(world_sizes) // num_procs, config.data.pool_steps)
    init = config.stream(stream).init
    if init and not (folder and checkpoint_files(folder / CHECKPOINT)):
        if not Path(init).is_file():
            what = "no such checkpoint. Run the config that makes it, or name another."
            raise FileNotFoundError(f"init={init}: {what}{nearest_path(init)}")
        checkpoint = load_checkpoint(Path(init))
        check_init(build_net(config, stream, sum(tasks.num_outputs), torch.device("meta")), checkpoint, init)
        _check_trained_on(checkpoint, tasks)


def _check_trained_on(checkpoint: Checkpoint, tasks: Tasks) -> None:
    """Raise ValueError if a net to begin with was trained on videos that are to be tested on."""
    config = from_flat(checkpoint.config)
    options = config.stream(checkpoint.stream)
    lists = [config.data.train_list or f"{config.data.split}_train", *options.extra_lists]
    for dataset, name in zip(checkpoint.dataset.split("+"), lists, strict=True):
        for data in tasks.sets:
            if data.test_list and data.index.fingerprint == dataset.partition("/")[0]:
                check_untouched(data, data.index, data.index.split(name))


def train_stream(config: Config, stream: str, index: Index, folder: Path, world: World) -> None:
    """Train one stream up to its last step, from the folder's checkpoint if there is one.

    Leaves in `folder`: checkpoint.pt and those before it, log.jsonl and TensorBoard events. On the CPU a run that was
    stopped anywhere and continued has bitwise the losses of one that was not.
    Raises ValueError if the checkpoint belongs to another data set or none is whole, FloatingPointError if the loss is
    not finite or explodes, OSError if a file cannot be written.
    """
    train, schedule = config.train, config.stream(stream)
    path = folder / CHECKPOINT
    world.at(f"the {stream} net, its data and {path}")
    tasks = open_tasks(config, stream, index)
    for data in tasks.sets:
        log_cached(data.index, stream)
    shares = batch_shares(tasks, config, stream, stream_spec(config, stream))
    net = _begin(config, stream, tasks, world, resumed=bool(checkpoint_files(path)))
    optimizer = build_optimizer(net, config)
    start_step = _restore(net, optimizer, path, tasks, schedule.steps, world)
    logger.info("%s: training steps %d to %d", stream, start_step, schedule.steps)
    if start_step == schedule.steps:
        return
    if train.compile:
        net.compile()
    model = world.wrap(net.train(), bucket_mb=train.bucket_mb, gradient_compression=train.gradient_compression)
    guard = LossGuard(stream, path, start_step, world, lambda rows: _video_ids(rows, tasks, shares, world))
    compute_loss = _loss_of(tasks, shares, world)
    with (
        _train_loader(config, stream, tasks, shares, start_step, world) as loader,
        _open_log(folder, start_step, world) as log,
    ):
        meter = Meter(GpuTimeline() if world.device.type == "cuda" else None)
        for step in tqdm(
            range(start_step, schedule.steps),
            desc=stream,
            initial=start_step,
            total=schedule.steps,
            disable=None if world.is_main else True,
        ):
            done = step + 1
            world.at(f"the {stream} batch of step {done}")
            batch = meter.next(loader)
            world.at(f"the {stream} update of step {done}, in which all processes take part")
            lr = learning_rate(step, schedule.lr, schedule.milestones)
            masks = net.draw_masks(
                train.seed, step, batch_size=train.batch_size, rank=world.rank, world_size=world.world_size
            )
            guard.add(done, *update(model, optimizer, lr, batch, masks, config, compute_loss), batch.draw.video)
            meter.count(train.batch_size)
            if done % train.log_every == 0 or done == schedule.steps:
                loss, num_correct = guard.look()
                accuracy_pct = 100 * num_correct / train.batch_size
                record = {"step": done, "loss": loss, "accuracy_pct": accuracy_pct, "lr": lr, **meter.lap()}
                if config.data.on_damage == "skip":
                    record["num_replaced"] = loader.num_replaced
                if log is not None:
                    log.write(record)
            if done % train.checkpoint_every == 0 or done == schedule.steps:
                guard.look()
                guard.check_weights(net, done)
                if log is not None:
                    log.sync()
                _save(net, optimizer, done, config, stream, tasks, path, world)
                guard.saved = done


def loss_of_slice(logits: Tensor, batch: Batch) -> LossAndCorrect:
    """Mean cross-entropy of a slice, slices are equal; and how many of its samples are right."""
    return F.cross_entropy(logits, batch.labels), count_correct(logits, batch.labels, None, [logits.shape[1]])


def _loss_of(tasks: Tasks, shares: Sequence[int], world: World) -> Callable[[Tensor, Batch], LossAndCorrect]:
    """Loss and count of a stream's tasks, or the plain ones of a single data set."""
    if len(tasks.sets) == 1:
        return loss_of_slice
    num_outputs, num_samples = tasks.num_outputs, samples_of_tasks(tasks, shares)
    return lambda logits, batch: (
        tasks_loss(logits, batch.labels, batch.task, num_outputs, num_samples, world.world_size),
        count_correct(logits, batch.labels, batch.task, num_outputs),
    )


def _begin(config: Config, stream: str, tasks: Tasks, world: World, *, resumed: bool) -> CNNM:
    """The net before its first update; a resumed run's own weights come later."""
    options = config.stream(stream)
    net = build_net(config, stream, sum(tasks.num_outputs), world.device)
    if options.init and not resumed:
        start_from(net, options.init)
    if options.train_layers == "last":
        for name, parameter in net.named_parameters():
            parameter.requires_grad = name.startswith(LAST_LAYER)
    return net


def update(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    lr: float,
    batch: Batch,
    masks: tuple[Tensor, ...],
    config: Config,
    compute_loss: Callable[[Tensor, Batch], LossAndCorrect] = loss_of_slice,
) -> LossAndCorrect:
    """One SGD update on this rank's slice of the global batch.

    compute_loss: of (logits, batch), such that its mean over the ranks is the global batch's loss: their gradients
    are averaged by the wrapped model.
    Returns the slice's loss before the update, and how many of its samples were right; scalars, on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, num_correct = compute_loss(compute_logits(model, batch.inputs, masks, config), batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if config.train.clip_grad_norm is not None:  # the gradients, and so their norm, are the same in every process
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_grad_norm)
    optimizer.step()
    return loss.detach(), num_correct


def _train_loader(
    config: Config, stream: str, tasks: Tasks, shares: Sequence[int], start_step: int, world: World
) -> Any:
    """The training batches of this rank, of one data set or several."""
    options = {"start_step": start_step, **loader_options(config, world)}
    options |= {"on_damage": config.data.on_damage, "max_damaged_pct": config.data.max_damaged_pct}
    options |= {"pool_shards": config.data.pool_shards, "pool_steps": config.data.pool_steps}
    make, spec, seed = loader_module(config).train_loader, stream_spec(config, stream), config.train.seed
    if len(tasks.sets) == 1:
        (data,) = tasks.sets
        loader = make(data.index, data.rows, spec, seed=seed, batch_size=config.train.batch_size, **options)
        num_left_out = loader.num_left_out
    else:
        del options["rank"], options["world_size"]
        parts = []
        slots = part_slots(shares, world.rank, world.world_size)
        with ExitStack() as opened:
            for number, (data, share, own) in enumerate(zip(tasks.sets, shares, slots, strict=True)):
                if own[0] < own[1]:  # this rank has samples of the set
                    drawn = {"seed": seed + number * SEEDS_APART, "batch_size": share, "slots": own}
                    part = opened.enter_context(make(data.index, data.rows, spec, **drawn, **options))
                    parts.append(Part(part, data.task, data.label_map))
            loader = JointLoader(parts, opened.pop_all())
        num_left_out = sum(part.loader.num_left_out for part in parts)
    if num_left_out:
        logger.warning("%s: %d videos are too short for training and left out", stream, num_left_out)
    return loader


def _open_log(folder: Path, start_step: int, world: World) -> AbstractContextManager[TrainLog | None]:
    if not world.is_main:
        return nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    return TrainLog(folder, start_step)


def _video_ids(rows: Ints, tasks: Tasks, shares: Sequence[int], world: World) -> list[str]:
    """Names of the videos of this process's slice of a batch, in which one data set's samples follow another's."""
    names, at = [], 0
    for data, (begin, end) in zip(tasks.sets, part_slots(shares, world.rank, world.world_size), strict=True):
        names += data.index.video_ids(rows[at : at + end - begin])
        at += end - begin
    return names


def _restore(net: nn.Module, optimizer: torch.optim.SGD, path: Path, tasks: Tasks, num_steps: int, world: World) -> int:
    """Load net and optimizer from the newest whole checkpoint, if there is one. Returns the number of updates done."""
    checkpoint, damaged = load_newest(path, dataset=tasks.fingerprint)
    if checkpoint:
        if checkpoint.step > num_steps:
            raise ValueError(
                f"{path} is of step {checkpoint.step}, but the run has {num_steps}: it is another run's. Put its own "
                "back, or start over with --resume never."
            )
        load_state(net, checkpoint.net, path)
        load_state(optimizer, checkpoint.optimizer, path)
    step = checkpoint.step if checkpoint else 0
    _check_same_step(step, path.parent, world)  # now all have read
    if world.is_main:
        for file in damaged:
            logger.warning(
                "%s is damaged: it is now %s, and training goes on from the checkpoint before it, of step %d",
                file,
                set_aside(file, path).name,
                step,
            )
    return step


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
    tasks: Tasks,
    path: Path,
    world: World,
) -> None:
    if world.is_main:
        world.at(f"{path} of step {step} to be written")
        state = Checkpoint(stream, step, net.state_dict(), optimizer.state_dict(), to_flat(config), tasks.fingerprint)
        save_checkpoint(state, path, keep=config.train.keep_checkpoints)
    world.barrier(f"process 0 to write {path} of step {step}")  # nobody reads, or ends, before the file is there
