"""The configuration of a job that goes from labels to a policy: `dpo`, `ipo`, `kto`, `simpo`."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cluster.config import ClusterSettings
from cluster.monitor_settings import MonitorSettings
from cluster.preferences.settings import PreferenceSettings
from cluster.rules import Rule, enforce, learner_rules, model_rules
from cluster.run_settings import KeptCheckpoints, RunName
from learner.preference_settings import (
    DPOSettings,
    ImitationSettings,
    IPOSettings,
    KTOSettings,
    Method,
    SimPOSettings,
)
from learner.settings import LearnerSettings, ModelSettings, OptimizerSettings
from rewards.settings import Settings

METHODS = ("dpo", "ipo", "kto", "simpo")


class PreferenceRunSettings(Settings):
    """`[run]`: how long, how often, and on what batch."""

    name: RunName = "preferences"
    seed: int = Field(0, ge=0, description="Seed of data order and initial weights.")
    epochs: int = Field(1, ge=1, description="Passes over the training examples.")
    batch_size: int = Field(64, ge=1, description="Pairs, or labelled responses with `kto`, an update.")
    evaluate_every: int = Field(
        50, ge=0, description="Updates between looks at held-out examples; 0: only before and after."
    )
    evaluate_examples: int = Field(
        512, ge=2, description="Held-out examples in such a look; the ones before and after take all."
    )
    checkpoint_every: int = Field(200, ge=0, description="Updates between checkpoints; 0: only the last.")
    keep_checkpoints: KeptCheckpoints = 2


class PolicyTextSettings(Settings):
    """`[text]`: how a prompt becomes the tokens that the policy reads."""

    apply_chat_template: Literal["auto", "always", "never"] = Field(
        "auto",
        description="auto: chat messages always, texts where the tokenizer has a template; always: texts "
        "too; never: texts as they are, chat messages refused.",
    )
    system_prompt: str = Field("", description="System message for chat prompts that bring none.")


class PreferenceJobConfig(Settings):
    """A policy from labels. Every table but `[model]` and `[preferences]` has defaults.

    Of the tables `[dpo]`, `[ipo]`, `[kto]` and `[simpo]` only the objective's own may be given.
    """

    objective: Literal["dpo", "ipo", "kto", "simpo"] = Field(description="What the job optimises.")
    run: PreferenceRunSettings = Field(default_factory=PreferenceRunSettings)
    model: ModelSettings
    preferences: PreferenceSettings
    text: PolicyTextSettings = Field(default_factory=PolicyTextSettings)
    warmup: ImitationSettings = Field(default_factory=ImitationSettings)
    dpo: DPOSettings | None = None
    ipo: IPOSettings | None = None
    kto: KTOSettings | None = None
    simpo: SimPOSettings | None = None
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @property
    def method(self) -> Method:
        """The objective's own settings."""
        chosen: Method | None = getattr(self, self.objective)
        assert chosen is not None, "validation fills it in"
        return chosen

    @model_validator(mode="before")
    @classmethod
    def _own_table(cls, tables: Any) -> Any:
        """The objective's own table is there, if only with its defaults."""
        if isinstance(tables, dict) and tables.get("objective") in METHODS:
            return {tables["objective"]: {}} | tables
        return tables

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        enforce((*self._method_rules(), *self._model_rules()), self.model)
        return self

    def _method_rules(self) -> list[Rule]:
        others = [
            Rule(
                name != self.objective and getattr(self, name) is not None,
                name,
                "a table",
                f'has no part in objective = "{self.objective}"; leave it out',
            )
            for name in METHODS
        ]
        text, data = self.text, self.preferences
        return [
            *others,
            Rule(
                bool(text.system_prompt) and text.apply_chat_template == "never",
                "text.system_prompt",
                text.system_prompt,
                'needs a chat template, but text.apply_chat_template = "never"; set "auto" or "always"',
            ),
            Rule(
                self.kto is not None and not self.kto.desirable_weight + self.kto.undesirable_weight,
                "kto.desirable_weight",
                0.0,
                "and kto.undesirable_weight = 0.0 leave nothing to learn; raise one of them",
            ),
            Rule(
                bool(data.chosen_score_column) and not (self.dpo is not None and self.dpo.margin),
                "preferences.chosen_score_column",
                data.chosen_score_column,
                'makes margins, which only objective = "dpo" with dpo.margin = true uses; leave it out',
            ),
        ]

    def _model_rules(self) -> list[Rule]:
        model, scratch = self.model, self.model.scratch
        return [
            *model_rules(model),
            Rule(
                bool(model.critic),
                "model.critic",
                model.critic,
                f'has no part in objective = "{self.objective}"; leave it out',
            ),
            Rule(
                bool(model.reference) and self.simpo is not None,
                "model.reference",
                model.reference,
                'has no part in objective = "simpo", which knows no reference; leave it out',
            ),
            Rule(
                bool(model.reference) and scratch is not None,
                "model.reference",
                model.reference,
                "cannot have the vocabulary of [model.scratch], which is made from the data; leave it out",
            ),
            *learner_rules(self.learner),
        ]
