"""The experiments: what is run and in which order, what is kept of it, and what the report makes of that."""

import json
import os
import re
import shutil
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flow.resume import hold
from tests.tiny import TINY
from train import experiments, launch, paper_report, tables
from train.config import from_flat, resolve_config, short_hash, to_flat
from train.data import check_data
from train.measure import compare, measure, paper_difference, reading
from train.plan import (
    MINI_SETS,
    Fused,
    Run,
    Setting,
    beginning,
    digest,
    folder,
    launch_arguments,
    plan,
    run_config,
    select_sources,
)
from train.record import Book, Entry, add_to_book, read_book, write_book
from train.scores import Scores, score_file, write_scores
from train.statistics import bootstrap_pct, mean_pct
from train.tables import TABLES, UCF_AVERAGE, UCF_SVM, Comparison, configs_of, source_name

CONFIGS = sorted({config for table in TABLES for cell in table.cells for config in configs_of(cell.source)})
COMPARISONS = [(table, comparison) for table in TABLES for comparison in table.comparisons]

# --- which runs ----------------------------------------------------------------------------------------------------


def launched(run, setting):
    """The config that train.launch makes of a run's arguments."""
    _, name, _, _, *overrides = launch_arguments(run, setting)
    return to_flat(resolve_config(name, overrides))


@pytest.mark.parametrize("scale", ["mini", "full"])
@pytest.mark.parametrize("name", [*CONFIGS, "ucf101_all"])
def test_a_run_is_its_config_on_this_machine(name, scale):
    """Only paths, split and seed differ from the file at full scale; what mini scale changes keeps the row's point."""
    setting = Setting(scale=scale, data=Path("/sets"), runs=Path("/runs"))
    flat, written = launched(Run(name, 2, 7), setting), to_flat(resolve_config(name))
    assert (flat["data.split"], flat["train.seed"]) == ("split2", 7)
    stream = written["train.streams"][0]
    roots = [flat["data.root"], *flat[f"{stream}.extra_roots"]]
    written_roots = [written["data.root"], *written[f"{stream}.extra_roots"]]
    for root, asked in zip(roots, written_roots, strict=True):
        data = asked.split("/")[1]
        assert root == f"/sets/{data if scale == 'full' else MINI_SETS[data]}/packed"
    moved = {"data.split", "train.seed", "data.root", f"{stream}.extra_roots", f"{stream}.init"}
    changed = {key for key in flat if flat[key] != written[key]} - moved
    if scale == "full":
        assert not changed
        return
    assert changed <= {"data.crop_px", "model.width", "train.batch_size", "train.checkpoint_every",
                       "eval.num_taus", "eval.num_taus_train"} | {
        f"{s}.{key}" for s in ("spatial", "temporal") for key in ("steps", "milestones", "dropout", "extra_classes")
    }  # fmt: skip
    assert flat[f"{stream}.steps"] * 200 == written[f"{stream}.steps"]
    assert [step * 200 for step in flat[f"{stream}.milestones"]] == written[f"{stream}.milestones"]


def test_rows_that_compare_dropouts_keep_them_at_mini_scale():
    for cell in next(table for table in TABLES if table.name == "table1a").cells:
        dropout = launched(Run(cell.source, 1, 0), Setting())["spatial.dropout"]
        assert cell.column == f"dropout {dropout}"


TUNED = {"steps", "milestones", "init"}
EXTRA = {"temporal.extra_roots", "temporal.extra_lists"}
DIFFERING = {
    "dropout 0.9 against 0.5, from scratch": {"spatial.dropout"},
    "dropout 0.9 against 0.5, fine-tuning": {"spatial.dropout"},
    "dropout 0.5 against 0.9, last layer": {"spatial.dropout"},
    "fine-tuning against from scratch, dropout 0.5": {f"spatial.{key}" for key in TUNED},
    "fine-tuning against from scratch, dropout 0.9": {f"spatial.{key}" for key in TUNED},
    "last layer against fine-tuning, dropout 0.5": {"spatial.train_layers"},
    "several fields: L = 5 against L = 1": {"data.L"},
    "several fields: L = 10 against L = 1": {"data.L"},
    "several fields: L = 10 against L = 5": {"data.L"},
    "mean subtraction, flow stacking": {"data.subtract_mean"},
    "mean subtraction, trajectory stacking": {"data.subtract_mean"},
    "flow against trajectory stacking": {"data.stacking"},
    "the same without mean subtraction": {"data.stacking"},
    "bi-directional against uni-directional": {"data.bidirectional"},
    "flow against slow fusion of RGB frames": {"data.rgb_frames", "train.streams"},
    "fine-tuning against HMDB-51 alone": {f"temporal.{key}" for key in TUNED},
    "added classes against fine-tuning": {
        *(f"temporal.{key}" for key in TUNED), *EXTRA, "temporal.extra_as", "temporal.extra_classes",
    },
    "multi-task against added classes": {"temporal.extra_as", "temporal.extra_classes"},
    "multi-task against HMDB-51 alone": EXTRA,
    "multi-task against UCF-101 alone": EXTRA,
}  # fmt: skip


@pytest.mark.parametrize("scale", ["mini", "full"])
def test_every_comparison_is_of_runs_that_differ_in_its_point_alone(scale):
    """Of the whole configs. At mini scale training videos are scored where an SVM needs it, which trains nothing."""
    found, expected = {}, {}
    for _, comparison in COMPARISONS:
        if isinstance(comparison.better, str) and isinstance(comparison.than, str):
            names = comparison.better, comparison.than
            a, b = (launched(Run(name, 1, 0), Setting(scale=scale)) for name in names)
            found[comparison.what] = {key for key in a if a[key] != b[key]}
            expected[comparison.what] = set(DIFFERING[comparison.what])
            if scale == "mini":
                expected[comparison.what].discard("temporal.extra_classes")
                if len(tables.svm_configs().intersection(names)) == 1:
                    expected[comparison.what].add("eval.num_taus_train")
    assert found == expected and set(found) == set(DIFFERING)


