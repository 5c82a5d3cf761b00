"""Which data sets a stream trains on, and which outputs of the net are whose (sec. 4).

    extra_as=tasks      each set has a softmax layer of its own     outputs  | classes of set 0 | classes of set 1 |
    extra_as=classes    one softmax layer for all                   outputs  | classes of set 0 , added classes    |

A softmax layer is a slice of the net's last layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flow.command import did_you_mean, nearest_path
from flow.untrusted import MAX_JSON_BYTES, read_lines
from loaders.batch import StreamSpec
from loaders.draw import Population, population
from loaders.index import Index
from loaders.joint import share_batch
from train.config import CONFIG_FOLDER
from train.sets import open_set
from train.settings import Config

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataSet:
    """One data set of a stream.

    rows: of its index, to train on. task: its softmax layer. label_map (K,): the number of each of its classes in that
    layer, -1 for one that is left out. test_list: its list to test on; None if it has none.
    """

    index: Index
    rows: Ints
    task: int
    label_map: Ints
    test_list: str | None

    @property
    def fingerprint(self) -> str:
        """Identity of the packed bytes; `/` and a hash follow where not all classes are used."""
        if (self.label_map >= 0).all():
            return self.index.fingerprint
        return f"{self.index.fingerprint}/{hashlib.sha256(self.label_map.tobytes()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Tasks:
    """The data sets of a stream, the first one the run's own; num_outputs: classes of each softmax layer."""

    sets: list[DataSet]
    num_outputs: list[int]

    def columns(self, task: int) -> slice:
        """A softmax layer's outputs among all the net's."""
        start = sum(self.num_outputs[:task])
        return slice(start, start + self.num_outputs[task])

    @property
    def fingerprint(self) -> str:
        """Identity of all packed bytes, and of the choice of classes where not all of a set's are used."""
        return "+".join(data.fingerprint for data in self.sets)


def open_tasks(config: Config, stream: str, index: Index) -> Tasks:
    """The data sets of a stream; `index` is the one of `data.root`.

    Raises ValueError if a set or a list is not there, a class to add is unknown, or test videos would be trained on.
    """
    data, options = config.data, config.stream(stream)
    test_list = f"{data.split}_test" if config.eval.num_taus else None
    rows = index.split(data.train_list or f"{data.split}_train")
    sets = [DataSet(index, rows, 0, np.arange(len(index.classes)), test_list)]
    num_outputs = [len(index.classes)]
    for root, name in zip(options.extra_roots, options.extra_lists, strict=True):
        extra = open_set(config, root)
        rows = extra.split(name)
        if options.extra_as == "tasks":
            has_test = name.endswith("_train") and config.eval.num_taus
            test_list = name.removesuffix("train") + "test" if has_test else None
            sets.append(DataSet(extra, rows, len(sets), np.arange(len(extra.classes)), test_list))
            num_outputs.append(len(extra.classes))
        else:
            label_map = _added_classes(extra, options.extra_classes, num_outputs[0])
            sets.append(DataSet(extra, rows[label_map[extra.labels[rows]] >= 0], 0, label_map, None))
            num_outputs[0] += int((label_map >= 0).sum())
    for tested in (part for part in sets if part.test_list):
        for other in sets:
            if other is not tested or data.train_list:  # a split's own two lists were compared when it was packed
                check_untouched(tested, other.index, other.rows)
    return Tasks(sets, num_outputs)


def check_untouched(data: DataSet, index: Index, rows: Ints) -> None:
    """Raise ValueError if videos that `data` is tested on are among `rows` of an index, which are trained on."""
    assert data.test_list is not None
    test_rows = data.index.split(data.test_list)
    if index.fingerprint == data.index.fingerprint:
        both = data.index.video_ids(np.intersect1d(rows, test_rows))
    else:  # the same videos may have been packed twice
        both = sorted(set(data.index.video_ids(test_rows)) & set(index.video_ids(rows)))
    if both:
        raise ValueError(
            f"{len(both)} videos of {data.test_list}, as {both[0]}, are trained on too, in {index.location}: that is "
            "no test. Take another training list, or eval.num_taus=0 for no test."
        )


