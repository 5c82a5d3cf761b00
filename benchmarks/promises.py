"""The tables of docs/reliability.md: what is promised, and what was measured of it."""

from typing import Any

#: Case of tests/faults -> what it holds the code to.
PROMISES = {
    "killed pack": "`flow.pack`, killed (SIGKILL) at random moments and started again, ends byte for byte like one "
    "that was left alone. No temporary file stays, and who reads along never sees half a shard under its final name. "
    "The same for `flow.images`",
    "full or read-only disk": "A full or read-only disk ends a pack with one line: path, reason, remedy. What is "
    "finished is unharmed, no video becomes a bad one, and with space the same command ends byte for byte like an "
    "undisturbed one. The same for training, its checkpoints and logs, with bit for bit the same weights",
    "killed training": "A process, or one of two, killed at random steps: `--max-restarts` starts all again, and the "
    "weights end bit for bit as if undisturbed (CPU)",
    "kill while a checkpoint is written": "A kill in the middle of a checkpoint leaves the one before usable",
    "damaged newest checkpoint": "Cut, flipped, zeroed: training falls back to the one before, says so, and ends with "
    "the same weights",
    "other number of ranks": "A run that goes on with 1 process in place of 2, or the reverse, sees the same global "
    "batches and dropout masks; loss and weights equal within float tolerance",
    "damaged files": "Damage to any kind of member, to the index or to `dataset.json`, up to a missing or swapped "
    "shard, is an error that names the place, before a wrong tensor is delivered, and never a crash. Tar headers and "
    "clip JSONs are not read in training: what is wrong with them, `flow.verify` finds",
    "skipped damage": "`data.on_damage=skip` takes another draw of the same class, counts and logs it, and gives up "
    "above `data.max_damaged_pct`",
    "hung reader": "A read that does not return ends in a time-out that names what was waited for",
    "hung rank": "One rank that hangs: the others say what they waited for, and the job ends",
    "failing rank": "A rank that fails takes the job down within a minute",
    "nan loss": "A loss that is no number, or explodes, ends the run with its step and videos; the last good "
    "checkpoint is kept",
    "interrupt": "Ctrl-C or SIGTERM at a random moment ends a run with one line, no process and no shared memory left "
    "(semaphores are not looked at)",
}

_QUANTITIES = {
    "resident_bytes": "resident memory",
    "private_bytes": "of it private",
    "shared_memory_bytes": "shared memory",
    "open_files": "open files",
    "threads": "threads",
}


def faults_table(result: dict[str, Any]) -> str:
    lines = ["| promise | case | faults injected | survived | data lost |", "| --- |" + " --- |" * 4]
    rows = {row["name"]: row for row in result["rows"]}
    for name, promise in PROMISES.items():
        row = rows[name]
        lines.append(f"| {promise} | `{name}` | {row['injected']} | {row['survived']} | {row['lost']} |")
    lines.append(
        f"\nIn all {result['injected']:,} faults, {result['survived']:,} survived, {result['lost']} losses; "
        f"{result['seconds'] / 60:.0f} minutes on {result['machine']['cores']} cores, seed {result['config']['seed']}."
    )
    return "\n".join(lines)


def soak_table(result: dict[str, Any]) -> str:
    lines = ["| | quantity | median | per hour | flat |", "| --- |" + " --- |" * 4]
    for row in result["rows"]:
        for key, title in _QUANTITIES.items():
            verdict = row["verdicts"][key]
            scale, unit = (1e-6, " MB") if key.endswith("_bytes") else (1, "")
            cells = [row["name"], title, f"{verdict['median'] * scale:,.0f}{unit}"]
            cells += [f"{verdict['per_hour'] * scale:+,.1f}{unit}", "yes" if verdict["flat"] else "**no**"]
            lines.append(f"| {' | '.join(cells)} |")
    ends = "; ".join(
        f"{row['name']}: gone after {row['end']['exit_s']:.1f} s, {row['end']['orphans']} processes and "
        f"{row['end']['shared_memory_left']} files of shared memory left"
        for row in result["rows"]
    )
    config = result["config"]
    lines.append(
        f"\n{config['minutes']:g} minutes in all, a sample every {config['every_s']:g} s. Flat: after the warm-up, the "
        f"fitted line rises by at most {config['max_rise_pct']:g} % of the median of memory, and by at most "
        f"{config['max_rise_count']:g} of what is counted. Ctrl-C at the end: {ends}."
    )
    return "\n".join(lines)


def fuzz_table(result: dict[str, Any]) -> str:
    lines = ["| target | minutes | inputs | findings | peak memory |", "| --- |" + " --- |" * 4]
    for name, row in [*result["targets"].items(), ("all", result["total"])]:
        found = sum(row[key] for key in ("exceptions", "crashes", "timeouts", "out_of_memory"))
        cells = [
            f"`{name}`",
            f"{row['seconds'] / 60:.1f}",
            f"{row['runs']:,}",
            str(found),
            f"{row['peak_rss_mb']:,} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
