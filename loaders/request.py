"""What to read for each batch: its samples, or the windows that they share."""

from collections.abc import Iterator
from dataclasses import dataclass

from loaders.batch import StreamSpec
from loaders.draw import Draw, Ints
from loaders.windows import Key, NewWindows, keys_of, plan_windows


@dataclass(frozen=True)
class Request:
    """A batch to make: its draw, the runs (video, tau) of `steps` time steps to read, and new windows if any."""

    draw: Draw
    video: Ints
    tau: Ints
    steps: int
    new: NewWindows | None = None

    @property
    def keys(self) -> list[Key]:
        """The window that each run is of; a sample that shares none is its own."""
        return self.new.keys if self.new else keys_of(self.draw)


def requests(draws: Iterator[Draw], spec: StreamSpec, start_step: int, views: bool) -> Iterator[Request]:
    """The requests of a loader's batches; views: of a test loader."""
    if views or spec.stacks_per_window == 1:
        for draw in draws:
            yield Request(draw, draw.video, draw.tau, spec.steps)
    else:
        for draw, new in plan_windows(draws, start_step, spec):
            yield Request(draw, new.video, new.first, spec.window_steps, new)
