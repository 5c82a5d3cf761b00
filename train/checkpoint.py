"""The state of one stream's training in one file: weights, optimizer, step, config."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flow.shard import publish

FORMAT_VERSION = 1
_FIELDS = ("stream", "step", "net", "optimizer", "config", "dataset")


@dataclass
class Checkpoint:
    """What training needs to go on as if it had not been stopped.

    stream: "spatial" or "temporal". step: updates done. net, optimizer: state dicts, the net's without wrappers.
    config: the run's resolved config by dotted key. dataset: fingerprint of the packed data set.
    There is no generator state: samples and masks follow from (seed, step).
    """

    stream: str
    step: int
    net: dict[str, Any]
    optimizer: dict[str, Any]
    config: dict[str, Any]
    dataset: str


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint atomically: `path` holds the former one or this one, whatever happens meanwhile."""
    state = {name: getattr(checkpoint, name) for name in _FIELDS}
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format_version": FORMAT_VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def load_checkpoint(path: Path, *, dataset: str | None = None) -> Checkpoint:
    """Read a checkpoint onto the CPU; tensors and plain values only, never code.

    Args:
        dataset: fingerprint of the packed data set in use; None accepts any.
    Raises FileNotFoundError if there is none, ValueError if the file is damaged, of another version, or belongs to
    another data set.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train this stream first.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and train again, or put back a copy.") from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        found = state.get("format_version") if isinstance(state, dict) else None
        raise ValueError(f"{path} has checkpoint format {found}; this program reads {FORMAT_VERSION}.")
    checkpoint = Checkpoint(**{name: state[name] for name in _FIELDS})
    if dataset is not None and checkpoint.dataset != dataset:
        raise ValueError(
            f"{path} was trained on data set {checkpoint.dataset}, not on {dataset}, which data.root and extra_roots "
            "hold now; put the old data set back or start another run."
        )
    return checkpoint
