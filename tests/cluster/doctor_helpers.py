"""A healthy host, and a job's needs, for tests that change one thing about them."""

from typing import Any

from cluster.doctor_needs import GIB, Needs
from cluster.doctor_packages import read_lock
from cluster.doctor_records import HostFacts, Token
from cluster.plan_memory import Memory

PINS = read_lock() or {}


def facts(**changes: Any) -> HostFacts:
    """A host of 16 GiB and 4 cores, without GPUs, on which nothing is wrong."""
    values: dict[str, Any] = {
        "python": "3.11.7",
        "packages": PINS | {"headrace": "0.1.0"},
        "memory_total": 16 * GIB,
        "memory_available": 12 * GIB,
        "memory_limit": None,
        "cores": 4.0,
        "gpus": (),
        "gpu_problem": "",
        "shm_free": 8 * GIB,
        "loopback_problem": "",
        "unreachable": {},
        "listeners": (),
        "hidden_processes": 0,
        "token": token(),
        "folders": (),
        "inputs": {},
        "environment": {},
        "netrc_permissions": None,
    }
    return HostFacts(**(values | changes))


def token(**changes: Any) -> Token:
    values: dict[str, Any] = {
        "mode": "token",
        "in_environment": False,
        "path": "/home/u/.ray/auth_token",
        "problem": "",
        "permissions": 0o600,
    }
    return Token(**(values | changes))


def needs(**changes: Any) -> Needs:
    """1 + 2 + 0.5 GiB of models, 0.25 GiB of weights, four processes, 0.5 GiB of object store."""
    values: dict[str, Any] = {
        "memory": Memory(learner=1.0, rollout=2.0, scoring=0.5, shared=0.25, object_store=0.01),
        "processes": 4,
        "object_store": 0.5,
        "checkpoint": 0.5,
        "checkpoints": 3,
        "folders": ("/runs/x", "/tmp"),
        "inputs": (),
        "device": "auto",
    }
    return Needs(**(values | changes))
