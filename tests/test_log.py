"""The log of a resumed run is that of one run."""

import json
import resource

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.log import TrainLog, read_log


def record(step):
    return {"step": step, "loss": 1 / step, "lr": 0.1}


def test_records_beyond_the_checkpoint_are_dropped_on_resume(tmp_path):
    with TrainLog(tmp_path, 0) as log:
        for step in (1, 2, 3, 4):
            log.write(record(step))
    with TrainLog(tmp_path, 2) as log:
        log.write(record(3))
    assert read_log(tmp_path / "log.jsonl") == [record(1), record(2), record(3)]


def test_an_unfinished_last_line_is_no_record(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2))[:9])
    assert read_log(tmp_path / "log.jsonl") == [record(1)]
    with TrainLog(tmp_path, 1) as log:
        log.write(record(2))
    assert read_log(tmp_path / "log.jsonl") == [record(1), record(2)]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    """A resumed run takes back what the stopped one wrote beyond its checkpoint."""
    with TrainLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write(record(step))
    (first,) = tmp_path.glob("events*")
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))  # it is of an earlier second
    with TrainLog(tmp_path, 1) as log:
        log.write({**record(2), "loss": 7.0})
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Tags()["scalars"] == ["loss", "lr"]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


@pytest.mark.parametrize(("limit", "name"), [(30, "log.jsonl"), (90, "events")])
def test_a_disk_that_refuses_is_named_and_the_log_stays_whole(tmp_path, limit, name):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    with TrainLog(tmp_path, 0) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
        try:
            with pytest.raises(OSError, match=f"cannot write .*{name}.*: File too large.*make space"):
                for step in (1, 2, 3):
                    log.write(record(step))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
    with TrainLog(tmp_path, 0) as log:
        log.write(record(1))
    assert read_log(tmp_path / "log.jsonl") == [record(1)]
