"""The scoring actor: rewards and the frozen reference's log-probabilities of sampled groups.

    [SampledGroup] ─▶ rewards, group by group; reward models, one batch each
                          ├─ any sample's error ─▶ RewardFailure in that group's place
                          └─▶ reference log-probabilities, one batch ─▶ [Group]

A plain class; `cluster` makes it a Ray actor. User functions are called one completion after another in one
child process for each `[[reward]]`: more throughput is had from more scoring actors (`scoring.actors`).
Reward models compute on the reference's device. Rewards of role `evaluate` are asked only for groups that
belong to an evaluation, so that training groups never wait for them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.records import (
    DiscriminatorProof,
    DiscriminatorUpdate,
    Group,
    RewardFailure,
    SampledGroup,
    Trajectory,
)
from actors.settings import ScoringSettings
from actors.shipping import ShippedFolder, local_folder
from rewards.base import RewardError, RewardRequest, Score
from rewards.build import build_reward
from rewards.combined import CombinedReward, ScoredRequests
from rewards.model_reward import ModelPlace
from rewards.settings import RewardSettings, TaskSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from actors.discriminator_sync import DiscriminatorReceiver

PENALTY = "missing_eos_penalty"


@dataclass(frozen=True, slots=True)
class ShippedModels(ShippedFolder):
    """The reference's folder, and with it those of the reward models, by label.

    Where a reward has a second model, `label/initial`, that one is under this name.
    """

    rewards: tuple[tuple[str, ShippedFolder], ...] = ()


@dataclass(frozen=True, slots=True)
class RewardedGroup:
    """A group whose samples all have a reward, on its way to the reference."""

    sampled: SampledGroup
    scores: tuple[Score, ...]
    seconds: float


class ScoringWorker:
    """Scores groups; `start` before the first `score`, `stop` at the end."""

    def __init__(
        self,
        name: str,
        reference_path: str,
        rewards: Sequence[RewardSettings],
        task: TaskSettings | None,
        scoring: ScoringSettings,
        *,
        dtype: str,
        attention: str,
        temperature: float,
        micro_batch_tokens: int,
        chunk_tokens: int,
        device: str,
        directory: str | None = None,
    ) -> None:
        """`temperature` is the sampling temperature; `directory` is where the user's functions are found."""
        self.name = name
        self._reference_path = reference_path
        self._reward_settings = list(rewards)
        self._task = task
        self._scoring = scoring
        self._dtype = dtype
        self._attention = attention
        self._temperature = temperature
        self._micro_batch_tokens = micro_batch_tokens
        self._chunk_tokens = chunk_tokens
        self._device = device
        self._directory = Path(directory) if directory else None
        self._reward: CombinedReward | None = None
        self._reference: PreTrainedModel | None = None
        self._discriminator: DiscriminatorReceiver | None = None

    def use_model(self, shipped: ShippedFolder, seconds: float) -> None:
        """Before `start`: take the reference from the driver's host, unless this is it; ShippingError.

        Reward models that come with it are taken too.
        """
        self._reference_path = str(local_folder(shipped, seconds))
        if isinstance(shipped, ShippedModels):
            here = {label: str(local_folder(folder, seconds)) for label, folder in shipped.rewards}
            self._reward_settings = [
                one.model_copy(update=_places(one.label, here)) for one in self._reward_settings
            ]

    def start(self) -> None:
        """Build the rewards (ValueError if one cannot work), then load the reference."""
        self._reward = build_reward(
            self._reward_settings,
            self._task,
            timeout_s=self._scoring.reward_timeout_s,
            memory_gib=self._scoring.reward_memory_gib,
            directory=self._directory,
            environment=self._scoring.reward_env,
            models=ModelPlace(self._device, self._dtype, self._micro_batch_tokens),
        )
        try:
            self.set_reference(self._reference_path)
        except BaseException:
            self.stop()
            raise

    def set_reference(self, path: str) -> None:
        """Load another reference in place of the present one."""
        from actors.language_model import load_causal_model

        self._reference = None  # freed first: two may not fit
        self._reference = load_causal_model(
            path, dtype=self._dtype, attention=self._attention, device=self._device
        )
        self._reference_path = path

    def load_discriminator(self, update: DiscriminatorUpdate, seconds: float) -> DiscriminatorProof:
        """Load and prove a version of the discriminator; what is scored from then on is scored by it."""
        from actors.discriminator_sync import DiscriminatorReceiver
        from rewards.models.discriminator import DiscriminatorReward

        assert self._reward is not None, "start() comes first"
        if self._discriminator is None:
            found = [one for one in self._reward.rewards if isinstance(one, DiscriminatorReward)]
            self._discriminator = DiscriminatorReceiver(self.name, found[0], self._dtype)
        return self._discriminator.load(update, seconds)

    def stop(self) -> None:
        """Kill the rewards' child processes and drop the reference; safe to call twice."""
        if self._discriminator is not None:
            self._discriminator.close()
        self._discriminator = None
        if self._reward is not None:
            self._reward.close()
        self._reward = None
        self._reference = None

    def score(self, groups: Sequence[SampledGroup]) -> list[Group | RewardFailure]:
        """One answer for each group, in order. A failure leaves the other groups as they are."""
        answers = self._reward_groups(groups)
        rewarded = [answer for answer in answers if isinstance(answer, RewardedGroup)]
        started = time.monotonic()
        logprobs = iter(self._reference_logprobs(rewarded))
        seconds = (time.monotonic() - started) / max(1, len(rewarded))
        return [
            answer if isinstance(answer, RewardFailure) else _finished(answer, next(logprobs), seconds)
            for answer in answers
        ]

    # --- Rewards -----------------------------------------------------------------------------------------

    def _reward_groups(self, groups: Sequence[SampledGroup]) -> list[RewardedGroup | RewardFailure]:
        assert self._reward is not None, "start() comes first"
        found = self._reward.score_groups(
            [_requests(group) for group in groups], [group.evaluation for group in groups]
        )
        return [self._rewarded(group, scored) for group, scored in zip(groups, found, strict=True)]

    def _rewarded(self, group: SampledGroup, scored: ScoredRequests) -> RewardedGroup | RewardFailure:
        scores: list[Score] = []
        for completion, answer in zip(group.completions, scored.answers, strict=True):
            if isinstance(answer, RewardError):
                return RewardFailure(group.group_id, group.prompt.id, answer.reward, answer.reason)
            scores.append(self._penalised(answer, completion.finished))
        return RewardedGroup(group, tuple(scores), scored.seconds)

    def _penalised(self, score: Score, finished: bool) -> Score:
        """Subtract `missing_eos_penalty` from a response that was cut off; shown as a component."""
        if self._scoring.missing_eos_penalty == 0:
            return score
        change = 0.0 if finished else -self._scoring.missing_eos_penalty
        return Score(score.value + change, {**score.components, PENALTY: change})

    # --- The reference -----------------------------------------------------------------------------------

    def _reference_logprobs(self, groups: Sequence[RewardedGroup]) -> list[list[tuple[float, ...]]]:
        """For each group, for each sample: the reference's log-probability of each response token."""
        import torch

        from actors.language_model import response_logprobs

        assert self._reference is not None, "start() comes first"
        pairs = [
            (group.sampled.prompt.token_ids, completion.token_ids)
            for group in groups
            for completion in group.sampled.completions
        ]
        values = response_logprobs(
            self._reference,
            pairs,
            temperature=self._temperature,
            micro_batch_tokens=self._micro_batch_tokens,
            chunk_tokens=self._chunk_tokens,
        )
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise RuntimeError(
                f"scoring actor {self.name!r}: the reference {self._reference_path!r} gave log-probabilities "
                "that are not finite; its weights or the precision are at fault"
            )
        rest = iter(values)
        return [[tuple(next(rest).tolist()) for _ in group.sampled.completions] for group in groups]


