"""Fusion and the final table."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from train import fuse, results
from train.scores import Scores, read_scores, score_file, write_scores
from train.settings import FuseConfig

K = 4


def softmax(logits):
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def make_scores(stream, part, *, labels, signal, seed=0, num_classes=K, **changes):
    """Noisy scores in which class k is told from class k ^ `signal` only by the other stream."""
    rng = np.random.default_rng([seed, len(stream), len(part)])
    logits = rng.normal(size=(len(labels), num_classes), scale=0.25)
    logits[np.arange(len(labels)), labels] += 3
    logits[np.arange(len(labels)), labels ^ signal] += 3
    fields = {
        "video_ids": np.array([f"class{k}/v_class{k}_g{v % 3:02d}_c{v:02d}" for v, k in enumerate(labels)]),
        "labels": labels,
        "scores": softmax(logits),
        "num_views": np.full(len(labels), 250),
        "classes": np.array([f"class{k}" for k in range(num_classes)]),
        "stream": stream,
        "split_list": f"split1_{part}",
        "dataset": "d1",
        "checkpoint": "c1",
    }
    return Scores(**{**fields, **changes})


def write_run(folder, *, num_train=60, num_test=40, num_classes=K, **changes):
    labels = {"train": np.arange(num_train) % num_classes, "test": np.arange(num_test) % num_classes}
    for stream, signal in (("spatial", 1), ("temporal", 2)):
        (folder / stream).mkdir(parents=True)
        for part in ("train", "test"):
            scores = make_scores(stream, part, labels=labels[part], signal=signal, num_classes=num_classes, **changes)
            write_scores(scores, score_file(folder / stream, part))
    (folder / "config.yaml").write_text("")
    return folder


def change_scores(path, **changes):
    write_scores(Scores(**{**vars(read_scores(path)), **changes}), path)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_score_files_round_trip_without_pickle(tmp_path):
    scores = make_scores("spatial", "test", labels=np.arange(8) % K, signal=1)
    write_scores(scores, tmp_path / "s.npz")
    loaded = read_scores(tmp_path / "s.npz")
    for name in Scores.__dataclass_fields__:
        assert np.array_equal(getattr(loaded, name), getattr(scores, name)), name
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert {array.dtype.kind for array in arrays.values()} <= set("Uif")


def test_damaged_and_missing_score_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no scores at .*s.npz: run `python -m train.evaluate"):
        read_scores(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="s.npz is no score file"):
        read_scores(tmp_path / "s.npz")


def test_both_fusions_use_what_each_stream_knows(run):
    fused = fuse.fuse_runs([run], FuseConfig())
    accuracy = {method: (predicted == fused.labels).mean() for method, predicted in fused.predicted.items()}
    assert max(accuracy["spatial"], accuracy["temporal"]) < 0.75
    assert min(accuracy["average"], accuracy["svm"]) > 0.9


def test_average_and_features():
    a, b = softmax(np.eye(K)), softmax(-np.eye(K))
    assert fuse.average([a, b]) == pytest.approx((a + b) / 2)
    features = fuse.svm_features([a, b])
    assert features.shape == (K, 2 * K)
    assert np.linalg.norm(features[:, :K], axis=1) == pytest.approx(np.ones(K))
    assert np.linalg.norm(features[:, K:], axis=1) == pytest.approx(np.ones(K))


def test_the_svm_never_sees_test_labels(tmp_path):
    """With test labels shuffled, every prediction and the chosen C stay the same."""
    honest = fuse.fuse_runs([write_run(tmp_path / "a")], FuseConfig())
    run = write_run(tmp_path / "b")
    for stream in ("spatial", "temporal"):
        path = run / stream / "scores_test.npz"
        change_scores(path, labels=np.roll(read_scores(path).labels, 1))
    shuffled = fuse.fuse_runs([run], FuseConfig())
    assert not np.array_equal(honest.labels, shuffled.labels)
    assert (honest.svm_C, honest.svm_accuracy) == (shuffled.svm_C, shuffled.svm_accuracy)
    for method in honest.scores:
        assert np.array_equal(honest.scores[method], shuffled.scores[method])


def test_cross_validation_divides_no_group_and_prefers_the_smallest_best_C(monkeypatch):
    labels = np.arange(48) % K
    groups = np.array([f"g{v % 6}" for v in range(48)])
    features = np.eye(K)[labels] + np.arange(48)[:, None] * 1e-6  # the last digits tell the videos apart
    number = {row.tobytes(): v for v, row in enumerate(features)}
    seen = []

    def fit(x, y, C):
        fitted = {number[row.tobytes()] for row in x}
        assert len(fitted) < 48
        return SimpleNamespace(predict=lambda held: seen.append((C, fitted, held)) or held.argmax(1))

    monkeypatch.setattr(fuse, "fit_svm", fit)
    chosen, accuracy = fuse.choose_C(features, labels, groups, FuseConfig(C=[10, 0.1], folds=3))
    assert accuracy == {0.1: 1.0, 10.0: 1.0} and chosen == 0.1
    assert len(seen) == 2 * 3
    for _, fitted, held in seen:
        held_groups = {groups[number[row.tobytes()]] for row in held}
        assert held_groups.isdisjoint(groups[sorted(fitted)])
    monkeypatch.undo()
    assert fuse.svm_scores([features], labels, groups, [features], FuseConfig(C=[10, 100]))[1] == 10


def test_one_source_cannot_be_cross_validated():
    with pytest.raises(ValueError, match="come from one source"):
        fuse.choose_C(np.eye(K), np.arange(K), ["g1"] * K, FuseConfig())


@pytest.mark.parametrize(
    ("video_id", "group"),
    [
        ("Archery/v_Archery_g01_c04", "Archery/v_Archery_g01"),
        ("wave/Fellowship_5_wave_u_cm_np1_fr_med_0", "Fellowship_5"),
        ("brush_hair/[x]_y!_brush_hair_h_nm_np1_ba_goo_12", "[x]_y!"),
        ("Archery/v_Archery_g01_c04/000010", "Archery/v_Archery_g01"),
        ("val/some folder/clip/000010", "val/some folder/clip"),
        ("n01440764/000017", "n01440764/000017"),
        ("val/t-1/000017", "val/t-1/000017"),
        ("A/001", "A/001"),
        ("B/001", "B/001"),
    ],
)
def test_videos_of_one_source_form_a_group(video_id, group):
    assert fuse.source_group(video_id) == group


def test_wilson_interval():
    assert results.wilson_interval_pct(45, 56) == pytest.approx((68.16, 88.66), abs=0.01)
    assert results.wilson_interval_pct(10, 10) == pytest.approx((72.25, 100.0), abs=0.01)
    assert results.wilson_interval_pct(0, 10) == pytest.approx((0.0, 27.75), abs=0.01)


def test_tables_add_up(run, capsys):
    (run / "config.yaml").write_text("fuse:\n  folds: 3\n")
    fuse.main([str(run)])
    printed = capsys.readouterr().out
    stored = json.loads((run / "results.json").read_text())
    assert list(stored["methods"]) == ["spatial", "temporal", "average", "svm"]
    for method, row in stored["methods"].items():
        confusion = np.array(row["confusion"])
        assert confusion.sum() == row["num_videos"] == len(stored["video_ids"]) == 40
        assert np.trace(confusion) == row["num_correct"]
        assert confusion.sum(1).tolist() == np.bincount(stored["labels"], minlength=K).tolist()
        assert row["accuracy_pct"] == pytest.approx(100 * row["num_correct"] / 40)
        assert row["per_class_recall"] == pytest.approx((np.diag(confusion) / confusion.sum(1)).tolist())
        assert row["interval_95_pct"][0] < row["accuracy_pct"] < row["interval_95_pct"][1] or row["num_correct"] == 40
        assert f"{row['num_correct']}/40" in next(line for line in printed.splitlines() if fuse.TITLES[method] in line)
    assert (run / "results.txt").read_text().strip() in printed
    assert str(run / "results.json") in printed


def test_streams_of_two_runs_are_fused_like_those_of_one(run, tmp_path):
    other = write_run(tmp_path / "other")
    fuse.main([str(run / "spatial"), str(other / "temporal")])
    one = fuse.fuse_runs([run], FuseConfig())
    (path,) = (run / "spatial").glob("fused-with-other-temporal-*/results.json")
    stored = json.loads(path.read_text())
    assert list(stored["methods"]) == ["spatial", "temporal", "average", "svm"]
    for method, predicted in one.predicted.items():
        assert stored["methods"][method]["predicted"] == predicted.tolist()
        assert stored["methods"][method]["title"] == fuse.TITLES[method]
    assert [source["folder"] for source in stored["sources"]] == [str(run / "spatial"), str(other / "temporal")]
    assert stored["weights"] == [1, 1] and stored["no_svm"] == ""


def test_runs_of_one_name_do_not_replace_each_other_s_fusions(run, tmp_path):
    others = [write_run(tmp_path / name / "split1_seed0", seed=number) for number, name in enumerate("ab", 1)]
    for other in others:
        fuse.main([str(run / "spatial"), str(other / "temporal")])
    fuse.main([str(run / "spatial"), str(others[0] / "spatial" / ".." / "temporal")])
    paths = list((run / "spatial").glob("fused-with-split1_seed0-temporal-*/results.json"))
    folders = [Path(json.loads(path.read_text())["sources"][1]["folder"]).resolve() for path in paths]
    assert sorted(folders) == [(other / "temporal").resolve() for other in others]


def test_no_svm_is_fitted_that_nobody_asked_for(run, monkeypatch):
    whole = fuse.fuse_runs([run], FuseConfig())
    monkeypatch.setattr(fuse, "svm_scores", lambda *_: pytest.fail("fitted"))
    fused = fuse.fuse_runs([run], FuseConfig(), svm=False)
    assert list(fused.scores) == ["spatial", "temporal", "average"] and fused.no_svm == "not asked for."
    assert np.array_equal(fused.scores["average"], whole.scores["average"])


def test_any_number_of_sources_have_names_that_tell_them_apart(run, tmp_path):
    other, third = (write_run(tmp_path / name / "run", seed=1 + len(name)) for name in ("b", "cc"))
    fused = fuse.fuse_runs([run, other / "temporal", third / "temporal"], FuseConfig())
    names = ["spatial", f"{tmp_path.name}/run/temporal", "b/run/temporal", "cc/run/temporal"]
    assert list(fused.scores) == [*names, "average", "svm"]
    table = results.report(fused)
    for name in names[1:]:
        assert sum(f"Temporal ConvNet ({name})" in line for line in table.splitlines()) == 1
    assert "Averaging of 4" in table and "SVM on 4" in table
    assert fused.scores["average"] == pytest.approx(sum(fused.scores[name] for name in names) / 4)
    assert fused.scores["b/run/temporal"] == pytest.approx(read_scores(other / "temporal" / "scores_test.npz").scores)


def test_a_task_of_a_run_is_a_source_of_its_own(run):
    """Its videos are not the first data set's, with which it can therefore not be fused by mistake."""
    task = run / "temporal" / "task1"
    task.mkdir()
    for part in ("train", "test"):
        changes = {"dataset": "d2", "num_classes": 8}
        scores = make_scores("temporal", part, labels=np.arange(24) % 8, signal=1, **changes)
        write_scores(scores, score_file(task, part))
    fuse.main([str(task)])
    assert list(json.loads((task / "results.json").read_text())["methods"]) == ["temporal"]
    assert list(fuse.fuse_runs([run], FuseConfig()).scores) == ["spatial", "temporal", "average", "svm"]
    with pytest.raises(ValueError, match="run/temporal scores are of dataset d1, temporal/task1 scores of d2"):
        fuse.fuse_runs([run / "temporal", task], FuseConfig())


