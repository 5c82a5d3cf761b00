"""What every command of this project shares: a parser, and messages that name the right word for a wrong one."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

#: Similarity, from 0 to 1, from which on a word is worth proposing.
_ALIKE = 0.6

#: Entries of a folder that are compared with a wrong name, and words that are: of a million videos the first.
_MAX_COMPARED = 20_000


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with the known word nearest to a wrong one, or "" if none is like it. Case is ignored."""
    by_lower = {name.lower(): name for name in islice(known, _MAX_COMPARED)}
    near = difflib.get_close_matches(word[:200].lower(), by_lower, 1, _ALIKE)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def nearest_path(path: str | Path) -> str:
    """What to say of a path that is not there: the nearest one that is, or how far it leads; "" if it is there.

    UCF-10/Archery, beside UCF-101     " Did you mean 'UCF-101/Archery'?"
    data/none/packed                   " 'data' is there, 'none' is not in it."
    """
    path = Path(path)
    missing: list[str] = []
    found = path
    while not found.exists() and found != found.parent:
        missing.insert(0, found.name)
        found = found.parent
    if not missing:
        return ""
    if not found.is_dir():
        return f" {str(found)!r} is no folder."
    try:
        with os.scandir(found) as entries:
            names = [entry.name for entry in islice(entries, _MAX_COMPARED)]
    except OSError:
        return ""
    near = difflib.get_close_matches(missing[0], names, 1, _ALIKE)
    if near:
        return f" Did you mean {str(Path(found, near[0], *missing[1:]))!r}?"
    return f" {str(found)!r} is there, {missing[0]!r} is not in it." if str(found) != "." else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors name the nearest right option or choice, and whose help shows text as written."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message, after a hint if it names an unknown option or choice."""
        hints = []
        if unknown := re.search(r"unrecognized arguments: (.*)", message):
            words = [word.partition("=")[0] for word in unknown.group(1).split() if word.startswith("--")]
            hints = [did_you_mean(word, _options(self)) for word in words]
        elif choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hints = [did_you_mean(choice.group(1), [name.strip(" '") for name in choice.group(2).split(",")])]
        super().error(message + ("." if any(hints) else "") + "".join(hints))


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Long options of a parser and of its commands."""
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
