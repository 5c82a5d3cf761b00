"""benchmarks/train_step.py: what it writes, what it counts, and that what it times is what trains."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import train_step  # noqa: E402
import trainee  # noqa: E402

from loaders.index import open_index  # noqa: E402
from tests.tiny import tiny_config  # noqa: E402
from train import engine  # noqa: E402
from train.dist import World  # noqa: E402
from train.log import read_log  # noqa: E402

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, device=CPU, num_threads=1)


def test_quick_run_writes_every_row(packed_demo, tmp_path, capsys):
    out = tmp_path / "train_step.json"
    assert train_step.main(["--quick", "--data", str(packed_demo), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "config", "rows"} <= set(result)
    assert result["config"]["train.batch_size"] == 8 and "data.root" not in result["config"]
    assert result["peak_source"] == "measured, float32 matrix product"
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["resident", "loader_k1", "loader_k8"]
    for name, row in rows.items():
        rate = row["samples_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert row["step_s"]["median"] == pytest.approx(8 / rate["median"])
        assert row["ratio_to_resident"] == pytest.approx(rate["median"] / rows["resident"]["samples_per_s"]["median"])
        assert row["projected_hours"] == pytest.approx(80_000 * 256 / rate["median"] / 3600)
        arithmetic = rate["median"] * result["flops_per_sample"] / 1e12
        assert row["mfu_pct"] == pytest.approx(100 * arithmetic / result["peak_tflops"])
        assert 0 <= row["data_wait_pct"] <= 100
        assert (name != "resident") == ("loader_samples_per_s" in row)
    assert "resident" in capsys.readouterr().out


def test_flops_are_those_of_convolutions_and_fully_connected_layers():
    """Two for a multiplication and an addition, and as many again for each of two gradients; conv1's input has none."""
    options = train_step.parse(["--width", "0.125", "--crop-px", "112", "--L", "5"])
    config = train_step.make_config(options, Path("packed"))
    # channels in, channels out, kernel, output side: 112 -> 53 -> 26 -> 12 -> 6 -> 3
    convolutions = [(10, 12, 7, 53), (12, 32, 5, 12), (32, 64, 3, 6), (64, 64, 3, 6), (64, 64, 3, 6)]
    layers = [2 * i * o * k**2 * side**2 for i, o, k, side in convolutions]
    layers += [2 * i * o for i, o in [(64 * 3 * 3, 512), (512, 256), (256, 7)]]
    assert train_step.flops_per_sample(config, 7) == 3 * sum(layers) - layers[0]


def test_what_is_timed_is_what_trains(packed, tmp_path, monkeypatch):
    """The same losses as train_stream's, for the same batches and learning rate."""
    config = tiny_config(packed, temporal__steps=3, temporal__lr=trainee.LEARNING_RATE)
    index = open_index(packed)
    engine.train_stream(config, "temporal", index, tmp_path, ALONE)
    found, update = [], engine.update

    def recorded(*arguments):
        found.append(update(*arguments)[0].item())

    monkeypatch.setattr(trainee, "update", recorded)
    timed = trainee.Trainee(config, len(index.classes), ALONE)
    with trainee.open_loader(config, index, ALONE) as loader:
        trainee.time_steps(timed, loader, steps=2, warm_up=1)
    assert found == [record["loss"] for record in read_log(tmp_path / "log.jsonl")]


def test_peak_is_given_known_or_measured(monkeypatch):
    assert train_step.peak_tflops(CPU, 12.5) == (12.5, "--peak-tflops")
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert train_step.peak_tflops(gpu, None) == (989.0, "data sheet, dense bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "unheard of")
    monkeypatch.setattr(train_step, "product_tflops", lambda device, dtype, side: 1.0 if dtype.itemsize == 2 else 0.0)
    assert train_step.peak_tflops(gpu, None) == (1.0, "measured, bfloat16 matrix product")


def test_a_row_that_cannot_be_compiled_is_a_result(packed_demo, tmp_path, monkeypatch):
    def failing(net):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(engine.CNNM, "compile", lambda net: net.register_forward_pre_hook(lambda *_: failing(net)))
    out = tmp_path / "out.json"
    command = ["--quick", "--data", str(packed_demo), "--out", str(out), "--rows", "resident", "resident_compiled"]
    assert train_step.main(command) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["resident_compiled"]["error"] == "no C compiler"
    assert rows["resident"]["ratio_to_resident"] == 1
