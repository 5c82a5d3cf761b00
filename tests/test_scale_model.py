"""The simulation of docs/scale.md against closed forms, queueing laws and independent code."""

import heapq
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simpy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale_model  # noqa: E402
from common import RESULTS  # noqa: E402
from draw_statistics import MadeSet, make_table  # noqa: E402
from scale_events import Link  # noqa: E402
from scale_extraction import MAX_UNSENT, Cluster, Extraction, Work, hours_for  # noqa: E402
from scale_inputs import ASSUMPTIONS, datasets, read_measured  # noqa: E402
from scale_limits import add_speedup, sensitivity, training_rate  # noqa: E402
from scale_training import Shards, Simulation, Training  # noqa: E402
from scaling_model import Parts, predict  # noqa: E402

from loaders.draw import draw_pooled, draw_shard_order  # noqa: E402
from loaders.shard_pool import ShardPool  # noqa: E402

# --- the shared link ---------------------------------------------------------------------------------------------


def carry(link, env, transfers):
    """When each of some (start, bytes) ends."""
    ends = [0.0] * len(transfers)

    def one(number, start, num_bytes):
        yield env.timeout(start)
        yield link.send(num_bytes)
        ends[number] = env.now

    for number, (start, num_bytes) in enumerate(transfers):
        env.process(one(number, start, num_bytes))
    env.run()
    return ends


@pytest.mark.parametrize(
    ("transfers", "most", "ends"),
    [
        ([(0, 100)], math.inf, [10]),
        ([(0, 100), (0, 100)], math.inf, [20, 20]),
        ([(0, 100), (5, 25)], math.inf, [12.5, 10]),  # 50 alone, 25 at half the rate, 25 alone
        ([(0, 100), (0, 100)], 2.0, [50, 50]),  # each is held back, the link is not full
        ([(0, 100)] * 10, 2.0, [100] * 10),
    ],
)
def test_transfers_share_a_link_alike(transfers, most, ends):
    env = simpy.Environment()
    assert carry(Link(env, 10.0, most), env, transfers) == pytest.approx(ends)


def test_a_link_keeps_the_laws_of_queues():
    """Sharing among Poisson arrivals of exponential sizes: the mean stay is 1 / (service rate - arrival rate), and the
    mean number under way is the arrival rate times that (Little)."""
    rng, arrivals, size = np.random.default_rng(0), 40_000, 1.0
    starts = np.cumsum(rng.exponential(1 / 0.6, arrivals))
    sizes = rng.exponential(size, arrivals)
    env = simpy.Environment()
    link = Link(env, 1.0)
    ends = carry(link, env, list(zip(starts, sizes, strict=True)))
    stays = np.array(ends) - starts
    assert stays.mean() == pytest.approx(1 / (1 - 0.6), rel=0.05)
    assert link.flow_seconds / env.now == pytest.approx(arrivals / env.now * stays.mean(), rel=1e-9)
    assert link.num_bytes == pytest.approx(sizes.sum())


# --- extraction --------------------------------------------------------------------------------------------------

WORK = Work(frames=np.full(96, 100.0), s_per_frame=0.02, bytes_per_frame=30e3, videos_per_shard=8)
ALONE = Cluster(nodes=1, cores=4, join_bytes_per_s=math.inf)


@pytest.mark.parametrize(("nodes", "cores"), [(1, 1), (1, 4), (3, 7), (64, 16)])
def test_without_contention_equal_videos_take_whole_rounds(nodes, cores):
    found = Extraction(WORK, replace(ALONE, nodes=nodes, cores=cores)).run()
    assert found["seconds"] == pytest.approx(math.ceil(96 / (nodes * cores)) * 100 * 0.02)
    assert found["slots_busy"] * found["seconds"] * nodes * cores == pytest.approx(96 * 2.0)


def test_without_contention_it_is_list_scheduling():
    """Independent code: each video goes to the slot that is free first."""
    frames = np.random.default_rng(0).lognormal(5, 1, 500).round()
    free = [0.0] * 12
    for seconds in frames * 0.02:
        heapq.heapreplace(free, free[0] + seconds)
    found = Extraction(replace(WORK, frames=frames), replace(ALONE, nodes=3)).run()
    assert found["seconds"] == pytest.approx(max(free))


