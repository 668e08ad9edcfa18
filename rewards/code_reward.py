"""A reward that runs the program in a completion against the row's tests, in the sandbox.

    1. share     passed tests / tests            (or 1 only if all passed, with `all_or_nothing`)
    2. 0         no program, one that does not run, or one that wrote answers of its own
    3. an error  tests that cannot be used, or a sandbox that broke down: never the program's doing

A program that ends or is stopped early keeps the tests that it had passed by then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.base import RewardError, RewardRequest, Score
from rewards.code_tests import cases_of, entry_point_of, judge, program_of
from rewards.sandbox import Outcome, Sandbox, SandboxError, SandboxLimits

MAX_PROGRAM = 1 << 16  # characters


@dataclass(frozen=True, slots=True)
class CodeSettings:
    """How rows are read and programs scored."""

    tests_column: str = "tests"
    entry_point: str = ""
    all_or_nothing: bool = False


class CodeReward:
    """One sandbox serves one reward, one completion after another."""

    def __init__(self, label: str, settings: CodeSettings, limits: SandboxLimits) -> None:
        """Start the sandbox once, so that a machine that cannot do it is refused now, with the remedy."""
        self.label = label
        self._settings = settings
        self._sandbox = Sandbox(limits)
        try:
            self._sandbox.start()
        except SandboxError as error:
            raise ValueError(
                f'reward.kind = "code" of {label!r} cannot be used on this host: {error}'
            ) from error

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request."""
        results: list[Score | RewardError] = []
        for request in requests:
            try:
                results.append(self.score_one(request))
            except (ValueError, SandboxError) as error:
                results.append(RewardError(self.label, str(error)))
        return results

    def score_one(self, request: RewardRequest) -> Score:
        """Run one program; ValueError means that the row cannot be graded."""
        cases = cases_of(request.row, self._settings.tests_column)
        entry_point = entry_point_of(request.row, self._settings.entry_point)
        program = program_of(request.completion, request.finished, entry_point)
        if program is None or not program.strip() or len(program) > MAX_PROGRAM:
            return self._score(0.0, None, readable=True)
        outcome = self._sandbox.run(
            program, entry_point=entry_point, calls=[case.arguments for case in cases]
        )
        verdict = judge(cases, outcome.answers)
        return self._score(verdict.passed / len(cases), outcome, readable=verdict.readable)

    def _score(self, share: float, outcome: Outcome | None, *, readable: bool) -> Score:
        """The reward, and beside it what happened to the program, as shares of 0 or 1."""
        reason = outcome.reason if outcome else "none"
        components = {
            "all_passed": float(share == 1.0),
            "ran": float(reason == "ok"),
            "stopped": float(reason in ("timeout", "memory", "output", "killed")),
            "wrote_own_answers": float(not readable),
        }
        value = components["all_passed"] if self._settings.all_or_nothing else share
        return Score(value, components)

    def close(self) -> None:
        """Kill the sandbox."""
        self._sandbox.close()
