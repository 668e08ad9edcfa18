"""What a user may set about prompts and demonstrations (the `[data]` table). No heavy imports here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rewards.settings import Settings

DEFAULT_HELDOUT_FRACTION = 0.1


class DataSettings(Settings):
    """`[data]`: where prompts come from; see docs/data.md for the rows."""

    train: str = Field(
        min_length=1,
        description="JSON Lines, Parquet or Arrow file, a folder of them, or the name of a Hugging Face "
        "dataset.",
    )
    heldout: str = Field("", description="The same for held-out prompts; empty: set aside from `train`.")
    heldout_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=f"Share of distinct prompts set aside when `heldout` is empty; unset: "
        f"{DEFAULT_HELDOUT_FRACTION}.",
    )
    subset: str = Field("", description="Folder or hub dataset: which of its configurations.")
    revision: str | None = Field(None, description="Hub dataset: branch, tag or commit.")
    train_split: str = Field("train", min_length=1, description="Folder or hub dataset: the training split.")
    heldout_split: str = Field("test", min_length=1, description="Folder or hub dataset: held-out split.")
    prompt_column: str = Field("prompt", min_length=1, description="Column with a text or chat messages.")
    completion_column: str = Field(
        "completion", min_length=1, description="Column with the response, in a file of demonstrations."
    )
    id_column: str = Field("", description="Column with a unique id; empty: the line number.")
    shuffle: bool = Field(True, description="A new order every epoch; off: the order of the file.")
    system_prompt: str = Field("", description="System message for chat prompts that bring none.")
    apply_chat_template: Literal["auto", "always", "never"] = Field(
        "auto",
        description="auto: chat messages always, texts where the tokenizer has a template; always: texts "
        "too; never: texts as they are, chat messages refused.",
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Longer prompts are put aside; unset: what the model's length leaves."
    )
    max_rows: int | None = Field(None, ge=1, description="Stop reading after this many good training rows.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.heldout and self.heldout_fraction is not None:
            raise ValueError(
                f"data.heldout_fraction = {self.heldout_fraction} and data.heldout = {self.heldout!r} "
                "exclude each other: remove one of them"
            )
        if self.system_prompt and self.apply_chat_template == "never":
            raise ValueError(
                'data.system_prompt needs a chat template, but data.apply_chat_template = "never": '
                'set "auto" or "always", or remove the system prompt'
            )
        return self