def test_runs_are_shared_and_come_after_what_they_begin_with():
    for scale, num_seeds in (("mini", 2), ("full", 1)):
        setting = Setting(scale=scale)
        runs, fused = plan(select_sources(["all"]), num_seeds, None, setting)
        assert len(runs) == len(set(runs)) and len(fused) == len(set(fused))
        assert [run.seed for run in runs] == sorted(run.seed for run in runs)
        assert {run.config for run in runs} == {*CONFIGS, "ucf101_all"}
        for run in runs:
            if first := beginning(run, setting):
                assert first.seed == run.seed and runs.index(first) < runs.index(run)
        assert {run for fusion in fused for run in fusion.runs} <= set(runs)
        assert sum(run.config == "imagenet" for run in runs) == num_seeds


def test_full_scale_keeps_to_the_papers_splits():
    runs, fused = plan(select_sources(["all"]), 1, None, Setting(scale="full"))
    splits = {config: {run.split for run in runs if run.config == config} for config in CONFIGS}
    for config in CONFIGS:
        stated = {split for table in TABLES for cell in table.cells if config in configs_of(cell.source)
                  for split in table.splits}  # fmt: skip
        assert splits[config] == stated
    assert {fusion.split for fusion in fused if fusion.fusion == UCF_SVM} == {1, 2, 3}
    assert {run.split for run in plan(select_sources(["flow_L1"]), 1, None, Setting())[0]} == {1, 2, 3}
    assert plan(select_sources(["flow_L1"]), 1, [2], Setting())[0] == [Run("flow_L1", 2, 0)]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="nothing is called 'table5'; known: pretraining, table1a, .*all, .*flow_L10"):
        select_sources(["table1a", "table5"])


def test_the_digest_follows_from_the_settings_alone():
    run, fused = Run("flow_L10", 1, 0), Fused(UCF_SVM, 1, 0)
    plain, elsewhere = Setting(), Setting(data=Path("/sets"), runs=Path("/runs"))
    changed = Setting(overrides=("temporal.lr=0.5",))
    for job in (run, fused):
        assert digest(job, plain) == digest(job, elsewhere) == digest(replace(job, split=3, seed=4), plain)
        assert digest(job, changed) != digest(job, plain) != digest(job, Setting(scale="full"))
    assert folder(run, plain) != folder(run, changed) != folder(replace(run, seed=1), changed)


def test_the_digest_changes_with_the_run_that_a_run_begins_with(monkeypatch):
    setting = Setting()
    jobs = [Run("imagenet", 1, 0), Run("spatial_last_05", 1, 0), Fused(UCF_SVM, 1, 0), Run("flow_L10", 1, 0)]
    before = [digest(job, setting) for job in jobs]

    def changed(name, setting):
        config = run_config(name, setting)
        return from_flat({**to_flat(config), "spatial.lr": 0.3}) if name == "imagenet" else config

    monkeypatch.setattr("train.plan.run_config", changed)
    after = [digest(job, setting) for job in jobs]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, False, True]
    assert short_hash(run_config("spatial_last_05", setting)) not in after  # its own values are not all


def test_missing_data_is_named_with_the_command_that_makes_it(tmp_path):
    setting = Setting(data=tmp_path)
    with pytest.raises(ValueError, match="ucf101_mini/packed is no packed .*flow.pack .*ucf101 --size 96 .*--data"):
        check_data([Run("flow_L10", 1, 0)], setting)
    make_data(tmp_path, ucf101_mini="ab")
    check_data([Run("flow_L10", 1, 0)], setting)
    with pytest.raises(ValueError, match="jhmdb_mini/packed is no packed .*flow.pack .*hmdb51 --size 96 .*J-HMDB"):
        check_data([Run("ucf101_multitask", 1, 0)], setting)
    with pytest.raises(ValueError, match="python -m flow.images .*of other classes, never of those that are tested on"):
        check_data([Run("imagenet", 1, 0)], setting)
    with pytest.raises(ValueError, match="flow.images --train ILSVRC2012/train --val ILSVRC2012/val"):
        check_data([Run("imagenet", 1, 0)], replace(setting, scale="full"))


def make_data(root, **sets):
    """Packed sets in name, of the classes that letters stand for."""
    for name, classes in sets.items():
        (root / name / "packed").mkdir(parents=True, exist_ok=True)
        content = {"classes": [{"name": letter, "official_id": None} for letter in classes]}
        (root / name / "packed" / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "config"), [("ucf101", "spatial_last_05"), ("jhmdb", "hmdb51_spatial_last")])
def test_pre_training_on_classes_of_the_test_is_refused(tmp_path, name, config):
    setting = Setting(data=tmp_path)
    runs = [Run("imagenet", 1, 0), Run(config, 1, 0)]
    make_data(tmp_path, imagenet_mini="xyz", **{f"{name}_mini": "abc"})
    check_data(runs, setting)
    make_data(tmp_path, imagenet_mini="xbz")
    with pytest.raises(ValueError, match=f"imagenet_mini and {name}_mini both have the class 'b'.*Pack imagenet_mini"):
        check_data(runs, setting)


# --- running -------------------------------------------------------------------------------------------------------

LABELS = np.arange(12) % 6


def fake_scores(config, split, part="test"):
    """Scores that say little, the same for a config and split whatever the seed."""
    rng = np.random.default_rng([sum(config.encode()), split, len(part)])
    scores = rng.dirichlet(np.ones(6), size=len(LABELS))
    scores[np.arange(12), LABELS] += 0.2
    return scores / scores.sum(1, keepdims=True)


