"""The throughput benchmark shows what is true: peers deliver the views they report, figures are of the whole row."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from loaders.batch import StreamSpec
from loaders.index import open_index
from loaders.reference import ReferenceLoader
from loaders.source import Source
from tests.faults.processes import wait_until

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ceilings  # noqa: E402
import decode_rates  # noqa: E402
import loader_throughput  # noqa: E402
import peers  # noqa: E402
import readme  # noqa: E402
import row as row_module  # noqa: E402
import scaling  # noqa: E402
import train_step  # noqa: E402
from row import Delivered, Job, Measured, RowError, RowProcess  # noqa: E402

MIB = 1 << 20


def job_of(root, stream="temporal", loose=Path("unused"), **more):
    more = {"batch_size": 16, "cores": 2, "seed": 1, **more}
    return Job(root, "split1_train", loose, StreamSpec(stream=stream, L=3, crop_px=40), **more)


def inputs_of(draw, root, spec):
    """What the reference computes from reported views."""
    with ReferenceLoader(Source(open_index(root), spec), iter([draw]), device="cpu") as loader:
        return next(loader).inputs.numpy()


# Rows for the tests. Each runs in a process of its own, so it is found by its name.


def shifted_row(job):
    for batch in loader_throughput.plain(job):
        draw = batch.draw()
        yield Delivered(batch.inputs, lambda draw=draw: replace(draw, tau=draw.tau + 1))


def reading_row(job):
    shard = next(iter(job.root.glob("*.tar")))
    buffer = bytearray(MIB)

    def read(_):
        with open(shard, "rb", buffering=0) as file:
            left = MIB
            while left:
                left -= file.readinto(memoryview(buffer)[:left]) or file.seek(0)

    return ceilings._in_workers(read, [None], job)


def dying_row(job):
    yield None
    os._exit(3)


def failing_row(job):
    yield None
    raise ValueError("no such luck")


def sleeping_row(job):
    if job.cold:
        raise ValueError("no such setting")
    while True:
        time.sleep(0.002 if job.region else 0.02)
        yield None


@pytest.mark.parametrize("stream", ["temporal", "spatial"])
@pytest.mark.parametrize(
    "make, means",
    [
        (peers.torch_dataloader, {}),
        (peers.webdataset, {}),
        (peers.dali_textbook, {}),
        (peers.dali_textbook, {"region": True}),
    ],
    ids=["torch", "webdataset", "dali", "dali_region"],
)
@pytest.mark.parametrize("folder", ["packed", "packed_demo"])
def test_a_peer_delivers_the_views_that_it_reports(folder, make, means, stream, request, tmp_path):
    root = request.getfixturevalue(folder)
    job = job_of(root, stream, tmp_path, **means)
    index = open_index(root)
    if make is peers.torch_dataloader:
        peers.write_loose_files(tmp_path, index, index.split(job.split), job.spec.kinds)
    batches = [(batch.inputs, batch.draw()) for batch in islice(make(job), 4)]
    for inputs, draw in batches:
        assert inputs.shape == (16, job.spec.num_channels, 40, 40)
        np.testing.assert_allclose(inputs, inputs_of(draw, root, job.spec), atol=1e-4)
    views = {name: np.concatenate([getattr(draw, name) for _, draw in batches]) for name in ("video", "crop", "mirror")}
    assert len(set(views["video"])) > 2 and set(views["mirror"]) == {False, True}
    assert len(np.unique(views["crop"], axis=0)) > 16  # each has a crop of its own
    if make is peers.dali_textbook:
        assert {int(tau) % 64 for _, draw in batches for tau in draw.tau} == {0}


def test_a_row_that_fails_or_reports_other_views_is_left_out_and_the_others_go_on(packed_demo):
    arguments = loader_throughput.parse(["--rounds", "2", "--seconds", "0.01"])
    makers = {"liar": shifted_row, "doomed": dying_row, "honest": loader_throughput.plain}
    rows = {name: (make, job_of(packed_demo)) for name, make in makers.items()}
    for num_rounds, (turns, errors) in enumerate(loader_throughput.measure(rows, open_index(packed_demo), arguments)):
        assert {name: len(measured) for name, measured in turns.items()} == {"honest": num_rounds + 1}
        assert set(errors) == {"liar", "doomed"}
        assert "row liar delivers other inputs than the reference computes" in errors["liar"]
        assert "row doomed: its process died with exit code 3" in errors["doomed"]
    assert num_rounds == 1


def test_a_failed_row_stands_in_the_file_and_makes_the_exit_status_1(packed_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader_throughput, "plain", failing_row)
    out = tmp_path / "loader_throughput.json"
    command = ["--quick", "--data", packed_demo, "--streams", "temporal", "--out", out]
    command += ["--rows", "reference", "ceiling_write"]
    assert loader_throughput.main(list(map(str, command))) == 1
    assert "no such luck" in capsys.readouterr().err
    result = json.loads(out.read_text())
    written, failed = result["rows"]
    assert written["name"] == "ceiling_write" and set(failed) == {"stream", "name", "error"}
    assert failed["name"] == "reference" and "no such luck" in failed["error"]
    assert "reference" not in readme.throughput_table(result) and out.with_suffix(".png").exists()


def test_what_had_been_read_before_the_pages_were_evicted_is_not_measured(packed_demo, monkeypatch):
    events, counters = [], row_module._counters
    monkeypatch.setattr(row_module, "evict", lambda root: events.append("evict"))
    monkeypatch.setattr(row_module, "_counters", lambda: events.append("clock") or counters())
    row_module._measure(iter(lambda: events.append("batch"), 0), job_of(packed_demo, cold=True), 0.001)
    assert events[: events.index("clock")] == ["evict", *["batch"] * row_module.READ_AHEAD]


def test_figures_are_those_of_the_whole_process_tree(packed_demo):
    process = RowProcess("reading", reading_row, job_of(packed_demo, workers=2))
    try:
        process.wait()
        turn = process.measure(0.3)
    finally:
        process.close()
    assert turn.read_bytes_per_sample == pytest.approx(MIB / 16, rel=0.3)  # workers are up to two batches ahead
    assert turn.samples_per_s > 0 and turn.cpu_s_per_1000 > 0 and turn.checked is None
    assert turn.peak_rss_bytes > 3 * 30 * MIB  # three processes that hold torch


def test_a_row_stands_still_between_its_turns_and_ends_when_closed(packed_demo):
    process = RowProcess("reading", reading_row, job_of(packed_demo, workers=2))
    try:
        process.wait()
        family = psutil.Process().children(recursive=True)
        # The system takes its time to stop one that is busy.
        assert wait_until(lambda: sum(p.status() == psutil.STATUS_STOPPED for p in family) == 3)  # the row, its workers
        stopped = [p for p in family if p.status() == psutil.STATUS_STOPPED]
        used = [p.cpu_times() for p in stopped]
        time.sleep(0.2)
        assert [p.cpu_times() for p in stopped] == used
        assert process.measure(0.05).samples_per_s > 0
    finally:
        process.close()
    psutil.wait_procs(stopped, timeout=5)
    assert not any(p.is_running() for p in stopped)


@pytest.mark.parametrize(
    "make, message",
    [
        (dying_row, "row doomed: its process died with exit code 3. Leave it out"),
        (failing_row, "(?s)row doomed failed:.*ValueError: no such luck"),
    ],
)
def test_a_row_that_dies_is_an_error_that_names_it(make, message, packed_demo):
    process = RowProcess("doomed", make, job_of(packed_demo))
    try:
        process.wait()
        with pytest.raises(RowError, match=message):
            process.measure(0.05)
    finally:
        process.close()


def test_the_fastest_setting_is_taken(packed_demo):
    settings = {"slow": job_of(packed_demo), "fast": job_of(packed_demo, region=True)}
    best, rates = loader_throughput.best_setting("sleeping", sleeping_row, settings, 0.1)
    assert best == "fast" and rates["fast"] > rates["slow"] > 0
    assert loader_throughput.best_setting("sleeping", sleeping_row, {"only": settings["slow"]}, 0.1) == ("only", {})


def test_a_setting_that_fails_is_skipped(packed_demo, capsys):
    settings = {"failing": job_of(packed_demo, cold=True), "slow": job_of(packed_demo)}
    best, rates = loader_throughput.best_setting("sleeping", sleeping_row, settings, 0.05)
    assert best == "slow" and set(rates) == {"slow"}
    assert "row sleeping, failing failed" in capsys.readouterr().err
    with pytest.raises(RowError, match="(?s)row sleeping, one failed.*row sleeping, two failed"):
        failing = {name: settings["failing"] for name in ("one", "two")}
        loader_throughput.best_setting("sleeping", sleeping_row, failing, 0.05)


def test_the_worker_counts_tried_can_be_named(packed_demo):
    for arguments, expected in (([], [1, 2, 3, 4]), (["--workers", "8", "16"], [8, 16]), (["--quick"], [1])):
        options = loader_throughput.parse(arguments)
        for name in ("torch_dataloader", "webdataset"):
            _, settings = loader_throughput.settings_of(name, job_of(packed_demo), options)
            assert [job.workers for job in settings.values()] == expected


def test_ratios_are_of_medians():
    rates = {
        "ours_k1": [90, 100, 400],
        "torch_dataloader": [50, 40, 60],
        "webdataset": [20] * 3,
        "ceiling_decode": [200] * 3,
        "ceiling_region": [300] * 3,
        "ceiling_write": [150] * 3,
    }
    turns = {name: [Measured(rate, 1.0, 5, None, None) for rate in values] for name, values in rates.items()}
    rows = loader_throughput.summarise("temporal", turns, {name: ("", {}) for name in rates})
    ours, web = rows[0], rows[2]
    assert ours["samples_per_s"] == {"median": 100, "min": 90, "max": 400}
    assert (ours["ratio_to_torch_dataloader"], ours["ratio_to_best_peer"], ours["ratio_to_ceiling"]) == (2, 2, 0.5)
    assert ours["ratio_to_region_plus_write"] == pytest.approx(1)  # 1 / (1/300 + 1/150) = 100
    assert web["ratio_to_best_peer"] == 0.4 and web["peak_rss_bytes"] == 5 and web["read_bytes_per_sample"] is None
    (alone,) = loader_throughput.summarise("temporal", {"reference": turns["webdataset"]}, {"reference": ("", {})})
    assert alone["ratio_to_best_peer"] is None and alone["ratio_to_ceiling"] is None


def test_the_script_writes_what_table_and_chart_are_made_from(packed_demo, tmp_path):
    out = tmp_path / "loader_throughput.json"
    command = [sys.executable, "benchmarks/loader_throughput.py", "--quick", "--data", packed_demo, "--out", out]
    names = ["ours_k1", "ours_k1_cold", "torch_dataloader", "ceiling_region", "ceiling_write"]
    command += ["--streams", "temporal", "--rows", *names]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert set(result) == {"machine", "versions", "commit", "config", "complete", "rows"} and result["complete"]
    assert [(row["stream"], row["name"]) for row in result["rows"]] == [("temporal", name) for name in names]
    keys = {"stream", "name", "setting", "samples_per_s", "cpu_s_per_1000", "peak_rss_bytes", "read_bytes_per_sample"}
    keys |= {f"ratio_to_{other}" for other in ("torch_dataloader", "best_peer", "ceiling")}
    for row in result["rows"]:
        assert set(row) - {"ratio_to_region_plus_write"} == keys
        assert row["ratio_to_ceiling"] is None and row["ratio_to_torch_dataloader"] > 0
        assert row["cpu_s_per_1000"] >= 0 and row["peak_rss_bytes"] > MIB and row["read_bytes_per_sample"] >= 0
    assert result["rows"][0]["ratio_to_region_plus_write"] > 0

    table = readme.throughput_table(result).split("\n\n")[1].split("\n")
    assert len(table) == 2 + len(result["rows"]) and {line.count("|") for line in table} == {10}
    assert (tmp_path / "loader_throughput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program", [loader_throughput, train_step, decode_rates, scaling], ids=lambda p: p.__name__)
def test_small_frames_are_measured_at_a_crop_that_fits_and_as_a_part(program, packed_demo):
    more = ["--procs", "1"] * (program is scaling)
    options = program.parse(["--data", str(packed_demo), *more])
    assert options.crop_px == 40 and options.out == Path(f"{program.__name__}_partial.json")  # of 48 px
    assert program.parse(["--data", str(packed_demo), "--crop-px", "48", *more]).crop_px == 48
    with pytest.raises(ValueError, match="--crop-px 49: expected 1 to 48, the smaller side"):
        program.parse(["--data", str(packed_demo), "--crop-px", "49", *more])
    options = program.parse(["--out", "results", *more])
    assert options.crop_px == program.parse(["--crop-px", str(options.crop_px), *more]).crop_px >= 112
    assert options.out == Path("results", f"{program.__name__}_generated.json")


def test_numbers_have_sensible_digits():
    assert [readme.num_bytes(value) for value in (None, 512, 5_110_000, 2_345_678_900)] == [
        *("–", "512 B", "5.1 MB", "2.3 GB")
    ]
    assert [readme.digits(value) for value in (None, 0.0432, 5.67, 23.45, 1234.5)] == [
        *("–", "0.043", "5.7", "23.4", "1,234")
    ]
