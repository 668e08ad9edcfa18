"""Which pairs to have labelled next.

Legend: N candidate pairs, D features, K members of an ensemble, M pairs already labelled. z = φ(y₁) − φ(y₂)
is the difference of a pair's features (those before a linear head without bias), Δr a member's difference of
rewards, p = σ(Δr) the chance that the first response is preferred, v = p(1 − p). No rule depends on which of
a pair's responses stands first.

A rule takes the pairs with

    random          the luck of the draw;
    entropy         the smallest |mean Δr|: where the ensemble as a whole is undecided;
    max-difference  the largest |mean Δr|;
    bald            the most to tell of the members: H(mean p) − mean H(p), arXiv 1112.5745;
    variance        the largest variance of Δr over the members;
    d-optimal       the largest gain of log det(λI + Σ v·zzᵀ), one by one, the labelled included;
    fisher          the largest v·zᵀA⁻¹z, A = λI + Σ v·zzᵀ over *all candidates*, arXiv 2502.04354.

`fisher` looks at each pair alone, so a batch may repeat itself; `d-optimal` sees what the batch has already.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, xlogy

Rule = Literal["random", "entropy", "max-difference", "bald", "variance", "d-optimal", "fisher"]
RULES: tuple[Rule, ...] = get_args(Rule)
NEED_MEMBERS: frozenset[str] = frozenset(RULES) - {"random"}
NEED_SEVERAL: frozenset[str] = frozenset({"bald", "variance"})
NEED_FEATURES: frozenset[str] = frozenset({"d-optimal", "fisher"})

Array = NDArray[np.float64]


def choose(
    rule: str,
    count: int,
    *,
    difference: ArrayLike | None = None,
    members: ArrayLike | None = None,
    labelled: ArrayLike | None = None,
    labelled_members: ArrayLike | None = None,
    ridge: float = 1.0,
    seed: int = 0,
    size: int | None = None,
) -> list[int]:
    """The indices of `count` different candidate pairs, the best first.

    difference: (N, D), z; members: (K, N), Δr; labelled: (M, D), z of what is labelled already;
    labelled_members: (K, M), their Δr (without them v = 1/4 is taken, the most that a label can tell);
    ridge: λ > 0, the precision of the head's prior. `size` is N where neither `difference` nor `members` is
    given (`random` needs neither). Equal scores are taken in an order drawn by `seed`.
    """
    if rule not in RULES:
        raise ValueError(f"rule = {rule!r}: choose one of {', '.join(RULES)}")
    z = None if difference is None else _matrix("difference", difference)
    reward = None if members is None else _matrix("members", members)
    pool = _pool(z, reward, size)
    if not 0 <= count <= pool:
        raise ValueError(f"count = {count}: there are {pool} candidate pairs; ask for at most so many")
    order = np.random.default_rng(seed).permutation(pool)
    if rule == "random":
        return [int(index) for index in order[:count]]
    if reward is None:
        raise ValueError(f'rule = "{rule}" needs the rewards of a reward model: give one, or use "random"')
    if rule in NEED_SEVERAL and len(reward) < 2:
        raise ValueError(
            f'rule = "{rule}" compares the members of an ensemble and there is {len(reward)}: '
            'use a reward model of several members, or the rule "d-optimal"'
        )
    if rule in NEED_FEATURES:
        if z is None:
            raise ValueError(f'rule = "{rule}" needs the features of a reward model: give one, or "random"')
        if not ridge > 0:
            raise ValueError(f"ridge = {ridge}: must be above 0, or what is never seen counts as infinite")
    if rule == "d-optimal":
        assert z is not None
        precision = prior_precision(z.shape[1], labelled, labelled_members, ridge)
        chosen = greedy_d_optimal(z[order], label_variance(reward)[order], precision, count)
        return [int(order[index]) for index in chosen]
    scores = _scores(rule, reward, z, ridge)[order]
    return [int(index) for index in order[np.argsort(-scores, kind="stable")[:count]]]


def bald(members: Array) -> Array:
    """H(mean_k p_k) − mean_k H(p_k) in nats, (N,): what a label is expected to tell of the members."""
    p = expit(members)
    gain = binary_entropy(p.mean(axis=0)) - binary_entropy(p).mean(axis=0)
    return np.asarray(np.maximum(0.0, gain), dtype=np.float64)


def binary_entropy(p: Array) -> Array:
    """−p log p − (1 − p) log(1 − p)."""
    return np.asarray(-(xlogy(p, p) + xlogy(1.0 - p, 1.0 - p)), dtype=np.float64)


def label_variance(members: Array) -> Array:
    """v = p(1 − p) at p = σ(mean_k Δr_k), (N,): the Fisher information of a label in units of zzᵀ."""
    mean = members.mean(axis=0)
    return np.asarray(expit(mean) * expit(-mean), dtype=np.float64)


def fisher_scores(z: Array, variance: Array, ridge: float) -> Array:
    """v_i·z_iᵀA⁻¹z_i with A = λI + Σ_j v_j·z_j z_jᵀ over all candidates, (N,)."""
    weighted = z * variance[:, None]
    information = ridge * np.eye(z.shape[1]) + weighted.T @ z
    return np.asarray((weighted * np.linalg.solve(information, z.T).T).sum(axis=1), dtype=np.float64)


def prior_precision(
    features: int, labelled: ArrayLike | None, labelled_members: ArrayLike | None, ridge: float
) -> Array:
    """λI + Σ v·zzᵀ over what is labelled already, (D, D)."""
    precision = ridge * np.eye(features)
    if labelled is None:
        return precision
    past = _matrix("labelled", labelled)
    if past.shape[1] != features:
        raise ValueError(
            f"labelled has {past.shape[1]} features and the candidates {features}: take both from one model"
        )
    variance = np.full(len(past), 0.25)
    if labelled_members is not None:
        rewards = _matrix("labelled_members", labelled_members)
        if rewards.shape[1] != len(past):
            raise ValueError(f"labelled_members: {rewards.shape[1]} rewards for {len(past)} labelled pairs")
        variance = label_variance(rewards)
    return np.asarray(precision + (past * variance[:, None]).T @ past, dtype=np.float64)


def greedy_d_optimal(z: Array, variance: Array, precision: Array, count: int) -> list[int]:
    """Indices of `count` pairs, each the one of largest log(1 + v·zᵀM⁻¹z), M growing by v·zzᵀ with each.

    That logarithm is log det(M + v·zzᵀ) − log det M. By Sherman and Morrison,
    (M + v·zzᵀ)⁻¹ = M⁻¹ − v·uuᵀ/(1 + v·zᵀu) with u = M⁻¹z, so q_i = z_iᵀM⁻¹z_i falls by
    v·(z_iᵀu)²/(1 + v·zᵀu): O(ND + D²) a pick.
    """
    inverse = np.linalg.inv(precision)
    quadratic = ((z @ inverse) * z).sum(axis=1)
    free = np.ones(len(z), dtype=bool)
    chosen: list[int] = []
    for _ in range(count):
        gain = np.where(free, variance * quadratic, -np.inf)
        best = int(np.argmax(gain))
        u = inverse @ z[best]
        shrink = variance[best] / (1.0 + variance[best] * float(z[best] @ u))
        inverse -= shrink * np.outer(u, u)
        quadratic = np.maximum(0.0, quadratic - shrink * np.square(z @ u))
        free[best] = False
        chosen.append(best)
    return chosen


def _scores(rule: str, members: Array, z: Array | None, ridge: float) -> Array:
    """The larger, the sooner; (N,)."""
    if rule == "entropy":
        return np.asarray(-np.abs(members.mean(axis=0)), dtype=np.float64)
    if rule == "max-difference":
        return np.asarray(np.abs(members.mean(axis=0)), dtype=np.float64)
    if rule == "bald":
        return bald(members)
    if rule == "variance":
        return np.asarray(members.var(axis=0), dtype=np.float64)
    assert rule == "fisher"
    assert z is not None
    return fisher_scores(z, label_variance(members), ridge)


def _pool(z: Array | None, members: Array | None, size: int | None) -> int:
    """N, which all that is given must agree on."""
    sizes = {
        "difference": None if z is None else len(z),
        "members": None if members is None else members.shape[1],
        "size": size,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    if not given:
        raise ValueError("no candidate pairs: give difference, members or size")
    if len(set(given.values())) > 1:
        raise ValueError(f"the candidates' numbers differ: {given}; all must be of the same pairs")
    return next(iter(given.values()))


def _matrix(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} has {array.ndim} dimensions: it must be a matrix")
    if not np.isfinite(array).all():
        rows = np.unique(np.nonzero(~np.isfinite(array))[0])[:5].tolist()
        raise ValueError(f"{name} holds values that are not finite, in rows {rows}: leave those pairs out")
    return array
