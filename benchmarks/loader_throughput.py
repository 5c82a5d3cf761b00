"""Samples per second of the loader, beside what users would otherwise run, and beside the ceiling.

    python benchmarks/loader_throughput.py [--data PACKED] [--quick]

Every row delivers the same training batches: float32 (N, 2L, 224, 224) of stacked fields or (N, 3, 224, 224) RGB, drawn
by the same pure function; each row's first batch is compared with the reference, and one that differs ends the program.
Rounds are interleaved, the clock runs around `next()`, warm-up is outside it. The file is written after every round.

    ours_k1           this project's DALI loader
    torch_dataloader  torch DataLoader over loose JPEG files, decoded by OpenCV in worker processes, best of 1, 2, 4
    reference         the plain numpy loader that serves as the tests' oracle
    ceiling_decode    libjpeg-turbo (through OpenCV) on all cores, decoding the same bytes and nothing else
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, demo_set, describe_data, write_result

import cv2  # isort: skip
import numpy as np
import torch
from tqdm import tqdm

from loaders import dali_loader, reference
from loaders.batch import FLOW_SCALE, PCA_STD, PCA_VECTORS, RGB_MEAN, RGB_STD, StreamSpec
from loaders.draw import Population, draw_batch, population, rank_draws
from loaders.index import Index, open_index
from loaders.source import Source

SEED = 0


class LooseFiles(torch.utils.data.Dataset):
    """The usual loader: a folder of JPEG files for every video, a sample assembled by OpenCV in a worker process."""

    def __init__(self, folder: Path, index: Index, videos: Population, spec: StreamSpec, batch_size: int):
        self.folder, self.index, self.videos, self.spec, self.batch_size = folder, index, videos, spec, batch_size
        self.entries = {kind: np.array(index.entries[kind]) for kind in spec.kinds}
        self._drawn: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, item: int) -> Any:
        step, slot = divmod(item, self.batch_size)
        if self._drawn[0] != step:
            self._drawn = step, draw_batch(SEED, step, self.videos, self.spec, self.batch_size)
        draw, side = self._drawn[1], self.spec.crop_px
        video, (y0, x0) = int(draw.video[slot]), draw.crop[slot]
        window = np.s_[y0 : y0 + side, x0 : x0 + side]
        if self.spec.stream == "spatial":
            bgr = cv2.imread(self._path(video, "rgb", draw.tau[slot]))[window]
            offset = PCA_VECTORS @ (draw.alpha[slot] * PCA_STD)
            rgb = (bgr[:, :, ::-1].transpose(2, 0, 1) + (offset - RGB_MEAN)[:, None, None]) / RGB_STD[:, None, None]
            sample = rgb[:, :, ::-1] if draw.mirror[slot] else rgb
        else:
            sample = np.empty((self.spec.num_channels, side, side), np.float32)
            for step in range(self.spec.L):
                for k, kind in enumerate(self.spec.kinds):
                    frame = int(draw.tau[slot]) + step
                    entry = self.entries[kind][self.index.first_row[video] + frame]
                    component = cv2.imread(self._path(video, kind, frame), cv2.IMREAD_GRAYSCALE)[window]
                    width = FLOW_SCALE * (float(entry["hi"]) - float(entry["lo"])) / 255
                    shift = FLOW_SCALE * (float(entry["lo"]) - float(entry["mean"]))
                    if draw.mirror[slot]:
                        component = component[:, ::-1]
                        width, shift = (-width, -shift) if k == 0 else (width, shift)
                    sample[2 * step + k] = component * np.float32(width) + np.float32(shift)
        return torch.from_numpy(np.ascontiguousarray(sample, np.float32))

    def _path(self, video: int, kind: str, frame: int) -> str:
        return str(self.folder / f"{video:06d}" / f"{kind}_{frame:05d}.jpg")


def write_loose_files(folder: Path, index: Index, videos: Population, kinds: tuple[str, ...]) -> None:
    """The members of the listed videos as files, as other tools leave them."""
    for video in videos.rows.tolist():
        (folder / f"{video:06d}").mkdir(parents=True, exist_ok=True)
        with open(index.root / index.shards[index.shard[video]], "rb") as shard:
            for kind in kinds:
                first = int(index.first_row[video])
                for frame, entry in enumerate(index.entries[kind][first : first + int(index.num_frames[video])]):
                    if entry["size"]:
                        shard.seek(int(entry["offset"]))
                        (folder / f"{video:06d}" / f"{kind}_{frame:05d}.jpg").write_bytes(
                            shard.read(int(entry["size"]))
                        )


def ceiling(index: Index, videos: Population, spec: StreamSpec, batch_size: int, cores: int) -> Iterator[None]:
    """Decodes every image of a batch in full, on all cores, and keeps nothing. Bytes are read beforehand."""
    draws = rank_draws(videos, spec, seed=SEED, batch_size=batch_size, rank=0, world_size=1, start_step=0)
    source, flag = Source(index, spec), cv2.IMREAD_COLOR if spec.stream == "spatial" else cv2.IMREAD_GRAYSCALE
    batches = [source.read(next(draws)).images for _ in range(3)]
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(cores) as pool:
        while True:
            for images in batches:
                list(pool.map(lambda image: cv2.imdecode(image, flag), images, chunksize=64))
                yield


def rows(folder: Path, index: Index, spec: StreamSpec, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Name -> maker of an endless iterator, one item a batch. Several names may stand for settings of one row."""
    listed = index.split(arguments.split)
    videos = population(index, listed, spec)
    cores = arguments.cores
    options: dict[str, Any] = dict(seed=SEED, batch_size=arguments.batch_size)
    write_loose_files(folder / spec.stream, index, videos, spec.kinds)

    def torch_loader(workers: int) -> Iterator[torch.Tensor]:
        data = LooseFiles(folder / spec.stream, index, videos, spec, arguments.batch_size)
        loader = torch.utils.data.DataLoader(data, batch_size=arguments.batch_size, num_workers=workers)
        return iter(loader)

    def project_loader(module: Any, **more: Any) -> Iterator[torch.Tensor]:
        with module.train_loader(index, listed, spec, **options, **more) as loader:
            for batch in loader:
                yield batch.inputs

    makers: dict[str, Callable[[], Any]] = {
        "ours_k1": lambda: project_loader(dali_loader, device=arguments.device, num_threads=cores)
    }
    for workers in (count for count in (1, 2, 4) if count == 1 or count <= cores):
        makers[f"torch_dataloader:{workers}"] = lambda workers=workers: torch_loader(workers)
    makers["reference"] = lambda: project_loader(reference)
    makers["ceiling_decode"] = lambda: ceiling(index, videos, spec, arguments.batch_size, cores)
    return makers


