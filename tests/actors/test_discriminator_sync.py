"""A scoring actor that takes up a discriminator's versions: what it scores, what it refuses."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from actors.discriminator_sync import DiscriminatorRefused, largest_difference
from actors.records import Completion, DiscriminatorUpdate, Group, Prompt, RewardFailure, SampledGroup
from actors.scoring import ScoringWorker
from actors.settings import ScoringSettings
from actors.weight_files import WeightFileError
from learner.publish import ParameterStream, SharedFiles
from rewards.settings import RewardSettings

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
PROBE = ((1, 5, 9), (3, 4, 4, 7, 2))


def classifier(seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1, pad_token_id=None)).eval()


def logit(model: LlamaForSequenceClassification, ids: tuple[int, ...]) -> float:
    """transformers' own classification of one sequence."""
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


@pytest.fixture
def send(tmp_path: Path) -> Iterator[Callable[..., DiscriminatorUpdate]]:
    """Publishes a model's weights as the learner does, without its engine."""
    opened: list[SharedFiles] = []

    def publish(model: LlamaForSequenceClassification, version: int) -> DiscriminatorUpdate:
        stream = ParameterStream(lambda: iter(list(model.named_parameters())), torch.float32)
        files = SharedFiles(stream, f"run-{len(opened)}-d", 0, False, tmp_path)
        opened.append(files)
        config = json.dumps(model.config.to_dict(), default=str)
        return DiscriminatorUpdate(
            version, files.send(version), config, PROBE, tuple(logit(model, ids) for ids in PROBE)
        )

    yield publish
    for files in opened:
        files.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[ScoringWorker]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "reference")
    made = ScoringWorker(
        "scoring-0",
        str(tmp_path / "reference"),
        [
            RewardSettings(kind="discriminator", name="d", form="-log(1-D)", logit_limit=1.5),
            RewardSettings(kind="exact"),
        ],
        None,
        ScoringSettings(),
        dtype="float32",
        attention="sdpa",
        temperature=1.0,
        micro_batch_tokens=64,
        chunk_tokens=16,
        device="cpu",
    )
    made.start()
    yield made
    made.stop()
    made.stop()


def group(*responses: tuple[int, ...]) -> SampledGroup:
    completions = tuple(
        Completion(response, (-1.0,) * len(response), (0,) * len(response), "x", "stop")
        for response in responses
    )
    return SampledGroup(1, Prompt("p", (1, 5), "shown", {"answer": "x"}), completions, "rollout-0", 0.1)


def test_scores_are_those_of_the_version_that_they_carry(
    worker: ScoringWorker, send: Callable[..., DiscriminatorUpdate]
) -> None:
    responses = ((3, 2), (4, 4, 4, 2), (7,))
    (failed,) = worker.score([group(*responses)])
    assert isinstance(failed, RewardFailure)  # no version has come yet
    assert "weights come from the learner" in failed.reason
    clamped = 0
    for version, seed in ((0, 3), (4, 8)):
        model = classifier(seed)
        proof = worker.load_discriminator(send(model, version), 5.0)
        assert (proof.actor, proof.version) == ("scoring-0", version)
        assert proof.probe_max_difference < 1e-4
        (scored,) = worker.score([group(*responses)])
        assert isinstance(scored, Group)
        for response, trajectory in zip(responses, scored.trajectories, strict=True):
            raw = logit(model, (1, 5, *response))
            cut = max(-1.5, min(1.5, raw))
            clamped += cut != raw
            assert trajectory.components["d"] == pytest.approx(math.log1p(math.exp(cut)), abs=1e-4)
            assert trajectory.components["d/logit"] == pytest.approx(raw, abs=1e-4)
            assert trajectory.components["d/version"] == version
            assert trajectory.components["d/clamped"] == float(cut != raw)
            assert trajectory.reward == pytest.approx(trajectory.components["d"] + 1.0)
    assert 0 < clamped < 6  # both sides of the limit were seen


def test_what_is_not_the_learners_version_is_refused(
    worker: ScoringWorker, send: Callable[..., DiscriminatorUpdate]
) -> None:
    worker.load_discriminator(send(classifier(3), 2), 5.0)
    with pytest.raises(DiscriminatorRefused, match=r"version 2 .* after version 2"):
        worker.load_discriminator(send(classifier(4), 2), 5.0)
    damaged = send(classifier(5), 3)
    path = Path(damaged.payload["path"])
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match="corrupt"):
        worker.load_discriminator(damaged, 5.0)
    other = dataclasses.replace(send(classifier(6), 4), probe_logits=(0.0, 0.0))
    with pytest.raises(DiscriminatorRefused, match="probe's logits differ"):
        worker.load_discriminator(other, 5.0)
    assert largest_difference([1.0, 20.0], (1.5, 10.0)) == 1.0
    assert largest_difference([math.nan], (0.0,)) == math.inf
