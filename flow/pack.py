"""Videos to shards: `python -m flow.pack --videos DIR --out DIR`. For `--flow-dir` see `flow.flow_dirs`.

Every process turns one video at a time into a fragment; a shard is the fragments of a fixed number of videos, in a
seeded order that mixes the classes. How a pack that was stopped goes on is said in `flow.resume`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flow.camera import MODELS, camera_metadata
from flow.catalog import LIST_READERS, Catalog, Video, read_catalog, seeded_shards
from flow.codec import Codec
from flow.command import Parser
from flow.devices import add_engine, make_engine
from flow.extract import DEFAULT_METHOD, FLOW_METHODS, GPU_METHODS, flow_method
from flow.flow_dirs import EXTERNAL, describe_files, pack_flow_dirs
from flow.fragment import FragmentTask, Recipe, Totals, write_fragment
from flow.pool import interruptible
from flow.publish import add_target_options, announce, open_target
from flow.resume import (
    BAD_NAME,
    MISSING_NAME,
    PackReport,
    explain,
    finish,
    input_digest,
    read_report,
    write_lines,
    write_shards,
)

VIDEOS_PER_SHARD = 32


def pack(
    videos: Path,
    out: Path | str,
    *,
    splits: Path | None = None,
    dataset: str | None = None,
    method: str = DEFAULT_METHOD,
    parameters: Mapping[str, Any] | None = None,
    camera: str | None = None,
    codec: Codec | None = None,
    size_px: int = 256,
    backward: bool = False,
    seed: int = 0,
    videos_per_shard: int = VIDEOS_PER_SHARD,
    num_workers: int | None = None,
    num_gpus: int | None = None,
    work: Path | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> PackReport:
    """Pack a folder of videos (`Class/clip.avi`) into shards, or go on with a pack that was stopped.

    splits, dataset: the official list files, see `flow.catalog.read_catalog`. method, parameters: see
    `flow.extract.flow_method`. camera: subtract its motion, see `flow.camera`. size_px: the smaller side of the frames.
    backward: also the fields from frame t to t-1. num_workers: processes, by default one per core, at most 8 a GPU.
    num_gpus: how many to spread them over, by default all that are visible if the method can use one; 0: the CPU.
    out: a folder, or the URL of a store as text; work: the folder for what is not sent there yet, see
    `flow.publish.open_target`.
    engine, ray_address: where the processes are, see `flow.devices.make_engine`.

    The engine, and the number of processes and GPUs, are no settings of the pack: it may go on with others, but not on
    the CPU if it began on GPUs, which round differently.

    Raises ValueError if the folder or the lists are unusable, the method cannot compute flow with its parameters here,
    no video could be packed, or `out` holds a pack with other settings or of other videos; StoreError if the store
    fails. Bad videos are left out and reported.
    """
    if size_px < 16 or videos_per_shard < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(
            f"size_px={size_px}, videos_per_shard={videos_per_shard}, num_workers={num_workers}: expected at least "
            "16 px, 1 and 1."
        )
    catalog = read_catalog(videos, splits, dataset, seed)
    codec = codec or Codec()
    with make_engine(engine, method, num_workers, num_gpus, ray_address) as processes:
        check = partial(processes.prove, parameters or {})
        # Before the folder is bound to them. OpenCV's methods with their own parameters need no proof.
        flow = check() if parameters or method in GPU_METHODS else flow_method(method).metadata()
        settings = {
            "name": catalog.name,
            "flow": {**flow, "camera": camera_metadata(camera)},
            "codec": codec.metadata(),
            "size_px": size_px,
            "backward": backward,
            "seed": seed,
            "videos_per_shard": videos_per_shard,
            "input_sha256": input_digest([[v.video_id, v.path.stat().st_size] for v in catalog.videos], catalog.splits),
        }
        with open_target(out, work) as target:
            was_complete = target.begin(settings)
            if not was_complete:
                shards = seeded_shards(catalog.videos, videos_per_shard, seed)
                write_shards(
                    shards,
                    target,
                    partial(_task, catalog, settings, parameters or {}, processes.num_gpus),
                    write_fragment,
                    items_per_task=1,
                    engine=processes,
                    unit="video",
                    check=check,
                )
                write_lines(target.folder / MISSING_NAME, catalog.missing)
                finish(target, len(shards), settings, catalog.splits, partial(_summary, catalog), unit="video")
            target.end()
    return read_report(target, missing=catalog.missing, unlisted=catalog.unlisted, was_complete=was_complete)


def _task(
    catalog: Catalog,
    settings: dict[str, Any],
    parameters: Mapping[str, Any],
    num_gpus: int,
    fragment: Path,
    videos: Sequence[Video],
) -> FragmentTask:
    (video,) = videos
    recipe = Recipe(
        size_px=settings["size_px"],
        method=settings["flow"]["method"],
        codec=Codec.from_metadata(settings["codec"]),
        parameters=parameters,
        camera=settings["flow"]["camera"] is not None,
        backward=settings["backward"],
        num_gpus=num_gpus,
    )
    class_id = catalog.official_ids.get(video.class_name)
    return FragmentTask(video.path, video.video_id, video.class_name, class_id, fragment, recipe)


def _summary(catalog: Catalog, totals: Totals, num_bytes: int) -> dict[str, int | float]:
    """What the pack cost and saved. The ratio is that of the paper's 1.5 TB to 27 GB: fields, without RGB frames."""
    num_pairs = totals.num_frames - totals.num_videos
    return {
        "videos": totals.num_videos,
        "frames": totals.num_frames,
        "fields": totals.num_fields,
        "fields_uncompensated": totals.num_uncompensated,
        "bytes": num_bytes,
        "rgb_bytes": totals.rgb_bytes,
        "flow_bytes": totals.flow_bytes,
        "float32_bytes": totals.float32_bytes,
        "ratio": totals.float32_bytes / totals.flow_bytes,
        "quantisation_error_mean_px": totals.error_sum_px / totals.error_count,
        "quantisation_error_max_px": totals.error_max_px,
        "flow_s_per_pair": totals.flow_s / num_pairs,
        "s_per_pair": totals.video_s / num_pairs,
        "listed_missing": len(catalog.missing),
    }


