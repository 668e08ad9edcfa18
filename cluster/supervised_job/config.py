"""The configuration of objective = "supervised": demonstrations, and a policy that imitates them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import ClusterSettings
from cluster.data_settings import DataSettings
from cluster.monitor_settings import MonitorSettings
from cluster.rules import Rule, enforce, learner_rules, model_rules
from cluster.run_settings import KeptCheckpoints, RunName
from learner.settings import LearnerSettings, ModelSettings, OptimizerSettings, WarmupSettings
from rewards.settings import Settings, TaskSettings


class SupervisedRunSettings(Settings):
    """`[run]`: how long, on what batch, and how often it is looked at and saved."""

    name: RunName = "supervised"
    seed: int = Field(0, ge=0, description="Seed of data order, initial weights and the held-out split.")
    steps: int = Field(200, ge=1, description="Optimizer updates.")
    batch_size: int = Field(64, ge=1, description="Demonstrations an update.")
    evaluate_demonstrations: int = Field(
        256, ge=1, description="Held-out demonstrations whose loss is measured, at most."
    )
    evaluate_every: int = Field(
        50, ge=0, description="Updates between looks at the held-out loss; 0: only before and after."
    )
    checkpoint_every: int = Field(0, ge=0, description="Updates between checkpoints; 0: only the last.")
    keep_checkpoints: KeptCheckpoints = 2


class SupervisedSettings(Settings):
    """`[supervised]`: forward KL to the demonstrations, on the completions' tokens only."""

    lr: float = Field(
        1e-5, gt=0, description="Peak learning rate, linear warm-up over a tenth and cosine decay."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")


class SupervisedJobConfig(Settings):
    """A whole job: `[model]`, and `[data]` (rows of prompt and completion) or `[task]`, have no defaults."""

    objective: Literal["supervised"]
    run: SupervisedRunSettings = Field(default_factory=SupervisedRunSettings)
    model: ModelSettings
    task: TaskSettings | None = None
    data: DataSettings | None = None
    supervised: SupervisedSettings = Field(default_factory=SupervisedSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @property
    def warmup(self) -> WarmupSettings:
        """The same updates, as the learner of a reinforcement job knows them."""
        return WarmupSettings(steps=self.run.steps, batch_size=self.run.batch_size, lr=self.supervised.lr)

    @property
    def optimizer(self) -> OptimizerSettings:
        """Adam, as the learner is told of it."""
        chosen = self.supervised
        return OptimizerSettings(
            lr=chosen.lr, weight_decay=chosen.weight_decay, max_grad_norm=chosen.max_grad_norm
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        model, task = self.model, self.task
        rules: list[Rule] = [
            Rule(
                (task is None) == (self.data is None),
                "data",
                None if self.data is None else self.data.train,
                "give exactly one of [data] (your demonstrations) and [task] (generated ones)",
            ),
            Rule(
                task is not None and task.demonstrations < 2,
                "task.demonstrations",
                task.demonstrations if task else 0,
                "leaves nothing to imitate; raise it to 2 or more",
            ),
            *model_rules(model),
            Rule(
                bool(model.reference or model.critic),
                "model.reference" if model.reference else "model.critic",
                model.reference or model.critic,
                'has no part in objective = "supervised"; leave it out',
            ),
            *learner_rules(self.learner),
            Rule(
                self.run.batch_size < self.learner.ranks,
                "run.batch_size",
                self.run.batch_size,
                f"is below learner.ranks = {self.learner.ranks}; raise it",
            ),
        ]
        enforce(rules, model)
        return self
