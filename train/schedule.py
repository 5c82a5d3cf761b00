"""Learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence


def learning_rate(step: int, lr: float, milestones: Sequence[int]) -> float:
    """Learning rate of update `step` (0-based): `lr`, divided by 10 at each milestone.

        lr = 1e-2, milestones = [50000, 70000]     step 0 .. 49999: 1e-2    .. 69999: 1e-3    from 70000: 1e-4

    Simonyan & Zisserman 2014, sec. 5.
    """
    return lr / 10 ** sum(step >= milestone for milestone in milestones)