def test_weights_are_of_the_average_alone(run):
    plain, weighted = (fuse.fuse_runs([run], FuseConfig(), weights) for weights in (None, [1, 3]))
    expected = 0.25 * plain.scores["spatial"] + 0.75 * plain.scores["temporal"]
    assert weighted.scores["average"] == pytest.approx(expected)
    assert weighted.scores["average"] == pytest.approx(fuse.fuse_runs([run], FuseConfig(), [5, 15]).scores["average"])
    assert np.array_equal(weighted.scores["svm"], plain.scores["svm"])
    assert "Two-stream, averaging, weights 1 : 3" in results.report(weighted)


def test_a_weighted_average_does_not_replace_the_run_s_results(run):
    fuse.main([str(run)])
    before = (run / "results.json").read_bytes()
    fuse.main([str(run), "--weights", "1", "2.5"])
    assert (run / "results.json").read_bytes() == before
    assert json.loads((run / "fused-weights-1-2.5" / "results.json").read_text())["weights"] == [1, 2.5]


@pytest.mark.parametrize("weights", [["1"], ["1", "2", "3"], ["1", "0"], ["1", "nan"], ["inf", "1"]])
def test_wrong_weights_are_refused(run, weights):
    with pytest.raises(SystemExit, match="give one positive number for each of spatial, temporal"):
        fuse.main([str(run), "--weights", *weights])


