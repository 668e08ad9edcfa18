"""The shipped examples reach the numbers that they promise: each on its day, or all of them when asked.

An example's head has its commands, and lines such as `# Expect: summary.reward_final >= 0.5`, of the run's
summary, or `# Expect: best.score >= 0.9`, of the mean of that column over the rows of `runs/best.jsonl`. A
whole example takes minutes, so a test run takes one of them by the day's date; HEADRACE_EXAMPLES names others
(`all`, or names with commas).
"""

import datetime
import json
import operator
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"^#   headrace (train|generate|evaluate)((?: .*)?)$", re.MULTILINE)
COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
EXPECTATION = re.compile(r"^# Expect: ([\w.]+) (>=|<=) (-?[\d.]+)$", re.MULTILINE)
LIMIT_S = 850  # of one command, on a machine that does other things beside


class Expectation(NamedTuple):
    """One number that an example promises."""

    key: str
    comparison: str
    bound: float

    def check(self, found: Mapping[str, Any]) -> None:
        """Fails where there is no such number, or one on the wrong side of the bound."""
        value: Any = found
        for part in self.key.split("."):
            value = value[part]
        assert COMPARISONS[self.comparison](value, self.bound), f"{self.key} = {value}, not {self.comparison}"


def expectations(text: str) -> list[Expectation]:
    """What an example's file promises."""
    return [
        Expectation(key, comparison, float(bound)) for key, comparison, bound in EXPECTATION.findall(text)
    ]


def commands(text: str) -> list[list[str]]:
    """The commands that an example's head says to give, in their order."""
    return [[command, *words.split()] for command, words in COMMAND.findall(text)]


def results(folder: Path, run_dir: Path) -> dict[str, Any]:
    """What the commands left: the run's summary, and the means of each file of responses."""
    found: dict[str, Any] = {
        path.stem: {"score": statistics.fmean(json.loads(line)["score"] for line in path.open())}
        for path in folder.glob("runs/*.jsonl")
    }
    if (run_dir / "summary.json").exists():
        found["summary"] = json.loads((run_dir / "summary.json").read_text())
    return found


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
    text = '# About.\n# Expect: summary.reward_final >= 0.5\n# Expect: a.b <= -1\nobjective = "ppo"\n'
    first, second = expectations(text)
    assert first == ("summary.reward_final", ">=", 0.5)
    assert second == ("a.b", "<=", -1.0)
    second.check({"a": {"b": -1.5}})
    with pytest.raises(AssertionError, match=r"a\.b = 0"):
        second.check({"a": {"b": 0}})
    with pytest.raises(KeyError):
        first.check({})


def test_the_last_command_of_an_examples_head_is_its_own() -> None:
    for name in EXAMPLES:
        last = commands((ROOT / "examples" / f"{name}.toml").read_text())[-1]
        assert f"examples/{name}.toml" in last, name
        assert last[0] != "train" or last[1:] == [f"examples/{name}.toml"], name
    first = commands((ROOT / "examples" / "log_ratio.toml").read_text())[0]
    assert first == ["train", "examples/supervised.toml", "--run-dir", "runs/supervised"]


def test_results_are_the_summary_and_means_of_responses(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best.jsonl").write_text('{"score": 1.0}\n{"score": 0.0}\n')
    assert results(tmp_path, tmp_path / "none") == {"best": {"score": 0.5}}
    (tmp_path / "summary.json").write_text('{"reward_gain": 2}')
    assert results(tmp_path, tmp_path)["summary"] == {"reward_gain": 2}


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
    for words in commands((ROOT / "examples" / f"{name}.toml").read_text()):
        own = ["--run-dir", str(run_dir)] if words == ["train", f"examples/{name}.toml"] else []
        command = [sys.executable, "-m", "cluster.cli", *words, *own]
        done = subprocess.run(
            command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path, run_dir)
    for one in EXAMPLES[name]:
        one.check(found)
