"""What every benchmark says of the machine that it ran on."""

import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

GIB = 1024**3


def describe() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")


class StolenTime:
    """Share of the machine's cores that its host gave to other guests since this was made."""

    def __init__(self, clock: float) -> None:
        self._steal, self._clock = psutil.cpu_times().steal, clock

    def share(self, clock: float) -> float:
        """At the moment `clock`, in the same seconds."""
        return (psutil.cpu_times().steal - self._steal) / ((clock - self._clock) * (psutil.cpu_count() or 1))


def seconds_of_fixed_work(rounds: int = 60) -> float:
    """How long all cores take for the same matrix products: a host may slow them without taking any away."""
    matrix = np.full((1024, 1024), 1e-3)
    began = time.perf_counter()
    for _ in range(rounds):
        np.matmul(matrix, matrix)
    return time.perf_counter() - began
