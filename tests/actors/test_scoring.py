"""The scoring worker with a real tiny model as the reference, and real rewards."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.records import Completion, Group, Prompt, RewardFailure, SampledGroup
from actors.scoring import ScoringWorker
from actors.settings import ScoringSettings
from rewards.settings import RewardSettings, TaskSettings

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with a random two-layer Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    path = tmp_path_factory.mktemp("reference")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def start(reference):
    """Start workers; stop them at the end."""
    workers = []

    def build(*rewards, task=None, directory=None, path=None, micro_batch_tokens=64, **scoring):
        worker = ScoringWorker(
            "scorer-0",
            str(path or reference),
            [RewardSettings(**table) for table in rewards],
            task,
            ScoringSettings(**scoring),
            dtype="float32",
            attention="sdpa",
            temperature=TEMPERATURE,
            micro_batch_tokens=micro_batch_tokens,
            chunk_tokens=5,
            device="cpu",
            directory=directory and str(directory),
        )
        workers.append(worker)
        worker.start()
        return worker

    yield build
    for worker in workers:
        worker.stop()
        worker.stop()


def completion(tokens, text, finish_reason="stop"):
    zeros = (0,) * len(tokens)
    return Completion(tuple(tokens), tuple(-1.0 for _ in tokens), zeros, text, finish_reason)


def group(group_id, *completions, prompt=(1, 5, 9), **row):
    return SampledGroup(
        group_id, Prompt(f"train:{group_id}", tuple(prompt), "shown", row), completions, "rollout-1", 2.5
    )


def expected_logprobs(path, prompt, response):
    """log softmax(logits / temperature) of each response token, from the whole model, one sequence alone."""
    model = LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0] / TEMPERATURE
    logprobs = torch.log_softmax(logits.float(), -1)
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(response)]


def test_rewards_and_reference_logprobs_of_groups_of_different_lengths(start, reference):
    worker = start({"kind": "exact", "weight": 2.0}, {"kind": "numeric", "name": "number"})
    groups = [
        group(7, completion([3, 2], "42"), completion([4, 8, 8, 2], "x 42"), prompt=(1, 5, 9), answer="42"),
        group(8, completion([6], "", "length"), prompt=(1, 30, 11, 12, 13), answer="1"),
    ]
    first, second = worker.score(groups)
    assert [t.reward for t in first.trajectories] == [2.0 + 1.0, 0.0 + 1.0]
    assert first.trajectories[1].components == {"exact": 0.0, "number": 1.0}
    assert second.trajectories[0].components == {"exact": 0.0, "number": 0.0}  # no penalty is set
    for sampled, scored in zip(groups, (first, second), strict=True):
        assert isinstance(scored, Group)
        assert (scored.group_id, scored.prompt, scored.actor) == (
            sampled.group_id,
            sampled.prompt,
            "rollout-1",
        )
        assert scored.sample_seconds == 2.5
        assert [t.completion for t in scored.trajectories] == list(sampled.completions)
        for trajectory in scored.trajectories:
            tokens = trajectory.completion.token_ids
            expected = expected_logprobs(reference, sampled.prompt.token_ids, tokens)
            assert trajectory.reference_logprobs == pytest.approx(expected, abs=1e-5)


def test_a_response_that_was_cut_off_pays_the_penalty_visibly(start):
    worker = start({"kind": "exact"}, missing_eos_penalty=0.5)
    (scored,) = worker.score([group(1, completion([3], "a"), completion([3], "a", "length"), answer="a")])
    ended, cut = scored.trajectories
    assert (ended.reward, ended.components) == (1.0, {"exact": 1.0, "missing_eos_penalty": 0.0})
    assert (cut.reward, cut.components) == (0.5, {"exact": 1.0, "missing_eos_penalty": -0.5})


def test_a_task_reward_sees_whether_the_response_ended(start):
    worker = start({"kind": "task"}, task=TaskSettings(kind="reversal"))
    (scored,) = worker.score([group(1, completion([3], "ba"), completion([3], "ba", "length"), answer="ba")])
    assert [t.reward for t in scored.trajectories] == [1.0, 0.8]


FUNCTION = """
import os
def f(prompt, completion, row):
    if completion == "raise":
        raise RuntimeError("not today")
    if completion == "nan":
        return float("nan")
    if completion == "die":
        os._exit(1)
    while completion == "hang":
        pass
    return {"reward": 1.0, "is_chat": isinstance(prompt, list)}
