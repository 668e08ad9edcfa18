"""The configuration of objective = "spin" and objective = "rejection": sample, choose, imitate, again.

Both have the tables of a job of reinforcement learning but `[ppo]` and what belongs to it. `policy_job` is
that job: its actors, data and rewards are what these jobs use of it.
"""

from abc import abstractmethod
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from actors.settings import RolloutSettings, ScoringSettings, SyncSettings
from cluster.config import ClusterSettings, JobConfig
from cluster.data_settings import DataSettings
from cluster.monitor_settings import MonitorSettings
from cluster.rules import Rule, enforce
from cluster.run_settings import KeptCheckpoints, RunName
from learner.settings import LearnerSettings, ModelSettings, OptimizerSettings, WarmupSettings
from rewards.discriminator_settings import trains_discriminator
from rewards.settings import RewardSettings, Settings, TaskSettings

_NO_REWARD = {"kind": "regex", "pattern": "."}  # a job of reinforcement learning must name one; none is asked


class IteratedRunSettings(Settings):
    """`[run]`: how many iterations, what each samples and trains, how often it is looked at and saved."""

    name: RunName = "iterated"
    seed: int = Field(0, ge=0, description="Seed of data order, initial weights and the held-out split.")
    iterations: int = Field(4, ge=1, description="Times that the policy samples, and then learns.")
    prompts: int = Field(
        512,
        ge=1,
        description="Prompts that an iteration samples, at most; each has `rollout.group_size` samples.",
    )
    updates: int = Field(32, ge=1, description="Optimizer updates of an iteration.")
    batch_size: int = Field(64, ge=1, description="Examples an update.")
    evaluate_prompts: int = Field(256, ge=2, description="Held-out prompts in an evaluation, at most.")
    evaluate_samples: int = Field(1, ge=1, description="Samples for each held-out prompt.")
    evaluate_demonstrations: int = Field(
        256, ge=1, description="spin: held-out demonstrations whose loss is measured, at most."
    )
    evaluate_every: int = Field(
        1, ge=0, description="Iterations between held-out evaluations; 0: only before and after."
    )
    checkpoint_every: int = Field(
        1, ge=0, description="Iterations between checkpoints; 0: only the last, and where a run is stopped."
    )
    keep_checkpoints: KeptCheckpoints = 2


class SpinSettings(Settings):
    """`[spin]`: demonstrations against samples of the policy with which the iteration began."""

    beta: float = Field(0.1, gt=0, description="β: how dear it is to leave that policy.")


class RejectionSettings(Settings):
    """`[rejection]`: which of a prompt's samples are imitated."""

    keep: int = Field(1, ge=1, description="Samples of a prompt that are kept, best first.")
    minimum: float | None = Field(
        None, description="Smallest reward that is imitated; unset: the best, however bad it is."
    )


