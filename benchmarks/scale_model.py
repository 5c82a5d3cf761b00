"""What large sets need, and where packing and training input stop scaling: a simulation of discrete events.

    python benchmarks/scale_model.py [--from DIR] [--quick]

Nothing here was measured on more than one machine. The figures of one machine come from --from, by default the
published results; what nobody measured here stands under "assumptions", each with its source. What is simulated is said
in scale_extraction.py and scale_training.py; how far it is off on this machine, in scale_check.json.

sets          disk, index, node hours by method, of every set of docs/scale.md; arithmetic
extraction    hours and speed-up, by set, method, and number of nodes
training      samples/s and speed-up, by kind of node, network, scaling, and number of nodes
sensitivity   of both at 64 nodes and fewer: every input halved and doubled; the one whose improvement by two gains most
              is the bottleneck
"""

import argparse
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from charts import draw_chart
from common import RESULTS, add_out, errors_in_a_line, result_path, write_result
from scale_extraction import Cluster, Work, hours_for
from scale_inputs import ASSUMPTIONS, BATCH, POOL_SHARDS, Dataset, Measured, datasets, parts_of, read_measured
from scale_limits import (
    EXTRACTION_INPUTS,
    TRAINING_INPUTS,
    WORTH,
    add_speedup,
    extraction_rate,
    sensitivity,
    training_rate,
)
from scale_training import Shards, Simulation, Training
from scaling_model import BYTES, PROJECTED
from tqdm import tqdm

from flow.command import Parser
from flow.pool import default_num_workers

#: The paper's schedule, of one net (sec. 5).
STEPS = 80_000
#: Videos of a set that are simulated: as many for all numbers of nodes, 40 for each slot of the most.
MAX_VIDEOS, VIDEOS_PER_SLOT = 41_000, 40
#: Steps that are simulated, of few nodes and of many: several times those that fetches begin ahead are left out.
FEW_NODES, STEPS_OF_FEW, STEPS_OF_MANY = 8, 1_500, 1_000

ASSUMED = {key: assumption.value for key, assumption in ASSUMPTIONS.items()}
GBIT = 1e9 / 8


# --- sets --------------------------------------------------------------------------------------------------------


def set_row(dataset: Dataset, measured: Measured) -> dict[str, Any]:
    """What a set needs, by arithmetic on measured figures."""
    frames, num_shards = dataset.num_frames, math.ceil(dataset.num_videos / dataset.videos_per_shard)
    num_bytes = frames * measured.bytes_of(dataset.pixels)
    hours = {
        method: frames * measured.extraction_s(method, dataset.pixels) / ASSUMED["cores"] / 3600
        for method in measured.flow_s
    }
    return {
        "set": dataset.name,
        "title": dataset.title,
        "videos": dataset.num_videos,
        "frames": frames,
        "videos_per_shard": dataset.videos_per_shard,
        "shards": num_shards,
        "shard_bytes": num_bytes / num_shards,
        "bytes": num_bytes,
        "bytes_with_backward": frames * measured.bytes_of(dataset.pixels, backward=True),
        "index_bytes": frames * measured.index_frame_bytes,
        "index_memory_bytes": frames * measured.index_memory_frame_bytes,
        "index_h": frames / measured.index_frames_per_s / 3600,
        "first_batch_s": dataset.num_videos * measured.first_batch_s_per_video,
        "node_hours": hours,
        "stacks_per_video": STEPS * BATCH / dataset.num_videos,
        "exchange_steps": exchange_steps(num_shards, BATCH),
        "pool_bytes": min(POOL_SHARDS, num_shards) * num_bytes / num_shards,
    }


def exchange_steps(num_shards: int, batch_size: int) -> float:
    """Steps from one new shard to the next, so that the paper's number of samples is a pass or more: whole ones, and
    below 1 as many shards a step as that needs, which `data.pool_steps` cannot be set to."""
    steps = STEPS * BATCH / batch_size / num_shards
    return float(int(steps)) if steps >= 1 else steps


def seen_share(num_shards: int, batch_size: int) -> float:
    """Part of the shards that the paper's number of samples is drawn from with the fastest exchange that can be set,
    `data.pool_steps=1`: those of the first pool, and one a step."""
    return min(1.0, (POOL_SHARDS + STEPS * BATCH / batch_size - 1) / num_shards)


# --- extraction --------------------------------------------------------------------------------------------------


def extraction_of(dataset: Dataset, measured: Measured, method: str, num_videos: int) -> Work:
    """A stretch of a set."""
    rng = np.random.default_rng(0)
    return Work(
        frames=dataset.lengths(measured.lengths, min(num_videos, dataset.num_videos), rng),
        s_per_frame=measured.extraction_s(method, dataset.pixels),
        bytes_per_frame=measured.bytes_of(dataset.pixels),
        videos_per_shard=dataset.videos_per_shard,
        pace=measured.pace,
    )


