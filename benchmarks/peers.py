"""What users would otherwise run, each as its own documentation advises: rows of `loader_throughput.py`.

All deliver what the paper asks for, stacks less their fields' means, cropped and mirrored at random; a peer that cannot
draw as this project does reports what it drew.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from row import Delivered, Job

from loaders.batch import FLOW_SCALE, PCA_ALPHA_STD, PCA_STD, PCA_VECTORS, RGB_MEAN, RGB_STD, StreamSpec
from loaders.draw import Draw, draw_batch, population
from loaders.index import Index, open_index

#: Stacks, or clips, in the shuffle buffers of the two peers that read shards from end to end.
SHUFFLE_BUFFER = 64


def assemble(
    jpegs: list[Any], stored: list[Any], spec: StreamSpec, *, crop: np.ndarray, mirror: bool, alpha: np.ndarray
) -> np.ndarray:
    """Network input (C, crop, crop) float32 of one sample, as one writes it with OpenCV: each image is decoded, cropped
    and mirrored while it is 8-bit codes, then multiplied and shifted in its place in the result.

    jpegs: its frame, or its 2L components in channel order, with `stored` their ranges and means.
    """
    (y0, x0), side = crop.tolist(), spec.crop_px
    sample = np.empty((spec.num_channels, side, side), np.float32)

    def decoded(jpeg: Any, flag: int) -> np.ndarray:
        codes = cv2.imdecode(jpeg, flag)[y0 : y0 + side, x0 : x0 + side]
        return cv2.flip(codes, 1) if mirror else codes

    if spec.stream == "spatial":
        blue, green, red = cv2.split(decoded(jpegs[0], cv2.IMREAD_COLOR))
        shifts = (PCA_VECTORS @ (alpha * PCA_STD) - RGB_MEAN) / RGB_STD
        for plane, factor, shift, out in zip((red, green, blue), 1 / RGB_STD, shifts, sample, strict=True):
            multiply_add(plane, factor, shift, out)
    else:
        for channel, (jpeg, of, out) in enumerate(zip(jpegs, stored, sample, strict=True)):
            sign = -FLOW_SCALE if mirror and channel % 2 == 0 else FLOW_SCALE
            factor, shift = sign * (of["hi"] - of["lo"]) / 255, sign * (of["lo"] - of["mean"])
            multiply_add(decoded(jpeg, cv2.IMREAD_GRAYSCALE), factor, shift, out)
    return sample


def multiply_add(codes: np.ndarray, factor: float, shift: float, out: np.ndarray) -> None:
    """out = codes * factor + shift. Two passes over what a cache holds are a third faster than cv2.LUT with floats."""
    np.multiply(codes, np.float32(factor), out=out)
    out += np.float32(shift)


# --- torch DataLoader over loose files ---------------------------------------------------------------------------


def write_loose_files(folder: Path, index: Index, rows: np.ndarray, kinds: tuple[str, ...]) -> None:
    """The members of the videos in `rows` as files, as other tools leave them."""
    for video in rows.tolist():
        (folder / f"{video:06d}").mkdir(parents=True, exist_ok=True)
        with open(index.root / index.shards[index.shard[video]], "rb") as shard:
            for kind in kinds:
                first = int(index.first_row[video])
                for frame, entry in enumerate(index.entries[kind][first : first + int(index.num_frames[video])]):
                    if entry["size"]:
                        shard.seek(int(entry["offset"]))
                        path = folder / f"{video:06d}" / f"{kind}_{frame:05d}.jpg"
                        path.write_bytes(shard.read(int(entry["size"])))


class LooseFiles(torch.utils.data.Dataset):
    """The usual loader: a folder of JPEG files for every video, a sample assembled by OpenCV in a worker process."""

    def __init__(self, job: Job):
        self.job, self.index = job, open_index(job.root)
        self.videos = population(self.index, self.index.split(job.split), job.spec)
        self._drawn: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return 1 << 40

    def draw(self, step: int) -> Draw:
        return draw_batch(self.job.seed, step, self.videos, self.job.spec, self.job.batch_size)

    def __getitem__(self, item: int) -> torch.Tensor:
        step, slot = divmod(item, self.job.batch_size)
        if self._drawn[0] != step:
            self._drawn = step, self.draw(step)
        draw, spec = self._drawn[1], self.job.spec
        video, tau = int(draw.video[slot]), int(draw.tau[slot])
        jpegs, stored = [], []
        for frame in range(tau, tau + spec.steps):
            for kind in spec.kinds:
                path = self.job.loose / f"{video:06d}" / f"{kind}_{frame:05d}.jpg"
                jpegs.append(np.fromfile(path, np.uint8))
                stored.append(self.index.entries[kind][self.index.first_row[video] + frame])
        view = {"crop": draw.crop[slot], "mirror": bool(draw.mirror[slot]), "alpha": draw.alpha[slot]}
        return torch.from_numpy(assemble(jpegs, stored, spec, **view))


def torch_dataloader(job: Job) -> Iterator[Delivered]:
    """torch's DataLoader over loose JPEG files, as the common frameworks load flow. Draws as this project does."""
    data, pinned = LooseFiles(job), job.device == "cuda"
    loader = torch.utils.data.DataLoader(data, batch_size=job.batch_size, num_workers=job.workers, pin_memory=pinned)
    for step, inputs in enumerate(loader):
        yield Delivered(inputs.to(job.device, non_blocking=True), partial(data.draw, step))