def test_without_training_scores_there_is_no_svm_and_the_table_says_why(run, capsys):
    whole = fuse.fuse_runs([run], FuseConfig())
    score_file(run / "temporal", "train").unlink()
    fuse.main([str(run)])
    assert "no SVM: temporal has no training scores; evaluate with eval.num_taus_train" in capsys.readouterr().out
    stored = json.loads((run / "results.json").read_text())
    assert list(stored["methods"]) == ["spatial", "temporal", "average"]
    assert stored["methods"]["average"]["predicted"] == whole.predicted["average"].tolist()
    assert stored["svm_C"] is None and stored["no_svm"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"checkpoint": "c0"}, "temporal has training scores of another checkpoint than its test scores"),
        ({"split_list": "all"}, "spatial scores are of split_list split1_train, temporal scores of all"),
    ],
)
def test_training_scores_that_do_not_belong_together_fit_no_svm(run, changes, reason):
    change_scores(score_file(run / "temporal", "train"), **changes)
    fused = fuse.fuse_runs([run], FuseConfig())
    assert list(fused.scores) == ["spatial", "temporal", "average"]
    assert reason in fused.no_svm


def test_what_is_no_source_or_given_twice_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no scores in .*empty, .*empty/spatial, .*empty/temporal: give"):
        fuse.fuse_runs([run, tmp_path / "empty"], FuseConfig())
    with pytest.raises(ValueError, match="temporal is given twice"):
        fuse.fuse_runs([run, run / "spatial" / ".." / "temporal"], FuseConfig())
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit, match="belongs to no run"):
        fuse.main([str(run)])


