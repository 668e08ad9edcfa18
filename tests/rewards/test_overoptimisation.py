"""Gao's curves against an independent fit, and the stop rules on made-up runs."""

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import optimize, stats

from rewards.overoptimisation import (
    Record,
    StopRules,
    fit_gao,
    gao_basis,
    gao_peak,
    paired_interval,
)
from rewards.overoptimisation_settings import StopSettings

KL = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 9.0, 16.0])


def test_forms_by_hand() -> None:
    # α = 2, β = .5 at d = 2: best of n 2·(2 − 1) = 2; RL 2·(2 − .5·log 2) = 4 − log 2. Both are 0 at d = 0.
    d, w = [0.0, 2.0], np.array([2.0, 0.5])
    assert (gao_basis(d, "best-of-n") @ w).tolist() == pytest.approx([0.0, 2.0])
    assert (gao_basis(d, "rl") @ w).tolist() == pytest.approx([0.0, 4 - math.log(2)])
    # Peaks: α/(2β) = 2 and e^{α/β − 1} = e³, where the slopes α − 2βd and α − β − β·log d are 0.
    assert gao_peak(2.0, 0.5, "best-of-n") == pytest.approx(2.0)
    assert gao_peak(2.0, 0.5, "rl") == pytest.approx(math.exp(3))
    # A curve that never turns has none, nor one that only falls; e⁹⁹⁹ is beyond all reach.
    assert gao_peak(2.0, 0.0, "rl") is None
    assert gao_peak(-1.0, 0.5, "best-of-n") is None
    assert gao_peak(1.0, 0.001, "rl") is None


@pytest.mark.parametrize("form", ["best-of-n", "rl"])
def test_exact_points_give_their_curve_back(form: str) -> None:
    reward = -0.7 + gao_basis(np.sqrt(KL), form) @ np.array([1.5, 0.4])
    fit = fit_gao(KL, reward, form, origin=-0.7)
    assert fit is not None
    assert (fit.alpha, fit.beta, fit.residual_sd) == pytest.approx((1.5, 0.4, 0.0), abs=1e-9)
    np.testing.assert_allclose(fit.curve(np.sqrt(KL)), reward, atol=1e-9)
    assert fit.peak == pytest.approx(1.875 if form == "best-of-n" else math.exp(2.75))
    assert fit.peak_low == pytest.approx(fit.peak, rel=1e-6)
    assert fit.count == 6  # the point at KL = 0 is R(0) = 0 itself


