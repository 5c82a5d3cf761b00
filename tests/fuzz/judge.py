"""Success, one of our errors, or a finding: how an input ended."""

import linecache
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("flow", "loaders", "nets", "train")
_OWN = tuple(f"{ROOT / package}/" for package in _PACKAGES)
#: Characters of an error's message; what it quotes has to be cut.
MAX_MESSAGE = 4000
_LAYOUT = dict.fromkeys(map(ord, "\n\t"))  # as YAML's messages have it


class Finding(Exception):
    """An input ended in neither success nor one of our errors. `place` tells findings apart."""

    def __init__(self, place: str):
        super().__init__(place)
        self.place = place


class Refused(Exception):
    """A file that packing reports as bad, for this reason, and leaves out."""


def attempt(read: Callable[[bytes], None], data: bytes) -> bool:
    """Whether a reader accepted the bytes. Raises Finding for an exception that is none of our errors."""
    try:
        read(data)
    except Exception as error:
        place = _place(error)
        if not (_is_printable(error) and (type(error) is Refused or _is_ours(error))):
            raise Finding(place) from error
        return False
    return True


def _is_ours(error: Exception) -> bool:
    """Whether it is one of our errors: not of another kind of ValueError, such as UnicodeDecodeError; raised by a
    `raise` of ours, not by a function that we called."""
    kind, (file, line) = type(error), _raised_at(error)
    own_kind = kind in (ValueError, FileNotFoundError) or (isinstance(error, ValueError) and _is_own(kind))
    raised = file.startswith(_OWN) and linecache.getline(file, line).lstrip().startswith("raise ")
    return own_kind and raised


def _is_printable(error: Exception) -> bool:
    """Whether its message can be shown on a terminal, whatever it quotes of a file."""
    return str(error).translate(_LAYOUT).isprintable() and len(str(error)) < MAX_MESSAGE


def _is_own(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _PACKAGES


def _raised_at(error: Exception) -> tuple[str, int]:
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_filename, traceback.tb_lineno


def _place(error: Exception) -> str:
    """Type of an exception, and the line of ours that it came through last."""
    traceback, place = error.__traceback__, "nowhere"
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file.startswith((*_OWN, str(ROOT / "tests" / "fuzz"))):
            place = f"{Path(file).relative_to(ROOT)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{type(error).__name__} at {place}"
