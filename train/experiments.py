"""Every experiment of the paper: `python -m train.experiments list | run NAME ... | report`.

    list                     the rows of tables 1a, 1b, 2, 3 and 4: config, the paper's value, ours if there is one
    run table1b table3       runs what is not done yet of tables, single configs, or `all`
    run all --scale full --gpus 4
    report                   all tables beside the paper's, with intervals and figures, as Markdown and HTML

`run` can be stopped and repeated: runs go on from their checkpoints, and each result is in the results file when its
run ends. Two invocations at once share the work: a run that another process is at is left to it.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flow.command import Parser, describe_error, say
from flow.page import plural
from flow.resume import hold
from train.data import check_data
from train.engine import CHECKPOINT
from train.fuse import fuse_runs
from train.paper_report import list_rows, write_report
from train.plan import (
    Fused,
    Run,
    Setting,
    beginning,
    configs_behind,
    digest,
    folder,
    launch_arguments,
    plan,
    run_config,
    select_sources,
    stream_of,
    with_beginnings,
)
from train.provenance import ROOT, describe
from train.record import Book, Entry, add_to_book, correctness, list_of, make_key, read_book, write_book
from train.results import Results, write_results

RESULTS = ROOT / "docs" / "experiments"
RECORD, OUTPUT, FINDINGS = "record.json", "output.txt", "findings.md"
WAIT_S = 5.0


def results_path(scale: str) -> Path:
    """The results file that is meant if none is named."""
    return RESULTS / f"results_{scale}.json"


# --- running -----------------------------------------------------------------------------------------------------


def has_result(book: Book, job: Run | Fused, setting: Setting) -> bool:
    """Whether the book holds the job's result, of this very setting."""
    agrees = book.agrees(configs_behind(job, setting))
    return agrees and book.has(job.name, job.split, job.seed, digest(job, setting))


def needed_runs(runs: Sequence[Run], fused: Sequence[Fused], book: Book, setting: Setting) -> list[Run]:
    """Of the planned runs those to be done, in order: without a result, or with an unfinished part in one.

    A run that others begin with, or a half of a fusion, is needed for its files, whatever the book has of it.
    """
    asked = {run for run in runs if not has_result(book, run, setting)}
    asked |= {run for fusion in fused for run in fusion.runs}
    needed = {part for run in asked for part in with_beginnings(run, setting)}
    return [run for run in runs if run in needed]


def is_finished(run: Run, setting: Setting) -> bool:
    """Whether the run's folder holds all that a run of this setting leaves."""
    record = folder(run, setting) / RECORD
    return record.exists() and has_result(read_book(record), run, setting)


def lock_file(run: Run, setting: Setting) -> Path:
    """What a process that is at the run holds; beside its folder."""
    path = folder(run, setting)
    return path.with_name(f"{path.name}.lock")


def run_needed(
    needed: Sequence[Run], fused: Sequence[Fused], setting: Setting, gpus: int, results: Path
) -> dict[Run | Fused, str]:
    """Do the runs and the fusions, sharing them with other processes. Returns what failed, and why.

    A run waits for the one that it begins with; while all that is left is in other processes' hands, this one waits.
    """
    failed: dict[Run | Fused, str] = {}
    pending = list(needed)
    bar = tqdm(total=len(pending), desc="runs", unit="run", disable=None)
    while pending:
        for run in pending:
            first = beginning(run, setting)
            if first in failed:
                failed[run] = f"{first} failed"
            elif first is not None and not is_finished(first, setting):
                continue
            elif (reason := try_run(run, setting, gpus, results)) is None:
                continue
            elif reason:
                failed[run] = reason
            pending.remove(run)
            say(f"{run}: {failed.get(run, 'done')}; {plural(len(pending), 'run')} to go")
            bar.update()
            break
        else:
            time.sleep(WAIT_S)
        failed |= fuse_finished([fusion for fusion in fused if fusion not in failed], setting, results)
    bar.close()
    return failed