def measure(
    makers: dict[str, Callable[[], Any]], tolerance: float, arguments: argparse.Namespace, progress: Any
) -> Iterator[dict[str, list[float]]]:
    """Samples/s of every row so far, after every round. A round takes each row in turn, at least `seconds` long.

    tolerance: largest difference of a row's first batch from the reference's.
    """
    rates: dict[str, list[float]] = {name: [] for name in makers}
    expected = next(makers["reference"]())
    for round_ in range(arguments.rounds):
        for name, make in makers.items():
            batches = make()
            first = next(batches)  # warm-up: starts workers, fills queues
            if round_ == 0 and first is not None and (first.cpu() - expected).abs().max() > tolerance:
                sys.exit(f"{name} delivers another first batch than the reference, so its rate means nothing")
            next(batches)
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < arguments.seconds:
                next(batches)
                count += 1
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            rates[name].append(count * arguments.batch_size / (time.perf_counter() - start))
            if isinstance(batches, Generator):
                batches.close()  # ends its threads and frees its buffers before the next row
            del batches, first
            progress.update()
        yield rates


def largest_difference(index: Index, spec: StreamSpec, device: str) -> float:
    """What two right decoders may differ by, in network inputs: nothing on the CPU, two codes on a GPU."""
    if device == "cpu":
        return 1e-3
    if spec.stream == "spatial":
        return 2.01 / float(RGB_STD.min())
    widest = max(float((index.entries[kind]["hi"] - index.entries[kind]["lo"]).max()) for kind in spec.kinds)
    return 2.01 * FLOW_SCALE * widest / 255


def summarise(stream: str, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a name; of the settings of one name the best. Ratios are of medians of the same run."""
    best: dict[str, tuple[str, list[float]]] = {}
    for name, values in rates.items():
        key = name.split(":")[0]
        if key not in best or median(values) > median(best[key][1]):
            best[key] = name, values
    torch_rate, top = median(best["torch_dataloader"][1]), median(best["ceiling_decode"][1])
    return [
        {
            "stream": stream,
            "name": key,
            "setting": name.partition(":")[2] and f"{name.partition(':')[2]} workers",
            "samples_per_s": {"median": median(values), "min": min(values), "max": max(values)},
            "ratio_to_torch_dataloader": median(values) / torch_rate,
            "ratio_to_ceiling": median(values) / top,
        }
        for key, (name, values) in best.items()
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    import os

    parser = argparse.ArgumentParser(description="Loader throughput beside its peers and its ceiling.")
    parser.add_argument("--data", type=Path, help="packed data set; default: the generated demo set at 256 px")
    parser.add_argument("--split", default="split1_train", help="list of videos (default: %(default)s)")
    parser.add_argument("--streams", nargs="+", choices=["temporal", "spatial"], default=["temporal", "spatial"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row and round")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="threads, and most workers")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader_throughput.json")
    parser.add_argument("--quick", action="store_true", help="one short round on small crops: does it run?")
    arguments = parser.parse_args(argv)
    arguments.L, arguments.crop_px = (2, 40) if arguments.quick else (10, 224)
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.batch_size = 1, 0.2, 8
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index = open_index(arguments.data or demo_set(folder, 256 if not arguments.quick else 64))
        for stream in arguments.streams:
            spec = StreamSpec(stream=stream, L=arguments.L, crop_px=arguments.crop_px)
            makers = rows(folder, index, spec, arguments)
            tolerance = largest_difference(index, spec, arguments.device)
            config = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
            config |= {"data": describe_data(index, arguments.data is None)}
            done = table
            with tqdm(total=len(makers) * arguments.rounds, desc=stream, disable=None) as progress:
                for rates in measure(makers, tolerance, arguments, progress):
                    table = done + summarise(stream, rates)
                    write_result(arguments.out, config, rows=table)
    for row in table:
        rate = row["samples_per_s"]
        print(
            f"{row['stream']:9} {row['name']:17} {rate['median']:8.0f} samples/s ({rate['min']:.0f}-{rate['max']:.0f})"
            f"  {row['ratio_to_torch_dataloader']:5.2f} x torch DataLoader  {row['ratio_to_ceiling']:5.2f} x ceiling"
            f"  {row['setting']}"
        )
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
