"""Fusion and the final table."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from train import fuse
from train.config import FuseConfig
from train.scores import Scores, read_scores, write_scores

K = 4


def softmax(logits):
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def make_scores(stream, part, *, labels, signal, seed=0, **changes):
    """Noisy scores in which class k is told from class k ^ `signal` only by the other stream."""
    rng = np.random.default_rng([seed, len(stream), len(part)])
    logits = rng.normal(size=(len(labels), K), scale=0.25)
    logits[np.arange(len(labels)), labels] += 3
    logits[np.arange(len(labels)), labels ^ signal] += 3
    fields = {
        "video_ids": np.array([f"class{k}/v_class{k}_g{v % 3:02d}_c{v:02d}" for v, k in enumerate(labels)]),
        "labels": labels,
        "scores": softmax(logits),
        "num_views": np.full(len(labels), 250),
        "classes": np.array([f"class{k}" for k in range(K)]),
        "stream": stream,
        "split_list": f"split1_{part}",
        "dataset": "d1",
        "checkpoint": "c1",
    }
    return Scores(**{**fields, **changes})


def write_run(folder, *, num_train=60, num_test=40, **changes):
    labels = {"train": np.arange(num_train) % K, "test": np.arange(num_test) % K}
    for stream, signal in (("spatial", 1), ("temporal", 2)):
        (folder / stream).mkdir(parents=True)
        for part in ("train", "test"):
            scores = make_scores(stream, part, labels=labels[part], signal=signal, **changes)
            write_scores(scores, folder / stream / f"scores_{part}.npz")
    return folder


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
    results = fuse.fuse_runs([run], FuseConfig())
    accuracy = {method: (predicted == results.labels).mean() for method, predicted in results.predicted.items()}
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
        scores = read_scores(path)
        wrong = {**vars(scores), "labels": np.roll(scores.labels, 1)}
        write_scores(Scores(**wrong), path)
    shuffled = fuse.fuse_runs([run], FuseConfig())
    assert not np.array_equal(honest.labels, shuffled.labels)
    assert (honest.svm_C, honest.svm_accuracy) == (shuffled.svm_C, shuffled.svm_accuracy)
    for method in honest.predicted:
        assert np.array_equal(honest.predicted[method], shuffled.predicted[method])


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
    assert fuse.svm_predict([features], labels, groups, [features], FuseConfig(C=[10, 100]))[1] == 10


def test_one_source_cannot_be_cross_validated():
    with pytest.raises(ValueError, match="come from one source"):
        fuse.choose_C(np.eye(K), np.arange(K), ["g1"] * K, FuseConfig())


@pytest.mark.parametrize(
    ("video_id", "group"),
    [
        ("Archery/v_Archery_g01_c04", "Archery/v_Archery_g01"),
        ("wave/Fellowship_5_wave_u_cm_np1_fr_med_0", "Fellowship_5"),
        ("brush_hair/[x]_y!_brush_hair_h_nm_np1_ba_goo_12", "[x]_y!"),
        ("A/001", "A/001"),
        ("B/001", "B/001"),
    ],
)
def test_videos_of_one_source_form_a_group(video_id, group):
    assert fuse.source_group(video_id) == group


def test_wilson_interval():
    assert fuse.wilson_interval_pct(45, 56) == pytest.approx((68.16, 88.66), abs=0.01)
    assert fuse.wilson_interval_pct(10, 10) == pytest.approx((72.25, 100.0), abs=0.01)
    assert fuse.wilson_interval_pct(0, 10) == pytest.approx((0.0, 27.75), abs=0.01)


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


def test_two_runs_are_fused_like_one(run, tmp_path):
    other = write_run(tmp_path / "other")
    (run / "config.yaml").write_text("")
    fuse.main([str(run), str(other)])
    one = fuse.fuse_runs([run], FuseConfig())
    stored = json.loads((run / "fused-with-other" / "results.json").read_text())
    assert stored["methods"]["svm"]["predicted"] == one.predicted["svm"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "d2"}, "spatial scores are of dataset d1, temporal scores of d2"),
        ({"split_list": "split2_test"}, "of split_list split1_test, temporal scores of split2_test"),
        ({"video_ids": np.array([f"x{v}" for v in range(40)])}, "name different videos"),
    ],
)
def test_scores_of_other_videos_are_refused(run, changes, message):
    path = run / "temporal" / "scores_test.npz"
    write_scores(Scores(**{**vars(read_scores(path)), **changes}), path)
    with pytest.raises(ValueError, match=message):
        fuse.fuse_runs([run], FuseConfig())


def test_one_stream_alone_has_a_table(run):
    for path in (run / "temporal").iterdir():
        path.unlink()
    results = fuse.fuse_runs([run], FuseConfig())
    assert list(results.predicted) == ["spatial"]
    assert "Spatial ConvNet" in fuse.report(results)


def test_classes_without_test_videos_and_many_classes():
    labels = np.arange(30) % 15
    predicted = labels.copy()
    predicted[:2] = 9
    confusion = fuse.confusion_matrix(labels, predicted, 16)
    assert fuse.per_class_recall(confusion)[15] is None
    lines = fuse._confusion_lines(confusion, [f"class{k}" for k in range(16)])
    assert sum("->" in line for line in lines) == 1 + 2
    assert any("class0 -> class9" in line for line in lines)