@pytest.mark.parametrize("limit", ["join", "receive", "card", "shared"])
def test_what_all_share_bounds_the_rate(limit):
    """64 nodes make 51,200 frames/s; the driver, its card or the file system carries a hundredth of their bytes."""
    work, bound = replace(WORK, frames=np.full(40 * 64 * 16, 100.0)), 512 * 30e3
    limits = {
        "join": {"join_bytes_per_s": bound},
        "receive": {"receive_bytes_per_s": bound},
        "card": {"card_bytes_per_s": bound, "latency_s": 0.0},
        "shared": {"through": "shared", "shared_bytes_per_s": bound},
    }
    found = Extraction(work, replace(ALONE, nodes=64, cores=16, **limits[limit])).run()
    # A card that is full both ways: shards come in bursts, and while they are sent nothing more is handed out.
    tolerance = 0.06 if limit == "card" else 0.02
    assert found["joined_s"] == pytest.approx(work.frames.sum() / 512, rel=tolerance)
    assert found["steady_frames_per_s"] == pytest.approx(512, rel=0.05)  # of bursts
    assert found["slots_busy"] < 0.02


def test_the_driver_is_busy_as_its_throughput_says():
    """Utilisation is throughput times service time, whatever else happens."""
    work = replace(WORK, frames=np.random.default_rng(1).integers(50, 300, 640).astype(float))
    cluster = replace(ALONE, nodes=4, join_bytes_per_s=2e8, receive_bytes_per_s=5e8)
    cluster = replace(cluster, card_bytes_per_s=1e9, connection_bytes_per_s=1e8)
    for through, service_s in (("driver", 1 / 2e8 + 1 / 5e8), ("shared", 1 / 2e8 + 2 / 1e9)):
        found = Extraction(work, replace(cluster, through=through)).run()
        throughput = work.frames.sum() * 30e3 / found["joined_s"]
        assert found["driver_busy"] == pytest.approx(throughput * service_s)
        assert found["slots_busy"] == pytest.approx(work.frames.sum() * 0.02 / (16 * found["joined_s"]))


def test_shards_are_uploaded_one_after_the_other():
    """So the store has them all no sooner than one shard's rate allows; and packing waits for all but the last few."""
    cluster = replace(ALONE, connection_bytes_per_s=1e5, connections=2)
    found = Extraction(WORK, cluster).run()
    each_s = WORK.videos_per_shard * 100 * 30e3 / 2e5
    assert found["seconds"] >= 12 * each_s
    assert (12 - MAX_UNSENT - 1) * each_s <= found["joined_s"] <= found["seconds"] - (MAX_UNSENT - 1) * each_s


def test_failures_cost_repeated_work_and_nothing_is_lost():
    work = replace(WORK, frames=np.full(2000, 100.0))
    cluster = replace(ALONE, nodes=4, join_bytes_per_s=1e9)
    whole = Extraction(work, cluster).run()
    failing = Extraction(work, replace(cluster, mean_up_s=100.0, repair_s=10.0)).run()
    assert whole["retries"] == 0 and failing["retries"] > 4
    # up for 100 of 110 seconds, and half a video is lost by each slot's failure
    assert failing["steady_frames_per_s"] == pytest.approx(whole["steady_frames_per_s"] * (100 / 110) * 0.99, rel=0.1)
    assert failing["seconds"] > whole["seconds"]


def test_the_longest_video_is_the_end():
    frames = np.full(640, 10.0)
    frames[-1] = 100_000
    found = Extraction(replace(WORK, frames=frames), replace(ALONE, nodes=16)).run()
    assert 2000 < found["seconds"] < 2005


def test_a_stretch_tells_of_the_whole():
    rng = np.random.default_rng(2)
    frames = rng.lognormal(5, 1, 20_000)
    cluster = replace(ALONE, nodes=8, cores=16, join_bytes_per_s=3e8, card_bytes_per_s=1e9)
    whole = Extraction(replace(WORK, frames=frames), cluster).run()
    stretch = hours_for(frames.sum(), replace(WORK, frames=frames[:5000]), cluster)
    assert 3600 * stretch["hours"] == pytest.approx(whole["seconds"], rel=0.05)


def test_speed_up_is_not_more_than_the_nodes(measured):
    kinetics = next(dataset for dataset in datasets() if dataset.name == "kinetics700")
    work = scale_model.extraction_of(kinetics, measured, "brox", 40 * 16 * 16)
    hours = {n: hours_for(kinetics.num_frames, work, scale_model.cluster_of(measured, n))["hours"] for n in (1, 4, 16)}
    for nodes in (4, 16):
        assert 0.9 * nodes < hours[1] / hours[nodes] <= nodes


