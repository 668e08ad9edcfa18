"""Guides against whole sequences scored one by one: rows that come, grow, end and change places."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_reward_model import ALPHABET, plain_score, save_reward_model
from torch import Tensor

from actors.decoding.guided import guided_logits
from actors.decoding.guides import GuideError, Row, TextGuide, TokenGuide, build_guide, prefix_model
from actors.decoding.prefix_model import PrefixModel, UnsupportedModelError
from actors.decoding.settings import GuideSpec
from cluster.scratch import build_tokenizer
from rewards.base import RewardRequest, Score
from rewards.settings import RewardSettings

torch.set_num_threads(1)
VOCABULARY = 16
END = 2


def backbone(kind: str) -> Any:
    """A random model of 2 layers without an output layer."""
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    ids: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": END,
    }
    if kind == "gpt2":
        config = GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5, **ids)
        return GPT2Model(config).eval()
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
    }
    if kind == "qwen2":
        return Qwen2Model(Qwen2Config(**shape, **ids)).eval()
    return LlamaModel(LlamaConfig(**shape, **ids)).eval()


def head() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(1))


def by_itself(model: Any, ids: list[int]) -> float:
    """The score of one sequence, without any cache or padding."""
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ head())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_row_is_scored_as_if_it_were_alone_while_others_come_and_go(kind: str) -> None:
    """40 steps of random choices; rows of other lengths join and end, buffers grow past their first size."""
    model = backbone(kind)
    scorer = prefix_model(model, head(), 0.0, "float32")
    guide = TokenGuide(
        [scorer], lambda raw, _: raw[0], ends=frozenset({END}), end_token=END, end_is_prefix=False
    )
    rng = np.random.default_rng(0)
    rows = [Row([1, *rng.integers(3, VOCABULARY, n).tolist()], [], 3, 1.0, 1.0) for n in (4, 1, 9)]
    checked = 0
    for step in range(40):
        candidates = torch.from_numpy(np.stack([rng.permutation(VOCABULARY)[:3] for _ in rows]))
        found = guide.scores(rows, candidates)
        for number in rng.choice(len(rows), 2, replace=False) if step % 5 == 0 else []:
            for place, token in enumerate(candidates[number].tolist()):
                alone = by_itself(model, [*rows[number].prompt, *rows[number].output, token])
                assert float(found[number, place]) == pytest.approx(alone, abs=2e-4)
                checked += 1
        for row, tokens in zip(rows, candidates.tolist(), strict=True):
            row.output.append(int(rng.choice(tokens)))
        if step % 7 == 3:
            del rows[int(rng.integers(len(rows)))]
        if step % 3 == 0:
            rows.insert(0, Row([1, *rng.integers(3, VOCABULARY, 1 + step // 4).tolist()], [], 3, 1.0, 1.0))
        rng.shuffle(rows)  # type: ignore[arg-type]
        assert len(scorer) <= len(rows) + 3
    assert checked == 48


def test_a_row_whose_tokens_were_lost_or_did_not_change_is_scored_all_the_same() -> None:
    """No new token: an engine that computes a prompt in chunks. Several: a request that was taken back."""
    model = backbone("llama")
    guide = TokenGuide(
        [prefix_model(model, head(), 0.0, "float32")],
        lambda raw, _: raw[0],
        ends=frozenset({END}),
        end_token=END,
        end_is_prefix=False,
    )
    row, table = Row([1, 5, 6], [], 2, 1.0, 1.0), torch.tensor([[7, 8]])
    first = guide.scores([row], table)
    torch.testing.assert_close(guide.scores([row], table), first)
    row.output += [9, 4, 8]
    found = guide.scores([row], table)[0].tolist()
    assert found == pytest.approx([by_itself(model, [1, 5, 6, 9, 4, 8, t]) for t in (7, 8)], abs=2e-4)


def test_equal_prefixes_are_computed_once() -> None:
    model = backbone("llama")
    scorer = PrefixModel(model, head())
    batches = []
    model.register_forward_pre_hook(lambda _, __, kw: batches.append(kw["input_ids"].shape), with_kwargs=True)
    own = scorer.add([[1, 5, 6], [1, 4], [1, 5, 6], [1, 5, 6]])
    assert batches == [torch.Size([2, 3])]
    assert own[0] == own[2] == own[3]
    assert float(own[1]) == pytest.approx(by_itself(model, [1, 4]), abs=1e-5)
    assert len(scorer) == 4
    scorer.score(torch.tensor([[3, 4]] * 4))
    assert batches[-1] == torch.Size([4, 2]), "k tokens a prefix and step, however long the prefix is"


def test_a_critic_says_that_ending_is_worth_what_the_prefix_is() -> None:
    model = backbone("llama")
    guide = TokenGuide(
        [prefix_model(model, head(), 0.25, "float32")],
        lambda raw, _: raw[0],
        ends=frozenset({END, 3}),
        end_token=END,
        end_is_prefix=True,
    )
    row = Row([1, 5], [], 3, 1.0, 1.0)
    guide.scores([row], torch.tensor([[7, 8, 9]]))
    row.output.append(8)
    found = guide.scores([row], torch.tensor([[END, 7, 3]]))[0].tolist()
    here, there = by_itself(model, [1, 5, 8]) + 0.25, by_itself(model, [1, 5, 8, 7]) + 0.25
    assert found == pytest.approx([here, there, here], abs=2e-4)


def test_models_that_look_back_only_so_far_are_refused() -> None:
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
    )
    with pytest.raises(UnsupportedModelError, match="looks back 4 tokens only"):
        prefix_model(MistralModel(config).eval(), head(), 0.0, "float32")


def test_a_model_that_is_no_causal_transformer_is_found_out() -> None:
    """One that looks at what follows: its scores of whole sequences are not those of its prefixes."""
    model = backbone("llama")
    for layer in model.layers:
        layer.self_attn.register_forward_hook(
            lambda _, __, output: (output[0] + output[0].mean(dim=1, keepdim=True), *output[1:])
        )
    with pytest.raises(UnsupportedModelError, match="scores differ by"):
        prefix_model(model, head(), 0.0, "float32")


# --- From a specification --------------------------------------------------------------------------------


def spec(folder: Path, rewards: list[RewardSettings], kind: str) -> GuideSpec:
    return GuideSpec(
        kind=kind,  # type: ignore[arg-type]
        ends=[END],
        end_token=END,
        rewards=rewards,
        directory=str(folder),
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    build_tokenizer(ALPHABET, 32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("members", [1, 2])
def test_a_reward_model_scores_tokens_as_it_scores_their_text(
    tmp_path: Path, policy: Path, members: int
) -> None:
    """By tokens, by text, and (one member) by transformers' classifier: an end token is a finished text."""
    save_reward_model(tmp_path / "rm", members=members, mean=0.5, std=2.0, seed=3)
    rewards = [RewardSettings(kind="model", path="rm", weight=0.5)]
    tokenizer = build_tokenizer(ALPHABET, 32)
    rows = [
        Row(tokenizer("abc=")["input_ids"], [], 3, 1.0, 1.0, "abc=", {}),
        Row(tokenizer("a=")["input_ids"], [], 3, 1.0, 1.0, "a=", {}),
    ]
    guides = [
        build_guide(
            GuideSpec.model_validate_json(spec(tmp_path, rewards, kind).model_dump_json()), str(policy)
        )
        for kind in ("reward_tokens", "reward_text")
    ]
    assert isinstance(guides[0], TokenGuide)
    assert isinstance(guides[1], TextGuide)
    letters = tokenizer("dj", add_special_tokens=False)["input_ids"]
    table = torch.tensor([[*letters, END]] * 2)
    for text in ("", "d"):
        by_tokens, by_text = (guide.scores(rows, table) for guide in guides)
        torch.testing.assert_close(by_tokens, by_text, atol=1e-5, rtol=0)
        if members == 1:
            expected = [
                0.5 * (plain_score(tmp_path / "rm", prompt, text + more, ended) - 0.5) / 2.0
                for prompt in ("abc=", "a=")
                for more, ended in (("d", False), ("j", False), ("", True))
            ]
            assert by_tokens.flatten().tolist() == pytest.approx(expected, abs=1e-5)
        for row in rows:
            row.output.append(letters[0])


