"""A checkpoint is whole, or the former one, or an error that says what to do."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hostile import bounded_memory
from train import checkpoint as module
from train.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    checkpoint_files,
    load_checkpoint,
    load_newest,
    load_state,
    save_checkpoint,
    set_aside,
)


def make(step=5, **changes):
    net = {"weight": torch.arange(6.0).reshape(2, 3) + min(int(step), 100)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    fields = {"stream": "spatial", "step": step, "net": net, "optimizer": optimizer, "config": {"train.seed": 0}}
    return Checkpoint(**{**fields, "dataset": "d1", **changes})


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(make(), path)
    loaded = load_checkpoint(path, dataset="d1")
    assert (loaded.stream, loaded.step, loaded.config, loaded.dataset) == ("spatial", 5, {"train.seed": 0}, "d1")
    assert torch.equal(loaded.net["weight"], make().net["weight"])
    assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(2, 3))


@pytest.mark.parametrize("moment", ["writing", "syncing", "renaming"])
def test_a_save_that_fails_leaves_the_former_checkpoint(tmp_path, monkeypatch, moment):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(make(step=5), path)

    def write_half(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    def fail(*_):
        raise OSError("no space left on device")

    target, name, double = {
        "writing": (module.torch, "save", write_half),
        "syncing": (os, "fsync", fail),
        "renaming": (os, "replace", fail),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, double)
        with pytest.raises((KeyboardInterrupt, OSError), match=None if moment == "writing" else "no space left"):
            save_checkpoint(make(step=6), path)
    assert load_checkpoint(path).step == 5
    save_checkpoint(make(step=7), path)
    assert load_checkpoint(path).step == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(make(), path)
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged .*delete it"):
            load_checkpoint(path)


def test_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"format_version": 1, "net": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "run").exists()


def test_other_versions_data_sets_and_missing_files_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*: train this stream first"):
        load_checkpoint(path)
    save_checkpoint(make(), path)
    with pytest.raises(ValueError, match="was trained on data set d1, not on d2"):
        load_checkpoint(path, dataset="d2")
    torch.save({"format_version": 99}, path)
    with pytest.raises(ValueError, match="has checkpoint format 99; this program reads 1"):
        load_checkpoint(path)


def test_the_last_ones_are_kept_and_at_every_instant_a_whole_one_is_there(tmp_path, monkeypatch):
    path, replace, found = tmp_path / "checkpoint.pt", os.replace, []

    def watched(source, target):
        found.append(load_newest(path)[0])
        replace(source, target)
        found.append(load_newest(path)[0])

    save_checkpoint(make(step=1), path, keep=3)
    monkeypatch.setattr(os, "replace", watched)
    for step in range(2, 6):
        del found[:]
        save_checkpoint(make(step=step), path, keep=3)
        assert found[-1].step == step and {checkpoint.step for checkpoint in found[:-1]} == {step - 1}
    assert [load_checkpoint(file).step for file in checkpoint_files(path)] == [5, 4, 3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.1", "checkpoint.pt.2"]


def test_a_damaged_newest_falls_back_and_is_put_aside(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert load_newest(path) == (None, [])
    for step in (1, 2):
        save_checkpoint(make(step=step), path, keep=2)
    path.write_bytes(path.read_bytes()[:-100])
    checkpoint, damaged = load_newest(path)
    assert (checkpoint.step, damaged) == (1, [path])
    assert set_aside(*damaged, path) == tmp_path / "checkpoint.pt.damaged"
    save_checkpoint(make(step=2), path, keep=2)  # and does not push the good one out
    assert [load_checkpoint(file).step for file in checkpoint_files(path)] == [2, 1]
    for file in checkpoint_files(path):
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="checkpoint.pt, checkpoint.pt.1 in .*no checkpoint is whole.*--resume never"):
        load_newest(path)


def test_another_data_set_is_no_damage(tmp_path):
    save_checkpoint(make(step=1), tmp_path / "checkpoint.pt", keep=2)
    save_checkpoint(make(step=2, dataset="d2"), tmp_path / "checkpoint.pt", keep=2)
    with pytest.raises(ValueError, match="was trained on data set d2, not on d1"):
        load_newest(tmp_path / "checkpoint.pt", dataset="d1")


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    """torch.load alone reads most of these without a word."""
    path, rng = tmp_path / "checkpoint.pt", np.random.default_rng(0)
    save_checkpoint(make(), path)
    content, num_found = path.read_bytes(), 0
    for at, bit in zip(rng.integers(len(content), size=150), rng.integers(8, size=150), strict=True):
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        try:
            loaded = load_checkpoint(path)
        except DamagedCheckpointError:
            num_found += 1
            continue
        assert (loaded.step, loaded.config, loaded.dataset) == (5, {"train.seed": 0}, "d1")
        assert torch.equal(loaded.net["weight"], make().net["weight"])
        assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(2, 3))
    assert num_found > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": [1]}, "net is a list, expected a dict"),
        ({"step": "5", "net": {}}, "step is a str, expected a int"),
        ({"step": -1}, "step -1 of stream 'spatial'"),
        ({"stream": "other"}, "step 5 of stream 'other'"),
        ({"net": {"weight": 5}}, "net holds more than whole tensors"),
        ({"config": {"a": bytearray(5)}}, "names .*bytearray, which no checkpoint needs"),
        ({"config": {5: 1}}, "config holds more than plain values"),
        ({"config": {"train.seed": {"a": 1}}}, "config holds more than plain values"),
        ({"net": {5: torch.ones(1)}}, "net holds more than whole tensors by their names"),
        ({"net": {"weight": torch.ones(1).expand(10**9)}}, "net holds more than whole tensors"),
        ({"step": 2**70, "net": {}}, "a step of 71 bits"),
    ],
)
def test_other_contents_are_named(tmp_path, change, message):
    save_checkpoint(make(**change), tmp_path / "checkpoint.pt")
    with pytest.raises(DamagedCheckpointError, match=message):
        load_checkpoint(tmp_path / "checkpoint.pt")


def laughs(levels=60):
    """A list that stands for 2**60 values; the pickle has each level once."""
    value = ["a"]
    for _ in range(levels):
        value = [value, value]
    return value


ONE = torch.ones(1).expand(10**9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"train.streams": laughs()}}, "config holds more than plain values"),
        *(
            ({"optimizer": {"state": state}}, "optimizer holds more than whole tensors")
            for state in ([], {0: [ONE]}, {"0": {}}, {0: {"momentum_buffer": ONE}}, {0: {"momentum_buffer": laughs()}})
        ),
    ],
    ids=range(6),
)
def test_little_that_stands_for_much_is_refused(tmp_path, change, message):
    save_checkpoint(make(**change), tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 10_000
    with bounded_memory(), pytest.raises(DamagedCheckpointError, match=message):
        load_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    "state",
    [
        {0: {"momentum_buffer": torch.ones(7)}},
        {0: {"momentum_buffer": torch.ones(2, 3, dtype=torch.float64)}},
        {0: {"step": torch.ones(2, 3)}},
        {1: {"momentum_buffer": torch.ones(2, 3)}},
        {-1: {"momentum_buffer": torch.ones(2, 3)}},
    ],
    ids=str,
)
def test_another_optimizers_momentum_is_named(tmp_path, state):
    """Torch takes all of these; most fail in the next step."""
    optimizer = torch.optim.SGD([torch.ones(2, 3, requires_grad=True)], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="checkpoint.pt is of another net"):
        load_state(
            optimizer, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}, Path("checkpoint.pt")
        )


def test_the_config_and_not_the_checkpoint_sets_the_optimizer():
    weight = torch.ones(2, 3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    momentum = {"momentum_buffer": torch.full((2, 3), 4.0)}
    load_state(optimizer, {"state": {0: momentum}, "param_groups": [{"momentum": "x", "lr": 9}]}, Path("checkpoint.pt"))
    weight.grad = torch.zeros(2, 3)
    optimizer.step()  # v = 0.9 v + 0.5 w, w - 0.1 v
    torch.testing.assert_close(weight.detach(), torch.full((2, 3), 1 - 0.1 * (0.9 * 4 + 0.5)))


@contextmanager
def file_size_limit(num_bytes):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("limit", [0, 100, 40_000])
def test_a_disk_that_refuses_is_named_and_harms_nothing(tmp_path, limit):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(make(step=5), path, keep=2)
    before = path.read_bytes()
    with (
        file_size_limit(limit),
        pytest.raises(OSError, match="cannot write .*checkpoint.pt: File too large.*make space"),
    ):
        save_checkpoint(make(step=6, net={"weight": torch.ones(200, 200)}), path, keep=2)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"] and path.read_bytes() == before
    save_checkpoint(make(step=6), path, keep=2)
    assert [load_checkpoint(file).step for file in checkpoint_files(path)] == [6, 5]


def test_no_fifo_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint_files(tmp_path / "checkpoint.pt") == []