def test_what_carries_the_fragments_is_as_busy_as_its_own_capacity_says():
    cluster = replace(ALONE, nodes=4, join_bytes_per_s=1e9, card_bytes_per_s=1e8, shared_bytes_per_s=4e7)
    for through, capacity in (("driver", 1e8), ("shared", 4e7)):
        found = Extraction(WORK, replace(cluster, through=through)).run()
        assert found["inward_busy"] == pytest.approx(96 * 100 * 30e3 / capacity / found["joined_s"])
        assert found["inward_busy"] <= 1


# --- training ----------------------------------------------------------------------------------------------------

GPU = Parts(step_s={64: 0.02}, hidden_s={64: 0.01}, gradient_bytes=363e6, link_bytes_per_s=3e9)


@pytest.mark.parametrize("nodes", [1, 2, 8, 64])
@pytest.mark.parametrize("rate", [1000.0, 1e5])
def test_equal_batches_take_what_the_closed_form_says(nodes, rate):
    found = Simulation(Training(nodes=nodes, num_samples=64, parts=GPU, loader_samples_per_s=rate), 50).run()
    expected = predict(nodes, 64, GPU, loader_samples_per_s=rate)
    assert found["step_s"] == pytest.approx(expected["step_s"])
    assert found["samples_per_s"] == pytest.approx(nodes * 64 / expected["step_s"])
    assert found["data_wait_s"] == pytest.approx(max(0.0, 64 / rate - found["step_s"] + found["data_wait_s"]))


def test_uneven_batches_take_what_a_recursion_says():
    """Independent code: times of every batch of every node, one step after the other. Alone, a batch takes the mean."""
    pace, rng = np.array([0.5, 0.5, 2.0]), np.random.default_rng(5)
    parts = replace(GPU, step_s={64: 0.08}, link_bytes_per_s=math.inf)
    training = Training(nodes=1, num_samples=64, parts=parts, loader_samples_per_s=640.0, pace=pace)
    times = []
    for nodes in (1, 4, 64):
        found = Simulation(replace(training, nodes=nodes), 3000).run()["step_s"]
        put, start = np.zeros(nodes), 0.0
        taken = [np.zeros(nodes), np.zeros(nodes)]  # of the two batches before
        starts = []
        for _ in range(3000):
            put = np.maximum(put + 0.1 * rng.choice(pace, nodes), taken[-2])  # room for two
            taken.append(np.maximum(start, put))
            start = taken[-1].max() + 0.08
            starts.append(start)
        assert found == pytest.approx(np.diff(starts)[600:].mean(), rel=0.02)
        times.append(found)
    assert 0.1 < times[0] < 0.11 and times[0] < times[1] < times[2] < 0.2


def test_fetches_bound_the_rate_by_the_store_and_by_what_a_node_brings():
    shards = Shards(exchange_steps=2, shard_bytes=3e8, fetches=2.0, store_bytes_per_s=1e9, ahead_steps=10)
    training = Training(nodes=8, num_samples=64, parts=GPU, loader_samples_per_s=1e6, shards=shards)
    found = Simulation(training, 600).run()
    assert found["step_s"] == pytest.approx(2 * 3e8 / 1e9 / 2, rel=0.05)  # 2 shards of 300 MB for 2 steps, at 1 GB/s
    assert found["store_bytes_per_s"] == pytest.approx(1e9, rel=0.05)
    one = replace(shards, fetches=1.0, store_bytes_per_s=math.inf, connection_bytes_per_s=1e8, at_a_time=3)
    alone = Simulation(replace(training, nodes=1, shards=one), 300).run()
    assert alone["step_s"] == pytest.approx(3.0 / 3 / 2, rel=0.05)  # 3 shards every 3 s, one needed in 2 steps
    free = Simulation(replace(training, shards=replace(shards, store_bytes_per_s=math.inf)), 100).run()
    assert free["step_s"] == pytest.approx(predict(8, 64, GPU)["step_s"])


def test_several_shards_a_step_bound_the_rate_too():
    shards = Shards(exchange_steps=0.25, pool_shards=64, shard_bytes=1e8, store_bytes_per_s=1e9, ahead_steps=10)
    training = Training(nodes=8, num_samples=64, parts=GPU, loader_samples_per_s=1e6, shards=shards)
    assert Simulation(training, 600).run()["step_s"] == pytest.approx(4 * 1e8 / 1e9, rel=0.05)


