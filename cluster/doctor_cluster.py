"""Doctor's look at a running Ray cluster: facts of every host, gathered by a task pinned to it.

    one task a host (no cores asked for, so it runs on a busy cluster too) → facts → checks
    a host that has not answered within the deadline is named, and the others are told of all the same

Nothing is started but these tasks, and nothing is changed.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import doctor_facts, doctor_sockets
from cluster.config import JobConfig
from cluster.doctor_needs import GIB, Needs, needed_memory
from cluster.doctor_records import JOB, Check, HostFacts

_CONNECT_S = 5.0
_CLOCK_S = 10.0
_CLOCK_ROUNDS = 3
MOST_SKEW_S = 1.0
_ROLE = "headrace_"  # how a host's own resource says which actors it is for; see cluster.placement
_TOKEN_HINT = "on every host the same token file, mode 0600, and RAY_AUTH_MODE=token in the environment"  # noqa: S105
_RAY_HINT = "start Ray (ray up, or ray start), and run this on a host of the cluster; ask `ray status`"


@dataclass(frozen=True, slots=True)
class Node:
    """A host of the cluster, as Ray tells of it."""

    id: str
    label: str
    address: str
    ports: tuple[int, ...]  # node manager and object manager
    roles: frozenset[str]  # of headrace_learner, headrace_rollout, headrace_scoring; none: any


@dataclass(frozen=True, slots=True)
class Skew:
    """A host's clock against the driver's: it is `offset` ± `uncertainty` seconds ahead."""

    offset: float
    uncertainty: float


@dataclass(frozen=True, slots=True)
class Survey:
    """What was learnt of a cluster; `missing` are the hosts without facts, and why."""

    nodes: tuple[Node, ...]
    facts: dict[str, HostFacts]
    missing: dict[str, str]
    skews: dict[str, Skew]
    resources: dict[str, float]


class ClusterError(RuntimeError):
    """The cluster cannot be asked; the message says why, `remedy` what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def check_address(address: str) -> None:
    """ValueError where it is none that can be asked."""
    host, _, port = address.rpartition(":")
    if address != "auto" and (not host or not port.isdecimal() or "://" in address):
        raise ValueError(
            f"--address {address!r}: give host:port of the head (port 6379 is usual), auto, or local"
        )


def survey(address: str, needs: Needs | None, *, timeout_s: float) -> Survey:
    """Connect, ask every alive host, disconnect. Raises ClusterError if there is no cluster to ask."""
    _probe(address)
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, namespace="headrace", log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        ray.shutdown()
        message = _line(error)
        raise ClusterError(message, _TOKEN_HINT if "token" in message.lower() else _RAY_HINT) from None
    try:
        nodes = alive_nodes(ray.nodes())
        facts, missing = _ask(nodes, needs, timeout_s)
        skews = _compare_clocks([node for node in nodes if node.label in facts])
        return Survey(nodes, facts, missing, skews, dict(ray.cluster_resources()))
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """One short connection: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            return
    except OSError as error:
        raise ClusterError(
            f"{address} does not answer ({error})",
            "check the address, whether Ray runs there (ray status on the head), and the firewall between",
        ) from None


def alive_nodes(rows: Sequence[dict[str, Any]]) -> tuple[Node, ...]:
    """The hosts that are there, each under a name of its own, from what `ray.nodes()` gives."""
    rows = [row for row in rows if row["Alive"]]
    names = [f"{row['NodeManagerHostname']} ({row['NodeManagerAddress']})" for row in rows]
    nodes = [
        Node(
            id=row["NodeID"],
            label=name if names.count(name) == 1 else f"{name} {row['NodeID'][:8]}",
            address=row["NodeManagerAddress"],
            ports=(int(row["NodeManagerPort"]), int(row["ObjectManagerPort"])),
            roles=frozenset(role for role in row["Resources"] if role.startswith(_ROLE)),
        )
        for row, name in zip(rows, names, strict=True)
    ]
    return tuple(sorted(nodes, key=lambda node: node.label))


def peers_of(node: Node, nodes: Sequence[Node]) -> list[tuple[str, int]]:
    """Ports of all other hosts."""
    return [(other.address, port) for other in nodes if other.id != node.id for port in other.ports]


def _ask(
    nodes: Sequence[Node], needs: Needs | None, timeout_s: float
) -> tuple[dict[str, HostFacts], dict[str, str]]:
    """Facts by host, and reasons for those that gave none. Waits at most `timeout_s` for all together."""
    import ray
    from ray import cloudpickle
    from ray.exceptions import RayError

    # By value: a host without headrace must be able to say so.
    for module in (doctor_facts, doctor_sockets):
        cloudpickle.register_pickle_by_value(module)
    try:
        task = ray.remote(doctor_facts.gather)
        folders, inputs = ([], []) if needs is None else (list(needs.folders), list(needs.inputs))
        waiting = {_pinned(task, node).remote(folders, inputs, peers_of(node, nodes)): node for node in nodes}
    finally:
        for module in (doctor_facts, doctor_sockets):
            cloudpickle.unregister_pickle_by_value(module)
    ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
    facts: dict[str, HostFacts] = {}
    missing = {waiting[one].label: f"gave no answer within {timeout_s:g} s" for one in late}
    for one in ready:
        try:
            facts[waiting[one].label] = HostFacts.of(ray.get(one))
        except RayError as error:
            missing[waiting[one].label] = _line(error)
    for one in late:
        ray.cancel(one, force=True)
    return facts, missing


def _pinned(task: Any, node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return task.options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
    )


def _compare_clocks(nodes: Sequence[Node]) -> dict[str, Skew]:
    """Ask each host for the time a few times, and keep the quickest answer. Silent hosts are left out."""
    import ray
    from ray import cloudpickle
    from ray.exceptions import GetTimeoutError, RayError

    skews: dict[str, Skew] = {}
    cloudpickle.register_pickle_by_value(doctor_facts)
    try:
        task = ray.remote(doctor_facts.clock)
        for node in nodes:
            for _ in range(_CLOCK_ROUNDS):
                sent = time.time()
                try:
                    theirs = ray.get(_pinned(task, node).remote(), timeout=_CLOCK_S)
                except (GetTimeoutError, RayError):
                    break
                one = skew(sent, theirs, time.time())
                if node.label not in skews or one.uncertainty < skews[node.label].uncertainty:
                    skews[node.label] = one
    finally:
        cloudpickle.unregister_pickle_by_value(doctor_facts)
    return skews


def skew(sent: float, theirs: float, received: float) -> Skew:
    """The answer was given at some time between sending and receiving: the middle, plus or minus a half."""
    return Skew(theirs - (sent + received) / 2, (received - sent) / 2)


def _line(error: BaseException) -> str:
    """What an error says, in one line: Ray's begin with pages of trace."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ---- checks -----------------------------------------------------------------------------------------------


