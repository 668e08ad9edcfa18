"""The configuration of a job with `objective = "reward_model"`.

Tables that a reward model has in common with other jobs are the same classes; this file adds its own and the
rules that span several.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import ClusterSettings
from cluster.monitor_settings import MonitorSettings
from cluster.preferences.settings import PreferenceSettings
from cluster.rules import Rule, enforce, learner_rules, model_rules
from cluster.run_settings import KeptCheckpoints, RunName
from learner.reward_settings import BackboneSettings
from learner.settings import LearnerSettings, OptimizerSettings
from rewards.models.settings import RewardModelSettings
from rewards.settings import Settings

CHOICE_AND_GOLD = (
    "is of the better response, and preferences.choice_column does not put these columns in order: write "
    "rows that have them in order, or leave one of the two settings out"
)


class RewardRunSettings(Settings):
    """`[run]`: how long, how often, and on what batch."""

    name: RunName = "reward-model"
    seed: int = Field(0, ge=0, description="Seed of data order, initial heads and bootstraps.")
    epochs: int = Field(1, ge=1, description="Passes of each member over the training pairs.")
    batch_size: int = Field(64, ge=1, description="Pairs an optimizer update.")
    evaluate_every: int = Field(
        50, ge=0, description="Updates between looks at held-out pairs; 0: only at the end of each member."
    )
    evaluate_pairs: int = Field(512, ge=2, description="Held-out pairs in such a look; the end takes all.")
    checkpoint_every: int = Field(
        200, ge=0, description="Updates between checkpoints; 0: only at the end of each member."
    )
    keep_checkpoints: KeptCheckpoints = 1


class EvaluationSettings(Settings):
    """`[evaluation]`: what is known about the responses beside who won."""

    chosen_gold_column: str = Field("", description="Column with the chosen response's true reward.")
    rejected_gold_column: str = Field("", description="Column with the rejected response's true reward.")

    @property
    def columns(self) -> list[str]:
        """The columns that evaluation reads."""
        return [name for name in (self.chosen_gold_column, self.rejected_gold_column) if name]


class EvaluateSettings(Settings):
    """One `[[evaluate]]` table: further pairs, from elsewhere than the training pairs."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,63}$", description="What these pairs are, for the report."
    )
    file: str = Field(
        min_length=1,
        description="JSON Lines, Parquet or Arrow file, folder or hub dataset, with the columns of "
        "`[preferences]`.",
    )


class RewardJobConfig(Settings):
    """A reward model. Every table but `[model]` and `[preferences]` has defaults."""

    objective: Literal["reward_model"] = Field("reward_model", description="What the job optimises.")
    run: RewardRunSettings = Field(default_factory=RewardRunSettings)
    model: BackboneSettings
    preferences: PreferenceSettings
    reward_model: RewardModelSettings = Field(default_factory=RewardModelSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    evaluate: list[EvaluateSettings] = Field(default_factory=list)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rules = (*model_rules(self.model), *self._learner_rules(), *self._evaluation_rules())
        enforce(rules, self.model)
        return self

    def _learner_rules(self) -> list[Rule]:
        learner, embedding = self.learner, self.reward_model.kind == "embedding"
        return [
            *learner_rules(learner),
            Rule(
                embedding and learner.zero_stage > 0,
                "learner.zero_stage",
                learner.zero_stage,
                'splits a model that does not need it: with reward_model.kind = "embedding" only a small '
                "network is trained; set it to 0",
            ),
            Rule(
                embedding and learner.gradient_checkpointing,
                "learner.gradient_checkpointing",
                True,
                'has no effect with reward_model.kind = "embedding"; leave it out',
            ),
        ]

    def _evaluation_rules(self) -> list[Rule]:
        names = [one.name for one in self.evaluate]
        gold = self.evaluation
        return [
            Rule(
                len(gold.columns) == 1,
                "evaluation.rejected_gold_column"
                if gold.chosen_gold_column
                else "evaluation.chosen_gold_column",
                "",
                "is missing: true rewards are needed of both responses, or of neither",
            ),
            Rule(
                bool(gold.columns) and bool(self.preferences.choice_column),
                "evaluation.chosen_gold_column",
                gold.chosen_gold_column,
                CHOICE_AND_GOLD,
            ),
            Rule(
                len(set(names)) < len(names) or bool({"train", "heldout"} & set(names)),
                "evaluate.name",
                names,
                'must all be different, and none may be "train" or "heldout"; rename them',
            ),
        ]
