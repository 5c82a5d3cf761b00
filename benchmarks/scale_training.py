"""Training input on many nodes, as discrete events: a step waits for the slowest node's batch, then for the gradients.

    loader    of a node: one batch after the other, each at a pace drawn from measured ones, up to QUEUED ahead; before
              the first step that may draw from a new shard it waits for the shard
    fetcher   of a node: brings its shards, a few at a time, some steps before they are needed, and hashes them
    step      begins when all nodes have their batch; takes what `scaling_model.predict` says of n devices

A new shard enters the pool every `exchange_steps` steps; `fetches` nodes of all need each. The pool is full when the
simulation begins. Fetches share the store, but not the node's card with the gradients.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from scale_events import Link
from scaling_model import Parts, predict

#: Batches that a loader has ready at most.
QUEUED = 2
#: Share of the steps that are left out: queues fill.
WARM_UP = 0.2

Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How shards come; bytes/s and seconds. An exchange_steps of 0: all of them are there.

    fetches: nodes that need a shard, on average. ahead_steps: how long before it is needed a fetch begins, at the
    earliest. at_a_time: fetches of one node. hash_bytes_per_s: of checking what came.
    """

    exchange_steps: int = 0
    shard_bytes: float = 0.0
    fetches: float = 1.0
    ahead_steps: int = 50
    at_a_time: int = 4
    store_bytes_per_s: float = math.inf
    flow_bytes_per_s: float = math.inf
    latency_s: float = 0.0
    hash_bytes_per_s: float = math.inf


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
        self.store = Link(env, shards.store_bytes_per_s, shards.flow_bytes_per_s)
        self._queues = [simpy.Store(env, QUEUED) for _ in range(training.nodes)]
        #: Of every node: shard -> its arrival.
        self._arrivals: list[dict[int, simpy.Event]] = [{} for _ in range(training.nodes)]
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
        every = training.shards.exchange_steps
        for step in range(self._steps):
            if every and step % every == 0 and (arrival := self._arrivals[node].get(step // every)):
                start = self._env.now
                yield arrival
                self.shard_wait_s += self._env.now - start
            yield self._env.timeout(usual_s * self._rng.choice(training.pace))
            yield self._queues[node].put(step)

    def _plan_fetches(self) -> None:
        """Which nodes fetch which shard: neighbours on a ring, since slices of a batch follow the pool's order."""
        shards, nodes = self._training.shards, self._training.nodes
        first = math.ceil(shards.ahead_steps / shards.exchange_steps)  # what is needed sooner is in the pool
        for number in range(first, math.ceil(self._steps / shards.exchange_steps)):
            whole = int(shards.fetches)
            many = min(nodes, whole + int(self._rng.random() < shards.fetches - whole))
            begun = self._begun[number * shards.exchange_steps - shards.ahead_steps]
            for k in range(many):
                node = (number + k) % nodes
                self._arrivals[node][number] = self._env.process(self._fetch(node, begun))

    def _fetch(self, node: int, begun: simpy.Event) -> Events:
        shards = self._training.shards
        yield begun
        with self._fetching[node].request() as turn:
            yield turn
            yield self._env.timeout(shards.latency_s)
            yield self.store.send(shards.shard_bytes)
            yield self._env.timeout(shards.shard_bytes / shards.hash_bytes_per_s)
