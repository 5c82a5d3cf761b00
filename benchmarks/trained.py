"""Training runs that a comparison needs: each is trained once, whoever asks for it, and the arms are paired by video.

An arm is what differs: a packed set, or settings. Its runs stand in RUNS/<arm>/split<s>_seed<n>, folders of
train.launch; one is done when its results.json is there. Several processes may be at the same runs: each run is one
process's, which holds its lock, and the others take the next.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts the checkout on the path)
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flow.command import say
from flow.resume import hold
from train.config import differing_keys, read_config, resolve_config
from train.experiments import train
from train.statistics import bootstrap_pct, mean_pct

OUTPUT = "output.txt"
WAIT_S = 2.0


@dataclass(frozen=True)
class Arm:
    """One of those that are compared: packed set, and `key=value` settings of its own."""

    name: str
    data: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run: its folder, and what it is trained with."""

    folder: Path
    config: str
    overrides: tuple[str, ...]


def list_runs(
    arms: Sequence[Arm],
    folder: Path,
    config: str,
    splits: Sequence[int],
    seeds: Sequence[int],
    overrides: Sequence[str],
) -> list[Run]:
    """All runs of all arms, seed by seed, split by split: whenever it is stopped, the arms have about as many runs."""
    return [
        Run(
            folder / arm.name / f"split{split}_seed{seed}",
            config,
            (f"data.root={arm.data}", f"data.split=split{split}", f"train.seed={seed}", *arm.overrides, *overrides),
        )
        for seed in seeds
        for split in splits
        for arm in arms
    ]


def train_missing(runs: Sequence[Run]) -> None:
    """Train what has no results yet, or goes on; returns when all runs are done, also those that others are at.

    Exits if a run was trained with another config, or fails.
    """
    pending = list(runs)
    with tqdm(total=len(runs), desc="runs", unit="run", disable=None) as bar:
        while pending:
            left = []
            for run in pending:
                if _try(run):
                    bar.update()
                else:
                    left.append(run)
            if len(left) == len(pending):
                time.sleep(WAIT_S)
            pending = left


def _try(run: Run) -> bool:
    """Train a run unless it is done. Returns False if another process is at it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with hold(run.folder.with_suffix(".lock")) as lock:
        if lock is None:
            return False
        if (run.folder / "results.json").exists():
            asked = resolve_config(run.config, run.overrides)
            found = differing_keys(read_config(run.folder / "config.yaml"), asked)
            # Where the data lie does not matter; that they are the same is seen by their fingerprint.
            if differing := [text for text in found if not text.startswith("data.root:")]:
                sys.exit(
                    f"{run.folder} was trained with another config: {'; '.join(differing)}. Choose another --runs."
                )
            return True
        say(f"training {run.folder}")
        output = run.folder / OUTPUT
        arguments = ["--gpus", "0", "--config", run.config, "--run", str(run.folder), *run.overrides]
        if status := train(arguments, output, lock):
            sys.exit(f"training {run.folder} ended with exit status {status}; see {output}")
    return True


def summarise(values: npt.NDArray[np.floating], groups: npt.NDArray[np.str_]) -> dict[str, Any]:
    """Mean of values (V,) or (seeds, V) with its interval over sources, and seeds if there are several; in percent."""
    return {"pct": mean_pct(values), "interval_95_pct": bootstrap_pct(values, groups)}


def compare(correct: dict[str, npt.NDArray[np.floating]], groups: npt.NDArray[np.str_]) -> dict[str, dict[str, Any]]:
    """Arm -> accuracy and, but for the first, the paired `difference` to the first, each with its interval."""
    first = next(iter(correct))
    rows = {}
    for name, values in correct.items():
        rows[name] = summarise(values, groups)
        if name != first:
            rows[name]["difference"] = summarise(values - correct[first], groups)
    return rows
