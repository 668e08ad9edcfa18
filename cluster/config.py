"""The configuration of a job: what may be set, and which settings contradict each other.

The tables of each package stand in its own `settings.py`; this file adds the run's own tables and the rules
that span several. Reading TOML and `--set` is in `cluster.config_file`.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from actors.settings import RolloutSettings, ScoringSettings, SyncSettings
from cluster.data_settings import DataSettings
from cluster.monitor_settings import MonitorSettings
from cluster.objective_rules import objective_rules
from cluster.preference_job.online import online_dpo_rules
from cluster.rules import Rule, enforce, learner_rules, model_rules
from cluster.run_settings import KeptCheckpoints, RunName
from cluster.scheduler import SchedulerSettings
from learner.preference_settings import OnlineDPOSettings
from learner.presets import with_preset
from learner.settings import (
    CorrectionSettings,
    LearnerSettings,
    ModelSettings,
    OptimizerSettings,
    PPOSettings,
    WarmupSettings,
)
from rewards.build import check_rewards, uses_child
from rewards.discriminator_settings import DiscriminatorSettings, discriminator_rules, trains_discriminator
from rewards.overoptimisation_settings import StopSettings
from rewards.roles import roles_of
from rewards.settings import RewardSettings, Settings, TaskSettings


class RunSettings(Settings):
    """`[run]`: how long, how often, and on what batch."""

    name: RunName = "run"
    seed: int = Field(0, ge=0, description="Seed of data order, initial weights and minibatches.")
    steps: int = Field(100, ge=1, description="Learner steps.")
    batch_size: int = Field(
        256, ge=1, description="Samples a learner step; a multiple of `rollout.group_size`."
    )
    evaluate_prompts: int = Field(256, ge=2, description="Held-out prompts in an evaluation, at most.")
    evaluate_every: int = Field(
        0,
        ge=0,
        description="Learner steps between held-out evaluations, beside which training goes on, each with a "
        "checkpoint; 0: only before and after.",
    )
    evaluate_samples: int = Field(1, ge=1, description="Samples for each held-out prompt.")
    evaluate_pauses: bool = Field(
        False,
        description="Training stands still during an evaluation, off the clock of `time/training_s`: to "
        "measure speed.",
    )
    pass_threshold: float | None = Field(
        None,
        description="A held-out response passes if its reward reaches this; gives pass@k for k up to "
        "`evaluate_samples`. Unset: 1 where every reward is 0 or 1 and there are several samples.",
    )
    pass_reward: str = Field(
        "", description="Name of the `[[reward]]` that decides what passes; empty: the whole training reward."
    )
    checkpoint_every: int = Field(
        50, ge=0, description="Learner steps between checkpoints; 0: only the last."
    )
    keep_checkpoints: KeptCheckpoints = 2


class ClusterSettings(Settings):
    """`[cluster]`: which Ray to use."""

    address: str = Field(
        "", description="Empty: a private Ray on this machine; `auto`: the one that is running."
    )
    start_timeout_s: float = Field(
        120, gt=0, description="Deadline for Ray to start and place actors, in seconds."
    )
    hosts: int = Field(
        0,
        ge=0,
        description="Actors are placed once the cluster has so many hosts, within `start_timeout_s`. 0: "
        "those that the file of `ray up` promises, but what has not come by then is done without.",
    )
    object_store_gib: float = Field(
        0.5, gt=0.07, le=1024, description="Object store of a private Ray, in GiB."
    )


class JobConfig(Settings):
    """A whole job. Every table but `[model]` and `[[reward]]`, and `[data]` or `[task]`, has defaults."""

    objective: Literal[
        "ppo",
        "reinforce++",
        "reinforce++_baseline",
        "rloo",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "online_dpo",
    ] = Field(
        "ppo",
        description="What the job optimises. Each objective sets those of `[ppo]` that you leave out; see "
        "docs/policy_gradients.md.",
    )
    run: RunSettings = Field(default_factory=RunSettings)
    model: ModelSettings
    task: TaskSettings | None = None
    data: DataSettings | None = None
    warmup: WarmupSettings = Field(default_factory=WarmupSettings)
    reward: list[RewardSettings] = Field(min_length=1)
    discriminator: DiscriminatorSettings = Field(default_factory=DiscriminatorSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    scoring: ScoringSettings = Field(default_factory=ScoringSettings)
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    correction: CorrectionSettings = Field(default_factory=CorrectionSettings)
    online_dpo: OnlineDPOSettings = Field(default_factory=OnlineDPOSettings)
    sync: SyncSettings = Field(default_factory=SyncSettings)
    stop: StopSettings = Field(default_factory=StopSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @property
    def groups_per_step(self) -> int:
        """P: groups that a learner step consumes."""
        return self.run.batch_size // self.rollout.group_size

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.run.steps * self.ppo.epochs * self.ppo.minibatches

    @property
    def trained_models(self) -> int:
        """Models of the policy's size that the learner trains: the policy, a critic, a discriminator."""
        return 1 + (self.ppo.value_model == "critic") + trains_discriminator(self.reward)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tables: Any) -> Any:
        return with_preset(tables)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rules = (
            *self._batch_rules(),
            *self._model_rules(),
            *self._data_rules(),
            *self._correction_rules(),
            *objective_rules(self.objective, self.ppo, self.correction, self.optimizer, self.rollout),
            *self._online_dpo_rules(),
            self._scoring_rule(),
            *self._stop_rules(),
            *self._sampling_rules(),
            *self._discriminator_rules(),
        )
        enforce(rules, self.model)
        check_rewards(self.reward, self.task)
        return self

    def _batch_rules(self) -> list[Rule]:
        batch, group = self.run.batch_size, self.rollout.group_size
        nearest = max(group, batch // group * group)
        return [
            Rule(
                batch % group != 0,
                "run.batch_size",
                batch,
                f"is not a multiple of rollout.group_size = {group}; use {nearest} or {nearest + group}",
            ),
            Rule(
                0 < self.rollout.max_actors < self.rollout.actors,
                "rollout.max_actors",
                self.rollout.max_actors,
                f"is below rollout.actors = {self.rollout.actors}; set it to 0, or higher",
            ),
            Rule(
                batch % self.ppo.minibatches != 0,
                "ppo.minibatches",
                self.ppo.minibatches,
                f"does not divide run.batch_size = {batch}; choose a divisor of it",
            ),
            Rule(
                batch // self.ppo.minibatches < self.learner.ranks,
                "ppo.minibatches",
                self.ppo.minibatches,
                f"gives a minibatch fewer samples than learner.ranks = {self.learner.ranks}; lower it",
            ),
            *learner_rules(self.learner),
            Rule(
                self.scheduler.publish_every > self.scheduler.largest_window + 1,
                "scheduler.publish_every",
                self.scheduler.publish_every,
                f"would leave actors with weights too old for a window of {self.scheduler.largest_window}; "
                f"set it to {self.scheduler.largest_window + 1} or less, or widen the window",
            ),
            Rule(
                self.learner.device == "cpu" and self.sync.backend in ("nccl", "ipc"),
                "sync.backend",
                self.sync.backend,
                'moves weights between GPUs, but learner.device is "cpu"; set it to "shared" or "auto"',
            ),
        ]

    def _model_rules(self) -> list[Rule]:
        scratch, model = self.model.scratch, self.model
        limit = model.max_length or (scratch.max_length if scratch else None)
        return [
            *model_rules(model),
            Rule(
                limit is not None and self.rollout.max_new_tokens >= limit,
                "rollout.max_new_tokens",
                self.rollout.max_new_tokens,
                f"leaves no room for a prompt within the model's {limit} tokens; lower it",
            ),
            Rule(
                bool(model.critic) and self.ppo.value_model != "critic",
                "model.critic",
                model.critic,
                f'is given, but ppo.value_model is "{self.ppo.value_model}"; set it to "critic"',
            ),
        ]

    def _data_rules(self) -> list[Rule]:
        return [
            Rule(
                (self.task is None) == (self.data is None),
                "data",
                None if self.data is None else self.data.train,
                "give exactly one of [data] (your rows) and [task] (generated rows)",
            ),
            Rule(
                self.warmup.steps > 0
                and not self.warmup.data
                and (self.task is None or self.task.demonstrations == 0),
                "warmup.steps",
                self.warmup.steps,
                "needs demonstrations: name a file of prompt and completion in warmup.data, or set it to 0",
            ),
            Rule(
                self.warmup.steps == 0 and bool(self.warmup.data) and not trains_discriminator(self.reward),
                "warmup.data",
                self.warmup.data,
                "is given, but warmup.steps = 0 uses none of it; set warmup.steps or leave it out",
            ),
        ]

    def _correction_rules(self) -> list[Rule]:
        chosen, default = self.correction, CorrectionSettings()
        idle = [
            Rule(
                getattr(chosen, limit) != getattr(default, limit) and getattr(chosen, choice) not in uses,
                f"correction.{limit}",
                getattr(chosen, limit),
                f'has no effect with correction.{choice} = "{getattr(chosen, choice)}"; set that to '
                f'"{uses[0]}" or leave this at {getattr(default, limit)}',
            )
            for limit, choice, uses in _CORRECTION_LIMITS
        ]
        return [
            Rule(
                chosen.ratio == "behaviour" and chosen.weights != "none",
                "correction.weights",
                chosen.weights,
                'weighs by the sampler a second time: with correction.ratio = "behaviour" the ratio does so '
                'already; set correction.weights to "none", or correction.ratio to "proximal"',
            ),
            Rule(
                chosen.vtrace_c > chosen.vtrace_rho,
                "correction.vtrace_c",
                chosen.vtrace_c,
                f"is above correction.vtrace_rho = {chosen.vtrace_rho}; V-trace needs c̄ ≤ ρ̄: lower it",
            ),
            *idle,
        ]

    def _scoring_rule(self) -> Rule:
        """A group must be able to take as long as all its completions may, one after another."""
        children = sum(uses_child(one, self.task) for one in self.reward)
        each, group = self.scoring.reward_timeout_s, self.rollout.group_size
        needed = each * group * children
        return Rule(
            self.scoring.timeout_s < needed,
            "scoring.timeout_s",
            self.scoring.timeout_s,
            f"is less than scoring.reward_timeout_s = {each:g} for each of rollout.group_size = {group} "
            f"completions and {children} reward(s) by a function, a regex or code; set it to {needed:g} or "
            "more, or lower scoring.reward_timeout_s",
        )

    def _online_dpo_rules(self) -> list[Rule]:
        contradictions = online_dpo_rules(
            self.objective, self.online_dpo, self.ppo, self.correction, self.groups_per_step
        )
        return [Rule(*one) for one in contradictions]

    def _discriminator_rules(self) -> list[Rule]:
        task, learner = self.task, self.learner
        contradictions = discriminator_rules(
            self.discriminator,
            self.reward,
            has_demonstrations=bool(self.warmup.data) or (task is not None and task.demonstrations > 0),
            dynamic_sampling=self.rollout.dynamic_sampling,
            zero_stage=learner.zero_stage,
            gradient_checkpointing=learner.gradient_checkpointing,
        )
        return [Rule(*one) for one in contradictions]

    def _sampling_rules(self) -> list[Rule]:
        """What dynamic sampling and pass@k need."""
        rollout, run = self.rollout, self.run
        labels = [one.label for one in self.reward]
        return [
            Rule(
                rollout.dynamic_sampling and rollout.group_size == 1,
                "rollout.dynamic_sampling",
                True,
                "would leave out every group, as each has one sample; set rollout.group_size to 2 or more",
            ),
            Rule(
                not rollout.dynamic_sampling and rollout.dynamic_limit != RolloutSettings().dynamic_limit,
                "rollout.dynamic_limit",
                rollout.dynamic_limit,
                "has no effect without rollout.dynamic_sampling; set that to true, or leave this out",
            ),
            Rule(
                bool(run.pass_reward) and run.pass_reward not in labels,
                "run.pass_reward",
                run.pass_reward,
                f"names no [[reward]]; use one of {', '.join(labels)}",
            ),
            Rule(
                run.evaluate_pauses and run.evaluate_every == 0,
                "run.evaluate_pauses",
                True,
                "has no effect without run.evaluate_every; set that, or leave this out",
            ),
        ]

    def _stop_rules(self) -> list[Rule]:
        """A rule that is to stop the run must have something to look at, and evaluations to look at it in."""
        roles = roles_of(self.reward)
        judge = 'a held-out reward: add a [[reward]] of kind = "model" with role = "evaluate"'
        seen = {
            "heldout_decline": (bool(roles.heldout), judge),
            "normalised_gap": (bool(roles.heldout), judge),
            "disagreement": (bool(roles.models), 'an ensemble: train on a [[reward]] of kind = "model"'),
            "kl_budget": (True, ""),
        }
        stops = [name for name in seen if getattr(self.stop, name) == "stop"]
        return [
            *(Rule(not seen[name][0], f"stop.{name}", "stop", f"needs {seen[name][1]}") for name in stops),
            Rule(
                bool(stops) and self.run.evaluate_every == 0,
                "run.evaluate_every",
                0,
                f'leaves nothing to look at for stop.{stops[0] if stops else ""} = "stop"; set it to the '
                "learner steps between evaluations",
            ),
        ]


_CORRECTION_LIMITS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("cap", "weights", ("tis", "sequence")),
    ("icepop_low", "weights", ("icepop",)),
    ("icepop_high", "weights", ("icepop",)),
    ("sequence_cap", "mask", ("sequence",)),
    ("geometric_low", "mask", ("geometric",)),
    ("geometric_high", "mask", ("geometric",)),
    ("m2_budget", "mask", ("m2po",)),
    ("vtrace_rho", "value_target", ("vtrace",)),
    ("vtrace_c", "value_target", ("vtrace",)),
    ("damp_ess_target", "damp_lr_by_ess", ("sequence", "token")),
)
"""Limits in `[correction]`, the setting that each belongs to, and the values of it that use the limit."""
