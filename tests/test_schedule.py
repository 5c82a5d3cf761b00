"""The paper's learning rates."""

import pytest

from train.schedule import learning_rate
from train.settings import StreamConfig


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-2), (49_999, 1e-2), (50_000, 1e-3), (69_999, 1e-3), (70_000, 1e-4), (79_999, 1e-4)],
)
def test_training_from_scratch(step, expected):
    """Sec. 5: 1e-2, 1e-3 after 50K iterations, 1e-4 after 70K, stopped after 80K: the defaults."""
    paper = StreamConfig()
    assert paper.steps == 80_000
    assert learning_rate(step, paper.lr, paper.milestones) == expected


def test_no_milestones():
    assert learning_rate(10**6, 0.5, []) == 0.5
