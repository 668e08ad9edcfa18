"""Rules over the settings of the policy-gradient family, and what of them is worth a warning."""

from actors.settings import RolloutSettings
from cluster.rules import Rule
from learner.kl import gradient_caveat
from learner.settings import CorrectionSettings, OptimizerSettings, PPOSettings

_USES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("gamma", "advantage", ("gae", "reward_to_go")),
    ("gae_lambda", "advantage", ("gae",)),
    ("group_epsilon", "advantage", ("group_std",)),
    ("whiten_rewards", "advantage", ("gae", "reward_to_go")),
    ("clip_value", "value_model", ("head", "critic")),
    ("value_coef", "value_model", ("head", "critic")),
    ("dual_clip", "surrogate", ("token_clip", "sequence_clip", "geometric_clip")),
)
"""Settings in `[ppo]`, the one that each belongs to, and the values of that which use it."""


def objective_rules(
    objective: str,
    ppo: PPOSettings,
    correction: CorrectionSettings,
    optimizer: OptimizerSettings,
    rollout: RolloutSettings,
) -> list[Rule]:
    """What the parts of a policy-gradient objective need of each other."""
    default = PPOSettings()
    idle = [
        Rule(
            getattr(ppo, name) != getattr(default, name) and getattr(ppo, choice) not in uses,
            f"ppo.{name}",
            getattr(ppo, name),
            f'has no effect in objective = "{objective}" with ppo.{choice} = "{getattr(ppo, choice)}"; leave '
            f"this at {_toml(getattr(default, name))}",
        )
        for name, choice, uses in _USES
    ]
    return [
        Rule(
            ppo.advantage == "gae" and not ppo.has_values,
            "ppo.value_model",
            ppo.value_model,
            'leaves ppo.advantage = "gae" without values; set it to "head" or "critic", or choose another '
            "advantage",
        ),
        Rule(
            ppo.advantage != "gae" and ppo.has_values,
            "ppo.value_model",
            ppo.value_model,
            f'is not used with ppo.advantage = "{ppo.advantage}"; set it to "none"',
        ),
        Rule(
            ppo.advantage not in ("gae", "reward_to_go") and rollout.group_size < 2,
            "rollout.group_size",
            rollout.group_size,
            f'leaves nothing to compare with for ppo.advantage = "{ppo.advantage}"; set it to 2 or more',
        ),
        Rule(
            correction.value_target == "vtrace" and not ppo.has_values,
            "correction.value_target",
            "vtrace",
            f'is for a value model, which objective = "{objective}" does without; set it to "gae"',
        ),
        Rule(
            optimizer.critic_lr is not None and not ppo.has_values,
            "optimizer.critic_lr",
            optimizer.critic_lr,
            f'is for a value model, which objective = "{objective}" does without; leave it out',
        ),
        Rule(
            ppo.overlong_penalty != default.overlong_penalty and not ppo.overlong_fraction,
            "ppo.overlong_penalty",
            ppo.overlong_penalty,
            f"has no effect with ppo.overlong_fraction = 0; set that, or leave this at "
            f"{default.overlong_penalty}",
        ),
        *idle,
    ]


def penalty_warning(ppo: PPOSettings) -> str | None:
    """What the KL penalty does to the policy where that is not what its name says."""
    caveat = gradient_caveat(ppo.kl_in, ppo.kl_estimator) if ppo.kl_coef else None
    if caveat is None:
        return None
    return (
        f'ppo.kl_estimator = "{ppo.kl_estimator}" with ppo.kl_in = "{ppo.kl_in}": {caveat}. The gradient of '
        'KL(π‖π_ref) is that of "k1" in the "reward"'
    )


_WIDE = 4


def lag_warning(correction: CorrectionSettings, window: int | str) -> str | None:
    """That a wide window which nobody narrows has cost decoupled runs their reward."""
    if not isinstance(window, int) or window < _WIDE or correction.ratio != "proximal":
        return None
    return (
        f'scheduler.window = {window} is fixed, and with correction.ratio = "proximal" nothing holds the '
        "learner near the policy that sampled: at a lag of 8 such runs lost reward (docs/corrections.md). "
        'Watch mismatch/ess; scheduler.window = "adaptive" narrows the window by itself, and '
        'correction.ratio = "behaviour" with correction.weights = "none" kept the reward there'
    )


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
