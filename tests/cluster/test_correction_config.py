"""`[correction]`: what is on by default, and which settings contradict each other."""

import pytest

from cluster.config_file import ConfigError, dump_config, parse_config

CONFIG = """
model.path = "somewhere"
task.kind = "reversal"
[[reward]]
kind = "exact"
"""


def test_token_weights_are_cut_off_at_2_and_all_else_is_off_by_default() -> None:
    correction = parse_config(CONFIG).correction
    assert (correction.ratio, correction.weights, correction.cap) == ("proximal", "tis", 2.0)
    assert (correction.mask, correction.value_target, correction.clip_by_lag) == ("none", "gae", 0.0)
    assert correction.damp_lr_by_ess == "none"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ['correction.ratio="behaviour"'],
            ["correction.weights = 'tis'", "a second time", 'correction.weights to "none"'],
        ),
        (
            ['correction.weights="icepop"', "correction.cap=3.0"],
            [
                "correction.cap = 3.0",
                'correction.weights = "icepop"',
                'set that to "tis"',
                "leave this at 2.0",
            ],
        ),
        (
            ["correction.icepop_high=9.0"],
            ["correction.icepop_high = 9.0", 'correction.weights = "tis"', 'set that to "icepop"'],
        ),
        (
            ["correction.m2_budget=0.1"],
            ["correction.m2_budget = 0.1", 'correction.mask = "none"', 'set that to "m2po"'],
        ),
        (
            ["correction.vtrace_rho=2.0"],
            ["correction.vtrace_rho = 2.0", 'correction.value_target = "gae"', 'set that to "vtrace"'],
        ),
        (
            ['correction.value_target="vtrace"', "correction.vtrace_c=2.0"],
            ["correction.vtrace_c = 2.0", "correction.vtrace_rho = 1.0", "lower it"],
        ),
        (
            ["correction.damp_ess_target=0.5"],
            ["correction.damp_ess_target = 0.5", 'correction.damp_lr_by_ess = "none"', '"sequence"'],
        ),
        (["correction.cap=0.5"], ["correction.cap = 0.5", "greater than or equal to 1"]),
        (["ppo.importance_cap=2.0"], ["ppo.importance_cap"]),
    ],
)
def test_contradictions_name_field_value_and_remedy(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(CONFIG, overrides)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ['correction.ratio="behaviour"', 'correction.weights="none"', 'correction.mask="m2po"'],
        ['correction.weights="sequence"', "correction.cap=8.0", 'correction.damp_lr_by_ess="sequence"'],
    ],
)
def test_a_resolved_configuration_is_accepted_again(overrides: list[str]) -> None:
    config = parse_config(CONFIG, overrides)
    assert parse_config(dump_config(config)) == config
