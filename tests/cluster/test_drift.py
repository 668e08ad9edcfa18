"""The line of mismatch by lag: estimates against hand-derived ones, errors against simulation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from cluster.drift import Drift, LagBin, bins_from_row
from cluster.drift_fit import DriftFit, fit_line

NO_FADE = 1e9


def bin_at(lag: int, kl: float, kl_se: float = 1e-4, *, tokens: float = 1000, ess: float = 1.0) -> LagBin:
    return LagBin(lag, tokens, kl, kl_se, ess)


def exact_line(a: float, b: float, lags: tuple[int, ...] = (0, 1, 2), steps: int = 8) -> DriftFit:
    rows = [(step, lag, a + b * lag, 1e-5) for step in range(steps) for lag in lags]
    return fit_line(rows, NO_FADE)


# ---- reading a row -----------------------------------------------------------------------------


def test_bins_are_read_by_lag_and_what_is_missing_is_not_a_number() -> None:
    row = {
        "mismatch/kl": 0.5,  # not by lag
        "mismatch/tokens_by_lag/10": 7.0,
        "mismatch/kl_by_lag/10": 0.2,
        "mismatch/kl_se_by_lag/10": 0.01,
        "mismatch/ess_by_lag/10": 0.7,
        "mismatch/tokens_by_lag/2": 5.0,
        "mismatch/kl_by_lag/2": 0.1,
        "mismatch/tokens_by_lag/3": 0.0,  # no tokens: no bin
        "mismatch/kl_by_lag/3": 0.0,
    }
    low, high = bins_from_row(row)
    assert high == LagBin(10, 7.0, 0.2, 0.01, 0.7)
    assert (low.lag, low.tokens, low.kl) == (2, 5.0, 0.1)
    assert math.isnan(low.kl_se)
    assert math.isnan(low.ess)


# ---- the estimate ------------------------------------------------------------------------------


def test_points_on_a_line_give_that_line() -> None:
    fit = exact_line(0.01, 0.004)
    assert (fit.a, fit.b) == (pytest.approx(0.01), pytest.approx(0.004))
    assert fit.at(5) == pytest.approx(0.03)
    assert (fit.steps, fit.lags) == (8, (0, 1, 2))
    assert fit.curvature == pytest.approx(0, abs=1e-12)


def test_older_steps_weigh_less() -> None:
    # A memory of 16 steps has a half-life of 8: the step at 0 weighs half of that at 8. Two lags, so the line
    # passes through their weighted means: (½·.010 + .016)/1½ = .014 and (½·.020 + .026)/1½ = .024.
    drift = Drift(memory_steps=16)
    drift.add(0, [bin_at(0, 0.010), bin_at(1, 0.020)])
    drift.add(8, [bin_at(0, 0.016), bin_at(1, 0.026)])
    fit = drift.fit()
    assert fit is not None
    assert (fit.a, fit.b) == (pytest.approx(0.014), pytest.approx(0.010))


def test_precise_observations_weigh_more() -> None:
    # Without scatter the weights are 1/se²; lags 0, 1, 2 with values 0, 1, 5 and errors 1, 1, 2, so
    # w = 1, 1, ¼: Σw = 2¼, Σws = 1½, Σws² = 2, Σwy = 2¼, Σwsy = 3½;
    # b = (2¼·3½ − 1½·2¼) / (2¼·2 − 1½²) = 4½ / 2¼ = 2, a = (2¼ − 2·1½)/2¼ = −⅓ < 0, so a = 0 and
    # b = Σwsy/Σws² = 3½/2 = 1¾. Q = Σ w r² of the free fit = 1/9 + 4/9 + ¼·16/9 = 1 = n − p: τ = 0.
    fit = fit_line([(0, 0, 0.0, 1.0), (0, 1, 1.0, 1.0), (0, 2, 5.0, 2.0)], NO_FADE)
    assert fit.scatter == 0
    assert (fit.a, fit.b) == (0, pytest.approx(1.75))


def test_neither_part_is_negative() -> None:
    falling = fit_line([(0, 0, 0.03, 0.001), (0, 1, 0.01, 0.001)], NO_FADE)
    assert (falling.a, falling.b) == (pytest.approx(0.02), 0)  # the mean
    # (1, .01), (2, .03): the free line has a = −.01; through the origin b = (1·.01 + 2·.03)/(1 + 4) = .014.
    steep = fit_line([(0, 1, 0.01, 0.001), (0, 2, 0.03, 0.001)], NO_FADE)
    assert (steep.a, steep.b) == (0, pytest.approx(0.014))


def test_scatter_between_steps_is_what_errors_do_not_explain() -> None:
    # Values 1 and 3 (·.01) with σ = ½ (·.01): Σr² = 2, and Q = 2/(¼ + τ²) = n − p = 1 gives τ² = 1¾ (·1e-4).
    # Variance of the mean of two: Σr²/(n − 1)/n = 1 (·1e-4), whichever way it is reckoned.
    fit = fit_line([(0, 0, 0.01, 0.005), (1, 0, 0.03, 0.005)], NO_FADE)
    assert fit.scatter**2 == pytest.approx(1.75e-4, rel=0.02)
    assert fit.a == pytest.approx(0.02)
    assert fit.a_se == pytest.approx(0.01, rel=0.02)
    assert fit.dof == 1  # two steps, one parameter


def test_a_step_with_many_lags_is_one_unit() -> None:
    # Each step lies exactly on a line of its own, level ±.01: eight lags a step say no more on
    # the level than one.
    rows = [(step, lag, 0.05 + 0.01 * (-1) ** step, 1e-4) for step in range(8) for lag in range(8)]
    fit = fit_line(rows, NO_FADE)
    # Level from 8 steps: s/√8 with s = .01·√(8/7): .01/√7. The mean lies at lag 3½.
    assert fit.se_at(3.5) == pytest.approx(0.01 / math.sqrt(7), rel=0.02)


# ---- one lag only ------------------------------------------------------------------------------


def test_lag_zero_alone_gives_a_and_no_slope() -> None:
    fit = fit_line([(step, 0, 0.01, 0.001) for step in range(6)], NO_FADE)
    assert fit.a == pytest.approx(0.01)
    assert math.isnan(fit.b)
    assert fit.b_se == math.inf
    assert not fit.has_slope
    assert math.isnan(fit.at(1))
    assert fit.upper(1) == math.inf
    assert fit.lower(1) == pytest.approx(fit.lower(0))  # b ≥ 0
    assert fit.largest_lag_within(0.02, most=8) == 0


def test_one_later_lag_alone_bounds_the_others() -> None:
    fit = fit_line([(step, 2, 0.01, 1e-5) for step in range(6)], NO_FADE)
    assert math.isnan(fit.a)
    assert fit.a_se == math.inf
    assert fit.at(2) == pytest.approx(0.01)
    # a ≥ 0: D(4) ≤ 2·D(2) and D(1) ≥ D(2)/2; b ≥ 0: D(1) ≤ D(2) ≤ D(4).
    assert fit.upper(4) == pytest.approx(0.02, rel=0.01)
    assert fit.lower(4) == pytest.approx(0.01, rel=0.01)
    assert fit.upper(1) == pytest.approx(0.01, rel=0.01)
    assert fit.lower(1) == pytest.approx(0.005, rel=0.01)
    assert fit.largest_lag_within(0.0151, most=8) == 3


def test_largest_lag_within_a_limit() -> None:
    fit = exact_line(0.001, 0.004)  # D(4) = .017, D(5) = .021
    assert fit.largest_lag_within(0.02, most=8) == 4
    assert fit.largest_lag_within(0.02, most=3) == 3
    assert fit.largest_lag_within(0.0005, most=8) == -1


# ---- honest errors -----------------------------------------------------------------------------


def simulated(seed: int, *, steps: int, lags: int, level_sd: float, slope_sd: float) -> DriftFit:
    """Steps with a level and a slope of their own, and an error of .002 an observation."""
    draw = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        level, slope = 0.02 + level_sd * draw.normal(), 0.004 + slope_sd * draw.normal()
        rows += [(step, s, level + slope * s + 0.002 * draw.normal(), 0.002) for s in range(lags)]
    return fit_line(rows, half_life=8)


@pytest.mark.parametrize(
    ("steps", "lags", "level_sd", "slope_sd"),
    [(16, 4, 0.0, 0.0), (16, 4, 0.002, 0.0), (16, 4, 0.0, 0.002), (12, 3, 0.001, 0.001)],
    ids=["sampling error only", "levels differ", "slopes differ", "both, fewer steps"],
)
def test_intervals_cover_what_they_say(steps: int, lags: int, level_sd: float, slope_sd: float) -> None:
    # Nominal 95 %. 400 repetitions have a standard error of 1.1 %.
    fits = [
        simulated(seed, steps=steps, lags=lags, level_sd=level_sd, slope_sd=slope_sd) for seed in range(400)
    ]
    for name, truth in (("a", 0.02), ("b", 0.004)):
        covered = [
            abs(getattr(fit, name) - truth) <= fit.quantile(1.96) * getattr(fit, f"{name}_se") for fit in fits
        ]
        assert 0.90 <= float(np.mean(covered)) <= 0.99, name
    ahead = lags  # a lag that was not seen yet
    covered = [abs(f.at(ahead) - 0.02 - 0.004 * ahead) <= f.quantile(1.96) * f.se_at(ahead) for f in fits]
    assert 0.90 <= float(np.mean(covered)) <= 0.99
    assert float(np.mean([abs(fit.curvature_t) > 2.5 for fit in fits])) < 0.06  # a line is no bad model here


def test_few_steps_give_wide_errors_not_narrow_ones() -> None:
    fits = [simulated(seed, steps=4, lags=2, level_sd=0.002, slope_sd=0.002) for seed in range(300)]
    covered = [abs(fit.b - 0.004) <= fit.quantile(1.96) * fit.b_se for fit in fits]
    assert float(np.mean(covered)) >= 0.90


def test_directed_drift_shows_as_curvature() -> None:
    # KL of a drift in one direction grows with its square: y = .001·s² exactly.
    fit = fit_line([(step, s, 0.001 * s * s, 1e-4) for step in range(10) for s in range(5)], NO_FADE)
    assert fit.curvature == pytest.approx(0.001)
    assert fit.curvature_t > 10


# ---- the memory --------------------------------------------------------------------------------


def test_memory_slides_and_steps_rise() -> None:
    drift = Drift(memory_steps=4)
    for step in range(10):
        drift.add(step, [bin_at(0, 0.01 if step < 6 else 0.03)])
    fit = drift.fit()
    assert fit is not None
    assert (fit.steps, fit.a) == (4, pytest.approx(0.03))
    with pytest.raises(ValueError, match="9 came after 9"):
        drift.add(9, [])
    drift.add(20, [])
    assert drift.fit() is None


def test_what_is_no_number_is_left_out_and_counted_and_infinity_is_not() -> None:
    drift = Drift()
    drift.add(0, [bin_at(0, math.nan), bin_at(1, 0.01), bin_at(2, 0.02, math.nan), bin_at(3, -1.0)])
    assert drift.left_out == 2
    fit = drift.fit()
    assert fit is not None
    assert fit.lags == (1, 2)
    blown_up = Drift()
    blown_up.add(0, [bin_at(1, math.inf)])
    fit = blown_up.fit()
    assert fit is not None
    assert fit.at(1) == 100


def test_forgetting_starts_a_new_regime() -> None:
    drift = Drift()
    for step in range(6):
        drift.add(step, [bin_at(1, 0.01 if step < 3 else 0.05)])
    drift.forget_before(3)
    fit = drift.fit()
    assert fit is not None
    assert (fit.steps, fit.at(1)) == (3, pytest.approx(0.05))


def test_effective_sample_size_by_lag() -> None:
    # ESS .8 at lag 1 is χ² = ¼, ESS 1 at lag 0 is χ² = 0: χ²(2) = ½ and ESS(2) = 2/3.
    drift = Drift()
    for step in range(5):
        drift.add(step, [bin_at(0, 0.0), bin_at(1, 0.1, ess=0.8)])
    chi2 = drift.fit_chi2()
    assert chi2 is not None
    assert 1 / (1 + chi2.at(2)) == pytest.approx(2 / 3)


def test_memory_survives_json() -> None:
    drift = Drift(memory_steps=8)
    for step in range(6):
        found = bin_at(step % 3, 0.01 + 0.001 * step, ess=0.9)
        drift.add(step, [replace(found, kl_se=math.nan) if step == 4 else found, bin_at(5, math.nan)])
    copy = Drift(memory_steps=8)
    copy.restore(json.loads(json.dumps(drift.state(), allow_nan=False)))
    assert copy.left_out == 6
    drift.add(6, [bin_at(1, 0.02)])
    copy.add(6, [bin_at(1, 0.02)])
    assert copy.fit() == drift.fit()
    assert copy.fit_chi2() == drift.fit_chi2()
