"""Over-optimisation of a learned reward: curves fitted to a run, and rules that say when to stop.

KL is KL(policy‖reference) in nats a response, and d = √KL. As a policy moves away from its reference, the
proxy reward that it is trained on goes on rising while the gold reward turns: Gao et al. (arXiv 2210.10760)
found

    R(d) = d·(α − β·d)        best of n            with its peak at d = α/(2β)
    R(d) = d·(α − β·log d)    reinforcement        with its peak at d = e^{α/β − 1}

for the gold reward less its value at d = 0. Both are linear in α and β, so the fits are exact least squares.
A run knows no gold reward. The rules look at what it has: a held-out reward model, the ensemble, the KL.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import xlogy

from rewards.overoptimisation_settings import Action, StopSettings

Array = NDArray[np.float64]
Form = Literal["best-of-n", "rl"]
RuleName = Literal["heldout_decline", "normalised_gap", "disagreement", "kl_budget"]

# What each signal cannot see, said with every verdict.
BLIND_SPOTS: dict[RuleName, str] = {
    "heldout_decline": "A bias that the held-out labels share with the training labels is invisible here: "
    "both models then reward it.",
    "normalised_gap": "A bias that the held-out labels share with the training labels opens no gap: "
    "both models then reward it.",
    "disagreement": "Members that learned the same bias from the same labels agree, and are wrong together.",
    "kl_budget": "Distance from the reference says nothing of quality: a good policy may be far from it "
    "and an exploit near.",
}


# ---- Gao's curves ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GaoFit:
    """α and β with their 95 % intervals; `peak` is in d = √KL, None where the curve has none.

    `peak_low` and `peak_high` are percentiles over draws of (α, β); None where those have no peak.
    """

    form: Form
    alpha: float
    beta: float
    alpha_low: float
    alpha_high: float
    beta_low: float
    beta_high: float
    peak: float | None
    peak_low: float | None
    peak_high: float | None
    origin: float
    residual_sd: float
    count: int
    covariance: tuple[tuple[float, float], tuple[float, float]]

    def curve(self, d: ArrayLike) -> Array:
        """origin + R(d), the reward at d = √KL."""
        rise = gao_basis(d, self.form) @ np.array([self.alpha, self.beta])
        return np.asarray(self.origin + rise, dtype=np.float64)

    def band(self, d: ArrayLike) -> tuple[Array, Array]:
        """95 % interval of the curve, at each d."""
        basis = gao_basis(d, self.form)
        spread = np.sqrt(np.maximum(0.0, ((basis @ np.array(self.covariance)) * basis).sum(axis=1)))
        half = float(stats.t.ppf(0.975, self.count - 2)) * spread
        middle = self.curve(d)
        return middle - half, middle + half

    def turns_over(self, kl: float) -> bool:
        """Whether β is above 0 beyond its interval and the peak lies before this KL."""
        return self.beta_low > 0 and self.peak is not None and self.peak < math.sqrt(kl)


def gao_basis(d: ArrayLike, form: Form) -> Array:
    """(N, 2): the columns that α and β multiply: (d, −d²) or (d, −d·log d), with 0·log 0 = 0."""
    x = np.atleast_1d(np.asarray(d, dtype=np.float64))
    return np.stack([x, -np.square(x) if form == "best-of-n" else -xlogy(x, x)], axis=1)


def gao_peak(alpha: float, beta: float, form: Form) -> float | None:
    """The d > 0 at which the curve is highest; None where it does not turn."""
    if beta <= 0:
        return None
    if form == "best-of-n":
        return alpha / (2 * beta) if alpha > 0 else None
    exponent = alpha / beta - 1
    return math.exp(exponent) if exponent < 100 else None


def fit_gao(kl: ArrayLike, reward: ArrayLike, form: Form, *, origin: float, seed: int = 0) -> GaoFit | None:
    """Least squares through R(0) = 0 on reward − origin; kl and reward: (N,).

    `origin` is the reward of the reference, as measured. An estimated KL below 0 is taken as 0. None where
    fewer than 3 points, or fewer than 2 different ones, lie at KL > 0: there is nothing to fit.
    """
    d = np.sqrt(np.maximum(0.0, np.asarray(kl, dtype=np.float64)))
    y = np.asarray(reward, dtype=np.float64) - origin
    assert d.shape == y.shape
    d, y = d[d > 0], y[d > 0]
    x = gao_basis(d, form)
    if len(d) < 3 or np.linalg.matrix_rank(x) < 2:
        return None
    inverse = np.linalg.inv(x.T @ x)
    alpha, beta = (float(v) for v in inverse @ x.T @ y)
    freedom = len(d) - 2
    variance = float(np.square(y - x @ np.array([alpha, beta])).sum()) / freedom
    covariance = variance * inverse
    reach = float(stats.t.ppf(0.975, freedom)) * np.sqrt(np.diag(covariance))
    draws = stats.multivariate_t.rvs(
        [alpha, beta], covariance + 1e-300 * np.eye(2), df=freedom, size=2000, random_state=seed
    )
    peaks = [gao_peak(float(a), float(b), form) for a, b in draws]
    low, high = np.quantile([math.inf if p is None else p for p in peaks], [0.025, 0.975], method="nearest")
    return GaoFit(
        form=form,
        alpha=alpha,
        beta=beta,
        alpha_low=alpha - float(reach[0]),
        alpha_high=alpha + float(reach[0]),
        beta_low=beta - float(reach[1]),
        beta_high=beta + float(reach[1]),
        peak=gao_peak(alpha, beta, form),
        peak_low=float(low) if math.isfinite(low) else None,
        peak_high=float(high) if math.isfinite(high) else None,
        origin=origin,
        residual_sd=math.sqrt(variance),
        count=len(d),
        covariance=(
            (float(covariance[0, 0]), float(covariance[0, 1])),
            (float(covariance[1, 0]), float(covariance[1, 1])),
        ),
    )


# ---- stop rules ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """One evaluation: means over the evaluation's responses, and by prompt where rules compare prompts.

    `heldout` and `proxy_by_prompt` map a prompt's id to the mean over its responses, of the held-out reward
    and of the trained one. `disagreement` is the ensemble's mean standard deviation. `proxy_std` and
    `heldout_std` are standard deviations over responses; without them those over prompts are taken as the
    scale.
    """

    step: int
    kl: float
    proxy: float
    heldout: Mapping[str, float] | None = None
    proxy_by_prompt: Mapping[str, float] | None = None
    disagreement: float | None = None
    length: float | None = None
    proxy_std: float | None = None
    heldout_std: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule that fired: what to do, the figures behind it, the reason, and what the rule cannot see.

    `also` holds the other rules that fired at the same evaluation, those that stop before those that warn.
    """

    rule: RuleName
    action: Literal["warn", "stop"]
    step: int
    values: dict[str, float]
    reason: str
    blind_spot: str
    also: tuple["Verdict", ...] = ()


