"""Losses of reward models on pairs, as functions of tensors.

Legend: B pairs of a micro-batch, H the width of a head. `chosen` and `rejected` are the rewards of a pair's
two responses, (B,); `count` is the number of pairs of the whole minibatch over *all* micro-batches and ranks
(B when not given), so that adding up the losses (and the gradients) of the parts gives exactly the mean over
the whole. Each function returns the loss and figures that add up in the same way. A pair of weight 2
counts as two pairs.

Preferences between responses to one prompt tell the reward up to a function of the prompt: adding any g(x) to
both responses of a pair changes no loss here but `classification` and the centring term.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Figures = dict[str, float]


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    centring: float = 0.0,
    weight: Tensor | None = None,
    count: float | None = None,
) -> tuple[Tensor, Figures]:
    """Σ w·[−log σ(r_w − r_l − m) + c·(r_w + r_l)²] / count; all tensors (B,).

    c (`centring`, 0.01 is usual) keeps the rewards near 0, which pairs alone leave open.
    Sources: Bradley and Terry 1952; margin Touvron et al., arXiv 2307.09288; centring Eisenstein et al.,
    arXiv 2312.09244.
    """
    w, total = _weights(chosen, rejected, weight, count)
    gap = chosen - rejected
    preference = -(w * F.logsigmoid(gap if margin is None else gap - margin)).sum() / total
    loss = preference
    figures = _figures(chosen, rejected, w, total, preference)
    if centring:
        centre = centring * (w * (chosen + rejected).square()).sum() / total
        loss = loss + centre
        figures["loss/centring"] = float(centre.detach())
    return loss, figures


def classification(
    chosen: Tensor, rejected: Tensor, *, weight: Tensor | None = None, count: float | None = None
) -> tuple[Tensor, Figures]:
    """−½ Σ w·[log σ(r_w) + log σ(−r_l)] / count: is this response a winner or a loser, one at a time.

    Its optimum is r_i = logit P(win|i), with P(win|i) = E_j σ(s_i − s_j) where s is the true reward. That is
    increasing in s_i: the order is right although the differences are not those of s.
    Source: Sun, Shen and Ton, arXiv 2411.04991.
    """
    w, total = _weights(chosen, rejected, weight, count)
    loss = -0.5 * (w * (F.logsigmoid(chosen) + F.logsigmoid(-rejected))).sum() / total
    return loss, _figures(chosen, rejected, w, total, loss)


def odin(
    chosen: Tensor,
    rejected: Tensor,
    lengths: Tensor,
    *,
    coefficient: float = 1.0,
    weight: Tensor | None = None,
    count: float | None = None,
) -> tuple[Tensor, Figures]:
    """Bradley-Terry on r_Q + r_L, with r_L made to follow the length and r_Q made not to.

    Σ −w·log σ(Δ(r_Q + r_L)) / count + λ·[(1 − ρ(L, r_L)) + |ρ(L, r_Q)| + |ρ(L, r_Q + r_L)|]

    chosen, rejected: (2, B), the heads' rewards, quality first; lengths: (2, B), of the chosen and of the
    rejected responses. ρ is Pearson's correlation over the responses of this call, which does not add up over
    parts of a minibatch: the penalty of a part counts by its share B/count of the pairs. Give it the whole
    minibatch where that can be. Only r_Q is the reward; r_L is left out. `odin_head_penalty` belongs to it.
    Removing all correlation with length removes what is rightly due to it too: compare on unbiased labels.
    Source: Chen et al., arXiv 2402.07319.
    """
    assert chosen.shape == rejected.shape == lengths.shape, "(2, B) each"
    w, total = _weights(chosen[0], rejected[0], weight, count)
    preference = -(w * F.logsigmoid((chosen - rejected).sum(dim=0))).sum() / total
    quality = torch.cat([chosen[0], rejected[0]])
    following = torch.cat([chosen[1], rejected[1]])
    length = lengths.reshape(-1).to(quality)
    rho_length = pearson(length, following)
    rho_quality = pearson(length, quality)
    penalty = coefficient * (
        (1.0 - rho_length) + rho_quality.abs() + pearson(length, quality + following).abs()
    )
    share = chosen.shape[1] / total
    penalty = share * penalty
    figures = _figures(chosen[0], rejected[0], w, total, preference)
    figures |= {
        "loss/odin": float(penalty.detach()),
        "odin/correlation_quality": share * float(rho_quality.detach()),
        "odin/correlation_length": share * float(rho_length.detach()),
    }
    return preference + penalty, figures


def odin_heads(weight: Tensor) -> Tensor:
    """The two heads' weights (2, H), each centred and then of unit norm; r = φ·ŵ uses these."""
    centred = weight - weight.mean(dim=-1, keepdim=True)
    return F.normalize(centred, dim=-1, eps=1e-8)


