"""The command lines: a whole run, repeated last steps, and errors before anything starts."""

import json

import pytest
from tiny import tiny_config, tiny_overrides

from train import evaluate, fuse, launch
from train.config import read_config
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
    assert set(named) >= {str(finished / name) for name in ("config.yaml", "results.json", "spatial/checkpoint.pt")}
    for path in map(finished.joinpath, named):
        assert path.is_file()
    results = json.loads((finished / "results.json").read_text())
    assert results["split_list"] == "split1_test"
    assert {row["num_videos"] for row in results["methods"].values()} == {len(set(results["video_ids"]))}


def test_the_last_steps_can_be_repeated_alone(finished, capsys):
    before = (finished / "results.json").read_bytes()
    evaluate.main([str(finished), "--force"])
    fuse.main([str(finished)])
    assert "temporal: " in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before


def test_the_default_run_folder_follows_from_the_config(packed_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "launch", lambda *_: None)
    for seed in (0, 0, 1):
        launch.main(["--gpus", "0", *tiny_overrides(packed_demo, train__seed=seed)])
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


def test_starting_over_deletes_the_old_run_and_nothing_else(packed, tmp_path):
    run = tmp_path / "run"
    open_run(run, tiny_config(packed), "auto")
    (run / "spatial").mkdir()
    for name in ("spatial/checkpoint.pt", "spatial/scores_test.npz", "results.json", "notes.txt", "spatial/notes.txt"):
        (run / name).write_text("old")
    open_run(run, tiny_config(packed, train__seed=1), "never")
    assert read_config(run / "config.yaml").train.seed == 1
    assert sorted(path.name for path in run.rglob("*") if path.is_file()) == ["config.yaml", "notes.txt", "notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "99"], "--gpus 99: this machine has"),
        (["--procs", "3"], "train.batch_size=8 cannot be split evenly over 3 processes"),
        (["train.sed=1"], "nearest known key is 'train.seed'"),
        (["data.root=/nowhere"], "/nowhere is no packed data set"),
        (["--config", "dmo"], "unknown config 'dmo'"),
    ],
)
def test_errors_are_one_line_before_anything_starts(packed, tmp_path, arguments, message):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=message):
        launch.main([*tiny_overrides(packed), "--run", str(run), *arguments])
    assert not run.exists()


@pytest.mark.parametrize("main", [evaluate.main, fuse.main])
def test_repeating_needs_a_run(main, tmp_path):
    with pytest.raises(SystemExit, match="error: .*config.yaml"):
        main([str(tmp_path)])
