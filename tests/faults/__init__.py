"""Faults that are injected for real, and what has to hold afterwards: `python -m tests.faults` (`make faults`).

A case is a generator of Fault, one for each fault that it has injected:

    def case(rng: np.random.Generator, folder: Path, short: bool) -> Iterator[Fault]

rng: all of its randomness. folder: empty, its own. short: the few that `make test` has time for.
A module of cases has them in a dict CASES, name -> function.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One injected fault. what: in a few words, with what was drawn. survived: everything promised held; if not, `note`
    says what did not. lost: videos, steps or samples that are gone or wrong."""

    what: str
    survived: bool = True
    lost: int = 0
    note: str = ""
