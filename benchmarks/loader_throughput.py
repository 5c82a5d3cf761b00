"""Samples per second of the loader, beside what users would otherwise run, and beside the ceilings.

    python benchmarks/loader_throughput.py [--data PACKED] [--rows NAME ...] [--cold] [--quick]

Every row delivers training batches of the same kind: float32 (N, 2L, 224, 224) of stacked fields less their means, or
(N, 3, 224, 224) of colour-jittered RGB, cropped and mirrored at random; smaller crops of smaller frames, see --crop-px.
Every row reports the views it delivered; in every round some of them are recomputed with the reference. A row that
differs, or fails, is left out with its error, the others go on, and the exit status is 1.

    ours_k1, _k4, _k8 this project's loader; k stacks from each decoded window of L+k-1 fields (temporal)
    ours_k1_cold      --cold: the same, the shards evicted from the page cache before every round
    ours_k1_remote    --remote: the same, the set fetched from a web server of this machine, its cache warm
    torch_dataloader  torch's DataLoader over loose JPEG files, OpenCV, the best of --workers
    webdataset        the `webdataset` package over the shards, OpenCV, the best of --workers; a stack of each clip
                      read, so it reads far more than it decodes
    dali_textbook     a DALI graph with a decoder for every channel, of whole frames or of the crop, the better; always
                      the first L fields of a clip
    reference         the plain numpy loader that serves as the tests' oracle
    ceiling_decode    libjpeg-turbo (through OpenCV) on all cores, decoding the same images in full and nothing else
    ceiling_region    DALI decoding only the crops, to uint8, of bytes in memory, and nothing else
    ceiling_read      reading the same bytes, without checking or decoding them
    ceiling_write     writing the float32 batch once

Each row is a process of its own, stopped while others have their turn. Rounds are interleaved, warm-up is outside the
clock, ratios are of medians of the same run. Which setting is best is measured before the first round. The file is
written after every round.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import ceilings
import numpy as np
import peers
from common import (
    CROP_PX,
    add_crop_px,
    add_data,
    add_out,
    choose_crop_px,
    demo_set,
    describe_data,
    errors_in_a_line,
    result_path,
    write_result,
)
from row import Checked, Delivered, Job, Maker, Measured, RowError, RowProcess
from served import served
from tqdm import tqdm

from flow.command import Parser
from loaders import reference
from loaders.batch import FLOW_SCALE, RGB_STD, StreamSpec
from loaders.index import Index, open_index
from loaders.source import Source

PEERS = ("torch_dataloader", "webdataset", "dali_textbook")
TEMPORAL_ONLY = ("ours_k4", "ours_k8")
REMOTE = "ours_k1_remote"
NAMES = (
    *("ours_k1", *TEMPORAL_ONLY, "ours_k1_cold", REMOTE, *PEERS, "reference"),
    *("ceiling_decode", "ceiling_region", "ceiling_read", "ceiling_write"),
)


def ours(job: Job) -> Iterator[Delivered]:
    """This project's loader."""
    from loaders import dali_loader  # here, so that other rows' memory holds no DALI

    return _batches(dali_loader, job)


def plain(job: Job) -> Iterator[Delivered]:
    """The same batches by the reference."""
    return _batches(reference, job)


def _batches(module: Any, job: Job) -> Iterator[Delivered]:
    index = open_index(job.url or job.root, cache=job.cache)
    means = dict(seed=job.seed, batch_size=job.batch_size, device=job.device, num_threads=job.cores)
    with module.train_loader(index, index.split(job.split), job.spec, **means) as loader:
        for batch in loader:
            yield Delivered(batch.inputs, lambda batch=batch: batch.draw)


def settings_of(name: str, job: Job, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Job]]:
    """What makes a row, and the settings of which the best is shown: description -> job."""
    one, on_all_cores = {"": job}, {"": replace(job, workers=job.cores)}
    workers = {f"{n} worker{'s' * (n > 1)}": replace(job, workers=n) for n in arguments.workers}
    regions = {"whole frames": job} | ({} if arguments.quick else {"crops": replace(job, region=True)})
    match name:
        case "ours_k1" | "ours_k1_cold":
            return ours, {"": replace(job, cold=name == "ours_k1_cold")}
        case "ours_k1_remote":
            return ours, {"": replace(job, url=arguments.url, cache=job.loose / name)}
        case "ours_k4" | "ours_k8":
            return ours, {"": replace(job, spec=replace(job.spec, stacks_per_window=int(name[-1])))}
        case "torch_dataloader":
            return peers.torch_dataloader, workers
        case "webdataset":
            return peers.webdataset, workers
        case "dali_textbook":
            return peers.dali_textbook, regions
        case "reference":
            return plain, one
        case "ceiling_decode" | "ceiling_read":
            return getattr(ceilings, name), on_all_cores
    return getattr(ceilings, name), one


