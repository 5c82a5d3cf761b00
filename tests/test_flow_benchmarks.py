"""The flow benchmarks: what they read, what they compute from what they measured, and that they run. None is timed."""

import fcntl
import itertools
import json
import math
import os
import re
import shutil
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import flow_accuracy  # noqa: E402
import flow_choice  # noqa: E402
import flow_extraction  # noqa: E402
import pack_parts  # noqa: E402
import readme  # noqa: E402
import trained  # noqa: E402
from crew import Crew, CrewError, Turn, add_up  # noqa: E402

from flow.resume import hold  # noqa: E402
from flow.video import read_frames, write_video  # noqa: E402
from loaders.index import open_index  # noqa: E402
from train.config import resolve_config, write_config  # noqa: E402

# --- accuracy ----------------------------------------------------------------------------------------------------


def flo_bytes(field, magic=b"PIEH"):
    """A .flo file of a field (2, H, W)."""
    height, width = field.shape[1:]
    return magic + np.array([width, height], "<i4").tobytes() + field.transpose(1, 2, 0).astype("<f4").tobytes()


def test_a_flo_file_is_read_as_it_was_written(tmp_path):
    field = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    (tmp_path / "flow10.flo").write_bytes(flo_bytes(field))
    assert np.array_equal(flow_accuracy.read_flo(tmp_path / "flow10.flo"), field)
    assert np.frombuffer(b"PIEH", "<f4")[0] == np.float32(flow_accuracy.FLO_MAGIC)


