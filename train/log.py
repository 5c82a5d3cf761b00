"""The log of one stream's training: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from flow.shard import write_bytes
from flow.untrusted import parse_json, read_bounded
from train.disk import writing

_MAX_LOG_BYTES = 1 << 30


class TrainLog:
    """Appends one record a line to `folder/log.jsonl` and the same numbers to TensorBoard event files.

        {"step": 40, "loss": 1.62, "accuracy_pct": 39.1, "lr": 0.01, "samples_per_s": 251.3, "data_wait_pct": 3.1}

    A record's `step` is the number of updates done. `loss` and `accuracy_pct` are of the last global batch before it,
    as it was trained on, with dropout and drawn crops: the share of its samples with the highest output at their label.
    Logs of older releases have no `accuracy_pct`. `num_replaced`, with data.on_damage=skip, counts the damaged samples
    that process 0 has replaced since it began. A log that is opened to continue after update `start_step` first loses
    the lines beyond it, which the stopped run wrote after its last checkpoint.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import, and only rank 0 writes a log

        self._path = folder / "log.jsonl"
        kept = read_log(self._path) if self._path.exists() else []
        board = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._opened = ExitStack()
        with writing(self._path):
            write_bytes(self._path, b"".join(_line(record) for record in kept if record["step"] <= start_step))
            self._file = self._open(self._path)
            self._board = self._open(folder / board)
        self._write_events(
            [
                Event(file_version="brain.Event:2"),
                Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)),  # forget later steps
            ]
        )

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it is in the files when this returns. Raises OSError that names the file."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        with writing(self._path):
            self._file.write(_line(record))
            self._file.flush()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
        self._write_events([Event(step=record["step"], summary=Summary(value=values))])

    def sync(self) -> None:
        """Put on the disk what was written, before a checkpoint is: a resumed run would lack the lines before it."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def _write_events(self, events: Iterable[Any]) -> None:
        """At once, and not by tensorboard's own writer: its thread would be the one to meet a full disk."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        with writing(Path(self._board.name)):
            for event in events:
                event.wall_time = time.time()
                RecordWriter(self._board).write(event.SerializeToString())
            self._board.flush()

    def _open(self, path: Path) -> BinaryIO:
        return self._opened.enter_context(open(path, "ab"))

    def close(self) -> None:
        with suppress(OSError):  # all was flushed when it was written: what fails now was reported then
            self._opened.close()

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log file; a last line that a killed process left unfinished is not one.

    Raises ValueError for a damaged line.
    """
    # What follows the last line feed is unfinished, or nothing.
    lines = read_bounded(path, _MAX_LOG_BYTES).split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if type(record["step"]) is not int:
                raise TypeError("no step")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged: {error!r:.200}. Take the line away.") from None
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