def odin_head_penalty(weight: Tensor) -> Tensor:
    """|ŵ_Q·ŵ_L| of the heads' raw weights (2, H): heads that read the same directions cannot come apart."""
    heads = odin_heads(weight)
    return (heads[0] * heads[1]).sum().abs()


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of two (N,) tensors, with gradients; 0, without any, where one only varies by rounding."""
    centred = [values - values.mean() for values in (x, y)]
    norms = [values.norm() for values in centred]
    floors = [
        4 * torch.finfo(values.dtype).eps * values.detach().norm() + torch.finfo(values.dtype).tiny
        for values in (x, y)
    ]
    if any(bool(norm <= floor) for norm, floor in zip(norms, floors, strict=True)):
        return 0.0 * (centred[0] * centred[1]).sum()
    return torch.dot(centred[0] / norms[0], centred[1] / norms[1])


def length_residual_fit(
    rewards: Tensor, lengths: Tensor, prompts: Tensor | None = None
) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line reward = slope·length + intercept, over (N,) responses.

    With `prompts` (N,), whole numbers that say whose response each is, the slope comes from differences
    within prompts alone. The corrected reward is reward − slope·length: what length explains is taken out,
    also where the length deserves it. Lengths that do not vary tell no slope: 0.
    """
    reward, length = rewards.detach().double(), lengths.detach().double()
    assert reward.shape == length.shape
    y, x = reward - reward.mean(), length - length.mean()
    if prompts is not None:
        y, x = _centred_by(reward, prompts), _centred_by(length, prompts)
    spread = float(x.square().sum())
    slope = float((x * y).sum()) / spread if spread > 1e-12 * max(1.0, float(length.square().sum())) else 0.0
    intercept = float(reward.mean()) - slope * float(length.mean())
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ValueError("rewards or lengths are not finite: no line can be fitted through them")
    return slope, intercept


def _centred_by(values: Tensor, groups: Tensor) -> Tensor:
    """`values` (N,) less the mean of their group."""
    _, place = torch.unique(groups, return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, dtype=values.dtype, device=values.device)
    counts = torch.zeros_like(sums).index_add_(0, place, torch.ones_like(values))
    return values - (sums.index_add_(0, place, values) / counts)[place]


def _weights(
    chosen: Tensor, rejected: Tensor, weight: Tensor | None, count: float | None
) -> tuple[Tensor, float]:
    assert chosen.shape == rejected.shape, "a reward for each response of each pair"
    assert chosen.dim() == 1, "(B,)"
    total = float(chosen.shape[0]) if count is None else count
    assert total > 0, "a loss of no pairs"
    return (torch.ones_like(chosen) if weight is None else weight.to(chosen)), total


@torch.no_grad()
def _figures(chosen: Tensor, rejected: Tensor, weight: Tensor, total: float, preference: Tensor) -> Figures:
    """What is logged of a batch; a tie is counted as wrong."""
    sums = torch.stack(
        [
            preference * total,
            (weight * (chosen > rejected)).sum(),
            (weight * (chosen - rejected)).sum(),
            (weight * 0.5 * (chosen + rejected)).sum(),
        ]
    )
    values = (sums.double() / total).tolist()
    names = ("loss/preference", "preference/accuracy", "preference/margin", "preference/reward")
    return dict(zip(names, values, strict=True))
