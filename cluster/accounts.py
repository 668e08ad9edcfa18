"""What a run counts: totals, who waited for what, where lag came from, and whether long answers are missed.

Pure bookkeeping of numbers that the controller hands in; it completes each step's row for the monitor.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from actors.records import Group, SampledGroup, SyncProof
from cluster.scheduler import Refusal


class WaitCause(StrEnum):
    """What the learner waited for."""

    WINDOW = "window"  # slots were free, but S allowed no more groups
    AHEAD = "ahead"  # slots were free, but no more groups were wanted
    DEADLINE = "deadline"  # P groups were ready, but a slower one had to come along
    SAMPLING = "sampling"  # every slot was taken, or the run needs no more groups
    SYNC = "sync"  # actors had to load, or prove, newer weights first
    EVALUATION = "evaluation"  # newer weights, or a checkpoint, had to wait for the end of an evaluation


_CAUSE_OF_REFUSAL = {
    Refusal.WINDOW_FULL: WaitCause.WINDOW,
    Refusal.AHEAD_FULL: WaitCause.AHEAD,
    Refusal.STALE_ACTOR: WaitCause.SYNC,
    Refusal.NO_SLOT: WaitCause.SAMPLING,
    Refusal.BUDGET_SPENT: WaitCause.SAMPLING,
}


def wait_cause(*, enough_ready: bool, refusal: Refusal) -> WaitCause:
    """Why a step cannot start: P groups are ready but one must not be left behind, or why no more come."""
    return WaitCause.DEADLINE if enough_ready else _CAUSE_OF_REFUSAL[refusal]


@dataclass(slots=True)
class Occupancy:
    """How long all of several places were taken at once. The caller has the clock."""

    _taken: int = 0
    _full: bool = False
    _since: float = 0.0
    _seconds: float = 0.0

    def change(self, by: int, places: int, now: float) -> None:
        """So many more of the places are taken from now on."""
        self._count(now)
        self._taken += by
        self._full = 0 < places <= self._taken

    def lap(self, now: float) -> float:
        """Seconds since it was last asked in which no place was free."""
        self._count(now)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self, now: float) -> None:
        if self._full:
            self._seconds += now - self._since
        self._since = now


@dataclass(slots=True)
class Stopwatch:
    """Processor time that this thread spends in `with` blocks, in seconds. Blocks do not nest."""

    total: float = 0.0
    _lap: float = 0.0
    _since: float = 0.0

    def __enter__(self) -> None:
        self._since = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.total += time.thread_time() - self._since

    def lap(self) -> float:
        """What was added since it was last asked."""
        added, self._lap = self.total - self._lap, self.total
        return added


@dataclass(frozen=True, slots=True)
class TakenGroup:
    """A group as a step takes it, and its times; `ready_step`: steps finished when it was ready."""

    group: Group
    ready_step: int
    trace: dict[str, Any]


@dataclass(slots=True)
class Totals:
    """What a run has done so far; saved with each checkpoint so that a resumed run goes on counting.

    `groups_dropped` had a reward error, `groups_left_out` one reward for all samples (dynamic sampling).
    `elapsed_s` is the time of training so far, of which `paused_s` went into checkpoints and into evaluations
    that pause. The dictionaries count responses by length in tokens (keys are text, as JSON has them): those
    that were sampled, and those of them that were trained on.
    """

    tokens_generated: int = 0
    tokens_trained: int = 0
    groups_dispatched: int = 0
    groups_sampled: int = 0
    groups_trained: int = 0
    groups_dropped: int = 0
    groups_left_out: int = 0
    prompt_tokens_dispatched: int = 0
    prompt_tokens_trained: int = 0
    lag_sum: float = 0.0
    lag_max: int = 0
    learner_wait_s: float = 0.0
    train_s: float = 0.0
    sync_s: float = 0.0
    syncs: int = 0
    sync_probe_max_abs_diff: float = 0.0
    padding_sum: float = 0.0
    steps: int = 0
    elapsed_s: float = 0.0
    paused_s: float = 0.0
    scoring_exposed_s: float = 0.0
    wait_by_cause: dict[str, float] = field(default_factory=dict)
    lengths_sampled: dict[str, int] = field(default_factory=dict)
    lengths_trained: dict[str, int] = field(default_factory=dict)

    def dispatched(self, prompt_tokens: int) -> None:
        """A group was sent to an actor for the first time."""
        self.groups_dispatched += 1
        self.prompt_tokens_dispatched += prompt_tokens

    def sampled(self, group: SampledGroup) -> None:
        """A group came back, whatever becomes of it."""
        lengths = [len(completion.token_ids) for completion in group.completions]
        self.groups_sampled += 1
        self.tokens_generated += sum(lengths)
        _count_lengths(self.lengths_sampled, lengths)

    def trained(self, groups: Sequence[Group], row: Mapping[str, float]) -> None:
        """A step was taken on these groups."""
        lengths = [len(t.completion.token_ids) for group in groups for t in group.trajectories]
        self.steps += 1
        self.tokens_trained += sum(lengths)
        self.groups_trained += len(groups)
        self.prompt_tokens_trained += sum(len(group.prompt.token_ids) for group in groups)
        _count_lengths(self.lengths_trained, lengths)
        self.lag_sum += row["lag/mean"]
        self.lag_max = max(self.lag_max, int(row["lag/max"]))
        self.padding_sum += row["perf/padding_fraction"]

    def waited(self, waits: Mapping[WaitCause, float]) -> None:
        """The learner waited for so many seconds, by cause."""
        for cause, seconds in waits.items():
            self.learner_wait_s += seconds
            self.wait_by_cause[cause.value] = self.wait_by_cause.get(cause.value, 0.0) + seconds

    def synced(self, proofs: Sequence[SyncProof], seconds: float) -> None:
        """Weights were published and proved."""
        self.sync_s += seconds
        self.syncs += 1
        probe = max(proof.probe_max_abs_diff for proof in proofs)
        self.sync_probe_max_abs_diff = max(self.sync_probe_max_abs_diff, probe)


def _count_lengths(counts: dict[str, int], lengths: Iterable[int]) -> None:
    for length, number in Counter(lengths).items():
        counts[str(length)] = counts.get(str(length), 0) + number


def length_quantile(counts: Mapping[str, int], share: float) -> float:
    """The smallest length that at least `share` of the responses do not exceed; 0 where there are none."""
    wanted, seen = share * sum(counts.values()), 0
    for length in sorted(map(int, counts)):
        seen += counts[str(length)]
        if seen >= wanted:
            return float(length)
    return 0.0


def mean_length(counts: Mapping[str, int]) -> float:
    """Mean length of the counted responses; 0 where there are none."""
    number = sum(counts.values())
    return sum(int(length) * count for length, count in counts.items()) / number if number else 0.0


def length_histogram(totals: Totals, bins: int = 40) -> dict[str, list[int]]:
    """Responses by length in at most `bins` bins of equal width: those sampled, and those of them trained on.

    Bin i holds the lengths from edges[i] up to, not including, edges[i + 1].
    """
    longest = max(map(int, totals.lengths_sampled), default=0)
    width = longest // bins + 1
    edges = list(range(0, longest + width + 1, width))

    def counts(lengths: Mapping[str, int]) -> list[int]:
        found = [0] * (len(edges) - 1)
        for length, number in lengths.items():
            found[int(length) // width] += number
        return found

    return {
        "edges": edges,
        "sampled": counts(totals.lengths_sampled),
        "trained": counts(totals.lengths_trained),
    }


def length_metrics(totals: Totals) -> dict[str, float]:
    """Whether training sees what was sampled, over the whole run: what is still on its way counts little.

    `length/bias` is (mean trained − mean sampled) / mean sampled: below 0, long answers are missed.
    """
    sampled, trained = mean_length(totals.lengths_sampled), mean_length(totals.lengths_trained)
    prompts_dispatched = totals.prompt_tokens_dispatched / max(1, totals.groups_dispatched)
    prompts_trained = totals.prompt_tokens_trained / max(1, totals.groups_trained)
    return {
        "length/sampled_mean": sampled,
        "length/sampled_p50": length_quantile(totals.lengths_sampled, 0.5),
        "length/sampled_p90": length_quantile(totals.lengths_sampled, 0.9),
        "length/sampled_p99": length_quantile(totals.lengths_sampled, 0.99),
        "length/trained_p90": length_quantile(totals.lengths_trained, 0.9),
        "length/bias": (trained - sampled) / sampled if sampled else 0.0,
        "length/prompt_bias": (prompts_trained - prompts_dispatched) / prompts_dispatched,
    }


def lag_split(taken: Sequence[TakenGroup], step: int) -> dict[str, float]:
    """Mean lag over tokens, split where the group was ready: lag = (ready − version) + (step − ready).

    `ready` counts the learner steps that were finished when the group was ready. In flight: steps that ended
    while it was sampled and scored; in queue: those that ended while it waited. Their sum is `lag/mean`.
    """
    in_flight = in_queue = tokens = 0
    for one in taken:
        for trajectory in one.group.trajectories:
            versions = trajectory.completion.versions
            in_flight += one.ready_step * len(versions) - sum(versions)
            in_queue += (step - one.ready_step) * len(versions)
            tokens += len(versions)
    return {"lag/in_flight_mean": in_flight / tokens, "lag/in_queue_mean": in_queue / tokens}


def reward_components(groups: Sequence[Group]) -> dict[str, float]:
    """Mean of every reward, and of every number it logs beside, over the samples that have it."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for trajectory in group.trajectories:
            for label, value in trajectory.components.items():
                values.setdefault(f"reward/{label}", []).append(value)
    return {label: sum(found) / len(found) for label, found in values.items()}