# --- webdataset --------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """A sample that the webdataset peer chose. crop (2,): y0, x0 in px; alpha (3,): weights of colour components."""

    video_id: str
    tau: int
    crop: np.ndarray
    mirror: bool
    alpha: np.ndarray


def webdataset(job: Job) -> Iterator[Delivered]:
    """The `webdataset` package over the shards: random shards, read from end to end; a random stack of every clip.

    Its reader gives whole clips and no list of videos, so all videos of the shards take part; members of other kinds
    are skipped unread as far as a tar allows. What is shuffled are the encoded stacks, which are small.
    """
    import webdataset as wds

    index, spec = open_index(job.root), job.spec
    wanted = ("json", *(f"{kind}.jpg" for kind in spec.kinds))

    def choose(clips: Iterator[dict[str, Any]]) -> Iterator[Any]:
        rng = np.random.default_rng()  # another one in every worker
        for clip in clips:
            if (chosen := choose_stack(clip, spec, rng)) is not None:
                yield chosen

    def decode(chosen: tuple[Any, Any, View]) -> tuple[np.ndarray, View]:
        jpegs, stored, view = chosen
        return assemble(jpegs, stored, spec, crop=view.crop, mirror=view.mirror, alpha=view.alpha), view

    def collate(samples: list[tuple[np.ndarray, View]]) -> tuple[torch.Tensor, list[View]]:
        inputs, views = zip(*samples, strict=True)
        return torch.utils.data.default_collate(inputs), list(views)  # written once, where the main process reads it

    shards = [str(index.root / shard) for shard in index.shards]
    dataset = wds.WebDataset(
        shards, resampled=True, shardshuffle=False, select_files=lambda name: name.endswith(wanted)
    )
    dataset = dataset.compose(choose).shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER).map(decode)
    dataset = dataset.batched(job.batch_size, collation_fn=collate, partial=False)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=job.workers, pin_memory=job.device == "cuda")
    for inputs, views in loader:
        yield Delivered(inputs.to(job.device, non_blocking=True), partial(draw_of, views, index))


def choose_stack(
    clip: dict[str, Any], spec: StreamSpec, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[dict[str, float]], View] | None:
    """A random view of a clip: its encoded images, their ranges and means, and the view; None if it is too short."""
    header = json.loads(clip["json"])
    columns = [header["members"].get(kind) for kind in spec.kinds]
    if columns[0] is None or len(columns[0]["size"]) < spec.steps:
        return None
    tau = columns[0]["first"] + int(rng.integers(len(columns[0]["size"]) - spec.steps + 1))
    border = [header["height"] - spec.crop_px + 1, header["width"] - spec.crop_px + 1]
    frames = range(tau, tau + spec.steps)
    jpegs = [clip[f"{t - header['first_frame']:03d}.{kind}.jpg"] for t in frames for kind in spec.kinds]
    alpha = rng.normal(0, PCA_ALPHA_STD, 3).astype(np.float32)
    view = View(header["video_id"], tau, rng.integers(border), bool(rng.random() < 0.5), alpha)
    stored = [_stored(column, t) for t in frames for column in columns] if spec.stream == "temporal" else []
    return [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs], stored, view


def _stored(column: dict[str, Any], frame: int) -> dict[str, float]:
    """Range and mean of a component, from the clip's JSON."""
    return {key: column[key][frame - column["first"]] for key in ("lo", "hi", "mean")}


def draw_of(views: list[View], index: Index) -> Draw:
    """The draw of a batch of views."""
    video_ids, taus, crops, mirrors, alphas = zip(*views, strict=True)
    return Draw.of_stacks(index.rows(video_ids), np.array(taus), np.stack(crops), np.array(mirrors), np.stack(alphas))


# --- a textbook DALI graph ---------------------------------------------------------------------------------------


def dali_textbook(job: Job) -> Iterator[Delivered]:
    """A graph as in DALI's tutorials: its WebDataset reader, a decoder for every channel, a concatenation.

    The reader names a sample's members by their extensions, so its stack is always the first L fields of a clip; clips
    without them are left out, and the videos are those of all shards. Ranges and means come as the clip's JSON and are
    applied in place by torch. job.region: decode only the crop.
    """
    index, pipeline = open_index(job.root), _textbook_graph(job)
    while True:
        images, texts, *drawn = pipeline.run()
        inputs = torch.from_dlpack(images.as_tensor())  # codes as float32, (n, 2L, crop, crop); or final RGB
        headers = cache(partial(_headers, texts))  # parsed once, and for RGB only if someone asks for the views
        if job.spec.stream == "temporal":
            _rescale(inputs, headers(), drawn[2].as_array().astype(bool))
        yield Delivered(inputs, partial(_textbook_draw, headers, drawn, index, job.spec))


