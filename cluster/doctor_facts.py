"""What a host is like, gathered where this runs. Changes nothing.

Standard library only, and what it gives is plain values: `cluster.doctor_cluster` hands these functions to
other hosts by value, so that a host without headrace, or with another one, can be told of.
"""

import hashlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from cluster.doctor_sockets import ray_listeners

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where Ray and weight sync keep their files, not a temporary file of ours
WATCHED_VARIABLES = (
    "RAY_AUTH_MODE",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_PLUGINS",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    "HF_DATASETS_TRUST_REMOTE_CODE",
)
_CONNECT_S = 2.0
_GPU_QUERY_S = 10.0
_UNLIMITED = 1 << 60  # version 1 of control groups writes a number near 2**63 for "no limit"


def gather(folders: list[str], inputs: list[str], peers: list[tuple[str, int]]) -> dict[str, Any]:
    """Facts of this host: of folders to be written, of inputs to be read, and whether peers answer."""
    total, available = _memory()
    gpus, gpu_problem = _gpus()
    listeners, hidden = ray_listeners()
    return {
        "python": python_version(),
        "packages": installed_packages(),
        "memory_total": total,
        "memory_available": available,
        "memory_limit": memory_limit(),
        "cores": usable_cores(),
        "gpus": gpus,
        "gpu_problem": gpu_problem,
        "shm_free": shutil.disk_usage(SHARED_MEMORY).free if Path(SHARED_MEMORY).is_dir() else 0,
        "loopback_problem": _loopback_problem(),
        "unreachable": unreachable(peers),
        "listeners": listeners,
        "hidden_processes": hidden,
        "token": ray_token(),
        "folders": [folder_facts(path) for path in folders],
        "inputs": {path: fingerprint(path) for path in inputs},
        "environment": {name: os.environ[name] for name in WATCHED_VARIABLES if name in os.environ},
        "netrc_permissions": _permissions(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()),
    }


def clock() -> float:
    """This host's idea of the time."""
    return time.time()


# ---- packages ----------------------------------------------------------------------------------------------


def normalised(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_packages() -> dict[str, str]:
    """Version of every installed distribution; two of one name stand as `1.0 and 2.0`.

    Copies that a package carries inside itself don't count: Ray puts its own on the path of its processes.
    """
    site = Path(sysconfig.get_path("purelib")).resolve()
    path = [entry for entry in sys.path if site not in Path(entry or ".").resolve().parents]
    found: dict[str, set[str]] = {}
    for one in metadata.distributions(path=path):
        name = one.metadata["Name"]
        if name:  # a damaged folder may have none
            found.setdefault(normalised(name), set()).add(one.version)
    return {name: " and ".join(sorted(versions)) for name, versions in sorted(found.items())}


# ---- memory, cores, GPUs -----------------------------------------------------------------------------------


def _memory() -> tuple[int, int]:
    """Total and available memory of the machine."""
    sizes = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) * 1024
    return sizes["MemTotal"], sizes["MemAvailable"]


def memory_limit(proc: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> int | None:
    """The smallest limit of this process's control groups, of either version; None without one."""
    limits = []
    for folder in _groups(proc, mount, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(folder / name)
            if text.isdecimal() and int(text) < _UNLIMITED:
                limits.append(int(text))
    return min(limits, default=None)


def usable_cores(proc: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> float:
    """Cores that this process may use: by affinity, and by the quota of its control groups."""
    cores = [float(len(os.sched_getaffinity(0)))]
    for folder in _groups(proc, mount, "cpu"):
        both = _text(folder / "cpu.max").split()
        quota, period = both if len(both) == 2 else (
            _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        )  # fmt: skip
        if quota.isdecimal() and period.isdecimal():
            cores.append(int(quota) / int(period))
    return min(cores)


def _groups(proc: str, mount: str, controller: str) -> list[Path]:
    """Folders of the process's control group and all above it, in both versions' trees."""
    folders = []
    for line in _text(Path(proc)).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        names = [part for part in path.split("/") if part and part != ".."]
        roots = [Path(mount) / controllers] if controllers else [Path(mount), Path(mount) / "unified"]
        folders += [root.joinpath(*names[:depth]) for root in roots for depth in range(len(names) + 1)]
    return folders


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """NVIDIA GPUs by the driver's own tool, and why it did not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], ""
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_QUERY_S, check=True)  # noqa: S603
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer within {_GPU_QUERY_S:g} s"
    except (OSError, subprocess.CalledProcessError) as error:
        return [], f"nvidia-smi failed: {error}"
    return [_gpu(line) for line in done.stdout.splitlines() if "," in line], ""


def _gpu(line: str) -> dict[str, Any]:
    name, _, size = line.rpartition(",")
    return {"name": name.strip(), "memory_mib": int(size) if size.strip().isdecimal() else 0}


# ---- network -----------------------------------------------------------------------------------------------


def _loopback_problem() -> str:
    try:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            one.listen(1)
            with socket.create_connection(one.getsockname(), timeout=_CONNECT_S):
                return ""
    except OSError as error:
        return str(error)


def unreachable(peers: list[tuple[str, int]]) -> dict[str, str]:
    """Which ports of other hosts cannot be connected to, and why."""

    def problem(peer: tuple[str, int]) -> str:
        try:
            with socket.create_connection(peer, timeout=_CONNECT_S):
                return ""
        except OSError as error:
            return str(error)

    if not peers:
        return {}
    with ThreadPoolExecutor(max_workers=min(32, len(peers))) as pool:
        answers = list(pool.map(problem, peers))
    return {f"{host}:{port}": answer for (host, port), answer in zip(peers, answers, strict=True) if answer}


def ray_token() -> dict[str, Any]:
    """Where Ray looks for its token and whether that can be used; never the token itself."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    problem = ""
    try:
        if not path.read_bytes().strip():
            problem = "is empty"
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    return {
        "mode": os.environ.get("RAY_AUTH_MODE", "").lower(),
        "in_environment": bool(os.environ.get("RAY_AUTH_TOKEN")),
        "path": str(path),
        "problem": problem,
        "permissions": _permissions(path) or 0,
    }


# ---- files -------------------------------------------------------------------------------------------------


def _permissions(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None


def folder_facts(path: str) -> dict[str, Any]:
    """Whether a folder, there or not yet, could be written, and the space where it is or would be."""
    existing = Path(path).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    return {
        "path": path,
        "existing": str(existing),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def fingerprint(path: str) -> str:
    """One text for a file's contents, or for a model folder: names and sizes of weights, all of small files.

    Empty where there is no such thing.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return ""
    digest = hashlib.sha256()
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        weights = file.suffix == ".safetensors"
        if file.is_file() and (weights or file.suffix in (".json", ".py")):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            if not weights:
                digest.update(file.read_bytes())
    return digest.hexdigest()