def sync_metrics(proofs: Sequence[SyncProof], seconds: float) -> dict[str, float]:
    """What one publication took, and how far the worst actor was from the learner."""
    return {
        "timing_s/sync": seconds,
        "timing_s/sync_load": max(proof.load_seconds for proof in proofs),
        "timing_s/sync_probe": max(proof.probe_seconds for proof in proofs),
        "sync/probe_max_abs_diff": max(proof.probe_max_abs_diff for proof in proofs),
    }


def pace_metrics(
    groups: Sequence[Group],
    *,
    step_s: float,
    busy_s: float,
    rollout_idle_s: float,
    waits: Mapping[WaitCause, float],
) -> dict[str, float]:
    """Where a step's time went. `busy_s` is the learner's own work in it, training and publishing.

    η = max(G, T) / step, with G the time that rollout actors had work (mean) and T the learner's: 1 where the
    slower of the two never waits.
    """
    tokens = sum(len(t.completion.token_ids) for group in groups for t in group.trajectories)
    waited = sum(waits.values())
    metrics = {
        "timing_s/sample_mean": sum(group.sample_seconds for group in groups) / len(groups),
        "timing_s/sample_max": max(group.sample_seconds for group in groups),
        "timing_s/score_mean": sum(group.score_seconds for group in groups) / len(groups),
        "timing_s/step": step_s,
        "wait/learner_s": waited,
        "wait/rollout_s": rollout_idle_s,
        "perf/tokens_per_s": tokens / step_s,
        "perf/learner_wait_fraction": waited / step_s,
        "perf/rollout_wait_fraction": rollout_idle_s / step_s,
        "perf/efficiency": max(busy_s, step_s - rollout_idle_s) / step_s,
    }
    return metrics | {f"wait/by_cause/{cause.value}": waits.get(cause, 0.0) for cause in WaitCause}


def scoring_exposed(trace: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the learner waited for one step while nothing but scoring was outstanding.

    `trace` is a step's, as `StepReport` has it: the times of the groups it took, then its own. With the last
    group sampled at s = max sampled_s and scored at r = max scored_s, and the learner free from w and at work
    from t: max(0, min(r, t) − max(s, w)). Had scoring taken no time, the step could have begun that much
    earlier.
    """
    *groups, step = trace
    sampled = max(group["sampled_s"] for group in groups)
    scored = max(group["scored_s"] for group in groups)
    seconds: float = min(scored, step["train_from_s"]) - max(sampled, step["wait_from_s"])
    return max(0.0, seconds)
