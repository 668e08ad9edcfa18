"""The reward of adversarial imitation: what a discriminator says of a response, in one of four forms.

A discriminator D(x, y) = σ(d(x, y)) is trained to tell demonstrations (1) from the policy's responses (0). At
its optimum d = log ρ_E(y|x) − log π(y|x), and the policy gradient of each form descends a divergence:

    form         reward                    descends
    logit        d = log D − log(1 − D)    KL(π‖ρ_E)
    -log(1-D)    softplus(d)  ≥ 0          2·JS(π, ρ_E)
    log(D)       −softplus(−d) ≤ 0         KL(π‖ρ_E) − 2·JS(π, ρ_E)
    D/(1-D)      e^d          ≥ 0          KL(ρ_E‖π)

Sources: Goodfellow et al., arXiv 1406.2661; Ho & Ermon, arXiv 1606.03476; Fu et al., arXiv 1710.11248;
Ke et al., arXiv 1905.12888. See docs/imitation.md for what is wrong with each.

The weights come from the learner while a run goes on: `load` takes a version's file. Every score carries the
version that gave it. Sequences are the policy's own token ids, so training and scoring see the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.base import RewardError, RewardRequest, Score
from rewards.model_reward import ModelPlace
from rewards.models.attention import exact_attention
from rewards.models.transformer import DTYPES, TransformerScorer

Form = Literal["logit", "-log(1-D)", "log(D)", "D/(1-D)"]
LOGIT, VERSION, CLAMPED = "logit", "version", "clamped"


def discriminator_reward(logits: Tensor, form: Form) -> Tensor:
    """The reward of each logit d = log D − log(1 − D), in the same shape."""
    if form == "logit":
        return logits
    if form == "-log(1-D)":
        return F.softplus(logits)
    if form == "log(D)":
        return -F.softplus(-logits)
    return logits.exp()


class DiscriminatorReward:
    """A discriminator as a `rewards.base.Reward`, without weights until `load` brings the first."""

    def __init__(self, label: str, form: Form, logit_limit: float, place: ModelPlace | None) -> None:
        """Without a place, as where settings are only checked, it cannot score."""
        self.label = label
        self.version = -1
        self._form = form
        self._limit = logit_limit
        self._place = place
        self._model: Any = None
        self._config = ""

    def load(self, weights: Path, config: str, version: int) -> None:
        """Take the weights of a version: a safetensors file, and the model's configuration as JSON."""
        from safetensors.torch import load_file

        assert self._place is not None, "a discriminator that only checks settings has no weights"
        if self._model is None or config != self._config:
            self._model = None  # freed first: two may not fit
            self._model = _classifier(config, self._place)
            self._config = config
        found = self._model.load_state_dict(load_file(weights), strict=False)
        lacking = set(found.missing_keys) - {name for name, _ in self._model.named_buffers()}
        if lacking or found.unexpected_keys:
            raise ValueError(
                f"reward {self.label!r}: version {version} of the discriminator lacks {sorted(lacking)[:3]} "
                f"and has {found.unexpected_keys[:3]}, which the model has not"
            )
        self.version = version

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """d of token sequences, prompt and response, by the present weights."""
        assert self._model is not None, "load() comes first"
        assert self._place is not None
        if not sequences:
            return []
        scorer = TransformerScorer([self._model], self._place.device, self._place.micro_batch_tokens)
        numbers: list[float] = scorer.raw(sequences)[0].tolist()
        return numbers

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request, all in one batch.

        Components: the raw `logit`, the `version` of the weights, and `clamped`, 1 where the logit lay beyond
        the limit.
        """
        if self._model is None:
            reason = "its weights come from the learner of a run, so it cannot score outside of one"
            return [RewardError(self.label, reason) for _ in requests]
        for request in requests:
            assert request.token_ids, "a discriminator reads the policy's tokens"
        logits = torch.tensor(self.logits([request.token_ids for request in requests]), dtype=torch.float64)
        within = logits.clamp(-self._limit, self._limit)
        values = discriminator_reward(within, self._form)
        return [
            self._answer(*row)
            for row in zip(values.tolist(), logits.tolist(), (within != logits).tolist(), strict=True)
        ]

    def _answer(self, value: float, logit: float, clamped: bool) -> Score | RewardError:
        if not abs(logit) < float("inf"):
            return RewardError(self.label, f"version {self.version} of the discriminator gave {logit}")
        return Score(value, {LOGIT: logit, VERSION: float(self.version), CLAMPED: float(clamped)})

    def close(self) -> None:
        """Drop the weights; safe to call twice."""
        self._model = None


def _classifier(config: str, place: ModelPlace) -> Any:
    """A transformer of one output under this configuration, its weights still to come."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    facts = json.loads(config)
    settings = type(AutoConfig.for_model(facts["model_type"])).from_dict(facts)
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and then replaced
        model = AutoModelForSequenceClassification.from_config(
            settings, attn_implementation=exact_attention(settings, "sdpa"), trust_remote_code=False
        )
    model.config.use_cache = False
    return model.to(device=place.device, dtype=DTYPES[place.precision]).eval()