def best_setting(name: str, make: Maker, settings: dict[str, Job], seconds: float) -> tuple[str, dict[str, float]]:
    """The fastest setting, and the samples/s that decided; nothing is measured if there is but one.

    One after the other, each closed before the next: together they would not fit in memory. A setting that fails is
    skipped, with a message. Raises RowError if none is left.
    """
    rates: dict[str, float] = {}
    errors = []
    for setting, job in settings.items() if len(settings) > 1 else ():
        with closing(RowProcess(f"{name}, {setting}", make, job)) as process:
            try:
                process.wait()
                rates[setting] = process.measure(seconds).samples_per_s
            except RowError as error:
                errors.append(str(error))
                print(f"skipped: {error}", file=sys.stderr)
    if len(errors) == len(settings):
        raise RowError("\n".join(errors))
    return max(settings, key=lambda setting: rates.get(setting, 0.0)), rates


def measure(
    rows: dict[str, tuple[Maker, Job]], index: Index, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, list[Measured]], dict[str, str]]]:
    """After every round, all turns of every row so far, and the errors of those that failed or deliver something else
    than they say: these have no turns. A round takes each row in turn, at least `seconds` long.
    """
    turns: dict[str, list[Measured]] = {name: [] for name in rows}
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(closing(RowProcess(name, *row))) for name, row in rows.items()}

        @contextmanager
        def recorded(name: str) -> Iterator[None]:
            try:
                yield
            except RowError as error:
                errors[name] = str(error)
                del turns[name]
                processes[name].close()

        for name, process in processes.items():
            with recorded(name):
                process.wait()
        for round_ in range(arguments.rounds):
            for name in tqdm(list(turns), f"round {round_ + 1} of {arguments.rounds}", disable=None):
                with recorded(name):
                    turn = processes[name].measure(arguments.seconds)
                    if turn.checked is not None:
                        check(name, turn.checked, index, rows[name][1])
                    turns[name].append(replace(turn, checked=None))
            yield turns, errors


def check(name: str, checked: Checked, index: Index, job: Job) -> None:
    """Raise RowError unless the reference computes the same inputs from the views that the row reports."""
    spec = replace(job.spec, stacks_per_window=1)
    with reference.ReferenceLoader(Source(index, spec), iter([checked.draw]), device="cpu") as loader:
        expected = next(loader).inputs.numpy()
    found = checked.inputs
    if found.shape != expected.shape or found.dtype != np.float32:
        raise RowError(f"row {name} delivers {found.dtype} {found.shape}, not float32 {expected.shape}: not shown.")
    difference, allowed = float(np.abs(found - expected).max()), largest_difference(index, job)
    if not difference <= allowed:  # also if it is not a number
        raise RowError(
            f"row {name} delivers other inputs than the reference computes from the views that it reports: they differ "
            f"by up to {difference:.3g}, and {allowed:.3g} is allowed. Its rate means nothing and is not shown."
        )


def largest_difference(index: Index, job: Job) -> float:
    """What two right decoders may differ by, in network inputs: nothing on the CPU, two codes on a GPU."""
    if job.device == "cpu":
        return 1e-3
    if job.spec.stream == "spatial":
        return 2.01 / float(RGB_STD.min())
    widest = max(float((index.entries[kind]["hi"] - index.entries[kind]["lo"]).max()) for kind in job.spec.kinds)
    return 2.01 * FLOW_SCALE * widest / 255


def summarise(
    stream: str, turns: dict[str, list[Measured]], chosen: dict[str, tuple[str, dict[str, float]]]
) -> list[dict[str, Any]]:
    """The table's rows. Ratios are of medians; None where a row that they need was not measured.

    chosen: name -> setting, and the samples/s of all settings that were tried.
    """
    rates = {name: median(turn.samples_per_s for turn in measured) for name, measured in turns.items()}
    best_peer = max((rates[name] for name in PEERS if name in rates), default=None)

    def ratio(name: str, other: float | None) -> float | None:
        return rates[name] / other if other else None

    table = []
    for name, measured in turns.items():
        every = [turn.samples_per_s for turn in measured]
        row = {
            "stream": stream,
            "name": name,
            "setting": chosen[name][0],
            "samples_per_s": {"median": rates[name], "min": min(every), "max": max(every)},
            "ratio_to_torch_dataloader": ratio(name, rates.get("torch_dataloader")),
            "ratio_to_best_peer": ratio(name, best_peer),
            "ratio_to_ceiling": ratio(name, rates.get("ceiling_decode")),
            "cpu_s_per_1000": median(turn.cpu_s_per_1000 for turn in measured),
            "peak_rss_bytes": of_known(max, [turn.peak_rss_bytes for turn in measured]),
            "read_bytes_per_sample": of_known(median, [turn.read_bytes_per_sample for turn in measured]),
        }
        if chosen[name][1]:
            row["settings_tried"] = chosen[name][1]  # description -> samples/s, before the first round
        if name == "ours_k1" and {"ceiling_region", "ceiling_write"} <= set(rates):
            one_after_the_other = 1 / (1 / rates["ceiling_region"] + 1 / rates["ceiling_write"])
            row["ratio_to_region_plus_write"] = ratio(name, one_after_the_other)
        table.append(row)
    return table


