"""Images to shards: `python -m flow.images --train SRC [--val SRC] --out DIR`. An image is a video of one frame.

The spatial net is pre-trained on ImageNet (Simonyan & Zisserman 2014, sec. 5). SRC is one of

    n01440764/n01440764_10026.JPEG    a folder of class folders of images, as ImageNet's train/
    000017.jpg, 000017.cls            WebDataset tars: a tar, a folder of tars, or a pattern, train-{0000..0145}.tar
    Archery/v_Archery_g01_c01.avi     a folder of class folders of videos: every N-th frame is an image

A shard is a fixed number of images, in a seeded order over all of SRC that mixes the classes; how a pack that was
stopped goes on is said in `flow.resume`. Tars are no exception: at first only their headers and labels are read, then
each image from its place, so that tars sorted by class come out mixed. That wants a disk which seeks fast, and memory
for the list of images, about 1 kB each; a process holds one image at a time.

Images are decoded as OpenCV does by default: alpha is dropped, 16 bits become 8, CMYK becomes RGB without its colour
profile, and an EXIF orientation is applied, so that what is packed is upright and carries none.
"""

import argparse
import posixpath
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flow.catalog import seeded_shards
from flow.codec import Codec, decode_rgb
from flow.command import Parser
from flow.devices import Engine, add_engine, make_engine
from flow.fragment import FragmentReport, Totals, encode_frame, fragment_file, reason
from flow.image_sources import Source, read_sources
from flow.pool import interruptible
from flow.publish import add_target_options, announce, open_target
from flow.resume import (
    BAD_NAME,
    PackReport,
    Target,
    explain,
    finish,
    input_digest,
    read_report,
    write_shards,
)
from flow.shard import Clip, Member, write_clip
from flow.untrusted import MAX_IMAGE_BYTES, open_regular
from flow.video import import_cv2, read_frames, resize

#: Distance of the frames taken from a video.
EVERY = 10

#: Images of a shard, and of a process's task; of videos, which give many images each, 32 and one.
PER_SHARD, PER_TASK = 1024, 64
VIDEOS_PER_SHARD = 32

_MAX_SIDE_PX = 65_500  # of a JPEG that OpenCV writes


@dataclass(frozen=True)
class ImagesTask:
    """A run of sources, and all that its fragment depends on."""

    fragment: Path
    sources: Sequence[Source]
    size_px: int
    quality: int
    every: int | None

    @property
    def inputs(self) -> list[Path]:
        """What is read for it: of tars each once."""
        return sorted({source.path for source in self.sources})