def cluster_of(measured: Measured, nodes: int) -> Cluster:
    return Cluster(
        nodes=nodes,
        cores=int(ASSUMED["cores"]),
        join_bytes_per_s=measured.join_bytes_per_s,
        receive_bytes_per_s=measured.receive_bytes_per_s,
        card_bytes_per_s=ASSUMED["card_gbit_per_s"] * GBIT,
        shared_bytes_per_s=ASSUMED["store_gbit_per_s"] * GBIT,
        connection_bytes_per_s=1e6 * ASSUMED["connection_mb_per_s"],
        connections=int(ASSUMED["connections"]),
        latency_s=ASSUMED["latency_s"],
        startup_s=measured.startup_s,
        mean_up_s=3600 * ASSUMED["mean_up_h"],
        repair_s=3600 * ASSUMED["repair_h"],
    )


def extraction_row(
    dataset: Dataset, method: str, through: str, nodes: int, *, measured: Measured, num_videos: int
) -> dict[str, Any]:
    work = extraction_of(dataset, measured, method, num_videos)
    found = hours_for(dataset.num_frames, work, replace(cluster_of(measured, nodes), through=through))
    return {"set": dataset.name, "method": method, "through": through, "nodes": nodes, **found}


def simulate_extraction(measured: Measured, counts: list[int], num_videos: int) -> list[dict[str, Any]]:
    """A row for each set, method, way of the fragments, and number of nodes."""
    plan = [(d, method, "driver", nodes) for d in datasets() for method in ("dis", "brox") for nodes in counts]
    plan += [(d, "dis", "shared", nodes) for d in datasets() for nodes in counts]
    rows = side_by_side(partial(extraction_row, measured=measured, num_videos=num_videos), plan, "extraction")
    return add_speedup(rows, ("set", "method", "through"), lambda row: 1 / row["hours"])


def side_by_side(function: Callable[..., Any], tasks: list[Any], what: str) -> list[Any]:
    """function(*task) of all, in order, on every core."""
    with ProcessPoolExecutor(default_num_workers()) as pool:
        return list(tqdm(pool.map(function, *zip(*tasks, strict=True)), what, len(tasks), disable=None))


# --- training ----------------------------------------------------------------------------------------------------


def node_rates(measured: Measured) -> dict[str, dict[str, float]]:
    """Kinds of nodes: samples/s that they compute and, by stacks a window, load."""
    cores = ASSUMED["cores"]
    gpu = {"computes": ASSUMED["gpu_tflops"] * 1e12 / measured.flops_per_sample}
    gpu |= {f"loads_k{k}": rate * cores for k, rate in measured.loader_core_samples_per_s.items()}
    cpu = {"computes": measured.cpu_samples_per_s}
    cpu |= {f"loads_k{k}": rate * measured.cpu_cores for k, rate in measured.loader_core_samples_per_s.items()}
    return {"gpu": gpu, "cpu": cpu}


def training_of(
    measured: Measured, nodes: int, *, kind: str = "gpu", scaling: str = "weak", k: int = 1, card_gbit: float = 25.0,
    compression: str = "none",
) -> Training:  # fmt: skip
    """Nodes that train on Kinetics-700 from a store; weak scaling: the paper's batch on each."""
    dataset = next(dataset for dataset in datasets() if dataset.name == "kinetics700")
    row, rates = set_row(dataset, measured), node_rates(measured)[kind]
    num_samples = BATCH if scaling == "weak" else BATCH // nodes
    batch_size, card = num_samples * nodes, card_gbit * GBIT
    parts = parts_of(rates["computes"], num_samples, measured, card)
    sent = parts.gradient_bytes * BYTES[compression] / BYTES["none"]
    shards = Shards(
        exchange_steps=exchange_steps(row["shards"], batch_size),
        pool_shards=POOL_SHARDS,
        shard_bytes=row["shard_bytes"],
        fetches=measured.fetches_of(nodes),
        ahead_steps=int(ASSUMED["ahead_steps"]),
        at_a_time=int(ASSUMED["at_a_time"]),
        store_bytes_per_s=ASSUMED["store_gbit_per_s"] * GBIT,
        card_bytes_per_s=card,
        connection_bytes_per_s=1e6 * ASSUMED["connection_mb_per_s"] * ASSUMED["connections"],
        latency_s=ASSUMED["latency_s"],
        hash_bytes_per_s=measured.hash_bytes_per_s,
    )
    return Training(
        nodes=nodes,
        num_samples=num_samples,
        parts=replace(parts, gradient_bytes=sent, in_turn=kind == "cpu"),
        loader_samples_per_s=rates[f"loads_k{k}"],
        pace=measured.batch_pace,
        shards=shards,
    )


