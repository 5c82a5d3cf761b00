"""Speed-up of training with the number of devices, with resident data and with the loader; and a model of it.

    python benchmarks/scaling.py --gpus 1,2,4 | --procs 1,2 [--data PACKED] [--link-gbytes-per-s G] [--quick]

Launches the project's training step on n devices, for each n: strong scaling (the same global batch, B, on all n
together) and weak scaling (B on each), each on a batch that lies on the device and with the loader, against n = 1 of
the same run. Rounds are interleaved over n. Then the ways of sending gradients, and the all-reduce alone.

With --procs a device is one core: every process, also the only one, is pinned to a core of its own, on which it
computes, loads and communicates, each with one thread. Else one process would have the cores of two.

The model, `scaling_model.predict`, is made of parts measured on one device, a link's bandwidth and the loader's rate.
It projects to 64 devices, and is held against what was measured on several. A projection is marked as one wherever it
is shown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product, repeat
from pathlib import Path
from statistics import median
from typing import Any

from charts import draw_chart
from common import add_out, demo_set, describe_data, errors_in_a_line, result_path, write_result
from scaling_model import (
    BYTES,
    PROJECTED,
    SENDING,
    assemble,
    communication_rows,
    model_errors,
    project,
    scaling_rows,
    sending_rows,
)
from trainee import (
    Trainee,
    add_arguments,
    copied,
    fill,
    loader_rate,
    make_config,
    open_loader,
    time_all_reduce,
    time_part,
    time_steps,
)

import torch  # isort: skip
from tqdm import tqdm

from flow.command import Parser
from loaders.batch import Batch
from loaders.index import open_index
from train.config import to_flat
from train.dist import World, launch
from train.machines import Machines

#: Option -> its default on GPUs, and on a CPU.
DEFAULTS = {
    "batch_size": (256, 32),
    "width": (1.0, 0.5),
    "crop_px": (224, 112),
    "steps": (100, 3),
    "warm_up": (20, 1),
}

# --- one launch, in n processes ----------------------------------------------------------------------------------


def measure(world: World, options: argparse.Namespace, data: Path) -> None:
    """All that one launch on n = world_size devices finds; the first process writes it to `options.out`."""
    if options.procs:
        pin_to_one_core(world.rank)
    index = open_index(data)
    n, num_classes, group = world.world_size, len(index.classes), (options.steps, options.warm_up)
    trainee = Trainee(make_config(options, data), num_classes, world)
    found: dict[str, Any] = {"num_threads": world.num_threads, "steps": []}
    for size in sorted({options.batch_size, options.batch_size * n}):
        more = {"train__batch_size": size, "data__stacks_per_window": options.stacks_per_window}
        with open_loader(make_config(options, data, **more), index, world) as loader:
            resident = copied(next(loader))
            feeds: dict[str, Iterator[Batch]] = {"resident": repeat(resident), "loader": loader}
            for name, feed in feeds.items():
                found["steps"].append({"batch_size": size, "data": name, **time_steps(trainee, feed, *group)})
            if n == 1:
                rate = loader_rate(loader, world.device, options.loader_seconds)
                found["loader_samples_per_s_per_core"] = rate / world.num_threads
        if size == options.batch_size:
            share = resident
    found["num_parameters"] = sum(parameter.numel() for parameter in trainee.net.parameters())
    if n == 1:
        found["parts"] = [time_part(trainee, copied(share, size), *group) for size in sizes(options)]
    else:
        del trainee
        found["all_reduce_s"] = {c: time_all_reduce(world, found["num_parameters"], c) for c in BYTES}
        found["sending"] = []
        for sending in SENDING:
            config = make_config(options, data, **{f"train__{key}": value for key, value in sending.items()})
            turn = time_steps(Trainee(config, num_classes, world), repeat(share), *group)
            found["sending"].append({**sending, **turn})
    if world.is_main:
        options.out.write_text(json.dumps(found))


def pin_to_one_core(rank: int) -> None:
    """Bind this process, with the threads that it has and will have, to one of the cores it was given."""
    core = sorted(os.sched_getaffinity(0))[rank]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def sizes(options: argparse.Namespace) -> list[int]:
    """Samples on a device in strong scaling, measured or projected."""
    return sorted({options.batch_size // n for n in (*options.counts, *PROJECTED) if options.batch_size % n == 0})


# --- all launches ------------------------------------------------------------------------------------------------


def run_launch(n: int, argv: list[str], data: Path, out: Path) -> dict[str, Any]:
    """`measure` on n devices, launched from a process of its own, as train.launch would be."""
    command = [sys.executable, __file__, *argv, "--measure", str(n), "--data", str(data), "--out", str(out)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def analyse(found: dict[int, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """All tables of the result, from what each n's launches found."""
    rows = scaling_rows(found, options.batch_size)
    several = {n: launches for n, launches in found.items() if n > 1}
    communication = [row for n, launches in several.items() for row in communication_rows(launches, n)]
    links = {r["n"]: 1e9 * r["link_gbytes_per_s"] for r in communication if r["gradient_compression"] == "none"}
    link = 1e9 * options.link_gbytes_per_s if options.link_gbytes_per_s else max(links.items(), default=(0, 3e11))[1]
    parts = assemble(found[1], link, in_turn=bool(options.procs))
    per_core = median(one["loader_samples_per_s_per_core"] for one in found[1])
    loaders = {n: per_core * launches[0]["num_threads"] for n, launches in found.items()}
    loader = per_core * options.host_cores_per_gpu
    return {
        "rows": rows,
        "sending": [row for n, launches in several.items() for row in sending_rows(launches, n)],
        "communication": communication,
        "parts": {**asdict(parts), "loader_samples_per_s": loader},
        "projection": project(parts, options.batch_size, loader),
        "model_error": model_errors(rows, parts, links, loaders),
    }