def test_rewards_on_texts_know_the_tokens_that_the_policy_may_sample() -> None:
    """Among them which of several end tokens it is."""
    seen: list[RewardRequest] = []

    class Watching:
        def score_groups(self, groups: Any, _: Any) -> Any:
            seen.extend(one for group in groups for one in group)
            return [SimpleNamespace(answers=[Score(0.0)] * len(group)) for group in groups]

    watching: Any = Watching()
    tokenizer = build_tokenizer(ALPHABET, 32)
    guide = TextGuide(watching, tokenizer, frozenset({0, END}))
    guide.scores([Row([1, 5], [6], 3, 1.0, 1.0, "b")], torch.tensor([[7, END, 0]]))
    assert [one.token_ids for one in seen] == [(1, 5, 6, 7), (1, 5, 6, END), (1, 5, 6, 0)]
    assert [one.finished for one in seen] == [False, True, True]


def test_rewards_on_texts_hear_of_the_end_and_their_errors_are_told(tmp_path: Path, policy: Path) -> None:
    source = (
        "def score(prompt, completion, row):\n    return len(completion) * row['scale'] + (prompt == 'ab=')\n"
    )
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    guide = build_guide(
        spec(tmp_path, [RewardSettings(kind="function", function="mine.py:score")], "reward_text"),
        str(policy),
    )
    tokenizer = build_tokenizer(ALPHABET, 32)
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    row = Row(tokenizer("ab=")["input_ids"], [a, b], 2, 1.0, 1.0, "ab=", {"scale": 0.5})
    # "aba" has 3 letters, the finished "ab" 2; the prompt adds 1.
    assert guide.scores([row], torch.tensor([[a, END]])).tolist() == [[2.5, 2.0]]
    row.columns = {}
    with pytest.raises(GuideError, match=r"KeyError.*'scale'.*unfinished response 'aba'"):
        guide.scores([row], torch.tensor([[a, END]]))
    guide._reward.close()  # type: ignore[attr-defined]


