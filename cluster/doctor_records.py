"""What `headrace doctor` finds: one frozen record a check, and what is known of a host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "skipped"]
JOB = "job"  # the host of what concerns the whole job


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was looked at, where, how it is, what was found, and what to do about it."""

    name: str
    host: str
    status: Status
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        needs_remedy = self.status in ("warn", "fail")
        assert bool(self.remedy) or not needs_remedy, f"{self.name}: a finding without a remedy helps no one"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that the job writes to; `existing` is the nearest one that is there already."""

    path: str
    existing: str
    writable: bool
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Listener:
    """A port of Ray's that other machines can reach; `auth` is the process's RAY_AUTH_MODE, `?` if unseen."""

    process: str
    address: str
    port: int
    auth: str


@dataclass(frozen=True, slots=True)
class Token:
    """Ray's token on a host, without the token."""

    mode: str
    in_environment: bool
    path: str
    problem: str  # empty where the file can be used
    permissions: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    memory_mib: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What `cluster.doctor_facts.gather` saw on a host. Sizes are bytes."""

    python: str
    packages: Mapping[str, str]
    memory_total: int
    memory_available: int
    memory_limit: int | None  # of the control group
    cores: float
    gpus: tuple[Gpu, ...]
    gpu_problem: str
    shm_free: int
    loopback_problem: str
    unreachable: Mapping[str, str]  # address of another host: why
    listeners: tuple[Listener, ...]
    hidden_processes: int  # Ray's, whose sockets could not be looked at
    token: Token
    folders: tuple[Folder, ...]
    inputs: Mapping[str, str]  # path: fingerprint, empty where there is no such file or folder
    environment: Mapping[str, str]  # of the variables that matter
    netrc_permissions: int | None

    @property
    def memory(self) -> int:
        """What processes here can have in all."""
        return min(self.memory_total, self.memory_limit or self.memory_total)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "HostFacts":
        """From the plain values that travel between hosts."""
        values = dict(plain)
        values["gpus"] = tuple(Gpu(**one) for one in values["gpus"])
        values["listeners"] = tuple(Listener(**one) for one in values["listeners"])
        values["token"] = Token(**values["token"])
        values["folders"] = tuple(Folder(**one) for one in values["folders"])
        return cls(**values)
