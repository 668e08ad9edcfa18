"""Over-optimisation, live: what each evaluation shows of a reward being gamed, and what is done about it.

    Evaluation ─► proxy, held-out, gold, √KL, gap, disagreement ─► row of metrics
              ├─► stop rules ─► Verdict: stop or warn, why, and what it cannot see
              └─► is it the best so far by held-out reward? ─► a checkpoint that is kept

Bookkeeping only: `cluster.heldout` calls it and tells the run. Its state goes into every checkpoint, so that
a resumed run compares with the same first evaluation and the same best one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.evaluation import Evaluation, half_width
from rewards.model_reward import STD
from rewards.overoptimisation import Record, StopRules, Verdict
from rewards.overoptimisation_settings import StopSettings
from rewards.roles import roles_of
from rewards.settings import RewardSettings

Means = dict[str, float]
"""A reward's mean over the responses to each prompt, by prompt id."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an evaluation led to: values for the metrics, a rule that fired, whether it is the best so far."""

    row: dict[str, float]
    verdict: Verdict | None
    is_best: bool


class OverOptimisation:
    """Feed it every evaluation in order, that before training first."""

    def __init__(
        self,
        rewards: Sequence[RewardSettings],
        settings: StopSettings,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state` is what `state()` gave when the checkpoint was made that a run goes on from."""
        self.roles = roles_of(rewards)
        self.last_step = state["last_step"] if state else -1
        self.verdicts: list[dict[str, Any]] = list(state["verdicts"]) if state else []
        self.best: dict[str, Any] | None = state["best"] if state else None
        self._rules = StopRules(settings, state["rules"] if state else None)

    def state(self) -> dict[str, Any]:
        """Everything that later evaluations are compared with, in JSON's types."""
        return {
            "last_step": self.last_step,
            "verdicts": self.verdicts,
            "best": self.best,
            "rules": self._rules.state(),
        }

    @property
    def unjudged(self) -> Mapping[str, str]:
        """Rules that are on and could not judge the last evaluation, and why not."""
        return self._rules.unjudged

    def observe(self, evaluation: Evaluation, *, candidate: bool) -> Observation:
        """Take in an evaluation. A `candidate` may become the best: the policy before training is none."""
        heldout = self._heldout(evaluation)
        disagreement = _disagreement(evaluation, self.roles.models)
        verdict = self._rules.feed(
            Record(
                step=evaluation.version,
                kl=evaluation.kl_per_sequence,
                proxy=evaluation.mean,
                heldout=heldout or None,
                proxy_by_prompt=evaluation.rewards,
                disagreement=disagreement,
                length=evaluation.mean_length,
                proxy_std=evaluation.reward_std,
                heldout_std=evaluation.heldout_std,
            )
        )
        self.last_step = evaluation.version
        self.verdicts += [_plain(one) for one in _all(verdict)]
        row = self._row(evaluation, heldout, disagreement)
        return Observation(row, verdict, candidate and self._is_best(evaluation, heldout))

    def _heldout(self, evaluation: Evaluation) -> Means:
        """The held-out reward of each prompt: the mean over the held-out rewards, where all scored it."""
        parts = [evaluation.components.get(label, {}) for label in self.roles.heldout]
        common = set.intersection(*(set(part) for part in parts)) if parts else set()
        return {prompt: float(np.mean([part[prompt] for part in parts])) for prompt in sorted(common)}

    def _row(self, evaluation: Evaluation, heldout: Means, disagreement: float | None) -> dict[str, float]:
        """Nothing where a run has neither a reward that stands by nor a reward model."""
        if not self.roles.evaluated and not self.roles.models:
            return {}
        row = {
            "overoptimisation/kl_sqrt": math.sqrt(max(0.0, evaluation.kl_per_sequence)),
            "overoptimisation/proxy": evaluation.mean,
        }
        gold = evaluation.components.get(self.roles.gold, {})
        for name, means in (("overoptimisation/heldout", heldout), ("overoptimisation/gold", gold)):
            values = np.array(list(means.values()))
            if len(values):
                row[name] = float(values.mean())
            if len(values) > 1:
                row[f"{name}_ci95"] = half_width(values)
        if disagreement is not None:
            row["overoptimisation/disagreement"] = disagreement
        gap = normalised_gap(self._rules.state(), evaluation.rewards, heldout)
        if gap is not None:
            row["overoptimisation/gap"] = gap
        return row

    def _is_best(self, evaluation: Evaluation, heldout: Means) -> bool:
        """Whether its held-out reward is above the best so far, over the prompts that both have.

        Without a held-out reward the training reward on held-out prompts takes its place.
        """
        now = heldout or evaluation.rewards
        if self.best is not None:
            then = self.best["by_prompt"]
            common = now.keys() & then.keys()
            if not common or sum(now[key] - then[key] for key in common) <= 0:
                return False
        self.best = {
            "step": evaluation.version,
            "by": "held-out reward" if heldout else "training reward on held-out prompts",
            "reward": float(np.mean(list(now.values()))),
            "proxy": evaluation.mean,
            "gold": evaluation.mean_of(self.roles.gold),
            "by_prompt": now,
        }
        return True

    def best_facts(self) -> dict[str, Any]:
        """What is known of the best evaluation, without its single prompts."""
        return {key: value for key, value in (self.best or {}).items() if key != "by_prompt"}


def normalised_gap(state: Mapping[str, Any], proxy: Means, heldout: Means) -> float | None:
    """Mean over prompts of Δproxy/sd(proxy) − Δheldout/sd(heldout), both since the first evaluation.

    `state` is that of the stop rules, which keep the first evaluation and its standard deviations over
    responses. Those do not shrink as prompts get more samples, as those of prompts' means would. None where
    there is no such level or no common prompt.
    """
    first = state["first"].get("normalised_gap")
    if first is None:
        return None
    common = [key for key in proxy if key in heldout and key in first["proxy"] and key in first["heldout"]]
    if not common:
        return None
    scale_proxy, scale_heldout = first["scales"]
    return float(
        np.mean(
            [
                (proxy[key] - first["proxy"][key]) / scale_proxy
                - (heldout[key] - first["heldout"][key]) / scale_heldout
                for key in common
            ]
        )
    )


def _disagreement(evaluation: Evaluation, models: Sequence[str]) -> float | None:
    """Mean over prompts, and over the trained ensembles, of their members' standard deviation."""
    found = [evaluation.mean_of(f"{label}/{STD}") for label in models]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _all(verdict: Verdict | None) -> list[Verdict]:
    return [verdict, *verdict.also] if verdict else []


def _plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict in JSON's types, as a row of decisions."""
    return {key: value for key, value in asdict(verdict).items() if key != "also"}


def in_words(verdict: Mapping[str, Any]) -> str:
    """A verdict as a line for people: which rule, what is set for it, why, and what it cannot see."""
    return (
        f'over-optimisation: stop.{verdict["rule"]} ("{verdict["action"]}") holds at step {verdict["step"]}. '
        f"{verdict['reason']} What it cannot see: {verdict['blind_spot']}"
    )
