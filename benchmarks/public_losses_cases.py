"""What `public_losses` compares: a random batch, our functions of it, and the pairs of ours with theirs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import public_losses_theirs as theirs
from learner import advantages as adv
from learner.group_advantages import group_advantages
from learner.kl import Estimator, estimate
from learner.objectives import kl_loss, policy_loss, value_loss
from learner.preference_objectives import dpo_loss, ipo_loss, kto_loss, kto_reference_point, simpo_loss
from learner.presets import PRESETS
from learner.settings import PPOSettings
from learner.surrogates import divisor, token_scales

REINFORCE = "reinforce_plus_plus"
FEWER = "verl divides the variance by n - 1 tokens, headrace by n"


@dataclass(frozen=True)
class Step:
    """A batch of padded responses, (B, T) float64 with ρ far from 1, zero beyond each response's end."""

    new: Tensor
    old: Tensor
    reference: Tensor
    mask: Tensor
    rewards: Tensor
    groups: Tensor
    desirable: Tensor
    mismatched: tuple[Tensor, Tensor]

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Tokens of the first half of the responses and of the second."""
        first, second = self.mask.sum(1).chunk(2)
        return first, second


def random_step(seed: int) -> Step:
    """Four groups of three responses of 1 to 9 tokens, one of the full length."""
    draw = torch.Generator().manual_seed(seed)
    number, longest = 12, 9
    lengths = torch.randint(1, longest + 1, (number,), generator=draw)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]

    def logs(base: Tensor | None = None) -> Tensor:
        noise = torch.rand((number, longest), generator=draw, dtype=torch.float64)
        return torch.where(mask, -3 * noise if base is None else base + 0.8 * (noise - 0.5), 0.0)

    old = logs()
    return Step(
        new=logs(old),
        old=old,
        reference=logs(old),
        mask=mask,
        rewards=torch.rand(number, generator=draw, dtype=torch.float64),
        groups=torch.arange(number) % 4,
        desirable=torch.rand(number, generator=draw) < 0.5,
        mismatched=(
            torch.randn(number, generator=draw, dtype=torch.float64) - 4.5,
            torch.randn(number, generator=draw, dtype=torch.float64) - 5.0,
        ),
    )


def our_advantages(objective: str, step: Step) -> Tensor:
    """(B,) by the objective's estimator; for PPO any will do."""
    if objective == "ppo":
        return step.rewards - 0.5
    settings = PPOSettings(**PRESETS[objective]["ppo"])
    kind = settings.advantage
    assert kind not in ("gae", "reward_to_go")
    return group_advantages(kind, step.rewards, step.groups, epsilon=settings.group_epsilon)


def our_loss(
    objective: str, step: Step, new: Tensor, advantages: Tensor, *, dual_clip: float | None = None
) -> Tensor:
    """The objective's loss of the batch, with its KL term where it has one in the loss."""
    settings = PPOSettings(**PRESETS[objective].get("ppo", {}))
    chosen, scales = step.mask, token_scales(step.mask, settings.aggregation).double()
    tokens = int(chosen.sum())
    count = divisor(settings.aggregation, tokens=tokens, sequences=len(chosen), limit=chosen.shape[1])
    loss, _ = policy_loss(
        new[chosen],
        step.old[chosen],
        advantages[:, None].expand_as(step.old)[chosen],
        scales[chosen],
        clip=settings.clip,
        clip_high=settings.clip_high,
        dual_clip=dual_clip,
        count=count,
        surrogate=settings.surrogate,
        sequence=chosen.nonzero()[:, 0],
    )
    if settings.kl_in == "loss":
        kind = settings.kl_estimator
        distance, _ = kl_loss(
            new[chosen], step.reference[chosen], scales[chosen], estimator=kind, count=count
        )
        loss = loss + settings.kl_coef * distance
    return loss


@dataclass(frozen=True)
class Comparison:
    """`ours` and `theirs` are functions of (step, log π with gradient); `because` says why they differ.

    `objective` says with it which settings are not those of the objective.
    """

    objective: str
    implementation: str
    ours: Callable[[Step, Tensor], Tensor]
    theirs: Callable[[Step, Tensor], Tensor]
    because: str = ""


