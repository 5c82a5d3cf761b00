"""What a packed set holds, in numbers: counts, bytes, frames per video, motion per class, damage. See `flow.browse`.

Counts and bytes are those of the index, all of them; motion is measured on a seeded sample of each class's fields.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flow.clips import decode_image, read_image
from flow.codec import dequantise
from flow.command import did_you_mean
from flow.index import INDEX_NAME, decode_names, image_places, load_set
from flow.resume import BAD_NAME
from flow.shard import ShardError
from flow.untrusted import open_regular, read_lines
from flow.verify import size_damage

Ints = npt.NDArray[np.int64]
#: Codes (H, W) of a component, and its lo, hi and mean in px/frame.
Component = tuple[npt.NDArray[np.uint8], tuple[float, float, float]]

#: Fields of a class that its motion is measured on.
SAMPLE_FIELDS = 48

#: A stack of the paper has L = 10 fields, which lie between 11 frames.
STACK_L = 10

_MAX_NAMED = 20
_MAX_BINS = 30
_CHUNK = 16_384


class PackedSet:
    """A packed set, opened to be looked at.

    dataset: content of dataset.json.              classes: names, label k is classes[k]
    labels, num_frames: (num_videos,) int64.       damages: lines, what was found so far, in that order
    damaged_videos: ids of the videos that were found damaged

    Raises ValueError and ShardError as `flow.index.load_set` does.
    """

    def __init__(self, root: Path):
        self.root = root
        self.dataset, self._header, self.arrays = load_set(root)
        self.classes: list[str] = [entry["name"] for entry in self.dataset["classes"]]
        self.labels: Ints = self.arrays["videos"]["label"].astype(np.int64)
        self.num_frames: Ints = self.arrays["videos"]["num_frames"].astype(np.int64)
        self.damages: dict[str, None] = {}
        self.damaged_videos: dict[str, None] = {}
        self._absent = set()
        for shard in self.dataset["shards"]:
            if wrong := size_damage(root / shard["name"], shard["bytes"]):
                self.damages[wrong] = None
            if not (root / shard["name"]).is_file():
                self._absent.add(shard["name"])

    def video_ids(self, numbers: Sequence[int] | Ints) -> list[str]:
        return decode_names(self.arrays["names"], self.arrays["videos"][np.asarray(numbers, np.int64)])

    def size_px(self, numbers: Sequence[int] | Ints | slice) -> list[int]:
        """Smallest and largest of the smaller sides of some videos' frames, in px."""
        videos = self.arrays["videos"][numbers]
        short_px = np.minimum(videos["height"], videos["width"])
        return [int(short_px.min()), int(short_px.max())]

    @cached_property
    def members(self) -> dict[str, tuple[Ints, Ints]]:
        """Kind -> images and bytes of every video, each (num_videos,)."""
        first_row = self.arrays["videos"]["first_row"].astype(np.int64)
        ends = first_row + self.num_frames
        kinds = [kind for kind in self.arrays if kind not in ("videos", "names")]
        counted: dict[str, tuple[Ints, Ints]] = {kind: (np.zeros_like(ends), np.zeros_like(ends)) for kind in kinds}
        with tqdm(total=len(ends) * len(kinds), unit="video", desc="index", disable=None) as bar:
            for kind, (images, num_bytes) in counted.items():
                for at in range(0, len(ends), _CHUNK):  # a chunk's rows are all that is in memory at a time
                    starts = first_row[at : at + _CHUNK]
                    sizes = self.arrays[kind]["size"][starts[0] : ends[at : at + _CHUNK][-1]].astype(np.int64)
                    images[at : at + _CHUNK] = np.add.reduceat(sizes > 0, starts - starts[0], dtype=np.int64)
                    num_bytes[at : at + _CHUNK] = np.add.reduceat(sizes, starts - starts[0])
                    bar.update(len(starts))
        return counted

    @cached_property
    def num_fields(self) -> Ints:
        """Forward fields of every video (num_videos,)."""
        return self.count("dx")[0]

    def count(self, *kinds: str) -> tuple[Ints, Ints]:
        """Images and bytes of some kinds, in every video; of fields, dx and dy are an image each."""
        zero = np.zeros(len(self.labels), np.int64)
        found = [self.members[kind] for kind in kinds if kind in self.members]
        return sum((images for images, _ in found), zero), sum((num_bytes for _, num_bytes in found), zero)

    def read_frame(self, number: int, t: int) -> npt.NDArray[np.uint8] | None:
        """RGB frame t (H, W, 3) of a video; None if it is not there, or damaged, which is noted."""
        read = self._read(number, "rgb", t)
        return read[0] if read else None

    def read_field(self, number: int, t: int) -> list[Component] | None:
        """dx and dy of d_t; None if the video has no fields, or as of `read_frame`."""
        if not self.num_fields[number]:
            return None
        dx, dy = (self._read(number, kind, t) for kind in ("dx", "dy"))
        return [dx, dy] if dx and dy else None

    def _read(self, number: int, kind: str, t: int) -> Component | None:
        there = kind in self.arrays
        places = list(image_places(self._header, self.arrays, number, kind, np.array([t]))) if there else []
        if not places:
            rebuild = f"Rebuild it: `python -m flow.verify {self.root} --rebuild-index`."
            self._note(number, f"{INDEX_NAME}: {self.video_ids([number])[0]} has no {kind} of frame {t}. {rebuild}")
        for place in places:
            if place.shard not in self._absent:
                try:
                    with open_regular(self.root / place.shard) as file:
                        image = decode_image(read_image(file, place), place)
                    return image, (0.0, 0.0, 0.0) if kind == "rgb" else place.range_px
                except ShardError as error:
                    self._note(number, str(error))
        return None

    def _note(self, number: int, wrong: str) -> None:
        (video_id,) = self.video_ids([number])
        self.damages[wrong] = self.damaged_videos[video_id] = None

    def labels_of(self, names: Sequence[str] | None) -> list[int]:
        """Labels of some classes, in order; without names of all. Raises ValueError that names the nearest class."""
        for name in names or ():
            if name not in self.classes:
                raise ValueError(
                    f"{self.root} has no class {name!r:.200}.{did_you_mean(name, self.classes)} It has "
                    f"{len(self.classes):,}; dataset.json lists them."
                )
        return [label for label, name in enumerate(self.classes) if names is None or name in names]

    @cached_property
    def _by_class(self) -> tuple[Ints, Ints]:
        order = np.argsort(self.labels, kind="stable")
        return order, np.searchsorted(self.labels[order], np.arange(len(self.classes) + 1))

    def draw_videos(self, label: int, seed: int) -> Ints:
        """Numbers of a class's videos in a seeded order, that of no other class."""
        order, at = self._by_class
        return np.random.default_rng([seed, label]).permutation(order[at[label] : at[label + 1]])


