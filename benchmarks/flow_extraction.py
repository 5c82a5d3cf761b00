"""What flow costs: pairs a second of every method on frames of 341x256, beside ceilings; and a pack beside its parts.

    python benchmarks/flow_extraction.py [--data VIDEOS] [--flow-gt DIR] [--methods ...] [--set METHOD:key=value,...]
        [--device cuda] [--gpus 1] [--quick]

VIDEOS is a folder of class folders of real clips (default: generated ones). Every method works on the same pairs of
consecutive frames, in one process per core as in a pack, or one per GPU. Rounds are interleaved, warm-up is outside the
clock, a row takes --seconds a round and at least one step. bytes_per_field is that of both components at quality 90,
ranges per field; epe_mean_px that of flow_accuracy.py, with --flow-gt. hours_ucf101 is what all of UCF-101 would take
at this rate on this machine; the paper's hours are those of 0.06 s a pair on one GPU.

Beside the methods, as ceilings of what surrounds them in a pack:

    decode_resize     reading the clips' frames, scaling them to a smaller side of 256 px, and their luma
    jpeg              encoding the three JPEGs of a pair, RGB frame and two components, by OpenCV, and nothing else

pack: `flow.pack --method dis` of some whole clips, and on the same clips, in as many processes, decoding and resizing
alone, and flow alone, each timed as a whole with the start of its processes. Its ratio is to the larger of these two.
With `--device cuda` methods of the GPU are measured there, dis and the ceilings on the CPU for reference; no pack. The
file is written after every round.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, write_result
from crew import Crew, CrewError, Work
from flow_accuracy import ROWS, SETTINGS, Setting, choose, code, measure, read_pairs
from pack_parts import PACK_METHOD, PackParts, pack_row

import cv2  # isort: skip
import numpy as np
from tqdm import tqdm

from flow import demo
from flow.catalog import list_videos
from flow.codec import Codec
from flow.extract import GPU_METHODS, flow_method
from flow.video import read_frames, to_grey

#: Official clips, and pairs of frames a clip: the mean of the paper's 1.5 TB, see sec. 5.
UCF101_PAIRS = 13_320 * 180
PAPER_S_PER_PAIR = 0.06
CEILINGS = ("decode_resize", "jpeg")
BYTES_PAIRS = 4

TARGETS = {"brox_to_deepflow": 2.0, "brox_epe_above_deepflow_px": 0.02, "brox_cuda_ms": 6.0}


# --- what is worked on -------------------------------------------------------------------------------------------


def choose_clips(videos: Path, count: int) -> list[Path]:
    """So many clips of the folder, at equal spacing in the order of their ids."""
    found = [video.path for video in list_videos(videos)]
    return [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)]


def write_pairs(clips: list[Path], pairs_per_clip: int, size_px: int, path: Path) -> list[int]:
    """Store pairs of frames (pairs, 2, H, W, 3) uint8 of the clips of the first one's size; (pairs, H, W)."""
    pairs = []
    for clip in clips:
        frames = read_frames(clip, size_px)
        previous = next(frames)
        for _, frame in zip(range(pairs_per_clip), frames, strict=False):
            pairs.append(np.stack([previous, frame]))
            previous = frame
    pairs = [pair for pair in pairs if pair.shape == pairs[0].shape]
    np.save(path, np.stack(pairs))
    return [len(pairs), *pairs[0].shape[1:3]]


