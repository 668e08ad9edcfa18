"""Run a function in one or several real learner processes and bring its result back."""

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


def _child(
    results: Any, function: Callable[..., Any], rank: int, world_size: int, port: int, *args: Any
) -> None:
    try:
        torch.set_num_threads(1)
        start_process_group(
            rank=rank, world_size=world_size, address="127.0.0.1", port=port, device="cpu", timeout_s=60
        )
        results.put((rank, function(rank, world_size, *args), None))
    except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """[function(rank, world_size, *args) for every rank], each in a fresh process, all in one group.

    Results must be plain data or numpy arrays, not tensors, whose memory goes with their process.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    children = [
        context.Process(target=_child, args=(results, function, rank, world_size, port, *args), daemon=True)
        for rank in range(world_size)
    ]
    answers: dict[int, Any] = {}
    try:
        for child in children:
            child.start()
        while len(answers) < world_size:
            try:
                rank, answer, error = results.get(timeout=timeout_s)
            except queue.Empty:
                missing = sorted(set(range(world_size)) - set(answers))
                raise AssertionError(f"ranks {missing} gave no answer in {timeout_s} s") from None
            assert error is None, f"rank {rank}:\n{error}"
            answers[rank] = answer
    finally:
        for child in children:
            child.join(timeout=10)
            if child.is_alive():
                child.kill()
    return [answers[rank] for rank in range(world_size)]