"""


def test_a_bad_sample_fails_its_group_and_no_other(start, tmp_path, reference):
    (tmp_path / "mine.py").write_text(FUNCTION)
    worker = start(
        {"kind": "function", "function": "mine.py:f", "name": "mine"},
        directory=tmp_path,
        reward_timeout_s=1.0,
    )
    kinds = ["good", "raise", "good", "nan", "hang", "die", "good"]
    groups = [group(i, completion([3], "good"), completion([4, 2], kind)) for i, kind in enumerate(kinds)]
    answers = worker.score(groups)
    assert [type(answer) for answer in answers] == [
        Group if kind == "good" else RewardFailure for kind in kinds
    ]
    reasons = {answer.group_id: answer.reason for answer in answers if isinstance(answer, RewardFailure)}
    assert reasons[1].startswith("it raised RuntimeError: not today")
    assert reasons[3] == "it returned nan; a reward must be a finite number"
    assert reasons[4].startswith("it did not answer within 1 s")
    assert reasons[5].startswith("its process ended with exit status 1")
    assert {(a.prompt_id, a.reward) for a in answers if isinstance(a, RewardFailure)} == {
        (f"train:{i}", "mine") for i in reasons
    }
    # The groups between failures got their own reference log-probabilities, not a neighbour's.
    last = answers[6].trajectories[1]
    assert last.components == {"mine": 1.0, "mine/is_chat": 0.0}
    assert last.reference_logprobs == pytest.approx(expected_logprobs(reference, (1, 5, 9), (4, 2)), abs=1e-5)


def test_the_function_gets_the_rows_own_prompt(start, tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTION)
    worker = start({"kind": "function", "function": "mine.py:f"}, directory=tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    of_text = group(1, completion([3], "x"), prompt=(1, 2), answer="y")
    # Wherever the prompt's column is: a column that happens to be called "prompt" is not it.
    prompt = dataclasses.replace(of_text.prompt, row={"prompt": "other", "question": chat}, source=chat)
    of_chat = dataclasses.replace(of_text, group_id=2, prompt=prompt)
    first, second = worker.score([of_text, of_chat])
    assert first.trajectories[0].components["function/is_chat"] == 0.0
    assert second.trajectories[0].components["function/is_chat"] == 1.0


def test_the_function_sees_the_variables_that_are_named(start, tmp_path, monkeypatch):
    monkeypatch.setenv("HR_JUDGE_KEY", "value")
    (tmp_path / "mine.py").write_text("import os\ndef f(p, c, r):\n    return 'HR_JUDGE_KEY' in os.environ\n")
    for names, expected in ([], 0.0), (["HR_JUDGE_KEY"], 1.0):
        worker = start({"kind": "function", "function": "mine.py:f"}, directory=tmp_path, reward_env=names)
        (scored,) = worker.score([group(1, completion([3], "x"))])
        assert scored.trajectories[0].reward == expected


def test_only_failures_and_nothing_at_all(start):
    worker = start({"kind": "exact"})
    (failure,) = worker.score([group(1, completion([3], "a"))])
    assert (failure.reward, failure.prompt_id) == ("exact", "train:1")
    assert worker.score([]) == []


def test_a_reference_that_gives_nan_stops_the_run(start, reference, tmp_path):
    worker = start({"kind": "exact"})
    with torch.no_grad():
        worker._reference.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"'scorer-0'.*not finite"):
        worker.score([group(1, completion([3], "a"), answer="a")])


def test_the_reference_can_be_replaced(start, tmp_path, reference):
    torch.manual_seed(1)
    other = LlamaForCausalLM.from_pretrained(reference)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(-0.5)
    other.save_pretrained(tmp_path / "other")
    worker = start({"kind": "exact"})
    worker.set_reference(str(tmp_path / "other"))
    (scored,) = worker.score([group(1, completion([3, 4], "a"), answer="a")])
    expected = expected_logprobs(tmp_path / "other", (1, 5, 9), (3, 4))
    assert scored.trajectories[0].reference_logprobs == pytest.approx(expected, abs=1e-5)


def test_start_refuses_a_bad_reward_and_a_bad_reference(start, tmp_path):
    with pytest.raises(ValueError, match=r"reward.function = 'gone.py:f'"):
        start({"kind": "function", "function": "gone.py:f"}, directory=tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        start({"kind": "exact"}, path=tmp_path / "nowhere")
