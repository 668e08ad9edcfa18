"""What a reward model's job says of its preferences: as it begins, in the summary and in the report."""

from typing import Any

from cluster.reward_job.config import RewardJobConfig
from cluster.reward_job.inputs import RewardInputs


def warnings(inputs: RewardInputs, config: RewardJobConfig) -> list[str]:
    """What a reward model may learn from the training pairs instead of quality, and what it cannot learn."""
    report = inputs.report
    found = list(report.warnings)
    if report.with_margin and not config.reward_model.margin:
        found.append(
            f"{report.with_margin} of {report.train_pairs} training pairs have a margin, which is not used: "
            'set reward_model.margin = true (for loss = "bradley-terry" or "residual"), or '
            'preferences.margin_column = "" if it is to be ignored.'
        )
    return found


def account(inputs: RewardInputs, config: RewardJobConfig) -> dict[str, Any]:
    """For the summary: `preferences`, and `preferences_elsewhere` by the names of `[[evaluate]]` files."""
    elsewhere = {
        name: {
            "sentences": report.source_sentences(),
            "doubts": report.doubts,
            "warnings": report.warnings,
        }
        for name, report in inputs.elsewhere.items()
    }
    return {
        "preferences": inputs.report.to_json() | {"warnings": warnings(inputs, config)},
        "preferences_elsewhere": elsewhere or None,
    }
