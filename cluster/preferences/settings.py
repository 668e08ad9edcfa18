"""What a user may set about preference data (the `[preferences]` table). No heavy imports here."""

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from rewards.settings import Settings

DEFAULT_HELDOUT_FRACTION = 0.1
OPTIONAL_COLUMNS = ("margin_column", "weight_column", "annotator_column", "subset_column", "finished_column")
_OPTIONAL = "read where a row has it; if you set this, every row must; empty: never read"


class PreferenceSettings(Settings):
    """`[preferences]`: where pairs come from; see docs/preferences.md for the rows."""

    train: str = Field(
        min_length=1,
        description="JSON Lines, Parquet or Arrow file, a folder of them, or the name of a Hugging Face "
        "dataset.",
    )
    heldout: str = Field("", description="The same for held-out pairs; empty: set aside from `train`.")
    heldout_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of prompts set aside, with all their pairs, when `heldout` is empty; unset: "
        f"{DEFAULT_HELDOUT_FRACTION}.",
    )
    part: Literal["all", "a", "b"] = Field(
        "all",
        description="Which half of the training prompts to use; no prompt is in both halves, so a reward "
        "model of `b` can judge what was optimised against one of `a`.",
    )
    split_seed: int = Field(
        0,
        ge=0,
        description="Seed of the held-out split and of the halves; keep it between models to compare.",
    )
    subset: str = Field("", description="Folder or hub dataset: which of its configurations.")
    revision: str | None = Field(None, description="Hub dataset: branch, tag or commit.")
    train_split: str = Field("train", min_length=1, description="Folder or hub dataset: the training split.")
    heldout_split: str = Field("test", min_length=1, description="Folder or hub dataset: held-out split.")
    prompt_column: str = Field(
        "prompt",
        min_length=1,
        description="Column with a text or chat messages; rows without it have the prompt in both responses.",
    )
    chosen_column: str = Field(
        "chosen", min_length=1, description="Column with the better response: text or chat messages."
    )
    rejected_column: str = Field("rejected", min_length=1, description="Column with the worse response.")
    system_column: str = Field("", description="Column with a system message for a prompt that is a text.")
    margin_column: str = Field("margin", description=f"Column with the margin, 0 or more; {_OPTIONAL}.")
    weight_column: str = Field("weight", description=f"Column with the label's weight; {_OPTIONAL}.")
    annotator_column: str = Field("annotator", description=f"Column with who gave the label; {_OPTIONAL}.")
    subset_column: str = Field("subset", description=f"Column with a group for evaluation; {_OPTIONAL}.")
    finished_column: str = Field(
        "finished",
        description="Column with whether each response ends there or was cut off, as "
        f'`{{"chosen": true, "rejected": false}}`, of a single response as true or false; {_OPTIONAL}.',
    )
    choice_column: str = Field(
        "",
        description="Column that says which of two responses is better, where rows do not have them in "
        "order: columns that are named chosen or rejected are then of the first or the second response.",
    )
    choice_first: str | int = Field("", description="What `choice_column` holds where the first is better.")
    choice_second: str | int = Field(
        "",
        description="What it holds where the second is better; rows with anything else, such as a tie, are "
        "put aside.",
    )
    chosen_score_column: str = Field(
        "", description="Column with the better response's score: the margin becomes the scores' difference."
    )
    rejected_score_column: str = Field("", description="Column with the worse response's score.")
    margin_scale: float = Field(1.0, gt=0, description="What margins are multiplied by.")
    keep_columns: list[str] = Field(
        default_factory=list, description="Further columns that stay with a pair, such as gold rewards."
    )
    dialogues: Literal["text", "messages"] = Field(
        "text",
        description="`Human: … Assistant: …` texts. text: as they are; messages: "
        "split into chat messages, for a model with a chat template.",
    )
    reply_mark: str = Field(
        "",
        description="What stands before the reply in texts without a prompt column; empty: the usual marks.",
    )
    contradictions: Literal["majority", "put-aside", "keep", "refuse"] = Field(
        "majority",
        description="Pairs labelled both ways. majority: the order with more weight stays, a tie leaves "
        "neither; put-aside: neither stays; keep: both stay; refuse: an error.",
    )
    empty_responses: Literal["put-aside", "keep"] = Field(
        "put-aside", description="Responses without text: malformed rows, or a model that ended at once."
    )
    max_rows: int | None = Field(
        None, ge=1, description="Stop reading after this many good rows of a source."
    )

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.heldout and self.heldout_fraction is not None:
            raise ValueError(
                f"preferences.heldout_fraction = {self.heldout_fraction} and preferences.heldout = "
                f"{self.heldout!r} exclude each other: remove one of them"
            )
        scores = (self.chosen_score_column, self.rejected_score_column)
        if bool(scores[0]) != bool(scores[1]):
            missing = "chosen_score_column" if scores[1] else "rejected_score_column"
            raise ValueError(f'preferences.{missing} = "": margins need both score columns, or neither')
        if scores[0] and "margin_column" in self.model_fields_set and self.margin_column:
            raise ValueError(
                f"preferences.margin_column = {self.margin_column!r} and preferences.chosen_score_column = "
                f"{scores[0]!r} both give the margin: remove one of them"
            )
        self._check_choice()
        if self.chosen_column == self.rejected_column:
            raise ValueError(
                f"preferences.rejected_column = {self.rejected_column!r} is the chosen column too"
            )
        return self

    @property
    def choices(self) -> tuple[str, str]:
        """What `choice_column` holds where the first, and where the second response is better."""
        return str(self.choice_first), str(self.choice_second)

    def _check_choice(self) -> None:
        if not self.choice_column:
            for name in ("choice_first", "choice_second"):
                if getattr(self, name) != "":
                    raise ValueError(
                        f"preferences.{name} = {getattr(self, name)!r} says what preferences.choice_column "
                        "holds, and there is none: name it too"
                    )
        elif len({"", *self.choices}) < 3:
            raise ValueError(
                f"preferences.choice_column = {self.choice_column!r} needs two different values, in "
                "preferences.choice_first and preferences.choice_second: what it holds where the first, and "
                "where the second response is better"
            )

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the optional columns that nobody named: what is written and read again names them."""
        return {
            name: value
            for name, value in handler(self).items()
            if name not in OPTIONAL_COLUMNS or name in self.model_fields_set
        }

    def required(self, field: str) -> bool:
        """Whether the user named this optional column, so that every row must have it."""
        return field in self.model_fields_set and bool(getattr(self, field))
