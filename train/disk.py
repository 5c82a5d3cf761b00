"""Writing a run's files: what a full or read-only disk raises names the file and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes `path`. Raises OSError that says which file, why, and how the run goes on."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}. What is finished is safe: make space, or the folder "
            "writable, and the same command goes on from the last checkpoint."
        ) from error
