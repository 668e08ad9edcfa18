"""Held-out evaluation: reward on prompts that are never trained on, and the gain with its interval."""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from actors.records import Group, Prompt, RewardFailure, SampledGroup, SampleRequest
from actors.settings import RolloutSettings
from cluster.remote import WorkerFailedError, WorkerLostError
from cluster.rollout_pool import RolloutPool
from cluster.scoring_pool import ScoringPool

_FIRST_ID = -1  # evaluation groups count downwards from here: training groups count upwards from 0


class EvaluationError(RuntimeError):
    """No held-out prompt could be scored."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out response, kept to be read by a person."""

    prompt_id: str
    prompt: str
    completion: str
    reward: float
    finished: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean reward of each held-out prompt that could be scored, by prompt id; the first sample of each."""

    version: int
    rewards: dict[str, float]
    samples: list[Sample]
    reward_errors: int
    kl_per_sequence: float
    mean_length: float

    @property
    def mean(self) -> float:
        """Mean over prompts."""
        return float(np.mean(list(self.rewards.values())))

    def metrics(self) -> dict[str, float]:
        """As values of a row of metrics."""
        values = np.array(list(self.rewards.values()))
        row = {
            "heldout/reward": self.mean,
            "heldout/kl_sequence": self.kl_per_sequence,
            "heldout/response_tokens": self.mean_length,
            "heldout/reward_errors": self.reward_errors,
        }
        if len(values) > 1:
            row["heldout/reward_ci95"] = _half_width(values)
        return row

    def to_json(self) -> str:
        """As JSON, for `load`."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read a file that holds `to_json`."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**(fields | {"samples": [Sample(**sample) for sample in fields["samples"]]}))


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean paired difference of two evaluations over prompts, with a 95 % t interval."""

    mean: float
    low: float
    high: float
    prompts: int


def paired_gain(before: Evaluation, after: Evaluation) -> Gain:
    """The gain of `after` over `before` on the prompts that both scored.

    The interval is mean ± t_{.975, n−1}·s/√n of the paired differences; it is a point where all differ by the
    same amount, and infinite for a single prompt.
    """
    common = sorted(before.rewards.keys() & after.rewards.keys())
    if not common:
        raise EvaluationError("the two evaluations share no prompt")
    difference = np.array([after.rewards[key] - before.rewards[key] for key in common])
    mean = float(difference.mean())
    if len(common) < 2:
        return Gain(mean, -math.inf, math.inf, len(common))
    half = _half_width(difference)
    return Gain(mean, mean - half, mean + half, len(common))


def _half_width(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """t_{.975, n−1}·s/√n, half of the 95 % interval of a mean of n ≥ 2 values."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


async def evaluate(
    prompts: Sequence[Prompt],
    rollouts: RolloutPool,
    scoring: ScoringPool,
    settings: RolloutSettings,
    *,
    samples: int,
    version: int,
) -> Evaluation:
    """Sample and score every prompt at the training temperature, spread over all rollout actors.

    Prompts whose reward failed are counted and left out; raises EvaluationError if that is all of them.
    """
    slots = asyncio.Semaphore(settings.max_groups_in_flight * len(rollouts.actors))

    async def one(index: int, prompt: Prompt) -> Group | RewardFailure:
        async with slots:
            request = SampleRequest(
                _FIRST_ID - index, prompt, samples, settings.max_new_tokens, settings.temperature
            )
            sampled = await _sample(rollouts, request, settings.max_attempts)
        return await scoring.score(sampled)

    answers = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
    return summarise(answers, version)


async def _sample(rollouts: RolloutPool, request: SampleRequest, attempts: int) -> SampledGroup:
    """Sample on the least busy actor, again where one failed or was lost."""
    for attempt in range(1, attempts + 1):
        actor = await rollouts.free_actor()
        rollouts.slots.begin(actor.remote.name)
        try:
            return await rollouts.sample(actor, request)
        except (WorkerFailedError, WorkerLostError):
            if attempt == attempts:
                raise
        finally:
            rollouts.free_slot(actor.remote.name)
    raise AssertionError("rollout.max_attempts is at least 1")


def summarise(answers: Sequence[Group | RewardFailure], version: int) -> Evaluation:
    """Put scored groups together to an evaluation."""
    groups = [answer for answer in answers if isinstance(answer, Group)]
    failures = [answer for answer in answers if isinstance(answer, RewardFailure)]
    if not groups:
        raise EvaluationError(
            f"no held-out prompt could be scored: reward {failures[0].reward!r} on prompt "
            f"{failures[0].prompt_id}: {failures[0].reason}"
        )
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    kl = [
        sum(t.completion.logprobs) - sum(t.reference_logprobs) for t in trajectories
    ]  # k1 against the reference, from the sampler's own log-probabilities
    return Evaluation(
        version=version,
        rewards={g.prompt.id: float(np.mean([t.reward for t in g.trajectories])) for g in groups},
        samples=[_first_sample(group) for group in groups],
        reward_errors=len(failures),
        kl_per_sequence=float(np.mean(kl)),
        mean_length=float(np.mean([len(t.completion.token_ids) for t in trajectories])),
    )


def _first_sample(group: Group) -> Sample:
    first = group.trajectories[0]
    return Sample(
        prompt_id=group.prompt.id,
        prompt=group.prompt.text,
        completion=first.completion.text,
        reward=first.reward,
        finished=first.completion.finished,
    )
