"""Commands as processes of their own, to be killed: what belongs to one, and whether it is gone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def start(module: str, arguments: Sequence[object], limits: Sequence[str] = ()) -> subprocess.Popen:
    """Start `python -m module` in a process group of its own, as a terminal does. stdout and stderr are one pipe.

    limits: a command that runs it under limits, such as prlimit with its options.
    """
    # A job in the background, and so its children, may ignore Ctrl-C.
    command = ["env", "--default-signal=INT", *limits, sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = [
            child
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    except OSError:
        return []
    return [pid, *(found for child in children for found in tree(int(child)))]


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def is_python_cleaner(pid: int) -> bool:
    """Whether this is Python's resource tracker, which removes the semaphores of processes that were killed."""
    try:
        return b"resource_tracker import" in Path(f"/proc/{pid}/cmdline").read_bytes()  # others may have it after -W
    except OSError:
        return False


def workers(pid: int) -> list[int]:
    """Processes that work for a process."""
    return [child for child in tree(pid)[1:] if not is_python_cleaner(child)]


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Wait until something holds; whether it does."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
