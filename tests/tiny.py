"""A run that takes a second: nets of a 32nd of their width on 48-px crops."""

import torch

from train.config import resolve_config

torch.set_num_threads(1)  # nets this small gain nothing from more, and lose much on a busy machine

TINY = {
    "data.L": 3,
    "data.crop_px": 48,
    "model.width": 0.03125,
    "spatial.steps": 10,
    "temporal.steps": 10,
    "spatial.milestones": [6],
    "temporal.milestones": [6],
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
    "eval.num_taus_train": 2,
}


def tiny_overrides(root, **changes):
    """key=value strings; changes are written section__key=value."""
    values = {**TINY, "data.root": str(root), **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


def tiny_config(root, **changes):
    return resolve_config("demo", tiny_overrides(root, **changes))
