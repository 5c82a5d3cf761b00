"""Which runs stand behind the tables, in which order, and with which config each.

    RUNS/mini/flow_L10-1a2b3c4d/split1_seed0/     a run folder of train.launch; the digits are of the config
    RUNS/mini/fusions/A+B:svm-1a2b3c4d/split1_seed0/     results.json of a fusion

A run is shared by all tables that need it. Where a config begins with the net of another, `init:
runs/OTHER/STREAM/checkpoint.pt`, the other's run of the same scale and seed comes first.

At full scale a run is what its config says. At mini scale the config is changed as MINI_CHANGES says, so that it
trains in minutes on two CPU cores, whatever the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from flow.command import did_you_mean
from train.config import from_flat, resolve_config, short_hash, to_flat
from train.engine import CHECKPOINT
from train.settings import Config
from train.tables import PRETRAINING, TABLES, Fusion, configs_of, select_tables, svm_configs

Scale = Literal["mini", "full"]
ALL_SPLITS = (1, 2, 3)

MINI: dict[str, Any] = {
    "data.crop_px": 84,
    "model.width": 0.25,
    "train.batch_size": 32,
    "train.log_every": 20,
    "train.checkpoint_every": 100,
}
MINI_SCHEDULE_DIVISOR = 200
MINI_DROPOUT = 0.5
MINI_TAUS, MINI_TAUS_TRAIN = 5, 1
MINI_SETS = {"ucf101": "ucf101_mini", "hmdb51": "jhmdb_mini", "imagenet": "imagenet_mini"}
MINI_SIZE_PX = 96

#: What a run may take at mini scale, on two cores.
MINI_LIMIT_S = 240

#: What the numbers above, and `mini_values`, change, in words.
MINI_CHANGES = (
    ("data sets", ", ".join(f"`{mini}` for `{full}`" for full, mini in MINI_SETS.items())),
    ("`imagenet_mini`", "frames of clips of other classes than those that are tested on, not ImageNet"),
    ("net", f"{MINI['model.width']:g} of the width"),
    ("input", f"crops of {MINI['data.crop_px']} px, of frames whose smaller side is {MINI_SIZE_PX} px"),
    (
        "schedule",
        f"batches of {MINI['train.batch_size']}; steps and milestones divided by {MINI_SCHEDULE_DIVISOR}",
    ),
    (
        "dropout",
        f"{MINI_DROPOUT} in place of 0.9, which would leave too few units of a narrow layer; Table 1a keeps its two",
    ),
    (
        "tests",
        f"{MINI_TAUS} stacks a video at most; for an SVM training videos are scored too, with {MINI_TAUS_TRAIN}",
    ),
    ("added classes", "all: the small sets have none in common"),
    ("splits", "all three are pooled, whatever the table: the few test clips of one tell little"),
)


@dataclass(frozen=True)
class Run:
    """One training; pre-training has split 1, whatever the splits of the tables it serves."""

    config: str
    split: int
    seed: int

    @property
    def name(self) -> str:
        return self.config

    def __str__(self) -> str:
        return f"{self.config}, split {self.split}, seed {self.seed}"


@dataclass(frozen=True)
class Fused:
    """A fusion of two runs of the same split and seed."""

    fusion: Fusion
    split: int
    seed: int

    @property
    def name(self) -> str:
        return self.fusion.name

    @property
    def runs(self) -> tuple[Run, Run]:
        return Run(self.fusion.spatial, self.split, self.seed), Run(self.fusion.temporal, self.split, self.seed)

    def __str__(self) -> str:
        return f"{self.name}, split {self.split}, seed {self.seed}"


@dataclass(frozen=True)
class Setting:
    """What all runs of an invocation share. overrides: key=value, on top of every config, for trying things out."""

    scale: Scale = "mini"
    data: Path = Path("data")
    runs: Path = Path("runs/experiments")
    overrides: tuple[str, ...] = ()


# --- which -------------------------------------------------------------------------------------------------------


def select_sources(names: Iterable[str]) -> dict[str | Fusion, tuple[int, ...]]:
    """What stands behind the tables and configs of these names, in the paper's order: source -> the tables' splits.

    Raises ValueError naming what is known for an unknown name.
    """
    wanted = set(names)
    configs = {config for table in TABLES for cell in table.cells for config in configs_of(cell.source)}
    configs |= set(PRETRAINING)
    known = [table.name for table in TABLES] + ["all"]
    if unknown := sorted(wanted - configs - set(known)):
        known += sorted(configs)
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"nothing is called {unknown[0]!r}; known: {', '.join(known)}.{near}")
    sources: dict[str | Fusion, tuple[int, ...]] = {}
    for table in select_tables(wanted):
        for source in (cell.source for cell in table.cells if cell.source is not None):
            sources[source] = tuple(sorted({*sources.get(source, ()), *table.splits}))
    return {config: (1,) for config in sorted(wanted & configs)} | sources


def plan(
    sources: Mapping[str | Fusion, tuple[int, ...]], seeds: int, splits: Sequence[int] | None, setting: Setting
) -> tuple[list[Run], list[Fused]]:
    """Runs and fusions behind the sources, each once: all of seed 0 first, and a run after those that it begins with.

    Args:
        splits: official splits; None: the sources' own at full scale, all three at mini scale, where the few test
            clips of one tell little.
    Raises ValueError for fewer seeds than one, or splits that there are not.
    """
    if seeds < 1 or not set(splits or ALL_SPLITS) <= set(ALL_SPLITS):
        raise ValueError(f"--seeds {seeds}, --splits {splits}: expected 1 seed or more, and splits of {ALL_SPLITS}.")
    runs: dict[Run, None] = {}
    fused: list[Fused] = []
    for seed in range(seeds):
        for split in splits or ALL_SPLITS:
            for source, own in sources.items():
                if splits is None and setting.scale == "full" and split not in own:
                    continue
                for config in configs_of(source):
                    runs.update(dict.fromkeys(with_beginnings(make_run(config, split, seed), setting)))
                if isinstance(source, Fusion):
                    fused.append(Fused(source, split, seed))
    return list(runs), fused


def make_run(config: str, split: int, seed: int) -> Run:
    """The run of a config; pre-training has one for all splits."""
    return Run(config, 1 if config in PRETRAINING else split, seed)


def beginning(run: Run, setting: Setting) -> Run | None:
    """The run that this one's net begins with; None if it begins from scratch, or with a file."""
    config = run_config(run.config, setting)
    init = Path(config.stream(stream_of(config)).init).parts
    return make_run(init[1], run.split, run.seed) if len(init) == 4 and init[0] == "runs" else None


