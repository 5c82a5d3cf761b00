"""A packed set as a page to look at: `python -m flow.browse DIR [--out FILE.html]`, or as numbers with `--json`."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flow.command import Parser, describe_error, nearest_path, tidy_end
from flow.page import Block, Columns, Grid, Heading, Picture, Prose, Text, plural, to_html
from flow.resume import BAD_NAME
from flow.shard import write_bytes
from flow.sheet import THUMB_PX, contact_sheet, draw_frames, draw_legend, draw_motion
from flow.survey import SAMPLE_FIELDS, PackedSet, survey
from flow.untrusted import printable
from flow.verify import verify

#: More classes are on the page only if they are asked for by name.
MAX_CLASSES = 200

_MAX_DAMAGES = 50


# --- page --------------------------------------------------------------------------------------------------------


def write_page(packed: PackedSet, found: dict[str, Any], sheet: list[Picture], named: bool, path: Path) -> None:
    """Write the page, one file. found: of `survey`; sheet: of `contact_sheet`; named: whether --classes were given."""
    name = printable(found["name"] or packed.root.name or "packed set")
    blocks: list[Block] = [Heading(f"Packed set: {name}", 1), Text(_sentence(found))]
    blocks.append(Columns([_what(found), _totals(found)], 420))
    parameters = _parameters((found["flow"] or {}).get("parameters"))
    blocks += [Text(f"Parameters: {parameters}.")] if parameters else []
    blocks += [Heading("Damaged, short and missing videos"), *_problems(found)]
    blocks += [Heading("Frames per video"), *_lengths(found["frames_per_video"])]
    blocks += [Heading("Classes"), *_classes(found)]
    blocks += [Heading("Contact sheet"), *_sheet(found, sheet, named)]
    write_bytes(path, to_html(blocks).encode())


def _sentence(found: dict[str, Any]) -> str:
    method = f", flow by {_method(found)}" if found["num_fields"] else ", without flow"
    lines = [
        f"{plural(found['num_videos'], 'video')} of {_classes_of(found['num_classes'])}, "
        f"{plural(found['num_frames'], 'frame')}{method}: {_megabytes(found['bytes'])} in `{printable(found['root'])}`."
    ]
    if found["damages"]:
        lines.append(f"**It is damaged**: {plural(len(found['damages']), 'damage')}, named below.")
    return " ".join(lines)


def _what(found: dict[str, Any]) -> Grid:
    flow, codec = found["flow"] or {}, found["codec"]
    library = " ".join(_value(flow[key]) for key in ("library", "version") if flow.get(key)) or "–"
    low, high = found["size_px"]
    splits = [f"{printable(name)}: {count:,}" for name, count in found["splits"].items()]
    rows = {
        "Flow": _method(found) if found["num_fields"] else "none: images",
        "Library": library,
        "Camera": f"subtracted: {_value(flow['camera'])}" if flow.get("camera") else "left in" if flow else "",
        "Codec": f"{codec['name']} {codec['version']}, range {codec['range']}"
        + (f" ±{codec['bound_px']:g} px" if codec["bound_px"] else "")
        + (f", quality {codec['quality']}" if codec["quality"] else ", files of another tool"),
        "Smaller side": f"{low} px" if low == high else f"{low} to {high} px",
        "Lists": ", ".join(splits) or "none",
    }
    return Grid(("Set", ""), [(key, value or "–") for key, value in rows.items()])


def _totals(found: dict[str, Any]) -> Grid:
    fields = f"{found['num_fields']:,}"
    if found["num_backward_fields"]:
        fields += f", and {found['num_backward_fields']:,} backward"
    rows = {
        "Classes": f"{found['num_classes']:,}",
        "Videos": f"{found['num_videos']:,}",
        "Frames": f"{found['num_frames']:,}",
        "Fields": fields,
        "All shards": _megabytes(found["bytes"]),
        "of that frames": _megabytes(found["rgb_bytes"]),
        "of that flow": _megabytes(found["flow_bytes"]),
        "of that tar headers, JSON": _megabytes(found["bytes"] - found["rgb_bytes"] - found["flow_bytes"]),
        "A frame": _kilobytes(found["bytes_per_frame"]),
        "A field (dx and dy)": _kilobytes(found["bytes_per_field"]),
    }
    return Grid(("Size", ""), list(rows.items()))


def _problems(found: dict[str, Any]) -> Iterator[Block]:
    """Damage, then what is too short, then what packing left out."""
    damages, short, left = found["damages"], found["short"], found["left_out"]
    if found["num_verified"] is None:
        checked = "Checked: every shard's size, and the images behind this page. `--verify` checks all."
    else:
        checked = f"Checked: all {plural(found['num_verified'], 'image')}, shards, index and lists."
    yield Text(f"**{plural(len(damages), 'damage')}**. {checked}" if damages else f"No damage was found. {checked}")
    if damages:
        more = [f"and {len(damages) - _MAX_DAMAGES:,} more."] if len(damages) > _MAX_DAMAGES else []
        yield _bullets([*damages[:_MAX_DAMAGES], *more])
    if short:
        least, num_short = short["L"] + 1, short["no_stack"]["num_videos"]
        if not num_short:
            yield Text(f"Every video has at least {least} frames, enough for a stack of L = {short['L']} fields.")
        else:
            yield Text(
                f"**{plural(num_short, 'short video')}**: fewer than {least} frames, too few for a stack of L = "
                f"{short['L']} fields. Training leaves them out, tests repeat their last field. A single frame, and no "
                f"field at all: {plural(short['no_field']['num_videos'], 'video')}."
            )
            yield _bullets(_first(short["no_stack"]["first"], num_short))
    yield Text(
        f"Left out when the set was packed: {plural(left['num_bad'], 'bad item')} (`{BAD_NAME}`). Listed and not "
        f"there: {plural(left['num_missing'], 'video')} (`missing_videos.txt`)."
    )
    if left["num_bad"]:
        yield _bullets(_first([f"{bad['video']}: {bad['reason']}" for bad in left["first_bad"]], left["num_bad"]))


def _lengths(lengths: dict[str, Any]) -> Iterator[Block]:
    ends = [lengths[key] for key in ("shortest", "longest")]
    if ends[0]["num_frames"] == ends[1]["num_frames"]:
        yield Text(f"Every video has {plural(ends[0]['num_frames'], 'frame')}.")
        return
    shortest, longest = (f"{end['num_frames']:,} (`{printable(end['video'])}`)" for end in ends)
    middle = f"median {lengths['median']:,g}, mean {lengths['mean']:,.1f}"
    yield Text(f"Shortest {shortest}, {middle}, longest {longest}.")
    yield draw_frames(lengths)


def _classes(found: dict[str, Any]) -> Iterator[Block]:
    classes = found["classes"]
    moving = [entry["motion"] for entry in classes if entry["motion"]]
    head = ["class", "videos", "frames", "fields", "RGB", "flow"]
    if moving:
        sizes = [size for motion in moving for size in motion["size_px"]]
        low, high = min(sizes), max(sizes)
        yield Text(
            f"Motion is the mean length of the displacements in px/frame of frames whose smaller side is "
            f"{low if low == high else f'{low} to {high}'} px; once all of it, and once less each field's mean vector, "
            "which takes away most of a camera's motion, and gives a little to what stands still. It was "
            f"measured on a sample drawn with seed {found['seed']}: the last column."
        )
        head = ["class", "motion, px/frame", "less the mean", *head[1:], "measured on"]
    rows = []
    for entry in classes:
        row = [f"{entry[key]:,}" for key in ("num_videos", "num_frames", "num_fields")]
        row += [_megabytes(entry["rgb_bytes"]), _megabytes(entry["flow_bytes"])]
        if motion := entry["motion"]:
            row[:0] = [f"{motion[key]:.2f}" for key in ("px_per_frame", "less_mean_px_per_frame")]
            row.append(f"{plural(motion['num_fields'], 'field')} of {plural(motion['num_videos'], 'video')}")
        elif moving:
            row = ["–", "–", *row, "–"]
        rows.append([entry["name"], *row])
    yield Grid(head, rows)
    if moving:
        yield draw_motion(classes)


def _sheet(found: dict[str, Any], sheet: list[Picture], named: bool) -> Iterator[Block]:
    if found["num_fields"]:
        yield Text(
            "Of each video the middle frame and its flow in colour; below, dx and dy in grey. The caption gives the "
            "frame's number, from 0, and ±s, the displacement that has full colour and is black or white in grey: the "
            "99th percentile of that field. What is longer is darker in colour."
        )
        yield draw_legend()
    if not named and found["num_classes"] > MAX_CLASSES:
        yield Text(
            f"These are the first {MAX_CLASSES} of {found['num_classes']:,} classes; `--classes NAME ...` shows others."
        )
    yield Columns(sheet, 2 * THUMB_PX if found["num_fields"] else THUMB_PX)


# --- words -------------------------------------------------------------------------------------------------------


def _value(value: Any) -> str:
    """A value of dataset.json, of any type, in a few words."""
    if isinstance(value, float):
        return f"{value:g}"
    return printable(value if isinstance(value, str) else json.dumps(value), 100)


def _method(found: dict[str, Any]) -> str:
    return _value((found["flow"] or {}).get("method", "an unknown method"))


def _parameters(parameters: Any) -> str:
    items = list(parameters.items())[:100] if isinstance(parameters, dict) else []
    return ", ".join(f"{printable(key, 100)} {_value(value)}" for key, value in items)


def _bullets(lines: Sequence[str]) -> Prose:
    return Prose("\n".join(f"- {printable(line, 600)}" for line in lines))


def _first(names: Sequence[str], count: int) -> list[str]:
    return [*names, *([f"and {count - len(names):,} more."] if count > len(names) else [])]


def _classes_of(count: int) -> str:
    return f"{count:,} class{'es' * (count != 1)}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e6:,.1f} MB"


def _kilobytes(num_bytes: float | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 1e3:,.1f} kB"


# --- command -----------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="python -m flow.browse",
        description="""\
