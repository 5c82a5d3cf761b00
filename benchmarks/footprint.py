"""What the loader costs to open and to keep: time and memory to the first batch of a million videos, and no leak.

    python benchmarks/footprint.py [--data PACKED] [--videos 1000000] [--batches 2000] [--quick]

Each case runs in a process of its own. What the libraries take is there before the clock starts: they are imported, and
have loaded one sample of a small set. The set of a million videos is an index made for the purpose, whose entries all
point at the members of one packed video: opening it, drawing from it and looking up its list of ids cost what they cost
with a million real ones, without the terabytes. resident_bytes is all that came on top, batches in the queue too;
private_bytes leaves out the pages of index and shards, which all processes share.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    CROP_PX,
    add_crop_px,
    add_data,
    add_out,
    choose_crop_px,
    demo_set,
    describe_data,
    errors_in_a_line,
    result_path,
    write_result,
)

import numpy as np  # isort: skip
from tqdm import tqdm

from flow.command import Parser
from flow.index import VIDEO, load_index, take_entries, write_index
from flow.shard import write_json
from loaders import dali_loader
from loaders.batch import StreamSpec
from loaders.index import open_index

NUM_FRAMES, ID_BYTES = 12, 20


def make_many(root: Path, source: Path, num_videos: int) -> None:
    """A packed set of num_videos videos of 12 frames, in 100 classes, on the shard of one real video."""
    header, arrays = load_index(source)
    long_enough = np.flatnonzero(arrays["videos"]["num_frames"] >= NUM_FRAMES)[0]
    model = arrays["videos"][long_enough]
    number = np.arange(num_videos)
    videos = np.zeros(num_videos, VIDEO)
    for key in ("shard", "height", "width"):
        videos[key] = model[key]
    videos["name_at"], videos["name_bytes"], videos["label"] = (
        number * ID_BYTES,
        ID_BYTES,
        number // -(-num_videos // 100),
    )
    videos["num_frames"], videos["first_row"] = NUM_FRAMES, number * NUM_FRAMES
    ids = [f"class{label:03d}/v_{i:09d}" for i, label in enumerate(videos["label"].tolist())]
    header["classes"] = [{"name": f"class{label:03d}", "official_id": None} for label in range(100)]
    first = int(model["first_row"])
    entries = {}
    for kind in ("rgb", "dx", "dy"):
        tiled = np.tile(take_entries(arrays[kind], kind, first + np.arange(NUM_FRAMES)), num_videos)
        entries[kind] = take_entries(tiled, kind, np.arange(len(tiled)))  # combined with their new places
    (root / "splits").mkdir(parents=True)
    write_index(root, header, {"videos": videos, "names": np.frombuffer("".join(ids).encode(), np.uint8), **entries})
    (root / "splits" / "split1_train.txt").write_text("".join(f"{video_id}\n" for video_id in ids))
    dataset = json.loads((source / "dataset.json").read_bytes())
    write_json(root / "dataset.json", {**dataset, "classes": header["classes"], "num_videos": num_videos})
    for shard in header["shards"]:
        (root / shard["name"]).symlink_to((source / shard["name"]).resolve())


def resident_bytes(kind: str = "VmRSS") -> int:
    """Resident memory of this process; "RssAnon" is the part that no other process can share, no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) * 1024


def open_and_load(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes to the first batch, in this process; beside them the bytes of one batch."""
    spec = StreamSpec(stream="temporal", crop_px=options.crop_px)
    index = open_index(options.small)
    with dali_loader.train_loader(
        index, index.split("split1_train"), spec, seed=0, batch_size=options.batch_size
    ) as loader:
        next(loader)  # libraries load their parts at first use
    before, private_before = resident_bytes(), resident_bytes("RssAnon")
    start_s = time.perf_counter()
    index = open_index(options.data)
    opened_s = time.perf_counter() - start_s
    rows = index.split("split1_train")
    listed_s = time.perf_counter() - start_s
    with dali_loader.train_loader(index, rows, spec, seed=0, batch_size=options.batch_size) as loader:
        batch = next(loader)
        first_s = time.perf_counter() - start_s
        used, private = resident_bytes() - before, resident_bytes("RssAnon") - private_before
    return {
        "videos": len(rows),
        "open_s": opened_s,
        "list_s": listed_s,
        "first_batch_s": first_s,
        "resident_bytes": used,
        "private_bytes": private,
        "batch_bytes": batch.inputs.nbytes,
    }


def run_on(options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory after a tenth of the batches and after all."""
    index = open_index(options.data)
    spec = StreamSpec(stream="temporal", L=options.L, crop_px=options.crop_px, stacks_per_window=options.k)
    seen = {}
    with dali_loader.train_loader(
        index, index.split("split1_train"), spec, seed=0, batch_size=options.batch_size
    ) as loader:
        for batch in range(1, options.batches + 1):
            next(loader)
            if batch in (options.batches // 10, options.batches):
                seen[f"resident_bytes_after_{batch}"] = resident_bytes()
    return {"k": options.k, "batches": options.batches, **seen}


CASES = {"open": open_and_load, "keep": run_on}


def run_case(case: str, **arguments: Any) -> dict[str, Any]:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--case", case]
    command += [part for key, value in arguments.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{case} {arguments} failed:\n{result.stderr[-2000:]}")
    return {"case": case, **json.loads(result.stdout.splitlines()[-1])}


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Start-up and memory of the loader.")
    add_data(parser)
    parser.add_argument(
        "--videos", type=int, default=1_000_000, metavar="N", help="of the made index (default %(default)s)"
    )
    parser.add_argument(
        "--batches", type=int, default=2000, metavar="N", help="over which nothing may grow (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of opening (default %(default)s)")
    add_crop_px(parser)
    parser.add_argument("--quick", action="store_true", help="few videos and batches: does it run?")
    add_out(parser, "footprint")
    # Of one case, when this program calls itself:
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--L", type=int, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case:
        print(json.dumps(CASES[options.case](options)))
        return 0
    options.crop_px = choose_crop_px(options.data, options.crop_px)
    partial = any(getattr(options, key) < parser.get_default(key) for key in ("videos", "batches", "rounds"))
    partial |= options.crop_px != CROP_PX
    less = {"quick": options.quick, "generated": options.data is None, "partial": partial}
    out = result_path(options.out, "footprint", **less)
    if options.quick:
        options.videos, options.batches, options.rounds, options.crop_px = 1000, 40, 1, 40
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or demo_set(Path(folder), 64 if options.quick else 256)
        shape = {"crop_px": options.crop_px, "batch_size": 8}
        config = {key: value for key, value in vars(options).items() if not isinstance(value, Path)} | shape
        config |= {"data": describe_data(open_index(data), options.data is None)}
        many = Path(folder) / "many"
        make_many(many, data, options.videos)
        cases = [{"case": "open", "data": many, "small": data} for _ in range(options.rounds)]
        cases += [{"case": "keep", "data": data, "k": k, "batches": options.batches} for k in (1, 8)]
        rows = [run_case(**case, **shape) for case in tqdm(cases, desc="cases", disable=None)]
    write_result(out, config, rows=rows)
    for row in rows:
        print(
            "  ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