def read_greys(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """First and second frames of stored pairs: two arrays (pairs, H, W) uint8."""
    pairs = np.load(path)
    first, second = (np.stack([to_grey(pair[i]) for pair in pairs]) for i in (0, 1))
    return first, second


def flow_work(setting: Setting, device: str, pairs: Path, truth: Path | None, number: int) -> Iterator[Any]:
    """A method on batches of pairs; each process begins elsewhere. device "cuda" is GPU `number`."""
    name, parameters = setting
    method = flow_method(name, f"{device}:{number}" if device == "cuda" else device, parameters)
    grey0, grey1 = read_greys(pairs)
    order = np.arange(len(grey0))
    some = order[:: -(-len(order) // BYTES_PAIRS)]
    fields = [method(grey0[i], grey1[i]) for i in some] if number == 0 else []
    size = min(method.batch_pairs, len(order))
    method.batch(grey0[:size], grey1[:size])
    yield {
        "flow": method.metadata(),
        "batch_pairs": size,
        "bytes_per_field": float(np.mean([code(field, Codec())[1] for field in fields])) if fields else None,
        "epe_mean_px": measure(method, read_pairs(truth))["epe_mean_px"] if truth and number == 0 else None,
    }
    at = number * size
    while True:
        batch = order.take(range(at, at + size), mode="wrap")
        method.batch(grey0[batch], grey1[batch])
        yield size
        at += size


def decode_work(clips: list[Path], size_px: int, number: int) -> Iterator[Any]:
    """Frames of whole clips as `flow_work` wants them."""
    yield {}
    while True:
        for clip in clips[number % len(clips) :] + clips[: number % len(clips)]:
            for frame in read_frames(clip, size_px):
                to_grey(frame)
                yield 1


def jpeg_work(pairs: Path, number: int) -> Iterator[Any]:
    """The JPEGs of a pair, from RGB and codes in memory."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, Codec().quality]
    frames, (grey0, grey1) = np.load(pairs)[:, 0], read_greys(pairs)
    fields = flow_method(PACK_METHOD).batch(grey0, grey1)
    codes = [[cv2.normalize(part, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U) for part in field] for field in fields]
    yield {}
    while True:
        for frame, components in zip(frames, codes, strict=True):
            for image in (frame, *components):
                cv2.imencode(".jpg", image, quality)
            yield 1


# --- rows --------------------------------------------------------------------------------------------------------


def summarise(name: str, about: dict[str, Any], turns: list[Any]) -> dict[str, Any]:
    """A row: median and spread of its turns, and what follows from them."""
    rates = [turn.pairs_per_s for turn in turns]
    row = {
        "name": name,
        **about,
        "pairs_per_s": {"median": median(rates), "min": min(rates), "max": max(rates)},
        "cpu_s_per_pair": median(turn.cpu_s_per_pair for turn in turns),
    }
    if "flow" in about:
        row["hours_ucf101"] = UCF101_PAIRS / row["pairs_per_s"]["median"] / 3600
    return row


def compare_to_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every brox row against what was aimed at: time and error to DeepFlow's on the CPU, ms a pair on a GPU."""
    found = {row["name"]: row for row in rows if "error" not in row}
    deepflow = found.get("deepflow")
    compared = []
    for row in (row for row in found.values() if row.get("flow", {}).get("method") == "brox"):
        rate = row["pairs_per_s"]["median"]
        if row["device"] == "cuda":
            ms, target = 1000 * row["processes"] / rate, TARGETS["brox_cuda_ms"]
            compared.append(
                {"row": row["name"], "what": "ms a pair", "value": ms, "target": target, "met": ms <= target}
            )
        elif deepflow:
            ratio, target = deepflow["pairs_per_s"]["median"] / rate, TARGETS["brox_to_deepflow"]
            entry = {"row": row["name"], "what": "time to deepflow's", "value": ratio, "target": target}
            excess = None
            if row["epe_mean_px"] is not None:
                excess = row["epe_mean_px"] - deepflow["epe_mean_px"]
                entry["epe_above_deepflow_px"] = excess
            limit = TARGETS["brox_epe_above_deepflow_px"]
            compared.append({**entry, "met": None if excess is None else ratio <= target and excess <= limit})
    return compared


def start_crews(
    options: argparse.Namespace, chosen: dict[str, Setting], clips: list[Path], pairs: Path
) -> Iterator[Any]:
    """Yield (name, device, crew or its error) for every row, ceilings last."""
    plan: dict[str, tuple[str, Work]] = {}
    for name, setting in chosen.items():
        device = options.device if setting[0] in GPU_METHODS else "cpu"
        plan[name] = (device, partial(flow_work, setting, device, pairs, options.flow_gt))
    plan["decode_resize"] = ("cpu", partial(decode_work, clips, options.size))
    plan["jpeg"] = ("cpu", partial(jpeg_work, pairs))
    for name, (device, work) in tqdm(plan.items(), desc="starting", leave=False, disable=None):
        count = options.gpus if device == "cuda" else options.cores
        try:
            yield name, device, Crew(name, [work] * count)
        except CrewError as error:
            yield name, device, error


def measure_rounds(options: argparse.Namespace, folder: Path, chosen: dict[str, Setting]) -> Iterator[dict[str, Any]]:
    """After every round, what is known."""
    videos = options.data or generate_videos(folder, options)
    clips = choose_clips(videos, options.clips)
    shape = write_pairs(clips, options.pairs_per_clip, options.size, folder / "pairs.npy")
    crews = {name: (device, crew) for name, device, crew in start_crews(options, chosen, clips, folder / "pairs.npy")}
    parts = (
        PackParts(folder, choose_clips(videos, options.pack_clips), options.size, options.cores)
        if options.device == "cpu"
        else None
    )
    turns: dict[str, list[Any]] = {name: [] for name in crews}
    packs: list[dict[str, float]] = []
    data = {"name": "real clips" if options.data else "generated clips", "clips": len(clips)}
    data |= {"pairs": shape[0], "size_px": shape[1:]}
    try:
        for _ in tqdm(range(options.rounds), desc="rounds", disable=None):
            for name, (device, crew) in crews.items():
                if isinstance(crew, Crew):
                    try:
                        turns[name].append(crew.measure(options.seconds))
                    except CrewError as error:
                        crew.close()
                        crews[name] = (device, error)
            if parts:
                packs.append(parts.measure())
            rows = []
            for name, (device, crew) in crews.items():
                count = options.gpus if device == "cuda" else options.cores
                head = {"device": device, "processes": count}
                row = summarise(name, crew.about, turns[name]) if isinstance(crew, Crew) else {"name": name}
                rows.append(row | head if isinstance(crew, Crew) else row | head | {"error": str(crew)})
            content = {"data": data, "rows": rows, "targets": compare_to_targets(rows)}
            yield content | ({"pack": pack_row(packs, parts.pairs)} if parts else {})
    finally:
        for _, crew in crews.values():
            if isinstance(crew, Crew):
                crew.close()


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
    for target in content["targets"] + ([content["pack"]] if "pack" in content else []):
        print(target)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What optical flow costs.")
    parser.add_argument("--data", type=Path, help="folder of class folders of videos; default: generated ones")
    parser.add_argument("--flow-gt", type=Path, help="pairs with truth, as for flow_accuracy.py")
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="METHOD:key=value,...", help="one more row"
    )
    parser.add_argument("--device", choices=list(ROWS), default="cpu")
    parser.add_argument("--gpus", type=int, default=1, help="with --device cuda: how many to use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a row in a round")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--pack-clips", type=int, default=24, help="whole clips that are packed")
    parser.add_argument("--pairs-per-clip", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="smaller side of the frames, px")
    parser.add_argument("--quick", action="store_true", help="one short round on tiny frames: does it run?")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/flow_extraction[_cuda].json")
    options = parser.parse_args(argv)
    options.cores = len(os.sched_getaffinity(0))
    options.out = options.out or RESULTS / f"flow_extraction{'_cuda' if options.device == 'cuda' else ''}.json"
    options.methods = options.methods or ROWS[options.device] + (["dis"] if options.device == "cuda" else [])
    if options.quick:
        options.rounds, options.seconds, options.size = 1, 0.2, 64
        options.clips = options.pack_clips = 2
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        chosen = choose(options.methods, options.settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    config = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    paper = {"s_per_pair": PAPER_S_PER_PAIR, "hours_ucf101": PAPER_S_PER_PAIR * UCF101_PAIRS / 3600}
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for content in measure_rounds(options, Path(folder), chosen):
            write_result(options.out, config, ucf101_pairs=UCF101_PAIRS, paper=paper, **content)
    print_rows(content)
    print(f"written to {options.out}")
    return int(any("error" in row for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
