"""The log of a resumed run is that of one run."""

import json

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
