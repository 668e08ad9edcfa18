"""The paired gain and what an evaluation is made of, against hand-derived numbers."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from actors.records import Completion, Group, Prompt, RewardFailure, Trajectory
from cluster.evaluation import Evaluation, EvaluationError, paired_gain, summarise
from cluster.metrics import lookup


def evaluation(rewards: dict[str, float]) -> Evaluation:
    return Evaluation(0, rewards, [], 0, 0.0, 1.0)


def test_gain_is_the_paired_t_interval() -> None:
    # Differences .1, .2, .3: mean .2, s = .1, half width = t_{.975, 2}·s/√3 = 4.302653·.1/1.732051 = .248414.
    gain = paired_gain(
        evaluation({"a": 0.0, "b": 0.5, "c": 0.2}), evaluation({"a": 0.1, "b": 0.7, "c": 0.5, "d": 9.0})
    )
    assert gain.mean == pytest.approx(0.2)
    assert gain.low == pytest.approx(0.2 - 0.248414, abs=1e-6)
    assert gain.high == pytest.approx(0.2 + 0.248414, abs=1e-6)
    assert gain.prompts == 3


def test_gain_of_one_prompt_has_no_finite_interval() -> None:
    gain = paired_gain(evaluation({"a": 0.0}), evaluation({"a": 1.0}))
    assert (gain.mean, gain.low, gain.high) == (1.0, -math.inf, math.inf)


def test_evaluations_without_a_common_prompt_cannot_be_compared() -> None:
    with pytest.raises(EvaluationError, match="share no prompt"):
        paired_gain(evaluation({"a": 0.0}), evaluation({"b": 1.0}))


def group(name: str, rewards: list[float]) -> Group:
    trajectories = tuple(
        Trajectory(
            Completion((5, 6), (-1.0, -2.0), (3, 3), f"text {reward}", "stop"), reward, {}, (-1.5, -2.0)
        )
        for reward in rewards
    )
    return Group(1, Prompt(name, (1,), f"prompt {name}"), trajectories, "rollout-0", 0.1, 0.1)


def test_summary_averages_within_prompts_and_counts_what_failed() -> None:
    failure = RewardFailure(2, "c", "exact", "raised")
    result = summarise([group("a", [0.0, 1.0]), failure, group("b", [1.0, 1.0])], version=4)
    assert result.rewards == {"a": 0.5, "b": 1.0}
    assert result.mean == 0.75
    assert result.reward_errors == 1
    assert result.kl_per_sequence == pytest.approx(0.5)  # (−1 − 2) − (−1.5 − 2)
    assert result.mean_length == 2
    assert [s.completion for s in result.samples] == ["text 0.0", "text 1.0"]


def test_no_scored_prompt_is_an_error_with_its_cause() -> None:
    with pytest.raises(EvaluationError, match=r"'exact' on prompt c: raised"):
        summarise([RewardFailure(2, "c", "exact", "raised")], version=0)


def test_round_trip(tmp_path: Path) -> None:
    result = summarise([group("a", [0.25])], version=2)
    path = tmp_path / "evaluation.json"
    path.write_text(result.to_json())
    assert Evaluation.load(path) == result


def test_single_rewards_and_estimates_of_kl_and_entropy() -> None:
    # δ = log μ − log π_ref = (.5, 0) for every sample: k1 = .5, k3 = e^(−.5) − 1 + .5 = .106531.
    scored = group("a", [0.0, 1.0])
    trajectories = tuple(
        dataclasses.replace(t, components={"proxy": t.reward, "judge": 3.0 * t.reward, "judge/std": 0.25})
        for t in scored.trajectories
    )
    cut_off = dataclasses.replace(trajectories[1].completion, finish_reason="length")
    trajectories = (trajectories[0], dataclasses.replace(trajectories[1], completion=cut_off))
    result = summarise([dataclasses.replace(scored, trajectories=trajectories)], version=4)
    assert result.components == {"proxy": {"a": 0.5}, "judge": {"a": 1.5}, "judge/std": {"a": 0.25}}
    assert result.kl_k3 == pytest.approx(0.106531, abs=1e-6)
    assert result.entropy == pytest.approx(1.5)  # −mean of −1 and −2
    assert result.finished_fraction == 0.5
    row = result.metrics(["judge"])
    assert (row["heldout/judge"], row["heldout/judge/std"]) == (1.5, 0.25)
    assert row["heldout/reward/proxy"] == 0.5
    assert (row["heldout/kl_sequence"], row["heldout/finished_fraction"]) == (pytest.approx(0.5), 0.5)
    assert "heldout/judge_ci95" not in row  # of one prompt there is none
    assert all(lookup(name) for name in row)


def test_standard_deviations_are_over_responses() -> None:
    # Two judges, whose mean is the held-out reward; the last response lacks one of them.
    scored = group("a", [1.0, 2.0, 6.0])
    judged = ({"judge": 1.0, "twin": 3.0}, {"judge": 5.0, "twin": 3.0}, {"judge": 9.0})
    trajectories = tuple(
        dataclasses.replace(t, components=one) for t, one in zip(scored.trajectories, judged, strict=True)
    )
    groups = [dataclasses.replace(scored, trajectories=trajectories), group("b", [3.0])]
    result = summarise(groups, version=4, heldout_rewards=["judge", "twin"])
    # 1, 2, 6, 3 have mean 3: √((4 + 1 + 9 + 0)/3). (1 + 3)/2 = 2 and (5 + 3)/2 = 4 have mean 3: √(1 + 1).
    assert result.reward_std == pytest.approx(math.sqrt(14 / 3))
    assert result.heldout_std == pytest.approx(math.sqrt(2))
    alone = summarise([group("a", [0.25])], version=2)
    assert (alone.reward_std, alone.heldout_std) == (None, None)


def test_an_evaluation_of_an_earlier_version_can_be_read(tmp_path: Path) -> None:
    fields = json.loads(summarise([group("a", [0.25])], version=2).to_json())
    for name in ("components", "kl_k3", "entropy", "finished_fraction", "reward_std", "heldout_std"):
        del fields[name]
    (tmp_path / "old.json").write_text(json.dumps(fields))
    old = Evaluation.load(tmp_path / "old.json")
    assert old.mean == 0.25
    assert old.metrics().keys() == {
        *("heldout/reward", "heldout/kl_sequence", "heldout/response_tokens", "heldout/reward_errors")
    }
