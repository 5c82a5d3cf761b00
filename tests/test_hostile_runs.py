"""Configs, scores, checkpoints, exported nets and records from strangers: each attack ends in one of our errors, in
bounded memory, and runs nothing. SECURITY.md has the list."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from flow import resume
from nets.cnn_m import CNNM
from tests.hostile import NOT_REGULAR, bounded_memory, replace
from train.checkpoint import load_checkpoint
from train.config import CONFIG_FOLDER, resolve_config
from train.export import load_net, save_net
from train.figures import read_confusion
from train.log import read_log
from train.origin import read_origin
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


def about_net(**changes):
    """Metadata of an exported net of three classes; changes of its arguments."""
    arguments = dict(num_channels=3, num_classes=3, width=1 / 32, input_px=48, second_lrn=True, num_frames=1)
    architecture = {"arguments": {**arguments, **changes}}
    outputs = {"classes": ["run", "sit", "walk"]}
    return {"format_version": 1, "stream": "spatial", "architecture": architecture, "outputs": outputs}


def safetensors(path, header=None, content=None, about=None, **tensors):
    """The file of an exported net with other metadata, entries of tensors in the header, header bytes or content."""
    save_net(CNNM(**about_net()["architecture"]["arguments"]), about_net(), path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    if about is not None:
        entries["__metadata__"] = {"two_stream": about if isinstance(about, str) else json.dumps(about)}
    for name, changes in tensors.items():
        entries[name.replace("__", ".")].update(changes)
    text = json.dumps(entries).encode() if header is None else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + (data[end:] if content is None else content))


def test_an_exported_net_neither_runs_nor_allocates_what_it_claims(tmp_path):
    path, made = tmp_path / "net.safetensors", tmp_path / "pwned"
    safetensors(path)
    assert load_net(path)[1] == about_net()
    sound = path.read_bytes()
    bare = {"__metadata__": {"two_stream": json.dumps(about_net())}}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    attacks = [
        {"header": b"{" * (1 << 14)},
        {"header": b" " * ((1 << 22) + 1)},
        {"header": json.dumps({**bare, **{f"t{i}": empty for i in range(20_000)}}).encode(), "content": b""},
        {"header": json.dumps(bare).encode(), "content": b""},
        {"header": b"{}", "content": b""},
        {"scores__bias": {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"scores__bias": {"shape": [1 << 62, 4]}},
        {"scores__bias": {"shape": [1, 3]}},
        {"scores__bias": {"dtype": "I32"}},
        {"about": about_net(width=1e5)},
        {"about": about_net(width=float("nan"))},
        {"about": about_net(num_classes=1 << 40)},
        {"about": about_net(num_channels=10**30)},
        {"about": about_net(num_channels="3")},
        {"about": about_net(input_px=1 << 20)},
        {"about": about_net(num_frames=11)},
        {"about": about_net(num_frames=10**9)},
        {"about": about_net(device="cuda")},
        {"about": {**about_net(), "format_version": 2}},
        {"about": {**about_net(), "stream": "../x"}},
        {"about": {**about_net(), "outputs": {"classes": ["a", "b", "c", "d"]}}},
        {"about": {**about_net(), "outputs": {"classes": ["a", "\x1b[31m"]}}},
        {"about": {**about_net(), "outputs": {"classes": "abc"}}},
        {"about": "[" * 100_000},
        {"about": '{"format_version": ' + "9" * 5000 + "}"},
        {"about": "7"},
        {"about": "{}"},
        {"content": np.full(len(sound), 0xFF, np.uint8).tobytes()},
    ]
    for attack in attacks:
        safetensors(path, **attack)
        with (
            bounded_memory(),
            pytest.raises(ValueError, match="net.safetensors is damaged, or no file of train.export"),
        ):
            load_net(path)
    nan = np.full((len(sound) - 8 - int.from_bytes(sound[:8], "little")) // 4, np.nan, np.float32).tobytes()
    safetensors(path, content=nan)
    with pytest.raises(ValueError, match="not finite"):
        load_net(path)
    for content in (b"", sound[:5], sound[:-1], sound + b"x", b"\xff" * 8 + sound, pickle.dumps(Payload(made))):
        path.write_bytes(content)
        with bounded_memory(), pytest.raises(ValueError, match="net.safetensors is damaged, or no file"):
            load_net(path)
    for kind in NOT_REGULAR:
        path.write_bytes(sound)
        replace(path, kind)
        with pytest.raises(ValueError, match="no regular file"):
            load_net(path)
        path.rmdir() if kind == "folder" else path.unlink()
    with pytest.raises(FileNotFoundError, match="net.safetensors"):
        load_net(path)
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


# --- what a run was made of --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"classes": ["a", "a"]},
        {"classes": ["b", "a"]},
        {"classes": ["\x1b[31mred\n", "b"]},
        {"classes": "ab"},
        {"classes": None},
        {"flow": {"method": ["dis"]}},
        {"flow": {"method": "dis", "parameters": "fast"}},
        {"flow": {"parameters": {}}},
        {"flow": "dis"},
        {"codec": {"name": "mine"}},
        {"codec": {"quality": 0}},
        {"codec": 90},
        {"size_px": 10**9},
        {"size_px": 0},
        {"size_px": "64"},
        {"fingerprint": 7},
        {"more": 1},
        None,
    ],
)
def test_a_run_json_is_checked(tmp_path, change):
    sound = {"name": None, "fingerprint": "f", "root": "r", "classes": ["a", "b"], "flow": {"method": "dis"},
             "codec": {"quality": 90}, "size_px": 64}  # fmt: skip
    path, config = tmp_path / "run.json", resolve_config("demo")
    path.write_text(json.dumps({"dataset": sound}))
    assert read_origin(tmp_path, config).classes == ["a", "b"]
    path.write_text(json.dumps({"dataset": None if change is None else {**sound, **change}}))
    with pytest.raises(ValueError, match="run.json is damaged"):
        read_origin(tmp_path, config)
