"""Decode rate of every decoder the graph can use, and whether its pixels agree with the CPU's.

    python benchmarks/decode_rates.py [--data PACKED] [--device cuda] [--quick]

Cases: CPU decoder; GPU decoder (`mixed`) of whole frames; GPU decoder of the crop's region; half of the images by each
(`shared`). On the CPU all at two batch sizes; on a GPU at the larger one, where it is also tried how much of the GPU's
part goes to its JPEG unit, and each decoder once on flow at the smaller one. A GPU decoder may end its process, so each
case runs in one of its own, and each result is on disk at once. A case runs the training graph over the same draws
without reading (bytes are resident), so its rate is that of decoding and the affine map. max_code_difference is against
the CPU's decoder, in 8-bit codes of the widest range in the batch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from typing import Any

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

import numpy as np  # isort: skip
from tqdm import tqdm

from flow.command import Parser, say
from loaders.batch import FLOW_SCALE, RGB_STD, StreamSpec
from loaders.draw import Draw, population, slot_draws
from loaders.index import open_index
from loaders.inputs import train_inputs
from loaders.pipeline import Graph, train_pipeline
from loaders.probe import TOLERANCE
from loaders.source import Encoded, Source

Batch = tuple[Encoded, Draw, np.ndarray]

#: Device -> graphs to try, the most valuable first.
GRAPHS = {
    "cpu": [Graph(), Graph(region=False)],
    "cuda": [
        Graph("cuda"),
        Graph("cuda", "mixed", region=False),
        Graph("cuda", "mixed"),
        Graph("cuda", "shared", region=False),
    ],
}
HARDWARE_LOADS = (0.0, 0.3, 1.0)  # beside DALI's default


def read_batches(root: Path, split: str, spec: StreamSpec, batch_size: int, count: int) -> list[Batch]:
    """(encoded, draw, entries) of the first training batches."""
    index = open_index(root)
    videos = population(index, index.split(split), spec)
    draws = slot_draws(videos, spec, seed=0, batch_size=batch_size, slots=(0, batch_size), start_step=0)
    source = Source(index, spec)
    return [
        (source.read(*run), draw, source.entries(*run))
        for draw, run in ((draw, (draw.video, draw.tau, spec.steps)) for draw in islice(draws, count))
    ]


def codes_of_widest_range(inputs: np.ndarray, entries: np.ndarray, spec: StreamSpec) -> np.ndarray:
    """Network inputs in units of one code: (n, 3, h, w) RGB or (m, h, w, 1) components."""
    if spec.stream == "spatial":
        return inputs * RGB_STD[:, None, None]
    return inputs / FLOW_SCALE / (float((entries["hi"] - entries["lo"]).max()) / 255)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    spec = StreamSpec(stream=options.stream, L=options.L, crop_px=options.crop_px)
    batches = read_batches(options.data, options.split, spec, options.batch_size, 3)

    def first_batch(graph: Graph) -> np.ndarray:
        inputs = train_inputs(*batches[0], spec, graph)
        (output,) = train_pipeline(spec, graph, options.batch_size, lambda: inputs).run()
        return np.asarray((output.as_cpu() if graph.device == "cuda" else output).as_tensor())

    graph = Graph(
        options.device,
        options.decoder,
        bool(options.region),
        options.threads,
        hardware_load=options.hardware_load,
    )
    found, expected = first_batch(graph), first_batch(Graph(num_threads=options.threads))
    difference = np.abs(codes_of_widest_range(found - expected, batches[0][2], spec)).max()

    endless = cycle([train_inputs(*batch, spec, graph) for batch in batches])
    pipeline = train_pipeline(spec, graph, options.batch_size, lambda: next(endless))
    for _ in range(3):
        pipeline.run()
    rates = []
    for _ in range(options.rounds):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < options.seconds:
            pipeline.run()  # host-synchronous: the batch is complete when it returns
            count += 1
        rates.append(count * options.batch_size * spec.num_images / (time.perf_counter() - start))
    return {
        "max_code_difference": float(difference),
        "images_per_s": {"median": median(rates), "min": min(rates), "max": max(rates)},
        "samples_per_s": median(rates) / spec.num_images,
    }


def cases(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Stream, batch size and graph of every case, the most valuable first."""
    graphs, streams, (small, large) = GRAPHS[device], ("temporal", "spatial"), (8, 8) if quick else (64, 256)
    if device == "cpu":
        tried = list(product(streams, (large,) if quick else (large, small), graphs))
    else:
        tried = list(product(streams, (large,), graphs))
        tried += [("temporal", large, replace(graphs[1], hardware_load=load)) for load in HARDWARE_LOADS]
        tried += [("temporal", small, graph) for graph in {graph.decoder: graph for graph in graphs[::-1]}.values()]
    for stream, batch_size, graph in tried:
        case: dict[str, Any] = {"stream": stream, "batch_size": batch_size, "region": int(graph.region)}
        yield case | {key: getattr(graph, key) for key in ("device", "decoder", "hardware_load")}


