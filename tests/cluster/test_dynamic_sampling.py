"""Groups with one reward for all their samples: left out, replaced, counted; the end of a hopeless run."""

from collections import Counter

import pytest
from controller_helpers import World

from cluster.config_file import ConfigError, parse_config
from cluster.dynamic_sampling import NothingToLearnError, all_equal

ON = "rollout.dynamic_sampling=true"


def number(prompt: str) -> int:
    return int(prompt.removeprefix("p"))


def test_equal_is_exact() -> None:
    assert all_equal([0.5, 0.5])
    assert not all_equal([0.5, 0.5 + 1e-15])


@pytest.mark.parametrize("window", [0, 1, 3])
def test_other_prompts_take_the_place_of_groups_that_teach_nothing(window: int) -> None:
    world = World(ON, window=window)
    # Two of three prompts are all right or all wrong; of the others the first sample alone has a reward.
    world.reward = lambda prompt, i: (
        float(i == 0) if number(prompt) % 3 == 0 else float(number(prompt) % 3 == 1)
    )
    world.run()
    totals = world.controller.totals
    assert all(number(prompt) % 3 == 0 for prompt in world.trained)
    assert Counter(world.trained).most_common(1)[0][1] == 1
    assert len(world.trained) == totals.groups_trained == 24
    # Nothing is lost: what was handed out was trained on or left out, and no group had an error.
    assert totals.groups_dispatched == 24 + totals.groups_left_out == totals.groups_sampled
    assert totals.groups_left_out > 24  # two of three
    assert totals.groups_dropped == 0
    assert max(report.row["lag/max"] for report in world.reports) <= window
    counted = [report.row["dynamic/groups_left_out"] for report in world.reports]
    assert counted == sorted(counted)
    shares = [report.row.get("dynamic/kept_fraction") for report in world.reports]
    assert all(share is None or 0 <= share <= 1 for share in shares)


def test_the_kept_share_is_that_since_the_last_step() -> None:
    world = World(ON, window=0, actors=1)  # synchronous: a step's groups are judged before it, none beyond
    world.reward = lambda prompt, i: float(i == 0 and number(prompt) % 2 == 0)
    world.run()
    judged = 0
    for report in world.reports:
        share = report.row["dynamic/kept_fraction"]
        judged += round(2 / share)  # P = 2 groups were kept, of 2/share that were judged
    assert judged == world.controller.totals.groups_sampled


def test_all_groups_are_trained_on_without_it() -> None:
    world = World()
    world.run()  # every reward is 1
    assert world.controller.totals.groups_left_out == 0
    assert "dynamic/groups_left_out" not in world.reports[-1].row


def test_a_run_with_nothing_to_learn_from_ends_with_the_reason() -> None:
    world = World(ON, "rollout.dynamic_limit=20")
    with pytest.raises(
        NothingToLearnError, match=r"last 20 groups.*dynamic_limit = 20.*prompt p\d+: 1 for each"
    ):
        world.run()
    assert world.trained == []


def test_only_groups_in_a_row_count_to_the_limit() -> None:
    world = World(ON, "rollout.dynamic_limit=10", actors=1, window=0)
    left_out: list[int] = []

    def reward(prompt: str, sample: int) -> float:
        """Nine of ten groups in the order of scoring are alike."""
        if sample == 0:
            left_out.append(1)
        return float(sample == 0 and len(left_out) % 10 == 0)

    world.reward = reward
    world.run()
    assert len(world.trained) == 24
    assert world.controller.totals.groups_left_out >= 9 * 24 - 9


GOOD = """
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
name = "gold"
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([ON, "rollout.group_size=1"], r"rollout\.dynamic_sampling = True .*set rollout\.group_size to 2"),
        (["rollout.dynamic_limit=9"], r"rollout\.dynamic_limit = 9 has no effect"),
        (
            ["run.pass_threshold=1", 'run.pass_reward="x"'],
            r"pass_reward = 'x' names no .*use one of gold",
        ),
        (["run.evaluate_pauses=true"], r"run\.evaluate_pauses = True has no effect"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(GOOD, overrides)


def test_settings_that_go_together_are_taken() -> None:
    config = parse_config(
        GOOD, [ON, "run.pass_threshold=1", 'run.pass_reward="gold"', "run.evaluate_samples=4"]
    )
    assert config.rollout.dynamic_sampling
    assert (config.run.pass_threshold, config.run.pass_reward) == (1.0, "gold")
