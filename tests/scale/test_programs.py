"""Benchmarks whose quick form still takes a minute."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import before_after  # noqa: E402
import scale_check  # noqa: E402
import scale_costs  # noqa: E402
import scale_model  # noqa: E402
from common import RESULTS  # noqa: E402
from scale_inputs import read_measured  # noqa: E402


def test_a_quick_run_writes_what_is_promised(tmp_path):
    assert scale_model.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "scale_model_quick.json").read_text())
    assert result["label"] == "simulation" and len(result["sets"]) == 4
    assert {row["through"] for row in result["extraction"]} == {"driver", "shared"}
    for row in result["extraction"] + result["training"]:
        assert row["speedup"] > 0 and (row["nodes"] > 1 or row["speedup"] == 1)
    assert {row["what"] for row in result["sensitivity"]} == {"extraction", "training"}
    assert (tmp_path / "scale_model_quick.png").read_bytes().startswith(b"\x89PNG")


def test_quick_costs_feed_simulation_and_prediction(packed_demo, tmp_path):
    """Costs of a small set, with the other results as published."""
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    command = ["--quick", "--videos", str(packed_demo.parent / "videos"), "--data", str(packed_demo)]
    assert scale_costs.main([*command, "--out", str(tmp_path / "scale_costs.json")]) == 0
    costs = json.loads((tmp_path / "scale_costs.json").read_text())
    assert {"stages", "startup", "videos", "bytes", "join", "index", "loader", "checkpoint"} <= set(costs)
    assert np.average(costs["videos"]["pace"]) == pytest.approx(1, rel=0.2)
    assert costs["index"]["bytes_per_frame"] == pytest.approx(16 + 2 * 28, rel=0.05)  # RGB_ENTRY and two FIELD_ENTRY
    found = read_measured(tmp_path)
    assert 0 < found.backward_bytes < found.frame_bytes

    videos = ["--videos", str(packed_demo.parent / "videos"), "--clips", "3", "--from", str(tmp_path)]
    out = ["--out", str(tmp_path / "check.json")]
    assert scale_check.main(["predict", *videos, *out]) == 0
    predicted = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert scale_check.main(["measure", *videos, *out, "--rounds", "1"]) == 0
    checked = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert scale_check.main(["known", *videos, *out]) == 0
    assert json.loads((tmp_path / "check.json").read_text())["rows"] == checked
    for before, after in zip(predicted, checked, strict=True):
        assert after["predicted_s"] == before["predicted_s"]  # what was said before is not touched
        assert after["error_pct"] == pytest.approx(
            100 * (before["predicted_s"]["median"] / after["measured_s"]["median"] - 1)
        )


def test_a_checkout_is_measured_against_another_one(packed_demo, tmp_path):
    arguments = ["--before", str(ROOT), "--data", str(packed_demo), "--quick", "--out", str(tmp_path / "out.json")]
    assert before_after.main(arguments) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["loader_temporal", "loader_spatial", "pack"]
    for row in result["rows"]:
        assert row["ratio"]["median"] == pytest.approx(row["after"]["median"] / row["before"]["median"])
    assert result["config"]["before_commit"] == result["commit"].removesuffix(" with changes")
    with pytest.raises(SystemExit, match="is no checkout of this project. Make one: git worktree add"):
        before_after.main(["--before", str(tmp_path)])