def group_comparisons() -> Iterator[Comparison]:
    """The policy-gradient family: our advantages on both sides, so that losses are compared alone."""

    def ours(objective: str, dual_clip: float | None = None) -> Callable[[Step, Tensor], Tensor]:
        return lambda s, new: our_loss(objective, s, new, our_advantages(objective, s), dual_clip=dual_clip)

    def trl(objective: str, kind: str, clip: tuple[float, float], **options: Any) -> Comparison:
        return Comparison(
            objective,
            "trl",
            ours(objective),
            lambda s, new: theirs.trl_group(
                kind,
                new,
                old=s.old,
                reference=s.reference,
                mask=s.mask,
                advantages=our_advantages(objective, s),
                clip=clip,
                **options,
            ),
        )

    def verl(
        objective: str, function: str, clip: tuple[float, float], mode: str, dual: float = 1e9
    ) -> Comparison:
        def loss(s: Step, new: Tensor) -> Tensor:
            advantages = our_advantages(objective, s)
            call = getattr(theirs.verl_core(), function)
            config = theirs.verl_config(clip, dual)
            mask = s.mask.double()
            return call(s.old, new, advantages[:, None].expand_as(mask), mask, mode, config)[0]

        bound = dual if dual < 1e9 else None
        return Comparison(_with_bound(objective, bound), "verl", ours(objective, bound), loss)

    def openrlhf(objective: str, **options: Any) -> Comparison:
        def loss(s: Step, new: Tensor) -> Tensor:
            advantages = our_advantages(objective, s)
            module = theirs.openrlhf_losses().PolicyLoss(**options)
            mask = s.mask.double()
            return module(new, s.old, advantages[:, None].expand_as(mask), action_mask=mask)[0]

        bound = options.get("dual_clip")
        return Comparison(_with_bound(objective, bound), "openrlhf", ours(objective, bound), loss)

    vanilla = "compute_policy_loss_vanilla"
    yield verl("ppo", vanilla, (0.2, 0.2), "token-mean")
    yield verl("ppo", vanilla, (0.2, 0.2), "token-mean", dual=1.2)
    yield openrlhf("ppo")
    yield openrlhf("ppo", dual_clip=1.2)
    yield trl("grpo", "grpo", (0.2, 0.2), beta=0.04)
    yield Comparison("grpo", "verl", ours("grpo"), partial(_verl_with_kl, "grpo", "seq-mean-token-mean"))
    baseline = "reinforce++_baseline"
    yield Comparison(baseline, "verl", ours(baseline), partial(_verl_with_kl, baseline, "token-mean"))
    yield Comparison(baseline, "openrlhf", ours(baseline), _openrlhf_with_kl)
    yield trl("dr_grpo", "dr_grpo", (0.2, 0.2))
    yield verl("dr_grpo", vanilla, (0.2, 0.2), "seq-mean-token-sum-norm")
    yield trl("dapo", "dapo", (0.2, 0.28))
    yield verl("dapo", vanilla, (0.2, 0.28), "token-mean")
    yield openrlhf("dapo", clip_eps_high=0.28)
    yield trl("gspo", "grpo", (3e-4, 4e-4), sequence=True)
    yield verl("gspo", "compute_policy_loss_gspo", (3e-4, 4e-4), "seq-mean-token-mean")
    yield openrlhf("gspo", policy_loss_type="gspo", clip_eps_low=3e-4, clip_eps_high=4e-4)
    yield trl("cispo", "cispo", (0.0, 5.0))
    yield verl("cispo", "compute_policy_loss_cispo", (1.0, 4.0), "token-mean")
    yield Comparison(
        "rloo",
        "trl",
        ours("rloo"),
        lambda s, new: theirs.trl_rloo(new, s.old, s.mask, our_advantages("rloo", s), 0.2),
    )


def _with_bound(objective: str, dual_clip: float | None) -> str:
    return objective if dual_clip is None else f"{objective}, dual clip {dual_clip:g}"


def _verl_with_kl(objective: str, mode: str, step: Step, new: Tensor) -> Tensor:
    """Policy loss of verl and its estimator of the KL, added with the objective's coefficient."""
    core, mask, settings = theirs.verl_core(), step.mask.double(), PPOSettings(**PRESETS[objective]["ppo"])
    advantages = our_advantages(objective, step)[:, None].expand_as(mask)
    config = theirs.verl_config((0.2, 0.2), 1e9)
    loss, _ = core.compute_policy_loss_vanilla(step.old, new, advantages, mask, mode, config)
    penalty = core.agg_loss(core.kl_penalty(new, step.reference, settings.kl_estimator), mask, mode)
    return torch.as_tensor(loss + settings.kl_coef * penalty)