@dataclass(frozen=True, slots=True)
class _Finding:
    """What a rule saw at an evaluation: whether its condition holds, and in which figures."""

    holds: bool
    values: dict[str, float]
    reason: str


class StopRules:
    """Feed it every evaluation in order, that before the first step too: it is the level to compare with.

    A rule that warns does so when its condition begins to hold, and again only after it has ceased to.
    `unjudged` says of each rule that is on and could not judge the last evaluation, why not.
    `state()` can be written as JSON and given to a new instance, which goes on from there.
    """

    def __init__(self, settings: StopSettings, state: Mapping[str, Any] | None = None) -> None:
        self.settings = settings
        self.unjudged: dict[str, str] = {}
        self._first: dict[str, Any] = {}  # by rule: what its first evaluation showed
        self._best: dict[str, Any] | None = None  # step and held-out reward by prompt
        self._seen = 0  # evaluations with a held-out reward
        self._declines = 0  # in a row
        self._holding: list[str] = []
        self._last_step = -1
        if state is not None:
            self._first, self._best = dict(state["first"]), state["best"]
            self._seen, self._declines = state["seen"], state["declines"]
            self._holding, self._last_step = list(state["holding"]), state["last_step"]

    def state(self) -> dict[str, Any]:
        """Everything that the next evaluation is compared with, in JSON's types."""
        return {
            "first": dict(self._first),
            "best": self._best,
            "seen": self._seen,
            "declines": self._declines,
            "holding": list(self._holding),
            "last_step": self._last_step,
        }

    @property
    def best_step(self) -> int | None:
        """The step of the evaluation with the highest held-out reward so far."""
        return None if self._best is None else int(self._best["step"])

    def feed(self, record: Record) -> Verdict | None:
        """What this evaluation leads to; None if no rule begins to hold."""
        assert record.step >= self._last_step, "evaluations in order"
        _check_finite(record)
        self._last_step, self.unjudged = record.step, {}
        findings: dict[RuleName, _Finding | str] = {
            "heldout_decline": self._heldout_decline(record),
            "normalised_gap": self._normalised_gap(record),
            "disagreement": self._disagreement(record),
            "kl_budget": self._kl_budget(record),
        }
        fired: list[Verdict] = []
        for rule, finding in findings.items():
            action: Action = getattr(self.settings, rule)
            if action == "off":
                continue
            if isinstance(finding, str):
                self.unjudged[rule] = finding
                continue
            if finding.holds and (action == "stop" or rule not in self._holding):
                fired.append(
                    Verdict(rule, action, record.step, finding.values, finding.reason, BLIND_SPOTS[rule])
                )
            if rule in self._holding:
                self._holding.remove(rule)
            if finding.holds:
                self._holding.append(rule)
        fired.sort(key=lambda verdict: verdict.action != "stop")
        return replace(fired[0], also=tuple(fired[1:])) if fired else None

    def _heldout_decline(self, record: Record) -> _Finding | str:
        """Paired over prompts with the best evaluation so far.

        The best of m evaluations is partly lucky, so the interval is that of m comparisons (Bonferroni).
        """
        if record.heldout is None:
            return "the evaluation has no held-out reward"
        if not record.heldout:
            return "no prompt has a held-out reward"
        now = dict(record.heldout)
        self._seen += 1
        if self._best is None:
            self._best = {"step": record.step, "heldout": now}
            return _Finding(False, {}, "")
        best = self._best["heldout"]
        common = [prompt for prompt in now if prompt in best]
        if len(common) < 2:
            return f"prompts both in this and in the best evaluation: {len(common)}, and 2 are needed"
        change = np.array([now[prompt] - best[prompt] for prompt in common])
        mean, half = paired_interval(change, comparisons=self._seen - 1)
        self._declines = self._declines + 1 if mean + half < 0 else 0
        values = {
            "heldout": float(np.mean([now[prompt] for prompt in common])),
            "best": float(np.mean([best[prompt] for prompt in common])),
            "best_step": float(self._best["step"]),
            "change": mean,
            "half_width": half,
            "evaluations": float(self._declines),
            "prompts": float(len(common)),
        }
        reason = (
            f"The held-out reward is {values['heldout']:.3g}, {-mean:.3g} ± {half:.2g} below its best, "
            f"{values['best']:.3g} at step {self._best['step']}, over {len(common)} prompts; it has been "
            f"below it beyond the paired interval in {self._declines} evaluations in a row."
        )
        if mean > 0:
            self._best = {"step": record.step, "heldout": now}
        return _Finding(self._declines >= self.settings.decline_evaluations, values, reason)

    def _normalised_gap(self, record: Record) -> _Finding | str:
        """Mean over prompts of Δproxy/sd(proxy) − Δheldout/sd(heldout), both since the first evaluation."""
        if record.heldout is None or record.proxy_by_prompt is None:
            return "the evaluation has not both rewards by prompt, the trained and a held-out one"
        proxy, heldout = dict(record.proxy_by_prompt), dict(record.heldout)
        if "normalised_gap" not in self._first:
            scales = [_scale(proxy, record.proxy_std), _scale(heldout, record.heldout_std)]
            if any(scale <= 0 for scale in scales):
                return "a reward does not vary at the first evaluation, so its gap has no scale"
            self._first["normalised_gap"] = {
                "step": record.step,
                "proxy": proxy,
                "heldout": heldout,
                "scales": scales,
            }
            return _Finding(False, {}, "")
        first = self._first["normalised_gap"]
        common = [p for p in proxy if p in heldout and p in first["proxy"] and p in first["heldout"]]
        if len(common) < 2:
            return (
                f"prompts with both rewards in this and in the first evaluation: {len(common)}, 2 are needed"
            )
        rises = [
            np.array([now[p] - then[p] for p in common]) / scale
            for now, then, scale in zip(
                (proxy, heldout), (first["proxy"], first["heldout"]), first["scales"], strict=True
            )
        ]
        gap, half = paired_interval(rises[0] - rises[1])
        rise, held = (float(values.mean()) for values in rises)
        limit = self.settings.gap_limit
        return _Finding(
            gap > limit,
            {"gap": gap, "half_width": half, "proxy_rise": rise, "heldout_rise": held, "limit": limit},
            f"Since step {first['step']} the trained reward has changed by {rise:+.3g} standard deviations, "
            f"the held-out one by {held:+.3g}: a gap of {gap:.3g} ± {half:.2g}; the limit is {limit:g}.",
        )

    def _disagreement(self, record: Record) -> _Finding | str:
        if record.disagreement is None:
            return "the reward is no ensemble: nothing can disagree"
        first = self._first.get("disagreement")
        if first is None:
            if record.disagreement <= 0:
                return "the members of the ensemble agree exactly, so there is no level to compare with"
            self._first["disagreement"] = record.disagreement
            return _Finding(False, {}, "")
        ratio, limit = record.disagreement / first, self.settings.disagreement_limit
        return _Finding(
            ratio > limit,
            {"disagreement": record.disagreement, "first": first, "ratio": ratio, "limit": limit},
            f"The ensemble's standard deviation is {record.disagreement:.3g}, {ratio:.3g} times "
            f"the {first:.3g} of its first evaluation, above the limit of {limit:g} times.",
        )

    def _kl_budget(self, record: Record) -> _Finding | str:
        limit = self.settings.kl_limit
        if limit is None:
            return "no budget is set: stop.kl_limit"
        return _Finding(
            record.kl > limit,
            {"kl": record.kl, "limit": limit},
            f"KL(policy‖reference) is {record.kl:.3g} nats a response, above the budget of {limit:g}.",
        )


