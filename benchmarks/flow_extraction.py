"""What flow costs: pairs a second of every method on frames of 341x256, beside ceilings; and a pack beside its parts.

    python benchmarks/flow_extraction.py [--data VIDEOS] [--flow-gt DIR] [--methods ...] [--set METHOD:key=value,...]
        [--device cuda] [--gpus 1] [--quick]

VIDEOS is a folder of class folders of real clips (default: generated ones). Every process of every method works on the
same few pairs, the first of --pairs clips, all of them equally often, in one process per core as in a pack, or one per
GPU. Rounds are interleaved, warm-up is outside the clock, a row takes --seconds a round and at least once all pairs.
bytes_per_field is that of both components at quality 90, ranges per field; epe_mean_px that of flow_accuracy.py, with
--flow-gt. hours_ucf101 is what all of UCF-101 would take at this rate on this machine, by the clock: cpu_share tells
whether the processes had their cores. The paper's hours are those of 0.06 s a pair on one GPU.

Beside the methods, as ceilings of what surrounds them in a pack:

    decode_resize     reading the clips' frames, scaling them to a smaller side of 256 px, and their luma
    jpeg              encoding the three JPEGs of a pair, RGB frame and two components, by OpenCV, and nothing else

pack: `flow.pack --method dis` of some whole clips, and on the same clips, in as many processes, decoding and resizing
alone, and flow alone, each timed as a whole. Its ratio is to the larger of these two, less the start of the processes.
With `--device cuda` methods of the GPU are measured there, dis and the ceilings on the CPU for reference; no pack. The
file is written after every row of every round.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import add_out, errors_in_a_line, is_file, result_path, write_result
from crew import Crew, CrewError, Turn, Work
from flow_accuracy import ROWS, Setting, add_methods, choose
from flow_works import choose_clips, decode_work, flow_work, jpeg_work, write_pairs
from pack_parts import PackParts, pack_row, spread
from tqdm import tqdm

from flow import demo
from flow.command import Parser
from flow.extract import GPU_METHODS
from flow.resume import input_digest

#: Official clips, and pairs of frames a clip: the mean of the paper's 1.5 TB, see sec. 5.
UCF101_PAIRS = 13_320 * 180
PAPER_S_PER_PAIR = 0.06
#: Share of their time below which processes of the CPU lacked it: something else ran.
CPU_SHARE = 0.9
#: Beside a GPU.
MAX_CPU_PROCESSES = 8

TARGETS = {"brox_to_deepflow": 2.0, "brox_epe_above_deepflow_px": 0.02, "brox_cuda_ms": 6.0}


# --- rows --------------------------------------------------------------------------------------------------------


def summarise(name: str, about: dict[str, Any], turns: list[Turn]) -> dict[str, Any]:
    """A row: median and spread of its turns, and what follows from them."""
    rates = [turn.pairs_per_s for turn in turns]
    row = {
        "name": name,
        **about,
        "pairs_per_s": spread(rates) | {"rounds": rates},
        "cpu_s_per_pair": median(turn.cpu_s_per_pair for turn in turns),
        "cpu_share": median(turn.cpu_share for turn in turns),
    }
    if "flow" in about:
        row["hours_ucf101"] = UCF101_PAIRS / row["pairs_per_s"]["median"] / 3600
    return row


def compare_to_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every brox row against what was aimed at: time and error to DeepFlow's on the CPU, ms a pair on a GPU.

    Times are compared round by round; a `value` is the median of that, its least and its greatest.
    """
    found = {row["name"]: row for row in rows if "error" not in row}
    deepflow = found.get("deepflow")
    compared = []
    for row in (row for row in found.values() if row.get("flow", {}).get("method") == "brox"):
        rates = row["pairs_per_s"]["rounds"]
        if row["device"] == "cuda":
            ms, target = spread([1000 * row["processes"] / rate for rate in rates]), TARGETS["brox_cuda_ms"]
            met = ms["median"] <= target
            compared.append({"row": row["name"], "what": "ms a pair", "value": ms, "target": target, "met": met})
        elif deepflow:
            both = zip(deepflow["pairs_per_s"]["rounds"], rates, strict=False)  # a round under way has but one
            ratio, target = spread([other / rate for other, rate in both]), TARGETS["brox_to_deepflow"]
            entry = {"row": row["name"], "what": "time to deepflow's", "value": ratio, "target": target}
            excess = None
            if row["epe_mean_px"] is not None:
                excess = row["epe_mean_px"] - deepflow["epe_mean_px"]
                entry["epe_above_deepflow_px"] = excess
            limit = TARGETS["brox_epe_above_deepflow_px"]
            entry["met"] = None if excess is None else ratio["median"] <= target and excess <= limit
            compared.append(entry)
    return compared


