"""Videos to shards: `python -m flow.pack --videos DIR --out DIR`.

Every process turns one video at a time into a fragment; a shard is the fragments of a fixed number of videos, in a
seeded order that mixes the classes. How a pack that was stopped goes on is said in `flow.resume`.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flow.catalog import LIST_READERS, Catalog, Video, read_catalog, seeded_shards
from flow.codec import Codec
from flow.extract import DEFAULT_METHOD, FLOW_METHODS, flow_method
from flow.fragment import FragmentTask, Totals, write_fragment
from flow.pool import default_num_workers
from flow.resume import (
    BAD_NAME,
    WORK_FOLDER,
    PackReport,
    begin,
    clear,
    finish,
    input_digest,
    locked,
    read_report,
    write_lines,
    write_shards,
)

VIDEOS_PER_SHARD = 32


def pack(
    videos: Path,
    out: Path,
    *,
    splits: Path | None = None,
    dataset: str | None = None,
    method: str = DEFAULT_METHOD,
    codec: Codec | None = None,
    size_px: int = 256,
    backward: bool = False,
    seed: int = 0,
    videos_per_shard: int = VIDEOS_PER_SHARD,
    num_workers: int | None = None,
) -> PackReport:
    """Pack a folder of videos (`Class/clip.avi`) into shards, or go on with a pack that was stopped.

    splits, dataset: the official list files, see `flow.catalog.read_catalog`. size_px: the smaller side of the frames.
    backward: also the fields from frame t to t-1. num_workers: processes, by default one per core.

    Raises ValueError if the folder or the lists are unusable, no video could be packed, or `out` holds a pack with
    other settings or of other videos. Bad videos are left out and reported.
    """
    if size_px < 16 or videos_per_shard < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(
            f"size_px={size_px}, videos_per_shard={videos_per_shard}, num_workers={num_workers}: expected at least "
            "16 px, 1 and 1."
        )
    catalog = read_catalog(videos, splits, dataset, seed)
    codec = codec or Codec()
    settings = {
        "name": catalog.name,
        "flow": flow_method(method).metadata(),
        "codec": codec.metadata(),
        "size_px": size_px,
        "backward": backward,
        "seed": seed,
        "videos_per_shard": videos_per_shard,
        "input_sha256": input_digest([[v.video_id, v.path.stat().st_size] for v in catalog.videos], catalog.splits),
    }
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / WORK_FOLDER):
        was_complete = begin(out, settings)
        if not was_complete:
            shards = seeded_shards(catalog.videos, videos_per_shard, seed)
            write_shards(
                shards,
                out,
                partial(_task, catalog, settings),
                write_fragment,
                items_per_task=1,
                num_workers=num_workers or default_num_workers(),
                unit="video",
            )
            write_lines(out / "missing_videos.txt", catalog.missing)
            finish(out, len(shards), settings, catalog.splits, partial(_summary, catalog), unit="video")
        clear(out / WORK_FOLDER)
    return read_report(out, missing=catalog.missing, unlisted=catalog.unlisted, was_complete=was_complete)


def _task(catalog: Catalog, settings: dict[str, Any], fragment: Path, videos: Sequence[Video]) -> FragmentTask:
    (video,) = videos
    return FragmentTask(
        path=video.path,
        video_id=video.video_id,
        class_name=video.class_name,
        class_id=catalog.official_ids.get(video.class_name),
        fragment=fragment,
        size_px=settings["size_px"],
        method=settings["flow"]["method"],
        backward=settings["backward"],
        codec=Codec.from_metadata(settings["codec"]),
    )


def _summary(catalog: Catalog, totals: Totals, num_bytes: int) -> dict[str, int | float]:
    """What the pack cost and saved. The ratio is that of the paper's 1.5 TB to 27 GB: fields, without RGB frames."""
    num_pairs = totals.num_frames - totals.num_videos
    return {
        "videos": totals.num_videos,
        "frames": totals.num_frames,
        "fields": totals.num_fields,
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
    parser = argparse.ArgumentParser(
        prog="python -m flow.pack",
        description="Compute optical flow of videos and pack frames and flow into shards. Stopped, it goes on with the "
        "same command.",
        epilog="Exit code 1: some videos are bad (unless --skip-bad), or listed and absent (with --strict). 2: error.",
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder of class folders of videos")
    parser.add_argument("--out", type=Path, required=True, help="folder of the packed data set")
    parser.add_argument("--splits", type=Path, help="folder of the official list files")
    parser.add_argument(
        "--dataset",
        choices=[*LIST_READERS, "folder"],
        help="whose list files they are; folder makes a seeded 70/30 split (default: by the names of the lists)",
    )
    parser.add_argument(
        "--method",
        choices=list(FLOW_METHODS),
        default=DEFAULT_METHOD,
        help="%(default)s by default: the most accurate of the three on the Middlebury pairs, and the fastest",
    )
    parser.add_argument(
        "--range",
        default="per-field",
        metavar="per-field|PX",
        help="values that a component's 8 bits span: its own range (default), or a fixed +-PX such as 20",
    )
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1..100 (default 90)")
    parser.add_argument("--size", type=int, default=256, help="smaller side of the frames in px (default 256)")
    parser.add_argument("--backward", action="store_true", help="also the fields from each frame to the one before")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--videos-per-shard", type=int, default=VIDEOS_PER_SHARD, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order in the shards, and of the split by folders")
    parser.add_argument("--skip-bad", action="store_true", help="exit 0 although some videos are bad")
    parser.add_argument("--strict", action="store_true", help="exit 1 if listed videos are absent")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        report = pack(
            options.videos,
            options.out,
            splits=options.splits,
            dataset=options.dataset,
            method=options.method,
            codec=Codec.from_option(options.range, options.quality),
            size_px=options.size,
            backward=options.backward,
            seed=options.seed,
            videos_per_shard=options.videos_per_shard,
            num_workers=options.workers,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on with the shards that are left.", file=sys.stderr)
        return 130
    print(_describe(report, options.out))
    return int(bool(report.bad) and not options.skip_bad or bool(report.missing) and options.strict)


def _describe(report: PackReport, out: Path) -> str:
    figures = report.dataset["summary"]
    lines = [f"{out} was complete: nothing to do."] if report.was_complete else []
    lines += [
        f"{figures['videos']:,} videos, {figures['frames']:,} frames, {figures['fields']:,} fields "
        f"({report.dataset['flow']['method']}): {figures['bytes'] / 1e6:,.1f} MB",
        f"flow {figures['flow_bytes'] / 1e6:,.1f} MB, as float32 {figures['float32_bytes'] / 1e6:,.1f} MB: "
        f"{figures['ratio']:.1f}x smaller; error mean {figures['quantisation_error_mean_px']:.4f} px, "
        f"largest {figures['quantisation_error_max_px']:.3f} px",
        f"{figures['s_per_pair'] * 1e3:.1f} ms per pair of frames on one core, "
        f"of which flow {figures['flow_s_per_pair'] * 1e3:.1f} ms",
    ]
    if report.missing:
        lines.append(f"{len(report.missing):,} listed videos are not in the folder: {out / 'missing_videos.txt'}")
    if report.unlisted:
        lines.append(f"{len(report.unlisted):,} videos stand in no list; they are packed, but in no split")
    if report.bad:
        lines.append(f"{len(report.bad):,} bad videos were left out: {out / BAD_NAME}")
        lines += [f"  {video_id} {report.bad[video_id]}" for video_id in sorted(report.bad)[:10]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
