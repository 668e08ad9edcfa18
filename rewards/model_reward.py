"""A trained reward model as a reward: its folder is checked at once, its weights are loaded where it scores.

    [[reward]] ─▶ ModelReward: card, version, labels, checked everywhere ─▶ load: in the scoring actor only

A model of role `evaluate` judges what the trained ones say, so it must not have learned from their labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rewards.base import RewardError, RewardRequest, Score
from rewards.models.card import RewardCard, read_card, read_label_keys
from rewards.models.text import EncodingError
from rewards.settings import RewardSettings

if TYPE_CHECKING:
    from rewards.models.loading import RewardModel
    from rewards.models.text import Item

STD = "std"  # the component with an ensemble's disagreement on a response


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Where reward models compute: a torch device, float32 or bfloat16, and tokens of one forward pass."""

    device: str
    precision: str
    micro_batch_tokens: int


class ModelReward:
    """A reward model as a `rewards.base.Reward`. An ensemble's standard deviation is its component `std`."""

    def __init__(self, label: str, folder: Path, *, check_version: bool = True) -> None:
        """Read the card; ValueError where the folder is no reward model or was changed after training.

        `check_version` reads all weights for that; `load` does so anyway.
        """
        self.label = label
        self.folder = folder
        try:
            self.card: RewardCard = read_card(folder, check_version=check_version)
        except ValueError as error:
            raise ValueError(f"reward.path of {label!r}: {error}") from None
        self._model: RewardModel | None = None

    @property
    def version(self) -> str:
        """SHA-256 over weights, tokenizer and what turns them into a score."""
        return self.card.version

    def load(self, place: ModelPlace) -> None:
        """Load the weights. Until then `score` may not be called."""
        from rewards.models.loading import load_reward_model

        try:
            self._model = load_reward_model(
                self.folder,
                device=place.device,
                precision=place.precision,
                micro_batch_tokens=place.micro_batch_tokens,
            )
        except ValueError as error:
            raise ValueError(f"reward.path of {self.label!r}: {error}") from None

    def score(self, requests: Sequence[RewardRequest]) -> list[Score | RewardError]:
        """One answer for each request, all of them in one batch."""
        items = [(request.prompt, request.completion, request.finished) for request in requests]
        try:
            return self._scored(items)
        except EncodingError:
            unreadable = self._unreadable(items)
        rest = iter(self._scored([item for i, item in enumerate(items) if i not in unreadable]))
        return [unreadable[i] if i in unreadable else next(rest) for i in range(len(items))]

    def close(self) -> None:
        """Drop the weights; safe to call twice."""
        self._model = None

    def _unreadable(self, items: Sequence["Item"]) -> dict[int, RewardError]:
        """What the model cannot read whole, by place: too long, or of unknown characters."""
        assert self._model is not None, "load() comes first"
        found = {}
        for i, item in enumerate(items):
            try:
                self._model.encode([item])
            except EncodingError as error:
                found[i] = RewardError(self.label, str(error))
        return found

    def _scored(self, items: Sequence["Item"]) -> list[Score | RewardError]:
        assert self._model is not None, "load() comes first"
        if not items:
            return []
        scores = self._model.score(items)
        ensemble = self.card.members > 1
        return [
            Score(float(value), {STD: float(std)} if ensemble else {})
            if np.isfinite(value) and np.isfinite(std)
            else RewardError(self.label, f"the model's score is {value:g}, its standard deviation {std:g}")
            for value, std in zip(scores.value, scores.std, strict=True)
        ]


def refuse_shared_labels(trained: Sequence[ModelReward], held_out: Sequence[ModelReward]) -> None:
    """ValueError where a model that only evaluates has learned from labels of a model that is trained on.

    Labels are compared by prompt: two labels of one prompt are not independent.
    """
    for judge in held_out:
        theirs = _labels(judge)
        for model in trained:
            if judge.version == model.version:
                raise ValueError(
                    f'reward.path = {str(judge.folder)!r} of {judge.label!r} (role = "evaluate") is the very '
                    f"model that {model.label!r} trains on: train another one on other labels"
                )
            if shared := len(theirs & _labels(model)):
                raise ValueError(
                    f'reward.path = {str(judge.folder)!r} of {judge.label!r} (role = "evaluate") was trained '
                    f"on labels of {shared} prompts of which {model.label!r} has labels too, so it would "
                    'repeat that model\'s errors: train the two on disjoint labels (part = "a" and '
                    'part = "b" of the preferences)'
                )


def _labels(model: ModelReward) -> frozenset[str]:
    try:
        return read_label_keys(model.folder)
    except ValueError as error:
        raise ValueError(f"reward.path of {model.label!r}: {error}") from None


def model_folder(path: str, directory: Path) -> Path:
    """The folder that `reward.path` names; a relative one stands in `directory`."""
    return (directory / Path(path).expanduser()).resolve()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a run says of one of its reward models; the version is the SHA-256 that its card states."""

    path: str
    role: str
    version: str
    members: int
    labels: int
    accuracy: float | None

    def in_words(self) -> str:
        """As a line for people."""
        found = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f} on pairs it had not seen"
        count = "1 member" if self.members == 1 else f"{self.members} members"
        return f"{self.path}, version {self.version[:12]}, {count}, {self.labels} labels{found}"


def model_facts(settings: Sequence[RewardSettings], directory: Path | None = None) -> dict[str, ModelFacts]:
    """The facts of each reward model, by label; ValueError where a folder is none."""
    facts = {}
    for one in (one for one in settings if one.kind == "model"):
        folder = model_folder(one.path, (directory or Path.cwd()).resolve())
        card = read_card(folder, check_version=False)
        facts[one.label] = ModelFacts(
            str(folder), one.role, card.version, card.members, card.labels, card.accuracy
        )
    return facts


def refuse_other_versions(before: Mapping[str, str], now: Mapping[str, ModelFacts]) -> None:
    """ValueError where a resumed run would go on with another model than it began with."""
    for label, facts in now.items():
        version = before.get(label, facts.version)
        if version != facts.version:
            raise ValueError(
                f"reward.path = {facts.path!r} of {label!r} has version {facts.version[:12]}, but the run "
                f"was started with {version[:12]}: put that model back, or start a new run"
            )