@dataclass
class Row:
    """A crew, what it says of itself, what it did so far, and what it failed of."""

    name: str
    device: str
    crew: Crew
    about: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    error: str | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note what the crew fails of, and end it."""
        try:
            yield
        except CrewError as error:
            self.error = str(error)
            self.crew.close()

    def result(self) -> dict[str, Any]:
        head = {"device": self.device, "processes": len(self.crew)}
        if self.error:
            return {"name": self.name, **head, "error": self.error}
        return summarise(self.name, self.about, self.turns) | head


def start_crews(options: argparse.Namespace, chosen: dict[str, Setting], clips: list[Path], pairs: Path) -> list[Row]:
    """All rows, ceilings last; their processes start together."""
    plan: dict[str, tuple[str, Work]] = {}
    for name, setting in chosen.items():
        device = options.device if setting[0] in GPU_METHODS else "cpu"
        plan[name] = (device, partial(flow_work, setting, device, pairs, options.flow_gt))
    plan["decode_resize"] = ("cpu", partial(decode_work, clips, options.size))
    plan["jpeg"] = ("cpu", partial(jpeg_work, pairs))
    return [
        Row(name, device, Crew(name, [work] * (options.gpus if device == "cuda" else options.cores)))
        for name, (device, work) in plan.items()
    ]


def measure_rounds(options: argparse.Namespace, folder: Path, chosen: dict[str, Setting]) -> Iterator[dict[str, Any]]:
    """After every row's turn, what is known."""
    videos = options.data or generate_videos(folder, options)
    clips, pairs = choose_clips(videos, options.clips), folder / "pairs.npy"
    shape = write_pairs(choose_clips(videos, options.pairs), options.size, pairs)
    data = {"name": "real clips" if options.data else "generated clips", "digest": digest(videos, clips)}
    data |= {"clips": len(clips), "pairs": shape[0], "size_px": shape[1:]}
    packed = choose_clips(videos, options.pack_clips) if options.device == "cpu" else []
    parts = PackParts(folder, packed, options.size, options.cores) if packed else None
    packs: list[dict[str, float]] = []
    with ExitStack() as stack:
        rows = start_crews(options, chosen, clips, pairs)
        for row in rows:
            stack.callback(row.crew.close)
        for row in tqdm(rows, desc="starting", leave=False, disable=None):
            with row.recorded():
                row.about = row.crew.wait()

        def content() -> dict[str, Any]:
            table = [row.result() for row in rows if row.turns or row.error]
            found = {"data": data, "rows": table, "targets": compare_to_targets(table)}
            return found | ({"pack": pack_row(packs, parts.pairs)} if parts and packs else {})

        for _ in tqdm(range(options.rounds), desc="rounds", disable=None):
            for row in (row for row in rows if row.error is None):
                with row.recorded():
                    row.turns.append(row.crew.measure(options.seconds))
                yield content()
            if parts:
                packs.append(parts.measure())
        yield content()


def digest(videos: Path, clips: list[Path]) -> str:
    """What was measured on, by names and sizes."""
    return input_digest([[clip.relative_to(videos).as_posix(), clip.stat().st_size] for clip in clips], {})[:16]


