"""How far the sampler was from the learner: measured always, on raw weights, whatever correction is on.

μ is the policy that sampled (other kernels, maybe older weights), π the learner at the start of its step,
and ℓ = log π − log μ of a token; the sampler is always the denominator. A token's weight is w = e^ℓ, so
mean w is 1 in expectation, and KL(μ‖π) ≈ mean(e^ℓ − 1 − ℓ), of which no term is negative.

ℓ is cut off at ±20 for `exp` only, which keeps sums finite; `mismatch/log_ratio_max` is taken before that.

Legend: B sequences on this rank, T their longest response, L lags (0 … L − 1, the same on all ranks). What
is called sums adds up over ranks.
"""

import math

import torch
from torch import Tensor

from learner.kl import MAX_LOG_RATIO

_TOKEN_COLUMNS = 6  # count, Σw, Σw², Σk, Σ|ℓ|, Σℓ², with k = e^ℓ − 1 − ℓ
_KL_COLUMN = 3


def log_ratios(proximal: Tensor, sampler: Tensor) -> Tensor:
    """ℓ = log π − log μ, float64 and without gradient; not cut off."""
    return proximal.detach().double() - sampler.detach().double()


def lag_sums(ratios: Tensor, trusted: Tensor, lags: Tensor, *, lag_count: int) -> Tensor:
    """(L, 10) float64 sums over the trusted tokens of each lag, from (B, T) ℓ, mask and lags.

    Columns: count n, Σw, Σw², Σk, Σ|ℓ|, Σℓ² over tokens; then, over the sequences b that have tokens of
    that lag, with n_b tokens and y_b = Σ k of them: how many, Σ y_b², Σ y_b·n_b, Σ n_b².
    """
    assert ratios.shape == trusted.shape == lags.shape
    ell = ratios[trusted]
    weights = ell.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    kl = torch.expm1(ell.clamp(max=MAX_LOG_RATIO)) - ell
    tokens = torch.stack([torch.ones_like(ell), weights, weights.square(), kl, ell.abs(), ell.square()], 1)
    sequence = torch.arange(len(lags))[:, None].expand_as(lags)[trusted]
    table = torch.zeros(len(lags) * lag_count, _TOKEN_COLUMNS, dtype=torch.float64)
    table.index_add_(0, sequence * lag_count + lags[trusted], tokens)
    by_sequence = table.reshape(len(lags), lag_count, _TOKEN_COLUMNS)
    n, y = by_sequence[..., 0], by_sequence[..., _KL_COLUMN]
    clusters = torch.stack([(n > 0).double(), y.square(), y * n, n.square()], dim=-1)
    return torch.cat([by_sequence, clusters], dim=-1).sum(dim=0)


def mean_and_cluster_error(sums: Tensor) -> tuple[float, float | None]:
    """(R, SE) of the mean KL over the tokens of one row of `lag_sums`; no SE from fewer than 2 sequences.

    R = Σ_b y_b / Σ_b n_b is a ratio of two sums over sequences, which are independent where their tokens
    are not. To first order its error is that of the mean of the residuals y_b − R·n_b:

        SE² = m/(m − 1) · Σ_b (y_b − R·n_b)² / (Σ_b n_b)²,   m the number of sequences.

    Source: the ratio estimator of Cochran, "Sampling Techniques" (3rd ed., 1977), chapter 6.
    """
    count, total = float(sums[0]), float(sums[_KL_COLUMN])
    sequences, squares, products, sizes = (float(x) for x in sums[_TOKEN_COLUMNS:])
    mean = total / count
    if sequences < 2:
        return mean, None
    residuals = max(0.0, squares - 2.0 * mean * products + mean * mean * sizes)
    return mean, math.sqrt(sequences / (sequences - 1.0) * residuals) / count


def effective_share(count: float, first: float, second: float) -> float:
    """ESS/B = (Σw)²/(B·Σw²) = 1/(1 + Var(w)/E(w)²), from 1/B to 1. Source: Kong (1992)."""
    return first * first / (count * second) if second > 0 else 0.0


def sequence_totals(ratios: Tensor, trusted: Tensor) -> tuple[Tensor, Tensor]:
    """(log W = Σ_t ℓ_t, count) of each sequence over its trusted tokens, both (B,)."""
    return torch.where(trusted, ratios, 0.0).sum(dim=1), trusted.sum(dim=1)


def sequence_sums(log_weights: Tensor, largest: float) -> Tensor:
    """(3,): count, Σ e^{log W − M}, Σ e^{2(log W − M)}, with M the largest log W over all ranks.

    The shift cancels in ESS/B = (ΣW)²/(B·ΣW²) and keeps every term at most 1, however long the sequences.
    """
    shifted = (log_weights - largest).exp()
    count = torch.tensor(float(len(log_weights)), dtype=torch.float64)
    return torch.stack([count, shifted.sum(), shifted.square().sum()])


def mismatch_metrics(sums: Tensor, sequences: Tensor, largest_ratio: float) -> dict[str, float]:
    """The learner's row from `lag_sums` and `sequence_sums`, added up over ranks.

    A lag without tokens has no entry; `kl_se_by_lag` needs two sequences with tokens of that lag.
    """
    count, first, second, kl, absolute, squared = (float(x) for x in sums[:, :_TOKEN_COLUMNS].sum(dim=0))
    if count == 0:
        return {"mismatch/tokens": 0.0}
    metrics = {
        "mismatch/tokens": count,
        "mismatch/ess": effective_share(count, first, second),
        "mismatch/sequence_ess": effective_share(*sequences.tolist()),
        "mismatch/kl": kl / count,
        "mismatch/m2": squared / count,
        "mismatch/weight_mean": first / count,
        "mismatch/abs_logprob_difference": absolute / count,
        "mismatch/log_ratio_max": largest_ratio,
    }
    for lag, row in enumerate(sums):
        tokens = float(row[0])
        if tokens == 0:
            continue
        mean, error = mean_and_cluster_error(row)
        metrics[f"mismatch/tokens_by_lag/{lag}"] = tokens
        metrics[f"mismatch/kl_by_lag/{lag}"] = mean
        if error is not None:
            metrics[f"mismatch/kl_se_by_lag/{lag}"] = error
        metrics[f"mismatch/ess_by_lag/{lag}"] = effective_share(tokens, float(row[1]), float(row[2]))
    return metrics