def survey(packed: PackedSet, labels: Sequence[int], seed: int, sample: int) -> dict[str, Any]:
    """All numbers, as JSON has them: of the whole set, and of the classes with these labels.

    sample: fields of each class that its motion is measured on, from as many videos as there are.
    """
    motion = _measure_motion(packed, labels, seed, sample)
    return {
        "root": str(packed.root),
        **{key: packed.dataset.get(key) for key in ("name", "flow", "codec", "backward")},
        "size_px": packed.size_px(slice(None)),
        "splits": {path.stem: len(read_lines(path)) for path in sorted((packed.root / "splits").glob("*.txt"))},
        "num_classes": len(packed.classes),
        **_totals(packed),
        "frames_per_video": _frames_per_video(packed),
        "seed": seed,
        "classes": [{**entry, "motion": motion[entry["name"]]} for entry in _class_counts(packed, labels)],
        "short": _short_videos(packed),
        "left_out": _left_out(packed.root),
    }


def _totals(packed: PackedSet) -> dict[str, int | float | None]:
    """Counts and bytes of the whole set; a frame's and a field's mean bytes, None where there are none."""
    (frames, rgb_bytes), (components, flow_bytes) = packed.count("rgb"), packed.count("dx", "dy", "bdx", "bdy")
    num_fields = int(components.sum()) // 2
    backward = int(packed.count("bdx")[0].sum())
    num_frames = int(frames.sum())
    return {
        "num_videos": len(frames),
        "num_frames": num_frames,
        "num_fields": num_fields - backward,
        "num_backward_fields": backward,
        "bytes": sum(shard["bytes"] for shard in packed.dataset["shards"]),
        "rgb_bytes": int(rgb_bytes.sum()),
        "flow_bytes": int(flow_bytes.sum()),
        "bytes_per_frame": int(rgb_bytes.sum()) / num_frames if num_frames else None,
        "bytes_per_field": int(flow_bytes.sum()) / num_fields if num_fields else None,
    }