def generate_videos(folder: Path, options: argparse.Namespace) -> Path:
    """Generated clips of UCF-101's size."""
    shape = {"width": 128, "height": 96} if options.quick else {"width": 320, "height": 240}
    demo.generate(folder / "videos", num_train=2, num_test=1, num_frames=10 if options.quick else 40, **shape)
    return folder / "videos"


def print_rows(content: dict[str, Any]) -> None:
    for row in content["rows"]:
        if "error" in row:
            print(f"{row['name']:16} failed: {row['error']}")
            continue
        rate = row["pairs_per_s"]
        line = f"{row['name']:16} {rate['median']:9.2f} pairs/s ({rate['min']:.2f} to {rate['max']:.2f})"
        line += f" {1000 * row['cpu_s_per_pair']:9.1f} CPU ms a pair"
        if "flow" in row:
            error = "" if row["epe_mean_px"] is None else f"{row['epe_mean_px']:.3f} px"
            line += f" {row['bytes_per_field']:9,.0f} bytes a field {row['hours_ucf101']:9.1f} h {error}"
        print(line)
        if row["device"] == "cpu" and row["cpu_share"] < CPU_SHARE:
            share = f"its processes had {row['cpu_share']:.0%} of a core each: something else runs, and its hours are"
            print(f"{row['name']}: {share} too many. Measure on a quiet machine.", file=sys.stderr)
    for target in content["targets"] + ([content["pack"]] if "pack" in content else []):
        print(target)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="What optical flow costs.")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of class folders of videos (default: generated ones)"
    )
    parser.add_argument(
        "--flow-gt", type=Path, metavar="DIR", help="pairs with truth, as for flow_accuracy.py (default: none)"
    )
    add_methods(parser)
    parser.add_argument("--device", choices=list(ROWS), default="cpu", help="that computes (default %(default)s)")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="with --device cuda: how many to use (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="interleaved over the rows (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, metavar="S", help="of a row in a round (default %(default)s)"
    )
    parser.add_argument(
        "--clips", type=int, default=16, metavar="N", help="that are decoded and resized (default %(default)s)"
    )
    parser.add_argument(
        "--pack-clips", type=int, default=24, metavar="N", help="whole clips that are packed (default %(default)s)"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=4,
        metavar="N",
        help="that every method works on, each of another clip (default %(default)s)",
    )
    parser.add_argument(
        "--size", type=int, default=256, metavar="PX", help="smaller side of the frames in px (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one short round on tiny frames: does it run?")
    add_out(parser, "flow_extraction")
    options = parser.parse_args(argv)
    options.cores = min(len(os.sched_getaffinity(0)), MAX_CPU_PROCESSES if options.device == "cuda" else 1 << 20)
    options.partial = bool(options.methods) or options.rounds < parser.get_default("rounds")
    options.methods = options.methods or ROWS[options.device] + (["dis"] if options.device == "cuda" else [])
    if options.quick:
        options.rounds, options.seconds, options.size = 1, 0.2, 64
        options.clips = options.pack_clips = options.pairs = 2
    return options


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    chosen = choose(options.methods, options.settings)
    config = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    paper = {"s_per_pair": PAPER_S_PER_PAIR, "hours_ucf101": PAPER_S_PER_PAIR * UCF101_PAIRS / 3600}
    less = {"quick": options.quick, "generated": options.data is None, "partial": options.partial}
    out = result_path(options.out, f"flow_extraction{'_cuda' if options.device == 'cuda' else ''}", **less)
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for content in measure_rounds(options, Path(folder), chosen):
            write_result(out, config, complete=False, ucf101_pairs=UCF101_PAIRS, paper=paper, **content)
    failed = any("error" in row for row in content["rows"])
    complete = is_file(options.out) or not failed  # a result that lacks rows gets no name but a given one
    write_result(out, config, complete, ucf101_pairs=UCF101_PAIRS, paper=paper, **content)
    print_rows(content)
    print(f"written to {out if complete else out.with_suffix('.partial.json')}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
