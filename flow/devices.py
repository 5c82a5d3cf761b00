"""Where flow is computed: by which engine, on which GPUs, in how many processes, and whether a method works there."""

import argparse
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from flow.extract import GPU_METHODS, prove_method
from flow.pool import default_num_workers, run_alone, run_pool

#: Processes of one GPU: each has memory of its own on it.
WORKERS_PER_GPU = 8

ENGINES = ("local", "ray")

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Processes that pack, here or on other machines. Left, it ends those that it started.

    num_gpus: GPUs that they compute on, all together; 0: the CPU.
    """

    @property
    def num_gpus(self) -> int: ...

    def prove(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of the method with these parameters, once it has computed a field there. Raises ValueError."""
        ...

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Iterable[Any],
        on_error: Callable[[Any, RuntimeError], Any] | None = None,
    ) -> Generator[tuple[Any, Any], None, None]:
        """As `flow.pool.run_pool`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class LocalEngine:
    """Processes of this machine. method: of flow, None if none is computed. num_workers, num_gpus: as asked for."""

    def __init__(self, method: str | None, num_workers: int | None, num_gpus: int | None) -> None:
        self._method = method
        self.num_gpus = count_gpus(method, num_gpus)
        self._num_workers = count_workers(num_workers, self.num_gpus)

    def prove(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        assert self._method is not None
        return prove(self._method, "cuda:0" if self.num_gpus else "cpu", parameters)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        on_error: Callable[[Task, RuntimeError], Result] | None = None,
    ) -> Generator[tuple[Task, Result | None], None, None]:
        return run_pool(function, tasks, self._num_workers, on_error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def make_engine(
    name: str, method: str | None, num_workers: int | None, num_gpus: int | None, ray_address: str | None
) -> Engine:
    """The processes to pack in: of this machine ("local"), or of a Ray cluster ("ray", see `flow.ray_engine`).

    method: of flow, None if none is computed. num_workers, num_gpus: as asked for, None for all that is useful.
    ray_address: of a cluster that is running; without it one is started on this machine.

    Raises ValueError for an unknown engine, an address that is of no use, and more GPUs than there are; ImportError
    if Ray is not installed.
    """
    if name == "ray":
        from flow.ray_engine import RayEngine

        return RayEngine(method, num_workers, num_gpus, ray_address)
    if name != "local":
        raise ValueError(f"engine={name!r}: expected one of {', '.join(ENGINES)}.")
    if ray_address is not None:
        raise ValueError(f"ray_address={ray_address!r} is for the engine ray. Leave it out, or add --engine ray.")
    return LocalEngine(method, num_workers, num_gpus)


def add_engine(parser: argparse._ActionsContainer) -> None:
    """--engine and --ray-address, of `make_engine`."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="whose processes do it: of this machine (default), or of a Ray cluster, docs/packing-on-ray.md",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of the Ray cluster, or auto for that of this machine (default: one is started here, and ended)",
    )


def prove(method: str, device: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`flow.extract.prove_method` in a process of its own. Raises ValueError, also if the process dies."""
    metadata = run_alone(partial(prove_method, method, device), parameters)
    if metadata is None:
        raise ValueError(
            f"{method} ends its process on {device!r} with {dict(parameters)}. Leave parameters as they are."
        )
    return metadata


def count_gpus(method: str | None, asked: int | None, visible: Callable[[], int] | None = None) -> int:
    """GPUs to use. visible: how many there are, by default on this machine.

    Raises ValueError if there are fewer than asked for, or the method can use none.
    """
    if asked and method not in GPU_METHODS:
        raise ValueError(f"gpus={asked}: {method} runs on the CPU; on a GPU run {', '.join(sorted(GPU_METHODS))}.")
    if asked == 0 or method not in GPU_METHODS:
        return 0
    found = _local_gpus() if visible is None else visible()
    if asked is not None and not 0 < asked <= found:
        seen = f"torch sees {found} here" if visible is None else f"the cluster has {found}"
        raise ValueError(f"gpus={asked}: {seen}. Ask for as many or fewer; 0 is the CPU.")
    return found if asked is None else asked


def _local_gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def count_workers(asked: int | None, num_gpus: int) -> int:
    """Processes to use: by default one per core, at most 8 a GPU and one at least. Raises ValueError if so few are
    asked for that a GPU would have none.
    """
    if asked is None:
        cores = default_num_workers()
        return max(num_gpus, min(cores, WORKERS_PER_GPU * num_gpus)) if num_gpus else cores
    if asked < num_gpus:
        raise ValueError(f"workers={asked} for gpus={num_gpus}: a process uses one GPU. Ask for fewer GPUs.")
    return asked