@pytest.mark.parametrize(("nodes", "card_gbit"), [(1, 10.0), (2, 100.0), (16, 25.0), (64, 25.0)])
def test_twice_the_steps_give_the_same_rate(measured, nodes, card_gbit):
    training, steps = scale_model.training_of(measured, nodes, card_gbit=card_gbit), scale_model.steps_of(nodes)
    once, twice = (Simulation(training, many).run()["samples_per_s"] for many in (steps, 2 * steps))
    assert once == pytest.approx(twice, rel=0.02)


def test_one_node_with_a_slow_card_waits_for_its_fetches(measured):
    """By hand: 4 fetches at a time, each at a quarter of the card or at what the connections give, then hashed."""
    shards = scale_model.training_of(measured, 1, card_gbit=10.0).shards
    fetch_s = shards.latency_s + shards.shard_bytes / min(1.25e9 / 4, 8 * 85e6)
    fetch_s += shards.shard_bytes / shards.hash_bytes_per_s
    found = Simulation(scale_model.training_of(measured, 1, card_gbit=10.0), 1500).run()
    assert found["samples_per_s"] == pytest.approx(4 / fetch_s * shards.exchange_steps * 256, rel=0.03)


def test_a_short_run_has_nothing_to_measure():
    training = Training(nodes=1, num_samples=64, parts=GPU, loader_samples_per_s=1e5, shards=Shards(exchange_steps=2))
    with pytest.raises(ValueError, match="60 steps"):
        Simulation(training, 60).run()


