"""Guided samples from a real vLLM carry the log-probabilities of the law that they should come from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import LoopThread
from tiny_reward_model import ALPHABET, save_reward_model

from actors.decoding.settings import Guidance, GuideSpec
from actors.decoding.worker import GuidedWorker
from actors.end_tokens import end_tokens
from actors.engine import EngineDied
from actors.records import Completion, Prompt, SampledGroup, SampleRequest
from actors.settings import RolloutSettings, SyncSettings
from cluster.scratch import build_scratch_model, build_tokenizer
from learner.settings import ScratchSettings
from rewards.settings import RewardSettings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]
torch.set_num_threads(1)
TOP_K, WEIGHT, TEMPERATURE = 4, 0.8, 0.7
Score = Callable[[Sequence[int], Sequence[int]], float]
"""Of a prompt's and a response's tokens, the candidate being the last of them."""


@pytest.fixture(scope="module")
def loop() -> Any:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ScratchSettings(hidden_size=64, layers=2, heads=2, max_length=32)
    return build_scratch_model(settings, ALPHABET, tmp_path_factory.mktemp("policy") / "model", seed=0)


def worker(policy: Path, directory: Path, kind: str, reward: RewardSettings) -> GuidedWorker:
    ends = sorted(end_tokens(str(policy)))
    guide = GuideSpec(
        kind=kind,  # type: ignore[arg-type]
        ends=ends,
        end_token=ends[0],
        rewards=[reward],
        directory=str(directory),
    )
    return GuidedWorker(
        "rollout-0",
        str(policy),
        RolloutSettings(kv_cache_gib=0.05, max_num_seqs=8, start_timeout_s=180.0),
        SyncSettings(),
        dtype="float32",
        max_length=32,
        seed=1,
        device="cpu",
        guide=guide,
        guidance=Guidance(top_k=TOP_K, weight=WEIGHT),
    )


def request(number: int, text: str, row: dict[str, Any]) -> SampleRequest:
    ids = tuple(build_tokenizer(ALPHABET, 32)(text)["input_ids"])
    return SampleRequest(number, Prompt(f"line {number}", ids, text, row, text), 3, 12, TEMPERATURE)


async def sample_all(actor: GuidedWorker, requests: Sequence[SampleRequest]) -> list[SampledGroup]:
    """All at once: rows of other lengths beside each other, more of them than the engine runs at a time."""
    import asyncio

    return list(await asyncio.gather(*(actor.sample(one) for one in requests)))


@torch.no_grad()
def expected(model: Any, prompt: Sequence[int], completion: Completion, score: Score) -> list[float]:
    """log π_g of each token, computed from nothing but whole sequences."""
    found = []
    for place, token in enumerate(completion.token_ids):
        before = completion.token_ids[:place]
        logits = model(torch.tensor([[*prompt, *before]])).logits[0, -1]
        candidates = logits.topk(TOP_K).indices.tolist()
        scores = torch.tensor([score(prompt, [*before, one]) for one in candidates])
        law = torch.log_softmax(logits[candidates] / TEMPERATURE + WEIGHT * scores, -1)
        found.append(float(law[candidates.index(token)]))
    return found


def check(policy: Path, groups: Sequence[SampledGroup], score: Score) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    for group in groups:
        for completion in group.completions:
            law = expected(model, group.prompt.token_ids, completion, score)
            assert list(completion.logprobs) == pytest.approx(law, abs=2e-4)
    every = [one for group in groups for one in group.completions]
    assert len({one.token_ids for one in every}) > len(every) // 2
    assert len({len(one.token_ids) for one in every}) > 3, "rows of many lengths ran beside each other"


PROMPTS = ("a=", "bcdefg=", "hij=", "ab:cd=", "j=")


def test_by_a_reward_model_token_by_token(tmp_path: Path, policy: Path, loop: LoopThread) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = save_reward_model(tmp_path / "rm", seed=5, alphabet=ALPHABET, mean=0.2, std=0.5)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def score(prompt: Sequence[int], response: Sequence[int]) -> float:
        """The head on the last token, also where that is padding, which a classifier itself would skip."""
        hidden = classifier.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0, -1]
        return (float(classifier.score(hidden)) - 0.2) / 0.5

    actor = worker(policy, tmp_path, "reward_tokens", RewardSettings(kind="model", path="rm"))
    try:
        loop.run(actor.start(), 200)
        groups = loop.run(sample_all(actor, [request(i, text, {}) for i, text in enumerate(PROMPTS)]))
    finally:
        loop.run(actor.stop())
    check(policy, groups, score)


def test_by_a_function_of_the_text_and_what_its_failure_says(
    tmp_path: Path, policy: Path, loop: LoopThread
) -> None:
    source = (
        "def score(prompt, completion, row):\n"
        "    return len(set(completion) & set(row['wanted'])) - 0.1 * len(completion)\n"
    )
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    tokenizer, wanted = build_tokenizer(ALPHABET, 32), "acegi"

    def score(prompt: Sequence[int], response: Sequence[int]) -> float:
        text = tokenizer.decode(response, skip_special_tokens=True)
        return len(set(text) & set(wanted)) - 0.1 * len(text)

    reward = RewardSettings(kind="function", function="mine.py:score")
    actor = worker(policy, tmp_path, "reward_text", reward)
    try:
        loop.run(actor.start(), 200)
        row = {"wanted": wanted}
        groups = loop.run(sample_all(actor, [request(i, text, row) for i, text in enumerate(PROMPTS)]))
        with pytest.raises(EngineDied, match=r"guided decoding stopped: reward 'function': .*'wanted'"):
            loop.run(actor.sample(request(9, "a=", {})))
    finally:
        loop.run(actor.stop())
    check(policy, groups, score)
