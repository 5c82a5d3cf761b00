"""Does it matter which flow is stored, and how? The temporal net trained on one packing after the other.

    python benchmarks/flow_choice.py prepare --videos DIR --splits DIR --out DIR [--frames 32] [NAME ...]
    python benchmarks/flow_choice.py compare --packs DIR/packs [NAME ...] [--splits 1 2 3] [--seeds 0 1 2] [--runs DIR]

`prepare` packs the same clips with every method and codec below, at 128 px. TV-L1 takes nearly two seconds a pair, so
the clips are cut to their middle frames, losslessly (FFV1, read back and compared). Stopped, it goes on with the same
command.

`compare` trains the temporal net of ucf101_mini on every packing, by a schedule so short that 81 runs fit into some
hours of two cores. Config, seeds, draws and frames are the same for all. The test videos of the splits are pooled and
paired with those of the first packing; intervals are bootstrapped over sources and seeds. Stopped, it goes on; several
at once share the runs.
"""

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accuracy import collect
from common import add_out, errors_in_a_line, result_path, write_result
from trained import Arm, compare, list_runs, train_missing

import cv2  # isort: skip
import numpy as np
from tqdm import tqdm

from flow import pack
from flow.catalog import list_videos
from flow.command import Parser, did_you_mean
from flow.resume import hold
from flow.video import Frame, VideoError, read_frames
from loaders.index import open_index
from train.config import read_config, to_flat
from train.fuse import source_group

#: name -> what is added to the command of `flow.pack`; the first is what the others are held to
PACKINGS = {
    "dis": [],
    "farneback": ["--method", "farneback"],
    "tvl1": ["--method", "tvl1"],
    "deepflow": ["--method", "deepflow"],
    "brox": ["--method", "brox"],
    "dis_camera": ["--camera", "homography"],
    "dis_q75": ["--quality", "75"],
    "dis_q60": ["--quality", "60"],
    "dis_fixed20": ["--range", "20"],
}
SIZE_PX = 128
OVERRIDES = [
    "train.streams=[temporal]",
    "temporal.steps=450",
    "temporal.milestones=[300,400]",
    "temporal.dropout=0.2",
    "model.width=0.125",
    "train.batch_size=32",
    "data.stacks_per_window=8",
    "eval.num_taus=5",
    "eval.num_taus_train=0",  # nothing is fused here
]


# --- prepare -----------------------------------------------------------------------------------------------------


def trim(source: Path, target: Path, num_frames: int) -> None:
    """Write the middle num_frames frames of a video, all of a shorter one, so that they are read back unchanged."""
    frames = list(read_frames(source))
    start = max(0, (len(frames) - num_frames) // 2)
    frames = frames[start : start + num_frames]
    target.parent.mkdir(parents=True, exist_ok=True)
    size = (frames[0].shape[1], frames[0].shape[0])
    writer = cv2.VideoWriter(str(target), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"FFV1"), 25.0, size)
    if not writer.isOpened():
        raise VideoError(f"{target} cannot be written: this OpenCV's FFmpeg has no FFV1.")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    if not same_frames(read_frames(target), frames):
        raise VideoError(f"{target} does not hold the frames that were written: FFV1 is not lossless here.")


def same_frames(found: Iterator[Frame], expected: list[Frame]) -> bool:
    count = 0
    for count, frame in enumerate(found, 1):
        if count > len(expected) or not np.array_equal(frame, expected[count - 1]):
            return False
    return count == len(expected)