#: What is simulated of training, each by number of nodes.
SCENARIOS: list[dict[str, Any]] = [
    *({"kind": "gpu", "scaling": "weak", "card_gbit": gbit} for gbit in (10.0, 25.0, 100.0)),
    {"kind": "gpu", "scaling": "weak", "card_gbit": 25.0, "compression": "bfloat16"},
    {"kind": "gpu", "scaling": "weak", "card_gbit": 25.0, "k": 8},
    *({"kind": "gpu", "scaling": "strong", "card_gbit": gbit} for gbit in (25.0, 100.0)),
    {"kind": "cpu", "scaling": "weak", "card_gbit": 25.0},
]


def steps_of(nodes: int) -> int:
    """Steps that are simulated."""
    return STEPS_OF_FEW if nodes <= FEW_NODES else STEPS_OF_MANY


def training_row(scenario: dict[str, Any], nodes: int, *, measured: Measured) -> dict[str, Any]:
    training = training_of(measured, nodes, **scenario)
    found = Simulation(training, steps_of(nodes)).run()
    num_shards = next(set_row(dataset, measured)["shards"] for dataset in datasets() if dataset.name == "kinetics700")
    seen = seen_share(num_shards, nodes * training.num_samples)
    shards = {"fetches": training.shards.fetches, "exchange_steps": training.shards.exchange_steps, "seen_share": seen}
    given = {"compression": "none", "k": 1, **scenario, "nodes": nodes, "steps": steps_of(nodes)}
    return {**given, "num_samples": training.num_samples, **shards, **found}


def simulate_training(measured: Measured, counts: list[int]) -> list[dict[str, Any]]:
    """A row for each scenario and number of nodes."""
    tasks = [(scenario, nodes) for scenario in SCENARIOS for nodes in counts]
    rows = side_by_side(partial(training_row, measured=measured), tasks, "training")
    keys = ("kind", "scaling", "card_gbit", "compression", "k")
    return add_speedup(rows, keys, lambda row: row["samples_per_s"])


# --- what stops it -----------------------------------------------------------------------------------------------


def limits_row(what: str, case: str, nodes: int, *, measured: Measured) -> dict[str, Any]:
    if what == "extraction":
        kinetics = next(dataset for dataset in datasets() if dataset.name == "kinetics700")
        cluster = cluster_of(measured, nodes)
        work = extraction_of(kinetics, measured, case, VIDEOS_PER_SLOT * max(128, nodes * cluster.cores))
        found = sensitivity(lambda f: extraction_rate(work, cluster, f), EXTRACTION_INPUTS)
    else:
        training = training_of(measured, nodes, scaling=case)
        found = sensitivity(lambda f: training_rate(training, steps_of(nodes), f), TRAINING_INPUTS)
    return {"what": what, "case": case, "nodes": nodes, **found}


def find_bottlenecks(measured: Measured, counts: list[int]) -> list[dict[str, Any]]:
    """Sensitivities of extraction (Kinetics-700, fragments by way of the driver) and of training, weak and strong."""
    tasks = [("extraction", method, nodes) for method in ("dis", "brox") for nodes in counts]
    with_two = sorted({*counts, 2})  # the first that send gradients
    tasks += [("training", scaling, nodes) for scaling in ("weak", "strong") for nodes in with_two]
    return side_by_side(partial(limits_row, measured=measured), tasks, "sensitivity")


# --- command -----------------------------------------------------------------------------------------------------


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="What large sets need, and where packing and training stop scaling: simulated.")
    parser.add_argument(
        "--from", dest="results", type=Path, default=RESULTS, metavar="DIR",
        help="folder of the results files of one machine (default: the published ones)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few videos and nodes: does it run?")
    add_out(parser, "scale_model")
    options: argparse.Namespace = parser.parse_args(argv)
    out = result_path(options.out, "scale_model", quick=options.quick)
    counts, few = ([1, 2], [2]) if options.quick else (list(PROJECTED), [1, 16, 64])
    num_videos = 640 if options.quick else MAX_VIDEOS
    measured = read_measured(options.results)
    content = {
        "label": "simulation",
        "assumptions": [{"name": name, **assumption._asdict()} for name, assumption in ASSUMPTIONS.items()],
        "node_rates": node_rates(measured),
        "backward_ratio": measured.backward_ratio,
        "sets": [set_row(dataset, measured) for dataset in datasets()],
        "extraction": simulate_extraction(measured, counts, num_videos),
        "training": simulate_training(measured, counts),
        "sensitivity": find_bottlenecks(measured, few),
    }
    config = {"counts": counts, "videos": num_videos, "pool_shards": POOL_SHARDS, "worth": WORTH}
    write_result(out, {**config, "quick": options.quick}, **content)
    for row in content["sensitivity"]:
        print(
            f"SIMULATED {row['what']}, {row['case']}, {row['nodes']} nodes: {row['rate']:,.0f}/s, {row['bottleneck']}"
        )
    print(f"written to {out}, chart {draw_chart('scale_model', out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