def test_numbers_that_are_not_finite_are_an_error() -> None:
    guide = TokenGuide(
        [prefix_model(backbone("llama"), head(), 0.0, "float32")],
        lambda raw, _: raw[0] * np.nan,
        ends=frozenset({END}),
        end_token=END,
        end_is_prefix=False,
    )
    with pytest.raises(GuideError, match="not finite"):
        guide.scores([Row([1, 5], [], 1, 1.0, 1.0)], torch.tensor([[7]]))


# --- The tilt --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_tilt_by_hand(temperature: float) -> None:
    """π ∝ (1, 2, 5)^(1/τ), scores log 3 and 0 on the last two tokens, w = 2: 9·2^(1/τ) to 5^(1/τ)."""
    logits = torch.tensor([[0.0, 0.6931471805599453, 1.6094379124341003]], dtype=torch.float64)
    scores = torch.tensor([[0.0, 1.0986122886681098]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = guided_logits(logits, torch.tensor([[2, 1]]), scores, 2 * one, temperature * one)
    power = 1 / temperature
    two, five = 9 * 2**power, 5**power
    law = torch.softmax(found / temperature, -1)[0].tolist()
    assert law == pytest.approx([0.0, two / (two + five), five / (two + five)], abs=1e-12)


def test_without_a_temperature_the_best_of_logit_and_score_is_first() -> None:
    logits, candidates = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0, 1]])
    weight, zero = torch.tensor([2.0]), torch.zeros(1)
    found = guided_logits(logits, candidates, torch.tensor([[0.0, 0.3]]), weight, zero)
    assert found.tolist() == [[1.0, pytest.approx(1.1), float("-inf")]]