def test_top_5_is_reported_where_there_are_more_classes(tmp_path, capsys):
    run = write_run(tmp_path / "eight", num_classes=8, num_train=64)
    for path in run.glob("*/scores_test.npz"):  # hard enough that the top 5 miss some
        noise = np.random.default_rng(len(path.parent.name)).normal(size=(40, 8), scale=2.5)
        change_scores(path, scores=softmax(np.log(read_scores(path).scores) + noise))
    fuse.main([str(run)])
    assert "top-5" in capsys.readouterr().out
    fused = fuse.fuse_runs([run], FuseConfig())
    stored = json.loads((run / "results.json").read_text())["methods"]
    assert list(stored) == ["spatial", "temporal", "average", "svm"]
    for method, scores in fused.scores.items():
        expected = 100 * top_k_accuracy_score(fused.labels, scores, k=5)
        assert stored[method]["top5_pct"] == pytest.approx(expected)
        assert stored[method]["accuracy_pct"] < expected < 100
    few = results.summary(fuse.fuse_runs([write_run(tmp_path / "four")], FuseConfig()))
    assert not any("top5_pct" in row for row in few["methods"].values())


@pytest.mark.parametrize("known", [[0, 1], [0, 1, 3]])
def test_svm_scores_agree_with_its_predictions(known):
    """Also with two classes, of which it has one decision value, and with classes that training lacks."""
    rng = np.random.default_rng(0)
    labels = np.array(known)[np.arange(30) % len(known)]
    train, test = (softmax(rng.normal(size=(30, K)) + 2 * np.eye(K)[labels]) for _ in range(2))
    config = FuseConfig(C=[1.0], folds=2)
    scores, chosen, _ = fuse.svm_scores([train], labels, [str(v) for v in range(30)], [test], config)
    fitted = fuse.fit_svm(fuse.svm_features([train]), labels, chosen)
    assert scores.shape == (30, K)
    assert np.array_equal(scores.argmax(1), fitted.predict(fuse.svm_features([test])))
    assert np.isneginf(scores[:, 2]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "d2"}, "spatial scores are of dataset d1, temporal scores of d2"),
        ({"split_list": "split2_test"}, "of split_list split1_test, temporal scores of split2_test"),
        ({"video_ids": np.array([f"x{v}" for v in range(40)])}, "spatial and temporal scores .* name different videos"),
        (
            {"classes": np.array([f"x{k}" for k in range(5)]), "scores": np.full((40, 5), 0.2)},
            "of 4 classes, temporal scores of 5 others",
        ),
    ],
)
def test_scores_of_other_videos_are_refused(run, changes, message):
    change_scores(run / "temporal" / "scores_test.npz", **changes)
    with pytest.raises(ValueError, match=message):
        fuse.fuse_runs([run], FuseConfig())


def test_one_stream_alone_has_a_table(run):
    for path in (run / "temporal").iterdir():
        path.unlink()
    fused = fuse.fuse_runs([run], FuseConfig())
    assert list(fused.scores) == ["spatial"]
    assert "Spatial ConvNet" in results.report(fused) and "SVM" not in results.report(fused)


def test_classes_without_test_videos_and_many_classes():
    labels = np.arange(30) % 15
    predicted = labels.copy()
    predicted[:2] = 9
    confusion = results.confusion_matrix(labels, predicted, 16)
    assert results.per_class_recall(confusion)[15] is None
    lines = results.confusion_lines(confusion, [f"class{k}" for k in range(16)])
    assert sum("->" in line for line in lines) == 1 + 2
    assert any("class0 -> class9" in line for line in lines)