class IteratedJobConfig(Settings):
    """What both objectives have; `[model]`, and `[data]` or `[task]`, have no defaults."""

    objective: str
    run: IteratedRunSettings = Field(default_factory=IteratedRunSettings)
    model: ModelSettings
    task: TaskSettings | None = None
    data: DataSettings | None = None
    warmup: WarmupSettings = Field(default_factory=WarmupSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    scoring: ScoringSettings = Field(default_factory=ScoringSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    sync: SyncSettings = Field(default_factory=SyncSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.run.iterations * self.run.updates

    @abstractmethod
    def rewards(self) -> list[RewardSettings]:
        """The `[[reward]]` tables."""

    @abstractmethod
    def rules(self) -> list[Rule]:
        """What else must not be: where it is broken, the field, its value, and the remedy."""

    def policy_job(self) -> JobConfig:
        """The job of reinforcement learning with the same actors, data and rewards, and as many updates."""
        run = self.run
        tables: dict[str, Any] = {
            name: getattr(self, name).model_dump(exclude_unset=True)
            for name in (
                *("model", "warmup", "rollout", "scoring", "learner", "optimizer"),
                *("sync", "monitor", "cluster"),
            )
        }
        tables |= {
            name: table.model_dump(exclude_unset=True)
            for name in ("task", "data")
            if (table := getattr(self, name)) is not None
        }
        tables["reward"] = [one.model_dump(exclude_unset=True) for one in self.rewards()] or [_NO_REWARD]
        tables["run"] = {
            "name": run.name,
            "seed": run.seed,
            "steps": self.total_updates,
            "batch_size": self.rollout.group_size * self.learner.ranks,
            "evaluate_prompts": run.evaluate_prompts,
            "evaluate_samples": run.evaluate_samples,
        }
        return JobConfig.model_validate(tables)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        run, ranks = self.run, self.learner.ranks
        common = [
            Rule(
                run.batch_size < ranks,
                "run.batch_size",
                run.batch_size,
                f"is below learner.ranks = {ranks}; raise it",
            ),
            Rule(
                bool(self.model.critic),
                "model.critic",
                self.model.critic,
                "has no part here: nothing learns a value; leave it out",
            ),
            Rule(
                self.rollout.dynamic_sampling,
                "rollout.dynamic_sampling",
                True,
                "has no part here: an iteration samples each of its prompts once; leave it out",
            ),
            Rule(
                trains_discriminator(self.rewards()),
                "reward.kind",
                "discriminator",
                'needs a learner that trains it beside the policy, as in objective = "ppo"; choose another',
            ),
        ]
        enforce((*common, *self.rules()), self.model)
        try:
            self.policy_job()
        except ValidationError as error:
            raise _cause(error) from None
        return self


class SpinJobConfig(IteratedJobConfig):
    """A whole job: rows of prompt and completion, or a `[task]`'s demonstrations. Rewards judge, if any."""

    objective: Literal["spin"]
    spin: SpinSettings = Field(default_factory=SpinSettings)
    reward: list[RewardSettings] = Field(
        default_factory=list,
        description="What held-out samples are scored by; SPIN itself knows no reward.",
    )

    def rewards(self) -> list[RewardSettings]:
        """They score held-out samples."""
        return self.reward

    def rules(self) -> list[Rule]:
        """Demonstrations there must be."""
        task = self.task
        return [
            Rule(
                task is not None and task.demonstrations < 2,
                "task.demonstrations",
                task.demonstrations if task else 0,
                "leaves nothing to imitate; raise it to 2 or more",
            ),
            Rule(
                bool(self.warmup.data),
                "warmup.data",
                self.warmup.data,
                "has no part here: the warm-up is on the demonstrations themselves; leave it out",
            ),
        ]

    def policy_job(self) -> JobConfig:
        """It has no warm-up: this job reads the demonstrations by itself."""
        warmup = self.warmup.model_copy(update={"steps": 0})
        return IteratedJobConfig.policy_job(self.model_copy(update={"warmup": warmup}))


class RejectionJobConfig(IteratedJobConfig):
    """A whole job: prompts to sample, and what chooses among the samples, `[[reward]]`."""

    objective: Literal["rejection"]
    rejection: RejectionSettings = Field(default_factory=RejectionSettings)
    reward: list[RewardSettings] = Field(min_length=1)

    def rewards(self) -> list[RewardSettings]:
        """They choose."""
        return self.reward

    def rules(self) -> list[Rule]:
        """There must be something to choose from."""
        group, keep = self.rollout.group_size, self.rejection.keep
        return [
            Rule(
                group < 2,
                "rollout.group_size",
                group,
                "leaves nothing to choose from; set it to 2 or more",
            ),
            Rule(
                keep >= group,
                "rejection.keep",
                keep,
                f"keeps all of rollout.group_size = {group} samples; lower it, or raise the group's size",
            ),
        ]


def _cause(error: ValidationError) -> ValueError:
    """The rule of a job of reinforcement learning that is broken; its fields have the same names here."""
    detail = error.errors(include_url=False)[0]
    inner = detail.get("ctx", {}).get("error")
    return inner if isinstance(inner, ValueError) else ValueError(detail["msg"])