def with_beginnings(run: Run, setting: Setting) -> list[Run]:
    """The run, after the runs that it begins with."""
    first = beginning(run, setting)
    return [run] if first is None else [*with_beginnings(first, setting), run]


# --- with which config -------------------------------------------------------------------------------------------


@cache
def run_config(name: str, setting: Setting) -> Config:
    """A config at the setting's scale, the same for all splits and seeds, its paths not yet this machine's.

    Not to be changed: everyone who asks gets the same one.
    """
    mini = mini_values(name) if setting.scale == "mini" else {}
    return resolve_config(name, [*(f"{key}={json.dumps(value)}" for key, value in mini.items()), *setting.overrides])


def mini_values(name: str) -> dict[str, Any]:
    """What becomes of a config at mini scale: {key: value}, as MINI_CHANGES says."""
    flat = to_flat(resolve_config(name))
    table1a = {cell.source for table in select_tables(["table1a"]) for cell in table.cells}
    values = dict(MINI)
    for stream in ("spatial", "temporal"):
        values[f"{stream}.steps"] = max(1, flat[f"{stream}.steps"] // MINI_SCHEDULE_DIVISOR)
        values[f"{stream}.milestones"] = [step // MINI_SCHEDULE_DIVISOR for step in flat[f"{stream}.milestones"]]
        values[f"{stream}.extra_roots"] = [_mini_root(root) for root in flat[f"{stream}.extra_roots"]]
        values[f"{stream}.extra_classes"] = ""
        if name not in table1a:
            values[f"{stream}.dropout"] = min(flat[f"{stream}.dropout"], MINI_DROPOUT)
    values["data.root"] = _mini_root(flat["data.root"])
    values["eval.num_taus"] = min(flat["eval.num_taus"], MINI_TAUS)
    values["eval.num_taus_train"] = MINI_TAUS_TRAIN if name in svm_configs() else 0
    return values


def _mini_root(root: str) -> str:
    """data/ucf101/packed -> data/ucf101_mini/packed"""
    return "/".join(MINI_SETS.get(part, part) for part in Path(root).parts)


def stream_of(config: Config) -> str:
    """The stream that an experiment's config trains; they train one. Raises ValueError for any other number."""
    if len(config.train.streams) != 1:
        raise ValueError(f"train.streams={config.train.streams}: the config of a table's row trains one stream.")
    return config.train.streams[0]


def digest(job: Run | Fused, setting: Setting) -> str:
    """Eight digits that change with any setting of the run, of those that it begins with, or of the fusion's two.

    They do not change with split, seed, paths, or a key that is new; nor with a default, for which see `Book.agrees`.
    """
    if isinstance(job, Fused):
        return _join(digest(run, setting) for run in job.runs)
    first, own = beginning(job, setting), short_hash(run_config(job.config, setting))
    return own if first is None else _join([digest(first, setting), own])


def _join(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:8]


def configs_behind(job: Run | Fused, setting: Setting) -> dict[str, dict[str, Any]]:
    """Digest -> values, but for those that tell its runs apart, of every config whose net has a part in the job."""
    runs = [job] if isinstance(job, Run) else job.runs
    return {
        digest(part, setting): {
            key: value
            for key, value in to_flat(run_config(part.config, setting)).items()
            if key not in ("data.split", "train.seed")
        }
        for run in runs
        for part in with_beginnings(run, setting)
    }


def folder(job: Run | Fused, setting: Setting) -> Path:
    """Where a run, or the results of a fusion, are kept."""
    above = setting.runs / setting.scale / ("" if isinstance(job, Run) else "fusions")
    return above / f"{job.name}-{digest(job, setting)}" / f"split{job.split}_seed{job.seed}"


def launch_arguments(run: Run, setting: Setting) -> list[str]:
    """Arguments of train.launch for a run: config, folder, and every value in which it differs from the config file."""
    config = run_config(run.config, setting)
    flat = to_flat(config)
    flat["data.split"], flat["train.seed"] = f"split{run.split}", run.seed
    flat["data.root"] = str(locate(flat["data.root"], setting))
    stream = stream_of(config)
    flat[f"{stream}.extra_roots"] = [str(locate(root, setting)) for root in flat[f"{stream}.extra_roots"]]
    if first := beginning(run, setting):
        flat[f"{stream}.init"] = str(folder(first, setting) / stream / CHECKPOINT)
    from_flat(flat)  # refuses what does not fit, before anything starts
    written = to_flat(resolve_config(run.config))
    overrides = [f"{key}={json.dumps(value)}" for key, value in flat.items() if value != written[key]]
    return ["--config", run.config, "--run", str(folder(run, setting)), *overrides]


def locate(root: str, setting: Setting) -> Path:
    """Where a config's data set lies: data/ucf101/packed -> DATA/ucf101/packed."""
    return setting.data / Path(root).relative_to("data") if Path(root).parts[0] == "data" else Path(root)
