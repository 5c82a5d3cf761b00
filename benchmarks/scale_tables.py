"""The tables of docs/scale.md, from the simulation's results and the measurements behind them."""

from typing import Any

from spelling import digits, num_bytes

#: What the document calls inputs that were changed.
INPUTS = {
    "core_s_per_frame": "time of a core a frame",
    "bytes_per_frame": "bytes a frame",
    "join_rate": "the driver's rate of joining shards",
    "receive_rate": "the driver's rate of receiving fragments",
    "card_rate": "network card",
    "videos_per_shard": "videos a shard",
    "connection_rate": "rate of a connection to the store",
    "mean_up": "time between failures",
    "loader_rate": "loader",
    "compute_rate": "computing",
    "gradient_bytes": "bytes of the gradient",
    "pace_spread": "spread of a loader's batches",
    "shard_bytes": "bytes of a shard",
    "fetches": "nodes that fetch a shard",
    "store_rate": "the store's rate",
    "hash_rate": "rate of hashing",
    "latency": "the store's latency",
}
WAYS = {"driver": "the driver", "shared": "a shared file system"}
HOURS_OF_A_WEEK = 168


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _count(value: float) -> str:
    for unit, factor in ((" billion", 1e9), (" million", 1e6)):
        if value >= factor:
            return f"{digits(value / factor)}{unit}"
    return f"{value:,.0f}"


def scale_sets_table(result: dict[str, Any]) -> str:
    """Disk, index and settings of every set."""
    head = ["", *(row["title"] for row in result["sets"])]
    lines = {
        "videos": lambda row: f"{row['videos']:,}",
        "frames": lambda row: _count(row["frames"]),
        "disk": lambda row: num_bytes(row["bytes"]),
        "disk with `--backward`": lambda row: num_bytes(row["bytes_with_backward"]),
        "`--videos-per-shard`": lambda row: str(row["videos_per_shard"]),
        "shards": lambda row: f"{row['shards']:,} of {num_bytes(row['shard_bytes'])}",
        "index": lambda row: num_bytes(row["index_bytes"]),
        "time to build it": lambda row: f"{digits(row['index_h'])} h",
        "memory to build it": lambda row: num_bytes(row["index_memory_bytes"]),
        "from opening to the first batch": lambda row: f"{digits(row['first_batch_s'])} s",
        "stacks drawn of a video in the paper's schedule": lambda row: digits(row["stacks_per_video"]),
        "steps from one new shard to the next, to draw from all": lambda row: digits(row["exchange_steps"]),
        f"cache for a pool of {result['config']['pool_shards']} shards": lambda row: num_bytes(row["pool_bytes"]),
    }
    return _table(head, [[name, *map(cell, result["sets"])] for name, cell in lines.items()])


def scale_hours_table(result: dict[str, Any]) -> str:
    """Hours of one node, and how many nodes extract in a week, by method."""
    methods = sorted(result["sets"][0]["node_hours"], key=lambda name: result["sets"][0]["node_hours"][name])
    rows = []
    for method in methods:
        hours = [row["node_hours"][method] for row in result["sets"]]
        cells = [f"{digits(h)} h, {max(1, -(-h // HOURS_OF_A_WEEK)):,.0f}" for h in hours]
        rows.append([f"`{method}`", *cells])
    note = (
        f"\n\nHours of one node of {_assumed(result, 'cores'):.0f} cores, and how many such nodes take a week if "
        f"nothing holds them up. With `--backward` {result['backward_ratio']:.2f} times as long, measured with `dis`."
    )
    return _table(["", *(row["title"] for row in result["sets"])], rows) + note


def _assumed(result: dict[str, Any], name: str) -> float:
    return next(row["value"] for row in result["assumptions"] if row["name"] == name)


def _stops(row: dict[str, Any], most: int) -> str:
    return str(row["stops_at"]) if row["stops_at"] else f"not up to {most}"


def _by_nodes(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[int, dict[str, Any]]]:
    """Groups of rows with the same keys, each by number of nodes."""
    groups: dict[Any, dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["nodes"]] = row
    return list(groups.values())