class FakeTraining:
    """Stands in for experiments.train: leaves score files, and remembers what was asked for."""

    def __init__(self, failing=()):
        self.runs, self.failing, self.hook = [], failing, lambda name: None

    def __call__(self, arguments, output, lock):
        _, gpus, _, name, _, run, *overrides = arguments
        config = resolve_config(name, overrides)
        self.runs.append((name, int(config.data.split[5:]), config.train.seed))
        self.hook(name)
        if name in self.failing:
            output.write_text("Traceback\nValueError: out of luck\n")
            return 3
        stream = Path(run) / config.train.streams[0]
        stream.mkdir()
        (stream / "checkpoint.pt").write_bytes(b"")
        for part in ("test", "train"):
            if config.eval.num_taus:
                split_list = f"{config.data.split}_{part}"
                ids = [f"c{k}/v_{part}_g{v:02}_c01" for v, k in enumerate(LABELS)]
                write_scores(
                    Scores(
                        video_ids=np.array(ids), labels=LABELS, scores=fake_scores(name, self.runs[-1][1], part),
                        num_views=np.full(12, 10), classes=np.array([f"c{k}" for k in range(6)]), stream=stream.name,
                        split_list=split_list, dataset="0123456789abcdef", checkpoint="c",
                    ),
                    score_file(stream, part),
                )  # fmt: skip
        return 0


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """run(*arguments) of the command line where nothing is trained, on data sets that are there in name."""
    make_data(tmp_path / "data", ucf101_mini="ab", jhmdb_mini="cd", imagenet_mini="xyz")
    training = FakeTraining()
    monkeypatch.setattr(experiments, "train", training)
    monkeypatch.setattr(experiments, "WAIT_S", 0.01)
    places = ["--data", tmp_path / "data", "--runs", tmp_path / "runs", "--results", tmp_path / "results.json"]

    def run(*arguments):
        training.runs.clear()
        experiments.main(["run", *map(str, [*arguments, *places])])
        return list(training.runs)

    run.training, run.results, run.root = training, tmp_path / "results.json", tmp_path
    return run


def test_what_is_done_is_not_done_again(bench):
    assert bench("table2", "--splits", "1") == [
        ("hmdb51_scratch", 1, 0), ("ucf101_all", 1, 0), ("hmdb51_finetune", 1, 0), ("hmdb51_added_classes", 1, 0),
        ("hmdb51_multitask", 1, 0), ("flow_L10", 1, 0), ("ucf101_multitask", 1, 0),
    ]  # fmt: skip
    assert bench("table2", "--splits", "1") == []
    # a second seed and a second split begin with the net of their own seed
    assert bench("hmdb51_finetune", "flow_L10", "--splits", "1", "2", "--seeds", "2") == [
        ("flow_L10", 2, 0), ("hmdb51_finetune", 2, 0),
        ("flow_L10", 1, 1), ("ucf101_all", 1, 1), ("hmdb51_finetune", 1, 1), ("flow_L10", 2, 1),
        ("hmdb51_finetune", 2, 1),
    ]  # fmt: skip
    # another setting is another run
    assert bench("flow_L10", "--splits", "1", "--set", "temporal.lr=0.5") == [("flow_L10", 1, 0)]
    assert len({entry["digest"] for entry in json.loads(bench.results.read_text())["runs"]}) > 1


def test_results_are_those_of_the_score_files(bench):
    bench("table3", "--splits", "2")
    book = read_book(bench.results)
    correct = {name: fake_scores(name, 2).argmax(1) == LABELS for name in configs_of(UCF_SVM)}
    mean = sum(fake_scores(name, 2) for name in configs_of(UCF_SVM)) / 2
    correct[UCF_AVERAGE.name] = mean.argmax(1) == LABELS
    for name, right in correct.items():
        entry = book.runs[name, 2, 0]
        assert entry.correct == "".join(map(str, right.astype(int)))
        assert entry.accuracy_pct == pytest.approx(100 * right.mean(), abs=0.01)
    scores = fake_scores("flow_L10", 2)
    top5 = [int((row > row[label]).sum() < 5) for row, label in zip(scores, LABELS, strict=True)]
    assert book.runs["flow_L10", 2, 0].top5 == "".join(map(str, top5))
    assert (UCF_SVM.name, 2, 0) in book.runs
    methods = {}
    for method in ("average", "svm"):
        (path,) = bench.root.glob(f"runs/mini/fusions/{'+'.join(configs_of(UCF_SVM))}:{method}-*/split2_seed0")
        methods[method] = list(json.loads((path / "results.json").read_text())["methods"])
    assert methods == {"average": ["spatial", "temporal", "average"],
                       "svm": ["spatial", "temporal", "average", "svm"]}  # fmt: skip
    content = book.lists[book.runs["flow_L10", 2, 0].test_list]
    assert content["data"] == "ucf101_mini" and len(content["video_ids"]) == 12
    config = from_flat(book.configs[book.runs["flow_L10", 2, 0].digest])
    assert config.temporal.steps == 400 and config.data.root == "data/ucf101_mini/packed"


def test_a_lost_results_file_is_made_from_the_run_folders(bench):
    bench("table3", "hmdb51_finetune", "--splits", "1")
    before = read_book(bench.results)
    bench.results.unlink()
    assert bench("table3", "hmdb51_finetune", "--splits", "1") == []
    after = read_book(bench.results)
    assert {key: entry.correct for key, entry in after.runs.items()} == {
        key: entry.correct for key, entry in before.runs.items()
    }
    assert (after.configs, after.lists) == (before.configs, before.lists)


def test_run_folders_that_are_gone_are_made_again_only_for_what_needs_their_files(bench):
    bench("hmdb51_finetune", "flow_L10", "--splits", "1")
    os.rename(bench.root / "runs", bench.root / "away")
    assert bench("hmdb51_finetune", "flow_L10", "--splits", "1") == []
    assert bench("hmdb51_finetune", "--splits", "2") == [("ucf101_all", 1, 0), ("hmdb51_finetune", 2, 0)]


