"""Class scores of whole videos: `python -m train.evaluate RUN`.

A video's score is the softmax averaged over num_taus stacks at equal spacing x 10 views: the four corners and the
centre, and their mirror images (sec. 5). The test list gets `eval.num_taus`, 25 in the paper; the training list, whose
scores only fit the SVM, gets `eval.num_taus_train`.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from flow.command import Parser, describe_error
from loaders.batch import Batch
from loaders.draw import Draw
from loaders.index import Index
from loaders.views import VIEWS
from train.checkpoint import load_checkpoint, load_state
from train.config import read_config
from train.disk import writing
from train.dist import ProcessFailedError, World, launch
from train.engine import CHECKPOINT, loader_module, loader_options
from train.machines import Machines
from train.model import build_net, compute_logits, stream_spec
from train.report import leave_report
from train.scores import Scores, read_scores, score_file, write_scores
from train.sets import open_set
from train.settings import Config
from train.tasks import open_tasks

logger = logging.getLogger(__name__)

VIEWS_PER_TAU = len(VIEWS)
PARTS = ("test", "train")


def scores_path(run: Path, stream: str, part: str, task: int = 0) -> Path:
    """Where a run keeps a stream's scores of the "test" or "train" list, of its own data set or a further task's."""
    return score_file(run / stream / f"task{task}" if task else run / stream, part)


def scored(run: Path, stream: str) -> list[Path]:
    """The files with test scores of a stream, of its own data set first."""
    folder = run / stream
    return [
        path for path in (score_file(folder, "test"), *sorted(folder.glob("task*/scores_test.npz"))) if path.exists()
    ]


def evaluate_stream(config: Config, stream: str, index: Index, run: Path, world: World, *, force: bool = False) -> None:
    """Score each data set's test and training videos with the stream's checkpoint and store the score files.

    A set without a test list, and a list of which no views are asked for, is passed over; a file that this checkpoint
    has written already is left alone unless `force`.
    Raises FileNotFoundError without a checkpoint, ValueError if it belongs to another data set.
    """
    path = run / stream / CHECKPOINT
    world.at(f"{path} to be read")
    tasks = open_tasks(config, stream, index)
    checkpoint = load_checkpoint(path, dataset=tasks.fingerprint)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    net = build_net(config, stream, sum(tasks.num_outputs), world.device)
    load_state(net, checkpoint.net, path)
    num_taus = {"test": config.eval.num_taus, "train": config.eval.num_taus_train}
    parts = [part for part in PARTS if num_taus[part]]
    wanted = [(data, data.test_list, part) for data in tasks.sets if data.test_list for part in parts]
    for data, test_list, part in wanted:
        split_list = test_list.removesuffix("test") + part
        out = scores_path(run, stream, part, data.task)
        world.at(f"process 0 to look at {out}")
        done = world.is_main and not force and _is_scored(out, digest, num_taus[part])
        if world.sum(torch.tensor(int(done), device=world.device)).item():
            logger.info("%s: %s is scored already", stream, split_list)
            continue
        logger.info("%s: scoring %s in %d x %d views", stream, split_list, num_taus[part], VIEWS_PER_TAU)
        rows = data.index.split(split_list)
        columns = tasks.columns(data.task)
        columns = slice(columns.start, columns.start + len(data.index.classes))  # without classes added for training
        world.at(f"the first {stream} views of {split_list}")
        scores, num_views = score_videos(net, config, stream, data.index, rows, num_taus[part], world, columns)
        if world.is_main:
            result = Scores(
                video_ids=np.array(data.index.video_ids(rows)),
                labels=data.index.labels[rows],
                scores=scores,
                num_views=num_views,
                classes=np.array(data.index.classes),
                stream=stream,
                split_list=split_list,
                dataset=data.index.fingerprint,
                checkpoint=digest,
            )
            with writing(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                write_scores(result, out)
    world.barrier("process 0 to write the scores")  # every file is there before anyone reads it


def score_videos(
    net: nn.Module,
    config: Config,
    stream: str,
    index: Index,
    rows: npt.NDArray[np.int64],
    num_taus: int,
    world: World,
    columns: slice,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Mean softmax over num_taus x 10 views of the videos in `rows` of the index, which all processes share out.

    columns: the net's outputs for the index's classes; the softmax is over these alone.
    Returns scores (V, K) float64, rows sum to 1, and num_views (V,), num_taus * 10 each; the same in every process.
    """
    slot_of_row = np.full(index.num_videos, -1)
    slot_of_row[rows] = np.arange(len(rows))
    loader = loader_module(config).view_loader(
        index,
        rows[np.argsort(index.shard[rows], kind="stable")],  # so each is read by one rank, or two
        stream_spec(config, stream),
        num_taus=num_taus,
        batch_size=config.eval.batch_size,
        **loader_options(config, world),
    )
    with loader:
        bar = tqdm(loader, desc=f"{stream} views", disable=None if world.is_main else True)
        batches = _noted(bar, index, stream, world)
        scores, num_views = score_views(
            net, config, batches, lambda draw: slot_of_row[draw.video], len(rows), world, columns
        )
    wrong = np.flatnonzero(num_views != num_taus * VIEWS_PER_TAU)
    if len(wrong):
        video_id = index.video_ids(rows[wrong[:1]])[0]
        raise RuntimeError(
            f"{len(wrong)} videos were not scored from {num_taus * VIEWS_PER_TAU} views, the first {video_id} from "
            f"{num_views[wrong[0]]}; does a list name a video twice?"
        )
    return scores, num_views


