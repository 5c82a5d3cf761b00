"""What scale_model.py computes with: figures measured here, by results file, and assumptions, each with its source."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from scaling_model import Parts

#: The paper's batch (sec. 5), and shards of a pool.
BATCH, POOL_SHARDS = 256, 256


class Assumption(NamedTuple):
    """A figure that nobody measured here. checked: whether its source was looked at for it."""

    value: float
    unit: str
    source: str
    checked: bool = True


SOOMRO = "Soomro et al. 2012, arXiv:1212.0402"
CARREIRA = "Carreira et al. 2019, arXiv:1907.06987"
KARPATHY = "Karpathy et al. 2014"
OURS = "assumed"
AWS = "Amazon S3 user guide, optimizing performance"

ASSUMPTIONS: dict[str, Assumption] = {
    "ucf101_videos": Assumption(13_320, "videos", SOOMRO),
    "ucf101_s": Assumption(7.21, "s a video", SOOMRO),
    "kinetics700_videos": Assumption(650_317, "videos", f"{CARREIRA}, which says about 650,000 in its text", False),
    "kinetics700_s": Assumption(10.0, "s a video", CARREIRA),
    "sports1m_videos": Assumption(1_133_158, "videos", f"{KARPATHY}, the data set's page"),
    "sports1m_s": Assumption(336.0, "s a video", f"{KARPATHY}, 5 min 36 s", False),
    "sports1m_sigma": Assumption(1.0, "log s", f"{OURS}: lengths are log-normal", False),
    "frames_per_s": Assumption(25.0, "frames/s", f"{SOOMRO}; assumed of the others, whose rates differ"),
    "wide": Assumption(16 / 9, "width to height", f"{OURS} of Kinetics-700 and Sports-1M", False),
    "cores": Assumption(16, "cores a node", OURS, False),
    "gpu_tflops": Assumption(100.0, "TFLOP/s a node", f"{OURS}: one GPU that is never idle; none was measured", False),
    "card_gbit_per_s": Assumption(25.0, "Gbit/s", f"{OURS}: Ethernet of today; 10 and 100 are simulated too", False),
    "connection_mb_per_s": Assumption(85.0, "MB/s a connection", f"{AWS}: 85 to 90 a request", False),
    "latency_s": Assumption(0.15, "s to the first byte", f"{AWS}: 0.1 to 0.2"),
    "connections": Assumption(8, "connections a shard", OURS, False),
    "store_gbit_per_s": Assumption(100.0, "Gbit/s", f"{OURS}: all that the store gives all nodes together", False),
    "mean_up_h": Assumption(
        6_200, "hours", "Dubey et al. 2024, arXiv:2407.21783: 419 failures in 54 days of 2,048 machines", False
    ),
    "repair_h": Assumption(0.5, "hours", OURS, False),
    "ahead_steps": Assumption(50, "steps", f"{OURS}: how long ahead a loader knows its shards", False),
    "at_a_time": Assumption(4, "fetches a node", OURS, False),
}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A set to be packed. pixels: of a frame, smaller side 256 px. videos_per_shard: as it should be packed."""

    name: str
    title: str
    num_videos: int
    mean_s: float
    pixels: float
    videos_per_shard: int

    @property
    def num_frames(self) -> float:
        return self.num_videos * self.mean_s * ASSUMPTIONS["frames_per_s"].value

    def lengths(self, measured: np.ndarray, num_videos: int, rng: np.random.Generator) -> np.ndarray:
        """Frames of so many of its videos, in random order, with the mean of all.

        UCF-101: as the measured ones (n,) are spread; Kinetics-700 and cut videos: all alike; Sports-1M: log-normal.
        """
        mean = self.num_frames / self.num_videos
        if self.name == "ucf101":
            lengths = rng.choice(measured, num_videos)
        elif self.name == "sports1m":
            lengths = rng.lognormal(0.0, ASSUMPTIONS["sports1m_sigma"].value, num_videos)
        else:
            lengths = np.ones(num_videos)
        return np.maximum(2, np.rint(lengths * mean / lengths.mean()))


