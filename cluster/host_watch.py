"""Watches every host of a job: a small sampler on each, asked beside training, so that no step waits for it.

    HostWatch ─► HostSampler in a thread of the driver (its own host)
              └► HostSampler as a Ray actor without cores, one on each other host with actors of the job

What did not answer in the last round has no metric in the next row and is counted.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from actors.waits import within
from cluster.host_metrics import HostSampler, Whereabouts, host_label, whereabouts
from cluster.monitor import Monitor
from cluster.remote import Remote, WorkerLostError

_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Node:
    """A living host of the Ray cluster."""

    node_id: str
    name: str
    address: str


@dataclass(slots=True)
class _Place:
    """An actor of the job, and where it runs once it has said so."""

    remote: Remote
    asked: "asyncio.Task[Whereabouts]"


@dataclass(slots=True)
class HostWatch:
    """Samples all hosts every `every_s` seconds; `row` has what the last round found.

    `actors` gives the actors of the job as they are now: those that join or are replaced are seen. Nothing
    that goes wrong here ends the run: it is counted, and `on_event` hears of the first.
    """

    every_s: float
    actors: Callable[[], Iterable[Remote]]
    on_event: Callable[[str], None]
    nodes: Callable[[], list[Node]] = field(default_factory=lambda: ray_nodes)
    deadline_s: float = _DEADLINE_S
    _own_node: str = field(default_factory=lambda: whereabouts().node_id)
    _places: dict[int, _Place] = field(default_factory=dict)
    _local: HostSampler | None = None
    _samplers: dict[str, Remote] = field(default_factory=dict)
    _labels: dict[str, str] = field(default_factory=dict)
    _said: bool = False
    _row: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """Metrics of the last round, for a row of a learner step; empty before the first."""
        return dict(self._row)

    async def run(self) -> None:
        """Consumes: nothing. Waits for: time, then every host, at most `deadline_s`. Ends when cancelled."""
        try:
            while True:
                try:
                    await self.round()
                except Exception as error:  # noqa: BLE001 - said and counted; the run goes on unwatched
                    self._row = {"monitor/hosts_silent": float(max(1, len(self._labels)))}
                    self._say("the hosts", error)
                await asyncio.sleep(self.every_s)
        finally:
            self.close()

    def close(self) -> None:
        """End the samplers on other hosts and ask nothing more."""
        for place in self._places.values():
            place.asked.cancel()
        for sampler in self._samplers.values():
            sampler.kill()
        self._places, self._samplers = {}, {}

    async def round(self) -> None:
        """Look at every host once, side by side."""
        nodes = {node.node_id: node for node in await asyncio.to_thread(self.nodes)}
        self._labels = labels_of(nodes.values()) | self._labels  # a label once given stays
        by_node, silent = self._by_node()
        by_node.setdefault(self._own_node, {})
        for gone in self._samplers.keys() - nodes.keys():
            self._samplers.pop(gone).kill()
        known = [node_id for node_id in by_node if node_id in nodes]
        answers = await asyncio.gather(
            *(self._ask(nodes[node_id], self._labels[node_id], by_node[node_id]) for node_id in known)
        )
        found: dict[str, float] = {}
        for answer in answers:
            if answer is None:
                silent += 1
            else:
                found |= answer
        self._row = found | {"monitor/hosts_silent": silent}

    def _by_node(self) -> tuple[dict[str, dict[str, int]], int]:
        """Process ids of the actors by node and name, and how many have not said yet where they are."""
        now = {id(remote): remote for remote in self.actors()}
        for gone in self._places.keys() - now.keys():
            self._places.pop(gone).asked.cancel()
        silent = 0
        by_node: dict[str, dict[str, int]] = {}
        for key, remote in now.items():
            place = self._places.get(key)
            if place is None:
                # No deadline: a learner says so only after its step, and nothing waits for it.
                place = self._places[key] = _Place(remote, asyncio.ensure_future(_locate(remote)))
            if not place.asked.done():
                silent += 1
            elif place.asked.cancelled() or place.asked.exception() is not None:
                silent += 1  # it died; whoever needs it says so
            else:
                where = place.asked.result()
                by_node.setdefault(where.node_id, {})[remote.name] = where.pid
        return by_node, silent

    async def _ask(self, node: Node, label: str, pids: dict[str, int]) -> dict[str, float] | None:
        """One host's metrics; None if it does not answer in time."""
        try:
            if node.node_id == self._own_node:
                if self._local is None:
                    self._local = HostSampler(label)
                sampling = asyncio.to_thread(self._local.sample, pids)
                return await within(sampling, self.deadline_s, label, "a sample of its load")
            sampler = self._samplers.get(node.node_id)
            if sampler is None:
                sampler = self._samplers[node.node_id] = _start_sampler(node, label)
            answer: dict[str, float] = await sampler.call("sample", pids, seconds=self.deadline_s)
            return answer
        except WorkerLostError as error:
            self._samplers.pop(node.node_id, None)  # a new one next time
            self._say(label, error)
        except Exception as error:  # noqa: BLE001 - said and counted; other hosts answer all the same
            self._say(label, error)
        return None

    def _say(self, whom: str, error: Exception) -> None:
        if not self._said:
            self._said = True
            self.on_event(
                f"warning: the load of {whom} cannot be measured ({type(error).__name__}: {error}); its "
                "metrics are left out, and further failures are only counted (monitor/hosts_silent)"
            )


def host_watches(
    every_s: float, actors: Callable[[], Iterable[Remote]], monitor: Monitor
) -> list[Coroutine[Any, Any, None]]:
    """The service that puts the hosts' load into the monitor's rows; none where `every_s` is 0."""
    if not every_s:
        return []
    watch = HostWatch(every_s, actors, monitor.event)
    monitor.watched(watch.row)
    return [watch.run()]


def labels_of(nodes: Iterable[Node]) -> dict[str, str]:
    """A label for each node, by id: its name; where that is not unique its address, and then its id."""
    nodes = list(nodes)
    names = Counter(host_label(node.name) for node in nodes)
    addresses = Counter(host_label(node.name, node.address) for node in nodes)

    def label(node: Node) -> str:
        if names[host_label(node.name)] == 1:
            return host_label(node.name)
        longer = host_label(node.name, node.address)
        return longer if addresses[longer] == 1 else f"{longer}-{node.node_id[:6]}"

    return {node.node_id: label(node) for node in nodes}


def ray_nodes() -> list[Node]:
    """The living hosts of the cluster that this process is connected to."""
    import ray

    return [
        Node(node["NodeID"], node["NodeManagerHostname"] or socket.gethostname(), node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"]
    ]


async def _locate(remote: Remote) -> Whereabouts:
    where: Whereabouts = await _result(remote.handle.__ray_call__.remote(whereabouts))
    return where


async def _result(reference: Any) -> Any:
    return await reference


def _start_sampler(node: Node, label: str) -> Remote:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    handle = (
        ray.remote(HostSampler)
        .options(
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        )
        .remote(label)
    )
    return Remote(f"the sampler on {label}", handle)
