"""All actors of a run: reserved, made, known by role, replaced where they are lost, stopped at the end."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.scoring import ShippedModels
from actors.shipping import ShippedFolder, ship
from cluster.adversarial import learner_group
from cluster.config import JobConfig
from cluster.joining import roles_without_host
from cluster.learner_group import LearnerGroup
from cluster.recruiting import Recruiter
from cluster.remote import Remote
from cluster.rollout_pool import RolloutPool
from cluster.scoring_pool import ScoringPool
from cluster.workers import WorkerFactory, stop_all
from learner.worker import LearnerJob
from rewards.model_reward import model_folder


@dataclass(frozen=True, slots=True)
class Crew:
    """The actors of a run; `model` is the policy's folder where it must be brought to their hosts."""

    config: JobConfig
    factory: WorkerFactory
    ranks: list[Remote]
    learner: LearnerGroup
    rollouts: RolloutPool
    scoring: ScoringPool
    recruiter: Recruiter
    model: ShippedFolder | None

    @classmethod
    async def gather(
        cls,
        config: JobConfig,
        job: LearnerJob,
        reference_path: Path,
        *,
        cuda: bool,
        step: int,
        on_event: Callable[[str], None],
        make: type[WorkerFactory] = WorkerFactory,
    ) -> "Crew":
        """Reserve every place and make every actor, not started yet; `on_event` hears who comes and goes.

        `make` is the class that makes the actors. Raises PlacementError if the cluster has no room for them.
        """
        factory = make(config, job, reference_path=reference_path, cuda=cuda, step=step)
        await factory.reserve()
        _say_layout(factory.layout(), on_event)
        places = config.rollout.actors
        recruiter = Recruiter(
            create=factory.rollout,
            has_room=factory.has_room,
            on_event=on_event,
            places=places,
            most_places=max(places, config.rollout.max_actors),
        )
        model = await asyncio.to_thread(shipped, config, Path(job.model_path))
        ranks = [factory.learner(rank) for rank in range(config.learner.ranks)]
        rollouts = RolloutPool(
            [factory.rollout(place) for place in range(places)],
            config.rollout,
            config.sync,
            on_loss=recruiter.on_loss if factory.replaces else None,
            model=model,
        )
        scoring = ScoringPool(
            [factory.scorer(place) for place in range(config.scoring.actors)],
            config.scoring,
            step_groups=config.groups_per_step,
            create=factory.scorer,
            on_event=on_event,
        )
        learner = learner_group(config, ranks, scoring)
        return cls(config, factory, ranks, learner, rollouts, scoring, recruiter, model)

    def everyone(self) -> list[Remote]:
        """The actors that there are now."""
        return [*self.ranks, *(actor.remote for actor in self.rollouts.actors), *self.scoring.remotes]

    async def dismiss(self) -> None:
        """Stop every actor and give the places back."""
        await stop_all(self.everyone())
        self.factory.release()


def _say_layout(layout: Mapping[str, str], on_event: Callable[[str], None]) -> None:
    """Who is where, if there are several hosts; and whose actors no host was named for."""
    for role in roles_without_host():
        on_event(f"warning: no host has the role {role!r}: its actors run wherever there is room")
    if len(set(layout.values())) > 1:
        on_event("places: " + "; ".join(f"{place} on {host}" for place, host in sorted(layout.items())))


def shipped(config: JobConfig, folder: Path | None) -> ShippedFolder | None:
    """A model for hosts that have it not; None where all actors run on this one."""
    return ship(folder) if folder is not None and config.cluster.address else None


def shipped_for_scoring(config: JobConfig, reference: Path) -> ShippedFolder | None:
    """The reference and the reward models for hosts that have them not; None where all actors run here."""
    base = shipped(config, reference)
    if base is None:
        return None
    folders = {one.label: one.path for one in config.reward if one.kind in ("model", "log_ratio")}
    folders |= {f"{one.label}/initial": one.initial for one in config.reward if one.kind == "log_ratio"}
    rewards = tuple(
        (label, ship(model_folder(path, Path.cwd()), nested=True)) for label, path in folders.items()
    )
    return ShippedModels(base.path, base.host, base.files, rewards)
