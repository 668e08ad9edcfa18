"""What a user may set about stopping on over-optimisation (the `[stop]` table)."""

from typing import Literal

from pydantic import Field, model_validator

from rewards.settings import Settings

Action = Literal["off", "warn", "stop"]


class StopSettings(Settings):
    """`[stop]`: what an evaluation shows of a reward being gamed, and what is then done."""

    heldout_decline: Action = Field(
        "warn",
        description="When the held-out reward has been below its best by more than the paired interval for "
        "`decline_evaluations` evaluations in a row: off, warn, or stop.",
    )
    decline_evaluations: int = Field(
        3, ge=1, description="Evaluations in a row that must show the decline of the held-out reward."
    )
    normalised_gap: Action = Field(
        "warn",
        description="When the trained reward has risen by more than `gap_limit` further than the held-out "
        "one, each in standard deviations over the responses of the first evaluation: off, warn, or stop.",
    )
    gap_limit: float = Field(
        1.0, gt=0, description="normalised_gap: the gap allowed, in standard deviations."
    )
    disagreement: Action = Field(
        "warn",
        description="When the members of the reward's ensemble disagree by more than `disagreement_limit` "
        "times as much as at the first evaluation: off, warn, or stop.",
    )
    disagreement_limit: float = Field(
        2.0, gt=1, description="disagreement: how many times the first evaluation's is allowed."
    )
    kl_budget: Action = Field(
        "off", description="When KL(policy‖reference) is above `kl_limit`: off, warn, or stop."
    )
    kl_limit: float | None = Field(
        None, gt=0, description="The KL that is allowed, in nats a response; needed by `kl_budget`."
    )

    @model_validator(mode="after")
    def _kl_budget_has_a_limit(self) -> "StopSettings":
        if self.kl_budget != "off" and self.kl_limit is None:
            raise ValueError(
                f'stop.kl_budget = "{self.kl_budget}" needs a budget: set stop.kl_limit, in nats a response'
            )
        return self
