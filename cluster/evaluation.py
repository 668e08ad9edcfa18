"""Held-out evaluation: rewards on prompts that are never trained on, and the gain with its interval.

prompts ─► rollout actors ─► scoring actors ─► Evaluation ─► metrics, samples, over-optimisation
                             (rewards of role `evaluate` too)
"""

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from actors.records import Group, Prompt, RewardFailure, SampledGroup, SampleRequest, Trajectory
from actors.settings import RolloutSettings
from cluster.pass_at_k import PassRule, over_prompts
from cluster.rollout_pool import RolloutPool
from cluster.scoring_pool import ScoringPool

_FIRST_ID = -1  # evaluation groups count downwards from here: training groups count upwards from 0


class EvaluationError(RuntimeError):
    """No held-out prompt could be scored, or one was sampled with other weights than those to be measured."""


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
    """Mean reward of each held-out prompt that could be scored, by prompt id; the first sample of each.

    `rewards` is the training reward. `components` has the same means of every single reward, and of every
    number that it logs beside, by name: those of role `evaluate` are there and nowhere else. `kl_k3` is the
    mean over samples of Σ_t (e^(−δ) − 1 + δ), δ = log μ − log π_ref, which is never negative; `entropy` is
    −mean log μ over tokens, an estimate of the policy's entropy from its own samples; `lengths` are the mean
    response tokens of each prompt; `passed` has [samples that passed, samples] of each, where it is asked.
    `reward_std` and `heldout_std` are standard deviations over all responses, of the training reward and of
    the mean of the held-out rewards; None where fewer than two responses have one.
    """

    version: int
    rewards: dict[str, float]
    samples: list[Sample]
    reward_errors: int
    kl_per_sequence: float
    mean_length: float
    components: dict[str, dict[str, float]] = field(default_factory=dict)
    kl_k3: float | None = None
    entropy: float | None = None
    finished_fraction: float | None = None
    lengths: dict[str, float] = field(default_factory=dict)
    passed: dict[str, list[int]] = field(default_factory=dict)
    reward_std: float | None = None
    heldout_std: float | None = None

    @property
    def mean(self) -> float:
        """Mean over prompts."""
        return float(np.mean(list(self.rewards.values())))

    def mean_of(self, label: str) -> float | None:
        """Mean over prompts of one reward, by its label; None if it was not asked."""
        found = self.components.get(label)
        return float(np.mean(list(found.values()))) if found else None

    def metrics(self, evaluated: Iterable[str] = ()) -> dict[str, float]:
        """As values of a row of metrics; `evaluated` are the labels of the rewards of role `evaluate`."""
        row = {
            "heldout/reward": self.mean,
            "heldout/kl_sequence": self.kl_per_sequence,
            "heldout/response_tokens": self.mean_length,
            "heldout/reward_errors": self.reward_errors,
        }
        measured = {
            "heldout/kl_sequence_k3": self.kl_k3,
            "heldout/entropy": self.entropy,
            "heldout/finished_fraction": self.finished_fraction,
        }
        row |= {name: value for name, value in measured.items() if value is not None}
        row |= _with_interval("heldout/reward", self.rewards)
        for k, (mean, half) in over_prompts(self.passed).items():
            row[f"heldout/pass_at/{k}"] = mean
            if half is not None:
                row[f"heldout/pass_at/{k}_ci95"] = half
        alone = set(evaluated)
        for label, means in self.components.items():
            owner = label.split("/")[0]
            name = f"heldout/{label}" if owner in alone else f"heldout/reward/{label}"
            row[name] = float(np.mean(list(means.values())))
            if label in alone:
                row |= _with_interval(name, means)
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
    half = half_width(difference)
    return Gain(mean, mean - half, mean + half, len(common))


def _with_interval(name: str, means: Mapping[str, float]) -> dict[str, float]:
    """The half width of the interval of a mean over prompts, if there are two of them."""
    values = np.array(list(means.values()))
    return {f"{name}_ci95": half_width(values)} if len(values) > 1 else {}


