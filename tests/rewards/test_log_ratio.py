"""The closed form of the reward that tells fine-tuned from initial samples, against the models themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings
from rewards.base import RewardError, RewardRequest, Score
from rewards.build import build_reward, check_rewards
from rewards.log_ratio import LogRatioReward, sequence_logprobs
from rewards.model_reward import ModelPlace
from rewards.settings import RewardSettings

PLACE = ModelPlace("cpu", "float32", 64)
SHAPE = ScratchSettings(hidden_size=64, layers=1, heads=2, max_length=24)
REQUESTS = [
    RewardRequest("ab>", "ba", {}, True),
    RewardRequest("abba>", "abbabab", {}, False),
    RewardRequest("b>", "a", {}, True),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    made = tuple(build_scratch_model(SHAPE, "ab>", root / str(seed), seed) for seed in (0, 1))
    return made[0], made[1]


def logprob(folder: Path, request: RewardRequest) -> tuple[float, int]:
    """log π of the response by a forward pass over this sequence alone, and its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    prompt = tokenizer(request.prompt)["input_ids"]
    response = tokenizer(request.completion, add_special_tokens=False)["input_ids"]
    response += [tokenizer.eos_token_id] * request.finished
    with torch.no_grad():
        law = torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0], -1)
    places = range(len(prompt) - 1, len(prompt) - 1 + len(response))
    total = sum(float(law[place, token]) for place, token in zip(places, response, strict=True))
    return total, len(response)


@pytest.mark.parametrize("per_token", [False, True])
def test_it_is_the_difference_of_the_two_log_probabilities(
    folders: tuple[Path, Path], per_token: bool
) -> None:
    reward = LogRatioReward("ratio", *folders, per_token=per_token)
    reward.load(PLACE)
    answers = reward.score(REQUESTS)
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert isinstance(answer, Score)
        (tuned, count), (initial, _) = (logprob(folder, request) for folder in folders)
        assert answer.value == pytest.approx((tuned - initial) / (count if per_token else 1), abs=1e-4)
        assert answer.components["tuned"] == pytest.approx(tuned, abs=1e-4)
        assert answer.components["initial"] == pytest.approx(initial, abs=1e-4)
    assert [one.value for one in answers if isinstance(one, Score)] != [0, 0, 0]
    # A model against itself says nothing, of any response.
    same = LogRatioReward("same", folders[0], folders[0])
    same.load(PLACE)
    assert [one.value for one in same.score(REQUESTS) if isinstance(one, Score)] == [0, 0, 0]


def test_batches_and_padding_change_nothing(folders: tuple[Path, Path]) -> None:
    from rewards.models.transformer import load_language_model

    model = load_language_model(folders[0], precision="float32", device="cpu")
    items = [([1, *([4, 5] * length)], length) for length in (1, 5, 2, 9)]
    alone = sequence_logprobs(model, items, micro_batch_tokens=1)
    assert alone == pytest.approx(sequence_logprobs(model, items, micro_batch_tokens=10_000), abs=1e-5)
    assert (alone < 0).all()


def test_what_the_models_cannot_read_is_an_error_of_its_own(folders: tuple[Path, Path]) -> None:
    reward = LogRatioReward("ratio", *folders)
    reward.load(PLACE)
    answers = reward.score(
        [
            RewardRequest("ab>", "x", {}, True),
            REQUESTS[0],
            RewardRequest("ab>", "", {}, False),
            RewardRequest("ab>", "a" * 30, {}, True),
        ]
    )
    reasons = [answer.reason if isinstance(answer, RewardError) else "" for answer in answers]
    assert [reason.split(":")[0] for reason in reasons] == [
        "unknown token",
        "",
        "empty response",
        "over-long",
    ]


def test_it_is_built_from_its_table_and_bad_tables_are_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    table: dict[str, Any] = {"kind": "log_ratio", "path": str(folders[0]), "initial": str(folders[1])}
    limits: dict[str, Any] = {"timeout_s": 10.0, "memory_gib": 1.0}
    one = RewardSettings.model_validate(table | {"weight": 2.0})
    combined = build_reward([one], None, models=PLACE, **limits)
    (answer,) = combined.score(REQUESTS[:1])
    (tuned, _), (initial, _) = (logprob(folder, REQUESTS[0]) for folder in folders)
    assert isinstance(answer, Score)
    assert answer.value == pytest.approx(2 * (tuned - initial), abs=1e-4)
    combined.close()

    def refused(message: str, **changes: Any) -> None:
        settings = RewardSettings.model_validate(table | changes)
        with pytest.raises(ValueError, match=message):
            build_reward([settings], None, **limits)

    refused("reward.initial of 'log_ratio' is missing", initial="")
    refused("reward.path of 'log_ratio' is missing", path="")
    refused("reward.initial", kind="exact", path="")
    refused("reward.initial.*no config.json", initial=str(tmp_path))
    other = build_scratch_model(SHAPE, "abc>", tmp_path / "other", 0)
    refused("another vocabulary", initial=str(other))
    per_token = RewardSettings.model_validate({"kind": "exact", "per_token": True})
    with pytest.raises(ValueError, match="per_token"):
        check_rewards([per_token], None)


def test_a_policy_that_ends_with_another_token_is_read_with_that_one(folders: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    ids = [*tokenizer("ab>")["input_ids"], *tokenizer("ba", add_special_tokens=False)["input_ids"]]
    reward = LogRatioReward("ratio", *folders)
    reward.load(PLACE)
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id, 10**6)
    requests = [RewardRequest("ab>", "ba", {}, True, (*ids, end)) for end in ends]
    answers = reward.score([*requests, RewardRequest("ab>", "ba", {}, True)])
    usual, other, unknown, plain = (one.components["tuned"] for one in answers if isinstance(one, Score))
    ended = [([*ids, tokenizer.pad_token_id], 3)]
    law = sequence_logprobs(reward._models["path"], ended, micro_batch_tokens=64)
    reward.close()
    assert other == pytest.approx(law[0], abs=1e-5)
    assert abs(other - usual) > 1e-3
    assert usual == pytest.approx(plain, abs=1e-5)
    assert unknown == pytest.approx(plain, abs=1e-5)
