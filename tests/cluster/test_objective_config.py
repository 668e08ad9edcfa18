"""`objective`: what each sets, what it refuses, and when the KL penalty is warned of."""

import pytest

from cluster.config import JobConfig
from cluster.config_file import ConfigError, dump_config, parse_config
from cluster.objective_rules import lag_warning, penalty_warning
from learner.presets import PRESETS
from learner.settings import PPOSettings

CONFIG = """
task.kind = "reversal"
model.scratch.layers = 4
[[reward]]
kind = "task"
"""


def job(objective: str, *overrides: str) -> JobConfig:
    return parse_config(CONFIG, [f'objective="{objective}"', *overrides])


def test_ppo_is_what_the_settings_say_by_themselves() -> None:
    assert parse_config(CONFIG).objective == "ppo"
    assert parse_config(CONFIG).ppo == PPOSettings()


@pytest.mark.parametrize("objective", PRESETS)
def test_an_objective_sets_what_is_left_out_and_the_resolved_file_shows_it(objective: str) -> None:
    config = job(objective)
    for table, values in PRESETS[objective].items():
        for name, value in values.items():
            assert getattr(getattr(config, table), name) == value
    assert config.ppo.has_values == (objective == "ppo")
    resolved = dump_config(config)
    assert f'advantage = "{config.ppo.advantage}"' in resolved
    assert parse_config(resolved) == config


def test_by_hand_what_the_papers_say() -> None:
    grpo = job("grpo").ppo
    assert (grpo.advantage, grpo.aggregation, grpo.kl_in, grpo.kl_estimator, grpo.kl_coef, grpo.clip) == (
        *("group_std", "sequence_mean", "loss", "k3", 0.04, 0.2),
    )
    dapo = job("dapo")
    assert (dapo.ppo.clip, dapo.ppo.clip_high, dapo.ppo.aggregation, dapo.ppo.kl_coef) == (
        *(0.2, 0.28, "token_mean", 0.0),
    )
    assert dapo.rollout.dynamic_sampling
    gspo = job("gspo").ppo
    assert (gspo.surrogate, gspo.clip, gspo.clip_high) == ("geometric_clip", 3e-4, 4e-4)
    assert job("rloo").ppo.advantage == "leave_one_out"
    assert job("dr_grpo").ppo.aggregation == "constant"
    assert job("reinforce++").ppo.whiten_advantages
    assert job("cispo").ppo.surrogate == "cispo"


def test_what_the_user_sets_stays() -> None:
    config = job("dapo", "ppo.clip_high=0.4", "ppo.kl_coef=0.01", "rollout.dynamic_sampling=false")
    assert (config.ppo.clip_high, config.ppo.kl_coef, config.ppo.clip) == (0.4, 0.01, 0.2)
    assert not config.rollout.dynamic_sampling
    # REINFORCE++ with the group's mean as baseline.
    assert job("reinforce++", 'ppo.advantage="group_mean"').ppo.whiten_advantages


@pytest.mark.parametrize(
    ("objective", "overrides", "parts"),
    [
        ("grpo", ["ppo.gae_lambda=0.9"], ["ppo.gae_lambda = 0.9", '"group_std"', "leave this at 0.95"]),
        ("grpo", ["ppo.gamma=0.9"], ["ppo.gamma = 0.9", '"grpo"', "leave this at 1.0"]),
        ("rloo", ["ppo.value_coef=0.5"], ["ppo.value_coef = 0.5", 'ppo.value_model = "none"']),
        ("rloo", ["ppo.clip_value=0.0"], ["ppo.clip_value = 0.0", "leave this at 0.2"]),
        ("rloo", ["ppo.group_epsilon=0.1"], ["ppo.group_epsilon = 0.1", '"leave_one_out"']),
        ("dapo", ["ppo.whiten_rewards=true"], ["ppo.whiten_rewards = True", "leave this at false"]),
        ("cispo", ["ppo.dual_clip=3.0"], ["ppo.dual_clip = 3.0", 'ppo.surrogate = "cispo"']),
        ("grpo", ['ppo.value_model="head"'], ["ppo.value_model = 'head'", 'set it to "none"']),
        ("ppo", ['ppo.value_model="none"'], ["ppo.value_model = 'none'", 'set it to "head" or "critic"']),
        ("ppo", ['ppo.advantage="group_mean"'], ["ppo.value_model = 'head'", 'set it to "none"']),
        ("gspo", ["optimizer.critic_lr=0.1"], ["optimizer.critic_lr = 0.1", "leave it out"]),
        ("gspo", ['model.critic="x"'], ["model.critic", 'ppo.value_model is "none"']),
        ("grpo", ['correction.value_target="vtrace"'], ["correction.value_target = 'vtrace'", '"gae"']),
        ("rloo", ["rollout.group_size=1"], ["rollout.group_size = 1", "set it to 2 or more"]),
        ("grpo", ["ppo.overlong_penalty=2.0"], ["ppo.overlong_penalty = 2.0", "ppo.overlong_fraction"]),
        ("grpo", ["ppo.clip=1.5"], ["ppo.clip = 1.5", "less than or equal to 1"]),
        ("ppg", [], ["'ppg'", "no such objective", "dr_grpo"]),
    ],
)
def test_what_an_objective_cannot_use_is_refused(
    objective: str, overrides: list[str], parts: list[str]
) -> None:
    from cluster.config_file import parse_job

    with pytest.raises(ConfigError) as caught:
        parse_job(CONFIG, [f'objective="{objective}"', *overrides])
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_table_of_the_wrong_kind_is_refused_as_ever() -> None:
    with pytest.raises(ConfigError, match="ppo = 3"):
        job("grpo", "ppo=3")


def test_a_penalty_whose_gradient_is_another_is_warned_of() -> None:
    warning = penalty_warning(job("grpo").ppo)
    assert warning is not None
    assert "KL(π_ref‖π)" in warning
    assert 'ppo.kl_in = "loss"' in warning
    silent = (
        ("ppo", []),
        ("rloo", []),
        ("grpo", ["ppo.kl_coef=0"]),
        ("grpo", ['ppo.kl_in="reward"', 'ppo.kl_estimator="k1"']),
    )
    for objective, overrides in silent:
        assert penalty_warning(job(objective, *overrides).ppo) is None
    for place, kind, said in (
        ("reward", "k2", "second order"),
        ("reward", "k3", "less, at each token, that of KL(π_ref‖π)"),
        ("loss", "k1", "expected gradient is 0"),
        ("loss", "k2", "for one token"),
    ):
        found = penalty_warning(PPOSettings(kl_in=place, kl_estimator=kind))
        assert found is not None
        assert said in found


def test_a_wide_fixed_window_is_warned_of_where_nothing_holds_the_learner() -> None:
    config = job("ppo", "scheduler.window=8")
    warning = lag_warning(config.correction, config.scheduler.window)
    assert warning is not None
    assert "scheduler.window = 8" in warning
    for overrides in (
        ["scheduler.window=2"],
        ['scheduler.window="adaptive"'],
        ["scheduler.window=8", 'correction.ratio="behaviour"', 'correction.weights="none"'],
    ):
        config = job("ppo", *overrides)
        assert lag_warning(config.correction, config.scheduler.window) is None
