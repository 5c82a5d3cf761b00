"""Draws: pure functions of (seed, step), uniform over what they promise, disjoint slices."""

import numpy as np
import pytest

from loaders.batch import PCA_ALPHA_STD, StreamSpec
from loaders.draw import draw_batch, population, rank_slots, slot_draws
from loaders.index import open_index
from loaders.views import VIEWS, view_taus

TEMPORAL = StreamSpec(stream="temporal", L=3, crop_px=56)
TEN = StreamSpec(stream="temporal", L=10)
BIDIRECTIONAL = StreamSpec(stream="temporal", L=4, crop_px=56, bidirectional=True)
SPATIAL = StreamSpec(stream="spatial", crop_px=56)


@pytest.fixture(scope="module")
def index(packed):
    return open_index(packed)


@pytest.fixture(scope="module")
def videos(index):
    return population(index, index.split("split1_train"), TEMPORAL)


def same(a, b):
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in a.__dataclass_fields__)


def test_a_draw_is_a_function_of_seed_and_step(videos):
    state = np.random.get_state()[1].copy()
    draws = {(seed, step): draw_batch(seed, step, videos, TEMPORAL, 32) for seed in (0, 1) for step in (0, 1, 70_000)}
    for (seed, step), draw in draws.items():
        assert same(draw, draw_batch(seed, step, videos, TEMPORAL, 32))
        others = [other for key, other in draws.items() if key != (seed, step)]
        assert not any(np.array_equal(draw.tau, other.tau) for other in others)
    assert (np.random.get_state()[1] == state).all()


def test_the_streams_draw_independently(index):
    rows = index.split("split1_train")
    a, b = (draw_batch(0, 0, population(index, rows, spec), spec, 64) for spec in (SPATIAL, TEMPORAL))
    assert not np.array_equal(a.video, b.video) and not np.array_equal(a.crop, b.crop)


def test_draws_stay_inside_the_video(index, videos):
    for step in range(50):
        draw = draw_batch(0, step, videos, TEMPORAL, 64)
        assert (draw.tau >= 0).all() and (draw.tau <= index.num_frames[draw.video] - 1 - 3).all()
        assert (draw.crop >= 0).all()
        assert (draw.crop[:, 0] + 56 <= index.heights[draw.video]).all()
        assert (draw.crop[:, 1] + 56 <= index.widths[draw.video]).all()


def test_draws_are_uniform_over_classes_then_videos_then_starts(index, videos):
    n = 30_000
    draw = draw_batch(4, 0, videos, TEMPORAL, n)
    labels, counts = np.unique(index.labels[draw.video], return_counts=True)
    assert set(labels) == set(range(len(index.classes)))
    assert np.abs(counts / n - 1 / len(labels)).max() < 0.02
    run = [row for row in videos.rows if index.labels[row] == 0]
    shares = [(draw.video == row).mean() * len(labels) * len(run) for row in run]
    assert np.abs(np.array(shares) - 1).max() < 0.06
    (long,) = index.rows(["run/long"])
    taus = draw.tau[draw.video == long]
    assert taus.min() == 0 and taus.max() == 70 - 1 - 3
    assert abs(taus.mean() - 33) < 1.5
    assert abs(draw.mirror.mean() - 0.5) < 0.02


def test_only_the_spatial_stream_gets_colour(index):
    rows = index.split("split1_train")
    videos = population(index, rows, SPATIAL)
    alpha = draw_batch(0, 0, videos, SPATIAL, 5000).alpha
    assert abs(alpha.std() - PCA_ALPHA_STD) < 0.005
    plain = StreamSpec(stream="spatial", crop_px=56, color_jitter=False, random_mirror=False)
    draw = draw_batch(0, 0, videos, plain, 5000)
    assert not draw.alpha.any() and not draw.mirror.any()
    assert not draw_batch(0, 0, population(index, rows, TEMPORAL), TEMPORAL, 10).alpha.any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rank_slices_make_up_the_global_batch(videos, world_size):
    options = dict(seed=0, batch_size=16, start_step=3)
    slots = [rank_slots(rank, world_size, 16) for rank in range(world_size)]
    parts = [next(slot_draws(videos, TEMPORAL, slots=part, **options)) for part in slots]
    assert np.array_equal(np.concatenate([p.tau for p in parts]), draw_batch(0, 3, videos, TEMPORAL, 16).tau)


def test_taus_are_equally_spaced_from_the_first_to_the_last():
    assert view_taus(31, TEN, 3).tolist() == [0, 10, 20]
    assert view_taus(5, TEN, 4).tolist() == [0, 0, 0, 0]
    assert view_taus(41, TEN, 1).tolist() == [15]
    for num_frames in (12, 35, 36, 37, 200):
        taus = view_taus(num_frames, TEN, 25)
        assert len(taus) == 25 and taus[0] == 0 and taus[-1] == num_frames - 11
        assert np.ptp(np.diff(taus)) <= 1


def test_a_bidirectional_stack_stands_around_its_middle_frame(index):
    spec = StreamSpec(stream="temporal", L=10, bidirectional=True)
    assert view_taus(31, spec, 3).tolist() == [5, 15, 25]
    assert view_taus(4, spec, 2).tolist() == [1, 1]
    videos = population(index, index.split("split1_train"), BIDIRECTIONAL)
    draws = [draw_batch(0, step, videos, BIDIRECTIONAL, 64) for step in range(40)]
    for row in videos.rows:
        taus = np.concatenate([draw.tau[draw.video == row] for draw in draws])
        last_frame = index.num_frames[row] - 1
        if last_frame < 40:  # so often drawn that each start is there
            assert taus.min() == 2 and taus.max() == last_frame - 2
    assert all((draw.tau >= 2).all() and (draw.tau <= index.num_frames[draw.video] - 3).all() for draw in draws)


def test_views_are_the_four_corners_and_the_centre_each_mirrored():
    assert len(set(VIEWS)) == 10
    assert {(y, x) for y, x, _ in VIEWS} == {(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)}


def test_a_negative_step_is_refused(videos):
    with pytest.raises(ValueError, match="step=-1"):
        draw_batch(0, -1, videos, TEMPORAL, 4)
