"""Configs, scores, checkpoints and records from strangers: each attack ends in one of our errors, in bounded memory,
and runs nothing. SECURITY.md has the list."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from flow import resume
from tests.hostile import bounded_memory
from train.checkpoint import load_checkpoint
from train.config import CONFIG_FOLDER, resolve_config
from train.figures import read_confusion
from train.log import read_log
from train.record import read_book
from train.scores import Scores, read_scores, write_scores


class Payload:
    """What a pickle would run: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


# --- configs -----------------------------------------------------------------------------------------------------


def laughs(levels=60):
    lines = ["a0: &a0 [lol, lol]"] + [f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: !!python/object/apply:os.mkdir [pwned]", "expected plain values"),
        ("train: !!python/name:os.system", "expected plain values"),
        ("train: {seed: !!int ''}", "expected plain values"),
        (laughs(), "expected plain values"),
        ("train: {seed: &a 1, batch_size: *a}", "expected plain values"),
        ("train: " + "[" * 500, "not YAML"),
        ("train: {seed: " + "9" * 5000 + "}", "not YAML"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "[Ee]xceeds the limit|number of at most"),
        ("train:\n  ? " + "x" * 50_000 + "\n  : 1", "unknown config key"),
        ("train: {batch_size: 2147483647}", "train.batch_size=.*at most 65536"),
        ("data: {L: 1000000}", "data.L=.*at most 256"),
        ("data: {crop_px: 65500}", "data.crop_px=.*at most 4096"),
        ("data: {size: 65500}", "data.size='65500'"),
        ("data: {stacks_per_window: 99999}", "data.stacks_per_window=.*at most 256"),
        ("model: {width: 1e6}", "model.width=.*at most 16"),
        ("model: {width: .nan}", "model.width=nan"),
        ("temporal: {lr: .inf}", "temporal.lr=inf"),
        ("eval: {num_taus: 1000000000}", "eval.num_taus=.*at most 65536"),
        ("fuse: {C: [" + "1, " * 5000 + "1]}", "fuse.C has 5001 values"),
        ("data: {root: " + "x" * 5000 + "}", "data.root has 5000 characters"),
        ("#" * (1 << 20), "has 1,048,577 bytes, expected at most"),
    ],
    ids=range(21),
)
def test_a_config_runs_nothing_and_asks_for_nothing_absurd(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text + "\n")
    with bounded_memory(), pytest.raises(ValueError, match=message):
        resolve_config("mine.yaml")
    assert os.listdir() == ["mine.yaml"]


def test_a_config_name_leads_nowhere_else(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(ValueError, match="unknown config"):
        resolve_config(os.path.relpath(tmp_path / "secret", CONFIG_FOLDER))


# --- scores, checkpoints, records --------------------------------------------------------------------------------


def good_scores(**changes):
    values = dict(
        video_ids=np.array(["a/v0", "a/v1"]), labels=np.array([0, 1]), scores=np.array([[0.5, 0.5], [0.1, 0.9]]),
        num_views=np.array([250, 250]), classes=np.array(["a", "b"]), stream="spatial", split_list="split1_test",
        dataset="d", checkpoint="c",
    )  # fmt: skip
    return Scores(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.array([0, 2])},
        {"labels": np.array([-1, 0])},
        {"labels": np.array([0.0, 1.0])},
        {"labels": np.array([0])},
        {"scores": np.array([[0.5, 0.5], [np.nan, 1]])},
        {"scores": np.array([[0.5, 0.5], [-1, 2]])},
        {"scores": np.array([[0.5, 0.5], [0.5, 0.9]])},
        {"scores": np.zeros((2, 0))},
        {"scores": np.array(1.0)},
        {"classes": np.array([0, 1])},
        {"stream": 5},
    ],
    ids=str,
)
def test_scores_that_make_no_sense_are_refused(tmp_path, changes):
    write_scores(good_scores(), tmp_path / "scores.npz")
    assert read_scores(tmp_path / "scores.npz").labels.tolist() == [0, 1]
    write_scores(good_scores(**changes), tmp_path / "scores.npz")
    with pytest.raises(ValueError, match="is no score file"):
        read_scores(tmp_path / "scores.npz")


def npz(path, compression=zipfile.ZIP_STORED, **members):
    """A score file with some members' bytes replaced."""
    write_scores(good_scores(), path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**content, **{f"{key}.npy": value for key, value in members.items()}}.items():
            archive.writestr(name, data)


def npy(shape, dtype, content=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + content


def test_a_score_file_neither_runs_nor_allocates_what_it_claims(tmp_path):
    path, made = tmp_path / "scores.npz", tmp_path / "pwned"
    code = io.BytesIO()
    np.save(code, np.array([Payload(made)], object), allow_pickle=True)
    deep = b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 8999 + b"1"
    attacks = [
        {"labels": code.getvalue()},
        {"labels": npy((2,), "|O", pickle.dumps([Payload(made)]))},
        {"scores": npy((1 << 40, 2), "<f8")},
        {"scores": npy((1 << 60, 0), "<f8")},
        {"video_ids": npy((2,), "<U1000000000")},
        {"labels": deep},
        {"labels": b"\x93NUMPY\x02\x00" + struct.pack("<I", (1 << 32) - 1)},
        {"labels": b""},
        {"scores": bytes(10_000_000), "compression": zipfile.ZIP_DEFLATED},
    ]
    for attack in attacks:
        npz(path, **attack)
        with bounded_memory(), pytest.raises(ValueError, match="is no score file"):
            read_scores(path)
    for content in (b"", b"PK\5\6" + bytes(18), pickle.dumps(Payload(made)), np.random.default_rng(0).bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no score file"):
            read_scores(path)
    assert not made.exists()


def test_a_checkpoint_runs_nothing(tmp_path):
    import torch

    path, made = tmp_path / "checkpoint.pt", tmp_path / "pwned"
    torch.save({"format_version": 1, "net": Payload(made)}, path)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)
    assert not made.exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "7", '{"step": "x"}', "\xff"])
def test_logs_and_records_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match="file.json, line 1 is damaged"):
        read_log(path)
    with pytest.raises(ValueError, match="file.json is no results file"):
        read_book(path)
    with pytest.raises(ValueError, match="file.json is no results.json"):
        read_confusion(path, "average")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "7", '{"shard": {"name": "../x", "bytes": 0, "sha256": ""}, "totals": {}, "bad": {}}']
)
def test_the_notes_of_a_stopped_pack_are_not_believed(tmp_path, text):
    (tmp_path / ".pack").mkdir()
    (tmp_path / "x").touch()
    resume.state_path(tmp_path, 0).write_text(text)
    assert not resume.is_finished(tmp_path, 0), "that shard is packed again"
    (tmp_path / ".pack/settings.json").write_text(text)
    with pytest.raises(ValueError, match="damaged|begun with other settings"):
        resume.begin(tmp_path, {"seed": 0})