def scale_extraction_table(result: dict[str, Any]) -> str:
    """The chart, and hours by number of nodes."""
    titles = {row["set"]: row["title"] for row in result["sets"]}
    rows = []
    for group in _by_nodes(result["extraction"], ("set", "method", "through")):
        most = max(group)
        last = group[most]
        cells = [titles[last["set"]], f"`{last['method']}`", WAYS[last["through"]]]
        cells += [digits(group[min(n, most)]["hours"]) for n in (1, 16, 64)]
        cells += [f"{last['speedup']:.1f}", f"{100 * last['slots_busy']:.0f} %", f"{100 * last['driver_busy']:.0f} %"]
        rows.append([*cells, _stops(last, most)])
    head = ["set", "flow", "fragments go to", "hours of 1 node", "of 16", "of 64", "speed-up of 64"]
    head += ["cores busy then", "driver busy then", "stops scaling at nodes"]
    chart = "![simulated speed-up against the number of nodes](../benchmarks/results/scale_model.png)\n\n"
    note = (
        f"\n\nThe hours are those of the whole set. Simulated is a stretch of {result['config']['videos']:,} videos "
        "at most, the same for all numbers of nodes, and cores and driver are as busy as in that, its beginning and "
        "its last videos included."
    )
    return chart + _table(head, rows) + note


def scale_training_table(result: dict[str, Any]) -> str:
    """Samples/s by number of nodes, and what a node computes and loads."""
    rows = []
    for group in _by_nodes(result["training"], ("kind", "scaling", "card_gbit", "compression", "k")):
        most = max(group)
        last = group[most]
        name = {"gpu": "one GPU, assumed", "cpu": "this CPU, measured"}[last["kind"]]
        cells = [name, last["scaling"], f"{last['card_gbit']:.0f} Gbit/s", str(last["k"]), last["compression"]]
        cells += [digits(group[min(n, most)]["samples_per_s"]) for n in (1, 8, 64)]
        wait, sent = (100 * last[key] / last["step_s"] for key in ("data_wait_s", "communication_s"))
        cells += [f"{last['speedup']:.1f}", f"{wait:.0f} %", f"{sent:.0f} %"]
        cells += [digits(1 / last["exchange_steps"]), f"{100 * last['seen_share']:.0f} %"]
        rows.append([*cells, _stops(last, most)])
    head = ["a node computes with", "scaling", "network", "k", "gradients", "stacks/s of 1 node", "of 8", "of 64"]
    head += ["speed-up of 64", "waits for data then", "for gradients then", "shards a step then, for a pass",
             "seen with `data.pool_steps=1`", "stops scaling at nodes"]  # fmt: skip
    gpu, cores = result["node_rates"]["gpu"], _assumed(result, "cores")
    loads = {k: gpu[f"loads_k{k}"] for k in (1, 4, 8)}
    need = {k: cores * gpu["computes"] / rate for k, rate in loads.items()}
    given = ", ".join(f"{digits(rate)} (k = {k})" for k, rate in loads.items())
    note = (
        f"\n\nA GPU of {_assumed(result, 'gpu_tflops'):.0f} TFLOP/s, assumed, takes {digits(gpu['computes'])} "
        f"stacks/s. {cores:.0f} cores load {given}, if they are as fast as each of two was: to keep up, the GPU needs "
        f"{', '.join(digits(n) for n in need.values())} cores."
    )
    return _table(head, rows) + note


def scale_limits_table(result: dict[str, Any]) -> str:
    """What limits each case: the inputs whose improvement by two gains most."""
    rows = []
    for row in result["sensitivity"]:
        best = [found for found in row["inputs"] if found["gain"] >= 0.005][:3]
        gains = ", ".join(f"{INPUTS[found['input']]} {100 * found['gain']:+.0f} %" for found in best)
        steep = max(row["inputs"], key=lambda found: abs(found["elasticity"]))
        limit = INPUTS[row["bottleneck"]] if row["bottleneck"] else "nothing alone"
        elasticity = f"{INPUTS[steep['input']]} {steep['elasticity']:+.2f}"
        case = f"`{row['case']}`" if row["what"] == "extraction" else f"{row['case']} scaling"
        rows.append([row["what"], case, str(row["nodes"]), digits(row["rate"]), limit, gains or "none", elasticity])
    head = ["", "case", "nodes", "frames/s, stacks/s", "limited by", "gain if twice as good", "largest elasticity"]
    return _table(head, rows)


