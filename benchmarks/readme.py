"""Writes the tables of the README and of docs/*.md from benchmarks/results/*.json: `python benchmarks/readme.py`. A
table stands between the markers <!-- name --> and <!-- /name --> of a page. A test compares them."""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from common import RESULTS, ROOT, errors_in_a_line
from promises import faults_table, fuzz_table, soak_table
from scale_tables import (
    scale_assumptions_table,
    scale_check_table,
    scale_costs_table,
    scale_extraction_table,
    scale_hours_table,
    scale_limits_table,
    scale_sets_table,
    scale_training_table,
)
from spelling import UNKNOWN, digits, num_bytes

from flow.command import Parser


def accuracy_short_table(result: dict[str, Any]) -> str:
    """Accuracy of every method with its interval, and of what."""
    lines = ["| | accuracy | 95 % interval |", "| --- | --- | --- |"]
    for method in result["methods"].values():
        low, high = method["interval_95_pct"]
        lines.append(f"| {method['title']} | {method['pct']:.1f} % | {low:.1f} to {high:.1f} % |")
    seeds = "1 seed" if result["num_seeds"] == 1 else f"{result['num_seeds']} seeds"
    lines.append(
        f"\n{result['num_videos']} test videos from {result['num_sources']} sources, {seeds}; chance "
        f"{result['chance_pct']:.0f} %. Intervals are bootstrapped over sources."
    )
    return "\n".join(lines)


def accuracy_table(result: dict[str, Any]) -> str:
    """The short table, and the paired differences of every two methods."""
    lines = [accuracy_short_table(result) + " Paired differences in points:\n"]
    lines += ["| | difference | 95 % interval |", "| --- | --- | --- |"]
    for name, difference in result["differences"].items():
        low, high = difference["interval_95_pct"]
        lines.append(f"| {name} | {difference['pct']:+.1f} | {low:+.1f} to {high:+.1f} |")
    return "\n".join(lines)


def confusion_table(result: dict[str, Any]) -> str:
    """Counts of the averaged streams, over splits and seeds: row = true class, column = predicted."""
    names = result["classes"]
    lines = ["| true \\ predicted | " + " | ".join(names) + " | recall |", "| --- |" + " --- |" * (len(names) + 1)]
    for name, row, k in zip(names, result["confusions"]["average"], range(len(names)), strict=True):
        lines.append(f"| {name} | " + " | ".join(map(str, row)) + f" | {100 * row[k] / sum(row):.0f} % |")
    return "\n".join(lines)


#: Rows of the short table of throughput, and what each is.
_SHORT_ROWS = {
    "ours_k1": "this loader, as the paper samples",
    "ours_k4": "this loader, decode once, stack 4",
    "torch_dataloader": "torch `DataLoader` and OpenCV",
    "dali_textbook": "DALI, a decoder for every channel",
    "ceiling_decode": "ceiling for one decode a field: all cores decode, and do nothing else",
}


