"""What a user may set about adversarial imitation: `[discriminator]`, and `[[reward]]` of that kind.

No heavy imports here.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import Field

from rewards.settings import RewardSettings, Settings

KIND = "discriminator"
REWARD_FIELDS = ("form", "logit_limit")
"""Fields of `[[reward]]` that only this kind reads."""


class DiscriminatorSettings(Settings):
    """`[discriminator]`: tells demonstrations from the policy's responses, and is trained beside it."""

    path: str = Field(
        "",
        description="Folder or hub name of the model that it starts from, with the policy's tokenizer; "
        "empty: the frozen reference.",
    )
    lr: float = Field(1e-4, gt=0, description="Learning rate.")
    updates: int = Field(
        1, ge=1, description="Optimizer updates a learner step; they share out the step's responses."
    )
    replay: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Share of an update's responses that come from earlier steps; 0: fresh ones only.",
    )
    replay_size: int = Field(4096, ge=1, description="Newest responses of earlier steps that are kept.")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="α: demonstrations are labelled 1 − α and responses α, which keeps the best logit within "
        "±log((1 − α)/α).",
    )
    gradient_penalty: float = Field(
        0.0,
        ge=0,
        description="γ of the penalty γ/2 · ‖∂logit/∂embeddings‖², a mean over the update's sequences.",
    )
    heldout: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="Share of the demonstrations' prompts that it never learns from, to see whether it "
        "learns by heart; 0: none.",
    )


class Contradiction(NamedTuple):
    """One rule over several settings: whether it is broken, and what to say of which field."""

    broken: bool
    field: str
    value: object
    remedy: str


def trains_discriminator(rewards: Sequence[RewardSettings]) -> bool:
    """Whether a run has a discriminator at all."""
    return any(one.kind == KIND for one in rewards)


def discriminator_label(rewards: Sequence[RewardSettings]) -> str:
    """The label of the one reward of that kind."""
    return next(one.label for one in rewards if one.kind == KIND)


def check_discriminators(rewards: Sequence[RewardSettings]) -> None:
    """ValueError for two of the kind, for one that is not trained on, and for fields without use."""
    found = [one.label for one in rewards if one.kind == KIND]
    if len(found) > 1:
        raise ValueError(
            f'reward.kind = "{KIND}" of {found[1]!r}: {found[0]!r} is one already, and a run trains one '
            "discriminator; leave one of them out"
        )
    for one in rewards:
        if one.kind == KIND and one.role != "train":
            raise ValueError(
                f'reward.role = "{one.role}" of {one.label!r}: a discriminator changes while the policy '
                'learns, so its scores cannot judge the run; set role = "train"'
            )
        for field in REWARD_FIELDS:
            value = getattr(one, field)
            if one.kind != KIND and value != RewardSettings.model_fields[field].default:
                raise ValueError(
                    f"reward.{field} = {value!r} of {one.label!r} has no effect with kind = {one.kind!r}; "
                    f'leave it out, or set kind = "{KIND}"'
                )


def discriminator_rules(
    settings: DiscriminatorSettings,
    rewards: Sequence[RewardSettings],
    *,
    has_demonstrations: bool,
    dynamic_sampling: bool,
    zero_stage: int,
    gradient_checkpointing: bool,
) -> Iterator[Contradiction]:
    """What cannot go together; `has_demonstrations`: a task's own, or a file in `warmup.data`."""
    used = trains_discriminator(rewards)
    default = DiscriminatorSettings()
    changed = [
        name
        for name in DiscriminatorSettings.model_fields
        if getattr(settings, name) != getattr(default, name)
    ]
    first = changed[0] if changed else "lr"
    yield Contradiction(
        bool(changed) and not used,
        f"discriminator.{first}",
        getattr(settings, first),
        f'has no effect without a [[reward]] of kind = "{KIND}"; add one, or leave the table out',
    )
    yield Contradiction(
        used and not has_demonstrations,
        "reward.kind",
        KIND,
        "needs demonstrations: name a file of prompt and completion in warmup.data, or let the [task] "
        "make some with task.demonstrations",
    )
    yield Contradiction(
        used and dynamic_sampling,
        "rollout.dynamic_sampling",
        True,
        "leaves out groups of equal rewards, which all are until the discriminator has learned from some; "
        "set it to false",
    )
    yield Contradiction(
        used and settings.gradient_penalty > 0 and zero_stage == 3,
        "discriminator.gradient_penalty",
        settings.gradient_penalty,
        "takes a second derivative, for which ZeRO-3 has let the weights go; set it to 0 and use "
        "label_smoothing, or set learner.zero_stage to 2",
    )
    yield Contradiction(
        used and settings.gradient_penalty > 0 and gradient_checkpointing,
        "discriminator.gradient_penalty",
        settings.gradient_penalty,
        "takes a second derivative, which learner.gradient_checkpointing = true cannot recompute; set one "
        "of them to 0 or false",
    )
