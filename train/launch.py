"""A whole run: `python -m train.launch --gpus 4 --config ucf101 data.root=P`.

Trains the configured streams one after the other, scores the split's videos, fuses the streams and prints the table.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

from flow.command import Parser, describe_error, wrap_words
from train.config import config_names, differing_keys, read_config, resolve_config, short_hash, write_config
from train.disk import writing
from train.dist import ProcessFailedError, World, launch
from train.engine import CHECKPOINT, check_stream, train_stream
from train.evaluate import evaluate_stream, scored
from train.fuse import fuse_runs, report, write_results
from train.interrupt import ending_at_once
from train.machines import Machines
from train.origin import NAME as ORIGIN
from train.origin import write_origin
from train.report import NAME as REPORT
from train.report import leave_report
from train.sets import open_set
from train.settings import CHANGEABLE, STREAMS, Config


def open_run(run: Path, config: Config, resume: str) -> None:
    """Make `run` the folder of this config's run.

    Args:
        resume: "auto" continues what the folder holds, with new values of CHANGEABLE keys; "never" deletes what an
            earlier run left there, nothing else.
    Raises ValueError naming the keys that differ if the folder holds a run with another config and `resume` is "auto".
    """
    stored_path = run / "config.yaml"
    if stored_path.exists() and resume == "auto":
        differing = differing_keys(read_config(stored_path), config)
        if differing:
            raise ValueError(
                f"{run} holds a run with another config: {'; '.join(differing)}. Ask for the stored values to continue "
                "it, give another --run, or start over with --resume never."
            )
    elif stored_path.exists():
        for pattern in (f"{CHECKPOINT}*", "log.jsonl", "scores_*.npz", "events.out.tfevents.*", "results.*"):
            for path in (path for stream in STREAMS for path in (run / stream).rglob(pattern)):
                path.unlink()
        exported = [f"export/{stream}.{suffix}" for stream in STREAMS for suffix in ("safetensors", "pt2")]
        for name in ("results.json", "results.txt", REPORT, ORIGIN, *exported):
            (run / name).unlink(missing_ok=True)
    with writing(stored_path):
        run.mkdir(parents=True, exist_ok=True)
        write_config(config, stored_path)


_FAILURES = (ValueError, OSError, FloatingPointError, ProcessFailedError)


def main(arguments: list[str] | None = None) -> None:
    """Command line: everything that can be wrong with the request is reported before a process starts."""
    parser = Parser(
        prog="python -m train.launch",
        usage="%(prog)s [--gpus N] [--config NAME] [--run DIR] [options] [key=value ...]",
        description="Train both streams on a packed data set, test them, fuse them, and print the table.\n"
        "Stopped, it goes on with the same command.",
        epilog=f"configs:\n{wrap_words(config_names())}\n\n"
        "examples:\n"
        "  python -m train.launch --gpus 4 --config ucf101 data.root=packed data.split=split1\n"
        "  python -m train.launch data.root=demo/packed temporal.steps=50 train.streams=[temporal]\n\n"
        "exit code: 0 done; 1 failed, the last line says why; 130, 143 stopped",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="on top of the config, such as temporal.steps=300; all keys stand in train/settings.py, and in the "
        "config.yaml of a run",
    )
    parser.add_argument(
        "--config", default="demo", metavar="NAME", help="one of those below, or a YAML file (default %(default)s)"
    )
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="run folder (default runs/CONFIG-<hash of what is trained>)"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default) goes on with what the run folder holds; never starts over and deletes it",
    )
    Machines.add_arguments(parser)
    words = sys.argv[1:] if arguments is None else arguments
    dashed = [word for word in words if re.match(r"--\w+\.\w+=", word)]
    if dashed:
        parser.error(f"{dashed[0]}: a setting is given without dashes: {dashed[0].lstrip('-')}")
    options = parser.parse_intermixed_args(words)
    try:
        with ending_at_once():
            config, machines, run = _prepare(options)
        try:
            launch(machines, _run, config, run, timeout_s=config.train.timeout_s)
        except _FAILURES:
            leave_report(run)  # curves are wanted most where something failed
            raise
    except _FAILURES as error:
        sys.exit(f"error: {describe_error(error)}")


def _prepare(options: argparse.Namespace) -> tuple[Config, Machines, Path]:
    """The request, checked, and its run folder."""
    config = resolve_config(options.config, options.overrides)
    machines = Machines.from_arguments(options)
    machines.check(config.train.batch_size)
    if machines.max_nodes > 1 and options.resume == "never":
        raise ValueError(
            f"--resume never with --nodes {options.nodes}: a machine that comes again would delete what the others "
            "work on. Give another --run, or delete the folder first."
        )
    index = open_set(config)
    run = options.run or Path("runs") / f"{Path(options.config).stem}-{short_hash(config, CHANGEABLE)}"
    for stream in config.train.streams:
        check_stream(config, stream, index, machines.world_sizes, run / stream, num_procs=machines.num_procs)
    open_run(run, config, options.resume)
    with writing(run / ORIGIN):
        write_origin(run, index)
    # Another run that meets at the same port is another job: ranks of two would train each other's nets.
    job = hashlib.sha256(f"{short_hash(config, CHANGEABLE)} {run} {index.fingerprint}".encode()).hexdigest()[:8]
    return config, replace(machines, rdzv_id=f"{machines.rdzv_id}-{job}"), run


def _run(world: World, config: Config, run: Path) -> None:
    """The work of one process."""
    logging.basicConfig(level=logging.INFO if world.is_main else logging.WARNING, format="%(message)s")
    index = open_set(config)
    for stream in config.train.streams:
        train_stream(config, stream, index, run / stream, world)
    for stream in config.train.streams:
        evaluate_stream(config, stream, index, run, world)
    world.at(None)  # an SVM takes what it takes
    if world.is_main:
        _conclude(config, run)


def _conclude(config: Config, run: Path) -> None:
    """Fuse, print the tables, and list what the run has written."""
    wrote = [run / "config.yaml", run / ORIGIN]
    for stream in config.train.streams:
        wrote += [run / stream / CHECKPOINT, run / stream / "log.jsonl", *sorted((run / stream).rglob("scores_*.npz"))]
    tasks = [path.parent for stream in config.train.streams for path in scored(run, stream)[1:]]
    for folder in [run, *tasks] if config.eval.num_taus else []:
        results = fuse_runs([folder], config.fuse)
        print(report(results), end="\n\n")
        with writing(folder / "results.json"):
            wrote += write_results(results, folder)
    print("wrote:", *wrote, *leave_report(run), sep="\n  ")


if __name__ == "__main__":
    main()
