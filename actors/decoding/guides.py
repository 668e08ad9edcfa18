"""Guides: scores of the candidate tokens after the prefixes that an engine is decoding.

    rows, (B, k) candidates ─► TokenGuide: reward model or critic, keys and values kept from step to step
                            └► TextGuide: any reward, asked about the text so far

An end token is a candidate like others. A reward model reads it as the end of a finished response, a reward
on texts is told that the response is finished; a critic has learned nothing of what follows an end, so for it
ending is worth what the prefix is worth.

Legend: B rows, k candidates, N = B·k prefixes with their candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.decoding.prefix_model import PrefixModel, UnsupportedModelError
from actors.decoding.settings import GuideSpec
from rewards.base import RewardError, RewardRequest
from rewards.build import build_reward
from rewards.combined import CombinedReward
from rewards.model_reward import ModelPlace, model_folder
from rewards.models.card import RewardCard, member_folder, read_card
from rewards.models.loading import scores_from_raw
from rewards.models.transformer import HEAD, load_backbone, load_classifier


class GuideError(RuntimeError):
    """A guide could not score a prefix; the message says which and why."""


@dataclass(slots=True, eq=False)
class Row:
    """One sequence under way. `output` is the engine's own list, which grows as tokens are sampled."""

    prompt: list[int]
    output: list[int]
    top_k: int
    weight: float
    temperature: float
    source: Any = ""
    columns: dict[str, Any] = field(default_factory=dict)


class Guide(Protocol):
    """Scores candidates."""

    def scores(self, rows: Sequence[Row], candidates: Tensor) -> Tensor:
        """(B, k) scores of each row's (B, k) candidate tokens; called once a step with all rows there are."""


class Combine(Protocol):
    """Makes a score of the (K, N) raw numbers of K members; `lengths` are response tokens, ends left out."""

    def __call__(self, raw: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) scores."""


@dataclass(slots=True)
class _State:
    """What the models hold of a row: how much of its output, its candidates and the prefix's own score."""

    seen: int
    own: float
    candidates: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


class TokenGuide:
    """Models that read the policy's tokens; all hold the same prefixes in the same places."""

    def __init__(
        self,
        models: Sequence[PrefixModel],
        combine: Combine,
        *,
        ends: frozenset[int],
        end_token: int,
        end_is_prefix: bool,
    ) -> None:
        """`end_token` is how the models know an end; `end_is_prefix`: ending is worth what the prefix is."""
        self._models = list(models)
        self._combine = combine
        self._ends = ends
        self._end_token = end_token
        self._end_is_prefix = end_is_prefix
        self._rows: list[Row] = []  # in the models' order
        self._states: list[_State] = []

    def scores(self, rows: Sequence[Row], candidates: Tensor) -> Tensor:
        """See `Guide`."""
        self._follow(rows)
        place = {id(row): number for number, row in enumerate(rows)}
        order = torch.tensor([place[id(row)] for row in self._rows])
        table = candidates.cpu()[order]  # (S, k), in the models' order
        read = table.clone()
        is_end = torch.isin(table, torch.tensor(sorted(self._ends)))
        read[is_end] = self._end_token
        raw = np.stack([model.score(read).double().numpy().ravel() for model in self._models])
        lengths = np.array([len(row.output) for row in self._rows], dtype=np.float64)[:, None]
        found = self._combine(raw, (lengths + ~is_end.numpy()).ravel()).reshape(table.shape)
        if self._end_is_prefix:
            own = np.array([state.own for state in self._states])[:, None]
            found = np.where(is_end.numpy(), own, found)
        for state, tokens, numbers in zip(self._states, table.tolist(), found.tolist(), strict=True):
            state.candidates, state.scores = tokens, numbers
        ordered = np.empty_like(found)
        ordered[order.numpy()] = found
        if not np.isfinite(ordered).all():
            raise GuideError("the guide's score of a prefix is not finite: its weights are at fault")
        return torch.from_numpy(ordered).float()

    def _follow(self, rows: Sequence[Row]) -> None:
        """Bring the models up to the rows' tokens: accept, let go of what ended, take in what is new."""
        wanted = {id(row) for row in rows}
        choices = [self._choice(row, state) for row, state in zip(self._rows, self._states, strict=True)]
        if any(choice is not None and choice >= 0 for choice in choices):
            taken = [choice if choice is not None and choice >= 0 else None for choice in choices]
            for model in self._models:
                model.accept(taken)
            for state, choice in zip(self._states, taken, strict=True):
                if choice is not None:
                    state.seen, state.own = state.seen + 1, state.scores[choice]
        stale = [
            number
            for number, (row, choice) in enumerate(zip(self._rows, choices, strict=True))
            if id(row) not in wanted or choice is None
        ]
        for number in reversed(stale):
            for model in self._models:
                model.remove(number)
            self._rows[number], self._states[number] = self._rows[-1], self._states[-1]
            self._rows.pop()
            self._states.pop()
        held = {id(row) for row in self._rows}
        self._take_in([row for row in rows if id(row) not in held])

    @staticmethod
    def _choice(row: Row, state: _State) -> int | None:
        """Which candidate the row's new token was; −1 where there is no new one; None where it is lost."""
        fresh = row.output[state.seen :]
        if not fresh and len(row.output) == state.seen:
            return -1
        if len(fresh) == 1 and fresh[0] in state.candidates:
            return state.candidates.index(fresh[0])
        return None

    def _take_in(self, fresh: Sequence[Row]) -> None:
        if not fresh:
            return
        prefixes = [[*row.prompt, *row.output] for row in fresh]
        raw = np.stack([model.add(prefixes).double().numpy() for model in self._models])
        own = self._combine(raw, np.array([len(row.output) for row in fresh], dtype=np.float64))
        self._rows += fresh
        self._states += [_State(len(row.output), float(o)) for row, o in zip(fresh, own, strict=True)]


