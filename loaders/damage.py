"""Training that goes on over damaged samples: what is drawn in their place, and when there are too many.

    request ─ Source.read ─┬─ bytes ───────────────────────── graph ─┬─ batch
                           └─ SampleError                            └─ the decoder's complaint about an image
                                └── another draw of the same class, read in its place ──┘

A replacement is a function of (seed, window, attempt), as the draw itself is: any number of ranks, and a run that is
resumed, replace the same samples by the same others. A window is replaced whole, for all its uses. Only where two
decoders share the images, and one complains, it is not known of which of two: both samples are replaced.
"""

import logging
import threading
from dataclasses import replace

from flow.shard import ShardError
from loaders.batch import StreamSpec
from loaders.draw import Draw, Population, draw_instead
from loaders.request import Request
from loaders.source import Encoded, SampleError, Source
from loaders.windows import Key, keys_of, last_step

logger = logging.getLogger(__name__)

#: Runs over which the part that is damaged is told, at least: among the first few, one would be too many.
_FEWEST_RUNS = 1000
#: Steps by which a request that is read again may lie behind the newest one.
_STEPS_BACK = 64


class Replacements:
    """Remembers what replaces damaged windows, or samples that share none. Threads may use it at the same time.

    first_slot: of this rank in the global batch. max_damaged_pct: of what is read from now on; more end the training.
    num_replaced: how many replacements there were, also for batches that are only read ahead yet.
    """

    def __init__(self, videos: Population, spec: StreamSpec, *, seed: int, first_slot: int, max_damaged_pct: float):
        self._videos, self._spec, self._seed, self._first_slot = videos, spec, seed, first_slot
        self._max_damaged_pct = max_damaged_pct
        self._lock = threading.Lock()
        self._instead: dict[Key, tuple[int, Draw]] = {}  # attempts, and the window's stacks
        self._named: set[str] = set()
        self._num_runs = 0
        self._last_step = -1
        self.num_replaced = 0

    def apply(self, request: Request) -> Request:
        """The request with other samples in the place of those found damaged so far."""
        with self._lock:
            if not self._instead:
                return request
            k, keys = self._spec.stacks_per_window, keys_of(request.draw)
            places = [i for i, key in enumerate(keys) if key in self._instead]
            if not places:
                return request
            stacks = [(self._first_slot + i) % k for i in places]
            others = [self._instead[keys[i]][1].take(slice(j, j + 1)) for i, j in zip(places, stacks, strict=True)]
            draw = request.draw.put(places, Draw.concatenate(others))
            if request.new is None:
                return replace(request, draw=draw, video=draw.video, tau=draw.tau)
            video, first = request.new.video.copy(), request.new.first.copy()
            for i, key in enumerate(request.new.keys):
                if key in self._instead:
                    window = self._instead[key][1]
                    video[i], first[i] = window.video[0], window.first[0]
            return replace(
                request, draw=draw, video=video, tau=first, new=replace(request.new, video=video, first=first)
            )

    def draw_others(self, request: Request, error: SampleError) -> None:
        """Draw others for the runs that an error names. Raises ShardError if there have been too many."""
        with self._lock:
            runs = [run for run in error.runs if self._is_current(request, run)]
            num_replaced = self.num_replaced + len(runs)
            if num_replaced * 100 > self._max_damaged_pct * max(self._num_runs, _FEWEST_RUNS):
                # Nothing is noted: asked again, the same sample is one too many again.
                raise ShardError(
                    f"{error} With it {num_replaced} samples were damaged, beside {self._num_runs} sound ones: more "
                    f"than data.max_damaged_pct={self._max_damaged_pct}. `python -m flow.verify DIR` names all damage."
                ) from error
            for run in runs:
                key = request.keys[run]
                attempt = self._instead[key][0] + 1 if key in self._instead else 1
                drawn = draw_instead(self._seed, key, attempt, int(request.video[run]), self._videos, self._spec)
                self._instead[key] = attempt, drawn
            self.num_replaced = num_replaced
            if str(error) not in self._named:
                self._named.add(str(error))
                logger.warning("%s Another sample of its class takes its place (%d so far).", error, self.num_replaced)

    def _is_current(self, request: Request, run: int) -> bool:
        """Whether nothing has replaced what a run of a request asks for: else another thread, which read the same, was
        faster, and a second attempt would depend on who was."""
        _, window = self._instead.get(request.keys[run], (0, None))
        return window is None or (request.video[run], request.tau[run]) == (window.video[0], window.first[0])

    def taken(self, request: Request) -> Request:
        """As `apply`, for the requests in their order; counts them, and forgets what no later one uses."""
        request = self.apply(request)
        with self._lock:
            step = int(request.draw.window[:, 0].max())
            if step > self._last_step:  # not one that is taken again
                self._last_step = step
                self._num_runs += len(request.video)
                self._instead = {
                    key: value
                    for key, value in self._instead.items()
                    if last_step(key, self._spec) >= step - _STEPS_BACK
                }
            return request


def read_request(source: Source, request: Request, replacements: Replacements | None) -> tuple[Request, Encoded]:
    """The bytes of a request, checked; what is damaged is replaced in it, if it can be.

    Raises SampleError for a damaged member without replacements, ShardError if there were too many of them.
    """
    while True:
        if replacements:
            request = replacements.apply(request)
        try:
            encoded = source.read(request.video, request.tau, request.steps)
        except SampleError as error:
            if not replacements:
                raise
            replacements.draw_others(request, error)
        else:
            return request, encoded
