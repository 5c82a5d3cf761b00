"""A pack's processes on a Ray cluster: one video is one task, on whichever node has a core free for it.

    the command                                        nodes, which come and go
    tasks  ->  twice as many as the cluster's cores  ->  write the fragment into the pack's folder, if they see it
    shards <-  reports, and fragments of the others  <-  or send its bytes

A fragment depends on its task only, so the shards are those of the local engine, whatever nodes do. What could make it
differ is looked at with every task: the node's versions, a field that it computes, and the sizes of what it reads.

Ray's own retries of tasks are turned off: after a lack of memory they have no end, and a death of the node counts as
one of the task. A task whose process dies is tried again among the others, and, if that dies too, once all else is
done, alone, in a process in which nothing was done before. Only if that dies as well is it lost. One whose node dies is
tried again until it has outlived a handful of nodes.
"""

import logging
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from flow import ray_node
from flow.devices import WORKERS_PER_GPU, count_gpus, prove
from flow.fragment import fragment_file
from flow.pool import default_num_workers
from flow.resume import PackTask

logger = logging.getLogger(__name__)

Task = TypeVar("Task", bound=PackTask)
Result = TypeVar("Result")

#: Longest wait until a signal is heard, and until nodes that came are given work.
_POLL_S = 0.5
_COUNT_NODES_S = 5.0
#: Time without a result after which it is said that there may be no room for tasks.
_SILENCE_S = 60.0
#: Nodes that may die under a task before it is suspected, and again when it runs alone.
_NODE_DEATHS = 5
#: Wait after one: for so long the cluster may still send tasks to the dead node.
_NODE_DEATH_S = 15.0


