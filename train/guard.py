"""A loss that is not finite, or explodes, ends the run at its first step; none goes on from what came of it.

A checkpoint's weights give the loss of the step after it: if that explodes, the checkpoint is put aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from train.checkpoint import checkpoint_files, set_aside
from train.dist import World

Ints = npt.NDArray[np.int64]

#: A larger loss has exploded: that of K classes begins at about log K, some 5.
MAX_LOSS = 1e3


class LossGuard:
    """Keeps each step's loss on the device until the next look, and what the batch was made of.

    To ask for the loss of every step would wait for the device in every step. How many samples were right, which goes
    with the loss into the log, waits there too.

    Args:
        checkpoint: where the run's checkpoints are. saved: step of the newest, 0 if there is none.
        video_ids: names of the videos of this process's slice of a batch, from their rows (n,).
    """

    def __init__(
        self, stream: str, checkpoint: Path, saved: int, world: World, video_ids: Callable[[Ints], list[str]]
    ) -> None:
        self._stream, self._checkpoint, self._world, self._video_ids = stream, checkpoint, world, video_ids
        self.saved = saved
        self._steps: list[tuple[int, Tensor, Tensor, Ints]] = []
        self._newest = math.nan, 0
        self._rows: Ints = np.empty(0, np.int64)

    def add(self, step: int, loss: Tensor, num_correct: Tensor, rows: Ints) -> None:
        """Note this process's loss and number of right samples, scalars on the device, and the videos of update `step`,
        from 1.
        """
        self._steps.append((step, loss, num_correct, rows))

    def look(self) -> tuple[float, int]:
        """Mean loss of the newest global batch, and how many of its samples were right. On a GPU this waits for it.

        Raises FloatingPointError, in every process, if that of any step since the last look is not finite or exceeds
        MAX_LOSS; OSError if the checkpoint whose weights gave it cannot be put aside.
        """
        if self._steps:
            steps, losses, corrects, rows = zip(*self._steps, strict=True)
            self._steps = []
            counted = torch.stack([*losses, corrects[-1].float()]).double()
            *sums, num_correct = self._world.sum(counted).tolist()
            means = [total / self._world.world_size for total in sums]
            for step, loss, videos in zip(steps, means, rows, strict=True):
                if not abs(loss) <= MAX_LOSS:  # NaN is neither
                    raise self._error(f"the loss is {loss:g} at step {step}", videos, of_saved=step == self.saved + 1)
            self._newest, self._rows = (means[-1], int(num_correct)), rows[-1]
        return self._newest

    def check_weights(self, net: nn.Module, step: int) -> None:
        """Raise FloatingPointError if a weight is not finite after update `step`, whose loss has been looked at."""
        if not torch.stack([parameter.isfinite().all() for parameter in net.parameters()]).all().item():
            raise self._error(f"weights are not finite after step {step}", self._rows, of_saved=False)

    def _error(self, what: str, rows: Ints, *, of_saved: bool) -> FloatingPointError:
        """of_saved: the loss was that of the newest checkpoint's weights."""
        whose = f"; process {self._world.rank} had the videos" if self._world.world_size > 1 else "; its videos were"
        return FloatingPointError(
            f"{self._stream}: {what}; lower {self._stream}.lr, or set train.clip_grad_norm, in a new run. "
            f"{self._how_to_go_on(of_saved)}{whose} {', '.join(sorted(set(self._video_ids(rows))))}."
        )

    def _how_to_go_on(self, of_saved: bool) -> str:
        if not self.saved:
            return "No checkpoint yet: the same command begins again, should the cause be a passing one"
        files = checkpoint_files(self._checkpoint)
        newest = f"The checkpoint of step {self.saved} in {self._checkpoint.parent}"
        if not of_saved:
            return f"{newest} is kept: the same command goes on from there, should the cause be a passing one"
        if len(files) < 2:
            return f"{newest} has these weights, and none before it is kept: if it fails again, give --resume never"
        self._world.barrier("the other processes to look at the checkpoints")
        if self._world.is_main:
            set_aside(files[0], self._checkpoint)
        return (
            f"{newest} has these weights: it is now {self._checkpoint.name}.damaged, and the same command goes on "
            "from the one before it, should the cause be a passing one"
        )
