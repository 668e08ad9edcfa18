"""What a simulated run is asked, and what it gives: the cluster; a record of every step; their summary."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from cluster.accounts import WaitCause
from cluster.config import JobConfig
from cluster.plan_model import Drift
from cluster.scheduler import SchedulerSettings


@dataclass(frozen=True, slots=True)
class Plant:
    """The cluster that is simulated: what a configuration sets."""

    groups_per_step: int
    group_size: int
    actors: int
    max_groups_in_flight: int
    max_num_seqs: int
    max_new_tokens: int
    scorers: int
    scheduler: SchedulerSettings
    keep_in_flight: bool = True


def plant_of(config: JobConfig) -> Plant:
    """The cluster that a job's configuration asks for."""
    return Plant(
        groups_per_step=config.groups_per_step,
        group_size=config.rollout.group_size,
        actors=config.rollout.actors,
        max_groups_in_flight=config.rollout.max_groups_in_flight,
        max_num_seqs=config.rollout.max_num_seqs,
        max_new_tokens=config.rollout.max_new_tokens,
        scorers=config.scoring.actors,
        scheduler=config.scheduler,
        keep_in_flight=config.sync.in_flight == "keep",
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Who did what, from when to when: for a picture."""

    kind: str
    who: str
    start: float
    end: float
    step: int = -1


@dataclass(slots=True)
class StepRecord:
    """One learner step. Times in wall-clock seconds; `lags` counts its tokens by lag."""

    step: int
    started: float
    tokens: int
    lags: Counter[int]
    queue_lag: float
    waits: dict[WaitCause, float]
    sample_s: float
    window: int
    publish_every: int
    queued: int
    in_flight: int
    train_s: float = 0.0
    ended: float = 0.0
    publish_s: float = 0.0
    sync_s: float = 0.0
    rollout_busy_s: float = 0.0

    @property
    def lag_mean(self) -> float:
        """Mean over tokens."""
        return sum(lag * tokens for lag, tokens in self.lags.items()) / self.tokens


@dataclass(frozen=True, slots=True)
class Steady:
    """Means over the steps after the first, in which queues fill.

    `generation_s` is G: the time that an actor had work for, in a step; `learner_s` is T: training and
    publishing. `efficiency` = η = max(G, T) / step.
    """

    step_s: float
    generation_s: float
    learner_s: float
    train_s: float
    publish_s: float
    sync_s: float
    sample_s: float
    learner_wait_fraction: float
    rollout_wait_fraction: float
    efficiency: float
    tokens_per_s: float
    lag_mean: float
    lag_in_queue_mean: float
    lag_max: int
    lag_shares: dict[int, float]
    waits: dict[str, float]
    window: float
    publish_every: float


@dataclass(frozen=True, slots=True)
class SimResult:
    """A whole simulated run."""

    plant: Plant
    records: list[StepRecord]
    seconds: float
    transitions: int
    losses: int
    spans: list[Span] = field(default_factory=list)
    shown: tuple[float, float] = (0.0, 0.0)  # what the spans cover
    occupancy: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # (when, groups at the actor)

    @property
    def steady_steps(self) -> tuple[int, int]:
        """From and to which step the run is steady.

        Queues are full after the first quarter; in the last S + 1 steps, where no more groups are wanted than
        are under way, they run empty.
        """
        count = len(self.records)
        last = max(record.window for record in self.records) + 1
        skip = max(2, count // 4)
        return (skip, count - last) if count - last > skip else (0, count)

    def steady(self, steps: tuple[int, int] | None = None) -> Steady:
        """Summary of the steady steps, or of those from and to the given ones."""
        records = self.records
        skip, end = steps or self.steady_steps
        kept = records[skip:end]
        before = records[skip - 1].ended if skip else 0.0
        count, seconds = len(kept), kept[-1].ended - before
        lags: Counter[int] = Counter()
        waits: Counter[str] = Counter()
        for record in kept:
            lags.update(record.lags)
            waits.update({cause.value: wait for cause, wait in record.waits.items()})
        tokens = sum(lags.values())
        step_s = seconds / count
        train_s, publish_s = (
            fmean(r.train_s for r in kept),
            fmean(r.publish_s for r in records[max(0, skip - 1) : -1] or kept),
        )
        busy = fmean(record.rollout_busy_s for record in kept)
        synced = [record.sync_s for record in kept if record.sync_s]
        return Steady(
            step_s=step_s,
            generation_s=busy,
            learner_s=train_s + publish_s,
            train_s=train_s,
            publish_s=publish_s,
            sync_s=fmean(synced) if synced else 0.0,
            sample_s=fmean(record.sample_s for record in kept),
            learner_wait_fraction=max(0.0, 1 - (train_s + publish_s) / step_s),
            rollout_wait_fraction=max(0.0, 1 - busy / step_s),
            efficiency=min(1.0, max(busy, train_s + publish_s) / step_s),
            tokens_per_s=tokens / seconds,
            lag_mean=sum(lag * n for lag, n in lags.items()) / tokens,
            lag_in_queue_mean=sum(r.queue_lag * r.tokens for r in kept) / tokens,
            lag_max=max(lags),
            lag_shares={lag: n / tokens for lag, n in sorted(lags.items())},
            waits={cause: wait / count for cause, wait in waits.items()},
            window=fmean(record.window for record in kept),
            publish_every=fmean(record.publish_every for record in kept),
        )


def synthetic_mismatch(lags: Mapping[int, int], drift: Drift, rng: np.random.Generator) -> dict[str, float]:
    """What the learner would have measured of tokens with these lags: D(s) = a + b·s and ESS, with noise."""
    row: dict[str, float] = {}
    weights = 0.0
    for lag, tokens in lags.items():
        kl = drift.engine + drift.per_version * lag
        kl *= max(0.0, 1 + drift.noise * rng.standard_normal()) if drift.noise else 1.0
        ess = drift.ess_per_version**lag
        row |= {
            f"mismatch/tokens_by_lag/{lag}": float(tokens),
            f"mismatch/kl_by_lag/{lag}": kl,
            f"mismatch/kl_se_by_lag/{lag}": kl * max(drift.noise, 1e-6),
            f"mismatch/ess_by_lag/{lag}": ess,
        }
        weights += tokens / ess  # ESS = (Σw)²/(nΣw²) with mean w = 1: 1/ESS is the mean of w²
    row["mismatch/ess"] = sum(lags.values()) / weights if weights and math.isfinite(weights) else 1.0
    return row