def paired_interval(differences: Array, *, comparisons: int = 1) -> tuple[float, float]:
    """Mean of paired differences (N ≥ 2,) and the half width of its 95 % t interval.

    For one of several `comparisons` the level is 1 − .05/comparisons.
    """
    n = len(differences)
    assert n >= 2
    quantile = float(stats.t.ppf(1 - 0.025 / max(1, comparisons), n - 1))
    return float(differences.mean()), quantile * float(differences.std(ddof=1)) / math.sqrt(n)


def _scale(by_prompt: Mapping[str, float], given: float | None) -> float:
    if given is not None:
        return given
    return float(np.std(list(by_prompt.values()), ddof=1)) if len(by_prompt) > 1 else 0.0


def _check_finite(record: Record) -> None:
    """A value that is not a number would compare as false and no rule would ever fire."""
    single = {
        name: getattr(record, name)
        for name in ("kl", "proxy", "disagreement", "length", "proxy_std", "heldout_std")
    }
    wrong = [name for name, value in single.items() if value is not None and not math.isfinite(value)]
    for name in ("heldout", "proxy_by_prompt"):
        values = getattr(record, name)
        if values is not None and not all(math.isfinite(value) for value in values.values()):
            wrong.append(name)
    if wrong:
        raise ValueError(f"evaluation at step {record.step}: {', '.join(wrong)} must be finite numbers")