def _added_classes(extra: Index, names: str, first: int) -> Ints:
    """Numbers from `first` on for the named classes of a set, -1 for the others."""
    wanted = read_class_list(names) if names else extra.classes
    unknown = sorted(set(wanted) - set(extra.classes))
    if unknown:
        near = did_you_mean(unknown[0], extra.classes)
        raise ValueError(
            f"{extra.location} has no class {unknown[0]!r}, one of {len(unknown)} of {names!r} that it lacks. "
            f"Correct the list of classes to add, or leave it empty to add all.{near}"
        )
    label_map = np.full(len(extra.classes), -1)
    label_map[[k for k, name in enumerate(extra.classes) if name in set(wanted)]] = first + np.arange(len(set(wanted)))
    return label_map


def read_class_list(name_or_file: str) -> list[str]:
    """Class names, one a line, `#` begins a comment: of a .txt file, or one in train/configs. ValueError without it."""
    path = Path(name_or_file) if name_or_file.endswith(".txt") else CONFIG_FOLDER / f"{name_or_file}.txt"
    if not path.is_file():
        known = sorted(known.stem for known in CONFIG_FOLDER.glob("*.txt"))
        near = nearest_path(path) if name_or_file.endswith(".txt") else did_you_mean(name_or_file, known)
        what = f"no such list; known are {', '.join(known)}, or a .txt file."
        raise ValueError(f"extra_classes={name_or_file!r}: {what}{near}")
    lines = (line.partition("#")[0].strip() for line in read_lines(path, MAX_JSON_BYTES))
    return [line for line in lines if line]


def batch_shares(tasks: Tasks, config: Config, stream: str, spec: StreamSpec) -> list[int]:
    """Samples of each data set in the global batch, by `batch_share`. Raises ValueError if some would have none."""
    weight = {
        "classes": lambda videos: float(len(videos.start) - 1),
        "videos": lambda videos: float(len(videos.rows)),
        "equal": lambda videos: 1.0,
    }[config.stream(stream).batch_share]
    weights = [weight(videos) for videos in populations(tasks, spec)]
    return share_batch(weights, config.train.batch_size, spec.stacks_per_window)


def populations(tasks: Tasks, spec: StreamSpec) -> list[Population]:
    """The training videos of each data set. Raises ValueError if a set has none."""
    return [population(data.index, data.rows, spec) for data in tasks.sets]


def samples_of_tasks(tasks: Tasks, shares: Sequence[int]) -> list[int]:
    """Samples for each softmax layer in the global batch, from those of each data set."""
    counts = [0] * len(tasks.num_outputs)
    for data, share in zip(tasks.sets, shares, strict=True):
        counts[data.task] += share
    return counts


def tasks_loss(
    logits: Tensor,
    labels: Tensor,
    task: Tensor | None,
    num_outputs: Sequence[int],
    num_samples: Sequence[int],
    world_size: int,
) -> Tensor:
    """Sum over the tasks of the mean cross-entropy of the global batch's samples for it (sec. 4): this rank's part.

        loss = sum over tasks t of 1 / n_t * sum over samples i for t of -log softmax(logits[i, outputs of t])[label_i]

    Times world_size: the ranks' gradients are averaged, and a rank may have any number of a task's samples, also none.

    Args:
        logits: (N, sum(num_outputs)); labels: (N,) within the task; task: (N,), None for one task.
        num_samples: n_t, samples of each task in the *global* batch.
    Returns a scalar.
    """
    loss = logits.new_zeros(())
    for t, columns in enumerate(torch.split(logits, list(num_outputs), dim=1)):
        mine = torch.ones_like(labels, dtype=torch.bool) if task is None else task == t
        entropy = F.cross_entropy(columns, labels.where(mine, 0), reduction="none")
        loss = loss + (entropy * mine).sum() * (world_size / num_samples[t])
    return loss


def count_correct(logits: Tensor, labels: Tensor, task: Tensor | None, num_outputs: Sequence[int]) -> Tensor:
    """How many samples have the highest of their own task's outputs at their label; arguments as of `tasks_loss`.

    Returns a scalar, on the device: nobody waits for it.
    """
    correct = torch.zeros_like(labels, dtype=torch.bool)
    for t, columns in enumerate(torch.split(logits, list(num_outputs), dim=1)):
        right = columns.argmax(1) == labels
        correct |= right if task is None else right & (task == t)
    return correct.sum()
