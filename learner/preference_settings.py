"""What a user may set about preference objectives. No heavy imports here."""

from pydantic import Field

from rewards.settings import Settings


class DPOSettings(Settings):
    """`[dpo]`: direct preference optimisation, the likelihood of the labels under the implicit reward."""

    beta: float = Field(0.1, gt=0, description="β: how dear it is to leave the reference.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="ε: the share of labels that are taken to be wrong."
    )
    margin: bool = Field(
        False, description="Use each pair's margin m, as σ(β·difference − m); needs rows that have one."
    )


class IPOSettings(Settings):
    """`[ipo]`: identity preference optimisation, a squared distance to a fixed difference."""

    tau: float = Field(0.1, gt=0, description="τ: the log-ratios of a pair are to differ by 1/(2τ).")
    average: bool = Field(
        False, description="Log-ratios as means over a response's tokens, instead of sums as in the paper."
    )


class KTOSettings(Settings):
    """`[kto]`: Kahneman-Tversky optimisation, which needs single responses labelled good or bad."""

    beta: float = Field(0.1, gt=0, description="β: how soon gains and losses level off.")
    desirable_weight: float = Field(1.0, ge=0, description="λ_D: weight of good responses.")
    undesirable_weight: float = Field(1.0, ge=0, description="λ_U: weight of bad responses.")
    completion_column: str = Field(
        "completion", min_length=1, description="Column with the response, in rows of single responses."
    )
    label_column: str = Field(
        "label",
        min_length=1,
        description="Column with true or 1 for a good response, false or 0 for a bad one.",
    )


class SimPOSettings(Settings):
    """`[simpo]`: the mean log-probability of a token as the reward, no reference."""

    beta: float = Field(2.0, gt=0, description="β: scale of the mean log-probability.")
    gamma: float = Field(0.5, ge=0, description="γ: what the rewards of a pair should differ by at least.")


class OnlineDPOSettings(Settings):
    """`[online_dpo]`: DPO on fresh samples, of which the rewards say which is better."""

    beta: float = Field(0.1, gt=0, description="β: how dear it is to leave the reference.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="ε: the share of labels that are taken to be wrong."
    )
    least_gap: float = Field(
        0.0, ge=0, description="A group whose best and worst reward differ by no more than this has no pair."
    )


Method = DPOSettings | IPOSettings | KTOSettings | SimPOSettings
"""One of the objectives, with its parameters."""


class ImitationSettings(Settings):
    """`[warmup]`: supervised updates on the chosen responses, after which the reference is taken."""

    steps: int = Field(
        0, ge=0, description="Optimizer updates; 0: none, for a policy that has seen such responses before."
    )
    batch_size: int = Field(64, ge=1, description="Responses an update.")
    lr: float = Field(
        1e-5, gt=0, description="Peak learning rate, linear warm-up over a tenth and cosine decay."
    )
