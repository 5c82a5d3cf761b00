"""Videos to shards: `python -m flow.pack --videos DIR --out DIR`.

Every process turns one video at a time into a fragment; a shard is the fragments of a fixed number of videos, in a
seeded order that mixes the classes, and is committed as soon as they are done. So a shard depends on its own videos
only: a pack that was killed goes on with the next shard (`flow.resume`), and the bytes do not depend on the number of
processes.

At the end come index, splits and reports, then dataset.json: where it exists, the pack is complete.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flow.catalog import LIST_READERS, Catalog, Video, read_catalog, seeded_order
from flow.codec import Codec
from flow.extract import DEFAULT_METHOD, FLOW_METHODS, flow_method
from flow.fragment import FragmentReport, FragmentTask, Totals, write_fragment
from flow.index import build_index
from flow.pool import default_num_workers, run_pool
from flow.resume import WORK_FOLDER, begin, clear, compare_settings, input_digest, is_finished, locked, state_path
from flow.shard import FORMAT_VERSION, commit_shard, shard_name, write_bytes, write_json

VIDEOS_PER_SHARD = 32


@dataclass(frozen=True)
class PackReport:
    """dataset: the content of dataset.json. bad: video id -> reason. was_complete: there was nothing to do."""

    dataset: dict[str, Any]
    bad: dict[str, str]
    missing: list[str]
    unlisted: list[str]
    was_complete: bool = False


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
        "input_sha256": input_digest(catalog),
    }
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / WORK_FOLDER):
        if (out / "dataset.json").exists():
            report = _complete(catalog, out, settings)
        else:
            begin(out, settings)
            _pack_shards(catalog, out, settings, num_workers or default_num_workers())
            report = _finish(catalog, out, settings)
        clear(out / WORK_FOLDER)
    return report


def _complete(catalog: Catalog, out: Path, settings: dict[str, Any]) -> PackReport:
    """Report of a pack that was complete before."""
    dataset = json.loads((out / "dataset.json").read_text("utf-8"))
    compare_settings(out, dataset, settings)
    bad_path = out / "bad_videos.txt"
    lines = bad_path.read_text("utf-8").splitlines() if bad_path.exists() else []
    bad = dict(line.split("\t", 1) for line in lines)
    return PackReport(dataset, bad, catalog.missing, catalog.unlisted, was_complete=True)


# --- shards ------------------------------------------------------------------------------------------------------


def _shards(catalog: Catalog, settings: dict[str, Any]) -> list[list[Video]]:
    """Videos of every shard: a fixed number of the seeded order, bad ones included, since nobody knows them yet."""
    by_id = {video.video_id: video for video in catalog.videos}
    order = [by_id[video_id] for video_id in seeded_order(list(by_id), settings["seed"])]
    step = settings["videos_per_shard"]
    return [order[at : at + step] for at in range(0, len(order), step)]


def _pack_shards(catalog: Catalog, out: Path, settings: dict[str, Any], num_workers: int) -> None:
    """Pack the shards that are not finished yet."""
    shards = _shards(catalog, settings)
    todo = {number: videos for number, videos in enumerate(shards) if not is_finished(out, number)}
    run = Path(tempfile.mkdtemp(prefix="run-", dir=out / WORK_FOLDER))
    tasks = {
        run / f"{number:06d}-{place:06d}": (number, video)
        for number, videos in todo.items()
        for place, video in enumerate(videos)
    }
    reports: dict[int, dict[Path, FragmentReport]] = {number: {} for number in todo}
    with tqdm(total=len(catalog.videos), initial=len(catalog.videos) - len(tasks), unit="video", disable=None) as bar:
        make = (_task(path, video, catalog, settings) for path, (_, video) in tasks.items())
        for task, report in run_pool(write_fragment, make, num_workers):
            number = tasks[task.fragment][0]
            reports[number][task.fragment] = report or FragmentReport(
                task.video_id, Totals(), "ends the process that reads it: crashed in the decoder, or killed"
            )
            bar.update()
            if len(reports[number]) == len(todo[number]):
                _commit(out, number, reports.pop(number))


def _task(fragment: Path, video: Video, catalog: Catalog, settings: dict[str, Any]) -> FragmentTask:
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


def _commit(out: Path, number: int, reports: dict[Path, FragmentReport]) -> None:
    """Join the fragments of a shard in their order, and note that it is finished."""
    fragments = [path for path in sorted(reports) if reports[path].bad is None]
    shard = None  # where all videos are bad; the numbers of the other shards stay as they are
    if fragments:
        num_bytes, digest = commit_shard(fragments, out / shard_name(number))
        shard = {"name": shard_name(number), "bytes": num_bytes, "sha256": digest}
    totals = Totals()
    for report in reports.values():
        totals.add(report.totals)
    bad = {report.video_id: report.bad for report in reports.values() if report.bad is not None}
    write_json(state_path(out, number), {"shard": shard, "totals": asdict(totals), "bad": bad})
    for fragment in fragments:
        fragment.unlink()


# --- end ---------------------------------------------------------------------------------------------------------


def _finish(catalog: Catalog, out: Path, settings: dict[str, Any]) -> PackReport:
    """Index, splits, reports, and last of all dataset.json."""
    numbers = range(len(_shards(catalog, settings)))
    states = [json.loads(state_path(out, number).read_text("utf-8")) for number in numbers]
    bad = {video_id: reason for state in states for video_id, reason in sorted(state["bad"].items())}
    _write_lines(out / "bad_videos.txt", [f"{video_id}\t{bad[video_id]}" for video_id in sorted(bad)])
    _write_lines(out / "missing_videos.txt", catalog.missing)
    totals = Totals()
    for state in states:
        totals.add(Totals(**state["totals"]))
    if totals.num_videos == 0:
        first = min(bad)
        raise ValueError(
            f"None of the {len(bad)} videos can be packed; {first} {bad[first]}. All reasons: {out / 'bad_videos.txt'}."
        )
    build_index(out)
    (out / "splits").mkdir(exist_ok=True)
    for name, ids in catalog.splits.items():
        _write_lines(out / "splits" / f"{name}.txt", [video_id for video_id in ids if video_id not in bad], keep=True)
    classes = sorted({video.class_name for video in catalog.videos if video.video_id not in bad})
    shards = [state["shard"] for state in states if state["shard"]]
    dataset = {
        "format_version": FORMAT_VERSION,
        **settings,
        "classes": [{"name": name, "official_id": catalog.official_ids.get(name)} for name in classes],
        "num_videos": totals.num_videos,
        "num_frames": totals.num_frames,
        "num_fields": totals.num_fields,
        "summary": _summary(totals, shards, catalog, bad),
        "shards": shards,
    }
    write_json(out / "dataset.json", dataset)
    return PackReport(dataset, bad, catalog.missing, catalog.unlisted)


def _write_lines(path: Path, lines: list[str], keep: bool = False) -> None:
    """One line each, atomically. Without lines there is no file, unless `keep`."""
    if lines or keep:
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)


def _summary(
    totals: Totals, shards: list[dict[str, Any]], catalog: Catalog, bad: dict[str, str]
) -> dict[str, int | float]:
    """What the pack cost and saved. The ratio is that of the paper's 1.5 TB to 27 GB: fields, without RGB frames."""
    num_pairs = totals.num_frames - totals.num_videos
    return {
        "videos": totals.num_videos,
        "frames": totals.num_frames,
        "fields": totals.num_fields,
        "bytes": sum(shard["bytes"] for shard in shards),
        "rgb_bytes": totals.rgb_bytes,
        "flow_bytes": totals.flow_bytes,
        "float32_bytes": totals.float32_bytes,
        "ratio": totals.float32_bytes / totals.flow_bytes,
        "quantisation_error_mean_px": totals.error_sum_px / totals.error_count,
        "quantisation_error_max_px": totals.error_max_px,
        "flow_s_per_pair": totals.flow_s / num_pairs,
        "s_per_pair": totals.video_s / num_pairs,
        "listed_missing": len(catalog.missing),
        "bad": len(bad),
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
        lines.append(f"{len(report.bad):,} bad videos were left out: {out / 'bad_videos.txt'}")
        lines += [f"  {video_id} {report.bad[video_id]}" for video_id in sorted(report.bad)[:10]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
