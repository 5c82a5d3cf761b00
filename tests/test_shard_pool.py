"""The shuffle pool: functions of (seed, step), each shard once an epoch, uniform over what it holds, arcs for ranks."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import dali_loader, reference
from loaders.batch import StreamSpec
from loaders.draw import Population, draw_batch, draw_instead, draw_shard_order, population, rank_slots, slot_draws
from loaders.index import open_index
from loaders.shard_pool import pooled
from tests.conftest import pack_arrays
from tests.test_draw import same
from tests.tiny import tiny_config, tiny_overrides
from train import engine, launch
from train.dist import World
from train.log import read_log

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"), num_threads=2)
SPEC = StreamSpec(stream="temporal", L=3, crop_px=56)
BATCH = 48


def spec_of(k):
    return StreamSpec(stream="temporal", L=3, crop_px=56, stacks_per_window=k)


def made_set(seed, num_videos, num_classes, num_shards):
    """A population of made videos, and what stands for its index: shards of any number of videos, some of none."""
    rng = np.random.default_rng(seed)
    label = np.sort(np.append(np.arange(num_classes), rng.integers(0, num_classes, num_videos - num_classes)))
    start = np.searchsorted(label, np.arange(num_classes + 1))
    rows = rng.permutation(num_videos + 5)[:num_videos]  # a list leaves some rows out
    frames = rng.integers(4, 90, num_videos)
    size = np.stack([rng.integers(56, 99, num_videos), rng.integers(56, 99, num_videos)], axis=1)
    index = SimpleNamespace(shard=rng.integers(0, num_shards, num_videos + 5) * 2 + 1)
    return Population(rows, start, frames, size, 0), index


@st.composite
def pools(draw):
    """(videos with a pool, the same without, index, P, S)."""
    num_classes = draw(st.integers(1, 6))
    videos, index = made_set(
        draw(st.integers(0, 999)), draw(st.integers(40, 90)), num_classes, draw(st.integers(9, 20))
    )
    num_held = len(np.unique(index.shard[videos.rows]))
    num_shards = draw(st.integers(-(-num_classes * num_held // len(videos.rows)), num_held - 1))
    num_steps = draw(st.integers(1, 5))
    return pooled(videos, index, num_shards, num_steps), videos, index, num_shards, num_steps


def entries(seed, held, first, count):
    """The shards of entries [first, first + count) of the infinite sequence, written out."""
    places = [divmod(q, len(held)) for q in range(first, first + count)]
    return [held[draw_shard_order(seed, epoch, len(held))[at]] for epoch, at in places]


@given(pools(), st.integers(0, 2**50), st.integers(-60, 60))
def test_the_pool_holds_the_next_entries_and_exchanges_one_place_at_a_time(made, seed, step):
    with_pool, videos, index, P, S = made
    held = np.unique(index.shard[videos.rows])
    first = step // S
    shards = with_pool.pool.at(seed, step).shards
    assert len(set(shards)) == len(shards) and set(shards) == set(entries(seed, held, first, P))
    rings = [with_pool.pool.ring(seed, first + i) for i in range(P + 1)]
    changed = [int((a != b).sum()) for a, b in zip(rings, rings[1:], strict=False)]
    assert max(changed) <= 2  # a second one where a shard had been there twice, and its earlier entry leaves
    assert held[rings[0][first % P]] == entries(seed, held, first, 1)[0]


@given(pools(), st.integers(0, 99), st.integers(-3, 3))
def test_in_an_epoch_every_shard_enters_once(made, seed, epoch):
    with_pool, videos, index, P, S = made
    held = np.unique(index.shard[videos.rows])
    N = len(held)
    last = [with_pool.pool.ring(seed, q - P + 1)[q % P] for q in range(epoch * N, epoch * N + N)]
    before = [set(with_pool.pool.ring(seed, q - P)) for q in range(epoch * N, epoch * N + N)]
    for shard, others, entry in zip(last, before, entries(seed, held, epoch * N, N), strict=True):
        assert held[shard] == entry if shard >= 0 else entry in held[list(others - {-1})]
    assert sorted(entries(seed, held, epoch * N, N)) == held.tolist()
    assert entries(seed, held, epoch * N, N) != entries(seed, held, epoch * N + N, N)


@given(pools(), st.integers(0, 99), st.integers(-60, 60))
def test_classes_of_the_pool_are_equally_likely_and_videos_in_their_class(made, seed, step):
    with_pool, videos, index, P, S = made
    held = np.unique(index.shard[videos.rows])
    shards = set(entries(seed, held, step // S, P))
    classes = [videos.rows[a:b] for a, b in zip(videos.start, videos.start[1:], strict=False)]
    there = [[row for row in rows if index.shard[row] in shards] for rows in classes]
    there = [rows for rows in there if rows]
    expected = {row: 1 / len(there) / len(rows) for rows in there for row in rows}
    pool = with_pool.pool.at(seed, step)
    found = dict(zip(videos.rows[pool.video].tolist(), np.diff(pool.upto, prepend=0), strict=True))
    assert found == pytest.approx(expected, abs=1e-12)
    assert (np.repeat(pool.shards, pool.counts) == index.shard[videos.rows[pool.video]]).all()


@pytest.mark.parametrize("k", [1, 4])
def test_draws_have_these_probabilities(k):
    """Counted over many seeds at one step: within five standard deviations of so many free draws."""
    videos, index = made_set(3, 60, 4, 12)
    videos = pooled(videos, index, 5, 1000)
    counts, expected, n = np.zeros(len(index.shard)), np.zeros(len(index.shard)), 0
    for seed in range(400):
        draw = draw_batch(seed, 500, videos, spec_of(k), BATCH)
        counts += np.bincount(draw.video, minlength=len(counts))
        pool = videos.pool.at(seed, 500)
        expected[videos.rows[pool.video]] += BATCH * np.diff(pool.upto, prepend=0)
    n = 400 * BATCH / k  # windows; the stacks of one come together
    assert (np.abs(counts - expected) <= 5 * np.sqrt(k * expected) + 1).all() and (expected > 0).sum() == 60
    assert n > 4000 and counts.sum() == 400 * BATCH


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_draw_is_a_function_of_seed_and_step(k):
    spec = spec_of(k)
    state = np.random.get_state()[1].copy()
    first, second = (pooled(*made_set(0, 80, 5, 15), 4, 3) for _ in range(2))
    draws = {(seed, step): draw_batch(seed, step, first, spec, BATCH) for seed in (0, 1) for step in (0, 1, 70_000)}
    for (seed, step), draw in reversed(draws.items()):
        assert same(draw, draw_batch(seed, step, second, spec, BATCH))
        assert not any(np.array_equal(draw.tau, o.tau) for key, o in draws.items() if key != (seed, step))
    assert (np.random.get_state()[1] == state).all()


@settings(max_examples=25, deadline=None)
@given(pools(), st.sampled_from([1, 2, 4]), st.integers(0, 40), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_make_up_the_global_batches_and_a_resumed_run_goes_on(made, k, start_step, world_size):
    videos, spec = made[0], spec_of(k)
    whole = [draw_batch(7, step, videos, spec, BATCH) for step in range(start_step, start_step + 6)]
    for rank in range(world_size):
        slots = rank_slots(rank, world_size, BATCH)
        own = slot_draws(videos, spec, seed=7, batch_size=BATCH, slots=slots, start_step=start_step)
        assert all(same(a, b.take(slice(*slots))) for a, b in zip(islice(own, 6), whole, strict=True))


@settings(max_examples=25, deadline=None)
@given(pools(), st.sampled_from([1, 2, 4]), st.integers(0, 40))
def test_samples_are_of_the_pool_of_their_birth(made, k, step):
    """And so is what takes a damaged one's place, of the same class, unless the pool has no other of the class."""
    with_pool, videos, index, P, S = made
    held, label = np.unique(index.shard[videos.rows]), np.empty(len(index.shard), np.int64)
    label[videos.rows] = np.repeat(np.arange(len(videos.start) - 1), np.diff(videos.start))
    draw = draw_batch(5, step, with_pool, spec_of(k), BATCH)
    for i, (birth, number) in enumerate(draw.window.tolist()):
        shards = set(entries(5, held, birth // S, P))
        assert index.shard[draw.video[i]] in shards
        instead = draw_instead(5, (birth, number), 1, int(draw.video[i]), with_pool, spec_of(k))
        rows = [row for row in videos.rows if label[row] == label[draw.video[i]]]
        others = [row for row in rows if index.shard[row] in shards and row != draw.video[i]] or rows
        assert set(instead.video) <= set(others) and len(instead) == k
        assert instead.window.tolist() == [[birth, number]] * k


def test_what_takes_a_place_depends_on_the_attempt_and_reaches_every_other_video():
    videos, index = made_set(1, 60, 2, 12)
    videos = pooled(videos, index, 6, 2)
    draw, pool = draw_batch(0, 9, videos, SPEC, BATCH), videos.pool.at(0, 9)
    own = int(draw.video[0])
    of_class = pool.label == pool.label[videos.rows[pool.video] == own]
    drawn = [int(draw_instead(0, (9, 0), attempt, own, videos, SPEC).video[0]) for attempt in range(1, 400)]
    assert set(drawn) == set(videos.rows[pool.video[of_class]]) - {own}


@pytest.mark.parametrize("k", [1, 4])
def test_a_pool_of_all_shards_is_no_pool(k):
    videos, index = made_set(2, 60, 5, 12)
    num_held = len(np.unique(index.shard[videos.rows]))
    for num_shards in (0, num_held, num_held + 1, 10**9):
        assert pooled(videos, index, num_shards, 3) is videos
    fewer = pooled(videos, index, num_held - 1, 3)
    assert not same(draw_batch(0, 0, fewer, spec_of(k), BATCH), draw_batch(0, 0, videos, spec_of(k), BATCH))


@pytest.mark.parametrize("k", [1, 4])
def test_a_rank_draws_from_an_arc_of_the_ring(k):
    """In the order of slots windows of a birth go round the ring: of four machines hardly two need one shard."""
    P, S, W = 32, 2, 4
    videos, index = made_set(4, 600, 10, 100)
    videos = pooled(videos, index, P, S)
    held = np.unique(index.shard[videos.rows])
    needed = set()
    for step in range(P * S * 3):
        draw = draw_batch(0, step, videos, spec_of(k), BATCH)
        first = step // S
        place = {entry: (first + i) % P for i, entry in reversed([*enumerate(entries(0, held, first, P))])}
        own = np.flatnonzero(draw.window[:, 0] == step)  # stack 0 of each window
        around = [place[shard] for shard in index.shard[draw.video[own]]]
        assert around == sorted(around) and len(set(around)) > 5
        ring = {p: first + (p - first) % P for p in set(around)}  # place -> entry of the sequence
        needed |= {(int(slot * W // BATCH), ring[p]) for slot, p in zip(own, around, strict=True)}
    assert len(needed) < 1.5 * len({entry for _, entry in needed})  # in any order it would be nearly W


def test_a_pool_that_cannot_be_is_refused():
    videos, index = made_set(0, 80, 20, 40)
    num_held = len(np.unique(index.shard[videos.rows]))
    with pytest.raises(ValueError, match="at least 0, and 1"):
        pooled(videos, index, -1, 1)
    with pytest.raises(ValueError, match="at least 0, and 1"):
        pooled(videos, index, 20, 0)
    with pytest.raises(ValueError, match=r"pool_shards=2 of \d+ shards hold .* of the 20 classes. Take \d+") as error:
        pooled(videos, index, 2, 1)
    least = int(str(error.value).split("Take ")[1].split()[0])
    assert pooled(videos, index, least, 1).pool.num_shards == least < num_held
    with pytest.raises(ValueError, match=f"pool_shards={least - 1} "):
        pooled(videos, index, least - 1, 1)


# --- loaders, training -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, arrays):
    """Folder of a packed set of six shards, a video each; one is too short to train on."""
    return pack_arrays(tmp_path_factory.mktemp("sharded") / "set", arrays, videos_per_shard=1)


def load(module, index, spec, count=7, **options):
    rows = index.split("split1_train")
    means = {"seed": 2, "batch_size": 16, "pool_shards": 3, "pool_steps": 2, **options}
    with module.train_loader(index, rows, spec, **means) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("spec", [StreamSpec(stream="spatial", crop_px=56), spec_of(1), spec_of(4)])
def test_both_loaders_take_the_pools_samples_on_every_rank(sharded, spec):
    index = open_index(sharded)
    videos = population(index, index.split("split1_train"), spec)
    ours, plain = (load(module, index, spec) for module in (dali_loader, reference))
    halves = [load(dali_loader, index, spec, rank=rank, world_size=2) for rank in range(2)]
    later = load(dali_loader, index, spec, count=3, start_step=4)
    for step, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert same(a.draw, draw_batch(2, step, pooled(videos, index, 3, 2), spec, 16)) and same(a.draw, b.draw)
        assert (a.inputs - b.inputs).abs().max() < 1e-3
        assert torch.equal(torch.cat([half[step].inputs for half in halves]), a.inputs)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(ours[4:], later, strict=True))
    assert not same(ours[0].draw, load(dali_loader, index, spec, count=1, pool_shards=0)[0].draw)


@pytest.mark.parametrize("extra", [False, True], ids=["one set", "two sets"])
def test_training_with_a_pool_goes_on_bitwise(sharded, packed_demo, tmp_path, monkeypatch, extra):
    """A second set has a pool of its own; the demo set lies in one shard, so all of it is."""
    changes = {"data__pool_shards": 3, "data__pool_steps": 1, "train__checkpoint_every": 4, "eval__num_taus_train": 0}
    if extra:
        changes |= {"spatial__extra_roots": f"[{packed_demo}]", "spatial__extra_lists": "[split1_train]"}
    config, index = tiny_config(sharded, spatial__steps=9, **changes), open_index(sharded)
    update, seen = engine.update, []

    def noted(model, optimizer, lr, batch, *arguments):
        own = batch.draw.video if batch.task is None else batch.draw.video[batch.task == 0]
        seen.append(set(index.shard[own].tolist()))
        return update(model, optimizer, lr, batch, *arguments)

    monkeypatch.setattr(engine, "update", noted)
    engine.train_stream(config, "spatial", index, tmp_path / "whole", ALONE)
    assert len(seen) == 9 and all(len(shards) <= 3 for shards in seen) and len(set.union(*seen)) == 6
    config.spatial.steps = 4
    engine.train_stream(config, "spatial", index, tmp_path / "parts", ALONE)
    config.spatial.steps = 9
    engine.train_stream(config, "spatial", index, tmp_path / "parts", ALONE)
    assert seen[9:] == seen[:9]
    whole, parts = ([line["loss"] for line in read_log(tmp_path / run / "log.jsonl")] for run in ("whole", "parts"))
    assert whole == parts and len(whole) == 9


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.pool_shards=-1", "data.pool_shards=-1 must be at least 0"),
        ("data.pool_steps=0", "data.pool_steps=0 must be at least 1"),
        ("data.pool_shards=2", "data.pool_shards=2 of 6 shards hold about 2 videos, .* each of the 3 classes. Take 3"),
    ],
)
def test_errors_are_one_line_before_anything_starts(sharded, tmp_path, setting, message):
    with pytest.raises(SystemExit, match=message):
        launch.main([*tiny_overrides(sharded), "--run", str(tmp_path / "run"), setting])
    assert not (tmp_path / "run").exists()
