"""What draw_statistics computes is what counting finds: the exact figures against the loader's own draws."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import draw_statistics as statistics  # noqa: E402

from loaders.batch import StreamSpec  # noqa: E402
from loaders.draw import Population, draw_batch, rank_slots  # noqa: E402
from loaders.shard_pool import ShardPool  # noqa: E402

SPEC = StreamSpec(stream="spatial", crop_px=8)
MADE = statistics.MadeSet("made", 600, 9, 3.0)
BATCH, P, S = 64, 8, 2


@pytest.fixture(scope="module")
def pool():
    return ShardPool(statistics.make_table(MADE, 20), P, S)


@pytest.fixture(scope="module")
def batches(pool):
    """For each of many seeds of the draw the batches of two epochs, from the pools of the statistics' seed."""
    start = np.searchsorted(np.sort(pool.table.label), np.arange(MADE.num_classes + 1))
    n = MADE.num_videos

    class OneSeed:
        """The same pools, whatever seed the samples are drawn with."""

        def at(self, seed, step):
            return pool.at(statistics.SEED, step)

    videos = Population(np.arange(n), start, np.full(n, 10), np.full((n, 2), 16), 0, OneSeed())
    steps = range((2 * len(pool.table.shards) + 1) * S)
    return np.array([[draw_batch(seed, step, videos, SPEC, BATCH).video for step in steps] for seed in range(20)])


def test_a_made_set_is_as_large_and_as_unbalanced_as_said(pool):
    counts = np.bincount(pool.table.label)
    assert counts.sum() == 600 and len(counts) == 9 and counts.max() / counts.min() == pytest.approx(3, rel=0.05)
    assert len(pool.table.shards) == 30 and set(np.diff(pool.table.start)) == {20}


def test_probabilities_over_an_epoch_are_the_frequencies(pool, batches):
    found = statistics.average(pool, np.arange(30))
    drawn = batches[:, : 30 * S].reshape(-1)
    counts, expected = np.bincount(drawn, minlength=600), len(drawn) * found.video
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all() and found.video.sum() == pytest.approx(1)
    label = np.empty(600, np.int64)
    label[pool.table.video] = pool.table.label
    classes = np.bincount(label[drawn], minlength=9) / len(drawn)
    assert np.abs(classes - found.label).max() < 0.01


@pytest.mark.parametrize("num_heads", [1, 7])
def test_as_many_different_videos_are_drawn_as_expected(pool, batches, num_heads):
    expected = statistics.different_videos(pool, np.arange(num_heads), BATCH)
    counts = [len(np.unique(one[: num_heads * S])) for one in batches]
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.std(counts) / np.sqrt(len(counts)) + 0.5)


def test_fewer_looks_tell_the_same():
    """Of a pool of 64 shards every fourth exchange, as the program does, against every one."""
    large = ShardPool(statistics.make_table(statistics.MadeSet("large", 5000, 20, 2.0), 20), 64, S)
    every, some = (statistics.average(large, np.arange(0, 250, stride)) for stride in (1, 4))
    video, _ = statistics.paper_draw(large.table)
    far = [statistics.distance(one.video, video)["total_variation"] for one in (every, some)]
    assert far[1] == pytest.approx(far[0], rel=0.05)
    seen = [statistics.different_videos(large, np.arange(0, 100, stride), BATCH, stride) for stride in (1, 4)]
    assert seen[1] == pytest.approx(seen[0], rel=0.01)


def test_as_many_machines_fetch_a_shard_as_in_the_draws(pool, batches):
    """Each shard of the second epoch, from when it enters to when it leaves."""
    rows = {row["world_size"]: row["fetches_per_shard"] for row in statistics.fetch_rows(pool, BATCH, first=30)}
    shard = np.empty(600, np.int64)
    shard[pool.table.video] = np.repeat(np.arange(30), np.diff(pool.table.start))
    assert sorted(rows) == [1, 2, 4, 8]
    for world_size, expected in rows.items():
        counts = []
        for one in batches:
            touched, left = {}, []
            for step, batch in enumerate(one[(30 - P) * S :], (30 - P) * S):
                now = set(pool.at(0, step).shards.tolist())
                left += [len(ranks) for gone, ranks in touched.items() if gone not in now and step > 30 * S]
                touched = {key: ranks for key, ranks in touched.items() if key in now}
                for rank in range(world_size):
                    for number in np.unique(shard[batch[slice(*rank_slots(rank, world_size, BATCH))]]):
                        touched.setdefault(int(pool.table.shards[number]), set()).add(rank)
            counts.append(np.mean(left))
        assert np.mean(counts) == pytest.approx(expected, rel=0.02)


def test_a_machine_alone_fetches_once_and_holds_the_pool(pool):
    alone, *others = statistics.fetch_rows(pool, BATCH)
    assert alone["fetches_per_shard"] == pytest.approx(1) and alone["held_shards"]["most"] <= P
    assert alone["held_pct"] > 90
    for row in others:
        assert 1 < row["fetches_per_shard"] < row["world_size"] and row["held_pct"] < alone["held_pct"]


def test_the_papers_own_draw_is_at_no_distance():
    video, label = statistics.paper_draw(statistics.make_table(MADE))
    for exact in (video, label):
        assert statistics.distance(exact, exact) == {"total_variation": 0, "largest_ratio": 1, "least_ratio": 1}
    assert statistics.distance(np.array([1.0, 0]), np.array([0.5, 0.5]))["total_variation"] == 0.5


def test_the_program_runs_on_a_packed_set(packed_demo, tmp_path):
    """The demo set lies in one shard, of which no part can be a pool: the made set's row alone."""
    assert statistics.main(["--quick", "--data", str(packed_demo), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "draw_statistics_quick.json").read_text())
    (row,) = result["rows"]
    assert (row["set"], row["shards"], row["pool_shards"], row["epoch_steps"]) == ("small", 20, 4, 80)
    assert row["samples_per_video_and_epoch"] == 32
    assert [machines["world_size"] for machines in row["machines"]] == [1, 2, 4]