def scale_check_table(result: dict[str, Any]) -> str:
    """Predicted first, measured then."""
    rows = []
    for row in result["rows"]:
        said = [row["predicted_s"]["median"], row["predicted_cpu_s"]]
        found = [row.get("measured_s"), row.get("measured_cpu_s")]
        cells = [str(row["processes"])]
        for predicted, seen, error in zip(said, found, ("error_pct", "cpu_error_pct"), strict=True):
            spread = f"{seen['median']:.1f} s ({seen['min']:.1f} to {seen['max']:.1f})" if seen else "not yet"
            cells += [f"{predicted:.1f} s", spread, f"{row[error]:+.0f} %" if seen else "–"]
        rows.append(cells)
    head = ["processes", "predicted, by the clock", "measured", "error", "predicted, CPU", "measured", "error"]
    config = result["config"]
    load = config.get("load_average")
    busy = (
        "" if load is None else f" While it was measured, {load:.1f} processes on average wanted the machine's cores."
    )
    rounds = f", rounds: {config['rounds']}" if "rounds" in config else ""
    note = f"\n\n`flow.pack` of {config['clips']} real clips on {config['cores']} cores{rounds}.{busy}"
    if known := result.get("known"):
        note += (
            f" A pack of {known['clips']} clips by {known['processes']} processes, which was timed before on a quiet "
            f"machine ([flow.md](flow.md#how-fast)), took {known['measured_s']:.1f} s; simulated: "
            f"{known['simulated_s']['median']:.1f} s, {known['error_pct']:+.0f} %."
        )
    return _table(head, rows) + note


def scale_costs_table(result: dict[str, Any], ray: dict[str, Any]) -> str:
    """What was measured of one machine."""
    stages = {(row["stage"], row["processes"]): row["ms_per_frame"] for row in result["stages"]}
    names = {
        "decode_resize": "decoding and resizing a frame",
        "flow": "flow by `dis`",
        "code": "coding frame and field",
    }
    most = max(n for _, n in stages)
    rows = []
    for stage, name in names.items():
        one, all_cores = stages[stage, 1], stages[stage, most]
        rows.append([f"{name}, CPU ms: 1 process; {most}", f"{one['median']:.2f}; {all_cores['median']:.2f}"])
    join, index, each, loader = (result[key] for key in ("join", "index", "bytes", "loader"))
    spread = lambda found: f"{found['median']:,.0f} ({found['min']:,.0f} to {found['max']:,.0f})"  # noqa: E731
    batches = sorted(loader["batch_s"])
    late = batches[int(0.95 * (len(batches) - 1))] / (sum(batches) / len(batches))
    rows += [
        ["bytes of an RGB frame; of a forward field; of a backward field", "; ".join(
            f"{each[key]:,.0f}" for key in ("rgb_frame", "forward_field", "backward_field"))],
        ["bytes that the tar adds a frame", f"{each['tar_per_frame']:,.0f}"],
        ["joining a shard with hash and fsync, MB/s", spread(join["mb_per_s"])],
        ["the same by CPU time, MB/s", spread(join["mb_per_cpu_s"])],
        ["SHA-256 alone, MB/s", spread(join["sha256_mb_per_s"])],
        ["taking fragments that nodes send, without a network, MB/s", spread(ray["taken_mb_per_s"])],
        ["building an index, frames/s", spread(index["frames_per_s"])],
        ["memory of that; bytes of the index, a frame", f"{index['memory_bytes_per_frame']:.0f}; "
         f"{index['bytes_per_frame']:.0f}"],
        ["a checkpoint of the paper's temporal net", f"{num_bytes(result['checkpoint']['bytes'])} in "
         f"{digits(result['checkpoint']['write_s']['median'])} s"],
        ["its gradient", num_bytes(result["checkpoint"]["gradient_bytes"])],
        ["a slow batch of the loader (one in twenty), to the mean", f"{late:.2f}"],
    ]  # fmt: skip
    config = result["config"]
    note = (
        f"\n\n{config['cores']} cores of {result['machine']['cpu']}, median (slowest to fastest round). "
        f"When measuring began, {config['load_average']:.1f} processes wanted them: what goes by the clock is too "
        "slow, and the simulation takes the fastest round."
    )
    return _table(["", ""], rows) + note


def scale_assumptions_table(result: dict[str, Any]) -> str:
    """All that was not measured here."""
    rows = []
    for row in result["assumptions"]:
        source = (
            row["source"] if row["checked"] or row["source"].startswith("assumed") else f"{row['source']} (from memory)"
        )
        rows.append([f"`{row['name']}`", f"{row['value']:,.7g} {row['unit']}", source])
    return _table(["", "value", "source"], rows)