def try_run(run: Run, setting: Setting, gpus: int, results: Path) -> str | None:
    """Do a run and store its result, unless it is done. Returns why it failed, else ""; None if another is at it."""
    path = folder(run, setting)
    path.mkdir(parents=True, exist_ok=True)
    with hold(lock_file(run, setting)) as lock:
        if lock is None:
            return None
        if not is_finished(run, setting):
            made_on = describe()  # now: the code may change while the run is at it
            resumed = any(path.glob(f"*/{CHECKPOINT}"))
            started = time.monotonic()
            arguments = ["--gpus", str(gpus), *launch_arguments(run, setting)]
            if status := train(arguments, path / OUTPUT, lock):
                return f"exit status {status}: {_last_line(path / OUTPUT)} (see {path / OUTPUT})"
            spent = {"seconds": round(time.monotonic() - started, 1), "resumed": resumed, "gpus": gpus}
            write_book(book_of_run(run, setting, made_on, **spent), path / RECORD)
        add_to_book(results, read_book(path / RECORD))
    return ""


def train(arguments: Sequence[str], output: Path, lock: int) -> int:
    """train.launch in a process of its own, which holds the lock as long as it lives. Returns its exit status."""
    command = [sys.executable, "-m", "train.launch", *arguments]
    with (
        open(output, "ab") as file,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[lock]) as process,
    ):
        try:
            return process.wait()
        except BaseException:  # stopped: the run must not go on unseen
            process.terminate()
            raise


def _last_line(path: Path) -> str:
    return ([""] + path.read_text("utf-8", "replace").split("\n")[:-1])[-1]


def fuse_finished(fused: Sequence[Fused], setting: Setting, results: Path) -> dict[Run | Fused, str]:
    """Do the fusions of finished runs that have no result yet. Returns what failed, and why."""
    failed: dict[Run | Fused, str] = {}
    book = read_book(results, setting.scale)
    for fusion in fused:
        if has_result(book, fusion, setting) or not all(is_finished(run, setting) for run in fusion.runs):
            continue
        try:
            book = add_to_book(results, book_of_fusion(fusion, setting))
        except (ValueError, OSError) as error:
            failed[fusion] = str(error)
    return failed


# --- results -----------------------------------------------------------------------------------------------------


def book_of_run(run: Run, setting: Setting, made_on: dict[str, Any], **spent: Any) -> Book:
    """The result of a finished run. spent: seconds, resumed and gpus, as in an Entry."""
    config = run_config(run.config, setting)
    stream = stream_of(config)
    results = fuse_runs([folder(run, setting) / stream], config.fuse) if config.eval.num_taus else None
    return _make_book(run, setting, results, stream, made_on, steps=config.stream(stream).steps, **spent)


def book_of_fusion(fused: Fused, setting: Setting) -> Book:
    """Fuse the two runs. Leaves results.json in the fusion's folder too. ValueError if there is no such fusion."""
    made_on, started = describe(), time.monotonic()
    config = run_config(fused.fusion.temporal, setting)
    spatial, temporal = (folder(run, setting) for run in fused.runs)
    sources = [spatial / "spatial", temporal / "temporal"]
    results = fuse_runs(sources, config.fuse, svm=fused.fusion.method == "svm")
    if fused.fusion.method not in results.scores:
        raise ValueError(results.no_svm)
    write_results(results, folder(fused, setting))
    spent = {"steps": 0, "seconds": round(time.monotonic() - started, 1), "resumed": False, "gpus": 0}
    return _make_book(fused, setting, results, fused.fusion.method, made_on, **spent)


def _make_book(
    job: Run | Fused, setting: Setting, results: Results | None, method: str, made_on: dict[str, Any], **spent: Any
) -> Book:
    configs = configs_behind(job, setting)
    correct, top5 = correctness(results, method) if results else ("", "")
    data = data_name(configs[digest(job if isinstance(job, Run) else job.runs[0], setting)]["data.root"])
    lists = list_of(results, data) if results else {}
    entry = Entry(
        name=job.name,
        split=job.split,
        seed=job.seed,
        digest=digest(job, setting),
        accuracy_pct=round(100 * correct.count("1") / len(correct), 2) if correct else None,
        test_list=next(iter(lists), ""),
        correct=correct,
        top5=top5,
        made_on=make_key(made_on),
        **spent,
    )
    return Book(
        scale=setting.scale, configs=configs, lists=lists, made_on={entry.made_on: made_on}, runs={entry.key: entry}
    )


def data_name(root: str) -> str:
    """data/ucf101/packed -> ucf101"""
    return Path(root).parent.name or root