def answer_check(host: str, reason: str) -> Check:
    """A host of which nothing is known."""
    return Check(
        "answers",
        host,
        "fail",
        reason,
        "look at this host's load, its Python (the driver's?) and Ray's logs in /tmp/ray/session_latest/logs",
    )


def clock_check(host: str, found: Skew | None) -> Check:
    """A host's clock is not more than a second from the driver's."""
    if found is None:
        return Check("clock", host, "skipped", f"the host did not tell its time within {_CLOCK_S:g} s")
    text = f"{found.offset:+.2f} s from the driver's, ± {found.uncertainty:.2f} s"
    if abs(found.offset) - found.uncertainty > MOST_SKEW_S:
        return Check(
            "clock",
            host,
            "warn",
            text,
            "let NTP set it (timedatectl set-ntp true): times of hosts are compared",
        )
    return Check("clock", host, "ok", text)


def input_check(host: str, path: str, facts: HostFacts, driver: HostFacts) -> Check:
    """What actors read is on this host as on the driver's; a model's folder is brought there if it is not."""
    name = f"input {path}"
    here, there = facts.inputs.get(path, ""), driver.inputs.get(path, "")
    if here and here == there:
        return Check(name, host, "ok", "as on the driver's host")
    state = "is not the same as on the driver's host" if here else "is not on this host"
    if there and not path.endswith(".py"):
        return Check(name, host, "ok", f"{state}: the start brings it there")
    return Check(
        name,
        host,
        "fail",
        state,
        "copy it to the same path on every host (file_mounts in the cluster's file), or share the disk",
    )


def inputs_for(node: Node, nodes: Sequence[Node], needs: Needs) -> list[str]:
    """The inputs that actors on a host may read: reward functions only where scoring actors can be."""
    scoring = f"{_ROLE}scoring"
    elsewhere = scoring not in node.roles and any(scoring in other.roles for other in nodes)
    return [path for path in needs.inputs if not (elsewhere and path.endswith(".py"))]


def spread_check(config: JobConfig, nodes: Sequence[Node]) -> Check:
    """Learner ranks that want a host of their own each have one."""
    role = f"{_ROLE}learner"
    hosts = [node for node in nodes if role in node.roles] or list(nodes)
    ranks = config.learner.ranks
    text = f"{len(hosts)} for {ranks} rank(s), learner.placement = {config.learner.placement!r}"
    if config.learner.placement == "strict_spread" and ranks > len(hosts):
        return Check(
            "learner hosts", JOB, "fail", text, f'lower learner.ranks to {len(hosts)}, or set it to "spread"'
        )
    return Check("learner hosts", JOB, "ok", text)


def total_checks(config: JobConfig, needs: Needs, found: Survey) -> Iterator[Check]:
    """What the hosts have together, against what the job asks for."""
    from cluster.placement import needed_resources

    gpus = found.resources.get("GPU", 0.0) if config.learner.device != "cpu" else 0.0
    asked = needed_resources(config, gpus=gpus)
    for name, resource, need in (("cores", "CPU", asked.cores), ("GPUs", "GPU", asked.gpus)):
        have = found.resources.get(resource, 0.0)
        text = f"{have:g} in the cluster, the job's actors ask for {need:g}"
        remedy = "lower rollout.actors, scoring.actors or learner.ranks (or their cores), or add hosts"
        yield Check(name, JOB, "fail", text, remedy) if need > have else Check(name, JOB, "ok", text)
    if config.learner.device == "cuda" and not gpus:
        yield Check(
            "learner.device",
            JOB,
            "fail",
            'is "cuda", but Ray sees no GPU',
            'set it to "cpu" or "auto", or add hosts with GPUs',
        )
    yield spread_check(config, found.nodes)
    yield total_memory_check(needs, list(found.facts.values()), on_gpu=gpus > 0)


def total_memory_check(needs: Needs, hosts: Sequence[HostFacts], *, on_gpu: bool) -> Check:
    """The job's memory against that of all hosts."""
    have = sum(host.memory for host in hosts) / GIB
    if needs.memory is None:
        return Check(
            "memory", JOB, "skipped", f"{have:.1f} GiB in all; the need is not known without the weights"
        )
    need = needed_memory(needs, on_gpu=on_gpu)
    text = f"{have:.1f} GiB in all hosts, the job needs about {need:.1f} GiB and its activations"
    if need > have:
        return Check(
            "memory", JOB, "fail", text, "add hosts, lower rollout.actors, or use bfloat16 or a smaller model"
        )
    return Check("memory", JOB, "ok", text)
