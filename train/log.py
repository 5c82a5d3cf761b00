"""The log of one stream's training: JSON lines and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flow.shard import write_bytes


class TrainLog:
    """Appends one record a line to `folder/log.jsonl` and the same numbers to TensorBoard event files.

        {"step": 40, "loss": 1.62, "lr": 0.01, "samples_per_s": 251.3, "data_wait_pct": 3.1}

    A record's `step` is the number of updates done. A log that is opened to continue after update `start_step` first
    loses the lines beyond it, which the stopped run wrote after its last checkpoint.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 writes a log

        path = folder / "log.jsonl"
        kept = [record for record in read_log(path) if record["step"] <= start_step] if path.exists() else []
        write_bytes(path, b"".join(_line(record) for record in kept))
        self._file = open(path, "ab")
        self._board = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it is in the file when this returns."""
        self._file.write(_line(record))
        self._file.flush()
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log file; a last line that a killed process left unfinished is not one."""
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line feed is unfinished, or nothing
    return [json.loads(line) for line in lines]


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
