"""Cycles, agreement and shares, against enumeration, numerical integration and values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import integrate, stats

from rewards.preferences.agreement import agreement
from rewards.preferences.shares import NO_SHARE, share
from rewards.preferences.transitivity import (
    LARGEST_SPREAD,
    agreement_rate,
    count_triads,
    cycle_rate,
    label_accuracy,
    spread_from_agreement,
    spread_from_cycles,
)

unhurried = hypothesis_settings(deadline=None, max_examples=60)


def triads(labels):
    """From (group, winner, loser)."""
    columns = np.array(labels, np.int64).reshape(-1, 3).T
    found = count_triads(*columns)
    return found.complete.tolist(), found.cyclic.tolist()


def expit(x):
    return 1 / (1 + math.exp(-x))


# --- Triads ----------------------------------------------------------------------------------------------


def test_triads_by_hand():
    assert triads([(0, 1, 2), (0, 2, 3), (0, 3, 1)]) == ([1], [1])
    assert triads([(0, 1, 2), (0, 2, 3), (0, 1, 3)]) == ([1], [0])
    assert triads([(0, 1, 2), (0, 2, 3)]) == ([], [])  # the third pair has no label
    assert triads([(0, 1, 2), (0, 2, 3), (1, 3, 1)]) == ([], [])  # it is another prompt's
    assert triads([]) == ([], [])


def test_the_first_label_of_a_pair_counts():
    cycle = [(0, 1, 2), (0, 2, 3), (0, 3, 1)]
    assert triads([*cycle, (0, 1, 3), (0, 1, 3)]) == ([1], [1])
    assert triads([(0, 1, 3), *cycle]) == ([1], [0])


def test_prompts_are_counted_apart_though_their_labels_are_mixed():
    cycle, order = [(5, 1, 2), (5, 2, 3), (5, 3, 1)], [(2, 1, 2), (2, 2, 3), (2, 1, 3)]
    mixed = [label for both in zip(cycle, order, strict=True) for label in both]
    assert triads(mixed) == ([1, 1], [0, 1])  # prompt 2, prompt 5


@unhurried
@given(st.integers(3, 7), st.integers(0, 2**21 - 1), st.integers(0, 2**21 - 1))
def test_counts_equal_enumeration(size, signs, present):
    edges = list(itertools.combinations(range(size), 2))
    beats = set()
    for i, (a, b) in enumerate(edges):
        if present >> i & 1:
            beats.add((a, b) if signs >> i & 1 else (b, a))
    met = beats | {(b, a) for a, b in beats}
    complete = cyclic = 0
    for a, b, c in itertools.combinations(range(size), 3):
        if {(a, b), (b, c), (a, c)} <= met:
            complete += 1
            cyclic += {(a, b), (b, c), (c, a)} <= beats or {(b, a), (c, b), (a, c)} <= beats
    found = triads([(0, a, b) for a, b in sorted(beats)])
    assert (sum(found[0]), sum(found[1])) == (complete, cyclic)


def test_a_complete_comparison_obeys_kendalls_formula():
    # n(n − 1)(2n − 1)/12 − ½·Σ wins²
    n, rng = 40, np.random.default_rng(0)
    labels = [(0, a, b) if rng.random() < 0.5 else (0, b, a) for a, b in itertools.combinations(range(n), 2)]
    wins = np.bincount([winner for _, winner, _ in labels], minlength=n)
    complete, cyclic = triads(labels)
    assert complete == [n * (n - 1) * (n - 2) // 6]
    assert cyclic == [n * (n - 1) * (2 * n - 1) / 12 - (wins**2).sum() / 2]


# --- What Bradley-Terry lets expect ----------------------------------------------------------------------


def test_without_rewards_all_is_chance():
    assert cycle_rate(0.0) == pytest.approx(1 / 4, abs=1e-12)
    assert agreement_rate(0.0) == label_accuracy(0.0) == pytest.approx(1 / 2, abs=1e-12)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_rates_equal_scipys_integrals(s):
    density = stats.multivariate_normal([0, 0], [[2 * s * s, -s * s], [-s * s, 2 * s * s]]).pdf
    bound = 9 * s
    cycles, _ = integrate.dblquad(
        lambda y, x: 2 * expit(x) * expit(y) * expit(-x - y) * density([x, y]),
        -bound,
        bound,
        -bound,
        bound,
        epsabs=1e-6,
    )
    assert cycle_rate(s) == pytest.approx(cycles, abs=1e-5)
    normal = stats.norm(0, s * math.sqrt(2)).pdf
    agree, _ = integrate.quad(lambda x: (expit(x) ** 2 + expit(-x) ** 2) * normal(x), -bound, bound)
    right, _ = integrate.quad(lambda x: expit(abs(x)) * normal(x), -bound, bound, points=[0])
    assert agreement_rate(s) == pytest.approx(agree, abs=1e-7)
    assert label_accuracy(s) == pytest.approx(right, abs=1e-5)


def test_a_wide_spread_has_the_limit_worked_out_by_hand():
    # 1 − agreement = 2·E[σ(x)σ(−x)]; ∫σ(x)σ(−x)dx = 1 and x has density 1/(2s√π) at 0: about 1/(s√π).
    assert 1 - agreement_rate(50.0) == pytest.approx(1 / (50 * math.sqrt(math.pi)), rel=1e-3)


def test_inverses():
    assert spread_from_agreement(agreement_rate(1.7)) == pytest.approx(1.7, abs=1e-4)
    assert spread_from_cycles(cycle_rate(1.7)) == pytest.approx(1.7, abs=1e-3)
    assert spread_from_agreement(0.4) == spread_from_cycles(0.3) == 0.0
    assert spread_from_agreement(1.0) == spread_from_cycles(0.0) == LARGEST_SPREAD


# --- Agreement -------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    # Labels (2, 0), (1, 1), (3, 0); a pair with one label does not count.
    # Raw: (1 + 0 + 1)/3. N = 7, D = (0 + 2·1 + 0)/7, E = 7/13: alpha = 1 − (2/7)·(13/7) = 23/49.
    found = agreement(np.array([0, 1, 2, 3]), np.array([2, 1, 3, 1]), np.array([0, 1, 0, 0]))
    assert (found.pairs, found.labels) == (3, 7)
    assert found.raw.value == pytest.approx(2 / 3)
    assert found.alpha == pytest.approx(23 / 49)
    assert found.alpha_low < found.alpha < found.alpha_high


@unhurried
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_alpha_equals_krippendorffs_coincidence_matrix(counts):
    units = [(k, m) for k, m in counts if k + m >= 2]
    first, second = np.array(counts).T
    found = agreement(np.arange(len(counts)), first, second)
    if not units:
        assert found.alpha is None
        return
    # Every unit in both orders; o[c, k] counts ordered pairs of values within a unit, over (labels − 1).
    o = np.zeros((2, 2))
    for k, m in [*units, *[(m, k) for k, m in units]]:
        o += np.array([[k * (k - 1), k * m], [k * m, m * (m - 1)]]) / (k + m - 1)
    n = o.sum()
    expected = np.outer(o.sum(0), o.sum(0)) / (n - 1)
    assert found.alpha == pytest.approx(1 - o[0, 1] / expected[0, 1])


# --- Shares ----------------------------------------------------------------------------------------------


def test_one_cluster_has_wilsons_interval():
    # Wilson for 8 of 10 at 1.96: (.8 + .19208 ± 1.96·√(.016 + .009604))/1.38416.
    found = share(np.array([8]), np.array([10]))
    assert (found.low, found.high) == pytest.approx((0.490157, 0.943319), abs=1e-6)


def test_single_units_have_the_effective_size_less_one():
    # Clusters of one unit: v = p(1 − p)/(C − 1), so the effective size is C − 1 = 19, with t of 19 degrees.
    found = share(np.array([1] * 5 + [0] * 15), np.ones(20))
    t, size, p = stats.t.ppf(0.975, 19), 19, 0.25
    centre = (p + t * t / (2 * size)) / (1 + t * t / size)
    half = t * math.sqrt(p * (1 - p) / size + t * t / (4 * size**2)) / (1 + t * t / size)
    assert (found.value, found.low, found.high) == pytest.approx((p, centre - half, centre + half))


def test_units_that_go_together_widen_the_interval():
    apart = share(np.tile([0, 1], 50), np.ones(100))
    together = share(np.tile([0, 10], 5), np.full(10, 10))  # the same 50 of 100, in ten prompts
    assert together.value == apart.value == 0.5
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_shares_at_the_ends_keep_an_interval_and_empty_ones_know_nothing():
    none, all_of_them = share(np.zeros(30), np.ones(30)), share(np.ones(30), np.ones(30))
    assert none.value == none.low == 0 < none.high < 0.2
    assert all_of_them.value == all_of_them.high == 1 > all_of_them.low > 0.8
    assert share(np.zeros(0), np.zeros(0)) == share(np.zeros(3), np.zeros(3)) == NO_SHARE
