"""Makes the actors of a job, each in the part of the cluster that its role has reserved.

A role (learner, rollout, scoring) reserves one placement group with a bundle for each of its actors, before
any of them starts: a job gets all that it needs or says at once what is missing. A lost actor's successor
takes its bundle, which Ray moves to another host if the old one is gone.
"""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.rollout import RolloutWorker
from actors.scoring import ScoringWorker
from actors.waits import DeadlineExceeded, within
from cluster.adversarial import learner_class
from cluster.config import JobConfig
from cluster.joining import PlacementError
from cluster.placement import (
    SHARED_GPU,
    colocated,
    role_resource,
    sampler_seed,
    sync_backend,
    usable_gpus,
)
from cluster.remote import Remote
from learner.worker import LearnerJob

_STOP_DEADLINE_S = 10.0
Role = Literal["learner", "rollout", "scoring"]


class WorkerFactory:
    """Reserves a job's places and makes the actors in them."""

    def __init__(
        self, config: JobConfig, job: LearnerJob, *, reference_path: Path, cuda: bool, step: int = 0
    ) -> None:
        """`step`: learner steps that the run has taken; resumed, it samples with other seeds."""
        gpus = usable_gpus(cuda)
        self.colocated = colocated(config, gpus)
        self._config, self._job, self._reference, self._step = config, job, reference_path, step
        self._sync = config.sync.model_copy(update={"backend": sync_backend(config, gpus)})
        if config.rollout.max_actors > config.rollout.actors and not self.replaces:
            raise PlacementError(
                f"rollout.max_actors = {config.rollout.max_actors}: with sync.backend = "
                f'"{self._sync.backend}" no actor can join later; set it to 0, or sync.backend to "shared"'
            )
        self._device = "cuda" if cuda else "cpu"
        self._share = SHARED_GPU if self.colocated else 1.0
        # As the cluster is now: when the last host of a role is lost, its actors wait for another such host.
        self._roles = {role: role_resource(role) for role in get_args(Role)}
        self._groups: dict[Role, PlacementGroup] = {}
        self._made: Counter[tuple[Role, int]] = Counter()

    @property
    def replaces(self) -> bool:
        """Whether a lost rollout actor can have a successor: only `shared` keeps weights for latecomers."""
        return self._sync.backend == "shared"

    # ---- places --------------------------------------------------------------------------------------------

    async def reserve(self) -> None:
        """Reserve the places of all roles. PlacementError says which role has none after the deadline."""
        config = self._config
        counts: dict[Role, int] = {
            "learner": config.learner.ranks,
            "rollout": config.rollout.actors,
            "scoring": config.scoring.actors,
        }
        strategies = {"learner": config.learner.placement.upper(), "rollout": "SPREAD", "scoring": "SPREAD"}
        if self.colocated:
            together = self.resources("learner")
            for name, amount in self.resources("rollout").items():
                together[name] = together.get(name, 0.0) + amount
            self._groups["learner"] = placement_group([together])
            self._groups["rollout"] = self._groups["learner"]
        for role, count in counts.items():
            if role not in self._groups:
                bundles = [self.resources(role) for _ in range(count)]
                self._groups[role] = placement_group(bundles, strategy=strategies[role])
        for role, group in self._groups.items():
            await self._placed(role, group, counts[role])

    async def _placed(self, role: Role, group: PlacementGroup, count: int) -> None:
        seconds = self._config.cluster.start_timeout_s
        try:
            await within(_result(group.ready()), seconds, "the cluster", f"room for {role} actors")
        except DeadlineExceeded as error:
            asked = ", ".join(f"{amount:g} {name}" for name, amount in self.resources(role).items())
            free = "; ".join(
                ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in self.resources(role))
                for node in ray.nodes()
                if node["Alive"]
            )
            raise PlacementError(
                f"waited {seconds:g} s for the cluster to make room for {count} {role} actors of {asked}; "
                f"its hosts have {free} in all, and other jobs may hold them. Lower {role}.cores or the "
                "number of actors, add hosts, or raise cluster.start_timeout_s"
            ) from error

    def resources(self, role: Role) -> dict[str, float]:
        """What one actor of a role asks for."""
        config, cuda = self._config, self._device == "cuda"
        cores = {
            "learner": config.learner.cores,
            "rollout": config.rollout.cores,
            "scoring": config.scoring.cores,
        }[role]
        gpus = {
            "learner": self._share,
            "rollout": self._share * config.rollout.tensor_parallel,
            "scoring": config.scoring.gpus,
        }[role]
        asked = {"CPU": cores, "GPU": float(gpus) if cuda else 0.0, **self._roles[role]}
        return {name: amount for name, amount in asked.items() if amount}

    def _options(self, role: Role, place: int) -> dict[str, Any]:
        asked = self.resources(role)
        options: dict[str, Any] = {
            "num_cpus": asked.pop("CPU"),
            "num_gpus": asked.pop("GPU", 0.0),
            "resources": asked,
            "max_restarts": 0,
        }
        group = self._groups[role]
        bundle = 0 if self.colocated and role != "scoring" else place
        if bundle < group.bundle_count:
            strategy: Any = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        else:
            strategy = "SPREAD"  # beyond the places that the job began with
        return options | {"scheduling_strategy": strategy}

    def has_room(self) -> bool:
        """Whether some host could take one more rollout actor now."""
        asked = self.resources("rollout")
        free = ray._private.state.available_resources_per_node().values()
        return any(all(node.get(name, 0.0) >= amount for name, amount in asked.items()) for node in free)

    def release(self) -> None:
        """Give the places back."""
        for group in {group.id: group for group in self._groups.values()}.values():
            remove_placement_group(group)

    def layout(self) -> dict[str, str]:
        """The host, by name and address, of each place that is reserved, as `rollout-1`."""
        hosts = {
            node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            for node in ray.nodes()
        }
        found = {}
        for role, group in self._groups.items():
            bundles = ray.util.placement_group_table(group)["bundles_to_node_id"]
            for place, node in bundles.items():
                found[f"{role}-{place}"] = hosts.get(node, node)
        return found

    # ---- actors --------------------------------------------------------------------------------------------

    def _actor(
        self, worker: type, role: Role, place: int, options: dict[str, Any], *args: Any, **named: Any
    ) -> Remote:
        name = self._name(role, place)
        handle = ray.remote(worker).options(**self._options(role, place), **options).remote(*args, **named)
        return Remote(name, handle, place)

    def _name(self, role: Role, place: int) -> str:
        """`rollout-1`, and `rollout-1.2` for the second in that place."""
        number = self._made[role, place]
        return f"{role}-{place}" + (f".{number}" if number > 1 else "")

    def learner(self, rank: int) -> Remote:
        """The learner's rank."""
        self._made["learner", rank] += 1
        worker = learner_class(self._config)
        return self._actor(worker, "learner", rank, {}, rank, self._config.learner.ranks, self._job)

    def rollout(self, place: int) -> Remote:
        """A rollout actor; of several in one place each samples with a seed of its own."""
        config = self._config
        self._made["rollout", place] += 1
        generation = self._made["rollout", place] - 1
        return self._actor(
            RolloutWorker,
            "rollout",
            place,
            {"max_concurrency": 4 * config.rollout.max_groups_in_flight},
            self._name("rollout", place),
            self._job.model_path,
            config.rollout,
            self._sync,
            dtype=config.learner.precision,
            max_length=self._job.max_length,
            seed=sampler_seed(config.run.seed, place + generation * 10_000, self._step),
            device=self._device,
        )

    def scorer(self, place: int) -> Remote:
        """A scoring actor."""
        config = self._config
        self._made["scoring", place] += 1
        return self._actor(
            ScoringWorker,
            "scoring",
            place,
            {},
            self._name("scoring", place),
            str(self._reference),
            config.reward,
            config.task,
            config.scoring,
            dtype=config.learner.precision,
            attention=config.model.attention,
            temperature=config.rollout.temperature,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            chunk_tokens=config.learner.logprob_chunk_tokens,
            device="cuda" if self._device == "cuda" and config.scoring.gpus > 0 else "cpu",
            directory=str(Path.cwd()),
        )


async def _result(reference: Any) -> Any:
    return await reference


async def stop_all(remotes: list[Remote]) -> None:
    """Ask actors to clean up, briefly, then end their processes whatever they are doing."""
    await asyncio.gather(
        *(remote.call("stop", seconds=_STOP_DEADLINE_S) for remote in remotes), return_exceptions=True
    )
    for remote in remotes:
        remote.kill()