def change_default(*files):
    """As if the weight decay of a config that does not name it had been another one when the files were written."""
    for file in files:
        assert '"train.weight_decay": 0.0005' in file.read_text()
        file.write_text(file.read_text().replace('"train.weight_decay": 0.0005', '"train.weight_decay": 0.0001'))


def test_results_of_another_default_are_not_taken_for_done(bench):
    bench("flow_L1", "table3", "--splits", "1", "2")
    change_default(bench.results)
    os.rename(bench.root / "runs", bench.root / "away")
    assert bench("flow_L1", "--splits", "1") == [("flow_L1", 1, 0)]
    left = set(read_book(bench.results).runs)
    assert ("flow_L1", 1, 0) in left and ("flow_L1", 2, 0) not in left  # no mean of both defaults
    assert bench("flow_L10", "--splits", "1") == [("flow_L10", 1, 0)]
    fused = [name for name, _, _ in read_book(bench.results).runs if ":" in name]
    assert fused and not any("flow_L10" in name for name in fused)
    assert bench("flow_L1", "flow_L10", "--splits", "1") == []


def test_a_run_folder_of_another_default_is_not_finished(bench):
    bench("flow_L1", "--splits", "1")
    change_default(bench.results, *bench.root.glob("runs/mini/flow_L1-*/split1_seed0/record.json"))
    bench.training.failing = ("flow_L1",)
    with pytest.raises(SystemExit, match="flow_L1, split 1, seed 0: exit status 3"):
        bench("flow_L1", "--splits", "1")


def test_a_new_key_leaves_results_valid(bench):
    bench("flow_L1", "--splits", "1")
    content = json.loads(bench.results.read_text())
    for config in content["configs"].values():
        del config["data.stacking"]
    bench.results.write_text(json.dumps(content))
    assert bench("flow_L1", "--splits", "1") == []


def test_a_fusion_that_fails_is_tried_once(bench, monkeypatch):
    tried = []

    def fail(fused, setting):
        tried.append(fused)
        raise ValueError("scores do not fit")

    monkeypatch.setattr(experiments, "book_of_fusion", fail)
    with pytest.raises(SystemExit, match=r"spatial_last_05\+flow_L10:average, split 1, seed 0: scores do not fit"):
        bench("table3", "flow_L1", "flow_L5", "--splits", "1")
    assert len(tried) == len(set(tried)) == 4


def test_the_code_of_a_run_is_that_which_it_began_with(bench, monkeypatch):
    commit = ["before"]
    monkeypatch.setattr(experiments, "describe", lambda: {**MADE_ON["m"], "commit": commit[0]})
    bench.training.hook = lambda name: commit.__setitem__(0, "after")
    bench("flow_L1", "--splits", "1")
    book = read_book(bench.results)
    assert book.made_on[book.runs["flow_L1", 1, 0].made_on]["commit"] == "before"


def test_a_failure_stops_only_what_depends_on_it(bench, capsys):
    bench.training.failing = ("imagenet",)
    with pytest.raises(SystemExit, match="exit status 3: ValueError: out of luck .*output.txt") as error:
        bench("spatial_last_05", "flow_L10", "--splits", "1")
    assert "spatial_last_05, split 1, seed 0: imagenet, split 1, seed 0 failed" in str(error.value)
    assert sorted(bench.training.runs) == [("flow_L10", 1, 0), ("imagenet", 1, 0)]
    bench.training.failing = ()
    assert bench("spatial_last_05", "flow_L10", "--splits", "1") == [("imagenet", 1, 0), ("spatial_last_05", 1, 0)]


def test_a_run_in_other_hands_is_left_and_come_back_to(bench):
    setting = Setting(data=bench.root / "data", runs=bench.root / "runs")
    taken = experiments.lock_file(Run("flow_L1", 1, 0), setting)
    taken.parent.mkdir(parents=True)
    with hold(taken) as lock:
        held = os.dup(lock)  # as a child of the other process would: held on though the process itself is gone
    bench.training.hook = lambda name: os.close(held) if name == "flow_L10" else None
    order = bench("flow_L1", "flow_L5", "flow_L10", "--splits", "1")
    assert [name for name, _, _ in order] == ["flow_L10", "flow_L1", "flow_L5"]


def test_what_another_process_finished_meanwhile_is_taken_over(bench):
    """Asked for while the other one is at it: waits, and does the fusion with what the other left."""
    setting = Setting(data=bench.root / "data", runs=bench.root / "runs")
    bench("imagenet", *configs_of(UCF_SVM), "--splits", "1")
    run = Run("ucf101_multitask", 1, 0)
    record = folder(run, setting) / experiments.RECORD
    finished = record.read_bytes()
    record.unlink()
    bench.results.unlink()
    at_it, release = threading.Event(), threading.Event()

    def other():
        with hold(experiments.lock_file(run, setting)):
            at_it.set()
            release.wait()
            record.write_bytes(finished)

    bench.training.hook = lambda name: release.set() if name == "flow_L10" else None
    thread = threading.Thread(target=other)
    thread.start()
    at_it.wait()
    assert bench("table3", "--splits", "1") == [("bidirectional_L10", 1, 0), ("flow_L10", 1, 0)]
    thread.join()
    assert (UCF_SVM.name, 1, 0) in read_book(bench.results).runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "table9"], "error: nothing is called 'table9'"),
        (
            ["run", "flow_L10", "--data", "/nowhere", "--results", "r"],
            "error: /nowhere/ucf101_mini/packed is no packed data set",
        ),
        (["run", "flow_L10", "--set", "temporal.lrr=1", "--results", "r"], "error: unknown config key 'temporal.lrr'"),
        (["run", "flow_L10", "--set", "temporal.lr=1"], "error: --set makes results .*by --results"),
        (["run", "flow_L10", "--seeds", "0"], "error: --seeds 0.* expected 1 seed or more"),
        (["run", "flow_L10", "--splits", "1", "4"], r"error: .*--splits \[1, 4\]: expected .* of \(1, 2, 3\)"),
        (["report", "--results", "none.json"], "error: .*none.json"),
    ],
)
def test_wrong_requests_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        experiments.main(arguments)
    assert list(tmp_path.iterdir()) == []


