"""Training: resumed equals uninterrupted, to the bit; the update is the paper's; errors are named."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loaders import dali_loader
from loaders.index import open_index
from nets.cnn_m import CNNM
from tests.tiny import tiny_config
from train import engine
from train.checkpoint import load_checkpoint
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
        assert set(record) == {"step", "loss", "lr", "samples_per_s", "data_wait_pct"}
        assert math.isfinite(record["loss"])
        assert record["samples_per_s"] > 0
        assert 0 <= record["data_wait_pct"] <= 100
    assert list((uninterrupted / "temporal").glob("events.out.tfevents.*"))


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


def test_a_loss_that_is_not_finite_stops_the_run(packed, tmp_path):
    with pytest.raises(FloatingPointError, match=r"spatial: the loss is (nan|inf) at step \d+; lower spatial.lr"):
        train(tiny_config(packed, spatial__lr=1e8), "spatial", tmp_path)


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
