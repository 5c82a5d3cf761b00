"""A run's nets on any video: the scores that the run's evaluation would give it, in three lines of Python.

    from train.predict import Predictor
    predictor = Predictor("runs/ucf101")
    predictor("video.mp4").top()        [("Archery", 0.93), ("Surfing", 0.03), ...]

Whatever the length of a video, only the frames that the nets look at are kept, and flow is computed between those
alone. They are encoded as in the run's packed set, and the loader of the evaluation reads them: so the score of a video
of the test list is the stored one, but for the rounding of float32 in batches of other samples.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from flow.codec import Codec
from flow.extract import FLOW_METHODS, GPU_METHODS, flow_method, method_of
from flow.fragment import Recipe
from flow.pieces import cut_pieces, pack_pieces, piece_id
from flow.pool import default_num_workers
from flow.video import Frame, read_frames, read_header
from loaders.batch import Batch, StreamSpec
from loaders.draw import Draw
from loaders.index import Index, open_index
from loaders.views import VIEWS, view_taus
from nets.cnn_m import CNNM
from train.checkpoint import load_checkpoint, load_state
from train.config import read_config
from train.dist import World
from train.engine import CHECKPOINT, loader_module, loader_options
from train.evaluate import score_views
from train.fuse import average
from train.model import build_net, num_outputs, stream_spec
from train.origin import Origin, check_outputs, read_origin
from train.settings import Config

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: What both streams' scores together are called.
FUSED = "average"


@dataclass(frozen=True)
class Protocol:
    """How a video is looked at: stacks at equal spacing, and which of the ten views of each, as positions in VIEWS."""

    num_taus: int
    views: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.num_taus} x {len(self.views)} views"


ALL_VIEWS = tuple(range(len(VIEWS)))
#: The centre, and its mirror image.
CENTRE_VIEWS = tuple(number for number, (y, x, _) in enumerate(VIEWS) if (y, x) == (0.5, 0.5))
FAST = Protocol(5, CENTRE_VIEWS)

#: From window to window of a timeline, in s.
EVERY_S = 0.5

#: Samples of a forward pass, at most. The loader holds ten views of each, 40 MB of a stack at 224 px, for three batches
#: or so; with 32, a video takes an eighth less time and three times the memory.
_BATCH_SIZE = 8

#: Of JPEGs, for a run on files of another tool, which does not tell its own.
_QUALITY = 90


@dataclass(frozen=True)
class Prediction:
    """Scores of one video.

    num_frames: that were decoded. scores: "spatial", "temporal", as far as the run has them, and "average" of both ->
    (K,) softmax scores in the order of `classes`, which sum to 1.
    """

    video: Path
    num_frames: int
    fps: float
    protocol: Protocol
    classes: list[str]
    scores: dict[str, Floats]

    def top(self, k: int = 5, method: str | None = None) -> list[tuple[str, float]]:
        """The k best classes and their scores, best first; of the average, or of the only stream."""
        scores = self.scores[method or main_method(self.scores)]
        return [(self.classes[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:k]]


@dataclass(frozen=True)
class Timeline:
    """Scores over the time of one video.

    frames (n,): around which frame each window lies, `every` apart. scores: as of a Prediction, (n, K) each.
    """

    video: Path
    num_frames: int
    fps: float
    every: int
    classes: list[str]
    frames: Ints
    scores: dict[str, Floats]

    @property
    def times_s(self) -> Floats:
        return self.frames / self.fps


def main_method(scores: Collection[str]) -> str:
    """The average, where there are two streams, or the only one."""
    return FUSED if FUSED in scores else next(iter(scores))


class Predictor:
    """The nets of a run, and how its videos became frames and flow.

    Args:
        run: folder of train.launch.
        device: "cpu", or "cuda".
        protocol: None is the run's own, 25 x 10 views (sec. 5) unless `eval.num_taus` says otherwise.
        method: flow method, for a run that was trained on flow of another tool; None: the run's own.
    Flow is computed by one thread, as in a pack: by several, some methods round differently.
    Raises FileNotFoundError if a stream was not trained yet, ValueError if the run's files are damaged or do not belong
    together, or its flow cannot be computed here.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        device: str = "cpu",
        protocol: Protocol | None = None,
        method: str | None = None,
    ) -> None:
        run = Path(run)
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device={device!r}: 'cpu', or 'cuda' where torch finds a GPU.")
        self.config = read_config(run / "config.yaml")
        if self.config.data.decoder == "auto":  # a few frames are not worth a calibration, which could change scores
            self.config.data.decoder = "cpu"
        self.origin = read_origin(run, self.config)
        self.protocol = protocol or Protocol(self.config.eval.paper_taus, ALL_VIEWS)
        self._world = World(rank=0, world_size=1, device=torch.device(device), num_threads=default_num_workers())
        streams: list[str] = [*self.config.train.streams]
        self._specs = {stream: stream_spec(self.config, stream) for stream in streams}
        self._nets = {stream: _load_net(run, stream, self.config, self.origin, device) for stream in streams}
        self.recipe = _recipe(self.origin, self._specs.values(), device, method)

    @property
    def classes(self) -> list[str]:
        return self.origin.classes

    def __call__(self, video: str | Path) -> Prediction:
        """Scores of a video. Raises VideoError if it cannot be used, ValueError if its frames are too small."""
        video = Path(video)
        fps, num_frames = count_frames(video)
        taus = {stream: view_taus(num_frames, spec, self.protocol.num_taus) for stream, spec in self._specs.items()}
        scores = self._score(video, num_frames, taus, self.protocol.views)
        means = {stream: values.mean(0) for stream, values in scores.items()}
        return Prediction(video, num_frames, fps, self.protocol, self.classes, _fused(means))

    def timeline(self, video: str | Path, every_s: float = EVERY_S) -> Timeline:
        """Scores of windows that slide over a video, each from the centre view and its mirror image.

        every_s: from window to window, one frame at least. Raises as a call does.
        """
        if not 0 < every_s < math.inf:
            raise ValueError(f"every_s={every_s}: the time from window to window is positive, such as 0.5.")
        video = Path(video)
        fps, num_frames = count_frames(video)
        every = max(1, round(min(every_s * fps, num_frames)))
        frames = np.arange(every // 2, num_frames, every)
        taus = {stream: _taus_around(frames, num_frames, spec) for stream, spec in self._specs.items()}
        scores = _fused(self._score(video, num_frames, taus, CENTRE_VIEWS))
        return Timeline(video, num_frames, fps, every, self.classes, frames, scores)

    def _score(self, video: Path, num_frames: int, taus: dict[str, Ints], views: Collection[int]) -> dict[str, Floats]:
        """Mean softmax (n, K) over the views of each of a stream's n samples."""
        windows = {stream: _windows(taus[stream], num_frames, spec) for stream, spec in self._specs.items()}
        pieces, holder = cut_pieces(window for own in windows.values() for window in own)
        scores: dict[str, Floats] = {stream: np.empty((len(taus[stream]), len(self.classes))) for stream in self._specs}
        frames = progress(read_frames(video, self.recipe.size_px), video, "reading", pieces[-1].stop)
        num_views = len(views) * sum(map(len, taus.values()))
        with (
            tempfile.TemporaryDirectory(prefix="two-stream-") as folder,
            tqdm(desc=f"{video.name}: scoring", total=num_views, unit="view", leave=False, disable=None) as bar,
        ):
            packed = Path(folder, "packed")
            for group in pack_pieces(frames, pieces, self.recipe, self.origin.flow, packed):
                torch.set_num_threads(self._world.num_threads)  # a flow method may have taken all but one away
                index = open_index(packed)
                for stream, own in windows.items():
                    samples = [i for i, window in enumerate(own) if holder[window] in group]
                    if samples:
                        held = [holder[own[i]] for i in samples]
                        starts = taus[stream][samples] - np.array([pieces[number].start for number in held])
                        rows = index.rows(map(piece_id, held))
                        scores[stream][samples] = self._score_samples(stream, index, rows, starts, views, bar)
        return scores

    def _score_samples(
        self, stream: str, index: Index, rows: Ints, taus: Ints, views: Collection[int], bar: Any
    ) -> Floats:
        """The same of samples in a packed set."""
        pairs, sample_of = np.unique(np.stack([rows, taus], axis=1), axis=0, return_inverse=True)
        slots = {(int(row), int(tau)): slot for slot, (row, tau) in enumerate(pairs)}

        def slot_of(draw: Draw) -> Ints:
            return np.array([slots[int(row), int(tau)] for row, tau in zip(draw.video, draw.tau, strict=True)])

        options = loader_options(self.config, self._world)
        batch_size = min(self.config.eval.batch_size, _BATCH_SIZE, len(pairs))
        loader = loader_module(self.config).view_loader(
            index, pairs[:, 0], self._specs[stream], taus=pairs[:, 1], batch_size=batch_size, **options
        )

        def counted() -> Iterator[Batch]:
            for number, batch in enumerate(loader):
                yield batch
                if number % len(VIEWS) in views:
                    bar.update(int(batch.draw.valid.sum()))

        with loader:
            columns = slice(0, len(self.classes))
            net = self._nets[stream]
            scores, _ = score_views(net, self.config, counted(), slot_of, len(pairs), self._world, columns, views)
        bar.update((len(rows) - len(pairs)) * len(views))  # samples that are others once more
        return scores[sample_of.reshape(-1)]


def _load_net(run: Path, stream: str, config: Config, origin: Origin, device: str) -> CNNM:
    """The stream's net with the weights of its checkpoint; its first outputs are the classes of the run's own set."""
    path = run / stream / CHECKPOINT
    checkpoint = load_checkpoint(path)
    if checkpoint.dataset.split("+")[0] != origin.fingerprint:
        raise ValueError(
            f"{path} was trained on data set {checkpoint.dataset}, but {run} tells of {origin.fingerprint}: they do "
            "not belong together. Put the files of one run into one folder."
        )
    steps = config.stream(stream).steps
    if checkpoint.step < steps:
        logger.warning("%s: the %s net was stopped at step %d of %d", run, stream, checkpoint.step, steps)
    check_outputs(origin, config, stream, num_outputs(checkpoint, path))
    net = build_net(config, stream, num_outputs(checkpoint, path), torch.device(device))
    load_state(net, checkpoint.net, path)
    return net


def _recipe(origin: Origin, specs: Collection[StreamSpec], device: str, method: str | None) -> Recipe:
    """How a video is packed as those of the run were; without fields if no stream looks at them."""
    codec = Codec.from_metadata(origin.codec)
    recipe = Recipe(
        size_px=origin.size_px,
        method=None,
        codec=codec if codec.quality else replace(codec, quality=_QUALITY),
        camera=bool((origin.flow or {}).get("camera")),
        backward=any(spec.backward_kinds for spec in specs),
    )
    if not any(spec.is_temporal for spec in specs):
        return recipe
    recorded = dict(origin.flow or {})
    name, parameters = (method, {}) if method else _recorded_method(recorded, device)
    if method and recorded.get("library"):
        raise ValueError(
            f"method {method!r}: the run was trained on {recorded['method']}, and flow of another method gives other "
            "scores. Leave it out."
        )
    on_gpu = device != "cpu" and name in GPU_METHODS
    flow_method(name, "cuda:0" if on_gpu else "cpu", parameters)  # a wrong name is told now
    return replace(recipe, method=name, parameters=parameters, num_gpus=int(on_gpu))


def _recorded_method(recorded: dict[str, Any], device: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the method that a run's flow was computed by. Raises ValueError if it is not one here."""
    name = recorded.get("method")
    if name not in FLOW_METHODS:
        raise ValueError(
            f"the run was trained on flow of another tool ({name!r}), which is not at hand. Name the method that is "
            f"nearest to it: {', '.join(FLOW_METHODS)}."
        )
    place = device if name in GPU_METHODS else "cpu"
    if name == "nvof" and place == "cpu":
        raise ValueError("the run's flow is that of a GPU's flow engine: compute on a GPU (--gpus 1, device='cuda').")
    name, parameters = method_of(recorded, place)
    found = flow_method(name, place, parameters).metadata()
    for what in ("version", "device"):
        if found.get(what) != recorded.get(what):
            logger.warning(
                "%s: its %s is %s here, of the run's flow it was %s; scores may differ a little",
                name,
                what,
                found.get(what),
                recorded.get(what),
            )
    return name, parameters


def _windows(taus: Ints, num_frames: int, spec: StreamSpec) -> list[tuple[int, int]]:
    """Frames [start, stop) of each sample; of a video that is shorter than one, all."""
    starts = np.maximum(taus - spec.frames_before, 0)
    return [(int(start), min(int(start) + spec.frames_needed, num_frames)) for start in starts]


def _taus_around(frames: Ints, num_frames: int, spec: StreamSpec) -> Ints:
    """Taus of the samples that have these frames in their middle, or near the video's ends are as near as fits."""
    first = view_taus(num_frames, spec, 2)[0]
    last = view_taus(num_frames, spec, 2)[1]
    return np.clip(frames - (spec.frames_needed // 2 - spec.frames_before), first, last)


def count_frames(video: Path) -> tuple[float, int]:
    """Frames per second, and frames: decoded to the end, which is what shows damage; headers lie."""
    file = video.stat()
    return _count_frames(video.absolute(), file.st_size, file.st_mtime_ns)


@lru_cache(16)
def _count_frames(video: Path, num_bytes: int, mtime_ns: int) -> tuple[float, int]:
    """The same, once for a video that stays as it is."""
    header = read_header(video)
    return header.fps, sum(1 for _ in progress(read_frames(video), video, "counting", header.num_frames or None))


def _fused(scores: dict[str, Floats]) -> dict[str, Floats]:
    return {**scores, FUSED: average(list(scores.values()))} if len(scores) > 1 else scores


def progress(frames: Iterator[Frame], video: Path, what: str, total: int | None) -> Iterator[Frame]:
    return iter(tqdm(frames, desc=f"{video.name}: {what}", total=total, unit="frame", leave=False, disable=None))