def _frames_per_video(packed: PackedSet) -> dict[str, Any]:
    """Shortest, median, mean, longest; counts of bins, bin i from edges[i] on, before edges[i + 1]."""
    counts = packed.num_frames
    ends = [int(counts.argmin()), int(counts.argmax())]
    low, high = (int(counts[end]) for end in ends)
    step = -(-(high - low + 1) // _MAX_BINS)
    edges = np.arange(low, high + step + 1, step)
    named = [
        {"video": video_id, "num_frames": int(counts[end])}
        for end, video_id in zip(ends, packed.video_ids(ends), strict=True)
    ]
    return {
        "shortest": named[0],
        "longest": named[1],
        "mean": float(counts.mean()),
        "median": float(np.median(counts)),
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(counts, edges)[0].tolist()},
    }


def _class_counts(packed: PackedSet, labels: Sequence[int]) -> Iterator[dict[str, Any]]:
    parts = {
        "num_videos": np.ones(len(packed.labels), np.int64),
        "num_frames": packed.count("rgb")[0],
        "num_fields": packed.num_fields,
        "rgb_bytes": packed.count("rgb")[1],
        "flow_bytes": packed.count("dx", "dy", "bdx", "bdy")[1],
    }
    sums = {key: np.bincount(packed.labels, values, len(packed.classes)) for key, values in parts.items()}
    for label in labels:
        entry = packed.dataset["classes"][label]
        counts = {key: int(values[label]) for key, values in sums.items()}
        yield {"name": entry["name"], "official_id": entry["official_id"], **counts}


def _short_videos(packed: PackedSet) -> dict[str, Any] | None:
    """Videos with too few frames for a stack, and for a single field; None for images, which have no fields."""
    if "dx" not in packed.arrays:
        return None
    found: dict[str, Any] = {"L": STACK_L}
    for key, least in (("no_stack", STACK_L + 1), ("no_field", 2)):
        short = np.flatnonzero(packed.num_frames < least)
        found[key] = {"num_videos": len(short), "first": packed.video_ids(short[:_MAX_NAMED])}
    return found


def _left_out(root: Path) -> dict[str, Any]:
    """What the lists say that packing left behind: bad videos with their reasons, the first ones, and missing ones."""
    bad, missing = (
        read_lines(root / name) if (root / name).exists() else [] for name in (BAD_NAME, "missing_videos.txt")
    )
    first = [line.partition("\t") for line in bad[:_MAX_NAMED]]
    return {
        "num_bad": len(bad),
        "first_bad": [{"video": video_id, "reason": reason} for video_id, _, reason in first],
        "num_missing": len(missing),
    }


# --- motion ------------------------------------------------------------------------------------------------------


def _measure_motion(packed: PackedSet, labels: Sequence[int], seed: int, sample: int) -> dict[str, Any]:
    """Class -> mean length of its displacements, px/frame, and on what it was measured; None if it has no field."""
    drawn = {label: _draw_fields(packed, label, seed, sample) for label in labels}
    found: dict[str, Any] = {}
    with tqdm(total=sum(map(len, drawn.values())), unit="field", desc="motion", disable=None) as bar:
        for label, fields in drawn.items():
            lengths = {}
            for number, t in fields:
                if components := packed.read_field(number, t):
                    lengths[number, t] = _lengths(components)
                bar.update()
            videos = sorted({number for number, _ in lengths})
            whole, less_mean = np.mean(list(lengths.values()), axis=0).tolist() if lengths else (None, None)
            found[packed.classes[label]] = lengths and {
                "px_per_frame": whole,
                "less_mean_px_per_frame": less_mean,
                "num_fields": len(lengths),
                "num_videos": len(videos),
                "size_px": packed.size_px(videos),
            }
    return {name: motion or None for name, motion in found.items()}


def _draw_fields(packed: PackedSet, label: int, seed: int, sample: int) -> list[tuple[int, int]]:
    """Videos and times of a class's fields: of as many videos as there are, up to `sample`, as evenly as they allow."""
    videos = packed.draw_videos(label, seed)
    videos = videos[packed.num_fields[videos] > 0][:sample]
    rng = np.random.default_rng([seed, label, 1])
    drawn: list[tuple[int, int]] = []
    for k, number in enumerate(videos.tolist()):
        share = -(-(sample - len(drawn)) // (len(videos) - k))
        num_fields = int(packed.num_fields[number])
        times = rng.choice(num_fields, min(share, num_fields), replace=False)
        drawn += [(number, t) for t in sorted(times.tolist())]
    return drawn


def _lengths(components: list[Component]) -> tuple[float, float]:
    """Mean length of a field's displacements in px/frame; and of what is left of them less the field's mean vector."""
    field = np.stack([dequantise(codes, lo, hi) for codes, (lo, hi, _) in components])
    mean = np.array([mean for _, (_, _, mean) in components], np.float32)
    return float(np.hypot(*field).mean()), float(np.hypot(*(field - mean[:, None, None])).mean())