# --- command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flow.pack",
        usage="%(prog)s (--videos DIR | --flow-dir DIR) --out DIR [options]",
        description="Compute optical flow of videos and pack frames and flow into shards.\n"
        "Stopped, it goes on with the same command.",
        epilog="examples:\n"
        "  python -m flow.pack --videos UCF-101 --splits ucfTrainTestlist --out packed\n"
        "  python -m flow.pack --videos UCF-101 --out packed --method brox --gpus 4 --set gamma=20\n"
        "  python -m flow.pack --videos UCF-101 --out s3://bucket/ucf101\n"
        "  python -m flow.pack --flow-dir rawframes --range 20 --splits ucfTrainTestlist --out packed\n\n"
        "exit code: 0 packed; 1 some videos are bad (but for --skip-bad), or listed and\n"
        "  absent (with --strict); 2 nothing could be done, the message says why;\n"
        "  130, 143 stopped",
    )
    what = parser.add_argument_group("what is packed, and where")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, metavar="DIR", help="folder of class folders of videos")
    source.add_argument(
        "--flow-dir",
        type=Path,
        metavar="DIR",
        help="folder of videos' folders of img_00001.jpg, flow_x_00001.jpg, ...: packs what other tools extracted as "
        "it is; needs --range PX",
    )
    add_target_options(what)
    what.add_argument("--splits", type=Path, metavar="DIR", help="folder of the official list files")
    what.add_argument(
        "--dataset",
        choices=[*LIST_READERS, "folder"],
        help="whose list files they are; folder makes a seeded 70/30 split (default: by the names of the lists)",
    )
    _add_options_of_videos(parser)
    _add_options_of_flow_dirs(parser)
    both = parser.add_argument_group("shards, and how they are made")
    both.add_argument(
        "--range",
        default="per-field",
        metavar="per-field|PX",
        help="values that a component's 8 bits span: its own range (default), or a fixed +-PX such as 20",
    )
    both.add_argument("--videos-per-shard", type=int, default=VIDEOS_PER_SHARD, metavar="N", help="default %(default)s")
    both.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the order in the shards, and of the split by folders (default %(default)s)",
    )
    both.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core, at most 8 a GPU)")
    add_engine(both)
    both.add_argument("--skip-bad", action="store_true", help="exit 0 although some videos are bad")
    both.add_argument("--strict", action="store_true", help="exit 1 if listed videos are absent")
    return parser


def _add_options_of_videos(parser: argparse.ArgumentParser) -> None:
    frames = parser.add_argument_group("frames and flow of --videos")
    frames.add_argument(
        "--method",
        choices=list(FLOW_METHODS),
        default=DEFAULT_METHOD,
        help="of flow; %(default)s by default: the fastest on a CPU; docs/flow.md says which to choose when",
    )
    frames.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="a parameter of the method, such as --set gamma=20, once for each; dataset.json lists all of them",
    )
    frames.add_argument("--camera", choices=MODELS, help="subtract the motion of the camera (default: leave it in)")
    frames.add_argument("--backward", action="store_true", help="also the fields from each frame to the one before")
    frames.add_argument(
        "--size", type=int, default=256, metavar="PX", help="smaller side of the frames in px (default %(default)s)"
    )
    frames.add_argument("--quality", type=int, default=90, metavar="N", help="of JPEG, 1..100 (default %(default)s)")
    frames.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs to compute flow on; 0: the CPU (default: all, if the method can use one)",
    )


def _add_options_of_flow_dirs(parser: argparse.ArgumentParser) -> None:
    others = parser.add_argument_group("files of --flow-dir")
    others.add_argument("--frames-dir", type=Path, metavar="DIR", help="where the frames are, if not with the fields")
    others.add_argument(
        "--extra-field",
        choices=["first", "last"],
        help="which field to leave out where there are as many as frames; first for TSN's dense_flow",
    )
    others.add_argument("--method-name", metavar="NAME", help=f"how the fields were computed (default {EXTERNAL})")


