"""Training input on many nodes, as discrete events: a step waits for the slowest node's batch, then for the gradients.

    loader    of a node: one batch after the other, each at a pace drawn from measured ones, up to QUEUED ahead; before
              the first step that may draw from a new shard it waits for the shard
    fetcher   of a node: brings its shards, a few at a time, some steps before they are needed, and hashes them
    step      begins when all nodes have their batch; takes what `scaling_model.predict` says of n devices

A new shard enters the pool every `exchange_steps` steps, several a step below 1; `fetches` nodes of all need each. The
pool is full when the simulation begins. Fetches share the store, but not the node's card with the gradients.
"""

import math
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from scale_events import Link
from scaling_model import Parts, predict

#: Batches that a loader has ready at most.
QUEUED = 2
#: Steps that are left out, at least: a share of all, and so many times those that a fetch begins ahead. Queues fill,
#: and the first shards come while nobody waits.
WARM_UP, WARM_UP_AHEAD = 0.4, 5

Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How shards come; bytes/s and seconds. An exchange_steps of 0: all of them are there; of 0.25: four a step.

    pool_shards: of the ring. fetches: nodes that need a shard, on average. ahead_steps: how long before it is needed a
    fetch begins, at the earliest. at_a_time: fetches of one node, which share its network card alike.
    connection_bytes_per_s: of the connections of one fetch. hash_bytes_per_s: of checking what came.
    """

    exchange_steps: float = 0.0
    pool_shards: int = 256
    shard_bytes: float = 0.0
    fetches: float = 1.0
    ahead_steps: int = 50
    at_a_time: int = 4
    store_bytes_per_s: float = math.inf
    card_bytes_per_s: float = math.inf
    connection_bytes_per_s: float = math.inf
    latency_s: float = 0.0
    hash_bytes_per_s: float = math.inf

    @property
    def fetch_bytes_per_s(self) -> float:
        """What one fetch gets at most."""
        return min(self.connection_bytes_per_s, self.card_bytes_per_s / self.at_a_time)


@dataclass(frozen=True, kw_only=True)
class Training:
    """num_samples: of one node in a step. parts: of `scaling_model`, by that number. loader_samples_per_s: of a node.
    pace (n,): what a batch's time is drawn from, as multiples of the mean."""

    nodes: int
    num_samples: int
    parts: Parts
    loader_samples_per_s: float
    pace: np.ndarray = field(default_factory=lambda: np.ones(1))
    shards: Shards = Shards()


class Simulation:
    """One run. `run` it once."""

    def __init__(self, training: Training, steps: int, seed: int = 0):
        self._training, self._steps = training, steps
        self._rng = np.random.default_rng(seed)
        self._env = env = simpy.Environment()
        shards = training.shards
        self.store = Link(env, shards.store_bytes_per_s, shards.fetch_bytes_per_s)
        self._queues = [simpy.Store(env, QUEUED) for _ in range(training.nodes)]
        #: Of every node: step -> arrivals of the shards that it needs from then on.
        self._arrivals: list[dict[int, list[simpy.Event]]] = [defaultdict(list) for _ in range(training.nodes)]
        self._fetching = [simpy.Resource(env, shards.at_a_time) for _ in range(training.nodes)]
        self._begun = [env.event() for _ in range(steps + 1)]
        self.shard_wait_s = 0.0

    def run(self) -> dict[str, float]:
        """Samples/s of all nodes; seconds of a step, and of those how long it waits for data, and the gradients' part
        that nothing hides; the store's bytes/s."""
        env, training = self._env, self._training
        if training.shards.exchange_steps:
            self._plan_fetches()
        for node in range(training.nodes):
            env.process(self._load(node))
        waits: list[float] = []
        times: list[float] = []
        env.run(until=env.process(self._train(waits, times)))
        first = int(WARM_UP * self._steps)
        if training.shards.exchange_steps:
            first = max(first, WARM_UP_AHEAD * training.shards.ahead_steps)
        if first > self._steps - 2:
            raise ValueError(f"{self._steps} steps, of which the first {first} are left out: expected more.")
        step_s = (times[-1] - times[first]) / (self._steps - 1 - first)
        parts = predict(training.nodes, training.num_samples, training.parts)
        return {
            "samples_per_s": training.nodes * training.num_samples / step_s,
            "step_s": step_s,
            "data_wait_s": float(np.mean(waits[first + 1 :])),
            "communication_s": parts["communication_s"],
            "store_bytes_per_s": self.store.num_bytes / env.now,
        }

    def _train(self, waits: list[float], times: list[float]) -> Events:
        computed_s = predict(self._training.nodes, self._training.num_samples, self._training.parts)["step_s"]
        for step in range(self._steps):
            self._begun[step].succeed()
            start = self._env.now
            yield self._env.all_of([queue.get() for queue in self._queues])
            waits.append(self._env.now - start)
            yield self._env.timeout(computed_s)
            times.append(self._env.now)

    def _load(self, node: int) -> Events:
        training = self._training
        usual_s = training.num_samples / training.loader_samples_per_s
        times = usual_s * self._rng.choice(training.pace, self._steps)
        for step in range(self._steps):
            if arrivals := self._arrivals[node].pop(step, None):
                start = self._env.now
                yield self._env.all_of(arrivals)
                self.shard_wait_s += self._env.now - start
            yield self._env.timeout(times[step])
            yield self._queues[node].put(step)

    def _plan_fetches(self) -> None:
        """Which nodes fetch which shard: the one whose arc of the ring it enters, and now and then a neighbour.

        So shards that follow one another are of one node, until the next arc begins (`loaders.shard_pool`).
        """
        shards, nodes = self._training.shards, self._training.nodes
        first = math.ceil(shards.ahead_steps / shards.exchange_steps)  # what is needed sooner is in the pool
        for number in range(first, math.ceil(self._steps / shards.exchange_steps)):
            needed = int(number * shards.exchange_steps)
            many = min(nodes, int((number + 1) * shards.fetches) - int(number * shards.fetches))
            owner = number % shards.pool_shards * nodes // shards.pool_shards
            begun = self._begun[max(0, needed - shards.ahead_steps)]
            for k in range(many):
                node = (owner + k) % nodes
                self._arrivals[node][needed].append(self._env.process(self._fetch(node, begun)))

    def _fetch(self, node: int, begun: simpy.Event) -> Events:
        shards = self._training.shards
        yield begun
        with self._fetching[node].request() as turn:
            yield turn
            yield self._env.timeout(shards.latency_s)
            yield self.store.send(shards.shard_bytes)
            yield self._env.timeout(shards.shard_bytes / shards.hash_bytes_per_s)
