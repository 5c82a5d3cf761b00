"""The benchmarks run, on the CPU and in their quick form, and write what they promise. Rates are not judged here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import decode_rates  # noqa: E402
import footprint  # noqa: E402
import readme  # noqa: E402
import windows_accuracy  # noqa: E402
from loader_throughput import NAMES, REMOTE, TEMPORAL_ONLY  # noqa: E402

from tests.tiny import tiny_overrides  # noqa: E402


@pytest.mark.slow
def test_gpu_proof_runs_its_steps_on_the_cpu(packed_demo, tmp_path):
    command = [
        "bash",
        "benchmarks/gpu_proof.sh",
        "--device",
        "cpu",
        "--quick",
        "--data",
        packed_demo,
        "--out",
        tmp_path,
    ]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [json.loads(line) for line in (tmp_path / "gpu_proof.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [
        "gpu_tests",
        "decode_rates",
        "loader_throughput_temporal",
        "loader_throughput_spatial",
        "train_step",
        "scaling",
        "flow_accuracy",
        "flow_extraction",
    ]
    assert {step["exit_status"] for step in steps} == {0}

    decode = json.loads((tmp_path / "decode_rates_cpu.json").read_text())
    assert {"machine", "versions", "commit", "config", "rows"} <= set(decode)
    assert {(row["stream"], row["region"]) for row in decode["rows"]} == {
        (stream, region) for stream in ("temporal", "spatial") for region in (0, 1)
    }
    assert all(row["max_code_difference"] == 0 and row["samples_per_s"] > 0 for row in decode["rows"])

    for stream in ("temporal", "spatial"):
        rows = json.loads((tmp_path / f"loader_throughput_cpu_{stream}.json").read_text())["rows"]
        names = set(NAMES) - {"ours_k1_cold", REMOTE} - set(TEMPORAL_ONLY if stream == "spatial" else ())
        assert {(row["stream"], row["name"]) for row in rows} == {(stream, name) for name in names}
        for rate in (row["samples_per_s"] for row in rows):
            assert 0 < rate["min"] <= rate["median"] <= rate["max"]

    rows = json.loads((tmp_path / "train_step_cpu.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["resident", "loader_k1", "loader_k8"]
    assert all(row["samples_per_s"]["median"] > 0 for row in rows)
    result = json.loads((tmp_path / "scaling_cpu.json").read_text())
    assert [(row["mode"], row["data"], row["n"]) for row in result["rows"]] == [
        (mode, data, 1) for mode in ("strong", "weak") for data in ("resident", "loader")
    ]
    assert all(row["speedup"] == 1 for row in result["rows"]) and result["projection"]

    rows = json.loads((tmp_path / "flow_accuracy_cpu.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dis", "brox"] and all(row["epe_mean_px"] < 0.5 for row in rows)
    rows = json.loads((tmp_path / "flow_extraction_cpu.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dis", "brox", "decode_resize", "jpeg"]
    assert all(row["pairs_per_s"]["median"] > 0 for row in rows)


def test_gpu_proof_keeps_to_nine_minutes():
    script = (ROOT / "benchmarks" / "gpu_proof.sh").read_text()
    budgets = re.findall(r"^step \w+ (\d+)|(?:temporal|spatial):(\d+)", script, re.M)
    assert len(budgets) == 8 and sum(int(a or b) for a, b in budgets) <= 540


def test_a_gpus_cases_are_few():
    cases = list(decode_rates.cases("cuda", quick=False))
    assert len(cases) == len({tuple(case.items()) for case in cases}) <= 14
    small = [(case["stream"], case["decoder"]) for case in cases if case["batch_size"] == 64]
    assert sorted(small) == [("temporal", decoder) for decoder in ("cpu", "mixed", "shared")]
    assert {case["batch_size"] for case in cases} == {64, 256}


def test_a_case_that_crashes_is_a_result(packed_demo, tmp_path):
    """`mixed` without a GPU fails in its own process; the parent reports it and goes on."""
    options = decode_rates.parse(["--quick"])
    case = dict(stream="temporal", device="cpu", decoder="mixed", region=1, batch_size=4)
    row = decode_rates.run_case(case, options, packed_demo)
    assert row["exit_code"] != 0 and "decoder='mixed' decodes on a GPU" in row["error"]


def test_an_unknown_argument_is_refused():
    result = subprocess.run(["bash", "benchmarks/gpu_proof.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "unknown argument --fast; known: --device" in result.stderr


@pytest.mark.slow
def test_accuracy_pools_runs_of_one_config(packed_demo, tmp_path, capfd):
    command = ["--data", str(packed_demo), "--config", "demo", "--splits", "1", "--seeds", "0", "1"]
    command += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "accuracy.json")]
    command += [override for override in tiny_overrides(packed_demo) if not override.startswith("data.root")]
    assert accuracy.main(command) == 0
    with pytest.raises(SystemExit) as stopped:
        accuracy.main([*command, "temporal.lr=0.5"])
    assert stopped.value.code == 1 and "holds a run with another config: temporal.lr" in capfd.readouterr().err

    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert result["num_videos"] == 12 and result["num_sources"] == 12 and result["num_seeds"] == 2
    runs = [json.loads((tmp_path / "runs" / f"split1_seed{seed}" / "results.json").read_text()) for seed in (0, 1)]
    for method in ("spatial", "temporal", "average", "svm"):
        mean = np.mean([run["methods"][method]["accuracy_pct"] for run in runs])
        assert result["methods"][method]["pct"] == pytest.approx(mean)
        assert np.array(result["confusions"][method]).sum() == 24
    a, b = result["methods"]["average"]["pct"], result["methods"]["floor"]["pct"]
    assert result["differences"]["average - floor"]["pct"] == pytest.approx(a - b)
    # motions differ under the histogram, appearances do not: the floor has half of the information
    assert b >= 100 / 3


@pytest.mark.slow
def test_windows_accuracy_pairs_runs_of_different_k(packed_demo, tmp_path):
    command = ["--data", str(packed_demo), "--config", "demo", "--k", "1", "2", "--splits", "1", "--seeds", "0"]
    command += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "windows.json")]
    overrides = tiny_overrides(packed_demo, eval__num_taus=2)
    command += [override for override in overrides if not override.startswith("data.root")]
    assert windows_accuracy.main(command) == 0

    result = json.loads((tmp_path / "windows.json").read_text())
    assert (result["num_videos"], result["num_sources"], result["num_seeds"]) == (12, 12, 1)
    assert result["config"]["resolved"]["temporal.steps"] == 10  # the command line's, not this benchmark's
    one, two = result["rows"]
    assert (one["k"], two["k"]) == (1, 2) and "difference" not in one
    assert two["difference"]["pct"] == pytest.approx(two["pct"] - one["pct"])
    for row in (one, two):
        run = json.loads((tmp_path / "runs" / f"k{row['k']}" / "split1_seed0" / "results.json").read_text())
        assert row["pct"] == pytest.approx(run["methods"]["temporal"]["accuracy_pct"])
        assert 0 <= row["data_wait_pct"] <= 100


@pytest.mark.slow
def test_footprint_measures_opening_and_keeping(packed_demo, tmp_path):
    out = tmp_path / "footprint.json"
    assert footprint.main(["--quick", "--data", str(packed_demo), "--out", str(out)]) == 0
    opened, *kept = json.loads(out.read_text())["rows"]
    assert opened["case"] == "open" and opened["videos"] == 1000
    assert opened["resident_bytes"] > 0 and opened["batch_bytes"] == 8 * 20 * 40 * 40 * 4
    assert 0 < opened["open_s"] <= opened["list_s"] <= opened["first_batch_s"]
    assert [(row["case"], row["k"], row["batches"]) for row in kept] == [("keep", 1, 40), ("keep", 8, 40)]
    assert all(row[f"resident_bytes_after_{n}"] > 0 for row in kept for n in (4, 40))


def test_bootstrap_intervals_widen_with_dependence():
    """Copies of a video add nothing: grouped, ten copies of twenty videos tell as much as the twenty."""
    rng = np.random.default_rng(0)
    single = (rng.random(20) < 0.7).astype(float)
    copies, groups = np.repeat(single, 10), np.repeat(np.arange(20), 10)
    low, high = accuracy.bootstrap_pct(copies, groups)
    assert [low, high] == pytest.approx(accuracy.bootstrap_pct(single, np.arange(20)))
    naive_low, naive_high = accuracy.bootstrap_pct(copies, np.arange(200))
    assert high - low > 2 * (naive_high - naive_low)
    assert low < 100 * single.mean() < high


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text()
    assert readme.render(text, readme.PAGES[page]) == text
