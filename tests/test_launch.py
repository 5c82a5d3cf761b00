"""The command lines: a whole run, repeated last steps, and errors before anything starts."""

import json

import pytest
import torch

from flow import demo, pack
from tests.tiny import tiny_config, tiny_overrides
from train import evaluate, fuse, launch
from train.config import read_config
from train.dist import World
from train.engine import loader_options
from train.launch import open_run

SHORT = {"spatial__steps": 2, "temporal__steps": 2, "eval__num_taus": 2}


@pytest.fixture(scope="module")
def finished(packed_demo, tmp_path_factory):
    """Folder of a finished run on the generated data set."""
    run = tmp_path_factory.mktemp("runs") / "run"
    launch.main(["--gpus", "0", "--run", str(run), *tiny_overrides(packed_demo, **SHORT)])
    return run


def test_a_run_leaves_its_results_and_names_them(finished, packed_demo, capfd):
    # Again: nothing is left to train or score.
    launch.main(["--gpus", "0", "--run", str(finished), *tiny_overrides(packed_demo, **SHORT)])
    printed = capfd.readouterr().out
    for title in fuse.TITLES.values():
        assert title in printed
    named = [line.strip() for line in printed.split("wrote:")[1].splitlines() if line]
    assert set(named) >= {
        str(finished / name) for name in ("config.yaml", "results.json", "report.html", "spatial/checkpoint.pt")
    }
    for path in map(finished.joinpath, named):
        assert path.is_file()
    results = json.loads((finished / "results.json").read_text())
    assert results["split_list"] == "split1_test"
    assert {row["num_videos"] for row in results["methods"].values()} == {len(set(results["video_ids"]))}


def test_the_last_steps_can_be_repeated_alone(finished, capsys):
    before = (finished / "results.json").read_bytes()
    for again in (lambda: evaluate.main([str(finished), "--force"]), lambda: fuse.main([str(finished)])):
        (finished / "report.html").unlink()
        again()
        assert (finished / "report.html").is_file()
    assert "temporal: " in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before


def test_a_run_that_fails_leaves_a_report_of_what_there_is(packed_demo, tmp_path, monkeypatch):
    def explodes(*_, **__):
        raise FloatingPointError("the loss is nan at step 2")

    monkeypatch.setattr(launch, "launch", explodes)
    with pytest.raises(SystemExit, match="error: the loss is nan at step 2"):
        launch.main(["--run", str(tmp_path / "run"), *tiny_overrides(packed_demo)])
    assert "train.batch_size" in (tmp_path / "run" / "report.html").read_text()


def test_starting_over_forgets_what_made_the_run_before(packed_demo, tmp_path, monkeypatch):
    run, arguments = tmp_path / "run", ["--run", str(tmp_path / "run"), *tiny_overrides(packed_demo)]
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    launch.main(arguments)
    before = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**before, "made_on": [{"machine": "another"}]}))
    launch.main(arguments)
    assert json.loads((run / "run.json").read_text())["made_on"] == [{"machine": "another"}, *before["made_on"]]
    (run / "export").mkdir()
    (run / "export" / "spatial.pt2").write_bytes(b"of the weights before")
    launch.main([*arguments, "--resume", "never"])
    assert json.loads((run / "run.json").read_text())["made_on"] == before["made_on"]
    assert not (run / "export" / "spatial.pt2").exists()


def test_the_default_run_folder_follows_from_the_config(packed_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    for seed, timeout_s in ((0, 300), (0, 600), (1, 300)):
        launch.main(["--gpus", "0", *tiny_overrides(packed_demo, train__seed=seed, train__timeout_s=timeout_s)])
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("demo-") for name in folders)


def test_another_config_cannot_continue_a_run(packed, tmp_path):
    open_run(tmp_path / "run", tiny_config(packed), "auto")
    open_run(tmp_path / "run", tiny_config(packed), "auto")
    changed = tiny_config(packed, train__seed=1, temporal__lr=0.5)
    with pytest.raises(ValueError, match="temporal.lr: stored 0.01, asked 0.5; train.seed: stored 0, asked 1"):
        open_run(tmp_path / "run", changed, "auto")
    assert read_config(tmp_path / "run" / "config.yaml") == tiny_config(packed)


def test_a_stopped_run_may_wait_longer_or_go_on_over_damage(packed, tmp_path):
    open_run(tmp_path / "run", tiny_config(packed), "auto")
    changed = tiny_config(packed, train__timeout_s=900, data__on_damage="skip", train__keep_checkpoints=5)
    open_run(tmp_path / "run", changed, "auto")
    assert read_config(tmp_path / "run" / "config.yaml") == changed