def test_what_is_no_flo_file_is_refused(tmp_path):
    path, whole = tmp_path / "flow10.flo", flo_bytes(np.zeros((2, 3, 5), np.float32))
    for content, message in [
        (whole[:-1], "has 131 bytes; its header says 5 x 3 px, which are 132"),
        (whole + b"\0", "has 133 bytes; its header says 5 x 3"),
        (whole[:11], "11 bytes, too short for a header"),
        (b"", "0 bytes, too short"),
        (flo_bytes(np.zeros((2, 3, 5), np.float32), b"PIEG"), "begins with 50505.3; one begins with 202021.25"),
        (whole[:4] + np.array([-5, -3], "<i4").tobytes() + whole[12:], "its header says -5 x -3"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            flow_accuracy.read_flo(path)


def test_a_folder_of_pairs_is_checked(tmp_path):
    with pytest.raises(ValueError, match="holds no pairs: expected NAME/frame10.png"):
        flow_accuracy.read_pairs(tmp_path)
    folder = tmp_path / "Any"
    folder.mkdir()
    cv2 = flow_choice.cv2
    for name in ("frame10.png", "frame11.png"):
        cv2.imwrite(str(folder / name), np.zeros((6, 8, 3), np.uint8))
    for shape, value, message in [
        ((2, 6, 7), 0, r"frames \(6, 8\), \(6, 8\), flow \(6, 7\)"),
        ((2, 6, 8), 1e9, "known"),
    ]:
        (folder / "flow10.flo").write_bytes(flo_bytes(np.full(shape, value, np.float32)))
        with pytest.raises(ValueError, match=message):
            flow_accuracy.read_pairs(tmp_path)


def test_unknown_flow_does_not_count():
    truth = np.zeros((2, 4, 4), np.float32)
    truth[0, 0], truth[1, 1] = 1666666752, -1000  # either component tells
    grey = np.zeros((4, 4), np.uint8)
    pair = flow_accuracy.Pair("any", grey, grey, truth)
    assert pair.known.sum() == 8
    field = np.full((2, 4, 4), 1e6, np.float32)
    field[:, 2:] = np.array([3, 4]).reshape(2, 1, 1)
    assert flow_accuracy.end_point_error(field, pair) == pytest.approx(5)


def test_settings_make_rows():
    rows = flow_accuracy.choose(["dis"], ["brox:alpha=0.3,solver_iterations=5"])
    assert rows == {
        "dis": ("dis", {}),
        "brox:alpha=0.3,solver_iterations=5": ("brox", {"alpha": 0.3, "solver_iterations": 5}),
    }
    with pytest.raises(ValueError, match="expected METHOD:key=value"):
        flow_accuracy.choose([], ["brox:0.3"])
    with pytest.raises(ValueError, match="row 'diss' is unknown; there are farneback, dis"):
        flow_accuracy.choose(["diss"], [])
    assert {name for names in flow_accuracy.ROWS.values() for name in names} <= set(flow_accuracy.SETTINGS)


def test_no_worse_counts_ties():
    assert flow_accuracy.no_worse_on({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 1.9, "c": 3.5}) == 2


def test_accuracy_is_measured_and_a_row_that_fails_is_told(tmp_path):
    out = tmp_path / "accuracy.json"
    command = ["--quick", "--methods", "farneback", "dis", "--set", "dis:FinestScale=0", "--set", "dis:Nonsense=1"]
    assert flow_accuracy.main([*command, "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    *rows, failed = result["rows"]
    assert "dis has no parameter 'Nonsense'" in failed["error"]
    assert [row["name"] for row in rows] == ["farneback", "dis", "dis:FinestScale=0"]
    assert [row["flow"]["parameters"].get("FinestScale") for row in rows] == [None, 1, 0]
    for row in rows:
        assert row["epe_mean_px"] == pytest.approx(row["epe_px"]["generated"]) and 0 < row["epe_mean_px"] < 0.5
        assert row["coded_epe_mean_px"] == pytest.approx(row["epe_mean_px"], abs=0.05)
    table = readme.flow_accuracy_table(result)
    assert "`dis:FinestScale=0` is dis with FinestScale 0." in table and table.count("\n| `") == 3


# --- extraction --------------------------------------------------------------------------------------------------


def test_a_turn_adds_up_what_processes_did():
    turn = add_up([(10, 2.0, 1.5), (30, 3.0, 3.0)])  # pairs, seconds, CPU seconds
    assert turn.pairs_per_s == 10 / 2 + 30 / 3
    assert turn.cpu_s_per_pair == 4.5 / 40 and turn.cpu_share == 4.5 / 5


def test_a_crew_works_when_it_is_told_to():
    with closing(Crew("any", [itertools.count, itertools.count])) as crew:  # 0, 1, 2, ... and 1, 2, ...
        assert crew.wait() == 0 and len(crew) == 2
        assert crew.measure(0.01).pairs_per_s > 0


@pytest.mark.parametrize(
    "works, message", [([itertools.count, os._exit], "a process died with exit code 1"), ([math.log], "ValueError: ")]
)
def test_a_crew_says_what_became_of_a_process(works, message):
    with closing(Crew("any", works)) as crew, pytest.raises(CrewError, match=f"any: {message}"):
        crew.wait()


def test_rows_follow_from_turns():
    turns = [Turn(10.0, 0.3, 0.95), Turn(30.0, 0.1, 1.0), Turn(20.0, 0.2, 0.5)]
    row = flow_extraction.summarise("dis", {"flow": {"method": "dis"}}, turns)
    assert row["pairs_per_s"] == {"median": 20, "min": 10, "max": 30, "rounds": [10, 30, 20]}
    assert row["cpu_s_per_pair"] == 0.2 and row["cpu_share"] == 0.95
    assert row["hours_ucf101"] * 3600 * 20 == pytest.approx(flow_extraction.UCF101_PAIRS)
    assert "hours_ucf101" not in flow_extraction.summarise("jpeg", {}, turns)
    assert flow_extraction.UCF101_PAIRS == pytest.approx(2.4e6, rel=0.01)


def test_the_pack_is_held_to_the_larger_of_its_parts():
    rounds = [
        {"startup_s": 1.0, "decode_resize_s": 2.0, "flow_s": 10.0, "pack_s": 12.0},
        {"startup_s": 1.0, "decode_resize_s": 10.0, "flow_s": 2.0, "pack_s": 14.0},
        {"startup_s": 1.0, "decode_resize_s": 2.0, "flow_s": 10.0, "pack_s": 13.5},
    ]
    row = pack_parts.pack_row(rounds, 100)
    assert row["whole_ratio"] == pytest.approx({"median": 1.35, "min": 1.2, "max": 1.4})
    assert row["ratio"] == pytest.approx({"median": 12.5 / 9, "min": 11 / 9, "max": 13 / 9}) and row["met"] is False
    assert pack_parts.pack_row(rounds[:1], 100)["met"] is True
    too_short = pack_parts.pack_row([rounds[0] | {"startup_s": 10.0}], 100)
    assert too_short["ratio"] is None and too_short["met"] is None


def extracted(name, method, rates, error, device="cpu", processes=2):
    return {
        "name": name,
        "flow": {"method": method},
        "device": device,
        "processes": processes,
        "pairs_per_s": {"rounds": rates},
        "epe_mean_px": error,
    }


def test_brox_is_held_to_deepflow_in_time_and_error():
    deepflow = extracted("deepflow", "deepflow", [10.0, 20.0, 5.0], 0.20)  # of a machine that is not quiet
    rows = [deepflow, extracted("dis", "dis", [300.0], 0.3)]
    for ratio, error, met in [(2.0, 0.21, True), (2.1, 0.21, False), (2.0, 0.23, False), (2.0, None, None)]:
        rates = [10 / ratio, 20 / 3, 5 / 1, 7.0]  # the fourth round is under way
        (found,) = flow_extraction.compare_to_targets([*rows, extracted("brox_fine", "brox", rates, error)])
        assert found["value"] == pytest.approx({"median": ratio, "min": 1, "max": 3}) and found["met"] is met
    brox = extracted("brox", "brox", [400.0, 200.0, 500.0], 0.2, "cuda", processes=2)
    (found,) = flow_extraction.compare_to_targets([brox])  # 200, 100, 250 pairs/s on each of two GPUs
    assert found["value"] == pytest.approx({"median": 5, "min": 4, "max": 10}) and found["met"] is True
    assert flow_extraction.compare_to_targets([{"name": "brox", "error": "..."}]) == []


@pytest.mark.slow
def test_extraction_is_measured_on_clips(packed_demo, tmp_path):
    out = tmp_path / "extraction.json"
    videos = packed_demo.parent / "videos"
    command = ["--quick", "--data", str(videos), "--methods", "dis", "farneback", "--out", str(out)]
    assert flow_extraction.main(command) == 0
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == ["dis", "farneback", "decode_resize", "jpeg"]
    assert result["data"]["size_px"] == [64, 85] and result["pack"]["pairs"] == 2 * 13
    assert all(row["pairs_per_s"]["median"] > 0 and row["cpu_s_per_pair"] > 0 for row in result["rows"])
    assert all(row["bytes_per_field"] > 500 for row in result["rows"][:2])
    assert result["complete"] and not out.with_suffix(".partial.json").exists()
    assert all(0 < row["cpu_share"] for row in result["rows"]) and result["data"]["pairs"] == 2
    table = readme.flow_extraction_table(result)
    assert table.count("\n| `") == 4 and re.search(r"aimed at: 1.30, (met|missed|not judged)\.", table)


def test_a_lesser_result_takes_no_other_place(tmp_path):
    assert common.result_path(tmp_path, "any") == tmp_path / "any.json"
    assert common.result_path(tmp_path, "any", generated=True, partial=True) == tmp_path / "any_generated.json"
    assert common.result_path(tmp_path, "any", quick=True, generated=True) == tmp_path / "any_quick.json"
    assert common.result_path(tmp_path / "my.json", "any", quick=True) == tmp_path / "my.json"
    path, partial = tmp_path / "any.json", tmp_path / "any.partial.json"
    common.write_result(path, {}, rows=[1, 2])
    common.write_result(path, {}, complete=False, rows=[3])
    assert json.loads(path.read_text())["rows"] == [1, 2]
    assert json.loads(partial.read_text())["rows"] == [3] and not json.loads(partial.read_text())["complete"]
    common.write_result(path, {}, rows=[3, 4])
    assert json.loads(path.read_text())["rows"] == [3, 4] and not partial.exists()


# --- choice ------------------------------------------------------------------------------------------------------


def test_trimming_keeps_the_middle_frames_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 48, 64, 3), np.uint8)
    write_video(tmp_path / "videos.avi", frames)
    stored = list(read_frames(tmp_path / "videos.avi"))  # Motion JPEG loses some
    for count, expected in [(4, stored[2:6]), (20, stored)]:
        target = tmp_path / f"out{count}" / "a.avi"
        flow_choice.trim(tmp_path / "videos.avi", target, count)
        assert np.array_equal(list(read_frames(target)), expected)
    assert not flow_choice.same_frames(iter(stored[:8]), stored)
    assert not flow_choice.same_frames(iter(stored), stored[:8])
    assert not flow_choice.same_frames(iter(stored[::-1]), stored)


def test_packings_are_prepared_from_trimmed_clips_and_gone_on_with(packed_demo, tmp_path):
    videos = packed_demo.parent / "videos"
    few = tmp_path / "few"
    for name in ("GreenUp", "RedUp"):
        shutil.copytree(videos / name, few / name)
    command = ["prepare", "--videos", str(few), "--splits", str(videos / "splits"), "--out", str(tmp_path / "out")]
    command += ["--frames", "12", "--workers", "1"]
    assert flow_choice.main([*command, "dis_q60"]) == 0
    index = open_index(tmp_path / "out" / "packs" / "dis_q60")
    assert set(index.num_frames) == {12} and index.codec.quality == 60
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.suffix in (".avi", ".tar")}
    assert len(made) == index.num_videos + len(index.shards)
    assert flow_choice.main([*command, "dis_q60"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    with pytest.raises(
        SystemExit, match="packing dis_q60 ended with exit status 2"
    ):  # other frames under the same name
        flow_choice.main([*command, "--frames", "11", "dis_q60"])
    with pytest.raises(SystemExit):
        flow_choice.main([*command, "dis_q61"])


OVERRIDES = ("train.streams=[temporal]", "temporal.steps=3", "temporal.milestones=[2]")


def fake_run(run, index, correct):
    """Results of a run that was right on the first `correct` of the test videos."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_config(resolve_config(run.config, run.overrides), run.folder / "config.yaml")
    rows = index.split("split1_test")
    labels = index.labels[rows]
    predicted = np.where(np.arange(len(rows)) < correct, labels, (labels + 1) % len(index.classes))
    results = {"dataset": index.fingerprint, "video_ids": index.video_ids(rows), "labels": labels.tolist()}
    results["methods"] = {"temporal": {"predicted": predicted.tolist()}}
    (run.folder / "results.json").write_text(json.dumps(results))


def test_packings_are_compared_by_their_runs(packed_demo, tmp_path):
    arms = [trained.Arm("dis", packed_demo), trained.Arm("other", packed_demo)]
    runs = trained.list_runs(arms, tmp_path / "runs", "demo", [1], [0, 1], [*flow_choice.OVERRIDES, *OVERRIDES])
    assert [run.folder.relative_to(tmp_path / "runs").as_posix() for run in runs] == [
        f"{name}/split1_seed{seed}" for seed in (0, 1) for name in ("dis", "other")
    ]
    index = open_index(packed_demo)
    for run, correct in zip(runs, (6, 9, 8, 9), strict=True):  # of 12
        fake_run(run, index, correct)
    command = ["compare", f"dis={packed_demo}", f"other={packed_demo}", "--config", "demo", "--splits", "1"]
    command += ["--seeds", "0", "1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "choice.json")]
    assert flow_choice.main([*command, "--set", *OVERRIDES]) == 0
    result = json.loads((tmp_path / "choice.json").read_text())
    assert (result["num_videos"], result["num_seeds"]) == (12, 2)
    dis, other = result["rows"]
    assert dis["pct"] == pytest.approx(100 * 14 / 24) and "difference" not in dis
    assert other["difference"]["pct"] == pytest.approx(100 * (18 - 14) / 24)
    low, high = other["difference"]["interval_95_pct"]
    assert low < other["difference"]["pct"] < high
    summary = json.loads((packed_demo / "dataset.json").read_text())["summary"]
    assert dis["bytes_per_field"] * summary["fields"] == pytest.approx(summary["flow_bytes"])
    assert "| `other` |" in readme.flow_choice_table(result)

    with pytest.raises(SystemExit, match="was trained with another config: temporal.steps: stored 3, asked 4"):
        flow_choice.main([*command, "--set", *OVERRIDES, "temporal.steps=4"])

    moved = tmp_path / "moved"
    moved.symlink_to(packed_demo)
    elsewhere = [argument.replace(f"dis={packed_demo}", f"dis={moved}") for argument in command]
    assert flow_choice.main([*elsewhere, "--set", *OVERRIDES]) == 0
    for run in runs[1::2]:  # all of "other"
        results = json.loads((run.folder / "results.json").read_text())
        results["video_ids"] = results["video_ids"][::-1]
        (run.folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="runs of other and dis were scored on other videos"):
        flow_choice.main([*command, "--set", *OVERRIDES])


def test_packings_of_other_videos_are_not_compared(packed_demo, tmp_path, monkeypatch):
    other = shutil.copytree(packed_demo, tmp_path / "other")
    metadata = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(metadata | {"input_sha256": "0"}))
    with pytest.raises(SystemExit, match="other and dis differ in input_sha256"):
        flow_choice.main(["compare", f"dis={packed_demo}", f"other={other}", "--runs", str(tmp_path / "runs")])
    (other / "dataset.json").write_text(json.dumps(metadata))
    lacking = {packed_demo: {"a/1", "a/2", "a/3"}, other: {"a/1"}}  # two were bad there
    monkeypatch.setattr(flow_choice, "packed_ids", lacking.get)
    with pytest.raises(SystemExit, match="only one of them has a/2, and 1 more"):
        flow_choice.main(["compare", f"dis={packed_demo}", f"other={other}", "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="Give --packs DIR, or dis=DIR"):
        flow_choice.main(["compare", "dis"])


def test_a_run_that_another_process_is_at_is_left_to_it(packed_demo, tmp_path, monkeypatch):
    """The others come first; then its end is waited for."""
    arms = [trained.Arm(name, packed_demo) for name in ("a", "b")]
    held, free = trained.list_runs(arms, tmp_path / "runs", "demo", [1], [0], OVERRIDES)
    index = open_index(packed_demo)
    done = []

    def train(arguments, output, lock):
        run = next(run for run in (held, free) if str(run.folder) in arguments)
        fake_run(run, index, 5)
        done.append(run)
        return 0

    monkeypatch.setattr(trained, "train", train)
    held.folder.parent.mkdir(parents=True)
    with hold(held.folder.with_suffix(".lock")) as other:
        assert other is not None

        def release(seconds):
            assert done == [free]
            fake_run(held, index, 5)
            fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(trained.time, "sleep", release)
        trained.train_missing([held, free])
    assert done == [free]
