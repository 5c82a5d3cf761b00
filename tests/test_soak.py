"""The soak finds what grows, what outlives Ctrl-C, and what it leaves in shared memory."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import promises  # noqa: E402
import soak  # noqa: E402

from tests.faults.__main__ import CASES  # noqa: E402


def samples(**growth_per_hour):
    """Half an hour of samples with noise; a slow start as of a program that warms up."""
    rng = np.random.default_rng(0)
    rows = []
    for time_s in range(0, 1800, 10):
        row = {"time_s": float(time_s)}
        for name in (*soak.MEMORY, *soak.COUNTS):
            level, noise = (500e6, 5e6) if name in soak.MEMORY else (30, 0)
            level *= min(1, 0.5 + time_s / 300) if name in soak.MEMORY else 1
            row[name] = level + growth_per_hour.get(name, 0) * time_s / 3600 + rng.normal(0, noise)
        rows.append(row)
    return rows


def test_growth_is_told_from_noise_and_from_a_slow_start():
    assert all(verdict["flat"] for verdict in soak.judge(samples()).values())
    found = soak.judge(samples(resident_bytes=80e6, open_files=4))
    assert not found["resident_bytes"]["flat"] and not found["open_files"]["flat"]
    assert found["resident_bytes"]["per_hour"] == pytest.approx(80e6, rel=0.15)
    assert found["open_files"]["per_hour"] == pytest.approx(4)
    assert found["threads"]["flat"] and found["private_bytes"]["flat"]


def test_growth_or_what_is_left_is_not_sound():
    clean = {"exit_code": 130, "orphans": 0, "shared_memory_left": 0}
    row = {"verdicts": soak.judge(samples()), "end": clean}
    growing = {"verdicts": soak.judge(samples(threads=40)), "end": clean}
    assert soak.is_sound(row, quick=False) and not soak.is_sound(growing, quick=False)
    for key in clean:
        assert not soak.is_sound({**row, "end": {**clean, key: 1}}, quick=False)


LEAVES = """
import signal, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
from multiprocessing import resource_tracker
memory = SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open(sys.argv[1], "w").write(memory.name)
time.sleep(60)
"""


def test_what_is_left_after_ctrl_c_is_found(tmp_path, monkeypatch):
    started = tmp_path / "started"
    monkeypatch.setattr(soak, "END_S", 0.5)
    try:
        row = soak.soak([sys.executable, "-c", LEAVES, str(started)], 0.5, 0.05, tmp_path, started)
    finally:
        os.unlink(f"{soak.SHARED_MEMORY}{started.read_text()}")
    assert row["end"]["orphans"] == 1 and row["end"]["shared_memory_left"] == 1 and not soak.is_sound(row, quick=True)
    assert row["verdicts"]["processes"]["median"] >= 2


def test_a_part_that_ends_early_is_an_error(tmp_path):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)ended with 3.*no data"):
        soak.soak([sys.executable, "-c", "import sys; print('no data'); sys.exit(3)"], 60, 0.05, tmp_path)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_quick_soak(packed_demo, tmp_path):
    out = tmp_path / "soak.json"
    assert soak.main(["--quick", "--parts", "loader", "--data", str(packed_demo), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["end"]["exit_code"] == 130 and row["end"]["orphans"] == row["end"]["shared_memory_left"] == 0
    assert min(sample["resident_bytes"] for sample in row["samples"]) > 1e8
    assert "| loader | resident memory |" in promises.soak_table(result)


def test_every_case_of_the_faults_has_a_promise():
    assert set(promises.PROMISES) == set(CASES)
