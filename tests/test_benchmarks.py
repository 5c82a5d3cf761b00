"""The benchmarks run, on the CPU and in their quick form, and write what they promise. Rates are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_gpu_proof_runs_its_steps_on_the_cpu(packed_demo, tmp_path):
    command = ["bash", "benchmarks/gpu_proof.sh", "--device", "cpu", "--quick", "--data", packed_demo, "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [json.loads(line) for line in (tmp_path / "gpu_proof.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == ["gpu_tests", "decode_rates", "loader_throughput"]
    assert {step["exit_status"] for step in steps} == {0}

    decode = json.loads((tmp_path / "decode_rates_cpu.json").read_text())
    assert {"machine", "versions", "commit", "config", "rows"} <= set(decode)
    assert {(row["stream"], row["region"]) for row in decode["rows"]} == {
        (stream, region) for stream in ("temporal", "spatial") for region in (0, 1)
    }
    assert all(row["max_code_difference"] == 0 and row["samples_per_s"] > 0 for row in decode["rows"])

    throughput = json.loads((tmp_path / "loader_throughput_cpu.json").read_text())
    names = {"ours_k1", "torch_dataloader", "reference", "ceiling_decode"}
    assert {(row["stream"], row["name"]) for row in throughput["rows"]} == {
        (stream, name) for stream in ("temporal", "spatial") for name in names
    }
    assert all(row["samples_per_s"]["min"] <= row["samples_per_s"]["median"] for row in throughput["rows"])


def test_a_case_that_crashes_is_a_result(packed_demo, tmp_path):
    """`mixed` without a GPU fails in its own process; the parent reports it and goes on."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import decode_rates

    options = decode_rates.parse(["--quick"])
    case = dict(stream="temporal", device="cpu", decoder="mixed", region=1, batch_size=4)
    row = decode_rates.run_case(case, options, packed_demo)
    assert row["exit_code"] != 0 and "decoder='mixed' decodes on a GPU" in row["error"]


def test_an_unknown_argument_is_refused():
    result = subprocess.run(["bash", "benchmarks/gpu_proof.sh", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "unknown argument --fast; known: --device" in result.stderr
