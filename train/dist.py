"""Processes: the only module that knows torch.distributed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from train.interrupt import children_unaware, ending_at_once, obey, say_stopped
from train.machines import Machines, own_address, split_address
from train.meeting import ANSWER_S, PATIENCE_S, await_answer, await_listener, listen
from train.watchdog import Watchdog, margin_s

logger = logging.getLogger(__name__)

#: Time from a process's failure, which the others may share, to its end.
LAST_WORDS_S = 1.0


class ProcessFailedError(Exception):
    """One of several processes failed, more often than it may be restarted; it has logged why."""


@dataclass(frozen=True)
class World:
    """This process among all: rank in [0, world_size), the device it computes on, the CPU threads it may use.

    watchdog: ends the process when it waits too long; None does not.
    """

    rank: int
    world_size: int
    device: torch.device
    num_threads: int
    watchdog: Watchdog | None = None

    def at(self, what: str | None) -> None:
        """Note what the process waits for from now on, for the watchdog; None: nothing that has to end soon."""
        if self.watchdog:
            self.watchdog.note(what)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and speaks."""
        return self.rank == 0

    def wrap(self, net: nn.Module, *, bucket_mb: float = 25.0, gradient_compression: str = "none") -> nn.Module:
        """The net with gradients averaged over the processes; the net itself if there is one process.

        Gradients are sent in buckets, in the order in which the backward pass makes them, while it goes on.

        Args:
            bucket_mb: size of a bucket, in 2**20 bytes of float32. Small ones leave earlier, large ones send faster.
            gradient_compression: "none", or "bfloat16", which sends half the bytes: gradients are rounded to 8
                significant bits, summed so, and applied in float32.
        """
        if self.world_size == 1:
            return net
        model = DistributedDataParallel(
            net,
            device_ids=None if self.device.type == "cpu" else [self.device.index],
            broadcast_buffers=False,  # they are constants; sending them round before each pass would be for nothing
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,  # a gradient is its place in the bucket: one copy less, in memory and time
        )
        if gradient_compression == "bfloat16":
            # Wrapped, for torch refuses this hook by its name in a build without NCCL, though gloo sums bfloat16.
            model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        return model

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the processes, in place; the same in each."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self, what: str = "the other processes") -> None:
        """Wait until every process is here. what: the reason, for the watchdog."""
        self.at(what)
        if self.world_size > 1:
            dist.barrier()