def pack_images(
    train: str,
    out: Path | str,
    *,
    val: str | None = None,
    classes: Path | None = None,
    size_px: int = 256,
    quality: int = 90,
    every: int | None = None,
    seed: int = 0,
    per_shard: int | None = None,
    num_workers: int | None = None,
    work: Path | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> PackReport:
    """Pack an image set, or go on with a pack that was stopped.

    train, val: what becomes the lists split1_train and split1_test; without val, `split_by_folder` makes both, of
    images or of whole videos. classes: file of class names, line k that of number k in tars, from 0; without it a class
    is named by its number. size_px: the smaller side of the images. every: distance of the frames taken from a video.
    per_shard: images of a shard, or videos. out, work: as of `flow.pack.pack`. engine, ray_address: see
    `flow.devices.make_engine`.

    Raises ValueError if a source is unusable, nothing could be packed, or `out` holds a pack with other settings or of
    other images. Bad images are left out and reported.
    """
    if size_px < 16 or min(1 if n is None else n for n in (every, per_shard, num_workers)) < 1:
        raise ValueError(
            f"size_px={size_px}, every={every}, per_shard={per_shard}, num_workers={num_workers}: expected at least "
            "16 px, 1, 1 and 1."
        )
    sources, splits = read_sources(train, val, classes, seed)
    videos = any(source.is_video for source in sources)
    if every is not None and not videos:
        raise ValueError(f"every={every} is for videos; {train} holds images. Leave it out.")
    settings: dict[str, Any] = {
        "name": "images",
        "flow": None,
        "codec": Codec(quality=quality).metadata(),
        "size_px": size_px,
        "backward": False,
        "every": (every or EVERY) if videos else None,
        "seed": seed,
        "videos_per_shard": per_shard or (VIDEOS_PER_SHARD if videos else PER_SHARD),
        "input_sha256": input_digest([[s.video_id, s.num_bytes, s.class_name] for s in sources], splits),
    }
    with make_engine(engine, None, num_workers, None, ray_address) as processes, open_target(out, work) as target:
        was_complete = target.begin(settings)
        if not was_complete:
            _pack(sources, splits, target, settings, processes)
        target.end()
    test_ids = set(splits["split1_test"])
    tested = {source.class_name for source in sources if source.video_id in test_ids}
    return read_report(target, was_complete=was_complete, untested=sorted({s.class_name for s in sources} - tested))


def _pack(
    sources: list[Source], splits: dict[str, list[str]], target: Target, settings: dict[str, Any], engine: Engine
) -> None:
    """The work of `pack_images`, once all is decided."""
    every = settings["every"]
    unit = "image" if every is None else "video"
    shards = seeded_shards(sources, settings["videos_per_shard"], settings["seed"])
    write_shards(
        shards,
        target,
        partial(ImagesTask, size_px=settings["size_px"], quality=settings["codec"]["quality"], every=every),
        write_images,
        items_per_task=PER_TASK if every is None else 1,
        engine=engine,
        unit=unit,
    )
    ids = {source.video_id for source in sources}

    def source_of(image_id: str) -> str:
        return image_id if image_id in ids else posixpath.dirname(image_id)

    finish(target, len(shards), settings, splits, _summary, item_of=source_of, unit=unit)


def _summary(totals: Totals, num_bytes: int) -> dict[str, int | float]:
    return {
        "videos": totals.num_videos,
        "frames": totals.num_frames,
        "bytes": num_bytes,
        "rgb_bytes": totals.rgb_bytes,
        "s_per_frame": totals.video_s / totals.num_frames,
    }


# --- work of a process -------------------------------------------------------------------------------------------


def write_images(task: ImagesTask) -> FragmentReport:
    """Pack a run of sources into `task.fragment`. Unusable ones leave nothing in it and are reported, not raised."""
    start = time.perf_counter()
    cv2 = import_cv2()
    cv2.setNumThreads(1)  # the pool runs a process on every core
    report = FragmentReport()
    with fragment_file(task.fragment) as file:
        for source in task.sources:
            at = file.tell()
            try:
                sizes = [
                    _write_image(file, source, image_id, image, task.quality)
                    for image_id, image in _images(source, task.size_px, task.every)
                ]
            except (ValueError, cv2.error) as error:
                file.seek(at)
                file.truncate()
                report.bad[source.video_id] = reason(error)
                continue
            report.totals.add(Totals(num_videos=len(sizes), num_frames=len(sizes), rgb_bytes=sum(sizes)))
    report.totals.video_s = time.perf_counter() - start
    return report


def _images(source: Source, size_px: int, every: int | None) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """(id, RGB image (H, W, 3) uint8 with min(H, W) = size_px) of a source. Raises ValueError for an unusable one."""
    if every is None or not source.is_video:
        yield source.video_id, read_image(source, size_px)
        return
    for t, frame in enumerate(read_frames(source.path, size_px)):
        if t % every == 0:
            yield f"{source.video_id}/{t:06d}", frame


def read_image(source: Source, size_px: int) -> npt.NDArray[np.uint8]:
    """RGB image (H, W, 3) uint8 with min(H, W) = size_px. Raises ValueError if it cannot be used."""
    try:
        with open_regular(source.path) as file:
            file.seek(source.offset)
            content = file.read(min(source.num_bytes, MAX_IMAGE_BYTES))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    try:
        image = decode_rgb(content) if content else None
    except ValueError:
        image = None
    if image is None:
        raise ValueError(f"is cut off, or no image that OpenCV reads ({len(content)} bytes)")
    short_px, long_px = sorted(image.shape[:2])
    if long_px * size_px > _MAX_SIDE_PX * short_px:
        raise ValueError(f"of {image.shape[1]}x{image.shape[0]} px is too long for a JPEG when scaled to {size_px} px")
    return resize(image, size_px)


def _write_image(file: BinaryIO, source: Source, image_id: str, image: npt.NDArray[np.uint8], quality: int) -> int:
    """Append an image as a clip of one frame; returns the bytes of its JPEG."""
    jpeg = encode_frame(image, quality)
    clip = Clip(
        video_id=image_id,
        class_name=source.class_name,
        class_id=source.class_id,
        first_frame=0,
        num_frames=1,
        is_last=True,
        height=image.shape[0],
        width=image.shape[1],
        members={"rgb": {0: Member(jpeg)}},
    )
    write_clip(file, clip)
    return len(jpeg)


# --- command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flow.images",
        description="Pack images into shards, each as a video of one frame.\n"
        "Stopped, it goes on with the same command.",
        epilog="SRC: a folder of class folders of images or of videos; or WebDataset tars with\n"
        "  jpg (jpeg, png) and cls members, as a tar, a folder of tars or a pattern,\n"
        "  train-{0000..0145}.tar\n\n"
        "example:\n"
        "  python -m flow.images --train ILSVRC2012/train --val ILSVRC2012/val --out packed\n\n"
        "exit code: 0 packed; 1 some images are bad (but for --skip-bad); 2 nothing could\n"
        "  be done, the message says why; 130, 143 stopped",
    )
    parser.add_argument("--train", metavar="SRC", required=True, help="images to train on")
    parser.add_argument(
        "--val", metavar="SRC", help="images to test on (default: 30 %% of a class's images, or videos)"
    )
    add_target_options(parser)
    parser.add_argument(
        "--size", type=int, default=256, metavar="PX", help="smaller side of the images in px (default %(default)s)"
    )
    parser.add_argument("--quality", type=int, default=90, metavar="N", help="of JPEG, 1..100 (default %(default)s)")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of the classes that tars number, one a line, from 0"
    )
    parser.add_argument(
        "--every", type=int, metavar="N", help=f"distance of the frames taken from a video (default {EVERY})"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    add_engine(parser)
    parser.add_argument(
        "--per-shard",
        type=int,
        metavar="N",
        help=f"images of a shard (default {PER_SHARD}), or videos ({VIDEOS_PER_SHARD})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the order in the shards, and of the split (default %(default)s)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="exit 0 although some images are bad")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        announce(options.out, options.work)
        with interruptible():
            report = pack_images(
                options.train,
                options.out,
                val=options.val,
                classes=options.classes,
                size_px=options.size,
                quality=options.quality,
                every=options.every,
                seed=options.seed,
                per_shard=options.per_shard,
                num_workers=options.workers,
                work=options.work,
                engine=options.engine,
                ray_address=options.ray_address,
            )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {explain(error, options.out)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("Stopped. The same command goes on with the shards that are left.", file=sys.stderr)
        return 128 + stop.args[0]
    figures, num_classes = report.dataset["summary"], len(report.dataset["classes"])
    if report.was_complete:
        print(f"{options.out} was complete: nothing to do.")
    print(
        f"{figures['videos']:,} images of {num_classes:,} classes: {figures['bytes'] / 1e6:,.1f} MB, "
        f"{figures['s_per_frame'] * 1e3:.1f} ms an image on one core"
    )
    if report.untested:
        message = f"{len(report.untested):,} of {num_classes:,} classes have nothing to test on: a class of one image"
        print(f"warning: {message}, or of one video, has it for training, unless --val holds more.", file=sys.stderr)
    if report.bad:
        print(f"{len(report.bad):,} were bad and left out: {options.out}/{BAD_NAME}")
        print(*(f"  {name} {report.bad[name]}" for name in sorted(report.bad)[:10]), sep="\n")
    return int(bool(report.bad) and not options.skip_bad)


if __name__ == "__main__":
    sys.exit(main())