def _openrlhf_with_kl(step: Step, new: Tensor) -> Tensor:
    """REINFORCE++ with baseline as OpenRLHF trains it: policy loss, and k2 as a loss of its own."""
    mask, settings = step.mask.double(), PPOSettings(**PRESETS["reinforce++_baseline"]["ppo"])
    advantages = our_advantages("reinforce++_baseline", step)[:, None].expand_as(mask)
    loss = theirs.openrlhf_losses().PolicyLoss()(new, step.old, advantages, action_mask=mask)[0]
    distance = theirs.openrlhf_kl(new, step.reference, settings.kl_estimator)
    return torch.as_tensor(loss + settings.kl_coef * (distance * mask).sum() / mask.sum())


def preference_comparisons() -> Iterator[Comparison]:
    """Objectives of pairs: the first half of the rows are chosen, the second rejected."""

    def scores(s: Step, new: Tensor) -> tuple[Tensor, Tensor]:
        totals = ((new - s.reference) * s.mask).sum(1)
        return totals[: len(totals) // 2], totals[len(totals) // 2 :]

    def means(s: Step, new: Tensor) -> tuple[Tensor, Tensor]:
        values = (new * s.mask).sum(1) / s.mask.sum(1)
        return values[: len(values) // 2], values[len(values) // 2 :]

    def openrlhf(s: Step, new: Tensor, **options: Any) -> Tensor:
        module = theirs.openrlhf_losses().DPOLoss(**options)
        half = len(new) // 2
        policy, reference = ((values * s.mask).sum(1) for values in (new, s.reference))
        return torch.as_tensor(module(policy[:half], policy[half:], reference[:half], reference[half:])[0])

    for smoothing in (0.0, 0.1):
        ours = partial(_dpo, scores, smoothing)
        # TRL has smoothing in a form of its own only (`robust`, another loss).
        if not smoothing:
            yield Comparison(
                "dpo",
                "trl",
                ours,
                lambda s, new: theirs.trl_pairs("sigmoid", new, s.reference, s.mask, beta=0.3),
            )
        name = f"dpo, smoothing {smoothing:g}" if smoothing else "dpo"
        yield Comparison(name, "openrlhf", ours, partial(openrlhf, beta=0.3, label_smoothing=smoothing))

    def ipo(s: Step, new: Tensor) -> Tensor:
        return ipo_loss(*scores(s, new), tau=0.3)

    def ipo_of_means(s: Step, new: Tensor) -> Tensor:
        chosen, rejected = (
            values / lengths for values, lengths in zip(scores(s, new), s.lengths, strict=True)
        )
        return ipo_loss(chosen, rejected, tau=0.3)

    def trl_ipo(s: Step, new: Tensor) -> Tensor:
        return theirs.trl_pairs("ipo", new, s.reference, s.mask, beta=0.3)

    yield Comparison("ipo", "openrlhf", ipo, partial(openrlhf, beta=0.3, ipo=True))
    yield Comparison("ipo", "trl", ipo, trl_ipo, because="TRL takes means over tokens, the paper sums")
    yield Comparison("ipo of means", "trl", ipo_of_means, trl_ipo)
    yield Comparison(
        "simpo",
        "trl",
        lambda s, new: simpo_loss(*means(s, new), beta=2.0, gamma=0.8),
        lambda s, new: theirs.trl_simpo(*means(s, new), beta=2.0, gamma=0.8),
    )

    def kto(s: Step, new: Tensor) -> Tensor:
        own = ((new - s.reference) * s.mask).sum(1)
        point = kto_reference_point(s.mismatched[0] - s.mismatched[1])
        return kto_loss(own, s.desirable, point, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)

    yield Comparison(
        "kto",
        "trl",
        kto,
        lambda s, new: theirs.trl_kto(
            new, s.reference, s.mask, s.desirable, s.mismatched, beta=0.3, weights=(1.2, 0.7)
        ),
    )


def _dpo(
    scores: Callable[[Step, Tensor], tuple[Tensor, Tensor]], smoothing: float, s: Step, new: Tensor
) -> Tensor:
    return dpo_loss(*scores(s, new), beta=0.3, label_smoothing=smoothing)


def other_comparisons() -> Iterator[Comparison]:
    """Estimators of KL, the clipped value loss, and advantages (as sums weighted with log π)."""

    def value_pair(s: Step, new: Tensor, *, ours: bool) -> Tensor:
        returns = s.rewards[:, None].expand_as(new) * -2.0
        if not ours:
            module = theirs.openrlhf_losses().ValueLoss(clip_eps=0.2)
            return torch.as_tensor(module(new, s.old, returns, action_mask=s.mask.double()))
        chosen = s.mask
        return value_loss(new[chosen], s.old[chosen], returns[chosen], clip=0.2, count=int(chosen.sum()))[0]

    yield Comparison(
        "value loss", "openrlhf", partial(value_pair, ours=True), partial(value_pair, ours=False)
    )

    def kl_pair(kind: Estimator, s: Step, new: Tensor, *, ours: bool) -> Tensor:
        if ours:
            return estimate(kind, new, s.reference).sum()
        return torch.as_tensor(theirs.verl_core().kl_penalty(new, s.reference, kind).sum())

    kinds: tuple[Estimator, ...] = ("k1", "k2", "k3")
    for kind in kinds:
        yield Comparison(kind, "verl", partial(kl_pair, kind, ours=True), partial(kl_pair, kind, ours=False))

    def weighted(values: Callable[[Step], Tensor], s: Step, new: Tensor) -> Tensor:
        return (values(s) * new * s.mask).sum()

    def verl(function: str, s: Step, **options: Any) -> Tensor:
        rewards = _last_rewards(s)
        index = np.asarray(s.groups)
        options = {"index": index, **options} if function != REINFORCE else options
        call = getattr(theirs.verl_core(), f"compute_{function}_outcome_advantage")
        return torch.as_tensor(call(rewards, s.mask.double(), **options)[0])

    for objective, function, options in (
        ("grpo", "grpo", {"epsilon": 1e-4}),
        ("dr_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "rloo", {}),
    ):
        yield Comparison(
            f"advantages of {objective}",
            "verl",
            partial(weighted, lambda s, name=objective: our_advantages(name, s)[:, None]),
            partial(weighted, lambda s, name=function, more=options: verl(name, s, **more)),
        )
    config = theirs.algorithm_config()
    whitened: tuple[tuple[str, str, Callable[[Step], Tensor]], ...] = (
        ("reinforce++", REINFORCE, _reward_to_go),
        ("reinforce++_baseline", f"{REINFORCE}_baseline", _less_the_group),
    )
    for objective, function, values in whitened:
        expected = partial(weighted, lambda s, name=function: verl(name, s, config=config))
        name = f"advantages of {objective}"
        yield Comparison(name, "verl", partial(weighted, values), expected, because=FEWER)
        fewer = partial(weighted, lambda s, all_of=values: _by_one_less(all_of(s), s))
        yield Comparison(f"{name}, n - 1", "verl", fewer, expected)


def _last_rewards(step: Step) -> Tensor:
    """(B, T): each response's reward on its last token."""
    rewards = torch.zeros_like(step.old)
    rewards[torch.arange(len(rewards)), step.mask.sum(1) - 1] = step.rewards
    return rewards


def _reward_to_go(step: Step) -> Tensor:
    """Ours for REINFORCE++ without a KL penalty, whitened over the batch."""
    return _whitened(adv.rewards_to_go(_last_rewards(step), step.mask, gamma=1.0), step)


def _less_the_group(step: Step) -> Tensor:
    """Ours for REINFORCE++ with baseline, whitened over the batch."""
    return _whitened(our_advantages("reinforce++_baseline", step)[:, None] * step.mask, step)


def _whitened(values: Tensor, step: Step) -> Tensor:
    return adv.whiten(values, step.mask, adv.moments(values, step.mask), shift_mean=True)


def _by_one_less(values: Tensor, step: Step) -> Tensor:
    """Whitened values as they are where the variance is divided by n - 1."""
    tokens = int(step.mask.sum())
    return values * ((tokens - 1) / tokens) ** 0.5