# --- the command -------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Do what is not done yet. Exits with 1 if anything failed."""
    if options.set and not options.results:
        raise ValueError(
            "--set makes results of other settings, not to be mixed in: name a file for them by --results."
        )
    setting = Setting(options.scale, options.data, options.runs, tuple(options.set))
    results = options.results or results_path(options.scale)
    runs, fused = plan(select_sources(options.names), options.seeds, options.splits, setting)
    book = read_book(results, setting.scale)
    fused = [fusion for fusion in fused if not has_result(book, fusion, setting)]
    needed = needed_runs(runs, fused, book, setting)
    check_data(needed, setting)
    print(f"{plural(len(runs), 'run')}, {len(needed)} to do; results in {results}", flush=True)
    if failed := run_needed(needed, fused, setting, options.gpus, results):
        sys.exit("\n".join(["failed:", *(f"  {job}: {reason}" for job, reason in failed.items())]))


def read_books(paths: Sequence[Path] | None) -> list[Book]:
    """The results files of these names, or those that are there under the usual names, full scale first."""
    usual = [path for scale in ("full", "mini") if (path := results_path(scale)).exists()]
    return [read_book(path) for path in (usual if paths is None else paths)]


def report(options: argparse.Namespace) -> None:
    """Write the report of all results, and of what findings.md beside them says, if there is one."""
    setting = Setting(options.scale, options.data, options.runs)
    findings = (options.results[0].parent if options.results else RESULTS) / FINDINGS
    clip = (Path(options.clip[0]), options.clip[1]) if options.clip else None
    for path in write_report(read_books(options.results), setting, options.out, findings, clip):
        print(path)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = Parser(
        prog="python -m train.experiments",
        description="The experiments of the paper: list them, run what is not done yet, report.",
        epilog="examples:\n"
        "  python -m train.experiments list\n"
        "  python -m train.experiments run table1b table3 --scale full --gpus 4\n"
        "  python -m train.experiments run --help\n\n"
        "exit code: 0 done; 1 failed, the last lines say why; 130, 143 stopped",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "list": "every row of the tables, the paper's value and ours",
        "run": "run what is not done yet",
        "report": "all tables beside the paper's, as Markdown and HTML",
    }
    lister, runner, reporter = (
        commands.add_parser(name, help=text, description=text.capitalize() + ".") for name, text in about.items()
    )
    lister.set_defaults(do=lambda options: print(list_rows(read_books(options.results))))
    runner.set_defaults(do=run)
    runner.add_argument("names", nargs="+", metavar="NAME", help="table1a, table1b, ..., all, or a config")
    runner.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs of this machine to use; 0 (default): the CPU"
    )
    runner.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each row on each split: seeds 0, 1, ... (default 1)"
    )
    runner.add_argument(
        "--splits", type=int, nargs="+", metavar="N", help="default: the tables' at full scale, 1 2 3 at mini scale"
    )
    runner.add_argument(
        "--results", type=Path, metavar="FILE", help="results file (default docs/experiments/results_SCALE.json)"
    )
    runner.add_argument("--set", nargs="+", default=[], metavar="key=value", help="on top of every config, to try out")
    reporter.set_defaults(do=report)
    reporter.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the report (default docs/experiments)"
    )
    reporter.add_argument(
        "--clip",
        nargs=2,
        metavar=("PACKED", "VIDEO"),
        help="what figures 2 and 3 show, where frames may not be published",
    )
    for command in (lister, reporter):
        command.add_argument(
            "--results",
            type=Path,
            nargs="+",
            metavar="FILE",
            help="results files (default docs/experiments/results_*.json)",
        )
    for command, whose in ((runner, "of the runs"), (reporter, "of the runs that figures are drawn of")):
        command.add_argument("--scale", choices=("mini", "full"), default="mini", help=f"{whose} (default %(default)s)")
        command.add_argument(
            "--data",
            type=Path,
            default=Setting.data,
            metavar="DIR",
            help="folder of the packed data sets (default %(default)s)",
        )
        command.add_argument(
            "--runs", type=Path, default=Setting.runs, metavar="DIR", help="folder of the runs (default %(default)s)"
        )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: ends the run in work too
    try:
        options.do(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {describe_error(error)}")


if __name__ == "__main__":
    main()
