"""Every configuration that is refused says field, value and remedy; every shipped one parses."""

from pathlib import Path

import pytest

from cluster.config_document import document
from cluster.config_file import ConfigError, dump_config, load_job, parse_config, parse_job
from cluster.demo_stages import PPO, Plan

GOOD = """
[model.scratch]
[task]
kind = "reversal"
[[reward]]
kind = "task"
"""
ROOT = Path(__file__).resolve().parents[2]


def test_defaults_are_consistent_and_survive_a_round_trip() -> None:
    config = parse_config(GOOD)
    assert config.groups_per_step == config.run.batch_size // config.rollout.group_size
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.toml")), ids=lambda path: path.name)
def test_every_shipped_configuration_parses(path: Path) -> None:
    load_job(path)


def test_fewer_actors_at_most_than_from_the_start_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.max_actors = 1 is below rollout\.actors = 2"):
        parse_config(GOOD, ["rollout.actors=2", "rollout.max_actors=1"])
    assert parse_config(GOOD, ["rollout.actors=2", "rollout.max_actors=2"]).rollout.max_actors == 2


def test_the_demo_configurations_parse() -> None:
    plan = Plan(Path("run"), seed=3, pairs=100, length_bias=0.0)
    jobs = {stage: parse_job(text) for stage, text in plan.configurations(Path("policy")).items()}
    assert {stage: job.objective for stage, job in jobs.items()} == {
        "imitation": "supervised",
        "reward-model": "reward_model",
        "heldout-reward-model": "reward_model",
        PPO: "ppo",
    }
    assert all(job.run.seed == 3 for job in jobs.values())


def test_overrides_reach_tables_lists_and_plain_text() -> None:
    config = parse_config(
        GOOD, ["run.steps=7", "reward.0.weight=2.5", "run.name=abc", "optimizer.betas=[0.8, 0.9]"]
    )
    assert (config.run.steps, config.reward[0].weight, config.run.name) == (7, 2.5, "abc")
    assert config.optimizer.betas == [0.8, 0.9]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.group_sise=8", ["rollout.group_sise", "no such setting", "'group_size'"]),
        ("nonsense.x=1", ["nonsense", "no such setting", "remove it"]),
        ("run.steps=ten", ["run.steps", "'ten'", "integer"]),
        ("run.steps=1.5", ["run.steps", "1.5", "integer"]),
        ("run.steps=true", ["run.steps", "True", "integer"]),
        ("run.steps=0", ["run.steps", "0", "greater than or equal to 1"]),
        ("rollout.temperature=0", ["rollout.temperature", "greater than 0"]),
        ("learner.zero_stage=4", ["learner.zero_stage", "4", "0, 1, 2 or 3"]),
        ("rollout.group_size=7", ["run.batch_size = 256", "rollout.group_size = 7", "252 or 259"]),
        ("ppo.minibatches=3", ["ppo.minibatches = 3", "does not divide", "256"]),
        ("rollout.max_new_tokens=128", ["rollout.max_new_tokens = 128", "128 tokens", "lower it"]),
        ("model.max_length=4096", ["model.max_length = 4096", "model.scratch.max_length"]),
        ("model.path=somewhere", ["model.path = 'somewhere'", "exactly one"]),
        ("model.scratch.heads=3", ["model.scratch.heads = 3", "128", "heads = 2"]),
        ("data.train=rows.jsonl", ["data = 'rows.jsonl'", "exactly one of [data]", "[task]"]),
        ("reward=[]", ["reward", "at least 1 item"]),
        ("learner.cpu_offload=true", ["learner.cpu_offload = True", "zero_stage 2 or 3"]),
        ('model.critic="elsewhere"', ["model.critic", 'ppo.value_model is "head"']),
        ("run.name=../../etc", ["run.name", "'../../etc'", "pattern"]),
        ("warmup.steps=5 task.demonstrations=0", []),
        (
            "warmup.steps=0 warmup.data=d.jsonl",
            ["warmup.data = 'd.jsonl'", "warmup.steps = 0", "leave it out"],
        ),
        ("model.revision=main", ["model.revision = 'main'", "[model.scratch]", "leave it out"]),
        ("reward.0.weight=nan", ["reward.0.weight = nan", "finite number"]),
        ("sync.timeout_s=inf", ["sync.timeout_s = inf", "finite number"]),
        ("cluster.object_store_gib=5000", ["cluster.object_store_gib = 5000", "1024"]),
    ],
)
def test_a_refusal_names_field_value_and_remedy(override: str, said: list[str]) -> None:
    if not said:  # two settings at once
        said = ["warmup.steps = 5", "demonstrations", "warmup.data"]
    with pytest.raises(ConfigError) as refused:
        parse_config(GOOD, override.split(), source="job.toml")
    assert str(refused.value).startswith("job.toml: ")
    for part in said:
        assert part in str(refused.value)


def test_a_group_may_take_as_long_as_its_completions() -> None:
    children = "".join(f'[[reward]]\nkind = "regex"\nname = "{name}"\npattern = "x"\n' for name in "ab")
    # 8 completions · 10 s · 2 rewards in child processes = 160 s; the task's own reward takes none.
    parse_config(GOOD + children, ["scoring.timeout_s=160"])
    with pytest.raises(ConfigError, match=r"scoring\.timeout_s = 159.*set it to 160 or more"):
        parse_config(GOOD + children, ["scoring.timeout_s=159"])


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward.name = 'task' is used twice; give each"):
        parse_config(GOOD + '[[reward]]\nkind = "task"\n')


def test_ipc_weights_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sync\.backend = 'nccl'.*\"shared\""):
        parse_config(GOOD, ["learner.device=cpu", "sync.backend=nccl"])


@pytest.mark.parametrize("override", ["steps", "=3", "run.=3", ".run=3"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parse_config(GOOD, [override])


def test_overrides_into_lists_need_an_index_that_exists() -> None:
    with pytest.raises(ConfigError, match="index below 1"):
        parse_config(GOOD, ["reward.1.weight=2"])
    with pytest.raises(ConfigError, match="not a table"):
        parse_config(GOOD, ["task.kind.x=2"])


def test_missing_file_and_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_job(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_job(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path / "bytes.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path)


def test_the_documentation_is_what_the_code_says() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == document(), "run python -m cluster.config_document"


JUDGED = """
[[reward]]
kind = "model"
name = "judge"
path = "x"
role = "evaluate"
"""


@pytest.mark.parametrize("rule", ["heldout_decline", "normalised_gap"])
def test_a_stop_rule_needs_something_to_look_at(rule: str) -> None:
    wanted = [f'stop.{rule}="stop"', "run.evaluate_every=5"]
    with pytest.raises(ConfigError, match=rf"stop\.{rule} = 'stop' needs a held-out reward"):
        parse_config(GOOD, wanted)
    with pytest.raises(ConfigError, match=rf'leaves nothing to look at for stop\.{rule} = "stop"'):
        parse_config(GOOD + JUDGED, wanted[:1])
    assert getattr(parse_config(GOOD + JUDGED, wanted).stop, rule) == "stop"


def test_disagreement_needs_a_reward_model_that_is_trained_on() -> None:
    with pytest.raises(ConfigError, match=r"stop\.disagreement = 'stop' needs an ensemble"):
        parse_config(GOOD + JUDGED, ['stop.disagreement="stop"', "run.evaluate_every=5"])