def run_case(case: dict[str, Any], options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """One case in a process of its own; one that crashes or hangs is a result, too."""
    arguments = {**case, "data": data, "split": options.split, "L": options.L, "crop-px": options.crop_px}
    arguments |= {"threads": options.threads, "rounds": options.rounds, "seconds": options.seconds}
    command = [sys.executable, __file__, "--measure"]
    command += [part for key, value in arguments.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {**case, "error": f"no result within {options.timeout} s"}
    if result.returncode:
        return {**case, "exit_code": result.returncode, "error": result.stderr.strip()[-800:]}
    return {**case, **json.loads(result.stdout.splitlines()[-1])}


def parse(argv: list[str] | None) -> argparse.Namespace:
    import os

    parser = Parser(
        description="Decode rates and parity, each case in a process of its own.",
    )
    add_data(parser)
    parser.add_argument("--split", default="split1_train", metavar="NAME", help="list of videos (default %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="that decodes (default %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="that decode (default: one per core)",
    )
    add_crop_px(parser)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each case (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of a round (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=90, metavar="S", help="of one case (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short case a decoder: does it run?")
    add_out(parser, "decode_rates")
    # Of one case, when this program calls itself:
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stream", choices=["spatial", "temporal"], default="temporal", help=argparse.SUPPRESS)
    parser.add_argument("--decoder", choices=["cpu", "mixed", "shared"], default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--region", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--hardware-load", type=float, default=0.65, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=64, help=argparse.SUPPRESS)
    parser.add_argument("--L", type=int, default=10, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.crop_px = choose_crop_px(options.data, options.crop_px)
    partial = options.rounds < parser.get_default("rounds") or options.crop_px != CROP_PX
    less = {"quick": options.quick, "generated": options.data is None, "partial": partial}
    options.out = result_path(options.out, "decode_rates", **less)
    if options.quick:
        options.rounds, options.seconds, options.L, options.crop_px = 1, 0.1, 2, 32
    return options


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or demo_set(Path(folder))
        config = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
        config |= {"data": describe_data(open_index(data), options.data is None)}
        for case in tqdm(list(cases(options.device, options.quick)), desc="cases", disable=None):
            rows.append(run_case(case, options, data))
            write_result(options.out, config, complete=False, rows=rows)
            row = rows[-1]
            outcome = row.get("error") or (
                f"{row['images_per_s']['median']:10.0f} images/s, differs by {row['max_code_difference']:.2f} codes"
            )
            say(" ".join([*(f"{key}={value}" for key, value in case.items()), outcome]))
        write_result(options.out, config, rows=rows)
    # A GPU decoder that crashes is a finding, and recorded; decoding wrongly, or a CPU that fails, is a failure.
    wrong = [row for row in rows if row.get("max_code_difference", 0) > TOLERANCE]
    return int(bool(wrong) or any("error" in row and row["decoder"] == "cpu" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
