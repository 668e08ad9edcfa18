"""What an `objective` of the policy-gradient family means: settings that hold unless the user sets them.

All of them run on the same path; `learner.surrogates`, `learner.group_advantages` and `learner.kl` have the
formulas. PPO is what the settings say by themselves.
"""

from collections.abc import Mapping
from typing import Any

# Every objective but PPO does without a value model. β and clip ranges are those of the papers; where a paper
# has none, of its authors' code.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "ppo": {},
    # Hu et al., arXiv 2501.03262: reward-to-go with the KL penalty of each token, whitened over the batch.
    "reinforce++": {
        "ppo": {"advantage": "reward_to_go", "value_model": "none", "whiten_advantages": True},
    },
    # The same paper's form for several samples a prompt: R less the mean of its group, whitened over the
    # batch; the KL penalty is a loss of its own, k2.
    "reinforce++_baseline": {
        "ppo": {
            "advantage": "group_mean",
            "value_model": "none",
            "whiten_advantages": True,
            "kl_in": "loss",
            "kl_estimator": "k2",
        },
    },
    # Ahmadian et al., arXiv 2402.14740: a response is one action, its return R − β·Σ_t k1.
    "rloo": {
        "ppo": {
            "advantage": "leave_one_out",
            "value_model": "none",
            "whiten_advantages": False,
            "surrogate": "sequence_clip",
            "aggregation": "sequence_sum",
        },
    },
    # Shao et al., arXiv 2402.03300.
    "grpo": {
        "ppo": {
            "advantage": "group_std",
            "value_model": "none",
            "whiten_advantages": False,
            "aggregation": "sequence_mean",
            "kl_in": "loss",
            "kl_estimator": "k3",
            "kl_coef": 0.04,
        },
    },
    # Liu et al., arXiv 2503.20783: neither 1/|y| nor 1/std, whose biases it shows.
    "dr_grpo": {
        "ppo": {
            "advantage": "group_mean",
            "value_model": "none",
            "whiten_advantages": False,
            "aggregation": "constant",
            "kl_coef": 0.0,
        },
    },
    # Yu et al., arXiv 2503.14476.
    "dapo": {
        "ppo": {
            "advantage": "group_std",
            "value_model": "none",
            "whiten_advantages": False,
            "aggregation": "token_mean",
            "clip": 0.2,
            "clip_high": 0.28,
            "kl_coef": 0.0,
            "overlong_fraction": 0.2,
        },
        "rollout": {"dynamic_sampling": True},
    },
    # Zheng et al., arXiv 2507.18071. The ratio is a mean over tokens, so its range is narrow.
    "gspo": {
        "ppo": {
            "advantage": "group_std",
            "value_model": "none",
            "whiten_advantages": False,
            "surrogate": "geometric_clip",
            "aggregation": "sequence_mean",
            "clip": 3e-4,
            "clip_high": 4e-4,
            "kl_coef": 0.0,
        },
    },
    # MiniMax, arXiv 2506.13585: no bound below. It leaves the one above open; 5 is what others found good.
    "cispo": {
        "ppo": {
            "advantage": "group_std",
            "value_model": "none",
            "whiten_advantages": False,
            "surrogate": "cispo",
            "aggregation": "token_mean",
            "clip": 1.0,
            "clip_high": 4.0,
            "kl_coef": 0.0,
        },
    },
    # Guo et al., arXiv 2402.04792: a loss of pairs (`learner.online_dpo`). Of [ppo] it takes epochs and
    # minibatches; the rest, and [correction], is neutral.
    "online_dpo": {
        "ppo": {
            "advantage": "group_mean",
            "value_model": "none",
            "whiten_advantages": False,
            "kl_coef": 0.0,
        },
        "correction": {"weights": "none"},
    },
}


def with_preset(tables: Any) -> Any:
    """The parsed tables of a job with the objective's settings where the user has set none."""
    if not isinstance(tables, Mapping):
        return tables
    objective = tables.get("objective", "ppo")
    preset = PRESETS.get(objective, {}) if isinstance(objective, str) else {}
    completed = dict(tables)
    for name, values in preset.items():
        given = tables.get(name, {})
        if isinstance(given, Mapping):
            completed[name] = {**values, **given}
    return completed