def _headers(texts: Any) -> list[dict[str, Any]]:
    """The clips' parsed JSON."""
    return [json.loads(texts.at(i).tobytes()) for i in range(len(texts))]


def _textbook_draw(
    headers: Callable[[], list[dict[str, Any]]], drawn: list[Any], index: Index, spec: StreamSpec
) -> Draw:
    """The draw of a batch of the textbook graph. drawn: its outputs after the images and the texts."""
    y, x, mirror, alpha = (output.as_array() for output in drawn)
    return Draw.of_stacks(
        video=index.rows(header["video_id"] for header in headers()),
        tau=np.array([header["first_frame"] for header in headers()]),
        crop=_cut(headers(), np.stack([y, x], axis=1), spec.crop_px),
        mirror=mirror.astype(bool),
        alpha=alpha,
    )


def _textbook_graph(job: Job) -> Any:
    """Outputs: images (n, C, crop, crop) float32, JSON texts, and crop_pos_y, crop_pos_x, mirror, alpha as drawn."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def

    spec, shards = job.spec, sorted(str(shard) for shard in job.root.glob("*.tar"))
    members = [f"{step:03d}.{kind}.jpg" for step in range(spec.steps) for kind in spec.kinds]
    decoding = {
        "device": "mixed" if job.device == "cuda" else "cpu",
        "output_type": types.RGB if spec.stream == "spatial" else types.GRAY,
        "jpeg_fancy_upsampling": True,
    }
    device_id = torch.cuda.current_device() if job.device == "cuda" else None

    @pipeline_def(batch_size=job.batch_size, num_threads=job.cores, device_id=device_id, seed=job.seed)
    def build() -> Any:
        text, *jpegs = fn.readers.webdataset(
            paths=shards,
            ext=["json", *members],
            missing_component_behavior="skip",
            random_shuffle=True,
            initial_fill=SHUFFLE_BUFFER,
            dont_use_mmap=True,  # reads are counted, and are no slower
        )
        y, x, mirror = fn.random.uniform(range=(0, 1)), fn.random.uniform(range=(0, 1)), fn.random.coin_flip()
        alpha = fn.random.normal(stddev=PCA_ALPHA_STD, shape=[3])
        crop: dict[str, Any] = {"crop": [spec.crop_px, spec.crop_px], "crop_pos_y": y, "crop_pos_x": x}
        decode = fn.decoders.image_crop if job.region else fn.decoders.image
        images = [decode(jpeg, **decoding, **(crop if job.region else {})) for jpeg in jpegs]
        affine = {}
        if spec.stream == "spatial":
            offset = fn.reductions.sum(types.Constant(PCA_VECTORS * PCA_STD) * alpha, axes=1)
            affine = {"mean": types.Constant(RGB_MEAN) - offset, "std": RGB_STD.tolist()}
        stack = fn.crop_mirror_normalize(
            fn.cat(*images, axis=2) if len(images) > 1 else images[0],
            dtype=types.FLOAT,
            output_layout="CHW",
            mirror=mirror,
            **({} if job.region else crop),
            **affine,
        )
        return stack, text, y, x, mirror, alpha

    pipeline = build()
    pipeline.build()
    return pipeline


def _cut(headers: list[dict[str, Any]], position: np.ndarray, crop_px: int) -> np.ndarray:
    """Where DALI's crop begins, (n, 2) y0, x0 in px: the nearest to its share `position` of the free border."""
    sizes = np.array([[header["height"], header["width"]] for header in headers])
    return np.floor(position * (sizes - crop_px).astype(np.float32) + 0.5).astype(np.int64)  # .5 up, as it rounds


def _rescale(inputs: torch.Tensor, headers: list[dict[str, Any]], mirror: np.ndarray) -> None:
    """From codes (n, 2L, h, w) to network inputs, in place, with the ranges and means of each clip's first fields."""
    num_steps = inputs.shape[1] // 2
    lo, hi, mean = (
        np.array([[header["members"][kind][key][:num_steps] for kind in ("dx", "dy")] for header in headers])
        .transpose(0, 2, 1)  # (n, L, 2)
        .copy()
        for key in ("lo", "hi", "mean")
    )
    sign = np.ones_like(lo)
    sign[mirror, :, 0] = -1
    scale, shift = FLOW_SCALE * sign * (hi - lo) / 255, FLOW_SCALE * sign * (lo - mean)
    for apply, values in ((inputs.mul_, scale), (inputs.add_, shift)):
        apply(torch.from_numpy(values.astype(np.float32).reshape(*inputs.shape[:2], 1, 1)).to(inputs.device))