def _places(label: str, here: Mapping[str, str]) -> dict[str, str]:
    """The folders of one reward's models on this host, as `path` and `initial`, where it has any."""
    found = {"path": here.get(label), "initial": here.get(f"{label}/initial")}
    return {field: folder for field, folder in found.items() if folder is not None}


def _requests(group: SampledGroup) -> list[RewardRequest]:
    prompt = group.prompt
    return [
        RewardRequest(
            prompt.source or prompt.text,
            completion.text,
            prompt.row,
            completion.finished,
            (*prompt.token_ids, *completion.token_ids),
        )
        for completion in group.completions
    ]


def _finished(group: RewardedGroup, reference_logprobs: Sequence[tuple[float, ...]], seconds: float) -> Group:
    """Put samples, rewards and reference together; `seconds` is the group's share of the reference's time."""
    sampled = group.sampled
    trajectories = tuple(
        Trajectory(completion, score.value, dict(score.components), logprobs)
        for completion, score, logprobs in zip(
            sampled.completions, group.scores, reference_logprobs, strict=True
        )
    )
    return Group(
        group_id=sampled.group_id,
        prompt=sampled.prompt,
        trajectories=trajectories,
        actor=sampled.actor,
        sample_seconds=sampled.seconds,
        score_seconds=group.seconds + seconds,
    )