def tiny_settings(**changes):
    values = {key: value for key, value in TINY.items() if not key.startswith("eval.")}
    return ["--set", *(f"{key}={json.dumps(value)}" for key, value in {**values, **changes}.items())]


def demo_places(packed_demo, tmp_path):
    for name in ("ucf101_mini", "jhmdb_mini"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "packed").symlink_to(packed_demo)
    return ["--data", tmp_path / "data", "--runs", tmp_path / "runs", "--results", tmp_path / "results.json"]


def test_real_runs_end_in_the_report(packed, packed_demo, tmp_path, monkeypatch, capsys):
    """Fine-tuning begins with the other net's weights; and the report holds what came of it."""
    monkeypatch.setattr(experiments, "train", lambda a, output, lock: launch.main(list(map(str, a))))
    places = demo_places(packed_demo, tmp_path)
    other = tmp_path / "data" / "ucf101_mini" / "packed"  # begins with a net that was not trained on what is tested
    other.unlink()
    shutil.copytree(packed, other)
    settings = tiny_settings(**{"temporal.steps": 2, "temporal.milestones": [1]})
    names = ["hmdb51_scratch", "hmdb51_finetune"]
    experiments.main(["run", *names, "--splits", "1", *map(str, places), *settings])
    book = read_book(tmp_path / "results.json")
    assert book.runs["ucf101_all", 1, 0].accuracy_pct is None
    experiments.main(["list", "--results", str(tmp_path / "results.json")])
    printed = capsys.readouterr().out
    pct = measure(book, "hmdb51_finetune").pct
    line = next(line for line in printed.splitlines() if re.search(r"^table2 .* hmdb51_finetune ", line))
    assert f"49.0     {pct:.1f} +- " in line and line.endswith("(1 run, mini)")


@pytest.mark.slow
def test_a_run_that_fails_says_why(packed_demo, tmp_path):
    places = demo_places(packed_demo, tmp_path)
    with pytest.raises(SystemExit, match="exit status 1: error: .*cannot hold crops of 72 px"):
        settings = tiny_settings(**{"data.crop_px": 72})
        experiments.main(["run", "flow_L10", "--splits", "1", *map(str, places), *settings])


# --- the results file ----------------------------------------------------------------------------------------------


def make_entry(name, split, seed, correct, *, test_list=None, config="d", top5=""):
    bits = "".join("01"[int(value)] for value in correct)
    return Entry(
        name=name, split=split, seed=seed, digest=config, steps=400, seconds=100.0 + seed, resumed=False, gpus=0,
        accuracy_pct=round(100 * bits.count("1") / len(bits), 2), test_list=test_list or f"u/{split}", correct=bits,
        top5=top5, made_on="m",
    )  # fmt: skip


MADE_ON = {"m": {"machine": {"cpu": "C", "cores": 2, "gpus": [], "system": "L"}, "versions": {}, "commit": "x"}}
NUM_VIDEOS = {1: 40, 2: 60, 3: 44}


def make_book(names, splits=(1, 2, 3), seeds=(0, 1, 2), accuracy=0.6):
    """Random correctness of four videos a source; names share what is hard about a video."""
    rng = np.random.default_rng(5)
    hard = {split: rng.random(NUM_VIDEOS[split]) for split in NUM_VIDEOS}
    entries = [
        make_entry(name, split, seed, hard[split] + 0.1 * rng.normal(size=NUM_VIDEOS[split]) < accuracy)
        for name in names for split in splits for seed in seeds
    ]  # fmt: skip
    lists = {
        f"u/{split}": {"data": "ucf101_mini", "split_list": f"split{split}_test", "dataset": "f", "num_classes": 6,
                       "video_ids": [f"A/v_A{split}_g{v // 4:02}_c{v % 4:02}" for v in range(count)]}
        for split, count in NUM_VIDEOS.items()
    }  # fmt: skip
    config = to_flat(resolve_config("flow_L10"))
    return Book(scale="mini", configs={"d": config}, lists=lists, made_on=MADE_ON, runs={e.key: e for e in entries})


