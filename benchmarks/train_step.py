"""A training step with the data at hand and with the loader: time, samples/s, waiting, share of the machine's peak.

    python benchmarks/train_step.py [--data PACKED] [--device cuda] [--batch-size N] [--rows NAME ...] [--quick]

Trains the paper's temporal net with the functions that train.launch trains with:

    resident            on one batch, again and again, which lies on the device: the ceiling
    loader_k1           with the loader, one decoded window a stack: the paper's sampling
    loader_k8           with the loader, data.stacks_per_window = 8: L + 7 fields are decoded once for 8 stacks
    resident_compiled   as resident, with train.compile; only on a GPU

A turn of a row is a warm-up, in which it empties what the loader had ahead, and a group of steps; a GPU is waited for
at the end of the group. Rounds of turns are interleaved; median, min and max are over the rounds. loader_samples_per_s
is the loader alone, with nobody training: a row that is slower than `resident` is bound by decoding if that is no more.

mfu_pct, the model's arithmetic over what the machine could do: `flops_per_sample` says what counts as arithmetic, the
peak is the GPU's data sheet, dense bfloat16, or --peak-tflops; on a CPU the largest rate of a float32 matrix product,
measured beside it. projected_hours: the paper's 80,000 steps of 256 samples at the row's rate.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

from common import add_out, demo_set, describe_data, errors_in_a_line, result_path, write_result
from trainee import (
    Trainee,
    add_arguments,
    copied,
    fill,
    loader_rate,
    make_config,
    open_loader,
    spread,
    time_steps,
    wait_for,
)

import torch  # isort: skip
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flow.command import Parser
from loaders.batch import Batch
from loaders.index import Index, open_index
from nets.cnn_m import LocalResponseNorm
from train.config import to_flat
from train.dist import World, launch
from train.machines import Machines
from train.model import build_net, stream_spec
from train.settings import Config

ROWS = ("resident", "loader_k1", "loader_k8", "resident_compiled")

#: Option -> its default on a GPU, and on a CPU.
DEFAULTS = {
    "batch_size": (256, 32),
    "width": (1.0, 1.0),
    "crop_px": (224, 224),
    "steps": (100, 2),
    "warm_up": (20, 1),
}

#: Dense bfloat16, data sheets, by a part of the device's name. The PCIe variants of the H100 have less: --peak-tflops.
PEAK_TFLOPS = {"H100 80GB HBM3": 989.0, "H200": 989.0, "A100": 312.0}

#: The paper's schedule (sec. 5).
SCHEDULE_SAMPLES = 80_000 * 256


def flops_per_sample(config: Config, num_classes: int) -> int:
    """Floating-point operations of a sample's forward and backward pass, two for a multiplication and an addition.

    Counted: convolutions and fully connected layers, with the gradients of their weights and inputs (conv1's input
    needs none). Not counted: normalisation, however it is computed, pooling, activations, biases, loss and the update.
    """
    net = build_net(config, "temporal", num_classes, torch.device("meta")).eval()  # shapes without numbers; no dropout
    for name, layer in net.features.named_children():
        if isinstance(layer, LocalResponseNorm):
            setattr(net.features, name, nn.Identity())
    side = config.data.crop_px
    inputs = torch.empty(1, stream_spec(config, "temporal").num_channels, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        net(inputs).sum().backward()
    return int(counter.get_total_flops())


def peak_tflops(device: torch.device, given: float | None) -> tuple[float, str]:
    """What the device could do at best, in 10^12 floating-point operations a second, and where the figure is from."""
    if given is not None:
        return given, "--peak-tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if part in name:
                return tflops, "data sheet, dense bfloat16"
        return product_tflops(device, torch.bfloat16, 8192), "measured, bfloat16 matrix product"
    return product_tflops(device, torch.float32, 2048), "measured, float32 matrix product"


def product_tflops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Best rate of a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        wait_for(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        wait_for(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times) / 1e12


def measure(world: World, options: argparse.Namespace, data: Path) -> None:
    """All rounds of all rows; the file is written after every round."""
    index = open_index(data)
    config = make_config(options, data)
    num_classes, device = len(index.classes), world.device
    flops, (peak, source) = flops_per_sample(config, num_classes), peak_tflops(device, options.peak_tflops)
    header: dict[str, Any] = {key: value for key, value in to_flat(config).items() if key != "data.root"}
    header |= {"data": describe_data(index, options.data is None), "device": device.type, "threads": world.num_threads}
    header |= {"rounds": options.rounds, "steps": options.steps, "warm_up": options.warm_up}
    model = {"flops_per_sample": flops, "peak_tflops": peak, "peak_source": source}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in options.rows}
    errors: dict[str, str] = {}
    with ExitStack() as stack, tqdm(total=options.rounds * len(turns), desc="turns", disable=None) as progress:
        feeds = open_feeds(stack, options, data, index, world)
        trainee = Trainee(config, num_classes, world)
        compiled = make_config(options, data, train__compile=True)
        trainees = dict.fromkeys(turns, trainee)
        if "resident_compiled" in turns:
            trainees["resident_compiled"] = Trainee(compiled, num_classes, world)
        for left in reversed(range(options.rounds)):
            for name in (name for name in turns if name not in errors):
                try:
                    turn = time_steps(trainees[name], feeds[name], options.steps, options.warm_up)
                except RuntimeError as error:
                    if name != "resident_compiled":
                        raise
                    errors[name] = str(error)[-800:]  # such as a machine without a C compiler
                    continue
                if name.startswith("loader"):
                    turn["loader_samples_per_s"] = loader_rate(feeds[name], device, options.loader_seconds)
                turns[name].append(turn)
                progress.update()
            write_result(options.out, header, not left, **model, rows=summarise(turns, errors, flops, peak))


def open_feeds(
    stack: ExitStack, options: argparse.Namespace, data: Path, index: Index, world: World
) -> dict[str, Iterator[Batch]]:
    """Row -> its endless batches. The resident ones repeat the loader's first."""
    feeds: dict[str, Iterator[Batch]] = {}
    for name in options.rows:
        if name.startswith("loader_k"):
            config = make_config(options, data, data__stacks_per_window=int(name.removeprefix("loader_k")))
            feeds[name] = stack.enter_context(open_loader(config, index, world))
        else:
            with open_loader(make_config(options, data), index, world) as loader:
                feeds[name] = repeat(copied(next(loader)))
    return feeds


