"""A checkpoint is whole, or the former one, or an error that says what to do."""

import os

import pytest
import torch

from train import checkpoint as module
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def make(step=5, **changes):
    net = {"weight": torch.arange(6.0).reshape(2, 3) + step}
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
