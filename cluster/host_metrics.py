"""What a host and the processes of its actors use: processor, memory, GPU. No Ray here.

One `HostSampler` looks at one host from outside the actors' processes, so nothing in them has to answer: a
learner in the middle of a step, or an engine that hangs, is seen all the same.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_GIB = 1024**3
_MIB_IN_GIB = 1024
_GPU_DEADLINE_S = 5.0
_CGROUP = Path("/sys/fs/cgroup")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only its free space is read


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a process runs: Ray's id of its node (empty without Ray) and its process id there."""

    node_id: str
    pid: int


def whereabouts(_: Any = None) -> Whereabouts:
    """Of the calling process; takes and ignores the actor in which it is called."""
    node_id = ""
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            node_id = ray.get_runtime_context().get_node_id()
    return Whereabouts(node_id, os.getpid())


def host_label(name: str, address: str = "") -> str:
    """A host's part in names of metrics: its first name, and its address where names are not unique."""
    parts = [name.partition(".")[0] or "host", address]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(part for part in parts if part))


@dataclass(frozen=True, slots=True)
class _Family:
    """An actor's process and all below it: `used` is the processor time of each, by process."""

    used: dict[tuple[int, float], float]
    resident_gib: float
    proportional_gib: float | None


class HostSampler:
    """Samples the host that it lives on; processor shares are since the sample before."""

    def __init__(self, label: str, cgroup: Path = _CGROUP) -> None:
        """`label` is the host's part in names of metrics, see `host_label`."""
        self._label = label
        self._cgroup = cgroup
        self._times = psutil.cpu_times()
        self._used: dict[str, dict[tuple[int, float], float]] = {}
        self._smi = shutil.which("nvidia-smi")
        self._clock = time.monotonic()

    def sample(self, actors: Mapping[str, int]) -> dict[str, float]:
        """Metrics of the host, and of the actors on it that are given as name and process id.

        A process that is gone, or a number that the system does not give, has no metric.
        """
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        row = {f"host/{self._label}/{name}": value for name, value in self._host().items()}
        children = _children()
        families: dict[str, set[int]] = {}
        for name, pid in actors.items():
            pids = _family(pid, children)
            family = _look_at(pids)
            if family is None:
                self._used.pop(name, None)
                continue
            families[name] = pids
            row[f"actor/{name}/memory_gib"] = (
                family.resident_gib if family.proportional_gib is None else family.proportional_gib
            )
            row[f"actor/{name}/resident_gib"] = family.resident_gib
            before = self._used.get(name)
            if before is not None and seconds > 0:
                row[f"actor/{name}/cores"] = _gained(before, family.used) / seconds
            self._used[name] = family.used
        for name in self._used.keys() - actors.keys():
            del self._used[name]
        return row | self._gpus(families)

    def _host(self) -> dict[str, float]:
        times = psutil.cpu_times()
        busy, total = _busy(self._times, times)
        self._times = times
        used, limit = host_memory(self._cgroup)
        row = {"memory_gib": used / _GIB, "memory_fraction": used / limit}
        if total > 0:
            row["cpu_fraction"] = busy / total
        if _SHARED_MEMORY.is_dir():
            row["shared_memory_gib"] = shutil.disk_usage(_SHARED_MEMORY).used / _GIB
        return row

    def _gpus(self, families: Mapping[str, Iterable[int]]) -> dict[str, float]:
        if self._smi is None:
            return {}
        devices = _ask(self._smi, "--query-gpu=index,utilization.gpu,memory.used,memory.total")
        processes = _ask(self._smi, "--query-compute-apps=pid,used_memory")
        return gpu_metrics(self._label, devices, processes, families)


def gpu_metrics(
    label: str, devices: str, processes: str, families: Mapping[str, Iterable[int]]
) -> dict[str, float]:
    """Metrics from what nvidia-smi prints: `index, percent, MiB, MiB` a device and `pid, MiB` a process."""
    row: dict[str, float] = {}
    for index, busy, used, total in _numbers(devices, 4):
        if busy is not None:
            row[f"host/{label}/gpu{index:.0f}_fraction"] = busy / 100
        if used is not None and total:
            row[f"host/{label}/gpu{index:.0f}_memory_gib"] = used / _MIB_IN_GIB
            row[f"host/{label}/gpu{index:.0f}_memory_fraction"] = used / total
    memory: dict[int, float] = defaultdict(float)
    for pid, used in _numbers(processes, 2):
        if pid is not None and used is not None:
            memory[int(pid)] += used / _MIB_IN_GIB
    for name, pids in families.items():
        if found := [memory[pid] for pid in pids if pid in memory]:
            row[f"actor/{name}/gpu_memory_gib"] = sum(found)
    return row


def host_memory(cgroup: Path = _CGROUP) -> tuple[float, float]:
    """Bytes in use and bytes there are: of the container where it has a limit, else of the machine."""
    machine = psutil.virtual_memory()
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max": no limit
        limit = float((cgroup / "memory.max").read_text())
        if limit < machine.total:
            current = float((cgroup / "memory.current").read_text())
            cached = _field((cgroup / "memory.stat").read_text(), "inactive_file")
            return current - cached, limit
    return float(machine.total - machine.available), float(machine.total)


def _field(text: str, name: str) -> float:
    return next((float(line.split()[1]) for line in text.splitlines() if line.split()[0] == name), 0.0)


def _busy(before: Any, after: Any) -> tuple[float, float]:
    """Seconds of all cores that were not idle, and in all, between two `cpu_times`."""

    def total(times: Any) -> float:
        # A guest's time is in `user` and `nice` already.
        return float(sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))

    def idle(times: Any) -> float:
        return float(times.idle + getattr(times, "iowait", 0.0))

    spent = total(after) - total(before)
    return max(0.0, spent - (idle(after) - idle(before))), spent


def _children() -> dict[int, list[int]]:
    """Every process's children; one look at the whole table is cheaper than one for each actor."""
    found: dict[int, list[int]] = defaultdict(list)
    for process in psutil.process_iter(["ppid"]):
        if process.info["ppid"] is not None:
            found[process.info["ppid"]].append(process.pid)
    return found


def _family(pid: int, children: Mapping[int, list[int]]) -> set[int]:
    found, rest = {pid}, [pid]
    while rest:
        new = [child for child in children.get(rest.pop(), []) if child not in found]
        found.update(new)
        rest += new
    return found


def _look_at(pids: Iterable[int]) -> _Family | None:
    """What these processes use together; None if none of them is there."""
    used: dict[tuple[int, float], float] = {}
    resident, proportional, all_known = 0.0, 0.0, True
    for pid in pids:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                times = process.cpu_times()
                resident += process.memory_info().rss
                used[pid, process.create_time()] = times.user + times.system
            try:
                proportional += process.memory_full_info().pss
            except (psutil.AccessDenied, AttributeError):  # another user's, or no Linux
                all_known = False
        except psutil.NoSuchProcess:
            continue
    if not used:
        return None
    return _Family(used, resident / _GIB, proportional / _GIB if all_known else None)


def _gained(before: Mapping[Any, float], after: Mapping[Any, float]) -> float:
    """Processor seconds spent between two looks, by processes that are there now."""
    return sum(seconds - before.get(process, 0.0) for process, seconds in after.items())


def _ask(smi: str, query: str) -> str:
    """What nvidia-smi says to a query; nothing if it fails or hangs, as a broken driver lets it."""
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program and fixed arguments
            [smi, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_GPU_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _numbers(text: str, columns: int) -> Iterable[list[Any]]:
    """Rows of numbers; None where there is another word, such as [N/A]."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == columns:
            yield [float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else None for cell in cells]
