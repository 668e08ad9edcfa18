"""What every learner rank can do, whatever it trains: meet the others, take its model, join the group."""

import dataclasses
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from actors.shipping import ShippedFolder, local_folder
from learner.engine import start_process_group
from learner.settings import LearnerSettings


class LearnerRank:
    """A data-parallel rank. `job` is a dataclass with `model_path` and `learner`, its settings."""

    def __init__(self, rank: int, world_size: int, job: Any) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} is outside a group of {world_size}")
        self._rank = rank
        self._ranks = world_size
        self._job = job
        self._device = "cpu"

    def rendezvous(self) -> tuple[str, int]:
        """(address, free port) of this host, where the ranks can meet. Asked of rank 0."""
        address = self._own_address()
        with closing(socket.socket()) as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def _own_address(self) -> str:
        """Where other ranks reach this one; loopback where there are none."""
        if self._ranks == 1 or "ray" not in sys.modules:
            return "127.0.0.1"
        import ray

        return str(ray.util.get_node_ip_address())

    def use_model(self, model: ShippedFolder, seconds: float) -> None:
        """Before `start`: take the model from the driver's host, unless this is it. Raises ShippingError."""
        self._job = dataclasses.replace(self._job, model_path=str(local_folder(model, seconds)))

    def sees(self, path: str) -> bool:
        """Whether this host has a file: the driver asks, to learn whether they share the run's folder."""
        return Path(path).is_file()

    def _join(self, address: str, port: int) -> None:
        """Choose the device and meet the other ranks."""
        settings: LearnerSettings = self._job.learner
        torch.set_num_threads(settings.threads or max(1, int(settings.cores)))
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ValueError('learner.device = "cuda", but this process sees no GPU; use "cpu" or "auto"')
        self._device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
        start_process_group(
            rank=self._rank,
            world_size=self._ranks,
            address=address,
            port=port,
            device=self._device,
            timeout_s=settings.step_timeout_s,
            own_address=self._own_address(),
        )
