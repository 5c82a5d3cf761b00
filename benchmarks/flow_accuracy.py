"""End-point error of every flow method on pairs whose true flow is known, before the codec and after.

    python benchmarks/flow_accuracy.py DIR [--methods dis brox ...] [--set brox:alpha=0.3,scale=0.9] [--device cuda]

DIR/<pair>/frame10.png, frame11.png, flow10.flo are a pair and the true flow from the first frame to the second, as
Middlebury gives them (Baker et al., IJCV 2011). The end-point error is the length of (estimate - truth) in px, averaged
over the pixels whose flow is known; a mean over pairs gives every pair the same weight. "After the codec" is the error
of what is packed: the field, quantised over its own range and stored as JPEG of quality 90.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import add_out, errors_in_a_line, is_file, result_path, write_result

import numpy as np  # isort: skip
import numpy.typing as npt
from tqdm import tqdm

from flow.codec import Codec, decode_component, decode_grey, encode_component
from flow.command import Parser, did_you_mean, nearest_path
from flow.demo import draw_texture, shift
from flow.extract import FlowMethod, flow_method

#: Rows by name: method, and the parameters that differ from its defaults. "brox" is the paper's.
Setting = tuple[str, dict[str, Any]]
SETTINGS: dict[str, Setting] = {
    "farneback": ("farneback", {}),
    "dis": ("dis", {}),
    "tvl1": ("tvl1", {}),
    "deepflow": ("deepflow", {}),
    "brox": ("brox", {}),
    "brox_fine": ("brox", {"scale": 0.9, "alpha": 0.15, "inner_iterations": 10}),
    "nvof": ("nvof", {}),
}
#: Those that are measured if none is named.
ROWS = {"cpu": ["farneback", "dis", "tvl1", "deepflow", "brox", "brox_fine"], "cuda": ["brox", "brox_fine", "nvof"]}

#: First number of a .flo file, in the bytes "PIEH".
FLO_MAGIC = 202021.25
#: From here on a flow in a .flo file stands for "unknown".
UNKNOWN_PX = 1000.0


@dataclass(frozen=True)
class Pair:
    """Two grey frames (H, W) uint8, and the true flow (2, H, W) float32 px from the first to the second."""

    name: str
    grey0: npt.NDArray[np.uint8]
    grey1: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.float32]

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """(H, W), where the truth is known."""
        return (np.abs(self.truth) < UNKNOWN_PX).all(axis=0)


def read_flo(path: Path) -> npt.NDArray[np.float32]:
    """The field (2, H, W) px of a Middlebury .flo file: magic, width, height, then u and v of every pixel.

    Raises ValueError if the file is none, or has another size than its header says.
    """
    content = path.read_bytes()
    magic = float(np.frombuffer(content, "<f4", 1)[0]) if len(content) >= 12 else None
    if magic != FLO_MAGIC:
        begins = f"{len(content)} bytes, too short for a header" if magic is None else f"begins with {magic:g}"
        raise ValueError(f"{path} is no .flo file: {begins}; one begins with {FLO_MAGIC} and its width and height.")
    width, height = (int(side) for side in np.frombuffer(content, "<i4", 2, 4))
    if width < 1 or height < 1 or len(content) != 12 + 8 * width * height:
        raise ValueError(
            f"{path} has {len(content)} bytes; its header says {width} x {height} px, which are "
            f"{12 + 8 * width * height}. It is cut off or damaged: fetch it again."
        )
    return np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1)


def read_pairs(folder: Path) -> list[Pair]:
    """All pairs in a folder, by name. Raises ValueError if there are none, or frames and truth differ in size."""
    pairs = []
    for path in sorted(folder.glob("*/flow10.flo")):
        grey0, grey1 = (decode_grey((path.parent / f"frame{n}.png").read_bytes()) for n in (10, 11))
        pair = Pair(path.parent.name, grey0, grey1, read_flo(path))
        if not grey0.shape == grey1.shape == pair.truth.shape[1:]:
            raise ValueError(f"{path.parent}: frames {grey0.shape}, {grey1.shape}, flow {pair.truth.shape[1:]}.")
        if not pair.known.any():
            raise ValueError(f"{path}: no pixel's flow is known.")
        pairs.append(pair)
    if not pairs:
        raise ValueError(
            f"{folder} holds no pairs: expected NAME/frame10.png, NAME/frame11.png and NAME/flow10.flo."
            + nearest_path(folder)
        )
    return pairs


def generated_pair(height: int = 256, width: int = 340, dx: float = 2.5, dy: float = -1.25) -> Pair:
    """A texture that moves by (dx, dy) px as a whole."""
    texture = draw_texture(np.random.default_rng(0), 512, 512)
    grey0, grey1 = (shift(texture, s * dx, s * dy, width, height, wrap=True).round().astype(np.uint8) for s in (0, 1))
    truth = np.empty((2, height, width), np.float32)
    truth[0], truth[1] = dx, dy
    return Pair("generated", grey0, grey1, truth)


def end_point_error(field: npt.NDArray[np.float32], pair: Pair) -> float:
    """Mean distance in px of a field (2, H, W) to the truth, where that is known."""
    return float(np.hypot(*(field - pair.truth))[pair.known].mean(dtype=np.float64))


def code(field: npt.NDArray[np.float32], codec: Codec) -> tuple[npt.NDArray[np.float32], int]:
    """A field (2, H, W) after the codec and back, and the bytes of its two JPEGs."""
    coded = [encode_component(component, codec) for component in field]
    return np.stack([decode_component(*component) for component in coded]), sum(len(c.jpeg) for c in coded)


def choose(names: Sequence[str], settings: Sequence[str]) -> dict[str, Setting]:
    """Rows of these names, and one for each setting such as "brox:alpha=0.3,scale=0.9". Raises ValueError."""
    if unknown := [name for name in names if name not in SETTINGS]:
        near = did_you_mean(unknown[0], SETTINGS)
        raise ValueError(f"row {unknown[0]!r} is unknown; there are {', '.join(SETTINGS)}.{near}")
    rows = {name: SETTINGS[name] for name in names}
    for text in settings:
        method, _, values = text.partition(":")
        given = {}
        for part in values.split(","):
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"--set {text}: expected METHOD:key=value,key=value, such as brox:scale=0.9.")
            try:
                given[key] = json.loads(value)  # as `flow.pack --set`: JSON, or else text
            except ValueError:
                given[key] = value
        rows[text] = (method, given)
    return rows


def measure(method: FlowMethod, pairs: list[Pair]) -> dict[str, Any]:
    """Errors of every pair before and after the codec, and their means."""
    codec = Codec()
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for pair in tqdm(pairs, desc=method.name, leave=False, disable=None):
        field = method(pair.grey0, pair.grey1)
        before[pair.name] = end_point_error(field, pair)
        after[pair.name] = end_point_error(code(field, codec)[0], pair)
    return {
        "epe_px": before,
        "epe_mean_px": float(np.mean(list(before.values()))),
        "coded_epe_px": after,
        "coded_epe_mean_px": float(np.mean(list(after.values()))),
    }


def no_worse_on(a: Mapping[str, float], b: Mapping[str, float]) -> int:
    """Number of pairs on which errors a are not above errors b."""
    return sum(a[pair] <= b[pair] for pair in b)


def describe_pairs(pairs: list[Pair], generated: bool) -> dict[str, Any]:
    """What was measured on."""
    sizes = {pair.name: list(pair.truth.shape[1:]) for pair in pairs}
    known = {pair.name: float(100 * pair.known.mean()) for pair in pairs}
    return {"name": "generated pair" if generated else "Middlebury", "size_px": sizes, "known_pct": known}


def add_methods(parser: argparse.ArgumentParser) -> None:
    """--methods and --set, of `choose`."""
    text = f"of {', '.join(SETTINGS)} (default: all that are for the device)"
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=text)
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="METHOD:key=value,...", help="one more row"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="End-point error of every flow method.")
    parser.add_argument(
        "pairs", type=Path, nargs="?", metavar="DIR", help="pairs with truth (default: a generated one)"
    )
    add_methods(parser)
    parser.add_argument("--device", choices=list(ROWS), default="cpu", help="that computes (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the generated pair is tiny: does it run?")
    add_out(parser, "flow_accuracy")
    return parser.parse_args(argv)


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    pairs = (
        read_pairs(options.pairs) if options.pairs else [generated_pair(64, 96) if options.quick else generated_pair()]
    )
    chosen = choose(options.methods or ROWS[options.device], options.settings)
    print(f"{'':16} {' '.join(f'{pair.name:>12}' for pair in pairs)}  after codec   mean, px")
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {"data": describe_pairs(pairs, options.pairs is None), "rows": rows}
    failed = 0
    less = {"quick": options.quick, "generated": options.pairs is None, "partial": options.methods is not None}
    out = result_path(options.out, f"flow_accuracy{'_cuda' if options.device == 'cuda' else ''}", **less)
    for name, (method_name, parameters) in chosen.items():
        try:
            method = flow_method(method_name, options.device, parameters)
            row = {"name": name, "flow": method.metadata(), **measure(method, pairs)}
            errors = " ".join(f"{row['epe_px'][pair.name]:12.3f}" for pair in pairs)
            print(f"{name:16} {errors} {row['coded_epe_mean_px']:12.3f} {row['epe_mean_px']:10.3f}", flush=True)
        except (ValueError, ImportError, RuntimeError) as error:
            row, failed = {"name": name, "error": str(error)}, 1
            print(f"{name:16} {error}", flush=True)
        rows.append(row)
        errors_of = {row["name"]: row["epe_px"] for row in rows if "error" not in row}
        if {"brox", "dis"} <= set(errors_of):
            content["brox_no_worse_than_dis"] = no_worse_on(errors_of["brox"], errors_of["dis"])
        # A result that lacks rows gets no name but a given one.
        complete = len(rows) == len(chosen) and (is_file(options.out) or not failed)
        write_result(out, {"device": options.device, "codec": Codec().metadata()}, complete, **content)
    print(f"written to {out if complete else out.with_suffix('.partial.json')}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
