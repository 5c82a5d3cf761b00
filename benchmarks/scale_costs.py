"""What packing and training input cost on one machine, as scale_model.py needs to know and no other benchmark measures.

    python benchmarks/scale_costs.py [--videos DIR] [--data PACKED] [--quick]

stages      CPU ms a frame of decoding and resizing, of flow by dis, and of coding (an RGB frame and both components,
            each decoded again as proof), in one process and in one on every core; rounds interleaved
startup     seconds to start and end a pack's processes
videos      whole videos, as a pack's process has them: CPU seconds a frame of each, to the mean; with backward fields,
            to without; all lengths, by headers
bytes       of a frame, of a field either way, and of what the tar adds, for each frame of --data
join        MB/s of joining 32 fragments to a shard, with SHA-256 and fsync, and of SHA-256 alone, all of it in memory
index       frames/s and memory of building it, bytes of it a frame
loader      seconds between batches of a temporal loader that nobody keeps waiting
checkpoint  seconds that one of the paper's temporal net takes, and bytes of that net's gradient

All on this machine's disk and cores; what is read lies in memory already.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    CROP_PX,
    DEMO_PX,
    ROOT,
    add_data,
    add_out,
    choose_crop_px,
    demo_set,
    describe_data,
    errors_in_a_line,
    result_path,
    write_result,
)
from crew import Crew
from flow_works import choose_clips, decode_work, flow_work, write_pairs
from pack_parts import PACK_METHOD, spread
from scale_works import (
    code_work,
    index_memory,
    make_small,
    measure_bytes,
    measure_checkpoint,
    measure_join,
    measure_loader,
    timed_fragment,
)
from tqdm import tqdm

from flow.catalog import list_videos
from flow.codec import Codec
from flow.command import Parser
from flow.fragment import FragmentTask, Recipe, Totals
from flow.index import INDEX_NAME, build_index
from flow.pool import default_num_workers, run_pool
from flow.video import read_header
from loaders.index import Index, open_index


def measure_stages(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each stage and number of processes: CPU ms a frame in each of them."""
    pairs = folder / "pairs.npy"
    write_pairs(choose_clips(options.videos, 4), options.size, pairs)
    works = {
        "decode_resize": partial(decode_work, choose_clips(options.videos, options.clips), options.size),
        "flow": partial(flow_work, (PACK_METHOD, {}), "cpu", pairs, None),
        "code": partial(code_work, pairs),
    }
    counts = sorted({1, options.cores})
    crews = {(name, n): Crew(name, [work] * n) for name, work in works.items() for n in counts}
    turns: dict[tuple[str, int], list[Any]] = {key: [] for key in crews}
    try:
        for crew in crews.values():
            crew.wait()
        for _ in tqdm(range(options.rounds), desc="rounds", disable=None):
            for key, crew in crews.items():
                turns[key].append(crew.measure(options.seconds))
    finally:
        for crew in crews.values():
            crew.close()
    return [
        {
            "stage": name,
            "processes": n,
            "ms_per_frame": spread([1000 * turn.cpu_s_per_pair for turn in found]),
            "cpu_share": median(turn.cpu_share for turn in found),
        }
        for (name, n), found in turns.items()
    ]


#: In a process of its own: a pool's processes import the program that starts them, and a pack is a small one.
STARTUP = """
import sys, time
from pathlib import Path
from flow.pool import run_pool
from flow.video import read_header
start = time.perf_counter()
list(run_pool(read_header, [Path(sys.argv[1])] * int(sys.argv[2]), int(sys.argv[2])))
print(time.perf_counter() - start)
"""


