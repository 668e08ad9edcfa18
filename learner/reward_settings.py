"""What a user may set about the model that a reward model starts from. No heavy imports here."""

from typing import Literal

from pydantic import Field

from learner.settings import ScratchSettings
from rewards.settings import Settings


class BackboneSettings(Settings):
    """`[model]`: the language model that a reward model starts from, or a tiny one from scratch."""

    path: str = Field("", description="Folder or hub name of a causal language model with its tokenizer.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    max_length: int | None = Field(
        None, ge=2, description="Prompt plus response; unset: the model's own limit."
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="Attention kernel. A model that caps its attention scores, as Gemma 2 does, runs with "
        "eager instead of sdpa, which cannot.",
    )
    scratch: ScratchSettings | None = Field(None, description="Build a small Llama instead of loading one.")
