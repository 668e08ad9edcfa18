"""The shipped examples reach the numbers that they promise: each on its day, or all of them when asked.

An example's head has lines such as `# Expect: summary.reward_final >= 0.5`. A whole example takes minutes, so
a test run takes one of them by the day's date; HEADRACE_EXAMPLES names others (`all`, or names with commas).
"""

import datetime
import json
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"^#   headrace train (examples/\w+\.toml)(.*)$", re.MULTILINE)
COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
EXPECTATION = re.compile(r"^# Expect: summary\.([\w.]+) (>=|<=) (-?[\d.]+)$", re.MULTILINE)


class Expectation(NamedTuple):
    """One number that an example promises."""

    key: str
    comparison: str
    bound: float

    def check(self, summary: dict[str, Any]) -> None:
        """Fails where the summary has no such number, or one on the wrong side of the bound."""
        value: Any = summary
        for part in self.key.split("."):
            value = value[part]
        assert COMPARISONS[self.comparison](value, self.bound), f"{self.key} = {value}, not {self.comparison}"


def expectations(text: str) -> list[Expectation]:
    """What an example's file promises."""
    return [
        Expectation(key, comparison, float(bound)) for key, comparison, bound in EXPECTATION.findall(text)
    ]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands that an example's head says to give: file and further arguments; its own comes last."""
    return [(file, further.split()) for file, further in COMMAND.findall(text)]


EXAMPLES = {
    path.stem: promised
    for path in sorted((ROOT / "examples").glob("*.toml"))
    if (promised := expectations(path.read_text()))
}


def chosen() -> set[str]:
    """The examples of this test run."""
    asked = os.environ.get("HEADRACE_EXAMPLES", "")
    if asked == "all":
        return set(EXAMPLES)
    if asked:
        assert not (unknown := set(asked.split(",")) - set(EXAMPLES)), f"HEADRACE_EXAMPLES: unknown {unknown}"
        return set(asked.split(","))
    day = datetime.datetime.now(datetime.UTC).toordinal()
    return {sorted(EXAMPLES)[day % len(EXAMPLES)]}


def test_what_is_promised_is_read() -> None:
    text = '# About.\n# Expect: summary.reward_final >= 0.5\n# Expect: summary.a.b <= -1\nobjective = "ppo"\n'
    first, second = expectations(text)
    assert first == ("reward_final", ">=", 0.5)
    assert second == ("a.b", "<=", -1.0)
    second.check({"a": {"b": -1.5}})
    with pytest.raises(AssertionError, match=r"a\.b = 0"):
        second.check({"a": {"b": 0}})
    with pytest.raises(KeyError):
        first.check({})


def test_an_examples_own_command_is_the_last_of_its_head() -> None:
    for name in EXAMPLES:
        text = (ROOT / "examples" / f"{name}.toml").read_text()
        assert commands(text)[-1] == (f"examples/{name}.toml", []), name
    assert commands((ROOT / "examples" / "log_ratio.toml").read_text())[0] == (
        "examples/supervised.toml",
        ["--run-dir", "runs/supervised"],
    )


def test_every_line_that_looks_like_a_promise_is_one() -> None:
    for path in (ROOT / "examples").glob("*.toml"):
        text = path.read_text()
        assert text.count("Expect:") == len(expectations(text)), path.name


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_reaches_its_numbers(name: str, tmp_path: Path) -> None:
    if name not in chosen():
        pytest.skip(f"not today; HEADRACE_EXAMPLES={name} runs it")
    run_dir = tmp_path / "run"
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # runs go elsewhere than into the checkout
    for file, further in commands((ROOT / "examples" / f"{name}.toml").read_text()):
        own = [*further, "--run-dir", str(run_dir)] if file == f"examples/{name}.toml" else further
        command = [sys.executable, "-m", "cluster.cli", "train", file, *own]
        done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=850)
        assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    for one in EXAMPLES[name]:
        one.check(summary)