class RayEngine:
    """As `flow.devices.Engine`. The cluster is joined, or started, at the first work.

    method: of flow, None if none is computed. num_workers: tasks at a time, by default as many as the cluster's cores.
    num_gpus: GPUs of the cluster to compute on, by default all if the method can use one; a task takes an eighth of
    one. address: of a cluster with a node on this machine; without it one is started here, of this machine alone.

    Raises ImportError without Ray, ValueError for what the cluster cannot do.
    """

    def __init__(self, method: str | None, num_workers: int | None, num_gpus: int | None, address: str | None) -> None:
        self._ray = _import_ray()
        self._check_free()
        if address is not None and "://" in address:
            raise ValueError(
                f"ray_address={address!r}: expected HOST:PORT, or auto. Run the command on a node of the cluster, not "
                "by way of Ray's client."
            )
        self._method, self._num_workers, self._address = method, num_workers, address
        self._num_cpus, self._counted_s = 0.0, 0.0
        self._joined = False
        self._failed_on = ""  # id of the node where a task raised a RuntimeError last
        self._silence_s, self._silence_told = 0.0, False
        self._thread = ThreadPoolExecutor(1)
        try:
            self.num_gpus = count_gpus(method, num_gpus, self._count_gpus)
        except BaseException:
            self._leave()
            raise

    # --- the cluster ---------------------------------------------------------------------------------------------

    def _check_free(self) -> None:
        if self._ray.is_initialized():
            raise ValueError(
                "Ray is in use in this process, and a pack begins and ends it. Call ray.shutdown() first, or pack in "
                "a process of its own."
            )

    def _join(self) -> None:
        if self._joined:
            return
        self._check_free()
        # Of a cluster that is started here; that of another is its owner's affair.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        own: dict[str, Any] = {"num_cpus": self._num_workers or default_num_workers(), "include_dashboard": False}
        self._joined = True
        self._failed_on = ""
        try:
            init = partial(self._ray.init, log_to_driver=False, logging_level="CRITICAL")
            self._ask(init, address=self._address or "local", **({} if self._address else own))
        except (ConnectionError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            self._leave()
            raise ValueError(
                f"ray_address={self._address!r}: no cluster can be joined: {_line(error)} Start one by ray "
                "start, with a node on this machine; if it has a token, give the command the same RAY_AUTH_TOKEN, and "
                "RAY_AUTH_MODE=token."
            ) from None
        except BaseException:
            self._leave()
            raise
        _restore_signals()
        # max_calls: a process goes on to the next task, also one that has opened a GPU.
        self._plain = self._ray.remote(num_cpus=1, max_retries=0, max_calls=0)(ray_node.work)
        self._proof = self._ray.remote(num_cpus=1, max_retries=_NODE_DEATHS)(prove)

    def _leave(self) -> None:
        if self._joined:
            self._joined = False
            self._ask(self._ray.shutdown)

    def _ask(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call Ray in a thread: in the main one it takes signals for itself, and forgets which they were."""
        return self._thread.submit(function, *arguments, **options).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _count_gpus(self) -> int:
        self._join()
        return int(self._ray.cluster_resources().get("GPU", 0))

    def _num_at_once(self) -> int:
        """Tasks to have submitted: twice what runs, so that no core waits for the next; with a cap exactly that."""
        if not self._num_cpus or time.monotonic() - self._counted_s > _COUNT_NODES_S:
            self._num_cpus = self._ray.cluster_resources().get("CPU", 0)
            self._counted_s = time.monotonic()
        most = [2 * max(1, int(self._num_cpus))]
        if self.num_gpus:
            most.append(WORKERS_PER_GPU * self.num_gpus)
        return min(*most, self._num_workers or most[0])

    def _options(self) -> dict[str, Any]:
        return {"num_gpus": 1 / WORKERS_PER_GPU} if self.num_gpus else {}

    # --- work ----------------------------------------------------------------------------------------------------

    def prove(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of the method, once it has computed a field on a node: on that where a task has failed, if one has.
        Raises ValueError."""
        self._join()
        try:
            options = self._options()
            if self._failed_on:  # another node would prove nothing of this one
                strategies = self._ray.util.scheduling_strategies
                options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(self._failed_on, soft=False)
            ref = self._proof.options(**options).remote(self._method, self._device, dict(parameters))
            # Waited for in turns: a task that is only asked for would keep the thread from all else.
            while not self._ready({ref: None}):
                pass
            metadata: dict[str, Any] = self._get(ref)
            return metadata
        except BaseException:
            self._leave()
            raise

    @property
    def _device(self) -> str:
        return "cuda:0" if self.num_gpus else "cpu"  # Ray shows a task its own GPU only

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        on_error: Callable[[Task, RuntimeError], Result] | None = None,
    ) -> Generator[tuple[Task, Result | None], None, None]:
        """As `flow.pool.run_pool`. Raises ValueError if a node would not yield the same bytes, or reads other files."""
        self._join()
        identity = dict(ray_node.node_identity(self._method, compare_field=not self.num_gpus))
        start = partial(self._start, function, _Token(), on_error is not None)
        todo = iter(tasks)
        running: dict[Any, _Attempt] = {}
        waiting: list[_Attempt] = []
        suspects: list[Task] = []
        try:
            while True:
                again = [attempt for attempt in waiting if attempt.due_s <= time.monotonic()]
                waiting = [attempt for attempt in waiting if attempt not in again]
                fresh = islice(todo, max(0, self._num_at_once() - len(running) - len(again)))
                for attempt in chain(again, map(_Attempt, fresh)):
                    running[start(attempt.task)] = attempt
                if not running and not waiting:
                    break
                for ref in self._ready(running):
                    attempt = running.pop(ref)
                    outcome = self._outcome(ref, attempt)
                    if outcome is not None:
                        yield attempt.task, self._accept(attempt.task, outcome, identity)
                    elif attempt.num_crashes < 2 and attempt.num_node_deaths < _NODE_DEATHS:
                        waiting.append(attempt)
                    else:
                        suspects.append(attempt.task)
            for task in suspects:
                yield task, self._run_alone(partial(start, alone=True), task, identity, on_error)
        except BaseException:
            # This ends the tasks too. To cancel them first, by force, makes Ray 2.60 abort the command now and then.
            self._leave()
            raise

    def _start(
        self, function: Callable[[Task], Any], token: "_Token", fails: bool, task: Task, alone: bool = False
    ) -> Any:
        place = os.getcwd(), token.in_folder(task.fragment.parent)
        job = ray_node.Job(function, *place, self._method, self.num_gpus > 0, fails, alone)
        return self._plain.options(**self._options()).remote(job, task)

    def _ready(self, running: Mapping[Any, Any]) -> list[Any]:
        """All that is done, once something is; perhaps nothing, after a while."""
        if not running:
            time.sleep(_POLL_S)
            return []
        asked_s = time.monotonic()
        done, _ = self._ask(self._ray.wait, list(running), timeout=_POLL_S)
        self._note_silence(0.0 if done else time.monotonic() - asked_s)
        if done:
            done, _ = self._ask(self._ray.wait, list(running), num_returns=len(running), timeout=0)
        return list(done)

    def _note_silence(self, waited_s: float) -> None:
        """Say once that nothing is done for long: Ray waits for a free core or GPU without a word, and without end."""
        self._silence_s = self._silence_s + waited_s if waited_s else 0.0
        if self._silence_s >= _SILENCE_S and not self._silence_told:
            self._silence_told = True
            there, free = self._ray.cluster_resources(), self._ray.available_resources()
            logger.warning(
                "%.0f s without a result; free are %g of the cluster's %g cores, and %g of its %g GPUs. A task that "
                "finds none waits: `ray status` tells what runs",
                self._silence_s,
                *(table.get(kind, 0) for kind in ("CPU", "GPU") for table in (free, there)),
            )

    def _outcome(self, ref: Any, attempt: "_Attempt") -> ray_node.Outcome | None:
        """What a task returned; None, which is noted, if its process or node died."""
        exceptions = self._ray.exceptions
        crashes = (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError)
        deaths = (exceptions.NodeDiedError, exceptions.ObjectLostError)
        try:
            outcome: ray_node.Outcome = self._get(ref, crashes + deaths)
        except crashes:
            attempt.num_crashes += 1
        except deaths:
            attempt.num_node_deaths += 1
            attempt.due_s = time.monotonic() + _NODE_DEATH_S
        else:
            return outcome
        return None

    def _get(self, ref: Any, dealt_with: tuple[type[Exception], ...] = ()) -> Any:
        """The result of a task that is done. Raises what it raised; ValueError for errors of Ray's own, but these."""
        try:
            return self._ask(self._ray.get, ref)
        except dealt_with:
            raise
        except self._ray.exceptions.RayTaskError as error:
            raise self._task_error(error) from None
        except self._ray.exceptions.RayError as error:
            raise ValueError(_node_failure(error, None)) from None

    def _task_error(self, error: Any) -> Exception:
        """What to raise for an error that a task raised, or Ray in its place."""
        cause = error.cause
        if isinstance(cause, OSError) and cause.strerror:
            return OSError(cause.errno, f"{cause.strerror} on node {error.ip}", cause.filename)
        own = isinstance(cause, self._ray.exceptions.RayError)
        if own or isinstance(cause, ImportError) or str(cause).startswith(_NO_FUNCTION):
            return ValueError(_node_failure(cause, error.ip))
        found: Exception = cause or error
        return found

    def _accept(self, task: Task, outcome: ray_node.Outcome, identity: dict[str, str]) -> Any:
        """The result, once it is sure that it is what it would be here; the fragment is in its place then."""
        if "GPU" in outcome.identity:  # this machine need not have one: that of the first task counts
            identity.setdefault("GPU", outcome.identity["GPU"])
        if outcome.identity != identity:
            keys = sorted(
                key for key in {*identity, *outcome.identity} if identity.get(key) != outcome.identity.get(key)
            )
            differing = "; ".join(f"{key} {outcome.identity.get(key)}, and not {identity.get(key)}" for key in keys)
            raise ValueError(
                f"Node {outcome.node} would pack other bytes: {differing}. Install the same versions on every node, of "
                "machines of one kind; the same command goes on."
            )
        for path, there, here in zip(task.inputs, outcome.sizes, ray_node.sizes(task), strict=True):
            if there != here:
                what = "does not see" if there is None else f"sees {there:,} bytes, and not {here:,}, in"
                raise ValueError(
                    f"Node {outcome.node} {what} {os.path.abspath(path)}. Every node needs the same files under the "
                    "same path: mount the file system there; the same command goes on."
                )
        if outcome.content is not None:
            with fragment_file(task.fragment) as file:
                file.write(outcome.content.data)
        elif outcome.num_bytes is not None and ray_node.size(task.fragment) != outcome.num_bytes:
            raise OSError(
                f"{task.fragment} has {ray_node.size(task.fragment)} bytes, and not the {outcome.num_bytes:,} that "
                f"node {outcome.node} wrote. Is the file system the same on both? The same command goes on."
            )
        return outcome.result

    def _run_alone(
        self,
        start: Callable[[Task], Any],
        task: Task,
        identity: dict[str, str],
        on_error: Callable[[Task, RuntimeError], Result] | None,
    ) -> Result | None:
        attempt = _Attempt(task)
        while not attempt.num_crashes and attempt.num_node_deaths < _NODE_DEATHS:
            if attempt.due_s > time.monotonic():
                time.sleep(_POLL_S)
                continue
            ref = start(task)
            while not self._ready({ref: None}):
                pass
            outcome = self._outcome(ref, attempt)
            if outcome is not None and outcome.error is not None and on_error is not None:
                self._failed_on = outcome.node_id
                return on_error(task, outcome.error)
            if outcome is not None:
                result: Result | None = self._accept(task, outcome, identity)
                return result
        return None


@dataclass(eq=False)
class _Attempt:
    """A task under way, what it has survived, and when it may start again, on the monotonic clock."""

    task: Any
    num_crashes: int = 0
    num_node_deaths: int = 0
    due_s: float = 0.0


class _Token:
    """A file in the folders of fragments that tells a node whether it sees them; not their path, which may be another
    folder there."""

    def __init__(self) -> None:
        self._text = secrets.token_hex(16)
        self._folders: set[Path] = set()

    def in_folder(self, folder: Path) -> str:
        if folder not in self._folders:
            (folder / ray_node.TOKEN).write_text(self._text)
            self._folders.add(folder)
        return self._text


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise ImportError("The engine ray needs Ray: pip install 'two-stream[ray]'.") from None
    module: ModuleType = ray
    return module


def _restore_signals() -> None:
    """Have this process's handlers called again: Ray puts its own in their place, of which Python knows nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def _line(error: BaseException) -> str:
    """The first line of an error, which Ray's have many of, as a sentence."""
    first = (str(error).strip().splitlines() or [repr(error)])[0]
    return first if first.endswith(".") else f"{first}."


#: How Ray's RuntimeError begins for a function whose module a node lacks.
_NO_FUNCTION = "The remote function failed to import"


def _node_failure(error: Exception, ip: str | None) -> str:
    """What to say of an error that is no task's: what came, on which node if that is known, and what to do."""
    node = f"node {ip}" if ip else "a node"
    if missing := re.search(r"No module named '[^']*'", str(error)):
        return f"Ray, on {node}: {missing[0]}. Install two-stream on every node."
    if isinstance(error, ImportError) or str(error).startswith(_NO_FUNCTION):
        return f"Ray, on {node}: {_line(error)} Install two-stream on every node."
    return f"Ray, on {node}: {type(error).__name__}: {_line(error)} See `ray status`; the same command goes on."