class TextGuide:
    """Any rewards, asked about the text of each prefix with each candidate after it."""

    def __init__(self, reward: CombinedReward, tokenizer: Any, ends: frozenset[int]) -> None:
        self._reward = reward
        self._tokenizer = tokenizer
        self._ends = ends

    def scores(self, rows: Sequence[Row], candidates: Tensor) -> Tensor:
        """See `Guide`."""
        tokens = candidates.tolist()
        texts = self._tokenizer.batch_decode(
            [
                row.output if one in self._ends else [*row.output, one]
                for row, ones in zip(rows, tokens, strict=True)
                for one in ones
            ],
            skip_special_tokens=True,
        )
        rest = iter(texts)
        groups = [
            [
                RewardRequest(
                    row.source,
                    next(rest),
                    row.columns,
                    one in self._ends,
                    (*row.prompt, *row.output, one),
                )
                for one in ones
            ]
            for row, ones in zip(rows, tokens, strict=True)
        ]
        answers = self._reward.score_groups(groups, [False] * len(groups))
        return torch.tensor(
            [
                [_value(answer, request) for answer, request in zip(scored.answers, group, strict=True)]
                for scored, group in zip(answers, groups, strict=True)
            ]
        )


def _value(answer: Any, request: RewardRequest) -> float:
    if isinstance(answer, RewardError):
        raise GuideError(
            f"{answer} (asked about the unfinished response {request.completion!r:.80}: a reward that guides "
            "must be able to score every beginning of a response)"
        )
    return float(answer.value)


# ---- building one ----------------------------------------------------------------------------------------


def build_guide(spec: GuideSpec, tokenizer_path: str) -> Guide:
    """The guide that a specification describes, in this process."""
    if spec.kind == "value":
        return _critic(spec)
    if spec.kind == "reward_tokens":
        try:
            return _reward_model(spec)
        except UnsupportedModelError:
            pass  # its text can be scored all the same, only slower
    from transformers import AutoTokenizer

    reward = build_reward(
        spec.rewards,
        spec.task,
        timeout_s=spec.timeout_s,
        memory_gib=spec.memory_gib,
        directory=Path(spec.directory),
        environment=spec.environment,
        models=ModelPlace(spec.device, spec.precision, spec.micro_batch_tokens),
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)
    return TextGuide(reward, tokenizer, frozenset(spec.ends))


def _reward_model(spec: GuideSpec) -> TokenGuide:
    (one,) = spec.rewards
    folder = model_folder(one.path, Path(spec.directory))
    card = read_card(folder)
    models = []
    for member in range(card.members):
        whole = load_classifier(
            member_folder(folder, member, card.members), precision=spec.precision, device=spec.device
        )
        models.append(prefix_model(whole.base_model, getattr(whole, HEAD).weight[0], 0.0, spec.precision))
    return TokenGuide(
        models,
        _by_card(card, one.weight),
        ends=frozenset(spec.ends),
        end_token=spec.end_token,
        end_is_prefix=False,
    )


def _by_card(card: RewardCard, weight: float) -> Combine:
    def combine(raw: NDArray[np.float64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        return weight * scores_from_raw(raw, lengths, card).value

    return combine


def _critic(spec: GuideSpec) -> TokenGuide:
    from safetensors.torch import load_file

    backbone = load_backbone(spec.backbone, precision=spec.precision, device=spec.device)
    head = load_file(spec.head)
    model = prefix_model(backbone, head["weight"][0], float(head["bias"][0]), spec.precision)
    return TokenGuide(
        [model],
        lambda raw, lengths: raw[0],  # noqa: ARG005 - a critic's value knows the length already
        ends=frozenset(spec.ends),
        end_token=spec.end_token,
        end_is_prefix=True,
    )


def prefix_model(backbone: Any, head: Tensor, bias: float, precision: str) -> PrefixModel:
    """A `PrefixModel` that was checked; UnsupportedModelError."""
    text = backbone.config.get_text_config()
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"model type {text.model_type!r} looks back {text.sliding_window} tokens only, which is not "
            "supported token by token"
        )
    model = PrefixModel(backbone, head, bias)
    model.check(precision)
    return model