def trim_all(videos: Path, out: Path, num_frames: int) -> None:
    """Trim every video that is not yet in `out`; a name is only given to what was checked."""
    work = out.with_name(out.name + ".tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold(out.with_name(out.name + ".lock"), wait=True):  # several at once would take each other's work away
        for video in tqdm(list_videos(videos), desc="trimming", unit="video", disable=None):
            target = out / f"{video.video_id}.avi"
            if not target.exists():
                trim(video.path, work / f"{video.video_id}.avi", num_frames)
                target.parent.mkdir(parents=True, exist_ok=True)
                (work / f"{video.video_id}.avi").replace(target)
        shutil.rmtree(work, ignore_errors=True)


def prepare(options: argparse.Namespace) -> None:
    """Trim the clips and pack them with every method."""
    trimmed = options.out / f"videos_{options.frames}"
    trim_all(options.videos, trimmed, options.frames)
    for name in options.names or PACKINGS:
        command = ["--videos", str(trimmed), "--splits", str(options.splits), "--size", str(SIZE_PX)]
        command += ["--out", str(options.out / "packs" / name), *PACKINGS[name]]
        if options.workers:
            command += ["--workers", str(options.workers)]
        print(f"packing {name}", flush=True)
        if status := pack.main(command):
            sys.exit(f"packing {name} ended with exit status {status}; its messages stand above")


# --- compare -----------------------------------------------------------------------------------------------------


def find_packs(options: argparse.Namespace) -> list[Arm]:
    """The packings asked for: NAME=DIR as they are, NAME in --packs; by default all of PACKINGS."""
    arms = []
    for name in options.names or PACKINGS:
        name, given, folder = name.partition("=")
        if not given and options.packs is None:
            sys.exit(f"{name}: where is it packed? Give --packs DIR, or {name}=DIR.")
        arms.append(Arm(name, Path(folder) if given else options.packs / name))
    return arms


def read_packs(arms: list[Arm]) -> dict[str, dict[str, Any]]:
    """Arm -> dataset.json. Exits unless all are packed from the same videos and splits, at the same size."""
    found = {arm.name: open_index(arm.data).metadata for arm in arms}
    first = found[arms[0].name]
    for name, metadata in found.items():
        for key in ("input_sha256", "size_px", "backward"):
            if metadata[key] != first[key]:
                sys.exit(f"{name} and {arms[0].name} differ in {key}: they are not packed from the same videos alike.")
    ids = {arm.name: packed_ids(arm.data) for arm in arms}
    for arm in arms:
        if only := sorted(ids[arm.name] ^ ids[arms[0].name]):
            sys.exit(
                f"{arm.name} and {arms[0].name} do not hold the same videos: only one of them has {only[0]}, and "
                f"{len(only) - 1} more. See bad_videos.txt in their folders."
            )
    return found


def packed_ids(root: Path) -> set[str]:
    """Ids of all videos of a packed set."""
    index = open_index(root)
    return set(index.video_ids(range(index.num_videos)))


def row_of(name: str, metadata: dict[str, Any], compared: dict[str, Any]) -> dict[str, Any]:
    """A packing: how it was made, what it takes, what it loses, and how well the net does on it."""
    summary = metadata["summary"]
    return {
        "name": name,
        "flow": metadata["flow"],
        "codec": metadata["codec"],
        "flow_bytes": summary["flow_bytes"],
        "bytes_per_field": summary["flow_bytes"] / summary["fields"],
        "quantisation_error_mean_px": summary["quantisation_error_mean_px"],
        **compared,
    }


def compare_packs(options: argparse.Namespace) -> None:
    """Train what is missing, pool, and write the rows."""
    arms = find_packs(options)
    packs = read_packs(arms)
    overrides = [*OVERRIDES, *options.overrides]
    runs = list_runs(arms, options.runs, options.config, options.splits, options.seeds, overrides)
    train_missing(runs)
    splits = [f"split{split}" for split in options.splits]
    correct, scored = {}, {}
    for arm in arms:
        index = open_index(arm.data)
        methods, scored[arm.name], _ = collect(options.runs / arm.name, index, splits, options.seeds)
        correct[arm.name] = methods["temporal"]
    ids = scored[arms[0].name]
    if others := [name for name, found in scored.items() if found != ids]:
        sys.exit(f"runs of {others[0]} and {arms[0].name} were scored on other videos: they cannot be paired.")
    groups = np.array([source_group(video_id) for video_id in ids])
    compared = compare(correct, groups)
    rows = [row_of(arm.name, packs[arm.name], compared[arm.name]) for arm in arms]
    own = {"data.root", "data.split", "train.seed"}
    resolved = {key: v for key, v in to_flat(read_config(runs[0].folder / "config.yaml")).items() if key not in own}
    config = {"resolved": resolved, "splits": options.splits, "seeds": options.seeds, "overrides": options.overrides}
    data = {key: packs[arms[0].name][key] for key in ("name", "size_px", "input_sha256", "num_videos", "num_frames")}
    counts = {"num_videos": len(ids), "num_sources": len(set(groups)), "num_seeds": len(options.seeds)}
    whole = {"names": list(PACKINGS), "splits": [1, 2, 3], "seeds": [0, 1, 2]}
    asked = {"names": [arm.name for arm in arms], "splits": options.splits, "seeds": options.seeds}
    out = result_path(options.out, "flow_choice", partial=asked != whole)
    write_result(out, config, data=data, **counts, chance_pct=100 / len(index.classes), rows=rows)
    for row in rows:
        low, high = row.get("difference", row)["interval_95_pct"]
        difference = f"{row['difference']['pct']:+.1f}" if "difference" in row else ""
        print(f"{row['name']:12} {row['pct']:5.1f} % {difference:6} {low:+.1f} to {high:+.1f}")
    print(f"written to {out}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Accuracy of the temporal net by flow method and codec.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    trims, trains = "trim clips, and pack them with every method", "train on every packing, and compare"
    first = commands.add_parser("prepare", help=trims, description=trims)
    first.set_defaults(do=prepare)
    first.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of class folders of videos")
    first.add_argument("--splits", type=Path, required=True, metavar="DIR", help="folder of the official list files")
    first.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of videos_32/ and packs/")
    first.add_argument(
        "--frames", type=int, default=32, metavar="N", help="of every clip, the middle ones (default %(default)s)"
    )
    first.add_argument("--workers", type=int, metavar="N", help="processes of a pack (default: one per core)")
    first.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(PACKINGS)} (default: all)")
    second = commands.add_parser("compare", help=trains, description=trains)
    second.set_defaults(do=compare_packs)
    second.add_argument(
        "--packs", type=Path, metavar="DIR", help="folder of the packings that are given by their names alone"
    )
    second.add_argument("--config", default="ucf101_mini", metavar="NAME", help="of the runs (default %(default)s)")
    second.add_argument(
        "--splits", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="official ones (default: 1 2 3)"
    )
    second.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the runs (default: 0 1 2)"
    )
    second.add_argument(
        "--runs", type=Path, default=Path("runs/flow_choice"), metavar="DIR", help="of the runs (default %(default)s)"
    )
    add_out(second, "flow_choice")
    second.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="for train.launch")
    second.add_argument("names", nargs="*", metavar="NAME[=DIR]", help="the first is what the others are held to")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if options.command == "prepare" and name not in PACKINGS]:
        near = did_you_mean(unknown[0], PACKINGS)
        parser.error(f"unknown packing {', '.join(unknown)}; there are {', '.join(PACKINGS)}.{near}")
    return options


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: ends the run in work too
    options.do(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