#: Options without a meaning for folders of fields, and without one for videos.
_OF_VIDEOS = ("method", "size", "quality", "backward", "camera", "gpus", "set")
_OF_FLOW_DIRS = ("frames_dir", "extra_field", "method_name")


def _pack_flow_dirs(options: argparse.Namespace, argv: list[str] | None) -> PackReport:
    """Run `pack_flow_dirs` on the command line's options. Raises ValueError for one that would do nothing there."""
    given = vars(_parser().parse_args(argv, argparse.Namespace(**dict.fromkeys(_OF_VIDEOS))))  # None: not in argv
    useless = [f"--{name}" for name in _OF_VIDEOS if given[name] is not None]
    if useless:
        raise ValueError(
            f"{', '.join(useless)} with --flow-dir: the files are packed as they are, nothing is computed or encoded. "
            "Leave it out, or pack the --videos."
        )
    return pack_flow_dirs(
        options.flow_dir,
        options.out,
        Codec.from_option(options.range, quality=None),
        frames_dir=options.frames_dir,
        splits=options.splits,
        dataset=options.dataset,
        method=options.method_name or EXTERNAL,
        extra_field=options.extra_field,
        seed=options.seed,
        videos_per_shard=options.videos_per_shard,
        num_workers=options.workers,
        work=options.work,
        engine=options.engine,
        ray_address=options.ray_address,
    )


def _pack_videos(options: argparse.Namespace) -> PackReport:
    """Run `pack` on the command line's options. Raises ValueError for one that would do nothing there."""
    useless = [f"--{name.replace('_', '-')}" for name in _OF_FLOW_DIRS if getattr(options, name) is not None]
    if useless:
        raise ValueError(f"{', '.join(useless)} with --videos: it is for --flow-dir. Leave it out.")
    return pack(
        options.videos,
        options.out,
        splits=options.splits,
        dataset=options.dataset,
        method=options.method,
        parameters=dict(map(_parameter, options.set or ())),
        camera=options.camera,
        codec=Codec.from_option(options.range, options.quality),
        size_px=options.size,
        backward=options.backward,
        seed=options.seed,
        videos_per_shard=options.videos_per_shard,
        num_workers=options.workers,
        num_gpus=options.gpus,
        work=options.work,
        engine=options.engine,
        ray_address=options.ray_address,
    )


def _parameter(option: str) -> tuple[str, Any]:
    """Key and value of `--set key=value`: the value is JSON (20, 0.5, true), or else text as it stands."""
    key, equals, value = option.partition("=")
    if not equals:
        raise ValueError(f"--set {option}: expected key=value, such as gamma=20.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        announce(options.out, options.work)
        with interruptible():
            report = _pack_flow_dirs(options, argv) if options.flow_dir else _pack_videos(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {explain(error, options.out)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("Stopped. The same command goes on with the shards that are left.", file=sys.stderr)
        return 128 + stop.args[0]
    print(_describe(report, options.out))
    return int(bool(report.bad) and not options.skip_bad or bool(report.missing) and options.strict)


def _describe(report: PackReport, out: Path | str) -> str:
    figures = report.dataset["summary"]
    lines = [f"{out} was complete: nothing to do."] if report.was_complete else []
    lines += [
        f"{figures['videos']:,} videos, {figures['frames']:,} frames, {figures['fields']:,} fields "
        f"({report.dataset['flow']['method']}): {figures['bytes'] / 1e6:,.1f} MB",
    ]
    lines += _describe_cost(figures) if "ratio" in figures else describe_files(report.dataset)
    if report.dataset["flow"].get("camera"):
        left = figures["fields_uncompensated"]
        lines.append(f"camera motion subtracted; {left:,} fields that do not show it are left as they are")
    if report.missing:
        lines.append(f"{len(report.missing):,} listed videos are not in the folder: {out}/{MISSING_NAME}")
    if report.unlisted:
        lines.append(f"{len(report.unlisted):,} videos stand in no list; they are packed, but in no split")
    if report.bad:
        lines.append(f"{len(report.bad):,} bad videos were left out: {out}/{BAD_NAME}")
        lines += [f"  {video_id} {report.bad[video_id]}" for video_id in sorted(report.bad)[:10]]
    return "\n".join(lines)


def _describe_cost(figures: dict[str, Any]) -> list[str]:
    return [
        f"flow {figures['flow_bytes'] / 1e6:,.1f} MB, as float32 {figures['float32_bytes'] / 1e6:,.1f} MB: "
        f"{figures['ratio']:.1f}x smaller; error mean {figures['quantisation_error_mean_px']:.4f} px, "
        f"largest {figures['quantisation_error_max_px']:.3f} px",
        f"{figures['s_per_pair'] * 1e3:.1f} ms per pair of frames in one process, "
        f"of which flow {figures['flow_s_per_pair'] * 1e3:.1f} ms",
    ]


if __name__ == "__main__":
    sys.exit(main())
