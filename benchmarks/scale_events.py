"""What both simulations of scale_model.py are built of: a link that its transfers share."""

import heapq
import math
from itertools import count
from typing import Any

import simpy


class Link:
    """A network card, store or file system of so many bytes/s, shared alike by all transfers under way.

    flow_bytes_per_s: what one transfer gets at most, such as a connection to a store. Transfers finish in the order of
    what is left of them, whose clock is the bytes that each transfer under way has been given since the beginning:

        rate of each = min(flow_bytes_per_s, bytes_per_s / transfers under way)
    """

    def __init__(self, env: simpy.Environment, bytes_per_s: float, flow_bytes_per_s: float = math.inf):
        self._env, self._capacity, self._most = env, bytes_per_s, flow_bytes_per_s
        self._flows: list[tuple[float, int, simpy.Event]] = []  # (given when it ends, number, its end)
        self._given, self._at, self._turn = 0.0, env.now, 0
        self._numbers = count()
        #: Bytes carried; transfers under way, summed over time.
        self.num_bytes, self.flow_seconds = 0.0, 0.0

    def send(self, num_bytes: float) -> simpy.Event:
        """An event at the end of the transfer."""
        self._advance()
        done = self._env.event()
        if math.isinf(min(self._most, self._capacity)) or not num_bytes:
            self.num_bytes += num_bytes
            return done.succeed()
        heapq.heappush(self._flows, (self._given + num_bytes, next(self._numbers), done))
        self.num_bytes += num_bytes
        self._plan()
        return done

    def _rate(self) -> float:
        return min(self._most, self._capacity / len(self._flows))

    def _advance(self) -> None:
        elapsed, self._at = self._env.now - self._at, self._env.now
        if self._flows:
            self._given += elapsed * self._rate()
            self.flow_seconds += elapsed * len(self._flows)

    def _plan(self) -> None:
        """Wake at the end of the next transfer; what was planned before is void."""
        self._turn += 1
        if self._flows:
            left = max(0.0, self._flows[0][0] - self._given)
            self._env.timeout(left / self._rate(), self._turn).callbacks.append(self._wake)

    def _wake(self, timeout: Any) -> None:
        if timeout.value != self._turn:
            return
        self._advance()
        self._given = max(self._given, self._flows[0][0])  # a rounding error would wake it again at once
        while self._flows and self._flows[0][0] <= self._given:
            heapq.heappop(self._flows)[2].succeed()
        self._plan()
