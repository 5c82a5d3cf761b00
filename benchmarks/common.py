"""What every benchmark writes beside its figures: machine, versions, commit; where it writes, and how it fails."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # a benchmark runs from the checkout, installed or not

from flow.command import describe_error  # noqa: E402
from train.provenance import describe  # noqa: E402

#: Side of the input, in px, of whatever is measured in full: the paper's.
CROP_PX = 224
#: Smaller side of the generated set's frames, in px: the paper's.
DEMO_PX = 256


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Around a program: what it cannot read or do with ends it with one line; a program of ours that it started and
    that failed has said its own."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {describe_error(error)}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data, None for what `demo_set` makes."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="packed data set (default: a generated one)")


def add_crop_px(parser: argparse.ArgumentParser) -> None:
    """--crop-px, of `choose_crop_px`."""
    text = f"side of the input (default {CROP_PX}, or what fits into smaller frames)"
    parser.add_argument("--crop-px", type=int, metavar="PX", help=text)


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """--out, of `result_path`."""
    text = f"file of the results, or folder for {name}.json (default: the current one)"
    parser.add_argument("--out", type=Path, default=Path(), metavar="FILE|DIR", help=text)


def is_file(out: Path) -> bool:
    """Whether --out names a file; else it is a folder, there or not. ValueError for a file of another kind."""
    if out.suffix.lower() != ".json" and out.suffix and not out.is_dir():
        raise ValueError(f"--out {out}: results are JSON; give a name that ends in .json, or a folder.")
    return out.suffix.lower() == ".json"


def result_path(out: Path, name: str, *, quick: bool = False, generated: bool = False, partial: bool = False) -> Path:
    """The file of a result: --out, or NAME.json in that folder. What is less, a quick run, one on generated data, or
    one of fewer rows or rounds, is NAME_quick.json and so on there: it takes no place of a full one."""
    lesser = {"quick": quick, "generated": generated, "partial": partial}
    suffix = next((f"_{reason}" for reason, holds in lesser.items() if holds), "")
    return out if is_file(out) else out / f"{name}{suffix}.json"


def choose_crop_px(data: Path | None, asked: int | None = None, usual: int = CROP_PX) -> int:
    """Side of the input in px: what was asked for, or the usual; where frames are smaller than that, the largest
    multiple of 8 up to 7/8 of their smaller side. data: packed set; None: the generated one.

    Raises ValueError if what was asked for does not fit into the frames.
    """
    from loaders.index import open_index

    side = DEMO_PX
    if data is not None:
        index = open_index(data)
        side = min(int(index.heights.min()), int(index.widths.min()))
    if asked is not None and not 0 < asked <= side:
        raise ValueError(f"--crop-px {asked}: expected 1 to {side}, the smaller side of the smallest frames.")
    return asked or (usual if usual <= side else side * 7 // 8 // 8 * 8)


def write_result(path: Path, config: dict[str, Any], complete: bool = True, **content: Any) -> None:
    """Write {machine, versions, commit, complete, config, ...} as JSON; the file is whole or not there.

    What is not complete yet stands in NAME.partial.json beside it, and does not touch an earlier result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, temporary = path.with_suffix(".partial.json"), path.with_suffix(".tmp")
    result = {**describe(), "complete": complete, "config": config, **content}
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path if complete else partial)
    if complete:
        partial.unlink(missing_ok=True)


def describe_data(index: Any, generated: bool) -> dict[str, Any]:
    """What was measured on, named by its bytes and not by where it lies."""
    flow_bytes = sum(int(index.entries[kind]["size"].sum()) for kind in ("dx", "dy"))
    return {
        "name": "generated demo set" if generated else index.metadata.get("name"),
        "fingerprint": index.fingerprint,
        "videos": index.num_videos,
        "size_px": [int(index.heights[0]), int(index.widths[0])],
        "bytes_per_component": flow_bytes / max(1, int((index.entries["dx"]["size"] > 0).sum()) * 2),
        "codec": index.codec.metadata(),
    }


def demo_set(folder: Path, size_px: int = DEMO_PX) -> Path:
    """Generate and pack a small demo set at the paper's frame size, once; its folder."""
    from flow import demo, pack

    packed = folder / "packed"
    if not (packed / "dataset.json").exists():
        demo.generate(folder / "videos", num_train=2, num_test=1, num_frames=40)
        arguments = {"--videos": folder / "videos", "--out": packed, "--size": size_px, "--dataset": "ucf101"}
        arguments["--splits"] = folder / "videos" / "splits"
        if pack.main([str(part) for pair in arguments.items() for part in pair]):
            raise RuntimeError(f"packing the demo set in {folder} failed; its messages stand above")
    return packed
