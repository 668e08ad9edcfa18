"""Adversarial imitation in a run: the discriminator's job, its start, and its versions on their way.

demonstrations ─► held out | learned from ─► learner ranks (policy, then discriminator, each step)
                                                   │ version v, probe
scoring actors ◄── ScoringPool.announce ◄──────────┘
  every score carries the version that gave it ─► groups ─► the next steps, which log its lag
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.packing import Pair
from actors.records import DiscriminatorProof, Group
from cluster.config import JobConfig
from cluster.learner_group import LearnerGroup
from cluster.prepare import Prepared
from cluster.remote import Remote
from cluster.scoring_pool import ScoringPool
from cluster.supervised_job.inputs import split_by_prompt
from learner.discriminator import DiscriminatorJob
from learner.discriminator_worker import AdversarialWorker
from learner.settings import LearnerSettings
from learner.worker import LearnerWorker
from rewards.discriminator_settings import discriminator_label, trains_discriminator

_PROBE_TOKENS = 64  # of each probe sequence, at most


class AdversarialLearner(LearnerGroup):
    """All ranks of policy and discriminator; announces every version of the latter to the scoring actors."""

    def __init__(self, ranks: Sequence[Remote], settings: LearnerSettings, scoring: ScoringPool) -> None:
        super().__init__(ranks, settings)
        self._scoring = scoring

    async def start_discriminator(self, job: DiscriminatorJob, shipped: Any) -> None:
        """Load it on every rank, after the warm-up; `shipped` is its model for hosts that have it not."""
        deadline = self._settings.start_timeout_s
        await self._all("start_discriminator", ray.put(job), shipped, deadline, seconds=deadline + 30)

    async def open_publisher(self, *args: Any, **named: Any) -> None:
        """Open the ways of both kinds of weights, and announce the discriminator as it is."""
        await super().open_publisher(*args, **named)
        await self._all("open_discriminator", f"{named['run_id']}-d", bool(named["elastic"]))
        await self._announce()

    async def step(self, groups: list[Group], version: int) -> dict[str, float]:
        """One learner step of both on all groups; scoring goes on with the new discriminator."""
        row = await super().step(groups, version)
        await self._announce()
        return row | load_metrics(self._scoring.take_proofs())

    async def _announce(self) -> None:
        self._scoring.announce(await self._all("publish_discriminator"))


def learner_group(config: JobConfig, ranks: Sequence[Remote], scoring: ScoringPool) -> LearnerGroup:
    """The learner that the rewards ask for."""
    if trains_discriminator(config.reward):
        return AdversarialLearner(ranks, config.learner, scoring)
    return LearnerGroup(ranks, config.learner)


def learner_class(config: JobConfig) -> type[LearnerWorker]:
    """What a learner rank is."""
    return AdversarialWorker if trains_discriminator(config.reward) else LearnerWorker


def discriminator_job(config: JobConfig, prepared: Prepared, reference: Path) -> DiscriminatorJob:
    """What every rank is told of the discriminator, which starts from its own model or from the reference."""
    learned, heldout = hold_out(prepared.demonstrations, config.discriminator.heldout, config.run.seed)
    return DiscriminatorJob(
        model_path=str(prepared.discriminator_path or reference),
        label=discriminator_label(config.reward),
        settings=config.discriminator,
        attention=config.model.attention,
        learner=config.learner,
        optimizer=config.optimizer,
        seed=config.run.seed,
        demonstrations=tuple(learned),
        heldout=tuple(heldout),
        probe=tuple(
            (*prompt, *completion)[-_PROBE_TOKENS:]
            for prompt, completion in learned[: config.sync.probe_sequences]
        ),
    )


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(learned from, held out): a share of the distinct prompts; nothing where it is 0 or there is one."""
    if share == 0 or len({tuple(prompt) for prompt, _ in pairs}) < 2:
        return list(pairs), []
    return split_by_prompt(list(pairs), share, seed)


def in_words(job: DiscriminatorJob) -> str:
    """As a line for people, with what they must not conclude."""
    return (
        f"a discriminator learns from {len(job.demonstrations)} demonstrations, {len(job.heldout)} are held "
        f"out; its reward {job.label!r} changes with it, so rewards of different steps do not compare: to "
        'see whether the policy gets better, add a [[reward]] with role = "evaluate"'
    )


def load_metrics(proofs: Sequence[DiscriminatorProof]) -> dict[str, float]:
    """How scoring actors took up the versions that they loaded since the last step; nothing if none did."""
    if not proofs:
        return {}
    return {
        "discriminator/probe_max_difference": max(proof.probe_max_difference for proof in proofs),
        "timing_s/discriminator_load": max(proof.seconds for proof in proofs),
    }