def of_known(statistic: Any, values: list[Any]) -> Any:
    """The statistic, or None where the system did not tell the values."""
    return None if None in values else statistic(values)


def measure_stream(stream: str, folder: Path, root: Path, arguments: argparse.Namespace) -> Iterator[list[dict]]:
    """The table of one stream, after every round; rows that failed stand at its end, with their errors."""
    index, spec = open_index(root), StreamSpec(stream=stream, L=arguments.L, crop_px=arguments.crop_px)
    job = Job(root, arguments.split, folder / stream, spec, arguments.batch_size, arguments.cores, arguments.device)
    names = [name for name in arguments.rows if stream == "temporal" or name not in TEMPORAL_ONLY]
    if "torch_dataloader" in names:
        peers.write_loose_files(job.loose, index, index.split(job.split), spec.kinds)
    rows, chosen, unfit = {}, {}, {}
    for name in names:
        make, settings = settings_of(name, job, arguments)
        try:
            chosen[name] = best_setting(name, make, settings, arguments.seconds)
            rows[name] = make, settings[chosen[name][0]]
        except RowError as error:
            unfit[name] = str(error)
    for turns, errors in measure(rows, index, arguments):
        failed = [{"stream": stream, "name": name, "error": error} for name, error in (unfit | errors).items()]
        yield summarise(stream, turns, chosen) + failed


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Loader throughput beside its peers and its ceilings.",
    )
    add_data(parser)
    parser.add_argument("--split", default="split1_train", metavar="NAME", help="list of videos (default %(default)s)")
    parser.add_argument(
        "--streams", nargs="+", choices=["temporal", "spatial"], default=["temporal", "spatial"], help="(default: both)"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)} (default: all that fit)"
    )
    parser.add_argument("--cold", action="store_true", help="also ours_k1_cold; needs data larger than a round reads")
    parser.add_argument("--remote", action="store_true", help="also ours_k1_remote, over HTTP on loopback")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="that loads (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples (default %(default)s)")
    add_crop_px(parser)
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="interleaved over the rows (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="of a row in a round (default %(default)s)"
    )
    parser.add_argument(
        "--cores",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads of every row (default: one per core)",
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", metavar="N", help="worker processes to try (default: 1 2 3 4)"
    )
    add_out(parser, "loader_throughput")
    parser.add_argument("--quick", action="store_true", help="one short round on small crops: does it run?")
    arguments = parser.parse_args(argv)
    arguments.crop_px = choose_crop_px(arguments.data, arguments.crop_px)
    partial = bool(arguments.rows) or arguments.rounds < parser.get_default("rounds") or len(arguments.streams) < 2
    partial |= arguments.crop_px != CROP_PX
    less = {"quick": arguments.quick, "generated": arguments.data is None, "partial": partial}
    arguments.out = result_path(arguments.out, "loader_throughput", **less)
    arguments.rows = arguments.rows or [
        name for name in NAMES if (arguments.cold or name != "ours_k1_cold") and (arguments.remote or name != REMOTE)
    ]
    arguments.workers = arguments.workers or ([1] if arguments.quick else [1, 2, 3, 4])
    arguments.L = 10
    if arguments.quick:
        arguments.L, arguments.crop_px = 2, 40
        arguments.rounds, arguments.seconds, arguments.batch_size = 1, 0.2, 8
    return arguments


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    # Not without ending the rows, which may be stopped:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    from charts import draw_chart  # here: every row's process imports this file

    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as servers:
        folder = Path(temporary)
        root = arguments.data or demo_set(folder, 256 if not arguments.quick else 64)
        config = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
        config |= {"data": describe_data(open_index(root), arguments.data is None)}
        if REMOTE in arguments.rows:
            arguments.url = servers.enter_context(served(root))
        for stream in arguments.streams:
            done = table
            for part in measure_stream(stream, folder, root, arguments):
                table = done + part
                write_result(arguments.out, config, complete=False, rows=table)
        write_result(arguments.out, config, rows=table)
    for row in (row for row in table if "error" not in row):
        rate = row["samples_per_s"]
        print(
            f"{row['stream']:9} {row['name']:17} {rate['median']:8.0f} samples/s ({rate['min']:.0f}-{rate['max']:.0f})"
            f"  {row['setting']}"
        )
    failed = [row["error"] for row in table if "error" in row]
    drawn = f" and {draw_chart('loader_throughput', arguments.out)}" if len(failed) < len(table) else ""
    print(f"written to {arguments.out}{drawn}")
    print(*failed, sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