def half_width(values: NDArray[np.float64]) -> float:
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
    rule: PassRule | None = None,
    heldout_rewards: Sequence[str] = (),
    on_free: Callable[[], None] | None = None,
) -> Evaluation:
    """Sample and score every prompt at the training temperature, spread over all rollout actors.

    Prompts whose reward failed are counted and left out; raises EvaluationError if that is all of them, or if
    a token was not sampled with the weights of `version`, which no actor may change before this returns.

    Args:
        prompts: held-out prompts.
        rollouts: who samples. A held-out prompt that waits for a slot has the next one that is free.
        scoring: who scores.
        settings: `[rollout]`.
        samples: responses to each prompt.
        version: of the weights that all actors hold.
        rule: what it is to pass, for pass@k.
        heldout_rewards: labels of those whose mean is the held-out reward, for its standard deviation.
        on_free: given where training goes on beside, which keeps half of the slots; called when there may be
            one for it.
    """
    each = settings.max_groups_in_flight if on_free is None else max(1, settings.max_groups_in_flight // 2)
    slots = asyncio.Semaphore(each * max(1, len(rollouts.actors)))

    async def one(index: int, prompt: Prompt) -> Group | RewardFailure:
        async with slots:
            request = SampleRequest(
                _FIRST_ID - index, prompt, samples, settings.max_new_tokens, settings.temperature
            )
            sampled = await rollouts.sample_anywhere(request, on_free)
        _refuse_other_versions(sampled, version)
        if on_free is not None:
            on_free()
        return await scoring.score(replace(sampled, evaluation=True))

    answers = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
    return summarise(answers, version, rule, heldout_rewards)


def _refuse_other_versions(sampled: SampledGroup, version: int) -> None:
    found = {one for completion in sampled.completions for one in completion.versions}
    if found != {version}:
        raise EvaluationError(
            f"{sampled.actor} sampled held-out prompt {sampled.prompt.id} with weights of version "
            f"{', '.join(map(str, sorted(found)))}, but version {version} is to be evaluated"
        )


def summarise(
    answers: Sequence[Group | RewardFailure],
    version: int,
    rule: PassRule | None = None,
    heldout_rewards: Sequence[str] = (),
) -> Evaluation:
    """Put scored groups together to an evaluation."""
    groups = [answer for answer in answers if isinstance(answer, Group)]
    failures = [answer for answer in answers if isinstance(answer, RewardFailure)]
    if not groups:
        raise EvaluationError(
            f"no held-out prompt could be scored: reward {failures[0].reward!r} on prompt "
            f"{failures[0].prompt_id}: {failures[0].reason}"
        )
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    k1, k3 = zip(*(_kl(trajectory) for trajectory in trajectories), strict=True)
    logprobs = [logprob for t in trajectories for logprob in t.completion.logprobs]
    return Evaluation(
        version=version,
        rewards={g.prompt.id: float(np.mean([t.reward for t in g.trajectories])) for g in groups},
        samples=[_first_sample(group) for group in groups],
        reward_errors=len(failures),
        kl_per_sequence=float(np.mean(k1)),
        mean_length=float(np.mean([len(t.completion.token_ids) for t in trajectories])),
        components=_component_means(groups),
        kl_k3=float(np.mean(k3)),
        entropy=-float(np.mean(logprobs)),
        finished_fraction=float(np.mean([t.completion.finished for t in trajectories])),
        lengths={
            g.prompt.id: float(np.mean([len(t.completion.token_ids) for t in g.trajectories])) for g in groups
        },
        passed=rule.counts(groups) if rule is not None else {},
        reward_std=_std([t.reward for t in trajectories]),
        heldout_std=_std(_means_over(heldout_rewards, trajectories)),
    )


def _means_over(labels: Sequence[str], trajectories: Sequence[Trajectory]) -> list[float]:
    """Mean of these components of each response that has them all."""
    having = [t.components for t in trajectories if labels and t.components.keys() >= set(labels)]
    return [float(np.mean([components[label] for label in labels])) for components in having]


def _std(values: Sequence[float]) -> float | None:
    """Standard deviation with n − 1; None of fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _kl(trajectory: Trajectory) -> tuple[float, float]:
    """k1 and k3 of a sequence against the reference, from the sampler's own log-probabilities.

    With δ_t = log μ − log π_ref of a token: k1 = Σ δ_t, k3 = Σ (e^(−δ_t) − 1 + δ_t). Both estimate
    KL(μ‖π_ref) without bias; k3 is never negative (Schulman, "Approximating KL divergence").
    """
    delta = np.array(trajectory.completion.logprobs) - np.array(trajectory.reference_logprobs)
    return float(delta.sum()), float((np.expm1(-delta) + delta).sum())


def _component_means(groups: Sequence[Group]) -> dict[str, dict[str, float]]:
    """Mean of every component over the samples of each prompt that have it: label → prompt id → mean."""
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        values: dict[str, list[float]] = {}
        for trajectory in group.trajectories:
            for label, value in trajectory.components.items():
                values.setdefault(label, []).append(value)
        for label, several in values.items():
            found.setdefault(label, {})[group.prompt.id] = float(np.mean(several))
    return found


def _first_sample(group: Group) -> Sample:
    first = group.trajectories[0]
    return Sample(
        prompt_id=group.prompt.id,
        prompt=group.prompt.text,
        completion=first.completion.text,
        reward=first.reward,
        finished=first.completion.finished,
    )
