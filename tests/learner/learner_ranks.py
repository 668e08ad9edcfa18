"""Run a function in one or several real learner processes and bring its result back.

Ranks are dear to start, for what they import, and a process joins one group for good: so a single rank is
this process, and the several ranks of a group stay for the next test until one of them fails.
"""

import multiprocessing
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from learner.engine import start_process_group


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    start_process_group(
        rank=rank,
        world_size=world_size,
        address="127.0.0.1",
        port=port,
        device="cpu",
        timeout_s=200,
        own_address="127.0.0.1",
    )


def _serve(tasks: Any, results: Any, rank: int, world_size: int, port: int) -> None:
    """A rank's process: it does what it is told, one thing after the other, until something fails."""
    try:
        _join(rank, world_size, port)
        while True:
            function, args = tasks.get()
            results.put((rank, function(rank, world_size, *args), None))
    except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
        results.put((rank, None, traceback.format_exc()))


class _Group:
    """Ranks that have met."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.results: Any = context.Queue()
        self.tasks: list[Any] = [context.Queue() for _ in range(world_size)]
        port = free_port()
        self.children = [
            context.Process(target=_serve, args=(tasks, self.results, rank, world_size, port), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for child in self.children:
            child.start()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, args))
        answers: dict[int, Any] = {}
        while len(answers) < len(self.children):
            try:
                rank, answer, error = self.results.get(timeout=timeout_s)
            except queue.Empty:
                missing = sorted(set(range(len(self.children))) - set(answers))
                raise AssertionError(f"ranks {missing} gave no answer in {timeout_s} s") from None
            assert error is None, f"rank {rank}:\n{error}"
            answers[rank] = answer
        return [answers[rank] for rank in range(len(self.children))]

    def kill(self) -> None:
        for child in self.children:
            child.kill()
            child.join(10)


_groups: dict[int, _Group] = {}


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """[function(rank, world_size, *args) for every rank], all in one group.

    Results must be plain data or numpy arrays, not tensors, whose memory goes with their process.
    """
    if world_size == 1:
        _join(0, 1, free_port())
        return [function(0, 1, *args)]
    if world_size not in _groups:
        _groups[world_size] = _Group(world_size)
    try:
        return _groups[world_size].run(function, args, timeout_s)
    except BaseException:
        _groups.pop(world_size).kill()
        raise