def show(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        print(
            f"{row['mode']:6} {row['data']:8} n={row['n']:<3} {1e3 * row['step_s']['median']:9.1f} ms/step  "
            f"speed-up {row['speedup']:5.2f}  waits {row['data_wait_pct']:4.1f} %"
        )
    for row in result["sending"]:
        print(f"n={row['n']} buckets of {row['bucket_mb']:g} MB, compression {row['gradient_compression']}: ", end="")
        print(f"{row['ratio_to_default']:.3f} x the default's rate")
    for row in result["communication"]:
        print(f"n={row['n']} all-reduce of {row['bytes'] / 1e6:.1f} MB ({row['gradient_compression']}): ", end="")
        print(f"{1e3 * row['all_reduce_s']['median']:.1f} ms, {row['link_gbytes_per_s']:.2f} GB/s over a link")
    for row in result["model_error"]:
        print(f"the model for {row['mode']}, {row['data']}, n={row['n']}: {row['error_pct']:+.1f} %")
    print(f"PROJECTION, not measured; one device is {result['device']}, the link {result['link']}:")
    for row in result["projection"]:
        print(
            f"  n={row['n']:<3} {row['data']:8} compression {row['gradient_compression']:8} "
            f"{1e3 * row['step_s']:9.1f} ms/step  speed-up {row['speedup']:5.2f}"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = Parser(
        description="Speed-up with the number of GPUs, or CPU cores, and a model of it.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpus", type=counts, metavar="N,N", help="numbers of GPUs, such as 1,2,4")
    where.add_argument(
        "--procs", type=counts, metavar="N,N", help="numbers of processes on the CPU, each on one core, such as 1,2"
    )
    add_arguments(parser, DEFAULTS)
    parser.add_argument(
        "--stacks-per-window", type=int, default=1, metavar="K", help="of the loader (default %(default)s)"
    )
    parser.add_argument(
        "--loader-seconds", type=float, default=1.0, metavar="S", help="for the loader alone (default %(default)s)"
    )
    parser.add_argument(
        "--link-gbytes-per-s",
        type=float,
        metavar="X",
        help="of the projection: what a device sends, and receives, in a second (NVLink 4 about 300, a 400 Gbit/s "
        "network 50; default: as measured on the largest n, or 300)",
    )
    parser.add_argument(
        "--host-cores-per-gpu", type=int, metavar="N", help="of the projection's loader (default: this machine's)"
    )
    add_out(parser, "scaling")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # one launch: this program calls itself
    options = parser.parse_args(argv)
    options.counts, cores = options.gpus or options.procs, len(os.sched_getaffinity(0))
    if options.counts[0] != 1 or options.counts != sorted(set(options.counts)):
        parser.error(f"{options.counts}: give rising numbers from 1, against which the others are measured.")
    available, what = (torch.cuda.device_count(), "GPUs") if options.gpus else (cores, "cores")
    if options.measure is None and options.counts[-1] > available:
        parser.error(f"{options.counts[-1]} asked for, but this machine has {available} usable {what}.")
    partial = options.rounds < parser.get_default("rounds")
    partial |= fill(options, DEFAULTS, bool(options.gpus))
    options.host_cores_per_gpu = options.host_cores_per_gpu or (max(1, cores // available) if options.gpus else 1)
    less = {"quick": options.quick, "generated": options.data is None, "partial": partial}
    options.out = result_path(options.out, "scaling", **less)
    for n in options.counts:
        if options.batch_size % (n * options.stacks_per_window):
            parser.error(f"--batch-size {options.batch_size} does not divide into {n} whole shares; choose a multiple.")
    return options


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.measure:
        n = options.measure
        if options.procs:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])  # so that launch counts a thread a process
        launch(Machines(num_gpus=n if options.gpus else 0, num_procs=n), measure, options, options.data)
        return 0
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in options.counts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = options.data or demo_set(folder, 256 if not options.quick else 64)
        turns = list(product(range(options.rounds), options.counts))
        for round_, n in tqdm(turns, desc="launches", disable=None):
            found[n].append(run_launch(n, argv, data, folder / "launch.json"))
            if n == options.counts[-1]:
                write(options, data, found, round_ + 1 == options.rounds)
    result = json.loads(options.out.read_text())
    draw_chart("scaling", options.out)
    show(result)
    print(f"written to {options.out} and {options.out.with_suffix('.png')}")
    return 0


def write(options: argparse.Namespace, data: Path, found: dict[int, list[dict[str, Any]]], complete: bool) -> None:
    """The result of the rounds so far."""
    config = make_config(options, data, data__stacks_per_window=options.stacks_per_window)
    header: dict[str, Any] = {key: value for key, value in to_flat(config).items() if key != "data.root"}
    header |= {"data": describe_data(open_index(data), options.data is None), "pinned_to_one_core": bool(options.procs)}
    header |= {key: getattr(options, key) for key in ("counts", "rounds", "steps", "warm_up", "host_cores_per_gpu")}
    result = analyse(found, options)
    device = torch.cuda.get_device_name(0) if options.gpus else "one CPU core that computes, loads and communicates"
    link = f"{result['parts']['link_bytes_per_s'] / 1e9:.2f} GB/s"
    write_result(options.out, header, complete, device=device, link=link, **result)


if __name__ == "__main__":
    sys.exit(main())
