"""Where a simulation stops scaling, and which of its inputs stops it: found by changing every one of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from scale_extraction import Cluster, Work, hours_for
from scale_training import Simulation, Training
from tqdm import tqdm

#: Doubling the nodes must make it so many times as fast, or it stops scaling.
WORTH = 1.5
#: Gain of the best input below which there is no bottleneck.
LITTLE = 0.05


Rows = list[dict[str, Any]]


def add_speedup(rows: Rows, keys: tuple[str, ...], rate: Callable[[Any], float]) -> Rows:
    """Rows with their "speedup" to one node of the same keys, and "stops_at": the fewest nodes from which on no
    doubling is worth it, or None if the last one is."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for group in groups.values():
        rates = [rate(row) for row in group]
        worth = [doubled >= WORTH * own for own, doubled in pairwise(rates)]
        stops = group[max((i + 1 for i, good in enumerate(worth) if good), default=0)]["nodes"]
        if worth and worth[-1]:
            stops = None
        for row, own in zip(group, rates, strict=True):
            row |= {"speedup": own / rates[0], "stops_at": stops}
    return rows


def sensitivity(rate: Callable[[Mapping[str, float]], float], better: Mapping[str, int]) -> dict[str, Any]:
    """Every input halved and doubled, the others as they are.

    rate(factors): of the inputs, which are 1 where they are not given. better: input -> 1 if more of it is better, -1
    if less is. Returns {"rate", "inputs": [{"input", "elasticity", "gain", "loss"}], "bottleneck"}: gain and loss are
    the change of the rate where the input is better or worse by two; the elasticity is that of both together.
    """
    usual, rows = rate({}), []
    for name, sign in tqdm(better.items(), desc="sensitivity", leave=False, disable=None):
        up, down = rate({name: 2.0}), rate({name: 0.5})
        best, worst = (up, down) if sign > 0 else (down, up)
        row = {"input": name, "elasticity": math.log(up / down) / math.log(4)}
        rows.append({**row, "gain": best / usual - 1, "loss": worst / usual - 1})
    rows.sort(key=lambda row: -row["gain"])
    bottleneck = rows[0]["input"] if rows[0]["gain"] >= LITTLE else None
    return {"rate": usual, "inputs": rows, "bottleneck": bottleneck}


#: Inputs of extraction, and of training input: 1 where more is better.
EXTRACTION_INPUTS = {"core_s_per_frame": -1, "bytes_per_frame": -1, "join_rate": 1, "receive_rate": 1,
                     "card_rate": 1, "videos_per_shard": -1, "connection_rate": 1, "mean_up": 1}  # fmt: skip
TRAINING_INPUTS = {"loader_rate": 1, "compute_rate": 1, "card_rate": 1, "gradient_bytes": -1, "pace_spread": -1,
                   "shard_bytes": -1, "fetches": -1, "store_rate": 1, "connection_rate": 1, "hash_rate": 1,
                   "latency": -1}  # fmt: skip


def extraction_rate(work: Work, cluster: Cluster, factors: Mapping[str, float]) -> float:
    """Frames/s of the steady stretch with some inputs changed."""
    f = {**dict.fromkeys(EXTRACTION_INPUTS, 1.0), **factors}
    work = replace(
        work,
        s_per_frame=work.s_per_frame * f["core_s_per_frame"],
        bytes_per_frame=work.bytes_per_frame * f["bytes_per_frame"],
        videos_per_shard=max(1, round(work.videos_per_shard * f["videos_per_shard"])),
    )
    cluster = replace(
        cluster,
        join_bytes_per_s=cluster.join_bytes_per_s * f["join_rate"],
        receive_bytes_per_s=cluster.receive_bytes_per_s * f["receive_rate"],
        card_bytes_per_s=cluster.card_bytes_per_s * f["card_rate"],
        connection_bytes_per_s=cluster.connection_bytes_per_s * f["connection_rate"],
        mean_up_s=cluster.mean_up_s * f["mean_up"],
    )
    return hours_for(float(work.frames.sum()), work, cluster)["steady_frames_per_s"]


def training_rate(training: Training, steps: int, factors: Mapping[str, float]) -> float:
    """Samples/s with some inputs changed."""
    f = {**dict.fromkeys(TRAINING_INPUTS, 1.0), **factors}
    parts, shards = training.parts, training.shards
    slower = 1 / f["compute_rate"]
    parts = replace(
        parts,
        step_s={n: s * slower for n, s in parts.step_s.items()},
        hidden_s={n: s * slower for n, s in parts.hidden_s.items()},
        gradient_bytes=parts.gradient_bytes * f["gradient_bytes"],
        link_bytes_per_s=parts.link_bytes_per_s * f["card_rate"],
    )
    shards = replace(
        shards,
        shard_bytes=shards.shard_bytes * f["shard_bytes"],
        fetches=min(training.nodes, max(1.0, shards.fetches * f["fetches"])),  # somebody needs it
        store_bytes_per_s=shards.store_bytes_per_s * f["store_rate"],
        card_bytes_per_s=shards.card_bytes_per_s * f["card_rate"],
        connection_bytes_per_s=shards.connection_bytes_per_s * f["connection_rate"],
        hash_bytes_per_s=shards.hash_bytes_per_s * f["hash_rate"],
        latency_s=shards.latency_s * f["latency"],
    )
    pace = np.maximum(0.0, 1 + (training.pace - 1) * f["pace_spread"])
    changed = replace(training, parts=parts, shards=shards, pace=pace / pace.mean())
    changed = replace(changed, loader_samples_per_s=training.loader_samples_per_s * f["loader_rate"])
    return Simulation(changed, steps).run()["samples_per_s"]
