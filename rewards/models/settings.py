"""What a user may set about a reward model (the `[reward_model]` table). No heavy imports here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rewards.settings import Settings

Kind = Literal["transformer", "embedding"]
Loss = Literal["bradley-terry", "classification", "odin", "residual"]
Rule = Literal["mean", "worst", "uncertainty"]


class TextSettings(Settings):
    """`[reward_model.text]`: how a prompt and a response become the tokens that the model reads."""

    apply_chat_template: Literal["auto", "always", "never"] = Field(
        "auto",
        description="auto: chat messages always, texts where the tokenizer has a template; always: texts "
        "too; never: texts as they are, chat messages refused.",
    )
    system_prompt: str = Field("", description="System message for chat prompts that bring none.")
    end_token: bool = Field(True, description="Add the end token to a response that is finished.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.system_prompt and self.apply_chat_template == "never":
            raise ValueError(
                'system_prompt needs a chat template, but apply_chat_template = "never": '
                'set "auto" or "always", or remove the system prompt'
            )
        return self


class RewardModelSettings(Settings):
    """`[reward_model]`: what is trained on preferences, and with which loss."""

    kind: Kind = Field(
        "transformer",
        description="transformer: a language model with a scalar head, all of it trained; embedding: a "
        "small network on the frozen last-token embeddings of a language model.",
    )
    loss: Loss = Field(
        "bradley-terry",
        description="bradley-terry: log-likelihood of the pairs; classification: winners 1, losers 0, each "
        "response by itself; odin: a second head takes the length and is dropped; residual: bradley-terry, "
        "with the part of the reward that is linear in length taken out afterwards.",
    )
    margin: bool = Field(
        False, description="bradley-terry, residual: use each pair's margin m, as σ(r_w − r_l − m)."
    )
    centring: float = Field(
        0.01, ge=0, description="c of the term c·(r_w + r_l)², which keeps rewards near 0; 0: none."
    )
    odin_length: float = Field(1.0, ge=0, description="odin: λ, weight of the length correlations.")
    odin_orthogonality: float = Field(1.0, ge=0, description="odin: λ_O, weight of the heads' overlap.")
    members: int = Field(1, ge=1, le=64, description="K: models in the ensemble, each from its own seed.")
    bootstrap: bool = Field(
        False, description="Each member weighs prompts by a Poisson(1) draw of its own, instead of by 1."
    )
    rule: Rule = Field(
        "mean",
        description="Score of an ensemble from its standardised members. mean; worst: the smallest; "
        "uncertainty: mean − `coefficient` · variance.",
    )
    coefficient: float = Field(1.0, ge=0, description="uncertainty: λ, weight of the variance.")
    hidden_sizes: list[int] = Field(
        [1024, 512],
        min_length=1,
        max_length=8,
        description="embedding: widths of the network's hidden layers (ReLU).",
    )
    cache: str = Field(
        "",
        description="embedding: folder that keeps embeddings between runs; empty: `~/.cache/headrace`.",
    )
    text: TextSettings = Field(default_factory=TextSettings)

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if any(size < 1 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes = {self.hidden_sizes}: each width must be at least 1")
        if self.margin and self.loss not in ("bradley-terry", "residual"):
            raise ValueError(
                f'margin = true has no effect with loss = "{self.loss}": set it to false, or loss to '
                '"bradley-terry" or "residual"'
            )
        if self.loss == "odin" and self.kind == "embedding":
            raise ValueError(
                'loss = "odin" trains two heads on a transformer: set kind to "transformer", or loss to '
                '"residual" to take the length out of an embedding model'
            )
        if self.bootstrap and self.members == 1:
            raise ValueError("bootstrap = true with members = 1 only adds noise: set members to 2 or more")
        return self
