"""Dropout masks as arguments: the one random thing in a net, drawn outside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw_dropout_masks(
    seed: int,
    step: int,
    *,
    num_units: Sequence[int],
    ratio: float,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """Draw one step's dropout masks for the global batch and return this rank's rows of them.

        batch_size = 4, world_size = 2        row  0 1 2 3     of the global batch
                                  rank 0          [0 1]
                                  rank 1              [2 3]

    A pure function of its arguments: any number of ranks sees the same masks, a resumed run needs no generator state,
    and no global generator is touched.

    Args:
        num_units: units of each layer that is dropped out, in order.
        ratio: probability of dropping a unit, in [0, 1).
        batch_size: rows of the global batch, a multiple of `world_size`.
    Returns one float32 tensor (batch_size // world_size, units) a layer: 0 where dropped, else 1 / (1 - ratio), so that
    a test needs no rescaling.
    Raises ValueError if `batch_size` does not divide among the ranks.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size={batch_size} cannot be split evenly over {world_size} ranks; choose a multiple.")
    num_rows = batch_size // world_size
    mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))
    masks = []
    for units in num_units:
        # Every rank draws the whole batch: two layers of 256 rows cost a millisecond, agreement costs nothing else.
        kept = torch.rand((batch_size, units), generator=generator, device=device) >= ratio
        masks.append(kept[rank * num_rows : (rank + 1) * num_rows] / (1.0 - ratio))
    return tuple(masks)
