"""What is installed is what is meant: four packages, each owned by headrace alone."""

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest

PACKAGES = {"actors", "cluster", "learner", "rewards"}
ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_has_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            ROOT,
        ],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("headrace-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sources <= set(names)


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_no_other_distribution_owns_our_names(name: str) -> None:
    assert set(packages_distributions().get(name, [])) <= {"headrace"}
    assert Path(__import__(name).__path__[0]).resolve() == ROOT / name


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    ours = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")} - {"__init__"}
    assert not ours & sys.stdlib_module_names


def test_vllm_finds_the_weight_transfer_backend() -> None:
    plugins = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert plugins["headrace_weight_transfer"] == "actors.weight_transfer:register"
