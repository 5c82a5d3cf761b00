"""What a node of a Ray cluster does with a task of `flow.ray_engine`, and what it tells of itself."""

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from flow.extract import flow_method, sample_pair
from flow.pool import run_alone
from flow.resume import PackTask
from flow.video import import_cv2

#: File in a folder of fragments by which a node knows that it sees that folder, and not another one of its path.
TOKEN = "token"
#: What the methods compute with that are not OpenCV's.
_LIBRARY = {"brox": "torch", "nvof": "nvidia-dali-cuda120"}


@dataclass(frozen=True)
class Job:
    """What a task is given besides itself.

    folder: that relative paths begin at. token: of the fragment's folder. method: of flow, or None. on_gpu: it runs on
    one; else its field is compared. fails: a RuntimeError ends the process. alone: in a process of its own.
    """

    function: Callable[[Any], Any]
    folder: str
    token: str
    method: str | None
    on_gpu: bool
    fails: bool
    alone: bool


@dataclass(frozen=True)
class Outcome:
    """node: for people; node_id: for Ray. sizes: of what was read. num_bytes: of the fragment, None if there is none.
    content: the fragment, if its folder is not seen there. error: a RuntimeError of a task that was alone."""

    node: str
    node_id: str
    identity: dict[str, str]
    sizes: list[int | None]
    result: Any
    num_bytes: int | None
    content: npt.NDArray[np.uint8] | None
    error: RuntimeError | None = None


def work(job: Job, task: Any) -> Outcome:
    """Do one task on a node."""
    with suppress(OSError):
        os.chdir(job.folder)
    identity = node_identity(job.method, compare_field=not job.on_gpu)
    read = sizes(task)
    if job.on_gpu:
        identity = {**identity, "GPU": gpu_name()}
    if sees(task.fragment.parent, job.token):
        result, error = _call(job, task)
        return Outcome(*node_names(), identity, read, result, size(task.fragment), None, error)
    with tempfile.TemporaryDirectory(prefix="two-stream-") as scratch:
        fragment = Path(scratch, task.fragment.name)
        try:
            result, error = _call(job, replace(task, fragment=fragment))
        except OSError as failure:
            failure.filename = failure.filename or tempfile.gettempdir()  # and not the pack's folder
            raise
        content = np.fromfile(fragment, np.uint8) if fragment.exists() else None
    return Outcome(*node_names(), identity, read, result, None, content, error)


def _call(job: Job, task: Any) -> tuple[Any, RuntimeError | None]:
    try:
        return (run_alone(job.function, task) if job.alone else job.function(task)), None
    except RuntimeError as error:
        if not job.fails:
            raise
        if job.alone:
            return None, error
        _end_process()


def _end_process() -> NoReturn:
    """As if it had crashed: of a GPU's library it may be of no use afterwards, and the next task may not meet it."""
    os._exit(1)


def sees(folder: Path, token: str) -> bool:
    try:
        return (folder / TOKEN).read_text() == token
    except (OSError, ValueError):
        return False


def size(path: Path) -> int | None:
    """Bytes of a file, 0 for a folder, None if it is not there."""
    try:
        return 0 if path.is_dir() else path.stat().st_size
    except OSError:
        return None


def sizes(task: PackTask) -> list[int | None]:
    return [size(path) for path in task.inputs]


def node_names() -> tuple[str, str]:
    """This node, for people, and for Ray."""
    import ray

    node_id = str(ray.get_runtime_context().get_node_id())
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, {node_id[:8]})", node_id


@lru_cache
def node_identity(method: str | None, *, compare_field: bool) -> dict[str, str]:
    """What the bytes of a fragment depend on besides its task: the code, its libraries, and how this processor rounds.

    method: of flow, or None. compare_field: with one of its fields, computed on the CPU.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    identity = {
        "two-stream": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12],
        "opencv": import_cv2().__version__,
        "numpy": np.__version__,
    }
    if method in _LIBRARY:
        identity[_LIBRARY[method]] = _version(_LIBRARY[method])
    if method is not None and compare_field:
        identity[f"{method} field"] = hashlib.sha256(flow_method(method)(*sample_pair()).tobytes()).hexdigest()[:12]
    return identity


def gpu_name() -> str:
    """The kind of GPU that this task was given."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
