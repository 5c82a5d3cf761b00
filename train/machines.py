"""Which machines and processes a run uses: the options, and what is wrong with them before anything starts."""

from __future__ import annotations

import argparse
import ipaddress
import re
import socket
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where a run computes. num_gpus, num_procs: per machine; num_gpus = 0 is the CPU, else a process has one GPU.

    The run goes on with any number of machines in [min_nodes, max_nodes]. Several meet at `rdzv`, host:port of one of
    them, under the name `rdzv_id`. node_rank None: they take ranks as they come, and one may leave and come again; else
    this machine's rank, in a run whose machines are all there from the beginning to the end.
    max_restarts: how often all processes are started anew when one has failed.
    """

    num_gpus: int = 0
    num_procs: int = 1
    min_nodes: int = 1
    max_nodes: int = 1
    node_rank: int | None = None
    rdzv: str = ""
    rdzv_id: str = "twostream"
    max_restarts: int = 0

    @property
    def world_sizes(self) -> list[int]:
        """Every number of processes that the run may have."""
        return [num_nodes * self.num_procs for num_nodes in range(self.min_nodes, self.max_nodes + 1)]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add --gpus, --procs, --max-restarts, --nodes, --node-rank, --rdzv and --rdzv-id."""
        parser.add_argument(
            "--gpus", type=int, default=0, metavar="N", help="GPUs of this machine to use; 0 (default): the CPU"
        )
        parser.add_argument(
            "--procs", type=int, metavar="N", help="processes on this machine (default: 1 per GPU, 1 on the CPU)"
        )
        parser.add_argument(
            "--max-restarts",
            type=int,
            default=0,
            metavar="N",
            help="times to go on from the last checkpoint when a process fails or is killed, or a machine is lost "
            "(default %(default)s)",
        )
        several = parser.add_argument_group("several machines")
        several.add_argument(
            "--nodes",
            metavar="N",
            help="machines; run the same command on each, with one run folder that all see; MIN:MAX goes on with any "
            "number in between (default 1)",
        )
        several.add_argument("--rdzv", default="", metavar="HOST:PORT", help="where they meet: a port of one of them")
        several.add_argument(
            "--node-rank",
            type=int,
            metavar="R",
            help="rank of this machine, 0 on that of --rdzv: a run that no machine may leave (default: as they come)",
        )
        several.add_argument(
            "--rdzv-id",
            default="twostream",
            metavar="NAME",
            help="of the job, the same on every machine; keeps apart what meets at one port (default %(default)s)",
        )

    @staticmethod
    def from_arguments(options: argparse.Namespace) -> Machines:
        """Raises ValueError if --nodes is neither a number nor two, or is missing where machines are to meet."""
        nodes = options.nodes or "1"
        if not options.nodes and (options.rdzv or options.node_rank is not None):
            # Each of the machines would train alone, in one run folder.
            raise ValueError("--rdzv and --node-rank are for several machines: say how many by --nodes N.")
        if not re.fullmatch(r"\d{1,6}(:\d{1,6})?", nodes, re.ASCII):
            raise ValueError(f"--nodes {nodes}: a number of machines, such as 4, or MIN:MAX, such as 2:4.")
        least, _, most = nodes.partition(":")
        return Machines(
            num_gpus=options.gpus,
            num_procs=options.procs if options.procs is not None else max(1, options.gpus),
            min_nodes=int(least),
            max_nodes=int(most or least),
            node_rank=options.node_rank,
            rdzv=options.rdzv,
            rdzv_id=options.rdzv_id,
            max_restarts=options.max_restarts,
        )

    def check(self, batch_size: int | None = None) -> None:
        """Raise ValueError if this machine lacks the GPUs, the machines cannot meet as asked, or the global batch does
        not divide among each number of processes that may come.
        """
        available = torch.cuda.device_count()
        if self.num_gpus > available:
            raise ValueError(
                f"--gpus {self.num_gpus}: this machine has {available} usable GPUs. Ask for at most {available}; "
                "0 trains on the CPU."
            )
        if self.num_gpus and self.num_procs != self.num_gpus:
            raise ValueError(f"--procs {self.num_procs} with --gpus {self.num_gpus}: a GPU has exactly one process.")
        if self.num_procs < 1:
            raise ValueError(f"--procs {self.num_procs} must be at least 1.")
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts {self.max_restarts} must be at least 0.")
        self._check_nodes()
        wrong = [number for number in self.world_sizes if batch_size is not None and batch_size % number]
        if wrong:
            raise ValueError(
                f"train.batch_size={batch_size} cannot be split evenly over {wrong[0]} processes; choose a multiple of "
                f"{' and of '.join(map(str, self.world_sizes))}."
            )

    def _check_nodes(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise ValueError(
                f"--nodes {self.min_nodes}:{self.max_nodes}: the least must be at least 1, the most no less than it."
            )
        if self.node_rank is not None:
            if self.min_nodes < self.max_nodes or self.max_restarts:
                raise ValueError(
                    "--node-rank is for a run whose machines stay: it goes with neither --nodes MIN:MAX nor "
                    "--max-restarts. Without it the machines take ranks as they come."
                )
            if not 0 <= self.node_rank < self.max_nodes:
                raise ValueError(
                    f"--node-rank {self.node_rank} with --nodes {self.max_nodes}: ranks go from 0, the machine of "
                    f"--rdzv, to {self.max_nodes - 1}."
                )
        if self.max_nodes == 1:  # a job of one machine, whose script names where it would meet others
            return
        if not self.rdzv:
            raise ValueError(f"--nodes {self.max_nodes} needs --rdzv HOST:PORT, the same on every machine.")
        split_address(self.rdzv)
        is_host = own_address(self.rdzv)[1]
        if self.node_rank == 0 and not is_host:
            raise ValueError(
                f"--node-rank 0, but {self.rdzv} is no address of this machine. Rank 0 is the machine of --rdzv."
            )


def split_address(rdzv: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6 address]:port". Raises ValueError if it is neither."""
    match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s]+)):(\d{1,5})", rdzv, re.ASCII)
    if not match or not 1 <= int(match[3]) <= 65535:
        raise ValueError(
            f"--rdzv {rdzv} must be HOST:PORT, such as node0:29500: one of the machines, and a port from 1 to 65535 "
            "that is free there."
        )
    return match[1] or match[2], int(match[3])


def own_address(rdzv: str) -> tuple[str | None, bool]:
    """The address by which the others reach this machine, None for its name; and whether it is the one of `rdzv`.

    It is that of the interface on the way to `rdzv`: a machine may have many, and its name may stand for one that no
    other machine sees. Raises ValueError if the host is unknown here, or there is no way to it.
    """
    host, port = split_address(rdzv)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"--rdzv {rdzv}: {host} cannot be reached from here ({error.strerror or error}). Give the name or address "
            "by which all machines know one of them."
        ) from error
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback:  # its own name, which stands elsewhere for another
        return None, True
    return own, own == address[0]