def test_books_survive_the_file_and_concurrent_writers(tmp_path):
    path = tmp_path / "new" / "results.json"
    whole = make_book(["flow_L10", "flow_L1"])
    parts = [replace(whole, runs={key: entry}) for key, entry in whole.runs.items()]
    threads = [threading.Thread(target=add_to_book, args=(path, part)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_book(path) == whole
    assert {file.name for file in path.parent.iterdir()} == {"results.json", ".results.json.lock"}
    newer = make_entry("flow_L10", 1, 0, [1] * 40)
    merged = add_to_book(path, replace(whole, runs={newer.key: newer}))
    assert merged == read_book(path) and list(merged.runs.values())[-1] == newer and len(merged.runs) == 18


def test_files_that_are_no_results_are_named(tmp_path):
    (tmp_path / "other.json").write_text('{"runs": [{"seed": 1}]}')
    with pytest.raises(ValueError, match="other.json is no results file of train.experiments"):
        read_book(tmp_path / "other.json")
    write_book(make_book(["flow_L10"]), tmp_path / "mini.json")
    with pytest.raises(ValueError, match="holds results at scale mini, not full"):
        read_book(tmp_path / "mini.json", "full")


# --- what is made of results ---------------------------------------------------------------------------------------


def accuracies(book, name):
    """Mean over splits of the mean over seeds, from the bits."""
    splits = sorted({split for key, split, _ in book.runs if key == name})
    each = [[np.mean([bit == "1" for bit in e.correct]) for e in book.runs.values() if (e.name, e.split) == (name, s)]
            for s in splits]  # fmt: skip
    return 100 * np.mean([np.mean(values) for values in each])


def test_numbers_are_means_over_splits_and_seeds():
    book = make_book(["flow_L10", "flow_L1"])
    value = measure(book, "flow_L10")
    assert value.pct == pytest.approx(accuracies(book, "flow_L10"))
    assert (value.num_runs, value.num_seeds, value.splits) == (9, 3, (1, 2, 3))
    assert value.low < value.pct < value.high
    assert measure(book, "flow_L5") is None and measure(book, "flow_L10", "top-5 error") is None


def test_top5_error_counts_what_is_outside_the_five():
    top5 = "1" * 30 + "0" * 10
    entry = make_entry("imagenet", 1, 0, [0] * 40, top5=top5)
    book = replace(make_book([]), runs={entry.key: entry})
    assert measure(book, "imagenet", "top-5 error").pct == pytest.approx(25)
    assert measure(book, "imagenet").pct == 0


def test_runs_of_older_settings_are_left_out():
    book = make_book(["flow_L10"])
    newest = make_entry("flow_L10", 2, 5, [1] * 60, config="e")
    book.runs[newest.key] = newest
    assert measure(book, "flow_L10").pct == 100 and measure(book, "flow_L10").num_runs == 1


def test_runs_on_an_older_packing_are_left_out_of_their_split():
    book = make_book(["flow_L10", "flow_L1"])
    others = replace(book, runs={key: entry for key, entry in book.runs.items() if entry.split != 2})
    book.lists["u/2 again"] = {**book.lists["u/2"], "video_ids": book.lists["u/2"]["video_ids"][:50]}
    expected = accuracies(others, "flow_L10")
    for seed in range(3):
        again = make_entry("flow_L10", 2, seed, [1] * 50, test_list="u/2 again")
        book.update(replace(book, runs={again.key: again}))
        value = measure(book, "flow_L10")
        assert value.num_runs == 7 + seed and value.splits == (1, 2, 3)
    assert value.pct == pytest.approx((2 * expected + 100) / 3)
    assert compare(book, Comparison("", "flow_L10", "flow_L1")).splits == (1, 3)


def test_at_full_scale_a_table_has_its_own_splits(tmp_path, capsys):
    """The spatial net of tables 1a, of split 1, and 4, of all three; at mini scale both pool all."""
    names = ["spatial_last_05", "spatial_last_09"]
    mini = make_book(names, seeds=(0,))
    for scale, table1a in (("full", {1}), ("mini", {1, 2, 3})):
        book = replace(mini, scale=scale)
        (tmp_path / scale).mkdir()
        markdown, _ = report(tmp_path / scale, book)
        for row, column, splits in (("Pre-trained + last layer", "dropout 0.5", table1a),
                                    ("Spatial stream ConvNet", "UCF-101", {1, 2, 3})):  # fmt: skip
            part = replace(book, runs={key: entry for key, entry in book.runs.items() if entry.split in splits})
            (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {row} | {column} |")]
            where = f"on split{'s' * (len(splits) > 1)} {', '.join(map(str, sorted(splits)))}"
            assert f"| {accuracies(part, names[0]):.1f} (" in line and line.endswith(f"{where} |")
        (line,) = [line for line in markdown.splitlines() if line.startswith("| dropout 0.5 against 0.9, last layer")]
        assert f"{len(table1a)} pair" in line


def test_differences_are_paired_by_video_split_and_seed():
    book = make_book(["flow_L10", "flow_L1"])
    comparison = Comparison("several", "flow_L10", "flow_L1")
    both = compare(book, comparison)
    assert both.pct == pytest.approx(accuracies(book, "flow_L10") - accuracies(book, "flow_L1"))
    a, b = measure(book, "flow_L10"), measure(book, "flow_L1")
    assert both.high - both.low < 0.6 * np.hypot(a.high - a.low, b.high - b.low)  # what is hard is hard for both
    del book.runs["flow_L1", 3, 2], book.runs["flow_L10", 1, 0]
    assert compare(book, comparison).num_runs == 7
    for key in list(book.runs):
        if key[0] == "flow_L1" and key[2] != 2:
            del book.runs[key]
    rest = [np.mean([float(p) - float(q) for p, q in zip(book.runs["flow_L10", s, 2].correct,
                                                        book.runs["flow_L1", s, 2].correct, strict=True)])
            for s in (1, 2)]  # fmt: skip
    assert compare(book, comparison).pct == pytest.approx(100 * np.mean(rest))
    assert compare(book, Comparison("none", "flow_L10", "flow_L5")) is None


def test_a_clear_difference_shows_and_its_reading_says_whose_order_it_is():
    book = make_book(["flow_L10"], accuracy=0.8)
    worse = make_book(["flow_L1"], accuracy=0.4)
    book.runs.update(worse.runs)
    shown = compare(book, Comparison("", "flow_L10", "flow_L1"))
    assert shown.shows_order and reading(shown) == "shown, as in the paper"
    against = compare(book, Comparison("", "flow_L1", "flow_L10"))
    assert reading(against) == "shown, against the paper"
    assert against.pct == pytest.approx(-shown.pct) and against.low == pytest.approx(-shown.high, abs=1)
    for seeds, claim in (((0,), "one seed: no claim"), ((0, 1), "2 seeds: no claim")):
        few = replace(book, runs={key: entry for key, entry in book.runs.items() if entry.seed in seeds})
        few = compare(few, Comparison("", "flow_L10", "flow_L1"))
        assert few.shows_order and reading(few) == claim
    del book.runs["flow_L10", 3, 2]  # three seeds on the other splits only
    assert reading(compare(book, Comparison("", "flow_L10", "flow_L1"))) == "2 seeds: no claim"
    same = make_book(["flow_L10", "flow_L5"])
    assert reading(compare(same, Comparison("", "flow_L10", "flow_L5"))) == "no order shown"


def test_comparisons_are_written_the_way_the_paper_orders_them():
    for table, comparison in COMPARISONS:
        assert paper_difference(table, comparison) > 0, comparison.what


def slow_bootstrap(values, groups, weights, draws, rng):
    """The same interval, drawing videos one by one."""
    names = sorted(set(groups))
    members = {name: [v for v, group in enumerate(groups) if group == name] for name in names}
    means = []
    for _ in range(draws):
        videos = [v for name in rng.choice(names, len(names)) for v in members[name]]
        seeds = rng.integers(0, len(values), len(values))
        drawn, weight = values[np.ix_(seeds, videos)], np.tile(weights[videos], (len(seeds), 1))
        there = ~np.isnan(drawn)
        means.append(100 * (drawn[there] * weight[there]).sum() / weight[there].sum())
    return np.quantile(means, [0.025, 0.975])


def test_intervals_are_those_of_drawing_one_by_one():
    rng = np.random.default_rng(0)
    groups = [f"g{v // 3}" for v in range(60)]
    weights = np.where(np.arange(60) < 24, 1 / 24, 1 / 36)
    values = (rng.random((3, 60)) + 0.5 * np.repeat(rng.random(20), 3) < 0.8).astype(float)
    values[2, :24] = np.nan  # a seed that lacks a split
    expected = slow_bootstrap(values, groups, weights, 2_000, rng)
    assert bootstrap_pct(values, groups, weights) == pytest.approx(expected, abs=1.5)
    assert mean_pct(values, weights) == pytest.approx(
        100 * np.nansum(values * weights) / np.sum(~np.isnan(values) * weights)
    )


def test_seeds_that_differ_widen_the_interval():
    groups = [str(v) for v in range(200)]
    rng = np.random.default_rng(1)
    alike = (rng.random((3, 200)) < 0.6).astype(float)
    apart = (rng.random((3, 200)) < np.array([[0.3], [0.6], [0.9]])).astype(float)
    width = [high - low for low, high in (bootstrap_pct(values, groups) for values in (alike, apart))]
    assert width[1] > 3 * width[0]


def test_blocks_of_draws_do_not_change_the_interval(monkeypatch):
    values, groups = (np.random.default_rng(2).random((2, 80)) < 0.5).astype(float), np.arange(80)
    whole = bootstrap_pct(values, groups)
    monkeypatch.setattr("train.statistics.BLOCK", 80 * 999)
    assert bootstrap_pct(values, groups) == pytest.approx(whole, abs=1)


# --- the report ----------------------------------------------------------------------------------------------------


class Rows(HTMLParser):
    """The cells of every table row of a page, and its images; every element must be closed."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.images, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open:
            self.rows[-1][-1] += data


def report(tmp_path, *books):
    paths = []
    for book in books:
        paths.append(tmp_path / f"{book.scale}.json")
        write_book(book, paths[-1])
    out = tmp_path / "report"
    places = ["--data", str(tmp_path / "none"), "--runs", str(tmp_path / "none"), "--out", str(out)]
    experiments.main(["report", *places, "--results", *map(str, paths)])
    return (out / "report.md").read_text(), (out / "report.html").read_text()


def test_both_reports_hold_the_same_tables_with_every_number(tmp_path, capsys):
    book = make_book(["flow_L10", "flow_L1", UCF_AVERAGE.name])
    full = replace(make_book(["flow_L10"], splits=(1,), seeds=(0,)), scale="full")
    markdown, page = report(tmp_path, full, book)
    rows = [[cell.strip().replace("`", "") for cell in line[1:-1].split(" | ")]
            for line in markdown.splitlines() if line.startswith("|") and "---" not in line]  # fmt: skip
    assert rows == [[cell.strip() for cell in row] for row in Rows(page).rows]
    for table in TABLES:
        for cell in table.cells:
            (row,) = [row for row in rows if row[:2] == [cell.row, cell.column] and row[3] == f"{cell.paper_pct:.1f}"]
            for value, held in zip(row[4:], (full, book), strict=True):
                ours = cell.source and source_name(cell.source) in {name for name, _, _ in held.runs}
                expected = f"{accuracies(held, source_name(cell.source)):.1f} (" if ours else "–"
                assert value.startswith(expected)
    (difference,) = [row for row in rows if row[0] == "several fields: L = 10 against L = 1"]
    assert difference[1] == "+7.1" and difference[3] == "no order shown"
    gap = accuracies(book, "flow_L10") - accuracies(book, "flow_L1")
    assert difference[2].startswith(f"{gap:+.1f} (") and difference[2].endswith("9 pairs")
    assert ["ucf101_mini", "split2_test", "6", "60", "15", "16.7 %"] in rows
    spent = re.findall(r"took (.+) s in the median, (.+) s at most", markdown)
    assert spent == [("100", "100"), ("101", "102")]  # seconds of the two books


def test_test_videos_of_one_source_give_no_interval(tmp_path, capsys):
    book = make_book(["flow_L10", "imagenet"], splits=(1,))
    ids = [f"A/v_A_g01_c01/{3 * v:06d}" for v in range(40)]
    book.lists["u/1"] = {**book.lists["u/1"], "video_ids": ids}
    markdown, _ = report(tmp_path, book)
    assert f"{accuracies(book, 'flow_L10'):.1f} (all test videos from one source, no interval), 3 runs" in markdown
    assert "| ucf101_mini | split1_test | 6 | 40 | 1 |" in markdown
    experiments.main(["list", "--results", str(tmp_path / "mini.json")])
    assert f"{accuracies(book, 'flow_L10'):.1f} (3 runs, mini)" in capsys.readouterr().out
    book.runs.update(make_book(["flow_L1"], splits=(1,), accuracy=0.1).runs)
    assert reading(compare(book, Comparison("", "flow_L10", "flow_L1"))) == "one source: no claim"


def test_the_setting_is_that_of_the_results_that_count(tmp_path, capsys):
    book = make_book(["flow_L10"], seeds=(0,))
    stale = make_entry("flow_L1", 1, 0, [1] * 40, test_list="old", config="e")
    gone = replace(stale, split=2, made_on="n", seconds=9999.0)
    current = replace(make_entry("flow_L1", 3, 0, [1] * 44), seconds=241.0)
    slow = replace(make_entry("flow_L5", 3, 0, [1] * 44), seconds=5000.0, resumed=True)
    machine = {"cpu": "C", "cores": 2, "gpus": ["H200", "H200"], "system": "L"}
    changed = replace(
        book,
        configs={**book.configs, "e": {**book.configs["d"], "model.width": 0.123}},
        lists={**book.lists, "old": {**book.lists["u/1"], "data": "older_mini"}},
        made_on={"m": {**MADE_ON["m"], "machine": machine}, "n": {**MADE_ON["m"], "machine": {**machine, "cpu": "Z"}}},
        runs={entry.key: entry for entry in (stale, gone, *book.runs.values(), slow, current)},
    )
    markdown, _ = report(tmp_path, changed)
    assert "0.123" not in markdown and "older_mini" not in markdown and "of Z" not in markdown
    assert "2 cores of C; a run took 100 s in the median, 241 s at most; 1 of 4 runs took more than 240 s." in markdown
    assert "5 results" in markdown and "H200" not in markdown and "`imagenet_mini` for `imagenet`" in markdown
    used = replace(changed, scale="full", runs={current.key: replace(current, gpus=2)})
    markdown, _ = report(tmp_path, used)
    assert "2 cores of C, 2 x H200; a run took 241 s in the median, 241 s at most." in markdown
    assert "mini` for" not in markdown


def test_findings_beside_the_results_are_part_of_the_report(tmp_path, capsys):
    text = "What **shows** & what not:\n- `L = 10`, over\n  two lines\n- more\n\nThe end.\n"
    assert "## Findings" not in report(tmp_path, make_book(["flow_L10"]))[0]
    (tmp_path / "findings.md").write_text(text)
    markdown, page = report(tmp_path, make_book(["flow_L10"]))
    assert markdown.index("Table 4") < markdown.index(f"## Findings\n\n{text.strip()}\n")
    Rows(page)
    assert (
        "<h2>Findings</h2>\n<p>What <strong>shows</strong> &amp; what not:</p>\n<ul>\n"
        "<li><code>L = 10</code>, over\n  two lines</li>\n<li>more</li>\n</ul>\n<p>The end.</p>" in page
    )


def test_without_matplotlib_the_report_is_written_all_the_same(tmp_path, packed_demo, monkeypatch, caplog, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    demo_places(packed_demo, tmp_path)
    write_book(make_book(["flow_L10"]), tmp_path / "results.json")
    places = ["--data", tmp_path / "data", "--runs", tmp_path / "runs", "--results", tmp_path / "results.json"]
    experiments.main(["report", *map(str, places), "--out", str(tmp_path / "report")])
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "report.html"}
    assert re.search(r"fig2.png is not drawn: .*pip install matplotlib", caplog.text)


def test_figures_that_are_there_are_kept_and_shown(tmp_path, capsys):
    markdown, page = report(tmp_path, make_book(["flow_L10"]))
    assert "![" not in markdown and Rows(page).images == []
    (tmp_path / "report" / "fig4.png").write_bytes(b"drawn before")
    markdown, page = report(tmp_path, make_book(["flow_L10"]))
    assert Rows(page).images == ["fig4.png"] == re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert (tmp_path / "report" / "fig4.png").read_bytes() == b"drawn before"


def test_figures_whose_runs_are_at_hand_are_drawn(tmp_path, packed_demo, monkeypatch, capsys):
    drawn = []
    for name in ("draw_filters", "draw_confusion", "draw_recall"):
        monkeypatch.setattr(
            paper_report, name, lambda source, path, name=name, **_: drawn.append((name, source, path.name))
        )
    setting = Setting(data=tmp_path / "data", runs=tmp_path / "runs")
    demo_places(packed_demo, tmp_path)
    fused = folder(Fused(tables.UCF_SVM, 1, 0), setting) / "results.json"
    fused.parent.mkdir(parents=True)
    fused.write_text("{}")
    run = folder(Run("flow_L10", 1, 0), setting)
    run.mkdir(parents=True)
    for name, seed in (("flow_L1", 0), ("flow_L10", 1)):
        shutil.copytree(run, folder(Run(name, 1, seed), setting))
    paper_report.draw_figures(setting, tmp_path)
    assert drawn == [
        ("draw_filters", run, "fig4.png"), ("draw_confusion", fused, "fig5.png"), ("draw_recall", fused, "fig6.png"),
    ]  # fmt: skip
    assert (tmp_path / "fig2.png").stat().st_size > 1000 and (tmp_path / "fig3.png").stat().st_size > 1000

    shown = []
    for name in ("draw_flow", "draw_stacking"):
        monkeypatch.setattr(paper_report, name, lambda data, video, path: shown.append((data, video, path.name)))
    paper_report.draw_figures(Setting(data=tmp_path, runs=tmp_path), tmp_path, (packed_demo, "a/b"))
    assert shown == [(packed_demo, "a/b", "fig2.png"), (packed_demo, "a/b", "fig3.png")]
