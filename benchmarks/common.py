"""What every benchmark writes beside its figures: machine, versions, commit; and how it writes them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # a benchmark runs from the checkout, installed or not

from train.provenance import describe  # noqa: E402


def default_out(name: str, *, quick: bool = False, generated: bool = False, partial: bool = False) -> Path:
    """Where a result goes if nobody says: benchmarks/results/NAME.json, of which the docs are made. What is less, a
    quick run, one on generated data, or one of fewer rows or rounds, stands beside it as NAME_quick.json and so on."""
    lesser = {"quick": quick, "generated": generated, "partial": partial}
    suffix = next((f"_{reason}" for reason, holds in lesser.items() if holds), "")
    return RESULTS / f"{name}{suffix}.json"


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


def demo_set(folder: Path, size_px: int = 256) -> Path:
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
