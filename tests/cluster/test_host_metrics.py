"""Load of hosts and actors: on real processes, on what the kernel and nvidia-smi write, and who is asked."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import metrics
from cluster.host_metrics import HostSampler, Whereabouts, gpu_metrics, host_label, host_memory, whereabouts
from cluster.host_watch import HostWatch, Node, labels_of
from cluster.remote import Remote, WorkerLostError

GIB = 1024**3
HOLDS = """
import os, subprocess, sys
held = bytearray(b"x") * (64 * 1024 * 1024)
if sys.argv[1] == "parent":
    child = subprocess.Popen([sys.executable, sys.argv[0], "child"], stdout=subprocess.PIPE)
    child.stdout.readline()
while sys.argv[1] == "child" and sum(os.times()[:2]) < 1.0:
    pass
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[int]:
    """A process with a child: each holds 64 MiB, the child has used a second of processor time."""
    script = tmp_path / "holds.py"
    script.write_text(HOLDS)
    parent = subprocess.Popen(
        [sys.executable, script, "parent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    yield parent.pid
    for child in psutil.Process(parent.pid).children():
        child.kill()
    parent.kill()
    parent.communicate()


def test_an_actor_is_its_process_and_all_below_it(family: int) -> None:
    sampler = HostSampler("h")
    first = sampler.sample({"rollout-0": family})
    second = sampler.sample({"rollout-0": family})
    # Two processes with 64 MiB each are 0.125 GiB and little besides; PSS divides what they share.
    assert 0.125 <= first["actor/rollout-0/memory_gib"] < 0.25
    assert first["actor/rollout-0/memory_gib"] <= first["actor/rollout-0/resident_gib"]
    assert "actor/rollout-0/cores" not in first  # it needs a look before
    # The child's second was spent before the first look, and neither has done anything since.
    assert 0 <= second["actor/rollout-0/cores"] < 0.5


def test_a_process_that_is_gone_has_no_metrics(family: int) -> None:
    sampler = HostSampler("h")
    sampler.sample({"a": family, "b": os.getpid()})
    parent = psutil.Process(family)
    for child in parent.children():
        child.kill()
    parent.kill()
    deadline = time.monotonic() + 10
    while parent.status() != psutil.STATUS_ZOMBIE:  # its parent, this test, has not asked for its end
        assert time.monotonic() < deadline
        time.sleep(0.01)
    row = sampler.sample({"a": family, "b": os.getpid()})
    assert not [name for name in row if name.startswith("actor/a/")]
    assert "actor/b/cores" in row


def test_the_host_itself_and_names_that_are_documented() -> None:
    sampler = HostSampler("h")
    sum(range(3_000_000))
    row = sampler.sample({"me": os.getpid()}) | sampler.sample({"me": os.getpid()})
    assert 0 <= row["host/h/cpu_fraction"] <= 1
    assert 0 < row["host/h/memory_fraction"] < 1
    machine = psutil.virtual_memory().total / GIB
    assert 0 < row["host/h/memory_gib"] <= machine
    undocumented = [name for name in row if metrics.lookup(name) is None]
    assert undocumented == []


def test_memory_is_the_containers_where_it_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB // 2}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 4}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 8}\nactive_file 7\n")
    assert host_memory(tmp_path) == (GIB // 4 - GIB // 8, GIB // 2)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path)[1] == psutil.virtual_memory().total
    assert host_memory(tmp_path / "none")[1] == psutil.virtual_memory().total


def test_gpus_as_nvidia_smi_prints_them() -> None:
    devices = "0, 37, 2048, 81920\n1, [N/A], 1024, 81920\n"
    processes = "11, 512\n12, 512\n99, 4096\n13, [N/A]\n"
    families = {"learner-0": {10, 11, 12}, "rollout-0": {13}}
    assert gpu_metrics("h", devices, processes, families) == {
        "host/h/gpu0_fraction": 0.37,
        "host/h/gpu0_memory_gib": 2.0,
        "host/h/gpu0_memory_fraction": 2048 / 81920,
        "host/h/gpu1_memory_gib": 1.0,
        "host/h/gpu1_memory_fraction": 1024 / 81920,
        "actor/learner-0/gpu_memory_gib": 1.0,  # 512 + 512 MiB
    }
    assert gpu_metrics("h", "No devices were found\n", "", families) == {}


def test_labels_are_short_safe_and_unique() -> None:
    assert host_label("node-1.cluster.example") == "node-1"
    assert host_label("", "") == "host"
    nodes = [Node("a", "vm", "10.0.0.1"), Node("b", "vm.local", "10.0.0.2"), Node("c", "gpu", "10.0.0.3")]
    assert labels_of(nodes) == {"a": "vm-10-0-0-1", "b": "vm-10-0-0-2", "c": "gpu"}


# --- who is asked: with actors and samplers that are not there -------------------------------------------


class FakeActor(Remote):
    """An actor that says where it is once `told` is set."""

    def __init__(self, name: str, node: str, pid: int) -> None:
        super().__init__(name, self)
        self._where = Whereabouts(node, pid)
        self.told = asyncio.Event()
        self.dies = False
        self.__ray_call__ = self

    async def _answer(self, function: Callable[..., Any]) -> Any:
        assert function is whereabouts
        await self.told.wait()
        if self.dies:
            raise WorkerLostError(f"{self.name} died")
        return self._where

    def remote(self, function: Callable[..., Any]) -> Any:
        return self._answer(function)


class FakeSampler(Remote):
    """A sampler on another host."""

    def __init__(self, label: str) -> None:
        super().__init__(label, None)
        self.asked: list[dict[str, int]] = []
        self.lost = self.killed = False

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        self.asked.append(args[0])
        if self.lost:
            raise WorkerLostError("its host is gone")
        return {f"host/{self.name}/cpu_fraction": 0.5} | {f"actor/{name}/cores": 1.0 for name in args[0]}

    def kill(self) -> None:
        self.killed = True


def test_every_host_with_an_actor_is_asked_and_silence_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[FakeSampler] = []

    def start(node: Node, label: str) -> FakeSampler:
        started.append(FakeSampler(label))
        return started[-1]

    monkeypatch.setattr("cluster.host_watch._start_sampler", start)
    nodes = [Node("here", "vm", "10.0.0.1"), Node("there", "far", "10.0.0.2"), Node("idle", "x", "10.0.0.3")]

    async def story() -> None:
        near, far = FakeActor("learner-0", "here", os.getpid()), FakeActor("rollout-0", "there", 17)
        actors: list[Remote] = [near, far]
        said: list[str] = []
        watch = HostWatch(15.0, lambda: actors, said.append, lambda: list(nodes), _own_node="here")
        assert watch.row() == {}

        async def look() -> dict[str, float]:
            await watch.round()
            await asyncio.sleep(0)  # actors that were asked in this round may answer
            return watch.row()

        row = await look()
        assert row["monitor/hosts_silent"] == 2  # nobody has said yet where they are
        assert "host/vm/memory_gib" in row  # its own host is known from the start
        near.told.set()
        far.told.set()
        await asyncio.sleep(0.01)
        row = await look()
        assert row["monitor/hosts_silent"] == 0
        assert row["actor/learner-0/resident_gib"] > 0
        assert row["actor/rollout-0/cores"] == row["host/far/cpu_fraction"] * 2 == 1.0
        assert started[0].asked == [{"rollout-0": 17}]
        assert not [name for name in row if name.startswith("host/x/")]  # no actor of the job is there

        started[0].lost = True
        row = await look()
        assert row["monitor/hosts_silent"] == 1
        assert not [
            name for name in row if name.startswith(("host/far/", "actor/rollout-0/"))
        ]  # nothing stale
        assert len(said) == 1
        assert "far" in said[0]
        row = await look()  # a new sampler was started
        assert (len(started), row["monitor/hosts_silent"]) == (2, 0)

        successor = FakeActor("rollout-0", "here", os.getpid())
        successor.told.set()
        actors[1] = successor
        del nodes[1]  # the host is gone, and Ray says so
        await look()
        row = await look()
        assert row["monitor/hosts_silent"] == 0
        assert row["actor/rollout-0/resident_gib"] > 0
        assert started[1].killed

        dead = FakeActor("scoring-0", "here", 5)
        dead.dies = True
        dead.told.set()
        actors.append(dead)
        await look()
        assert (await look())["monitor/hosts_silent"] == 1
        watch.close()

    asyncio.run(story())


def test_a_sampler_that_hangs_costs_its_deadline_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(self: HostSampler, actors: dict[str, int]) -> dict[str, float]:
        release.wait(30)
        return {"host/vm/memory_gib": 1.0}

    async def story() -> None:
        said: list[str] = []
        watch = HostWatch(15.0, list, said.append, lambda: [Node("here", "vm", "")], 0.05, _own_node="here")
        await watch.round()
        assert watch.row() == {"monitor/hosts_silent": 1}
        assert "waited 0.05 s for vm" in said[0]
        release.set()

    monkeypatch.setattr(HostSampler, "sample", hang)
    asyncio.run(story())


def test_whatever_goes_wrong_is_counted_and_said_and_the_watch_goes_on() -> None:
    rounds: list[int] = []

    def nodes() -> list[Node]:
        rounds.append(1)
        if len(rounds) < 3:
            raise ConnectionError("the control store is gone")
        return [Node("here", "vm", "")]

    async def story() -> None:
        said: list[str] = []
        watch = HostWatch(0.001, list, said.append, nodes, _own_node="here")
        task = asyncio.create_task(watch.run())
        seen: list[float] = []
        while "host/vm/memory_gib" not in watch.row():
            seen += [watch.row().get("monitor/hosts_silent", 0)]
            await asyncio.sleep(0.001)
        task.cancel()
        assert max(seen) == 1
        assert [text for text in said if "the control store is gone" in text] == said
        assert len(said) == 1

    asyncio.run(asyncio.wait_for(story(), 30))


def test_where_this_process_is_without_ray() -> None:
    assert whereabouts().pid == os.getpid()


# --- with a real Ray of two hosts ------------------------------------------------------------------------


@pytest.mark.integration
def test_actors_on_two_hosts_are_found_also_while_one_is_in_a_call() -> None:
    import ray
    from ray.cluster_utils import Cluster

    class Quiet:
        """An actor with ordinary methods, as the learner is."""

        def wait(self, seconds: float) -> None:
            time.sleep(seconds)

    class Busy:
        """An actor with asynchronous methods, as a rollout actor is."""

        async def wait(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, resources={"far": 1})
        ray.init(address=cluster.address, log_to_driver=False, namespace="headrace")
        near = Remote("learner-0", ray.remote(Quiet).options(num_cpus=0.1).remote())
        far = Remote("rollout-0", ray.remote(Busy).options(num_cpus=0.1, resources={"far": 0.1}).remote())
        waiting = [one.handle.wait.remote(0.5 if one is near else 600) for one in (near, far)]

        async def story() -> dict[str, float]:
            watch = HostWatch(0.2, lambda: [near, far], print)
            task = asyncio.create_task(watch.run())
            deadline = time.monotonic() + 60
            while not {"actor/learner-0/cores", "actor/rollout-0/cores"} <= watch.row().keys():
                assert not task.done(), task.exception()
                assert time.monotonic() < deadline, watch.row()
                await asyncio.sleep(0.1)
            row = watch.row()
            task.cancel()
            return row

        row = asyncio.run(story())
        assert row["monitor/hosts_silent"] == 0
        assert len([name for name in row if re.fullmatch(r"host/[^/]+/cpu_fraction", name)]) == 2
        assert [name for name in row if metrics.lookup(name) is None] == []
        ray.cancel(waiting[1])
    finally:
        ray.shutdown()
        cluster.shutdown()
