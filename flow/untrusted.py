"""Reading files that strangers made: never more than a bound, never what is no plain file, never another file.

A FIFO or a device would hang or never end, a JSON of gigabytes would fill the memory, one nested a million deep the
stack. What is refused is a ValueError that names the file.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

#: Largest frame, in pixels: 4096 x 4096. A JPEG header of a few bytes may claim 256 times that.
MAX_FRAME_PX = 1 << 24
#: Largest description, list of classes, or state of a run.
MAX_JSON_BYTES = 1 << 24
#: Largest list of videos: some millions of names.
MAX_LIST_BYTES = 1 << 28
#: Largest image that is scaled down to be packed.
MAX_IMAGE_PX = 1 << 27
MAX_IMAGE_BYTES = 1 << 28
_MAX_LINE_CHARS = 4096


def printable(text: object, max_chars: int = 300) -> str:
    """What is quoted of a file in a message: cut off, and nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:max_chars])


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a file to read its bytes. A link to a regular file is one. Raises ValueError for anything else, OSError."""

    def opener(name: str, flags: int) -> int:
        file = os.open(name, flags | os.O_NONBLOCK)  # a FIFO would wait for a writer
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise ValueError(f"{path} is no regular file, but a folder, device or FIFO. Take it away.")
        return file

    return open(path, "rb", buffering, opener=opener)


def read_bounded(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a small file. Raises ValueError if it has more than max_bytes or is no regular file; OSError."""
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise ValueError(f"{path} has {num_bytes:,} bytes, expected at most {max_bytes:,}. Is it the right file?")
        return file.read(num_bytes)


def parse_json(content: bytes) -> Any:
    """Value of a JSON text. Raises ValueError for what is none, also if it is nested too deep."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Value of a JSON file. Raises ValueError for what is none, is too large, or no regular file; OSError."""
    return parse_json(read_bounded(path, max_bytes))


def read_lines(path: str | Path, max_bytes: int = MAX_LIST_BYTES) -> list[str]:
    """Lines of a text in UTF-8, without CRLF and byte order mark. Raises ValueError for what is no list, OSError."""
    try:
        lines = read_bounded(path, max_bytes).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from None
    for number, line in enumerate(lines, 1):
        if len(line) > _MAX_LINE_CHARS:
            raise ValueError(
                f"{path}, line {number} has {len(line):,} characters, expected at most {_MAX_LINE_CHARS:,}: no list."
            )
    return lines