def throughput_short_table(result: dict[str, Any]) -> str:
    """Medians of the rows that decide, a column a stream; and on what machine."""
    config, machine = result["config"], result["machine"]
    rates = {
        (row["stream"], row["name"]): row["samples_per_s"]["median"] for row in result["rows"] if "error" not in row
    }
    lines = [
        f"| samples/s | stacks of {config['L']} flow fields | RGB frames |",
        "| --- | --- | --- |",
    ]
    for name, title in _SHORT_ROWS.items():
        cells = [digits(rates.get((stream, name))) for stream in ("temporal", "spatial")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append(
        f"\nFloat32 crops of {config['crop_px']} px in batches of {config['batch_size']}, on {config['cores']} cores "
        f"of {machine['cpu']} and {len(machine['gpus']) or 'no'} GPU."
    )
    return "\n".join(lines)


def throughput_table(result: dict[str, Any]) -> str:
    """The chart that `charts.py` draws, and the figures of every row."""
    lines = [
        "![samples per second of every row](../benchmarks/results/loader_throughput.png)\n",
        "| stream | loader | samples/s, median (min to max) | to torch DataLoader | to the best peer "
        "| to `ceiling_decode` | CPU s per 1,000 | peak memory | read per sample |",
        "| --- |" + " --- |" * 8,
    ]
    for row in (row for row in result["rows"] if "error" not in row):
        rate, name = row["samples_per_s"], f"`{row['name']}`" + (f", {row['setting']}" if row["setting"] else "")
        ratios = [row.get(f"ratio_to_{other}") for other in ("torch_dataloader", "best_peer", "ceiling")]
        cells = [
            row["stream"],
            name,
            f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})",
            *(UNKNOWN if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            digits(row.get("cpu_s_per_1000")),
            num_bytes(row.get("peak_rss_bytes")),
            num_bytes(row.get("read_bytes_per_sample")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def windows_table(result: dict[str, Any]) -> str:
    lines = ["| k | accuracy | 95 % interval | paired difference to k = 1 | waits for data |", "| --- |" + " --- |" * 4]
    for row in result["rows"]:
        low, high = row["interval_95_pct"]
        difference = UNKNOWN
        if "difference" in row:
            least, most = row["difference"]["interval_95_pct"]
            difference = f"{row['difference']['pct']:+.1f} ({least:+.1f} to {most:+.1f})"
        cells = [str(row["k"]), f"{row['pct']:.1f} %", f"{low:.1f} to {high:.1f} %", difference]
        lines.append(f"| {' | '.join(cells)} | {row['data_wait_pct']:.1f} % |")
    lines.append(
        f"\n{result['num_videos']} test videos from {result['num_sources']} sources, {result['num_seeds']} seeds, "
        f"{result['config']['resolved']['temporal.steps']} steps of {result['config']['resolved']['train.batch_size']}."
    )
    return "\n".join(lines)


def train_step_table(result: dict[str, Any]) -> str:
    lines = [
        "| | ms a step | samples/s | to resident data | waits for data | of the peak | the loader alone, samples/s |",
        "| --- |" + " --- |" * 6,
    ]
    for row in (row for row in result["rows"] if "error" not in row):
        alone = row.get("loader_samples_per_s", {}).get("median")
        cells = [f"`{row['name']}`", digits(1e3 * row["step_s"]["median"]), digits(row["samples_per_s"]["median"])]
        cells += [f"{row['ratio_to_resident']:.3f}", f"{row['data_wait_pct']:.1f} %", f"{row['mfu_pct']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} | {digits(alone)} |")
    return "\n".join(lines)


def scaling_table(result: dict[str, Any]) -> str:
    """The chart that `charts.py` draws, what was measured, and how well the model predicts it."""
    errors = {(e["mode"], e["data"], e["n"]): e["error_pct"] for e in result["model_error"]}
    lines = [
        "![speed-up against the number of devices](../benchmarks/results/scaling.png)\n",
        "| scaling | data | processes | batch | ms a step | speed-up | the model's error |",
        "| --- |" + " --- |" * 6,
    ]
    for row in result["rows"]:
        error = errors.get((row["mode"], row["data"], row["n"]))
        cells = [row["mode"], row["data"], str(row["n"]), str(row["batch_size"])]
        cells += [digits(1e3 * row["step_s"]["median"]), f"{row['speedup']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {UNKNOWN if error is None else f'{error:+.0f} %'} |")
    return "\n".join(lines)


def footprint_table(result: dict[str, Any]) -> str:
    opened = [row for row in result["rows"] if row["case"] == "open"]
    seconds = median(row["first_batch_s"] for row in opened)
    lines = [
        "| | |",
        "| --- | --- |",
        f"| {opened[0]['videos']:,} videos: from opening to the first batch | {seconds:.1f} s |",
        f"| the same: memory beyond the libraries, with the queue of batches of {num_bytes(opened[0]['batch_bytes'])} "
        f"| {num_bytes(median(row['resident_bytes'] for row in opened))} |",
        f"| of that the process's own, not shared pages of index and shards "
        f"| {num_bytes(median(row['private_bytes'] for row in opened))} |",
    ]
    for row in (row for row in result["rows"] if row["case"] == "keep"):
        early, late = (value for key, value in row.items() if key.startswith("resident_bytes_after_"))
        lines.append(
            f"| k = {row['k']}: resident memory after {row['batches'] // 10:,} and after {row['batches']:,} batches "
            f"| {num_bytes(early)}, {num_bytes(late)} |"
        )
    return "\n".join(lines)


def flow_accuracy_table(result: dict[str, Any]) -> str:
    """End-point error of every method on every pair, and the mean; parameters where they are not the defaults."""
    pairs = list(result["data"]["size_px"])
    lines = [f"| method | {' | '.join(pairs)} | after the codec | mean |", "| --- |" + " --- |" * (len(pairs) + 2)]
    for row in (row for row in result["rows"] if "error" not in row):
        errors = " | ".join(f"{row['epe_px'][pair]:.3f}" for pair in pairs)
        lines.append(f"| `{row['name']}` | {errors} | {row['coded_epe_mean_px']:.3f} | {row['epe_mean_px']:.3f} |")
    lines.append("\nEnd-point error in px over the pixels whose flow is known." + _unlike_defaults(result["rows"]))
    if "brox_no_worse_than_dis" in result:
        lines[-1] += f" `brox` is no worse than `dis` on {result['brox_no_worse_than_dis']} of {len(pairs)} pairs."
    return "\n".join(lines)


def _unlike_defaults(rows: list[dict[str, Any]]) -> str:
    """How rows of one method differ, such as " `brox_fine` is brox with scale 0.95."; the method's own row is first."""
    parameters = {row["name"]: row["flow"]["parameters"] for row in rows if "flow" in row}
    text = ""
    for row in (row for row in rows if "flow" in row):
        method, own = row["flow"]["method"], parameters[row["name"]]
        changed = [f"{key} {own[key]}" for key in own if own[key] != parameters.get(method, own).get(key)]
        if changed:
            text += f" `{row['name']}` is {method} with {', '.join(changed)}."
    return text


def flow_extraction_table(result: dict[str, Any]) -> str:
    """What every method costs, the ceilings, the whole pack, and what was aimed at."""
    height, width = result["data"]["size_px"]
    lines = [
        "| | pairs/s, median (min to max) | CPU ms a pair | error | bytes a field | hours for UCF-101 |",
        "| --- |" + " --- |" * 5,
    ]
    for row in (row for row in result["rows"] if "error" not in row):
        rate, error, hours = row["pairs_per_s"], row.get("epe_mean_px"), row.get("hours_ucf101")
        cells = [
            f"`{row['name']}`" + (f", {row['device']}" if row["device"] != result["config"]["device"] else ""),
            f"{digits(rate['median'])} ({digits(rate['min'])} to {digits(rate['max'])})",
            digits(1000 * row["cpu_s_per_pair"]),
            UNKNOWN if error is None else f"{error:.3f} px",
            num_bytes(row.get("bytes_per_field")),
            digits(hours),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    paper = result["paper"]
    cells = ["the paper, on one GPU", digits(1 / paper["s_per_pair"]), UNKNOWN, UNKNOWN, UNKNOWN]
    lines.append(f"| {' | '.join(cells)} | {digits(paper['hours_ucf101'])} |")
    lines.append(
        f"\n{result['data']['pairs']} pairs of {width}x{height} px; on the CPU one process on each of "
        f"{result['config']['cores']} cores. UCF-101: {result['ucf101_pairs'] / 1e6:.1f} million pairs; the paper's "
        f"time is {paper['s_per_pair']} s a pair."
    )
    if pack := result.get("pack"):
        lines[-1] += (
            f" A whole pack with `{pack['method']}`, {pack['pairs']:,} pairs, takes {_spread(pack['ratio'])} times as "
            f"long as the larger of its parts alone, decoding and resizing, and flow, each less the start of its "
            f"processes; {_judged(pack)}. With the start it is {_spread(pack['whole_ratio'])}."
        )
    for target in result["targets"]:
        more = target.get("epe_above_deepflow_px")
        error = "" if more is None else f", {more:+.3f} px of error"
        lines[-1] += f" `{target['row']}`, {target['what']}: {_spread(target['value'])}{error}; {_judged(target)}."
    return "\n".join(lines)


def _spread(value: dict[str, float] | None) -> str:
    return UNKNOWN if value is None else f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _judged(target: dict[str, Any]) -> str:
    """What was aimed at, and whether it was met."""
    met = {True: "met", False: "missed", None: "not judged"}[target["met"]]
    return f"aimed at: {target['target']:.2f}, {met}"


def flow_choice_table(result: dict[str, Any]) -> str:
    """Size, loss and accuracy of every packing, and the paired difference to the first."""
    first = result["rows"][0]["name"]
    lines = [
        f"| packing | bytes a field | error of the codec | accuracy | 95 % interval | paired difference to `{first}` |",
        "| --- |" + " --- |" * 5,
    ]
    for row in result["rows"]:
        low, high = row["interval_95_pct"]
        difference = UNKNOWN
        if "difference" in row:
            least, most = row["difference"]["interval_95_pct"]
            difference = f"{row['difference']['pct']:+.1f} ({least:+.1f} to {most:+.1f})"
        cells = [f"`{row['name']}`", num_bytes(row["bytes_per_field"]), f"{row['quantisation_error_mean_px']:.4f} px"]
        cells += [f"{row['pct']:.1f} %", f"{low:.1f} to {high:.1f} %", difference]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = "1 seed" if result["num_seeds"] == 1 else f"{result['num_seeds']} seeds"
    resolved, data = result["config"]["resolved"], result["data"]
    lines.append(
        f"\n{result['num_videos']} test videos from {result['num_sources']} sources, {seeds}; chance "
        f"{result['chance_pct']:.0f} %. {data['num_frames'] / data['num_videos']:.0f} frames of every clip at "
        f"{data['size_px']} px, {resolved['temporal.steps']} steps of {resolved['train.batch_size']}."
    )
    return "\n".join(lines)


def draw_statistics_table(result: dict[str, Any]) -> str:
    """How far each pool's draw is from the paper's, and how many videos it shows; and what was assumed."""
    lines = [
        "| set | pool P | samples of a video and pass | classes absent | classes, over a pass | videos, over a pass "
        "| largest, least ratio | different videos in 100, 1,000, 10,000 steps |",
        "| --- |" + " --- |" * 7,
    ]
    for row in result["rows"]:
        classes, videos = row["epoch"]["classes"], row["epoch"]["videos"]
        seen = [f"{100 * stretch['different_videos']['ratio']:.0f}" for stretch in row["stretches"]]
        cells = [row["set"], f"{row['pool_shards']} of {row['shards']:,}"]
        cells += [digits(row["samples_per_video_and_epoch"]), _few(row["classes_absent"]["mean"])]
        cells += [_few(classes["total_variation"]), f"{videos['total_variation']:.3f}"]
        cells += [f"{videos['largest_ratio']:.2f}, {videos['least_ratio']:.2f}", f"{', '.join(seen)} %"]
        lines.append(f"| {' | '.join(cells)} |")
    sizes = dict.fromkeys((row["set"], row["videos"], row["classes"], row["batch_size"]) for row in result["rows"])
    told = [f"{name}: {videos:,} videos, {classes} classes, batches of {n}" for name, videos, classes, n in sizes]
    lines.append(f"\nS = {result['config']['pool_steps']}. {'; '.join(told)}.")
    return "\n".join(lines)


def _few(value: float) -> str:
    """A figure that may be nothing but rounding."""
    return "0" if value < 1e-6 else digits(value)


def pool_machines_table(result: dict[str, Any]) -> str:
    """How many machines fetch a shard, and what part of the pool each holds, by the number of machines."""
    sizes = sorted({machines["world_size"] for row in result["rows"] for machines in row["machines"]} - {1})
    heads = [f"W = {size}" for size in sizes]
    lines = [f"| set | pool P | {' | '.join(heads)} |", "| --- |" + " --- |" * (len(sizes) + 1)]
    for row in result["rows"]:
        found = {machines["world_size"]: machines for machines in row["machines"]}
        cells = [row["set"], str(row["pool_shards"])]
        for size in sizes:
            own = found.get(size)
            cells.append(f"{own['fetches_per_shard']:.2f}, {own['held_pct']:.1f} %" if own else UNKNOWN)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def before_after_table(result: dict[str, Any]) -> str:
    """The checkout's rates against an earlier one's."""
    lines = ["| | before | now | ratio in the same round |", "| --- | --- | --- | --- |"]
    for row in result["rows"]:
        before, after, ratio = row["before"], row["after"], row["ratio"]
        rates = f"{digits(before['median'])} {row['unit']} | {digits(after['median'])} {row['unit']}"
        lines.append(
            f"| {row['name'].replace('_', ', ')} | {rates} | {ratio['median']:.2f} ({ratio['min']:.2f} to "
            f"{ratio['max']:.2f}) |"
        )
    lines.append(f"\nBefore: {result['config']['before_commit'][:7]}. {result['config']['rounds']} rounds.")
    return "\n".join(lines)


def remote_table(result: dict[str, Any]) -> str:
    """A set in its folder, and fetched into a warm cache, by stream."""
    rows = {(row["stream"], row["name"]): row["samples_per_s"] for row in result["rows"]}
    lines = [
        "| stream | in a folder, samples/s | from a web server, cache warm | ratio of medians |",
        "| --- | --- | --- | --- |",
    ]
    for stream in dict.fromkeys(stream for stream, _ in rows):
        local, warm = rows[stream, "ours_k1"], rows[stream, "ours_k1_remote"]
        cells = [f"{digits(one['median'])} ({digits(one['min'])} to {digits(one['max'])})" for one in (local, warm)]
        lines.append(f"| {stream} | {' | '.join(cells)} | {warm['median'] / local['median']:.3f} |")
    config = result["config"]
    lines.append(f"\nMedian, slowest and fastest of {config['rounds']} rounds in turns, {config['cores']} cores.")
    return "\n".join(lines)


def disk_table(extraction: dict[str, Any], throughput: dict[str, Any]) -> str:
    """What UCF-101 would take: measured bytes of a field and of a frame, times its pairs of frames."""
    pairs = extraction["ucf101_pairs"]
    (frame,) = [
        row["read_bytes_per_sample"]
        for row in throughput["rows"]
        if (row["stream"], row["name"]) == ("spatial", "ours_k1")
    ]
    lines = [
        "| | each | of UCF-101 |",
        "| --- | --- | --- |",
        f"| RGB frame | {num_bytes(frame)} | {num_bytes(frame * pairs)} |",
    ]
    for row in (row for row in extraction["rows"] if row.get("bytes_per_field")):
        each = row["bytes_per_field"]
        lines.append(f"| field by `{row['name']}` | {num_bytes(each)} | {num_bytes(each * pairs)} |")
    float32 = 2 * 4 * math.prod(extraction["data"]["size_px"])
    lines.append(f"| the same as float32 | {num_bytes(float32)} | {num_bytes(float32 * pairs)} |")
    height, width = extraction["data"]["size_px"]
    lines.append(
        f"\nOf {width}x{height} px, quality 90, measured on a few clips; {pairs / 1e6:.1f} million frames and fields."
    )
    return "\n".join(lines)


#: Name of a pair of markers -> results files, and what makes the table of them.
Tables = dict[str, tuple[Sequence[str], Callable[..., str]]]

PAGES: dict[str, Tables] = {
    "README.md": {
        "accuracy_short": (["accuracy_ucf101_mini"], accuracy_short_table),
        "throughput_short": (["loader_throughput"], throughput_short_table),
    },
    "docs/accuracy.md": {
        "accuracy": (["accuracy_ucf101_mini"], accuracy_table),
        "confusion": (["accuracy_ucf101_mini"], confusion_table),
    },
    "docs/throughput.md": {
        "throughput": (["loader_throughput"], throughput_table),
        "windows": (["windows_accuracy"], windows_table),
        "draw_statistics": (["draw_statistics"], draw_statistics_table),
        "pool_machines": (["draw_statistics"], pool_machines_table),
        "before_after": (["before_after"], before_after_table),
        "footprint": (["footprint"], footprint_table),
        "train_step": (["train_step"], train_step_table),
    },
    "docs/remote.md": {"remote": (["loader_remote"], remote_table)},
    "docs/several-gpus.md": {"scaling": (["scaling"], scaling_table)},
    "docs/flow.md": {
        "flow_accuracy": (["flow_accuracy"], flow_accuracy_table),
        "flow_extraction": (["flow_extraction"], flow_extraction_table),
        "flow_choice": (["flow_choice"], flow_choice_table),
    },
    "docs/scale.md": {
        "scale_sets": (["scale_model"], scale_sets_table),
        "scale_hours": (["scale_model"], scale_hours_table),
        "scale_extraction": (["scale_model"], scale_extraction_table),
        "scale_training": (["scale_model"], scale_training_table),
        "scale_limits": (["scale_model"], scale_limits_table),
        "scale_check": (["scale_check"], scale_check_table),
        "scale_costs": (["scale_costs", "ray_overhead"], scale_costs_table),
        "scale_assumptions": (["scale_model"], scale_assumptions_table),
    },
    "docs/troubleshooting.md": {"disk": (["flow_extraction", "loader_throughput"], disk_table)},
    "docs/reliability.md": {
        "faults": (["faults"], faults_table),
        "soak": (["soak"], soak_table),
        "fuzz": (["fuzz"], fuzz_table),
    },
}


def render(text: str, tables: Tables) -> str:
    """A page with every table between its markers written anew."""
    for name, (files, table) in tables.items():
        content = table(*(json.loads((RESULTS / f"{file}.json").read_text()) for file in files))
        # Spelled as a function: the table's backslashes are no escapes.
        block = f"<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.S)
        if count != 1:
            raise ValueError(f"The page has {count} places for the table {name!r}; expected one pair of markers.")
    return text


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    Parser(description="Write the documents' tables from benchmarks/results.").parse_args(argv)
    for name, tables in PAGES.items():
        page = ROOT / name
        page.write_text(render(page.read_text(), tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
