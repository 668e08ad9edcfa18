"""`headrace generate` and `headrace evaluate`: what they ask, refuse, choose, write, and go on with."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_reward_model import save_reward_model

from actors.records import Completion, Prompt, SampledGroup
from cluster.cli import _parser, main
from cluster.data_files import Quarantine
from cluster.generation.against import compare, prompt_key, read_baseline
from cluster.generation.commands import run_generate
from cluster.generation.evaluation import PromptSamples, estimate, evaluate_samples
from cluster.generation.figure import draw_evaluation
from cluster.generation.guides import reward_guide, value_guide
from cluster.generation.output import Output
from cluster.generation.policy import open_policy, read_prompts
from cluster.generation.responses import choose, response_lines
from cluster.generation.settings import Strategy, read_settings, strategy_of, temperature_of
from cluster.remote import WorkerFailedError
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings
from rewards.base import Score

ALPHABET = "abcdefghij=:"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ScratchSettings(hidden_size=64, layers=1, heads=2, max_length=32)
    return build_scratch_model(settings, ALPHABET, tmp_path_factory.mktemp("policy") / "model", seed=0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "ab=", "answer": "ba"}, {"prompt": "cde=", "answer": "edc"}, {"prompt": "ab="}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def options(tmp_path: Path, policy: Path, prompts: Path) -> Callable[..., Any]:
    def parsed(*more: object, command: str = "generate") -> Any:
        out = tmp_path / "out.jsonl"
        arguments = [command, "--policy", policy, "--prompts", prompts, "--out", out, *more]
        return _parser().parse_args([str(one) for one in arguments])

    return parsed


# --- Settings --------------------------------------------------------------------------------------------


def test_a_strategy_has_its_options_and_no_others(options: Callable[..., Any]) -> None:
    assert strategy_of(options()) == Strategy("sample", 1)
    assert strategy_of(options("--strategy", "best-of-n", "--samples", 3)).group_size == 48
    soft = strategy_of(options("--strategy", "soft-best-of-n", "--n", 4, "--soft-temperature", 0.5))
    assert (soft.n, soft.soft_temperature, soft.guidance) == (4, 0.5, None)
    guided = strategy_of(options("--strategy", "value-guided", "--guidance-weight", -2)).guidance
    assert guided is not None
    assert (guided.top_k, guided.weight) == (8, -2.0)
    refused = [
        (("--n", 4), "--n 4 has no effect with --strategy sample.*use best-of-n or soft-best-of-n"),
        (("--strategy", "best-of-n", "--top-k", 4), "--top-k 4 has no effect"),
        (("--strategy", "best-of-n", "--value", "x"), "--value x has no effect"),
        (("--strategy", "best-of-n", "--n", 0), "--n 0: give 1 or more"),
        (("--samples", 0), "--samples 0: give 1 or more"),
        (
            ("--strategy", "soft-best-of-n", "--soft-temperature", 0),
            "--soft-temperature 0: give a number above 0",
        ),
        (("--strategy", "reward-guided", "--guidance-weight", "nan"), "give a finite number"),
        (("--strategy", "reward-guided", "--top-k", 0), "--top-k 0: give 1 or more"),
    ]
    for more, message in refused:
        with pytest.raises(ValueError, match=message):
            strategy_of(options(*more))


def test_rewards_come_from_options_and_from_a_jobs_file(tmp_path: Path, options: Callable[..., Any]) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        'objective = "grpo"\n[model]\npath = "elsewhere"\n[task]\nkind = "reversal"\nlength = 5\n'
        "[rollout]\ngroup_size = 4\ntemperature = 0.5\n[scoring]\nmissing_eos_penalty = 0.25\n"
        '[[reward]]\nkind = "task"\nweight = 2.0\n[run]\nsteps = 7\n',
        encoding="utf-8",
    )
    config, judges = read_settings(
        options("--config", job, "--reward", "exact", "--reward", "exact", "--set", "reward.1.weight=0.5"), 6
    )
    assert [(one.label, one.weight) for one in judges.reward] == [
        ("task", 2.0),
        ("exact", 0.5),
        ("exact-2", 1.0),
    ]
    assert judges.task is not None
    assert judges.task.length == 5
    assert judges.scoring.missing_eos_penalty == 0.25
    assert (config.rollout.group_size, config.rollout.temperature, config.run.batch_size) == (6, 0.5, 6)
    assert temperature_of(options("--config", job), config, 6) == 0.5
    assert temperature_of(options("--temperature", 0), config, 1) == 0
    both = ("--reward", "exact", "--gold", "task:coverage")
    _, judges = read_settings(options(*both, command="evaluate"), 1)
    assert [(one.label, one.role) for one in judges.reward] == [("exact", "train"), ("gold", "evaluate")]
    assert [one.label for one in judges.trained] == ["exact"]
    with pytest.raises(ValueError, match="only judges what others choose"):
        read_settings(options("--gold", "task:coverage", command="evaluate"), 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--reward", "nonsense"), "--reward 'nonsense': use exact, numeric, task:KIND"),
        (("--reward", "missing.py:f"), r"reward\.function = 'missing.py:f': there is no file"),
        (("--reward-model", "nowhere"), "it has no reward.json"),
        (("--set", "rollout.max_new_token=3"), "did you mean 'max_new_tokens'"),
        (("--config", "nowhere.toml"), "--config nowhere.toml: cannot be read"),
        (("--strategy", "best-of-n"), "chooses by a reward, and there is none"),
        (("--strategy", "value-guided"), "there is no value_head.safetensors"),
        (("--samples", "3", "--temperature", "0"), "--temperature 0 gives the same response each time"),
        (("--temperature", "-1"), "--temperature -1: give 0 or more"),
        (("--max-new-tokens", "32"), "leaves no room for a prompt"),
    ],
)
def test_mistakes_are_told_before_an_actor_starts(
    more: tuple[str, ...], message: str, policy: Path, prompts: Path, capsys: Any
) -> None:
    out = prompts.parent / "out.jsonl"
    rest = ["--max-new-tokens", "8"] if "--max-new-tokens" not in more else []
    arguments = ["--policy", str(policy), "--prompts", str(prompts), "--out", str(out)]
    assert main(["generate", *arguments, *rest, *more]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert not out.exists()
    assert not list(out.parent.glob("*.partial.jsonl"))


def test_an_evaluation_needs_a_reward_and_a_new_folder(policy: Path, prompts: Path, capsys: Any) -> None:
    arguments = ["evaluate", "--policy", str(policy), "--prompts", str(prompts), "--max-new-tokens", "8"]
    assert main([*arguments, "--out", str(prompts.parent / "new")]) == 2
    assert "there is no reward to evaluate by" in capsys.readouterr().err
    assert main([*arguments, "--out", str(prompts.parent)]) == 2
    assert "exists already" in capsys.readouterr().err


def pool_line(prompt: str, rewards: list[float], tokens: list[int], policy: str) -> dict[str, Any]:
    components = [{"exact": reward, "judge/std": 0.1} for reward in rewards]
    return {"prompt": prompt, "row": {}, "components": components, "tokens": tokens, "policy": policy}


def test_wins_over_an_earlier_evaluation(tmp_path: Path) -> None:
    # Means of two samples: won on 12 of 20 prompts, level on 4, lost on 4, all of one length: (12 + 2)/20.
    before = [pool_line(f"p{n}", [0.0, 1.0], [3, 5], "old@1") for n in range(20)]
    gains = [0.5] * 12 + [0.0] * 4 + [-0.5] * 4
    after = [pool_line(f"p{n}", [0.5 + gain] * 2, [4, 4], "new@2") for n, gain in enumerate(gains)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    baseline = read_baseline(tmp_path)
    assert baseline.means.lengths == {prompt_key(f"p{n}", {}): 4.0 for n in range(20)}
    found = compare(baseline, [*after, pool_line("another", [9.0], [1], "new@2")])
    assert (found["policy"], found["folder"]) == ("old@1", str(tmp_path))
    assert found["win_rates"].keys() == {"exact"}
    assert found["win_rates"]["exact"]["raw"] == pytest.approx(0.7)
    assert found["win_rates"]["exact"]["length_controlled"] == pytest.approx(0.7, abs=0.1)
    assert found["win_rates"]["exact"]["prompts"] == 20


def test_a_response_with_unicode_line_ends_is_one_sample(tmp_path: Path) -> None:
    lines = [
        pool_line(f"p{n}\u2028\x85", [0.5], [4], "old@1") | {"responses": ["a\u2028b\x0bc"]} for n in range(2)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "samples.jsonl").write_bytes(text.encode())
    assert len(read_baseline(tmp_path).means.lengths) == 2


def test_what_cannot_be_compared_with_is_told_before_an_actor_starts(
    policy: Path, prompts: Path, capsys: Any
) -> None:
    old = prompts.parent / "old"
    arguments = ["evaluate", "--policy", str(policy), "--prompts", str(prompts), "--max-new-tokens", "8"]
    arguments += ["--reward", "exact", "--out", str(prompts.parent / "new"), "--against", str(old)]
    rows = [row for row in map(json.loads, prompts.read_text().splitlines()) if "answer" in row]

    def told(lines: list[dict[str, Any]]) -> str:
        old.mkdir(exist_ok=True)
        (old / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(arguments) == 2
        return str(capsys.readouterr().err)

    assert main(arguments) == 2
    assert "is not what `headrace evaluate` writes" in capsys.readouterr().err
    line = pool_line("ab=", [0.0], [4], "old@1")
    del line["tokens"]  # an earlier version's
    assert "make it again" in told([line])
    assert "0 of these prompts" in told([pool_line("ab=", [0.0], [4], "old@1")])  # another answer beside it
    same = [
        pool_line(row["prompt"], [0.0], [4], "old@1") | {"row": {"answer": row["answer"]}} for row in rows
    ]
    others = [line | {"components": [{"numeric": 0.0}]} for line in same]
    assert "it was judged by numeric and this is by exact" in told(others)
    assert not (prompts.parent / "new").exists()


def test_prompts_without_what_the_rewards_need_are_put_aside(
    tmp_path: Path, options: Callable[..., Any], prompts: Path
) -> None:
    prompts.write_text(prompts.read_text(encoding="utf-8") + '{"prompt": "fg="}\n', encoding="utf-8")
    config, _ = read_settings(options("--max-new-tokens", 8), 1)
    quarantine = Quarantine(tmp_path / "q.jsonl")
    found = read_prompts(config, open_policy(config), quarantine, required=["answer"])
    assert [prompt.source for prompt in found] == ["ab=", "cde="]
    assert quarantine.counts == {"repeated prompt": 1, "missing column": 1}


def test_a_failure_before_the_first_response_does_not_say_to_go_on(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise WorkerFailedError("rollout-0 failed to start: heads of size 8")

    monkeypatch.setattr("cluster.generation.commands.sample_all", fail)
    assert run_generate(options("--max-new-tokens", 8)) == 1
    said = capsys.readouterr().err
    assert "rollout-0 failed to start: heads of size 8" in said
    assert "goes on" not in said


# --- Guides ----------------------------------------------------------------------------------------------


def test_a_reward_model_with_the_policys_tokens_is_asked_token_by_token(
    tmp_path: Path, options: Callable[..., Any]
) -> None:
    same = save_reward_model(tmp_path / "same", alphabet=ALPHABET)
    more = save_reward_model(tmp_path / "more", alphabet=ALPHABET + "z")  # after the policy's own
    other = save_reward_model(tmp_path / "other", alphabet=ALPHABET + "A")  # among them
    short = save_reward_model(tmp_path / "short", alphabet=ALPHABET, max_length=10)
    narrow = save_reward_model(
        tmp_path / "narrow", alphabet=ALPHABET
    )  # the policy may write what it cannot read
    member = json.loads((narrow / "config.json").read_text(encoding="utf-8"))
    (narrow / "config.json").write_text(json.dumps(member | {"vocab_size": member["vocab_size"] - 1}))
    kinds = {}
    for folder in (same, more, other, narrow):
        config, judges = read_settings(options("--reward-model", folder, "--max-new-tokens", 8), 1)
        opened = open_policy(config)
        found = read_prompts(config, opened, Quarantine(tmp_path / "q.jsonl"))
        spec = reward_guide(config, judges, opened, found, tmp_path)
        kinds[folder.name] = spec.kind
        assert spec.ends == [2]
    assert kinds == {
        "same": "reward_tokens",
        "more": "reward_tokens",
        "other": "reward_text",
        "narrow": "reward_text",
    }
    config, judges = read_settings(options("--reward-model", short, "--max-new-tokens", 8), 1)
    with pytest.raises(ValueError, match="reads 10 tokens at most, and the longest prompt has 5"):
        reward_guide(config, judges, opened, found, tmp_path)


def test_the_critic_of_a_checkpoint_is_found(
    tmp_path: Path, policy: Path, options: Callable[..., Any]
) -> None:
    config, _ = read_settings(options(), 1)
    opened = open_policy(config)
    step = tmp_path / "run" / "checkpoints" / "step_000004"
    step.mkdir(parents=True)
    (step / "policy").symlink_to(policy)
    (step / "learner.json").write_text("{}")
    (step.parent / "latest.json").write_text(json.dumps({"step": 4, "folder": step.name}))
    with pytest.raises(ValueError, match=r"there is no value_head.safetensors in .*step_000004"):
        value_guide(config, opened, tmp_path / "run")
    (step / "value_head.safetensors").write_bytes(b"")
    for place in (tmp_path / "run", step):
        assert value_guide(config, opened, place).backbone == str(step / "policy")
    (step / "critic").symlink_to(policy)
    (policy / "value_head.safetensors").write_bytes(b"")
    try:
        assert value_guide(config, opened, step).backbone == str(step / "critic")
    finally:
        (policy / "value_head.safetensors").unlink()


# --- Choosing --------------------------------------------------------------------------------------------


def test_each_response_is_chosen_from_its_own_candidates() -> None:
    scores = [0.0, 2.0, 2.0, 5.0, 4.0, 3.0]
    rng = np.random.default_rng(0)
    assert choose(Strategy("best-of-n", 2, 3), scores, rng) == [1, 3]
    assert choose(Strategy("sample", 3), [], rng) == [0, 1, 2]
    # λ = 0.1: 2 against 0 is e^20 to 1; the two that tie share evenly. 4000 draws: ±0.024 at three sd.
    drawn = [choose(Strategy("soft-best-of-n", 1, 3, 0.1), scores[:3], rng)[0] for _ in range(4000)]
    assert np.bincount(drawn, minlength=3)[0] == 0
    assert np.mean(np.array(drawn) == 1) == pytest.approx(0.5, abs=0.024)


def group(row: dict[str, Any], texts: str) -> SampledGroup:
    prompt = Prompt("line 1", (1, 5), row["prompt"], row, row["prompt"])
    completions = tuple(Completion((4, 2), (-0.5, -0.25), (0, 0), text, "stop") for text in texts)
    return SampledGroup(0, prompt, completions, "rollout-0", 1.0)


def test_a_line_has_the_rows_columns_and_the_scores() -> None:
    row = {"prompt": "ab=", "answer": "ba", "completion": "theirs"}
    scores = [Score(0.0, {"exact": 0.0}), Score(1.0, {"exact": 1.0})]
    rng = np.random.default_rng(0)
    (line,) = response_lines(group(row, "xy"), scores, Strategy("best-of-n", 1, 2), rng, "model@1")
    assert line == {
        "answer": "ba",
        "prompt": "ab=",
        "row": {"completion": "theirs"},
        "completion": "y",
        "finished": True,
        "tokens": 2,
        "logprob": -0.75,
        "score": 1.0,
        "scores": {"exact": 1.0},
        "candidate_scores": [0.0, 1.0],
        "strategy": "best-of-n",
        "policy": "model@1",
    }
    plain = response_lines(group(row, "xy"), None, Strategy("sample", 2), rng, "model@1")
    assert [one["completion"] for one in plain] == ["x", "y"]
    assert not {"score", "scores", "candidate_scores"} & plain[0].keys()


# --- Writing ---------------------------------------------------------------------------------------------


def test_a_stopped_command_goes_on_where_it_was(tmp_path: Path) -> None:
    path, made_by = tmp_path / "out.jsonl", {"policy": "a", "prompts": [(1, 2)]}
    with Output(path, made_by) as output:
        output.add(2, [{"completion": "c"}])
        output.add(0, [{"completion": "a"}, {"completion": "ä"}])
        with pytest.raises(ValueError, match="another headrace is writing it"):
            Output(path, made_by)
    with (tmp_path / "out.partial.jsonl").open("a") as file:
        file.write('{"number": 1, "lines": [{"comp')  # as a crash would leave it
    with pytest.raises(ValueError, match="begun with other settings"):
        Output(path, {"policy": "b"})
    with Output(path, made_by) as output:
        assert output.done == {0, 2}
        output.add(1, [{"completion": "b"}])
        assert output.finish() == 4
    written = [json.loads(line)["completion"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert written == ["a", "ä", "b", "c"]
    assert not (tmp_path / "out.partial.jsonl").exists()
    with pytest.raises(ValueError, match="exists already"):
        Output(path, made_by)


# --- Evaluating ------------------------------------------------------------------------------------------


def samples(*rewards: float, gold: tuple[float, ...] = ()) -> PromptSamples:
    values = np.array(rewards)
    components = {"exact": values} | ({"gold": np.array(gold)} if gold else {})
    return PromptSamples(values, components, np.full(len(values), 3.0), np.ones(len(values)))


def test_the_tables_by_hand() -> None:
    """Two prompts, N = 4. First: 1 of 4 passes; second: 2 of 4.

    pass@2 = 1 − C(3,2)/C(4,2) = 1/2 and 1 − C(2,2)/C(4,2) = 5/6: mean 2/3. pass@4 = 1. Best of 2 by a reward
    that is 0 or 1 is pass@2. The t interval of two values: 12.706·|difference|/2.
    """
    found = evaluate_samples([samples(0, 1, 0, 0), samples(1, 0, 0, 1)], [], None)
    assert found["pass_at_k"]["threshold"] == 1.0
    rows = found["pass_at_k"]["rows"]
    assert [row["k"] for row in rows] == [1, 2, 4]
    assert [row["mean"] for row in rows] == pytest.approx([0.375, 2 / 3, 1.0])
    assert rows[0]["ci95"] == pytest.approx(12.706 * 0.25 / 2, rel=1e-4)
    curve = found["best_of_n"]
    assert [row["reward"]["mean"] for row in curve] == pytest.approx([0.375, 2 / 3, 1.0])
    assert [row["reliable"] for row in curve] == [True, False, False]
    # KL of the best of 2 where a share q passes: (1−q)²·log(1−q) + (1−(1−q)²)·log((1−(1−q)²)/q).
    one, two = ((1 - q) ** 2 * np.log(1 - q) + (2 * q - q * q) * np.log(2 - q) for q in (0.25, 0.5))
    assert curve[1]["kl"] == pytest.approx(
        {"mean": (one + two) / 2, "ci95": 12.706 * abs(one - two) / 2}, rel=1e-4
    )
    assert curve[1]["kl"]["mean"] < curve[1]["kl_bound"] == pytest.approx(np.log(2) - 0.5)
    assert found["reward"]["mean"] == 0.375
    assert found["response_tokens"] == {"mean": 3.0, "ci95": 0.0}
    assert estimate([2.0]) == {"mean": 2.0, "ci95": None}


def test_gold_is_judged_by_what_the_reward_chooses(tmp_path: Path) -> None:
    """Proxy 0, 1, 2, 3 with gold 0, 1, 2, −6. Best of 2 picks places 2, 3, 4 with chance 1/6, 2/6, 3/6: gold
    (1 + 2·2 − 3·6)/6 = −13/6; best of 4 always the last: −6.
    """
    found = evaluate_samples([samples(0, 1, 2, 3, gold=(0, 1, 2, -6))] * 2, ["gold"], None)
    assert found["pass_at_k"] is None
    assert [row["judged"]["gold"]["mean"] for row in found["best_of_n"]] == pytest.approx(
        [-0.75, -13 / 6, -6]
    )
    assert found["components"]["gold"]["mean"] == -0.75
    passing = evaluate_samples([samples(0, 1, 2, 3)] * 2, [], 1.5)
    assert passing["pass_at_k"]["rows"][1]["mean"] == pytest.approx(5 / 6)
    for number, table in enumerate((found, passing)):
        draw_evaluation(table, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 10_000