def summarise(
    turns: dict[str, list[dict[str, float]]], errors: dict[str, str], flops: int, peak: float
) -> list[dict[str, Any]]:
    """One row a name. Ratios are of medians of the same run; None where a row is missing."""
    resident = median(turn["samples_per_s"] for turn in turns["resident"]) if turns.get("resident") else None
    rows: list[dict[str, Any]] = [{"name": name, "error": error} for name, error in errors.items()]
    for name in (name for name in turns if turns[name] and name not in errors):
        columns = {key: [turn[key] for turn in turns[name]] for key in turns[name][0]}
        rate = median(columns["samples_per_s"])
        row: dict[str, Any] = {"name": name}
        row |= {key: spread(columns[key]) for key in ("step_s", "samples_per_s")}
        row |= {"ratio_to_resident": resident and rate / resident, "data_wait_pct": median(columns["data_wait_pct"])}
        row |= {"mfu_pct": 100 * rate * flops / 1e12 / peak, "projected_hours": SCHEDULE_SAMPLES / rate / 3600}
        if "loader_samples_per_s" in columns:
            row["loader_samples_per_s"] = spread(columns["loader_samples_per_s"])
        rows.append(row)
    return rows


def show(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if "error" in row:
            print(f"{row['name']:18} {row['error'].splitlines()[-1]}")
            continue
        step_ms, rate = 1e3 * row["step_s"]["median"], row["samples_per_s"]["median"]
        ratio = "" if row["ratio_to_resident"] is None else f"  {row['ratio_to_resident']:5.3f} x resident"
        print(
            f"{row['name']:18} {step_ms:9.1f} ms/step {rate:9.1f} samples/s{ratio}  waits {row['data_wait_pct']:4.1f} %"
            f"  MFU {row['mfu_pct']:4.1f} %  80,000 x 256 samples: {row['projected_hours']:.2f} h"
        )
    peak = f"{result['peak_tflops']:.2f} TFLOP/s ({result['peak_source']})"
    print(f"{result['flops_per_sample'] / 1e9:.2f} GFLOP a sample; peak {peak}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="A training step with resident data and with the loader.")
    add_arguments(parser, DEFAULTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="that trains (default %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="(default: all that the device can run)")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="X", help="the machine's peak (default: its data sheet's, or measured)"
    )
    parser.add_argument(
        "--loader-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="for the loader alone, in a round (default %(default)s)",
    )
    add_out(parser, "train_step")
    options = parser.parse_args(argv)
    partial = bool(options.rows) or options.rounds < parser.get_default("rounds")
    on_gpu = options.device == "cuda"
    partial |= fill(options, DEFAULTS, on_gpu)
    options.rows = options.rows or list(ROWS if on_gpu else ROWS[:3])
    less = {"quick": options.quick, "generated": options.data is None, "partial": partial}
    options.out = result_path(options.out, "train_step", **less)
    return options


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    gpus = int(options.device == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or demo_set(Path(folder), 256 if not options.quick else 64)
        machines = Machines(num_gpus=gpus)
        machines.check(options.batch_size)
        launch(machines, measure, options, data)
    show(json.loads(options.out.read_text()))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
