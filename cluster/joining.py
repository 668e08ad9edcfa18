"""Waits for the hosts of a cluster: after `ray up` they join one by one, and a job may be there before them.

A job that starts too soon would be placed for good without regard to roles and GPUs of hosts still to come.
"""

import json
import time
from pathlib import Path

import ray

from cluster.config import ClusterSettings

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # what `ray up` leaves on the head, as JSON
ROLES = ("learner", "rollout", "scoring")
_LOOK_EVERY_S = 1.0


class PlacementError(RuntimeError):
    """The cluster lacks what the job asks for."""


def wait_for_hosts(settings: ClusterSettings, cores: float) -> None:
    """Wait until the cluster has its hosts and so many cores, or no longer than `start_timeout_s`.

    Its hosts are `settings.hosts`, or, with 0, those that the file of `ray up` promises. Raises
    PlacementError where hosts that were asked for by number are missing even then; of others it says so, and
    of cores `placement` does.
    """
    wanted = settings.hosts or promised_hosts(BOOTSTRAP.expanduser())
    seconds = settings.start_timeout_s
    deadline = time.monotonic() + seconds
    said = False
    while (hosts := _alive()) < wanted or _cores() < cores:
        if time.monotonic() >= deadline:
            break
        if not said:  # no monitor is at work yet that could say it
            print(
                f"waiting for hosts: {hosts} of {wanted} with {_cores():g} CPUs so far; the job asks for "
                f"{cores:g} CPUs",
                flush=True,
            )
            said = True
        time.sleep(_LOOK_EVERY_S)
    if hosts >= wanted:
        return
    missing = f"the cluster has {hosts} of {wanted} hosts after cluster.start_timeout_s = {seconds:g}"
    if settings.hosts:
        raise PlacementError(
            f"cluster.hosts = {settings.hosts}: {missing}; lower it, or see with `ray status` and in the "
            "output of `ray up` why the others don't join"
        )
    print(f"warning: {missing}: placing actors without the others; `ray status` says more", flush=True)


def promised_hosts(bootstrap: Path) -> int:
    """The head and the fewest workers of each kind by the file that `ray up` left; 1 where there is none."""
    if not bootstrap.is_file():
        return 1
    try:
        kinds = json.loads(bootstrap.read_text(encoding="utf-8"))["available_node_types"].values()
        return 1 + sum(int(kind.get("min_workers", 0)) for kind in kinds)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        print(f"warning: {bootstrap} cannot be read ({error!r}): not waiting for its hosts", flush=True)
        return 1


def roles_without_host() -> list[str]:
    """Roles that no host has, where other roles have theirs: their actors may run anywhere."""
    have = ray.cluster_resources()
    with_host = {role for role in ROLES if have.get(f"headrace_{role}", 0)}
    return [role for role in ROLES if role not in with_host] if with_host else []


def _alive() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def _cores() -> float:
    return float(ray.cluster_resources().get("CPU", 0))
