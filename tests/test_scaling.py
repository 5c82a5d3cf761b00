"""benchmarks/scaling.py: the model's properties, and that a quick run on two cores writes what is promised."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scaling  # noqa: E402
from scaling_model import BYTES, PROJECTED, SENDING, Parts, model_errors, predict, project  # noqa: E402

GPU = Parts(
    step_s={256: 0.030, 128: 0.016, 64: 0.009, 32: 0.005, 16: 0.003, 8: 0.002, 4: 0.002},
    hidden_s={256: 0.015, 128: 0.008, 64: 0.004, 32: 0.002, 16: 0.001, 8: 0.001, 4: 0.001},
    gradient_bytes=363e6,
    link_bytes_per_s=100e9,
)
CORE = replace(GPU, in_turn=True)


@pytest.mark.parametrize("parts", [GPU, CORE])
def test_one_device_with_resident_data_takes_the_measured_step(parts):
    for size, step_s in parts.step_s.items():
        assert predict(1, size, parts) == {"step_s": step_s, "communication_s": 0, "loader_s": 0}


@pytest.mark.parametrize("parts", [GPU, CORE])
def test_an_infinite_link_leaves_the_step_of_the_share(parts):
    parts = replace(parts, link_bytes_per_s=math.inf)
    for n in PROJECTED:
        assert predict(n, 256 // n, parts)["step_s"] == parts.step_s[256 // n]


@pytest.mark.parametrize("parts", [GPU, CORE])
def test_a_faster_link_or_loader_never_slows(parts):
    speeds = [10.0**k for k in range(14)]
    for n in PROJECTED:
        links = [predict(n, 256 // n, replace(parts, link_bytes_per_s=speed))["step_s"] for speed in speeds]
        loaders = [predict(n, 256 // n, parts, loader_samples_per_s=speed)["step_s"] for speed in speeds]
        for steps in (links, loaders):
            assert all(slower >= faster for slower, faster in pairwise(steps))
        assert loaders[0] > loaders[-1]
        assert (links[0] > links[-1]) == (n > 1)


def test_a_slow_loader_is_the_only_bound_beside_a_gpu_and_comes_on_top_on_a_core():
    for n in PROJECTED:
        assert predict(n, 256 // n, GPU, loader_samples_per_s=10)["step_s"] == 256 / n / 10
        alone = predict(n, 256 // n, CORE)["step_s"]
        assert predict(n, 256 // n, CORE, loader_samples_per_s=10)["step_s"] == pytest.approx(alone + 256 / n / 10)


def test_communication_hides_behind_the_backward_pass_and_only_the_rest_shows():
    sent_s = 2 * 3 / 4 * 363e6 / 100e9  # a ring of four: 5.4 ms
    assert predict(4, 64, GPU)["communication_s"] == pytest.approx(sent_s - 0.004)
    assert predict(4, 64, replace(GPU, gradient_bytes=363e6 / 2))["communication_s"] == 0
    assert predict(4, 64, CORE)["communication_s"] == pytest.approx(sent_s)


def test_a_share_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"num_samples=100: steps were measured with \[4, 8, .*256\]"):
        predict(2, 100, GPU)


def test_a_projection_says_so_in_every_row():
    rows = project(GPU, 256, 5000.0)
    assert {row["label"] for row in rows} == {"projection"}
    assert [(r["data"], r["gradient_compression"], r["n"]) for r in rows] == list(
        product(("resident", "loader"), BYTES, PROJECTED)
    )
    assert all(row["speedup"] == 1 for row in rows if row["n"] == 1)
    for row in rows:
        assert row["speedup"] == pytest.approx(
            next(r for r in rows if r["n"] == 1 and r["data"] == row["data"])["step_s"] / row["step_s"]
        )


def test_the_model_errs_by_nothing_where_it_is_right():
    rows = []
    for mode, data, n in product(("strong", "weak"), ("resident", "loader"), (1, 2)):
        size = 256 * (n if mode == "weak" else 1)
        step = predict(n, size // n, GPU, loader_samples_per_s=math.inf if data == "resident" else 4000.0 / n)
        rows.append({"mode": mode, "data": data, "n": n, "batch_size": size, "step_s": {"median": step["step_s"]}})
    errors = model_errors(rows, replace(GPU, link_bytes_per_s=1.0), {2: 100e9}, {1: 4000.0, 2: 2000.0})
    assert [(e["mode"], e["data"], e["n"]) for e in errors] == [
        ("strong", "resident", 2), ("strong", "loader", 1), ("strong", "loader", 2),
        ("weak", "resident", 2), ("weak", "loader", 2),
    ]  # fmt: skip
    assert [error["error_pct"] for error in errors] == [0] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--procs", "2"], "give rising numbers from 1"),
        (["--procs", "1,4,2"], "give rising numbers from 1"),
        (["--procs", "1,4096"], r"4096 asked for, but this machine has \d+ usable cores"),
        (["--gpus", "1,999"], r"999 asked for, but this machine has \d+ usable GPUs"),
        (["--procs", "1", "--batch-size", "12", "--stacks-per-window", "8"], "does not divide into 1 whole shares"),
        ([], "one of the arguments --gpus --procs is required"),
    ],
)
def test_impossible_requests_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_quick_run_on_two_cores(packed_demo, tmp_path, capfd):
    out = tmp_path / "scaling.json"
    assert scaling.main(["--procs", "1,2", "--quick", "--data", str(packed_demo), "--out", str(out)]) == 0
    assert "PROJECTION, not measured" in capfd.readouterr().out
    result = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "config", "rows", "projection", "model_error"} <= set(result)
    assert result["config"]["pinned_to_one_core"] and "one CPU core" in result["device"]
    assert [(r["mode"], r["data"], r["n"], r["batch_size"]) for r in result["rows"]] == [
        (mode, data, n, 8 * n if mode == "weak" else 8)
        for mode, data, n in product(("strong", "weak"), ("resident", "loader"), (1, 2))
    ]
    for row in result["rows"]:
        base = next(r for r in result["rows"] if (r["mode"], r["data"], r["n"]) == (row["mode"], row["data"], 1))
        assert row["speedup"] == pytest.approx(row["samples_per_s"]["median"] / base["samples_per_s"]["median"])
    assert [{key: row[key] for key in SENDING[0]} for row in result["sending"]] == SENDING
    assert result["sending"][0]["ratio_to_default"] == 1
    full, half = result["communication"]
    assert full["bytes"] == 2 * half["bytes"] == result["parts"]["gradient_bytes"]
    assert set(result["parts"]["step_s"]) == set(result["parts"]["hidden_s"]) == {"1", "2", "4", "8"}
    for size, hidden_s in result["parts"]["hidden_s"].items():
        assert 0 < hidden_s < result["parts"]["step_s"][size] * 2  # a pause of the machine may fall into either
    assert len(result["model_error"]) == 5
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