def test_starting_over_deletes_the_old_run_and_nothing_else(packed, tmp_path):
    run = tmp_path / "run"
    open_run(run, tiny_config(packed), "auto")
    (run / "spatial").mkdir()
    checkpoints = [f"spatial/checkpoint.pt{suffix}" for suffix in ("", ".1", ".tmp", ".damaged")]
    for name in (
        *checkpoints,
        "spatial/scores_test.npz",
        "results.json",
        "report.html",
        "notes.txt",
        "spatial/notes.txt",
    ):
        (run / name).write_text("old")
    open_run(run, tiny_config(packed, train__seed=1), "never")
    assert read_config(run / "config.yaml").train.seed == 1
    assert sorted(path.name for path in run.rglob("*") if path.is_file()) == ["config.yaml", "notes.txt", "notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "99"], "--gpus 99: this machine has"),
        (["--max-restarts", "-1"], "--max-restarts -1 must be at least 0"),
        (["--procs", "3"], "train.batch_size=8 cannot be split evenly over 3 processes"),
        (["data.stacks_per_window=3"], "batch of 8 cannot be shared evenly by 1 processes, in windows of 3 stacks"),
        (["train.sed=1"], "unknown config key 'train.sed'. Did you mean 'train.seed'"),
        (["data.root=/nowhere"], "/nowhere is no packed data set"),
        (["--config", "dmo"], "unknown config 'dmo'"),
        (["data.split=split9"], "has no list 'split9_train'; it has split1_test, split1_train"),
        (["data.crop_px=72"], "cannot hold crops of 72 px"),
        (["data.crop_px=40"], "input_px=40 leaves no pixel"),
        (["data.L=80"], "None of 6 training videos has the 81 frames"),
        (["train.seed=-1"], "train.seed=-1 must be at least 0"),
    ],
)
def test_errors_are_one_line_before_anything_starts(packed, tmp_path, arguments, message):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=message):
        launch.main([*tiny_overrides(packed), "--run", str(run), *arguments])
    assert not run.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial__lr": 1e8}, r"error: spatial: the loss is .* at step \d+; lower spatial.lr"),
        ({"train__streams": "[temporal]"}, "error: .*checkpoint.pt in .*: no checkpoint is whole; .*--resume never"),
    ],
)
def test_errors_of_the_run_are_one_line_too(packed, tmp_path, change, message):
    (tmp_path / "run" / "temporal").mkdir(parents=True)
    (tmp_path / "run" / "temporal" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=message):
        launch.main(["--run", str(tmp_path / "run"), *tiny_overrides(packed, **change)])


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["dali", "reference"])
def test_a_run_on_a_gpu(packed_demo, tmp_path, loader):
    options = tiny_overrides(packed_demo, data__loader=loader, **SHORT)
    launch.main(["--gpus", "1", "--run", str(tmp_path / "run"), *options])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["methods"]) == set(fuse.TITLES)
    for line in (tmp_path / "run" / "temporal" / "log.jsonl").read_text().splitlines():
        assert 0 <= json.loads(line)["data_wait_pct"] <= 100


def test_loaders_are_asked_for_a_kind_of_device(packed):
    """The process has chosen its GPU; the loaders know "cuda", not "cuda:3"."""
    world = World(rank=0, world_size=1, device=torch.device("cuda", 3), num_threads=5)
    options = loader_options(tiny_config(packed), world)
    assert options == {
        "rank": 0,
        "world_size": 1,
        "device": "cuda",
        "num_threads": 5,
        "decoder": "auto",
        "timeout_s": 300.0,
    }


@pytest.mark.slow
def test_the_demo_needs_both_streams(tmp_path):
    """The demo's promise: fused at least 90 %, each stream at most 10 points above what its half can tell."""
    assert demo.main(["--out", str(tmp_path / "data")]) == 0
    arguments = ["--videos", tmp_path / "data", "--splits", tmp_path / "data" / "splits", "--size", 64]
    assert pack.main([*map(str, arguments), "--dataset", "ucf101", "--out", str(tmp_path / "packed")]) == 0
    # fewer views than the demo's 25 x 10, for time
    overrides = [f"data.root={tmp_path / 'packed'}", "eval.num_taus=3", "eval.num_taus_train=2"]
    launch.main(["--gpus", "0", "--config", "demo", "--run", str(tmp_path / "run"), *overrides])
    methods = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]
    accuracy = {name: method["accuracy_pct"] for name, method in methods.items()}
    assert accuracy["average"] >= 90 and accuracy["svm"] >= 90
    assert accuracy["spatial"] <= 100 / 3 + 10 and accuracy["temporal"] <= 100 / 2 + 10


@pytest.mark.parametrize("main", [evaluate.main, fuse.main])
def test_repeating_needs_a_run(main, tmp_path):
    with pytest.raises(SystemExit, match="error: .*config.yaml"):
        main([str(tmp_path)])
