"""Extraction on many nodes, as discrete events: `flow.pool` and `flow.resume`, machines in the place of processes.

    driver   hands out videos, two for each slot, in the order of the shards; joins a shard as soon as its fragments are
             there, and hands out nothing meanwhile; uploads them beside that, one after the other
    slot     a core of a node: takes a video, works on every frame of it, sends the fragment
    node     fails at random: what its slots work on is handed out again, first of all; it is back after a while

Fragments go to the driver over its network card, or to a file system that all share, from which the driver reads them
and to which it writes.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from scale_events import Link

#: Shards that wait to be sent, with the one on its way: one joined beyond holds up the driver (`flow/publish.py`).
MAX_UNSENT = 3
#: Share of the videos at whose end the steady stretch begins, and ends.
STEADY = (0.2, 0.8)

Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Videos to extract.

    frames (num_videos,): of each, in the order of the shards. pace (n,): what a video's seconds a frame are drawn from,
    as multiples of s_per_frame.
    """

    frames: np.ndarray
    s_per_frame: float
    bytes_per_frame: float
    videos_per_shard: int
    pace: np.ndarray = field(default_factory=lambda: np.ones(1))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes and driver; bytes/s and seconds.

    receive_bytes_per_s: at which the driver takes and writes fragments that are sent to it, when it joins no shard.
    card_bytes_per_s: of a network card, each way. through: "driver" or "shared". shared_bytes_per_s: of the shared file
    system. connection_bytes_per_s: of one connection to the store, of which an upload uses `connections`. mean_up_s:
    between failures of a node.
    """

    nodes: int
    cores: int
    join_bytes_per_s: float
    receive_bytes_per_s: float = math.inf
    card_bytes_per_s: float = math.inf
    through: str = "driver"
    shared_bytes_per_s: float = math.inf
    connection_bytes_per_s: float = math.inf
    connections: int = 1
    latency_s: float = 0.0
    startup_s: float = 0.0
    mean_up_s: float = math.inf
    repair_s: float = 0.0


class Node:
    """A machine that fails, and its slots that are at work."""

    def __init__(self, env: simpy.Environment):
        self.up = env.event().succeed()
        self.working: set[simpy.Process] = set()


class Extraction:
    """One run of the simulation. `run` it once."""

    def __init__(self, work: Work, cluster: Cluster, seed: int = 0):
        self._work, self._cluster = work, cluster
        self._rng = np.random.default_rng(seed)
        self._env = env = simpy.Environment()
        pace = self._rng.choice(work.pace, len(work.frames)) if len(work.pace) > 1 else work.pace[0]
        self._seconds = work.frames * work.s_per_frame * pace
        self._num_bytes = work.frames * work.bytes_per_frame
        self._ready = simpy.PriorityStore(env)
        self._results = simpy.Store(env)
        self._inward_bytes_per_s = (
            cluster.card_bytes_per_s if cluster.through == "driver" else cluster.shared_bytes_per_s
        )
        most = math.inf if cluster.through == "driver" else cluster.card_bytes_per_s
        self._inward = Link(env, self._inward_bytes_per_s, most)
        connected = cluster.connections * cluster.connection_bytes_per_s
        self._outward = Link(env, cluster.card_bytes_per_s, connected)
        self._handed_out = self.num_retries = 0
        self._busy_s = self._driver_s = 0.0
        #: When the driver has dealt with each video, in that order.
        self._ends: list[float] = []
        #: When each video that was not lost was begun, and when it was done.
        self._worked: list[tuple[float, float]] = []
        self._uploads: list[simpy.Process] = []
        self._uploader = simpy.Resource(env)
        self._unsent = simpy.Resource(env, MAX_UNSENT)

    def run(self) -> dict[str, float]:
        """Seconds in all, and to the last shard that was joined; frames/s, and those of the steady stretch; how busy
        slots, driver and what carries the fragments are."""
        env, cluster = self._env, self._cluster
        for _ in range(cluster.nodes):
            node = Node(env)
            for _ in range(cluster.cores):
                env.process(self._slot(node))
            if math.isfinite(cluster.mean_up_s):
                env.process(self._fail(node))
        env.run(until=env.process(self._drive()))
        last_joined_s = env.now
        env.run(until=simpy.AllOf(env, self._uploads))
        slots = cluster.nodes * cluster.cores
        return {
            "seconds": env.now,
            "joined_s": last_joined_s,
            "steady_frames_per_s": self._steady_rate(),
            "frames_per_s": float(self._work.frames.sum() / env.now),
            "slots_busy": self._busy_s / (slots * last_joined_s),
            "driver_busy": self._driver_s / last_joined_s,
            "inward_busy": self._inward.num_bytes / (self._inward_bytes_per_s * last_joined_s),
            "retries": self.num_retries,
        }

    def _steady_rate(self) -> float:
        """Frames/s of the steady stretch, from the end of a burst to that of another: slots that began together, or
        that share a full link, end together. By the work that slots do in it, videos under way at either end included,
        so it is never more than all slots can do. It tells of the whole only with many more videos than are handed out
        at once."""
        ends = np.array(self._ends)
        begin, end = (ends[int(share * (len(ends) - 1))] for share in STEADY)
        slack = 0.005 * (end - begin)
        first, last = (int(np.searchsorted(ends, time + slack, "right")) - 1 for time in (begin, end))
        if ends[first] == ends[last]:  # one burst is all
            return float(self._work.frames.sum() / ends[-1])
        worked = np.diff(np.clip(self._worked, ends[first], ends[last])).sum()
        return float(worked / (ends[last] - ends[first]) * self._work.frames.sum() / self._seconds.sum())

    def _drive(self) -> Events:
        """The driver's loop."""
        env, work = self._env, self._work
        yield env.timeout(self._cluster.startup_s)
        left = np.bincount(np.arange(len(work.frames)) // work.videos_per_shard)
        shard_bytes = np.add.reduceat(self._num_bytes, np.arange(0, len(work.frames), work.videos_per_shard))
        for _ in range(2 * self._cluster.nodes * self._cluster.cores):
            self._hand_out()
        while len(self._ends) < len(work.frames):
            video = yield self._results.get()
            if self._cluster.through == "driver":
                yield from self._be_busy(self._num_bytes[video] / self._cluster.receive_bytes_per_s)
            shard = video // work.videos_per_shard
            left[shard] -= 1
            if not left[shard]:
                seconds = shard_bytes[shard] / self._cluster.join_bytes_per_s
                if self._cluster.through == "shared":  # read from there, and written there
                    seconds += 2 * shard_bytes[shard] / self._cluster.card_bytes_per_s
                yield from self._be_busy(seconds)
                turn = self._unsent.request()
                yield turn  # a shard that is joined waits here while others are not sent
                self._uploads.append(env.process(self._upload(shard_bytes[shard], turn)))
            self._ends.append(env.now)
            self._hand_out()

    def _be_busy(self, seconds: float) -> Events:
        self._driver_s += seconds
        yield self._env.timeout(seconds)

    def _hand_out(self) -> None:
        if self._handed_out < len(self._work.frames):
            self._ready.put(self._handed_out)
            self._handed_out += 1

    def _upload(self, num_bytes: float, unsent: simpy.resources.resource.Request) -> Events:
        with self._uploader.request() as turn:
            yield turn
            yield self._env.timeout(self._cluster.latency_s)
            if self._cluster.through == "driver":
                yield self._outward.send(num_bytes)
        self._unsent.release(unsent)

    def _slot(self, node: Node) -> Events:
        """A core of a node, to the end of the simulation."""
        me = self._env.active_process
        while True:
            yield node.up
            video = yield self._ready.get()
            if not node.up.triggered:
                self._ready.put(video)
                continue
            node.working.add(me)
            start = self._env.now
            try:
                yield self._env.timeout(self._seconds[video])
                self._worked.append((start, self._env.now))
                self._env.process(self._deliver(video))
            except simpy.Interrupt:
                self.num_retries += 1
                self._ready.put(video)
            finally:
                self._busy_s += self._env.now - start
                node.working.discard(me)

    def _deliver(self, video: int) -> Events:
        yield self._inward.send(self._num_bytes[video])
        self._results.put(video)

    def _fail(self, node: Node) -> Events:
        while True:
            yield self._env.timeout(self._rng.exponential(self._cluster.mean_up_s))
            node.up = self._env.event()
            for slot in list(node.working):
                slot.interrupt()
            yield self._env.timeout(self._cluster.repair_s)
            node.up.succeed()


def hours_for(total_frames: float, work: Work, cluster: Cluster, seed: int = 0) -> dict[str, float]:
    """What `Extraction.run` finds, and "hours" for so many frames, of which `work` is a stretch.

    The stretch has the beginning and the end of the whole, in which slots are idle, once, and a steady part that the
    whole has more of.
    """
    found = Extraction(work, cluster, seed).run()
    more = total_frames - float(work.frames.sum())
    return {**found, "hours": (found["seconds"] + more / found["steady_frames_per_s"]) / 3600}
