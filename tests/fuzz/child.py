"""One turn on one target, in a process that may crash, hang or grow: `python -m tests.fuzz.child TARGET --work DIR ...`

By Atheris, which keeps inputs that reach new code in DIR/corpus/TARGET; or with --runs by mutation alone, without it.
What ends the process is left in DIR/crashers by the fuzzer. Any other finding is noted once, as a line of
DIR/findings.jsonl with its input beside the former, and the turn goes on.
"""

import argparse
import hashlib
import json
import resource
import sys
import traceback
import warnings
from pathlib import Path
from random import Random

#: Memory of the process, and seconds for one input.
LIMIT_MB, TIMEOUT_S = 2048, 30
_INSTRUMENTED = ["flow", "loaders", "train", "json", "tarfile", "webdataset", "yaml", "zipfile"]


class Turn:
    """Calls a target, and keeps what it finds. found: places of findings in this turn -> how often."""

    def __init__(self, name: str, work: Path):
        from tests.fuzz.targets import TARGETS

        self.target, self.work, self.found = TARGETS[name], work, dict[str, int]()
        self.crashers, self.corpus = work / "crashers", work / "corpus" / name
        for folder in (self.crashers, self.corpus):
            folder.mkdir(parents=True, exist_ok=True)
        self.seeds = self.target.seeds()
        for seed in self.seeds:
            (self.corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

    def __call__(self, data: bytes) -> None:
        from tests.fuzz.judge import Finding, attempt

        try:
            attempt(self.target.read, data)
        except Finding as finding:
            self._note(finding, data)

    def _note(self, finding: "Exception", data: bytes) -> None:
        place = str(finding)
        self.found[place] = self.found.get(place, 0) + 1
        if self.found[place] == 1:
            name = f"{self.target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
            (self.crashers / name).write_bytes(data)
            text = "".join(traceback.format_exception(finding.__cause__)[-12:]).encode("ascii", "backslashreplace")
            record = {"target": self.target.name, "place": place, "input": name, "traceback": text.decode()}
            with open(self.work / "findings.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Atheris' own changes, or ours, which keep a file plausible."""
        import atheris

        rng = Random(seed)
        if rng.random() < 0.4:
            return atheris.Mutate(data, max_size)
        return self.target.mutate(data, rng)[:max_size]


def limit_memory() -> None:
    """Let what asks for absurd memory, touched or not, fail as MemoryError, which is a finding."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * LIMIT_MB * 2**20,) * 2)


def run_mutations(turn: Turn, runs: int, seed: int) -> None:
    """Fuzz without Atheris: as many inputs, all that the seed says."""
    rng = Random(seed)
    for _ in range(runs):
        turn(turn.target.mutate(rng.choice(turn.seeds), rng))


def run_atheris(name: str, work: Path, seconds: float, seed: int) -> None:
    """Fuzz with Atheris for so many seconds. Does not return."""
    import atheris

    atheris.enabled_hooks.add("str")  # the one for regular expressions breaks tokenize, which numpy reads headers with
    with atheris.instrument_imports(include=_INSTRUMENTED, enable_loader_override=False):
        turn = Turn(name, work)
        turn(turn.seeds[0])  # imports what the target imports late
    limit_memory()
    options = [f"-max_total_time={round(seconds)}", f"-seed={seed}", f"-rss_limit_mb={LIMIT_MB}"]
    options += [f"-timeout={TIMEOUT_S}", "-print_final_stats=1", f"-artifact_prefix={turn.crashers}/{name}-"]
    options += [f"-max_len={2 * max(map(len, turn.seeds))}"]
    atheris.Setup([sys.argv[0], *options, str(turn.corpus)], turn, custom_mutator=turn.mutate)
    atheris.Fuzz()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.child", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", metavar="TARGET")
    parser.add_argument("--work", type=Path, required=True, help="folder of corpus and findings")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, help="so many mutated seeds, without Atheris")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if options.runs is None:
        run_atheris(options.targets[0], options.work, options.seconds, options.seed)
    found = {}
    for name in options.targets:
        turn = Turn(name, options.work)
        run_mutations(turn, options.runs, options.seed)
        found |= turn.found
    print(json.dumps(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