@pytest.mark.parametrize(("nodes", "scaling"), [(8, "weak"), (64, "weak"), (16, "strong")])
def test_fetches_are_those_of_the_draw(nodes, scaling, measured):
    """Batches drawn from the pool as the loader draws them: how many nodes' slices a shard is ever in."""
    pool_shards, batch_size = scale_model.POOL_SHARDS, 256 * (nodes if scaling == "weak" else 1)
    table = make_table(MadeSet("made", 32 * 900, 700, 3.0))
    pool, rng = ShardPool(table, pool_shards, 1), np.random.default_rng(0)
    shard_of = np.empty(len(table.video), np.int64)
    shard_of[table.video] = np.repeat(np.arange(len(table.shards)), np.diff(table.start))
    touched = np.zeros((len(table.shards), nodes), bool)
    exchange = 80_000 * 256 / batch_size / 20_323
    for step in range(int((len(table.shards) - pool_shards) * exchange)):
        drawn = draw_pooled(pool.at(0, int(step / exchange)), batch_size, rng)  # one epoch: entry = exchanges so far
        touched[shard_of[drawn], np.arange(batch_size) * nodes // batch_size] = True
    whole = draw_shard_order(0, 0, len(table.shards))[pool_shards : -pool_shards - 1]  # came and went
    assert measured.fetches_of(nodes) == pytest.approx(touched[whole].sum(1).mean(), rel=0.1)


def test_a_pass_takes_as_many_shards_a_step_as_it_needs():
    for batch_size in (256, 512, 256 * 64):
        steps = scale_model.STEPS * 256 // batch_size
        exchanged = steps / scale_model.exchange_steps(20_323, batch_size)
        assert exchanged >= 20_323 * (1 - 1e-9)
        seen = scale_model.seen_share(20_323, batch_size)
        assert seen == min(1, len(set(range(256)) | set(range(256 + steps - 1))) / 20_323)


# --- what limits -------------------------------------------------------------------------------------------------


def test_the_bottleneck_is_the_input_that_gains_most():
    def rate(factors):
        f = {"a": 1.0, "b": 1.0, "c": 1.0, **factors}
        return min(10 * f["a"], 12 * f["b"] ** 0.5, 100 / f["c"])

    found = sensitivity(rate, {"a": 1, "b": 1, "c": -1})
    assert (found["rate"], found["bottleneck"]) == (10, "a")
    gains = {row["input"]: (row["gain"], row["loss"]) for row in found["inputs"]}
    assert gains["a"] == pytest.approx((0.2, -0.5)) and gains["c"] == pytest.approx((0, 0))
    assert gains["b"] == pytest.approx((0, 12 * 0.5**0.5 / 10 - 1))
    power = sensitivity(lambda f: 5 * f.get("a", 1) ** 0.3 / f.get("b", 1), {"a": 1, "b": -1})
    assert {row["input"]: row["elasticity"] for row in power["inputs"]} == pytest.approx({"a": 0.3, "b": -1})
    assert sensitivity(lambda f: 1.0, {"a": 1})["bottleneck"] is None


def test_a_card_and_the_connections_to_the_store_bound_a_fetch_together():
    """Whichever is slower counts; a better card helps the gradients and the fetches."""
    shards = Shards(exchange_steps=1, shard_bytes=3e8, card_bytes_per_s=1e9, connection_bytes_per_s=5e8, ahead_steps=10)
    parts = replace(GPU, link_bytes_per_s=math.inf)
    training = Training(nodes=1, num_samples=64, parts=parts, loader_samples_per_s=1e6, shards=shards)
    usual = training_rate(training, 400, {})
    assert training_rate(training, 400, {"card_rate": 2.0}) == pytest.approx(2 * usual, rel=0.05)
    assert training_rate(training, 400, {"card_rate": 4.0}) == pytest.approx(2 * usual, rel=0.05)
    assert training_rate(training, 400, {"connection_rate": 2.0}) == pytest.approx(usual)


def test_scaling_stops_where_doubling_is_not_worth_it():
    rates = {"full": [1, 2, 4, 6, 6], "dips": [4, 2, 4, 8, 16], "falls": [4, 3, 2, 2, 2], "never": [1, 2, 4, 8, 16]}
    rows = [{"of": of, "nodes": 2**i, "rate": rate} for of, found in rates.items() for i, rate in enumerate(found)]
    add_speedup(rows, ("of",), lambda row: row["rate"])
    stops = {row["of"]: row["stops_at"] for row in rows}
    assert stops == {"full": 8, "dips": None, "falls": 1, "never": None}
    assert [row["speedup"] for row in rows if row["of"] == "dips"] == [1, 0.5, 1, 2, 4]


# --- inputs and programs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return read_measured(RESULTS)


def test_lengths_have_the_mean_that_is_published_and_at_least_two_frames(measured):
    for dataset in datasets():
        lengths = dataset.lengths(measured.lengths, 5000, np.random.default_rng(0))
        assert lengths.mean() == pytest.approx(dataset.num_frames / dataset.num_videos, rel=0.01)
        assert lengths.min() >= 2
    assert all(assumption.source for assumption in ASSUMPTIONS.values())


def test_published_sets_follow_from_the_published_measurements(measured):
    """Whoever measures anew has to simulate anew."""
    result = json.loads((RESULTS / "scale_model.json").read_text())
    now = json.loads(json.dumps([scale_model.set_row(dataset, measured) for dataset in datasets()]))
    assert result["sets"] == now
    assert result["node_rates"] == json.loads(json.dumps(scale_model.node_rates(measured)))
    for row in result["training"]:
        assert row["fetches"] == measured.fetches_of(row["nodes"])
    for row in result["extraction"]:
        assert row["speedup"] <= row["nodes"]


def test_node_hours_are_frames_times_seconds(measured):
    by_name = {row["set"]: row for row in (scale_model.set_row(dataset, measured) for dataset in datasets())}
    extraction = json.loads((RESULTS / "flow_extraction.json").read_text())
    dis = next(row["cpu_s_per_pair"] for row in extraction["rows"] if row["name"] == "dis")
    least = 13_320 * 7.21 * 25 * dis / 16 / 3600  # flow alone
    assert least < by_name["ucf101"]["node_hours"]["dis"] < 2 * least
    whole, cut = by_name["sports1m"], by_name["sports1m_10s"]
    for key in ("bytes", "bytes_with_backward", "index_bytes", "index_h"):
        assert whole[key] == pytest.approx(33.6 * cut[key])
    assert whole["bytes"] < whole["bytes_with_backward"] < 2 * whole["bytes"]


def test_fetches_are_read_where_they_were_measured(tmp_path):
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)

    def row(pool_shards, most):
        machines = [{"world_size": n, "fetches_per_shard": 1 + most * n / 64} for n in (2, 64)]
        return {"set": "Kinetics-700", "pool_shards": pool_shards, "batch_size": 256, "machines": machines}

    (tmp_path / "draw_statistics.json").write_text(json.dumps({"rows": [row(16, 3), row(256, 6.4)]}))
    found = read_measured(tmp_path)
    assert found.fetches == {2: 1.2, 64: 7.4}
    assert [found.fetches_of(nodes) for nodes in (2, 33, 64)] == pytest.approx([1.2, 4.3, 7.4])
    (tmp_path / "draw_statistics.json").write_text(json.dumps({"rows": [row(16, 3)]}))
    with pytest.raises(ValueError, match="no row of Kinetics-700"):
        read_measured(tmp_path)


def test_a_missing_measurement_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"scale_costs\.json"):
        scale_model.main(["--from", str(tmp_path), "--out", str(tmp_path)])
