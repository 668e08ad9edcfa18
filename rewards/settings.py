"""What a user may set about tasks and rewards (the `[task]` and `[[reward]]` tables).

Each package owns the settings of its own parts; `cluster.config` puts them together.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of every settings table: strict types, finite numbers, no unknown keys, frozen once parsed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TaskSettings(Settings):
    """`[task]`: a generated task with a known gold reward, instead of `[data]` files."""

    kind: Literal["reversal", "countdown", "programs", "coverage", "modes"] = Field(
        description="Which generator makes the rows."
    )
    train_size: int = Field(4096, ge=1, description="Training prompts to generate.")
    heldout_size: int = Field(256, ge=2, description="Held-out prompts, disjoint from the training ones.")
    demonstrations: int = Field(
        4096, ge=0, description="Imperfect demonstrations for the supervised warm-up."
    )
    corruption: float = Field(
        0.3, ge=0, le=1, description="Fraction of demonstrations made wrong on purpose."
    )
    length: int = Field(8, ge=2, le=64, description="reversal, modes: letters of a prompt; others: ignored.")
    numbers: int = Field(
        3,
        ge=2,
        le=6,
        description="countdown: how many numbers are given; programs: most steps of one; others: ignored.",
    )
    largest: int = Field(
        9,
        ge=4,
        le=99,
        description="countdown: numbers are drawn from 1 to this; programs: so are constants; "
        "others: ignored.",
    )
    seed: int = Field(0, ge=0, description="Seed of the generator; the same seed gives the same rows.")


class RewardSettings(Settings):
    """One `[[reward]]` table; the reward of a completion is the weighted sum over those of role `train`."""

    kind: Literal[
        "exact", "numeric", "regex", "function", "task", "code", "model", "log_ratio", "discriminator"
    ] = Field(
        description="exact: equals the answer; numeric: last number equals the answer within `tolerance`; "
        "regex: `pattern` is found; function: your own Python; task: gold reward of the `[task]`; "
        "code: the share of the row's tests that the completion's Python passes in a sandbox; "
        "model: a trained reward model; log_ratio: log π_tuned − log π_initial of two language models; "
        "discriminator: a classifier of demonstrations against the policy's responses, trained beside it."
    )
    name: str = Field("", description="Name of its metric, `reward/NAME`; the kind when empty.")
    weight: float = Field(1.0, description="Weight in the sum.")
    role: Literal["train", "evaluate"] = Field(
        "train",
        description="train: a part of the reward that is optimised; evaluate: scores samples of held-out "
        "evaluations only, is never trained on, and is logged as `heldout/NAME`.",
    )
    path: str = Field(
        "",
        description="model: the folder of a trained reward model; log_ratio: of the fine-tuned model.",
    )
    initial: str = Field(
        "", description="log_ratio: the folder of the language model that the fine-tuning started from."
    )
    per_token: bool = Field(False, description="log_ratio: divide by the number of the response's tokens.")
    pattern: str = Field("", description="regex: what must be found; group 1, if any, must equal the answer.")
    function: str = Field("", description="function: `module:function` or `file.py:function`.")
    answer_column: str = Field(
        "answer", description="exact, numeric, regex: the column with the right answer."
    )
    tolerance: float = Field(
        1e-6, ge=0, description="numeric: largest absolute difference that counts as equal."
    )
    ignore_case: bool = Field(False, description="exact: compare without regard to case.")
    tests_column: str = Field(
        "tests",
        description='code: the column with the tests, a list of `{"input": [arguments], "output": value}`.',
    )
    entry_point: str = Field(
        "", description="code: the function that the tests call; when empty, the row's column `entry_point`."
    )
    all_or_nothing: bool = Field(False, description="code: 1 only if every test passes, else 0.")
    cpu_seconds: int = Field(2, ge=1, description="code: processor time of one program.")
    memory_mib: int = Field(
        256, ge=64, description="code: address space of one program; the interpreter takes about 40 of it."
    )

    form: Literal["logit", "-log(1-D)", "log(D)", "D/(1-D)"] = Field(
        "logit",
        description="discriminator: the reward made of its D; logit: log D − log(1 − D).",
    )
    logit_limit: float = Field(
        10.0, gt=0, description="discriminator: a logit is cut off at ± this before it becomes a reward."
    )

    @property
    def label(self) -> str:
        """The name under which the reward's values are logged."""
        return self.name or self.kind
