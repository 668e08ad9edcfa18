"""Rewards in their roles: what is summed, what only evaluations ask, what a batch is, what is refused."""

from collections.abc import Sequence
from typing import Any

import pytest

from rewards.base import RewardError, RewardRequest, Score
from rewards.build import check_rewards
from rewards.combined import CombinedReward, Part
from rewards.roles import roles_of
from rewards.settings import RewardSettings, TaskSettings


class Recorder:
    """Scores 1 for each letter, fails on "bad", and remembers its calls."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.calls: list[list[str]] = []
        self.closed = False

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        self.calls.append([request.completion for request in requests])
        return [
            RewardError(self.label, "no") if r.completion == "bad" else Score(len(r.completion), {"x": 1.0})
            for r in requests
        ]

    def close(self) -> None:
        self.closed = True


def requests(*texts: str) -> list[RewardRequest]:
    return [RewardRequest("p", text, {}, True) for text in texts]


def test_who_is_asked_in_which_call_and_what_is_summed() -> None:
    alone, model, judge = Recorder("alone"), Recorder("model"), Recorder("judge")
    reward = CombinedReward(
        [
            Part(1.0, alone),
            Part(2.0, model, together=True),
            Part(1.0, judge, evaluate=True, together=True),
        ]
    )
    groups = [requests("a", "bb"), requests("ccc"), requests("bad", "dd")]
    first, second, third = reward.score_groups(groups, [False, True, True])
    assert alone.calls == [["a", "bb"], ["ccc"], ["bad", "dd"]]  # a group in a call, for it may hang
    assert model.calls == [["a", "bb", "ccc", "dd"]]  # one batch, without what has failed already
    assert judge.calls == [["ccc", "dd"]]  # the first group belongs to no evaluation
    # The sum: 1·length + 2·length; the judge adds nothing.
    assert first.answers == [
        Score(3.0, {"alone": 1.0, "alone/x": 1.0, "model": 1.0, "model/x": 1.0}),
        Score(6.0, {"alone": 2.0, "alone/x": 1.0, "model": 2.0, "model/x": 1.0}),
    ]
    assert isinstance(second.answers[0], Score)
    assert (second.answers[0].value, second.answers[0].components["judge"]) == (9.0, 3.0)
    assert isinstance(third.answers[0], RewardError)
    assert isinstance(third.answers[1], Score)
    reward.close()
    assert alone.closed
    assert judge.closed


def test_time_is_shared_by_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 6.0, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("rewards.combined.time.monotonic", lambda: next(moments))
    reward = CombinedReward([Part(1.0, Recorder("model"), together=True), Part(1.0, Recorder("alone"))])
    first, second = reward.score_groups([requests("a", "b"), requests("c")], [False, False])
    # The batch of three took 6 s: 4 for the first group and 2 for the second. Then 2 s and 1 s alone.
    assert (first.seconds, second.seconds) == (pytest.approx(4.0 + 2.0), pytest.approx(2.0 + 1.0))


def table(**values: Any) -> RewardSettings:
    return RewardSettings(**{"kind": "exact", **values})


def test_which_reward_plays_which_part() -> None:
    model = {"kind": "model", "path": "x"}
    found = roles_of(
        [
            table(**model, name="proxy"),
            table(name="format"),
            table(**model, name="judge", role="evaluate"),
            table(kind="task", name="truth", role="evaluate"),
            table(kind="function", name="rater", function="a:b", role="evaluate"),
        ]
    )
    assert found.evaluated == ("judge", "truth", "rater")
    assert found.gold == "truth"
    assert found.heldout == ("judge",)  # models, where there are any
    assert found.models == ("proxy",)
    # Without a model another reward that stands by is the held-out one, but never the gold reward.
    assert roles_of([table(), table(name="b", role="evaluate")]).heldout == ("b",)
    assert roles_of([table(), table(name="gold", role="evaluate")]).heldout == ()
    assert roles_of([table(kind="task")]).gold == ""  # it is trained on, so it is the proxy


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([table(role="evaluate")], 'reward.role = "evaluate" in every'),
        ([table(), table(name="b", role="evaluate", weight=2.0)], "reward.weight = 2 of 'b' has no effect"),
        ([table(), table(name="entropy", role="evaluate")], "'entropy'"),
        ([table(), table(name="x_ci95", role="evaluate")], "'x_ci95'"),
        ([table(path="folder")], "reward.path = 'folder' of 'exact' has no effect with kind = 'exact'"),
        ([table(kind="model")], "reward.path of 'model' is missing"),
    ],
)
def test_settings_that_contradict_themselves(tables: list[RewardSettings], words: str) -> None:
    with pytest.raises(ValueError, match="reward") as caught:
        check_rewards(tables, TaskSettings(kind="reversal"))
    assert words in str(caught.value)
