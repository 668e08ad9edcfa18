"""The product's own path from rewards to a gradient, over all responses of an enumerable model instead of a
sample of them: token rewards with KL, advantages, policy loss. Each response counts by its probability.
"""

import torch
from enumerable_lm import EnumerableLM
from torch import Tensor

from learner.advantages import generalised_advantages, token_rewards
from learner.batch import Share
from learner.kl import Estimator, k1
from learner.objectives import policy_loss
from learner.presets import PRESETS
from learner.settings import CorrectionSettings, PPOSettings
from learner.surrogates import Surrogate
from learner.targets import Batch, prepare

NO_CLIP = 1e9


def advantages_of(
    lm: EnumerableLM,
    rewards: Tensor,
    *,
    reference: Tensor | None = None,
    beta: float = 0.0,
    values: Tensor | None = None,
    lam: float = 1.0,
) -> Tensor:
    """(N, T) from `token_rewards` and `generalised_advantages`; values are (S,), 0 where none are given."""
    mask, logprobs = lm.mask, lm.token_log_probs().detach()
    distance = torch.zeros_like(logprobs) if reference is None else k1(logprobs, reference)
    by_token = token_rewards(rewards, distance, mask, kl_coef=beta)
    baseline = torch.zeros_like(by_token) if values is None else values[lm.listing.states]
    found, _ = generalised_advantages(by_token, baseline, mask, gamma=1.0, lam=lam)
    return found


def advantages_of_a_step(
    lm: EnumerableLM, rewards: Tensor, *, reference: Tensor, beta: float, estimator: Estimator
) -> Tensor:
    """(N, T) from `learner.targets.prepare`: rewards to come, not whitened, with the penalty in the reward.

    Each response is a sample of one step on one rank, and the sampler the policy itself.
    """
    mask, logprobs = lm.mask, lm.token_log_probs().detach()
    number = len(mask)
    options = PRESETS["reinforce++"]["ppo"] | {"whiten_advantages": False}
    found, _ = prepare(
        Share((), mask, mask, logprobs, reference, rewards, torch.zeros_like(mask, dtype=torch.long)),
        logprobs,
        torch.zeros_like(logprobs),
        settings=PPOSettings(**options, kl_in="reward", kl_estimator=estimator),
        correction=CorrectionSettings(),
        batch=Batch(
            groups=torch.arange(number),
            mine=torch.arange(number),
            limit=mask.shape[1],
            largest_lag=0,
            kl_coef=beta,
            rank=0,
            ranks=1,
        ),
        reduce=_of_one_rank,
    )
    return found.advantages


def _of_one_rank(values: Tensor, *, maximum: bool = False) -> Tensor:
    return values


def ascent(
    lm: EnumerableLM,
    advantages: Tensor,
    *,
    law: Tensor | None = None,
    weights: Tensor | None = None,
    old: Tensor | None = None,
    surrogate: Surrogate = "token_clip",
    count: float = 1.0,
) -> Tensor:
    """−∇ of `policy_loss`, (S, V): where the update goes, with every response at its chance.

    `law` (N,) is that of the policy that sampled, π itself unless given, and `weights` (N, T) correct for it.
    ρ is 1 unless `old`, (N, T), has other log-probabilities; then no ratio is clipped.
    """
    mask = lm.mask
    chances = (lm.probs() if law is None else law)[:, None].expand(mask.shape)
    if weights is not None:
        chances = chances * weights
    logprobs = lm.token_log_probs()[mask]
    loss, _ = policy_loss(
        logprobs,
        logprobs.detach() if old is None else old[mask],
        advantages[mask],
        chances[mask],
        clip=0.2 if old is None else 1.0,
        clip_high=0.2 if old is None else NO_CLIP,
        dual_clip=None,
        count=count,
        surrogate=surrogate,
        sequence=torch.arange(len(mask))[:, None].expand(mask.shape)[mask],
    )
    return -lm.gradient(loss)


def cosine(first: Tensor, second: Tensor) -> float:
    """Of the angle between two gradients."""
    return float((first * second).sum() / (first.norm() * second.norm()))
