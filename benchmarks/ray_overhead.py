"""What Ray adds to a task of a pack, and how fast fragments come back through its object store.

Both engines do the same empty tasks with as many processes, in turns; the clock starts when a fifth is done, so that
the start of processes is outside. Then fragments of some size are written, by nodes that see the pack's folder and by
nodes that do not, which send them to the command; of that, `taken` counts the command's own time alone. All is on one
machine: no network is in between.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import add_out, errors_in_a_line, result_path, write_result
from pack_parts import spread

from flow import ray_engine
from flow.codec import Codec
from flow.command import Parser
from flow.devices import Engine, LocalEngine
from flow.fragment import FragmentReport, FragmentTask, Recipe, fragment_file
from flow.pool import default_num_workers

_RECIPE = Recipe(size_px=256, method=None, codec=Codec())


def write_bytes(task: FragmentTask) -> FragmentReport:
    """Write a fragment of `class_id` bytes."""
    if task.class_id:
        with fragment_file(task.fragment) as file:
            file.write(bytes(task.class_id))
    return FragmentReport()


class _Unseen(ray_engine._Token):
    """A token that no folder has."""

    def in_folder(self, folder: Path) -> str:
        return self._text


class _Timed(ray_engine.RayEngine):
    """Tells how long the command itself was at work on what tasks returned: it takes that, and writes what was sent."""

    taken_s = 0.0

    def _get(self, *args: Any) -> Any:
        return self._timed(super()._get, *args)

    def _accept(self, *args: Any) -> Any:
        return self._timed(super()._accept, *args)

    def _timed(self, work: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.taken_s += time.perf_counter() - start


def seconds(engine: Engine, num_tasks: int, num_bytes: int) -> float:
    """For so many tasks, when a quarter as many are done."""
    warm = max(1, num_tasks // 4)
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            FragmentTask(Path(folder), f"v{n}", "c", num_bytes, Path(folder, f"{n}"), _RECIPE)
            for n in range(num_tasks + warm)
        ]
        results = engine.run(write_bytes, tasks)
        for number, (task, _) in enumerate(results, 1):
            if number == warm:
                start = time.perf_counter()
            task.fragment.unlink(missing_ok=True)
        return time.perf_counter() - start


def measure(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Rows by name: figures of every round."""
    start = time.perf_counter()
    names = ("local_ms", "ray_ms", "seen_mb_per_s", "sent_mb_per_s", "taken_mb_per_s")
    rows: dict[str, list[float]] = {name: [] for name in names}
    with _Timed(None, workers, None, None) as cluster:
        seconds(cluster, 1, 0)
        start_s = time.perf_counter() - start
        seconds(cluster, 4 * workers, options.mb * 10**6)
        local = LocalEngine(None, workers, None)
        works: dict[str, Callable[[], float]] = {
            "local_ms": lambda: 1e3 * seconds(local, options.tasks, 0) / options.tasks,
            "ray_ms": lambda: 1e3 * seconds(cluster, options.tasks, 0) / options.tasks,
            "seen_mb_per_s": lambda: (
                options.fragments * options.mb / seconds(cluster, options.fragments, options.mb * 10**6)
            ),
            "sent_mb_per_s": lambda: _sent(cluster, options),
        }
        for _ in range(options.rounds):
            for name, work in works.items():
                cluster.taken_s = 0.0
                rows[name].append(work())
            # Of the last work; those before a quarter is done, when the clock of the others starts, are taken too.
            num_taken = options.fragments + max(1, options.fragments // 4)
            rows["taken_mb_per_s"].append(num_taken * options.mb / cluster.taken_s)
    added = [ray - local for ray, local in zip(rows["ray_ms"], rows["local_ms"], strict=True)]
    return {"start_s": start_s, **{name: spread(values) for name, values in rows.items()}, "added_ms": spread(added)}


def _sent(cluster: Engine, options: argparse.Namespace) -> float:
    with patch.object(ray_engine, "_Token", _Unseen):
        return options.fragments * options.mb / seconds(cluster, options.fragments, options.mb * 10**6)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="What Ray adds to a task of a pack, and MB/s of fragments that nodes send.")
    parser.add_argument("--tasks", type=int, default=1000, metavar="N", help="empty ones (default %(default)s)")
    parser.add_argument("--fragments", type=int, default=50, metavar="N", help="written ones (default %(default)s)")
    parser.add_argument("--mb", type=int, default=8, metavar="N", help="megabytes of each (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all in turns (default %(default)s)")
    add_out(parser, "ray_overhead")
    options = parser.parse_args(argv)
    partial = any(getattr(options, key) < parser.get_default(key) for key in ("tasks", "fragments", "rounds"))
    with errors_in_a_line():
        if min(options.tasks, options.fragments, options.mb, options.rounds) < 1:
            raise ValueError("expected one task, fragment, megabyte and round at least.")
        path = result_path(options.out, "ray_overhead", partial=partial)
        workers = default_num_workers()
        figures = measure(options, workers)
        config = {key: getattr(options, key) for key in ("tasks", "fragments", "mb", "rounds")}
        write_result(path, {**config, "workers": workers, "ray": version("ray")}, **figures)
    medians = {name: figures[name]["median"] for name in figures if name not in ("start_s", "added_ms")}
    print(", ".join(f"{name} {value:,.1f}" for name, value in medians.items()), path, sep="; ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
