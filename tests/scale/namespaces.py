"""Machines in the small: network namespaces of Linux, joined by a cable, each with one core and one launcher."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
#: Longer than anything takes on a busy machine.
GUARD_S = 240


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not():
    """Why there can be no namespaces here; None if there can."""
    try:
        with Network():
            return None
    except FileNotFoundError:
        return "needs iproute2 (the program ip)"
    except subprocess.CalledProcessError as error:
        return f"needs the right to make network namespaces: {error.stderr.strip()}"


@dataclass
class Machine:
    """A namespace, the end of the cable in it, and the core that its processes have."""

    name: str
    cable: str
    address: str
    core: int

    def python(self, output, *words):
        """Start Python in it; what it prints goes to the file `output`."""
        # The name of this machine stands for an address that none of them has.
        environment = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": self.cable}
        return self.start(output, sys.executable, *words, **environment)

    def start(self, output, *words, **environment):
        """Start a program in it, from the repository's folder."""
        with open(output, "wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, "taskset", "-c", str(self.core), *words],
                env=os.environ | environment,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self):
        """SIGKILL to every process."""
        found = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True).stdout
        for pid in found.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def unplug(self):
        ip("-n", self.name, "link", "set", self.cable, "down")

    def plug_in(self):
        ip("-n", self.name, "link", "set", self.cable, "up")


class Network:
    """Two machines, while it is entered; nothing is left of them afterwards, nor of what runs in them."""

    def __init__(self):
        own = f"ts{os.getpid()}"
        cores = sorted(os.sched_getaffinity(0))
        self.machines = [
            Machine(f"{own}{letter}", f"{own}{letter}", f"10.77.0.{number + 1}", cores[number % len(cores)])
            for number, letter in enumerate("ab")
        ]

    def __enter__(self):
        first, second = self.machines
        try:
            for machine in self.machines:
                ip("netns", "add", machine.name)
            ends = [first.cable, "netns", first.name, "type", "veth", "peer", second.cable, "netns", second.name]
            ip("link", "add", *ends)
            for machine in self.machines:
                ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.cable)
                ip("-n", machine.name, "link", "set", "lo", "up")
                machine.plug_in()
        except BaseException:
            self.__exit__()
            raise
        return self.machines

    def __exit__(self, *error):
        for machine in self.machines:
            with suppress(subprocess.CalledProcessError, FileNotFoundError):
                machine.kill()
                ip("netns", "del", machine.name)


def wait_until(happens, *processes):
    """Wait for it. Raises AssertionError if it does not happen, or a process ends before."""
    deadline = time.monotonic() + GUARD_S
    while not happens():
        assert time.monotonic() < deadline, "it never happens"
        assert all(process.poll() is None for process in processes), "a process has ended"
        time.sleep(0.05)