Show what a packed set holds: a page with frame, dx, dy and colour-coded flow of some videos of each class, and the
set's statistics: counts, bytes, frames per video, motion of each class, short, missing and damaged videos.
The page is one file that needs no network.""",
        epilog="""\
examples:
  python -m flow.browse packed --out packed.html
  python -m flow.browse packed --classes Archery Surfing --per-class 5
  python -m flow.browse packed --json

exit code: 0 done; 1 damage was found; 2 nothing could be done, the message says why;
  130, 143 stopped

--json prints an object with the keys
  root, name, flow, codec, backward, size_px [smallest, largest], splits {list: videos}
  num_classes, num_videos, num_frames, num_fields, num_backward_fields
  bytes (of the shards), rgb_bytes, flow_bytes, bytes_per_frame, bytes_per_field
  frames_per_video {shortest, longest {video, num_frames}, mean, median, histogram {edges, counts}}
  seed, classes [{name, official_id, num_videos, num_frames, num_fields, rgb_bytes, flow_bytes, motion {px_per_frame,
    less_mean_px_per_frame, num_fields, num_videos, size_px} or null without fields}]
  short {L, no_stack, no_field {num_videos, first}} or null for images
  left_out {num_bad, first_bad [{video, reason}], num_missing}
  damaged_videos (of those looked at), damages [line], num_verified (images that --verify checked) or null""",
    )
    parser.add_argument("root", type=Path, metavar="DIR", help="folder of a packed set")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--out", type=Path, default=Path("browse.html"), metavar="FILE", help="the page (default: %(default)s here)"
    )
    output.add_argument("--json", action="store_true", help="print the statistics instead, see below")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these classes (default: all)")
    parser.add_argument("--per-class", type=int, default=1, metavar="N", help="videos shown of each (default 1)")
    parser.add_argument(
        "--sample", type=int, default=SAMPLE_FIELDS, metavar="N",
        help="fields of each class that motion is measured on (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the videos and fields drawn (default 0)")
    parser.add_argument("--verify", action="store_true", help="check the whole set, as `python -m flow.verify` does")
    return parser


def _check_options(options: Any) -> None:
    """Raise ValueError for what would fail only after all the work."""
    if min(options.per_class, options.sample, options.seed) < 0:
        raise ValueError(
            f"--per-class {options.per_class} --sample {options.sample} --seed {options.seed}: expected 0 or more."
        )
    if not options.json and (options.out.is_dir() or not options.out.parent.is_dir()):
        what = "is a folder" if options.out.is_dir() else "lies in no folder"
        raise ValueError(f"--out {options.out} {what}. Name a file.{nearest_path(options.out.parent)}")


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        with tidy_end():
            found = _browse(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    damages = found["damages"]
    if not options.json:
        print(*damages, sep="\n", end="\n" * bool(damages))
        print(
            f"{options.out}: {plural(found['num_videos'], 'video')} of {_classes_of(found['num_classes'])}, "
            f"{plural(len(damages), 'damage')}"
        )
    return int(bool(damages))


def _browse(options: Any) -> dict[str, Any]:
    """Survey the set, and write the page or print the numbers. Returns these."""
    _check_options(options)
    packed = PackedSet(options.root)
    labels = packed.labels_of(options.classes)
    found = survey(packed, labels, options.seed, options.sample)
    shown = labels if options.classes else labels[:MAX_CLASSES]
    sheet = [] if options.json else contact_sheet(packed, shown, options.per_class, options.seed)
    report = verify(options.root) if options.verify else None
    damages = list(packed.damages | dict.fromkeys(report.damages if report else ()))
    found |= {"damaged_videos": list(packed.damaged_videos), "damages": damages}
    found["num_verified"] = report.num_members if report else None
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        write_page(packed, found, sheet, bool(options.classes), options.out)
    return found


if __name__ == "__main__":
    sys.exit(main())