@pytest.mark.parametrize("form", ["best-of-n", "rl"])
def test_fit_and_its_uncertainty_are_scipys(form: str) -> None:
    kl = np.linspace(0.1, 25, 30)
    noise = 0.3 * np.random.default_rng(0).normal(size=30)
    reward = 1.0 + gao_basis(np.sqrt(kl), form) @ np.array([1.2, 0.25]) + noise
    fit = fit_gao(kl, reward, form, origin=1.0)
    assert fit is not None

    def curve(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
        return d * (alpha - beta * (d if form == "best-of-n" else np.log(d)))

    w, covariance = optimize.curve_fit(curve, np.sqrt(kl), reward - 1.0)
    assert (fit.alpha, fit.beta) == pytest.approx(tuple(w), abs=1e-6)
    reach = stats.t.ppf(0.975, 28) * np.sqrt(np.diag(covariance))
    assert (fit.alpha_high - fit.alpha, fit.beta - fit.beta_low) == pytest.approx(tuple(reach), rel=1e-4)
    low, high = fit.band([3.0])
    spread = gao_basis(3.0, form)[0]
    assert high[0] - low[0] == pytest.approx(
        2 * stats.t.ppf(0.975, 28) * math.sqrt(spread @ covariance @ spread), rel=1e-4
    )
    assert fit.peak_low is not None
    assert fit.peak is not None
    assert fit.peak_low < fit.peak < (fit.peak_high or math.inf)


def test_turning_over_needs_evidence_and_reach() -> None:
    d = np.sqrt(KL)
    turned = fit_gao(KL, gao_basis(d, "best-of-n") @ np.array([2.0, 0.5]), "best-of-n", origin=0.0)
    assert turned is not None
    assert turned.turns_over(16.0)
    assert not turned.turns_over(3.9)  # the peak, d = 2, is at KL = 4
    rising = fit_gao(KL, d + 0.01 * np.cos(7 * d), "best-of-n", origin=0.01)
    assert rising is not None
    assert not rising.turns_over(16.0)


def test_too_few_points_are_no_fit() -> None:
    assert fit_gao([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], "rl", origin=0.0) is None
    assert fit_gao([1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0], "rl", origin=0.0) is None
    # Estimates below 0 are points at KL = 0: they say nothing of α and β.
    assert fit_gao([-0.1, -0.2, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], "rl", origin=0.0) is None


def test_paired_interval_is_scipys() -> None:
    values = np.array([0.5, -1.0, 2.0, 0.25])
    mean, half = paired_interval(values)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    # Two comparisons share the 5 %: each is at 97.5 %.
    wider = stats.ttest_1samp(values, 0.0).confidence_interval(0.975)
    mean, half = paired_interval(values, comparisons=2)
    assert (mean - half, mean + half) == pytest.approx((wider.low, wider.high))


# ---- stop rules ------------------------------------------------------------------------------------------

PROMPTS = [f"p{i}" for i in range(20)]
LEVEL = np.random.default_rng(0).normal(size=20)
WOBBLE = 0.1 * np.random.default_rng(1).normal(size=(40, 20))


def by_prompt(mean: float, wobble: np.ndarray, spread: float = 1.0) -> dict[str, float]:
    """Prompts differ by their level, and by a little from one evaluation to the next."""
    level = (LEVEL - LEVEL.mean()) / LEVEL.std(ddof=1)
    return dict(zip(PROMPTS, (mean + spread * level + wobble - wobble.mean()).tolist(), strict=True))


def run(rules: StopRules, heldout: list[float], proxy: list[float] | None = None) -> list:
    """Feed one evaluation after another; the verdict of each."""
    proxy = proxy or [0.0] * len(heldout)
    return [
        rules.feed(
            Record(
                step=10 * k,
                kl=float(k),
                proxy=up,
                heldout=by_prompt(held, WOBBLE[k]),
                proxy_by_prompt=by_prompt(up, 0 * WOBBLE[k]),
            )
        )
        for k, (held, up) in enumerate(zip(heldout, proxy, strict=True))
    ]


def only(**options: object) -> StopSettings:
    """All rules off but those given."""
    off = {"heldout_decline": "off", "normalised_gap": "off", "disagreement": "off", "kl_budget": "off"}
    return StopSettings(**(off | options))


def test_held_out_decline_fires_at_the_third_evaluation_below_the_best() -> None:
    # The paired noise is some .1·√2/√20·t ≈ .07 to .1 wide: falls of .3 are beyond it, of .02 are not.
    rules = StopRules(only(heldout_decline="stop"))
    verdicts = run(rules, [0.0, 1.0, 0.7, 0.6, 0.5, 0.4])
    assert [v is not None for v in verdicts] == [False, False, False, False, True, True]
    verdict = verdicts[4]
    assert (verdict.rule, verdict.action, verdict.step) == ("heldout_decline", "stop", 40)
    assert verdict.values["best_step"] == 10
    assert verdict.values["change"] == pytest.approx(-0.5)
    assert verdict.values["evaluations"] == 3
    assert "at step 10" in verdict.reason
    assert "3 evaluations in a row" in verdict.reason
    assert "share with the training labels" in verdict.blind_spot
    assert rules.best_step == 10


def test_a_recovery_starts_the_count_anew() -> None:
    rules = StopRules(only(heldout_decline="stop"))
    assert run(rules, [0.0, 1.0, 0.7, 0.7, 0.99, 0.7, 0.7]) == [None] * 7
    assert rules.best_step == 10
    # A new best is what the next ones are compared with.
    assert run(StopRules(only(heldout_decline="stop")), [0.0, 1.0, 0.7, 0.7, 1.5, 1.45, 1.6]) == [None] * 7


def test_a_fall_within_its_interval_is_none() -> None:
    assert run(StopRules(only(heldout_decline="stop")), [1.0, 0.98, 0.99, 0.98, 0.97, 0.98]) == [None] * 6


def test_flat_runs_seldom_raise_a_false_alarm() -> None:
    # Nothing changes but noise; the best of many is lucky, which the wider interval allows for.
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(100):
        rules = StopRules(only(heldout_decline="stop"))
        for k in range(20):
            held = dict(zip(PROMPTS, rng.normal(size=20).tolist(), strict=True))
            if rules.feed(Record(step=k, kl=0.0, proxy=0.0, heldout=held)) is not None:
                alarms += 1
                break
    assert alarms <= 5


def test_normalised_gap_is_in_units_of_the_first_evaluation() -> None:
    # Proxy: spread 1, rises by 1.6. Held-out: spread 1 (its wobble apart), rises by .5: the gap is about 1.1.
    rules = StopRules(only(normalised_gap="warn"))
    verdicts = run(rules, [0.0, 0.3, 0.5, 0.5], [0.0, 0.9, 1.6, 1.7])
    assert [v is not None for v in verdicts] == [False, False, True, False]  # warned of once
    verdict = verdicts[2]
    scale = np.std(list(by_prompt(0.0, WOBBLE[0]).values()), ddof=1)
    assert verdict.values["gap"] == pytest.approx(1.6 - 0.5 / scale)
    assert verdict.values["proxy_rise"] == pytest.approx(1.6)
    assert "since step 0" in verdict.reason.lower()
    # Both rewards in other units: the same gap.
    rules = StopRules(only(normalised_gap="warn"))
    for step, (up, held) in enumerate([(0.0, 0.0), (1.6, 0.5)]):
        scaled = {p: 50 * v + 3 for p, v in by_prompt(up, 0 * WOBBLE[0]).items()}
        found = rules.feed(
            Record(
                step=step,
                kl=0.0,
                proxy=0.0,
                heldout=by_prompt(held, WOBBLE[2 * step]),
                proxy_by_prompt=scaled,
            )
        )
    assert found is not None
    assert found.values["gap"] == pytest.approx(verdict.values["gap"])


def test_a_warning_returns_when_its_condition_does() -> None:
    rules = StopRules(only(normalised_gap="warn"))
    verdicts = run(rules, [0.0] * 5, [0.0, 1.5, 0.2, 1.5, 1.6])
    assert [v is not None for v in verdicts] == [False, True, False, True, False]


def test_disagreement_and_budget() -> None:
    rules = StopRules(only(disagreement="warn", kl_budget="stop", kl_limit=5.0))
    feed = [(0.2, 0.0), (0.39, 4.0), (0.41, 4.9), (0.5, 5.1)]
    verdicts = [
        rules.feed(Record(step=k, kl=kl, proxy=0.0, disagreement=d)) for k, (d, kl) in enumerate(feed)
    ]
    assert verdicts[:2] == [None, None]
    assert (verdicts[2].rule, verdicts[2].action) == ("disagreement", "warn")
    assert verdicts[2].values["ratio"] == pytest.approx(2.05)
    assert "agree, and are wrong" in verdicts[2].blind_spot
    assert (verdicts[3].rule, verdicts[3].action, verdicts[3].also) == ("kl_budget", "stop", ())
    assert "budget of 5" in verdicts[3].reason


def test_what_stops_comes_before_what_warns() -> None:
    rules = StopRules(only(disagreement="warn", kl_budget="stop", kl_limit=5.0))
    rules.feed(Record(step=0, kl=0.0, proxy=0.0, disagreement=0.2))
    verdict = rules.feed(Record(step=1, kl=6.0, proxy=0.0, disagreement=0.9))
    assert verdict is not None
    assert verdict.rule == "kl_budget"
    assert [other.rule for other in verdict.also] == ["disagreement"]


def test_state_goes_through_json_and_a_resume_continues() -> None:
    settings = StopSettings(heldout_decline="stop", kl_budget="warn", kl_limit=2.5)
    heldout, proxy = [0.0, 1.0, 0.7, 0.6, 0.5], [0.0, 1.2, 1.4, 3.0, 3.1]
    whole = run(StopRules(settings), heldout, proxy)
    assert any(whole)
    resumed, verdicts = StopRules(settings), []
    for k in range(len(heldout)):
        resumed = StopRules(settings, json.loads(json.dumps(resumed.state())))
        verdicts.append(
            resumed.feed(
                Record(
                    step=10 * k,
                    kl=float(k),
                    proxy=proxy[k],
                    heldout=by_prompt(heldout[k], WOBBLE[k]),
                    proxy_by_prompt=by_prompt(proxy[k], 0 * WOBBLE[k]),
                )
            )
        )
    assert verdicts == whole


def test_a_rule_that_cannot_judge_says_why() -> None:
    rules = StopRules(StopSettings())
    assert rules.feed(Record(step=0, kl=0.0, proxy=0.0)) is None
    assert set(rules.unjudged) == {"heldout_decline", "normalised_gap", "disagreement"}
    assert "no held-out reward" in rules.unjudged["heldout_decline"]
    # Prompts that are not in both evaluations cannot be paired.
    rules = StopRules(only(heldout_decline="stop"))
    rules.feed(Record(step=0, kl=0.0, proxy=0.0, heldout={"a": 1.0, "b": 2.0}))
    rules.feed(Record(step=1, kl=0.0, proxy=0.0, heldout={"b": 1.0, "c": 2.0}))
    assert "this and in the best evaluation: 1, and 2" in rules.unjudged["heldout_decline"]


def test_values_that_are_not_numbers_are_refused() -> None:
    rules = StopRules(StopSettings())
    with pytest.raises(ValueError, match=r"step 3: kl, heldout must be finite"):
        rules.feed(Record(step=3, kl=math.nan, proxy=0.0, heldout={"a": math.inf}))


def test_a_budget_needs_a_limit() -> None:
    with pytest.raises(ValidationError, match=r"set stop\.kl_limit"):
        StopSettings(kl_budget="stop")
    assert StopSettings(kl_budget="stop", kl_limit=3.0).kl_limit == 3.0