def measure_startup(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds to start and end a pack's processes, each of which opens a video."""
    (clip,), rows = choose_clips(options.videos, 1), []
    for n in sorted({1, options.cores}):
        command = [sys.executable, "-c", STARTUP, str(clip), str(n)]
        printed = [subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(options.rounds)]
        rows.append({"processes": n, "s": spread([float(done.stdout) for done in printed])})
    return rows


def measure_videos(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, float], list[Path]]:
    """Time and lengths; bytes of a backward field against a forward one; and the fragments."""
    clips = choose_clips(options.videos, options.clips)
    few = clips[:: max(1, len(clips) // 8)]
    forward = write_fragments(clips, folder / "forward", options, backward=False)
    both = write_fragments(few, folder / "both", options, backward=True)
    cpu_s = sum(seconds for _, seconds in forward.values()) / sum(totals.num_frames for totals, _ in forward.values())
    found = {
        "clips": len(clips),
        "cpu_s_per_frame": cpu_s,
        "pace": sorted(seconds / totals.num_frames / cpu_s for totals, seconds in forward.values()),
        "backward_ratio": sum(both[clip][1] for clip in few) / sum(forward[clip][1] for clip in few),
        "lengths_frames": sorted(read_header(video.path).num_frames for video in list_videos(options.videos)),
    }
    one_way, num_fields = (sum(getattr(forward[clip][0], key) for clip in few) for key in ("flow_bytes", "num_fields"))
    added = sum(both[clip][0].flow_bytes for clip in few) - one_way
    sizes = {"backward_field": added / num_fields, "forward_field_of_the_same": one_way / num_fields}
    return found, sizes, sorted((folder / "forward").glob("*.fragment"))


def write_fragments(
    clips: list[Path], folder: Path, options: argparse.Namespace, backward: bool
) -> dict[Path, tuple[Totals, float]]:
    """Clip -> what was packed of it, and the CPU seconds that it took."""
    folder.mkdir()
    recipe = Recipe(options.size, PACK_METHOD, Codec(), backward=backward)
    tasks = [
        FragmentTask(clip, f"{clip.parent.name}/{clip.stem}", clip.parent.name, None, folder / f"{n}.fragment", recipe)
        for n, clip in enumerate(clips)
    ]
    found = {task.path: timed for task, timed in run_pool(timed_fragment, tasks, options.cores)}
    if bad := [clip for clip, timed in found.items() if not timed or not timed[0].num_fields]:
        raise ValueError(f"{bad[0]} cannot be packed; expected whole videos in --videos. Leave it out.")
    return found


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"index": index_memory}


def in_a_process(case: str, root: Path) -> dict[str, Any]:
    """A case in a process of its own, whose memory nothing else takes."""
    command = [sys.executable, __file__, "--case", case, "--data", str(root)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_index(index: Index, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Of --data by the clock; memory from two sets of small made images, of which one is larger."""
    real = folder / "real"
    real.mkdir()
    for name in index.shards:
        (real / name).symlink_to((index.root / name).resolve())
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        build_index(real)
        times.append(time.perf_counter() - start)
    frames = int(index.num_frames.sum())
    made = [make_small(folder / f"made{n}", n) for n in options.made_frames]
    peaks = [in_a_process("index", root) for root in made]
    slope = (peaks[1]["peak_bytes"] - peaks[0]["peak_bytes"]) / (options.made_frames[1] - options.made_frames[0])
    return {
        "frames_per_s": spread([frames / seconds for seconds in times]),
        "bytes_per_frame": (made[1] / INDEX_NAME).stat().st_size / options.made_frames[1],
        "memory_bytes_per_frame": slope,
        "made_frames": options.made_frames,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="What packing and training input cost on one machine: inputs of scale_model.py.")
    parser.add_argument(
        "--videos", type=Path, metavar="DIR", help="folder of class folders of videos (default: generated ones)"
    )
    add_data(parser)
    parser.add_argument("--clips", type=int, default=24, metavar="N", help="packed one by one (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of everything (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="of a stage in a round (default %(default)s)"
    )
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="of the loader (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few and small: does it run?")
    add_out(parser, "scale_costs")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)  # when this program calls itself
    options = parser.parse_args(argv)
    options.partial = any(getattr(options, key) < parser.get_default(key) for key in ("clips", "rounds", "batches"))
    options.cores, options.size, options.batch_size = default_num_workers(), 256, 64
    options.made_frames, options.width = [25_600, 204_800], 1.0
    if options.quick:
        options.clips, options.rounds, options.seconds, options.batches, options.size = 2, 1, 0.1, 4, 48
        options.batch_size, options.made_frames, options.width = 4, [256, 5120], 0.0625
    return options


@errors_in_a_line()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.case:
        print(json.dumps(CASES[options.case](options.data)))
        return 0
    generated = options.videos is None or options.data is None
    less = {"quick": options.quick, "generated": generated, "partial": options.partial}
    out = result_path(options.out, "scale_costs", **less)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if generated:
            made = demo_set(folder, 64 if options.quick else DEMO_PX)
            options.data, options.videos = options.data or made, options.videos or made.parent / "videos"
        index = open_index(options.data)
        options.crop_px = choose_crop_px(options.data, 40 if options.quick else None, CROP_PX)
        config = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
        config["load_average"] = os.getloadavg()[0]  # at the start: what else ran on these cores
        config["data"] = describe_data(index, generated)
        stages = measure_stages(options, folder)
        videos, sizes, fragments = measure_videos(options, folder)
        content = {
            "stages": stages,
            "startup": measure_startup(options),
            "videos": videos,
            "bytes": {**measure_bytes(index), **sizes},
            "join": measure_join(fragments, folder, options.rounds + 2),
            "index": measure_index(index, options, folder),
            "loader": measure_loader(
                index,
                crop_px=options.crop_px,
                batch_size=options.batch_size,
                cores=options.cores,
                batches=options.batches,
            ),
            "checkpoint": measure_checkpoint(folder, options.rounds, options.width),
        }
    write_result(out, config, **content)
    for key, value in content.items():
        print(f"{key}: {json.dumps(value)[:300]}")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