def _noted(batches: Iterable[Batch], index: Index, stream: str, world: World) -> Iterator[Batch]:
    """The batches, each noted for the watchdog."""
    for batch in batches:
        world.at(f"the {stream} views of {index.video_ids(batch.draw.video[:1])[0]}, and those after them")
        yield batch
    world.at(f"the other processes' {stream} scores")


def score_views(
    net: nn.Module,
    config: Config,
    batches: Iterable[Batch],
    slot_of: Callable[[Draw], npt.NDArray[np.int64]],
    num_slots: int,
    world: World,
    columns: slice,
    views: Collection[int] = range(VIEWS_PER_TAU),
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Mean softmax over the views that belong together, of a test loader's batches.

    Args:
        slot_of: of a draw of n samples, to which of num_slots means each belongs, (n,); padding too, with weight 0.
        columns: the net's outputs that the softmax is over.
        views: which of the ten views count, as positions in VIEWS; the others are not computed.
    Returns scores (num_slots, K) float64, rows sum to 1, and how many views (num_slots,) each is the mean of; the same
    in every process.
    """
    sums = torch.zeros(num_slots, columns.stop - columns.start, dtype=torch.float64, device=world.device)
    counts = torch.zeros(num_slots, dtype=torch.int64, device=world.device)
    net.eval()
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            if number % VIEWS_PER_TAU not in views:
                continue
            probabilities = compute_logits(net, batch.inputs, None, config)[:, columns].softmax(1)
            slots = torch.from_numpy(slot_of(batch.draw)).to(world.device)
            valid = torch.from_numpy(batch.draw.valid).to(world.device)
            sums.index_add_(0, slots, probabilities.double() * valid[:, None])
            counts.index_add_(0, slots, valid.long())
    world.sum(sums)
    world.sum(counts)
    return (sums / counts[:, None]).cpu().numpy(), counts.cpu().numpy()


def _is_scored(path: Path, checkpoint_digest: str, num_taus: int) -> bool:
    try:
        stored = read_scores(path)
    except (FileNotFoundError, ValueError):
        return False
    return stored.checkpoint == checkpoint_digest and bool((stored.num_views == num_taus * VIEWS_PER_TAU).all())


def main(arguments: list[str] | None = None) -> None:
    """Command line: score the streams that a run folder has checkpoints of."""
    parser = Parser(
        prog="python -m train.evaluate",
        description="Score the videos of a run's split again with its checkpoints.",
        epilog="example:\n"
        "  python -m train.evaluate runs/ucf101 --gpus 4\n\n"
        "exit code: 0 scored; 1 failed, the last line says why",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.launch")
    parser.add_argument("--force", action="store_true", help="score again what this checkpoint has scored already")
    Machines.add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.run / "config.yaml")
        machines = Machines.from_arguments(options)
        machines.check()
        index = open_set(config)
        for stream in config.train.streams:
            open_tasks(config, stream, index)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {describe_error(error)}")
    try:
        launch(machines, _evaluate, config, options.run, options.force, timeout_s=config.train.timeout_s)
    except (ValueError, OSError, ProcessFailedError) as error:
        sys.exit(f"error: {describe_error(error)}")


def _evaluate(world: World, config: Config, run: Path, force: bool) -> None:
    """The work of one process of `main`."""
    logging.basicConfig(level=logging.INFO if world.is_main else logging.WARNING, format="%(message)s")
    index = open_set(config)
    for stream in config.train.streams:
        evaluate_stream(config, stream, index, run, world, force=force)
        if world.is_main:
            for path in scored(run, stream):
                scores = read_scores(path)
                num_correct = int((scores.scores.argmax(1) == scores.labels).sum())
                print(f"{stream}: {num_correct} of {len(scores.labels)} test videos correct; scores in {path}")
    world.at(None)  # the last that is left to do
    if world.is_main:
        for path in leave_report(run):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