def launch(machines: Machines, work: Callable[..., None], *args: Any, timeout_s: float | None = None) -> None:
    """Run `work(world, *args)` in every process: here if there is only one, else in children of the elastic launcher.

    `work` must be importable and `args` picklable. Children are used for one process too if it may be restarted.

    Args:
        timeout_s: longest wait of a process between two `world.at`, and a bit more for other processes; None: any.
    Raises what `work` raises, or ProcessFailedError. SIGINT and SIGTERM end all processes at once: SystemExit.
    """
    num_threads = max(1, len(os.sched_getaffinity(0)) // machines.num_procs)
    fixed = ("cuda" if machines.num_gpus else "cpu", num_threads, timeout_s, work, args)
    if machines.world_sizes == [1] and not machines.max_restarts:
        with ending_at_once():
            _in_this_process(*fixed)
        return
    # OpenMP libraries count their threads when a child starts, before it could call torch.set_num_threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    # What they warn of is what they do when told to stop, or when another machine is gone.
    for name in ("agent.server.api", "multiprocessing.api", "rendezvous.dynamic_rendezvous"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.ERROR)
    # A store in rank 0, new with each restart: in the launcher's own, the processes would meet addresses of the dead.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Children end at once when told to; the default of 30 s is for those that are still importing, or stopped.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    # Processes that were ended leave semaphores; what frees them would say so behind our last line.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    options = _options(machines)
    try:
        with children_unaware(_stop), _meeting_point(machines):
            elastic_launch(options, _in_child)(*fixed)
    except SignalException as error:
        say_stopped(error.sigval)
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        raise ProcessFailedError(
            f"process {number} of {' or '.join(map(str, machines.world_sizes))} FAILED with exit code "
            f"{failure.exitcode}; what it logged above says why. The same command goes on from the last checkpoint."
        ) from error
    except (RendezvousError, dist.DistError, TimeoutError) as error:
        why = str(error) if isinstance(error, TimeoutError) else type(error).__name__
        raise ProcessFailedError(
            f"the machines do not find each other, or no longer, at {options.rdzv_endpoint} ({why}). "
            "Is that machine up, and does each run the command? When all are up again, the same command on each goes "
            "on from the last checkpoint."
        ) from error


def _options(machines: Machines) -> LaunchConfig:
    """What the elastic launcher is told."""
    common: dict[str, Any] = {
        "min_nodes": machines.min_nodes,
        "max_nodes": machines.max_nodes,
        "nproc_per_node": machines.num_procs,
        "run_id": machines.rdzv_id,
        "max_restarts": machines.max_restarts,
    }
    if machines.max_nodes == 1:
        return LaunchConfig(rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", **common)
    own, _ = own_address(machines.rdzv)
    # Who hosts the meeting: see _meeting_point; of fixed ranks it is rank 0.
    static = machines.node_rank is not None
    return LaunchConfig(
        rdzv_backend="static" if static else "c10d",
        rdzv_endpoint=machines.rdzv,
        rdzv_configs={"rank": machines.node_rank} if static else {"is_host": False},
        local_addr=own,
        **common,
    )


@contextmanager
def _meeting_point(machines: Machines) -> Iterator[None]:
    """The store in which the machines find each other, if it is this machine's and no other process of it has it.

    The launcher would guess by the machine's name whether it is its own, and be wrong about a second interface.
    Raises ValueError if the port is something else's, TimeoutError if nothing listens at it.
    """
    store = None
    if machines.max_nodes > 1:
        rdzv, static = machines.rdzv, machines.node_rank is not None
        host, port = split_address(rdzv)
        if machines.node_rank == 0 if static else own_address(rdzv)[1]:
            listener = listen(rdzv)
            if listener and static:
                listener.close()  # opened anew below
            elif listener:
                fd = listener.detach()
                store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
            elif static:
                raise ValueError(f"--rdzv {rdzv}: port {port} is taken on this machine. Choose one that is free.")
            if listener:
                logger.warning("the machines meet here, at %s", rdzv)
            else:
                logger.warning("port %d is taken: expecting another launcher of this run there", port)
        if not store and machines.node_rank != 0:
            with ending_at_once():  # no child is there yet
                await_listener(rdzv)
                timeout = timedelta(seconds=ANSWER_S)
                await_answer(rdzv, lambda: dist.TCPStore(host, port, wait_for_workers=False, timeout=timeout))
        if machines.node_rank is not None:
            with ending_at_once():
                store = _met(host, port, machines, machines.node_rank)
    yield
    del store  # it ends with its last reference


def _met(host: str, port: int, machines: Machines, rank: int) -> dist.TCPStore:
    """The store of fixed ranks, once each has come: torch's launcher, which shares it, would hear no signal until then.

    Raises DistError if they do not come within PATIENCE_S.
    """
    logger.warning("waiting up to %.0f s for all %d machines", PATIENCE_S, machines.max_nodes)
    timeout = timedelta(seconds=PATIENCE_S)
    # Torch would count connections, also those of launchers that were stopped and have come again.
    store = dist.TCPStore(host, port, machines.max_nodes, rank == 0, timeout, wait_for_workers=False, multi_tenant=True)
    came = [f"two-stream/{machines.rdzv_id}/{number}" for number in range(machines.max_nodes)]
    store.set(came[rank], "")
    store.wait(came, timeout)
    return store


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """What the elastic launcher does on a signal, for the moments before and after it."""
    raise SignalException(f"signal {number}", signal.Signals(number))


def _in_child(*fixed: Any) -> None:
    """`_in_this_process` in a child of the elastic launcher."""
    obey()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # from now on its death would end us
        os._exit(1)
    num_nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if os.environ["RANK"] == "0" and num_nodes != "1":
        logger.warning("%s processes on %s machines", os.environ["WORLD_SIZE"], num_nodes)
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if restart and os.environ["RANK"] == "0":
        logger.warning("restart %d: going on from the last checkpoint", restart)
    try:
        _in_this_process(*fixed)
    except BaseException as error:
        # The others will fail too, for want of this process, and the launcher may report one of them instead.
        logger.exception("process %s of %s failed", os.environ["RANK"], os.environ["WORLD_SIZE"])
        # The launcher ends the others when this one has ended: first they may say what they know, or have waited for.
        time.sleep(LAST_WORDS_S + (margin_s(fixed[2]) if fixed[2] and isinstance(error, TimeoutError) else 0))
        os._exit(1)  # a thread that hangs would keep the process from ending


def _in_this_process(
    device_type: str, num_threads: int, timeout_s: float | None, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Join the processes that the elastic launcher describes in the environment, if it does, and work."""
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(num_threads)
    watchdog = Watchdog(f"process {rank} of {world_size}", timeout_s) if timeout_s else None
    world = World(rank, world_size, device, num_threads, watchdog)
    try:
        with _joined(world, timeout_s):
            work(world, *args)
    except BaseException as error:
        if watchdog:
            error.add_note(f"process {rank} of {world_size} waited for {watchdog.noted}")
        raise
    finally:
        if watchdog:
            watchdog.close()


@contextmanager
def _joined(world: World, timeout_s: float | None) -> Iterator[None]:
    """The process group. Its own time-out is longer than a watchdog's, which can say more."""
    if world.world_size == 1:
        yield
        return
    world.at("the other processes to start")
    try:
        dist.init_process_group(
            "nccl" if world.device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=2 * timeout_s + 60) if timeout_s else None,
        )
        if world.device.type == "cuda":  # NCCL connects at the first collective, gloo has connected
            dist.barrier(device_ids=[world.device.index])
    except RuntimeError as error:
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            error.add_note(
                "If the machines cannot reach each other at the address above: GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME "
                "on GPUs) names the interface to use, such as eth0."
            )
        raise
    yield
    dist.destroy_process_group()
