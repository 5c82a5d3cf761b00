"""Training: resumed equals uninterrupted, to the bit; the update is the paper's; errors are named."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flow.shard import ShardError
from loaders import dali_loader
from loaders.index import open_index
from nets.cnn_m import CNNM
from tests.tiny import tiny_config
from train import engine
from train.checkpoint import checkpoint_files, load_checkpoint
from train.dist import World
from train.log import read_log
from train.model import build_net, stream_spec

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"), num_threads=2)


def train(config, stream, folder):
    engine.train_stream(config, stream, open_index(config.data.root), folder, ALONE)


def losses(folder):
    return [(record["step"], record["loss"]) for record in read_log(folder / "log.jsonl")]


def stop_after(monkeypatch, num_updates):
    """Let training run `num_updates` updates and interrupt it in the next."""
    update, done = engine.update, []

    def interrupted(*arguments):
        if len(done) == num_updates:
            raise KeyboardInterrupt
        done.append(1)
        return update(*arguments)

    monkeypatch.setattr(engine, "update", interrupted)


@pytest.fixture(scope="module")
def uninterrupted(packed, tmp_path_factory):
    """stream -> folder of a whole training."""
    folder = tmp_path_factory.mktemp("whole")
    for stream in ("spatial", "temporal"):
        train(tiny_config(packed), stream, folder / stream)
    return folder


@pytest.mark.parametrize(
    ("stream", "stops"), [("spatial", [1, 5]), ("temporal", [4]), ("temporal", [7, 3]), ("temporal", [9])]
)
def test_stopped_and_resumed_equals_uninterrupted_bitwise(packed, tmp_path, monkeypatch, uninterrupted, stream, stops):
    config = tiny_config(packed)
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, stop)
            train(config, stream, tmp_path)
    torch.rand(3)  # the global generator plays no part
    train(config, stream, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted / stream)  # every step once, and equal to the bit
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (tmp_path, uninterrupted / stream))
    for name, value in theirs.net.items():
        assert torch.equal(ours.net[name], value), name


def test_a_finished_training_is_left_alone(packed, tmp_path, monkeypatch):
    config = tiny_config(packed, temporal__steps=2)
    train(config, "temporal", tmp_path)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    stop_after(monkeypatch, 0)
    train(config, "temporal", tmp_path)
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


def test_every_log_line_has_loss_rate_throughput_and_wait(uninterrupted):
    records = read_log(uninterrupted / "temporal" / "log.jsonl")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["lr"] for record in records] == [0.01] * 6 + [0.001] * 4
    for record in records:
        assert set(record) == {"step", "loss", "accuracy_pct", "lr", "samples_per_s", "data_wait_pct"}
        assert math.isfinite(record["loss"])
        assert record["samples_per_s"] > 0
        assert 0 <= record["data_wait_pct"] <= 100
    assert list((uninterrupted / "temporal").glob("events.out.tfevents.*"))


def test_the_accuracy_of_a_log_line_is_that_of_the_batch_of_its_loss(packed, tmp_path, monkeypatch):
    """Not of the steps between two lines: a resumed run would know only some of them."""
    shares, judge = [], engine.count_correct

    def counted(logits, labels, *others):
        shares.append(100 * np.mean(logits.detach().numpy().argmax(1) == labels.numpy()))
        return judge(logits, labels, *others)

    monkeypatch.setattr(engine, "count_correct", counted)
    train(tiny_config(packed, train__log_every=4), "spatial", tmp_path)
    found = {record["step"]: record["accuracy_pct"] for record in read_log(tmp_path / "log.jsonl")}
    assert found == {step: shares[step - 1] for step in (4, 8, 10)} and len(set(shares)) > 1


def test_both_loaders_train_alike(packed, tmp_path, uninterrupted):
    train(tiny_config(packed, data__loader="reference"), "temporal", tmp_path)
    ours, theirs = losses(tmp_path), losses(uninterrupted / "temporal")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_update_is_sgd_with_momentum_and_weight_decay(packed):
    """v := 0.9 v + (gradient + 5e-4 w), w := w - lr v, written out."""
    config = tiny_config(packed)
    index = open_index(packed)
    net = build_net(config, "temporal", 3, torch.device("cpu")).train()
    assert isinstance(net, CNNM)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4)
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    velocities = [torch.zeros_like(weight) for weight in weights]
    loader = dali_loader.train_loader(
        index, index.split("split1_train"), stream_spec(config, "temporal"), seed=0, batch_size=8
    )
    with loader:
        for step, lr in enumerate((0.1, 0.01)):
            batch, masks = next(loader), net.draw_masks(0, step, batch_size=8)
            gradients = torch.autograd.grad(
                F.cross_entropy(net(batch.inputs, masks), batch.labels), list(net.parameters())
            )
            velocities = [0.9 * v + (g + 5e-4 * w) for v, g, w in zip(velocities, gradients, weights, strict=True)]
            weights = [w - lr * v for v, w in zip(velocities, weights, strict=True)]
            engine.update(net, optimizer, lr, batch, masks, config)
    for parameter, weight in zip(net.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight)


def test_videos_too_short_for_training_are_reported(packed, tmp_path, caplog):
    train(tiny_config(packed, data__L=5, temporal__steps=1), "temporal", tmp_path)
    assert "1 videos are too short for training" in caplog.text


def test_a_loss_that_explodes_names_step_videos_and_what_to_do(packed, tmp_path):
    videos = r"its videos were ((run|walk|sit)/[^,]+(, )?)+\."
    with pytest.raises(
        FloatingPointError,
        match=r"spatial: the loss is (nan|inf|[0-9.e+]+) at step \d+; lower spatial.lr, .*No checkpoint yet: .*"
        + videos,
    ):
        train(tiny_config(packed, spatial__lr=1e8), "spatial", tmp_path)
    assert not checkpoint_files(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(("keep", "after"), [(2, 4), (1, 8)])
@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_checkpoint_that_explodes_is_put_aside(packed, tmp_path, monkeypatch, uninterrupted, keep, after, log_every):
    """Finite weights, but huge, at a save: the next step's loss tells. Should none be left, it stays."""
    update, done = engine.update, []

    def spoiled(model, *arguments):
        judged = update(model, *arguments)
        done.append(1)
        if len(done) == 8:
            for parameter in model.parameters():
                parameter.data *= 1e12
        return judged

    config = tiny_config(packed, train__keep_checkpoints=keep, train__log_every=log_every)
    aside = "it is now checkpoint.pt.damaged, and the same command goes on from the one before it"
    alone = "none before it is kept: if it fails again, give --resume never"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "update", spoiled)
        with pytest.raises(
            FloatingPointError,
            match=f"the loss is .* at step 9; .* The checkpoint of step 8 in .*{aside if keep == 2 else alone}",
        ):
            train(config, "temporal", tmp_path)
    assert [load_checkpoint(file).step for file in checkpoint_files(tmp_path / "checkpoint.pt")] == [after]
    if keep == 2:
        assert load_checkpoint(tmp_path / "checkpoint.pt.damaged").step == 8
        train(config, "temporal", tmp_path)
        ours, theirs = (load_checkpoint(run / "checkpoint.pt").net for run in (tmp_path, uninterrupted / "temporal"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("log_every", [1, 1000])
@pytest.mark.parametrize("step", [5, 8])
def test_a_weight_that_is_not_finite_is_never_saved(packed, tmp_path, monkeypatch, log_every, step):
    """After step 8 there would be a save; that of step 4 is good. The videos are those that the loader has drawn."""
    update, drawn = engine.update, []

    def spoiled(model, optimizer, lr, batch, *arguments):
        drawn.append(sorted(set(open_index(packed).video_ids(batch.draw.video))))
        judged = update(model, optimizer, lr, batch, *arguments)
        if len(drawn) == step:
            next(model.parameters()).data[0] = math.nan
        return judged

    monkeypatch.setattr(engine, "update", spoiled)
    what = "the loss is nan at step 6" if step == 5 else "weights are not finite after step 8"
    with pytest.raises(FloatingPointError, match=f"temporal: {what}; .* The checkpoint of step 4 in ") as error:
        train(tiny_config(packed, train__log_every=log_every), "temporal", tmp_path)
    assert str(error.value).endswith(f"its videos were {', '.join(drawn[5 if step == 5 else 7])}.")
    assert [load_checkpoint(file).step for file in checkpoint_files(tmp_path / "checkpoint.pt")] == [4]


def test_a_damaged_newest_checkpoint_falls_back_and_ends_bitwise_equal(packed, tmp_path, uninterrupted, caplog):
    shutil.copytree(uninterrupted / "temporal", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    train(tiny_config(packed), "temporal", tmp_path / "run")
    assert "checkpoint.pt is damaged" in caplog.text and "of step 8" in caplog.text
    assert losses(tmp_path / "run") == losses(uninterrupted / "temporal")
    ours, theirs = (load_checkpoint(file).net for file in (path, uninterrupted / "temporal" / "checkpoint.pt"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_net_is_named(packed, tmp_path):
    train(tiny_config(packed, temporal__steps=1), "temporal", tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt is of another net than this config's"):
        train(tiny_config(packed, model__width=0.0625), "temporal", tmp_path)


def test_a_checkpoint_beyond_the_last_step_is_named(packed, tmp_path):
    train(tiny_config(packed, temporal__steps=3), "temporal", tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt is of step 3, but the run has 2: it is another run's"):
        train(tiny_config(packed, temporal__steps=2), "temporal", tmp_path)


def test_gradients_are_clipped_to_their_norm(packed):
    """Without momentum and decay, the step is lr times the gradient, whose norm is at most the bound."""
    config = tiny_config(packed, train__momentum=0, train__weight_decay=0, train__clip_grad_norm=0.5)
    index = open_index(packed)
    steps = {}
    for bound in (None, 0.5, 1e9):
        config.train.clip_grad_norm = bound
        net = build_net(config, "temporal", 3, torch.device("cpu")).train()
        before = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        loader = dali_loader.train_loader(
            index, index.split("split1_train"), stream_spec(config, "temporal"), seed=0, batch_size=8
        )
        with loader:
            optimizer = torch.optim.SGD(net.parameters(), momentum=0, weight_decay=0)
            engine.update(net, optimizer, 1.0, next(loader), net.draw_masks(0, 0, batch_size=8), config)
        steps[bound] = torch.cat([parameter.detach().flatten() for parameter in net.parameters()]) - before
    norm = steps[None].norm()
    assert norm > 0.6 and torch.equal(steps[1e9], steps[None])
    torch.testing.assert_close(steps[0.5], steps[None] * 0.5 / norm, rtol=1e-3, atol=1e-6)


def test_a_checkpoint_of_another_data_set_is_refused(packed, tmp_path, monkeypatch):
    config = tiny_config(packed, spatial__steps=1)
    train(config, "spatial", tmp_path)
    index = open_index(packed)
    monkeypatch.setattr(type(index), "fingerprint", "other")
    with pytest.raises(ValueError, match="was trained on data set .*, not on other"):
        engine.train_stream(config, "spatial", index, tmp_path, ALONE)


def test_bfloat16_trains_close_to_float32(packed, tmp_path, uninterrupted):
    train(tiny_config(packed, train__precision="bfloat16"), "spatial", tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(uninterrupted / "spatial"), rtol=0.1)


def test_videos_of_several_data_sets_are_named_by_their_own():
    """Shares of 5 and 3 of a batch of 8: rank 0 has four of the first set, rank 1 one of it and all of the other."""
    sets = [
        SimpleNamespace(index=SimpleNamespace(video_ids=lambda rows, name=name: [f"{name}{row}" for row in rows]))
        for name in "ab"
    ]
    tasks = SimpleNamespace(sets=sets)
    for rank, expected in enumerate([["a7", "a8", "a9", "a10"], ["a7", "b8", "b9", "b10"]]):
        world = World(rank=rank, world_size=2, device=torch.device("cpu"), num_threads=1)
        assert engine._video_ids(np.arange(7, 11), tasks, [5, 3], world) == expected


def test_training_goes_on_over_damage_if_it_may_and_logs_it(packed, tmp_path):
    root = shutil.copytree(packed, tmp_path / "set")
    index = open_index(root)
    (row,) = index.rows(["run/long"])
    places = index.entries["dx"]["offset"][index.first_row[row] :][:60].tolist()
    with open(root / index.shards[index.shard[row]], "r+b") as file:
        for place in places:  # every sample of the video
            file.seek(place + 100)
            file.write(bytes(50))
    with pytest.raises(ShardError, match=r"run/long/0000.\d+.dx.jpg at offset \d+: damaged"):
        train(tiny_config(root), "temporal", tmp_path / "raise")
    train(tiny_config(root, data__on_damage="skip", data__max_damaged_pct=50), "temporal", tmp_path / "skip")
    records = read_log(tmp_path / "skip" / "log.jsonl")
    assert records[-1]["step"] == 10 and records[-1]["num_replaced"] >= records[0]["num_replaced"] > 0
    with pytest.raises(ShardError, match="more than data.max_damaged_pct=0.0"):
        train(tiny_config(root, data__on_damage="skip", data__max_damaged_pct=0), "temporal", tmp_path / "none")
