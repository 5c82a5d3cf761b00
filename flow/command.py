"""What every command of this project shares: a parser, and messages that name the right word for a wrong one."""

import argparse
import difflib
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from flow.pool import interruptible

#: Similarity, from 0 to 1, from which on a word is worth proposing.
_ALIKE = 0.6

#: Entries of a folder that are compared with a wrong name, and words that are: of a million videos the first.
MAX_COMPARED = 20_000


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with the known word that is most like a wrong one, or the only one that begins with it; ""
    if there is none. Case is ignored."""
    near = nearest(word, known)
    return f" Did you mean {near!r}?" if near is not None else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The word that `did_you_mean` proposes."""
    by_lower = {name.lower(): name for name in islice(known, MAX_COMPARED)}
    word = word[:200].lower()
    near = difflib.get_close_matches(word, by_lower, 1, _ALIKE)
    if not near and word:
        near = [name for name in by_lower if name.startswith(word)]
    return by_lower[near[0]] if len(near) == 1 else None


def nearest_path(path: str | Path) -> str:
    """What to say of a path that is not there: the nearest one that is, or how far it leads; "" if it is there.

    ucf-10/Archry, beside UCF-101/Archery    " Did you mean 'UCF-101/Archery'?"
    data/none/packed                         " 'data' is there, 'none' is not in it."
    """
    missing: list[str] = []
    found = Path(path)
    while not os.path.exists(found) and found != found.parent:
        missing.insert(0, found.name)
        found = found.parent
    if not missing:
        return ""
    if not found.is_dir():
        return f" {str(found)!r} is no folder."
    near = found
    for name in missing:
        child = name if os.path.exists(near / name) else nearest(name, _entries(near))
        if child is None:
            break
        near /= child
    if near != found:
        return f" Did you mean {str(near)!r}?"
    return f" {str(found)!r} is there, {missing[0]!r} is not in it." if str(found) != "." else ""


def _entries(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, MAX_COMPARED)]
    except OSError:
        return []


def folders_with(folder: Path, file: str) -> list[Path]:
    """Folders in a folder, of a large one among the first entries, that hold a file of this name."""
    return [folder / name for name in sorted(_entries(folder)) if os.path.exists(folder / name / file)]


def describe_error(error: Exception) -> str:
    """What ended a command, in one line; of a path that is not there, with the nearest that is."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        return f"{path}: {error.strerror}." + nearest_path(path) * isinstance(error, FileNotFoundError)
    if isinstance(error, RuntimeError):  # of torch or DALI: what happened, and then where in them
        return (str(error).strip().splitlines() or [repr(error)])[0]
    return str(error)


@contextmanager
def tidy_end() -> Iterator[None]:
    """Around a command: Ctrl-C and SIGTERM end it as an exception does, which takes its temporary files away, with one
    line and the exit code 128 + signal."""
    try:
        with interruptible():
            yield
    except KeyboardInterrupt as stop:
        print("Stopped.", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


def say(line: str) -> None:
    """Print a line at once, above the progress bars if there are any."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def wrap_words(words: Iterable[str]) -> str:
    """Words in indented lines, for a parser's description or epilog."""
    indent = "  "
    return textwrap.fill(", ".join(words), 78, initial_indent=indent, subsequent_indent=indent)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors name the nearest right option or choice, and whose help shows text as written."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        self._words: list[str] = []
        super().__init__(*args, **options)

    def add_subparsers(self, **options: Any) -> Any:
        """As of ArgumentParser; a wrong option of a command is an error of the command, which knows the right one."""
        return super().add_subparsers(**{"parser_class": _Command, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As of ArgumentParser."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message; and, of an unknown option or choice, with the nearest known one."""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hint = did_you_mean(choice[1], [name.strip(" '") for name in choice[2].split(",")])
            super().error(message + ("." + hint if hint else ""))
        known = list(_options(self))
        words = (word.partition("=")[0] for word in takewhile(lambda word: word != "--", self._words))
        wrong = [word for word in words if re.match(r"-+[^-\d.]", word) and word not in known]
        if wrong and not message.startswith("unrecognized"):  # what is said to be missing may be what was misspelt
            message += f". There is no option {', '.join(wrong)}"
        bare = {option.lstrip("-"): option for option in known}
        near = [bare[name] for word in wrong if (name := nearest(word.lstrip("-"), bare)) is not None]
        super().error(message + (f". Did you mean {' or '.join(map(repr, near))}?" if near else ""))


class _Command(Parser):
    """A parser of a command's command: what it does not know, nobody does."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