def datasets() -> list[Dataset]:
    """The sets of docs/scale.md, the smallest first. Videos to a shard keep it below about half a gigabyte."""
    value = {key: assumption.value for key, assumption in ASSUMPTIONS.items()}
    narrow, wide = 256 * 341, 256 * round(256 * value["wide"])
    kinetics, sports = int(value["kinetics700_videos"]), int(value["sports1m_videos"])
    rows = [
        ("ucf101", "UCF-101", int(value["ucf101_videos"]), value["ucf101_s"], narrow, 32),
        ("kinetics700", "Kinetics-700", kinetics, value["kinetics700_s"], wide, 32),
        ("sports1m_10s", "Sports-1M, 10 s of each", sports, 10.0, wide, 32),
        ("sports1m", "Sports-1M", sports, value["sports1m_s"], wide, 1),
    ]
    keys = ("name", "title", "num_videos", "mean_s", "pixels", "videos_per_shard")
    return [Dataset(**dict(zip(keys, row, strict=True))) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures of results files: seconds of one core, bytes, bytes/s, samples/s.

    flow_s: method -> of a pair of frames. around_s: decoding, resizing and coding of a frame. frame_bytes: of all that
    a frame takes in a shard. pixels: of the frames that this was measured on. pace, batch_pace: multiples of the mean.
    backward_ratio: of the time with backward fields to that without. loader_core_samples_per_s: stacks a window -> of
    one core. hidden_share: of a step, in which gradients can travel.
    cpu_samples_per_s: training on the cores of this machine. fetches: nodes -> those that need a shard.
    """

    flow_s: dict[str, float]
    around_s: float
    frame_bytes: float
    backward_bytes: float
    backward_ratio: float
    pixels: float
    pace: np.ndarray
    lengths: np.ndarray
    startup_s: float
    join_bytes_per_s: float
    receive_bytes_per_s: float
    hash_bytes_per_s: float
    index_frames_per_s: float
    index_frame_bytes: float
    index_memory_frame_bytes: float
    first_batch_s_per_video: float
    loader_core_samples_per_s: dict[int, float]
    batch_pace: np.ndarray
    flops_per_sample: float
    hidden_share: float
    cpu_samples_per_s: float
    cpu_cores: int
    gradient_bytes: float
    checkpoint_s: float
    fetches: dict[int, float]

    def extraction_s(self, method: str, pixels: float) -> float:
        """Seconds of a core for a frame and its field; they grow with the pixels."""
        return (self.flow_s[method] + self.around_s) * pixels / self.pixels

    def bytes_of(self, pixels: float, backward: bool = False) -> float:
        """Bytes of a frame in a shard; they grow with the pixels."""
        return (self.frame_bytes + backward * self.backward_bytes) * pixels / self.pixels

    def fetches_of(self, nodes: int) -> float:
        """Nodes that fetch a shard: linear between the numbers of nodes that the draw's statistics have, for any batch.

        Each window is drawn from its own part of the ring, so only shards at the nodes - 1 borders between arcs are
        needed twice: 1 + c (nodes - 1) / POOL_SHARDS of all, where c = 1 for borders that stand still. A border wanders
        alike with any batch in the time that a shard stays, if a pass takes the same number of samples.
        """
        known = sorted(self.fetches)
        return min(nodes, float(np.interp(nodes, known, [self.fetches[n] for n in known])))


def read_measured(results: Path) -> Measured:
    """From a folder of results files. Raises FileNotFoundError if one that is needed is not there."""
    names = (
        "scale_costs",
        "flow_extraction",
        "footprint",
        "loader_throughput",
        "train_step",
        "scaling",
        "ray_overhead",
    )
    costs, extraction, footprint, throughput, step, scaling, ray = (_read(results / f"{name}.json") for name in names)
    stages = {(row["stage"], row["processes"]): row["ms_per_frame"]["median"] / 1e3 for row in costs["stages"]}
    cores = max(n for _, n in stages)
    opened = [row for row in footprint["rows"] if row["case"] == "open"]
    loaders = {row["name"]: row["samples_per_s"]["median"] for row in _sound(throughput) if row["stream"] == "temporal"}
    resident = next(row for row in step["rows"] if row["name"] == "resident")
    each, batches = costs["bytes"], np.array(costs["loader"]["batch_s"])
    backward = each["backward_field"] / each["forward_field_of_the_same"] * each["forward_field"]
    return Measured(
        flow_s={row["name"]: row["cpu_s_per_pair"] for row in _sound(extraction) if "flow" in row},
        around_s=stages["decode_resize", cores] + stages["code", cores],
        frame_bytes=each["rgb_frame"] + each["forward_field"] + each["tar_per_frame"],
        backward_bytes=backward + each["tar_per_frame"] * 2 / 3,  # two members more than three
        backward_ratio=costs["videos"]["backward_ratio"],
        pixels=each["pixels"],
        pace=np.array(costs["videos"]["pace"]),
        lengths=np.array(costs["videos"]["lengths_frames"]),
        startup_s=next(row["s"]["median"] for row in costs["startup"] if row["processes"] == cores),
        # By the clock: the fastest round, since whatever else ran made the others slower.
        join_bytes_per_s=1e6 * costs["join"]["mb_per_s"]["max"],
        receive_bytes_per_s=1e6 * ray["taken_mb_per_s"]["max"],
        hash_bytes_per_s=1e6 * costs["join"]["sha256_mb_per_s"]["max"],
        index_frames_per_s=costs["index"]["frames_per_s"]["max"],
        index_frame_bytes=costs["index"]["bytes_per_frame"],
        index_memory_frame_bytes=costs["index"]["memory_bytes_per_frame"],
        first_batch_s_per_video=median(row["first_batch_s"] / row["videos"] for row in opened),
        loader_core_samples_per_s={k: loaders[f"ours_k{k}"] / throughput["config"]["cores"] for k in (1, 4, 8)},
        batch_pace=batches / batches.mean(),
        flops_per_sample=step["flops_per_sample"],
        hidden_share=median(scaling["parts"]["hidden_s"][n] / s for n, s in scaling["parts"]["step_s"].items()),
        cpu_samples_per_s=resident["samples_per_s"]["median"],
        cpu_cores=step["config"]["threads"],
        gradient_bytes=costs["checkpoint"]["gradient_bytes"],
        checkpoint_s=costs["checkpoint"]["write_s"]["median"],
        fetches=_read_fetches(results / "draw_statistics.json"),
    )


def _read_fetches(path: Path) -> dict[int, float]:
    """Nodes -> nodes that fetch a shard, of a pool of POOL_SHARDS of Kinetics-700 and the paper's batch: {"rows":
    [{"set", "pool_shards", "batch_size", "machines": [{"world_size", "fetches_per_shard"}, ...]}, ...]}."""
    for row in _read(path)["rows"]:
        if row["set"].startswith("Kinetics") and (row["pool_shards"], row["batch_size"]) == (POOL_SHARDS, BATCH):
            return {found["world_size"]: found["fetches_per_shard"] for found in row["machines"]}
    raise ValueError(
        f"{path} has no row of Kinetics-700 with a pool of {POOL_SHARDS} and a batch of {BATCH}; measure it without "
        "--data: python benchmarks/draw_statistics.py"
    )


def _sound(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "error" not in row]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def parts_of(samples_per_s: float, num_samples: int, measured: Measured, link_bytes_per_s: float) -> Parts:
    """A device that computes so many samples/s, as `scaling_model` describes it."""
    step_s = num_samples / samples_per_s
    return Parts(
        step_s={num_samples: step_s},
        hidden_s={num_samples: measured.hidden_share * step_s},
        gradient_bytes=measured.gradient_bytes,
        link_bytes_per_s=link_bytes_per_s,
    )
