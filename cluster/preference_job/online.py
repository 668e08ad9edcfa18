"""Rules over the settings of `objective = "online_dpo"`, whose tables are those of policy gradients."""

from collections.abc import Iterator

from learner.preference_settings import OnlineDPOSettings
from learner.presets import PRESETS
from learner.settings import CorrectionSettings, PPOSettings

ONLINE_DPO = "online_dpo"
_USED = ("epochs", "minibatches")  # of [ppo]: how a step's pairs are divided into updates
Contradiction = tuple[bool, str, object, str]


def online_dpo_rules(
    objective: str,
    settings: OnlineDPOSettings,
    ppo: PPOSettings,
    correction: CorrectionSettings,
    groups_per_step: int,
) -> Iterator[Contradiction]:
    """(broken, field, value, remedy) of each."""
    if objective != ONLINE_DPO:
        for name in OnlineDPOSettings.model_fields:
            value, default = getattr(settings, name), getattr(OnlineDPOSettings(), name)
            remedy = f'has no part in objective = "{objective}"; leave it out'
            yield value != default, f"online_dpo.{name}", value, remedy
        return
    preset = PRESETS[ONLINE_DPO]
    for table, given, expected in (
        ("ppo", ppo, PPOSettings(**preset["ppo"])),
        ("correction", correction, CorrectionSettings(**preset["correction"])),
    ):
        for name in type(given).model_fields:
            value = getattr(given, name)
            if table == "ppo" and name in _USED:
                continue
            remedy = (
                f'has no part in objective = "{ONLINE_DPO}", which takes epochs and minibatches of [ppo] '
                "only, and nothing of [correction]; leave it out"
            )
            yield value != getattr(expected, name), f"{table}.{name}", value, remedy
    yield (
        ppo.minibatches > groups_per_step,
        "ppo.minibatches",
        ppo.minibatches,
        f"is more than the {groups_per_step} pairs that a step can have, one a group; lower it",
    )
