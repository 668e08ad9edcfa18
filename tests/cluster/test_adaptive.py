"""The adaptive rule: every branch against scripted steps."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from cluster.adaptive import AdaptiveRule, Decision, StepMeasurement
from cluster.drift import LagBin
from cluster.scheduler import SchedulerSettings

P = 8


def bin_at(lag: int, kl: float, *, relative_se: float = 0.02, ess: float | None = None) -> LagBin:
    return LagBin(lag, 1000, kl, relative_se * kl, 1 / (1 + 2 * kl) if ess is None else ess)


@dataclass(slots=True)
class Script:
    """Feeds a rule with steps that differ from a quiet one in what is named."""

    rule: AdaptiveRule
    step: int = 0
    decisions: list[Decision] = field(default_factory=list)

    def feed(
        self,
        count: int = 1,
        *,
        seconds: float = 1.0,
        wait: Mapping[str, float] | None = None,
        bins: tuple[LagBin, ...] = (),
        ess: float = 1.0,
        ready_left: int = 0,
        sync_seconds: float = 0.01,
        saturated_seconds: float = 0.0,
    ) -> list[Decision]:
        """`count` such steps; returns what they changed."""
        made = []
        for _ in range(count):
            measured = StepMeasurement(
                self.step, seconds, wait or {}, sync_seconds, True, ready_left, bins, ess, saturated_seconds
            )
            made += self.rule.after_step(measured)
            self.step += 1
        self.decisions += made
        return made


def script(window: int, limits: SchedulerSettings | None = None, **start: int) -> Script:
    """A rule at work: the first steps, in which the pipeline fills, are past."""
    made = Script(AdaptiveRule(limits or SchedulerSettings(), P, window=window, **start))
    assert made.feed(window + 1, wait={"window": 0.9}, sync_seconds=math.nan) == []
    return made


def settings_of(made: list[Decision]) -> list[tuple[str, int, int]]:
    return [(decision.setting, decision.old, decision.new) for decision in made]


MILD = (bin_at(0, 0.001), bin_at(1, 0.003))  # a = .001, b = .002: D(8) = .017


# ---- the window goes up ------------------------------------------------------------------------


def test_from_synchronous_one_step_up_to_measure_drift() -> None:
    s = script(0)
    made = s.feed(2, wait={"window": 0.6}, bins=(bin_at(0, 0.001),))
    assert settings_of(made) == [("window", 0, 1), ("ahead", P, 2 * P)]
    assert "waited 60%" in made[0].reason
    assert "not known" in made[0].reason
    assert made[0].inputs["wait_share"] == pytest.approx(0.6)
    assert made[0].inputs["drift_b"] is None
    assert made[0].inputs["drift_a"] == pytest.approx(0.001)
    assert json.loads(json.dumps(made[0].inputs, allow_nan=False))["max_drift"] == 0.02


def test_a_moderate_wait_must_show_in_three_steps() -> None:
    s = script(1)
    assert s.feed(2, wait={"deadline": 0.1}, bins=MILD) == []
    assert settings_of(s.feed(1, wait={"deadline": 0.1}, bins=MILD))[0] == ("window", 1, 2)


def test_rare_long_waits_count_by_their_mean() -> None:
    # One step in four waits .4 s of 1.4 s: 2 · .4 / (6 · 1 + 2 · 1.4) = 9 % over eight steps. Over the first
    # four it is .4/4.4 = 9 % too, but from so few it would have to be 10 %.
    s = script(1)
    for _ in range(2):
        assert s.feed(3, bins=MILD) == []
        made = s.feed(1, seconds=1.4, wait={"deadline": 0.4}, bins=MILD)
    assert ("window", 1, 2) in settings_of(made)
    assert "waited 9% of the last 8 steps" in made[0].reason


@pytest.mark.parametrize("cause", ["sampling", "sync", "ahead"])
def test_no_raise_for_what_a_larger_window_cannot_mend(cause: str) -> None:
    s = script(1)
    s.feed(20, wait={cause: 0.7}, bins=MILD)
    assert s.rule.window == 1


def test_no_raise_beyond_what_scoring_leaves_to_save() -> None:
    """The learner waits .7 s of a second; scorers are at work for all but .03 s of it, or for half."""
    s = script(1)
    s.feed(20, wait={"window": 0.7}, bins=MILD, saturated_seconds=0.97)
    assert s.rule.window == 1
    made = script(1).feed(2, wait={"window": 0.7}, bins=MILD, saturated_seconds=0.5)
    assert ("window", 1, 2) in settings_of(made)
    assert made[0].inputs["wait_share"] == pytest.approx(0.5)  # all that a larger window could save


def test_no_raise_without_measured_mismatch() -> None:
    s = script(1)
    assert s.feed(20, wait={"window": 0.7}) == []
    assert s.rule.safe_window is None


def test_no_raise_beyond_what_drift_permits() -> None:
    # D(s) = .001 + .006 s: D(3) = .019 is within .02, D(4) = .025 is not.
    s = script(3)
    assert s.feed(20, wait={"window": 0.7}, bins=(bin_at(2, 0.013), bin_at(3, 0.019))) == []
    assert s.rule.safe_window == 3


def test_no_raise_beyond_what_ess_permits() -> None:
    # χ² = .1 s: ESS(2) = 1/1.2 = .83 is within .8, ESS(3) = 1/1.3 = .77 is not.
    s = script(2)
    bins = (bin_at(1, 0.001, ess=1 / 1.1), bin_at(2, 0.002, ess=1 / 1.2))
    assert s.feed(20, wait={"window": 0.7}, bins=bins) == []
    assert s.rule.safe_window == 2


def test_no_raise_where_the_engines_alone_differ_too_much() -> None:
    s = script(0)
    assert s.feed(20, wait={"window": 0.7}, bins=(bin_at(0, 0.03),)) == []
    assert s.rule.safe_window == -1


def test_no_raise_beyond_max_window() -> None:
    s = script(1, SchedulerSettings(max_window=1))
    assert s.feed(20, wait={"window": 0.7}, bins=MILD) == []


# ---- and has to pay ----------------------------------------------------------------------------


def test_a_raise_that_pays_is_kept_and_the_next_follows() -> None:
    s = script(1)
    s.feed(2, seconds=2, wait={"window": 1.0}, bins=MILD)
    assert s.rule.window == 2
    # The step after the raise belongs to neither; two more that are a quarter shorter are enough.
    made = s.feed(3, seconds=1.5, wait={"window": 0.5}, bins=MILD)
    assert settings_of(made)[0] == ("window", 2, 3)


def test_a_raise_that_does_not_pay_is_taken_back_with_growing_patience() -> None:
    s = script(1)
    stalled = {"seconds": 2.0, "wait": {"window": 1.0}, "bins": MILD}
    s.feed(2, **stalled)
    raised = [2]
    patience = []
    for _ in range(3):
        made = s.feed(9, **stalled)  # one step that belongs to neither, and eight
        assert settings_of(made)[0] == ("window", 2, 1)
        assert "did not pay" in made[0].reason
        patience.append(0)
        while s.rule.window == 1:
            s.feed(1, **stalled)
            patience[-1] += 1
        raised.append(s.rule.window)
    assert patience == [16, 32, 64]


def test_another_regime_ends_the_patience() -> None:
    s = script(1)
    s.feed(11, seconds=2.0, wait={"window": 1.0}, bins=MILD)
    assert s.rule.window == 1
    # Sampling has become slower: steps take twice as long, all of it wait. Half of eight steps show it.
    made = s.feed(8, seconds=4.0, wait={"window": 3.0}, bins=MILD)
    assert ("window", 1, 2) in settings_of(made)


def test_small_gains_are_judged_over_eight_steps() -> None:
    s = script(1)
    s.feed(2, seconds=2.0, wait={"window": 1.0}, bins=MILD)
    s.feed(8, seconds=1.95, wait={"sampling": 0.9}, bins=MILD)  # 2.5 %: not clear at once …
    assert s.rule.window == 2
    s.feed(12, seconds=1.95, wait={"sampling": 0.9}, bins=MILD)  # … but enough in the end
    assert s.rule.window == 2


def test_no_verdict_where_the_wait_has_grown_in_spite_of_the_raise() -> None:
    # A larger window cannot lengthen the wait: sampling must have become slower; the raise may be right.
    s = script(1)
    s.feed(2, seconds=2.0, wait={"window": 1.0}, bins=MILD)
    s.feed(9, seconds=4.0, wait={"sampling": 0.1, "window": 2.9}, bins=MILD)
    assert s.rule.window >= 2
    assert all(decision.new > decision.old for decision in s.decisions)


# ---- the window comes down ---------------------------------------------------------------------


def test_halved_where_the_line_is_beyond_the_limit() -> None:
    # D(s) = .001 + .006 s: D(4) = .025.
    s = script(4)
    made = s.feed(3, bins=(bin_at(3, 0.019), bin_at(4, 0.025)))
    assert settings_of(made) == [("window", 4, 2), ("ahead", 5 * P, 3 * P)]
    assert "D(4) is at least" in made[0].reason
    # Groups of the old window are trained for four more steps: no second halving on their account.
    assert s.feed(5, bins=(bin_at(3, 0.019), bin_at(4, 0.025))) == []
    # And what is measured at lags above the window counts no more.
    assert s.feed(5, bins=(bin_at(1, 0.007), bin_at(2, 0.013))) == []


def test_one_noisy_step_is_no_violation() -> None:
    s = script(2)
    usual = (bin_at(1, 0.004), bin_at(2, 0.007))
    s.feed(6, bins=usual)
    assert s.feed(1, bins=(bin_at(1, 0.04), bin_at(2, 0.07)), ess=0.5) == []
    assert s.feed(10, bins=usual) == []


def test_three_steps_far_beyond_are_a_violation_whatever_came_before() -> None:
    s = script(2)
    s.feed(16, bins=(bin_at(1, 0.001), bin_at(2, 0.002)))
    far = (bin_at(1, 0.02), bin_at(2, 0.04))
    assert s.feed(2, bins=far) == []
    assert settings_of(s.feed(1, bins=far))[0] == ("window", 2, 1)


def test_halved_on_effective_sample_size() -> None:
    s = script(2)
    made = s.feed(3, ess=0.7)  # not told by lag
    assert settings_of(made)[0] == ("window", 2, 1)
    assert "min_ess" in made[0].reason
    by_lag = script(2)
    made = by_lag.feed(3, bins=(bin_at(1, 0.001, ess=0.75), bin_at(2, 0.002, ess=0.6)))
    assert settings_of(made)[0] == ("window", 2, 1)


def test_one_huge_weight_does_not_halve_the_window() -> None:
    # As measured: a weight of lag 1 that made that step's χ² 9, among steps at .99 and above.
    s = script(2)
    usual = (bin_at(2, 0.004, ess=0.99),)
    outlier = (bin_at(1, 0.002, ess=0.1), bin_at(2, 0.004, ess=0.998))
    made = [*s.feed(12, bins=usual), *s.feed(1, bins=outlier), *s.feed(6, bins=usual)]
    assert made == []
    assert s.rule.window == 2
    # Three of eight steps at the largest lag are no chance.
    for _ in range(3):
        made += s.feed(1, bins=(bin_at(1, 0.002, ess=0.9), bin_at(2, 0.004, ess=0.1)))
    assert settings_of(made)[:1] == [("window", 2, 1)]


def test_synchronous_is_reached_and_left_again_after_a_patience() -> None:
    s = script(1)
    s.feed(3, bins=(bin_at(0, 0.001), bin_at(1, 0.05)))
    assert s.rule.window == 0
    since = 0
    while s.rule.window == 0:
        s.feed(1, seconds=2, wait={"window": 1.0}, bins=(bin_at(0, 0.001),))
        since += 1
    assert since == 16
    s.feed(3, bins=(bin_at(0, 0.001), bin_at(1, 0.002)))
    assert s.rule.window == 1


def test_nothing_to_halve_at_zero() -> None:
    s = script(0)
    assert s.feed(10, bins=(bin_at(0, 0.5),), ess=0.1) == []


def test_a_window_that_no_token_uses_is_given_back() -> None:
    s = script(3, ahead=P + 1)
    assert s.feed(7, bins=MILD) == []
    made = s.feed(1, bins=MILD)
    assert settings_of(made) == [("window", 3, 2)]
    assert "no token of the last 8 steps had a lag above 1" in made[0].reason
    # Not below what is used, nor while more groups may be under way than the smaller window admits.
    s.feed(40, bins=MILD)
    assert s.rule.window == 1
    full = script(3)
    assert full.feed(40, bins=MILD) == []


# ---- publish interval --------------------------------------------------------------------------


def test_interval_grows_while_loading_weights_costs_too_much_and_drift_leaves_room() -> None:
    # 25 % at M = 1, 12½ % at 2, 8⅓ % at 3: it stops there.
    s = script(3)
    waits = {"sampling": 0.3}
    made = s.feed(30, sync_seconds=0.25, wait=waits, bins=MILD)
    assert settings_of(made) == [("publish_every", 1, 2), ("publish_every", 2, 3)]
    assert "25%" in made[0].reason
    assert made[0].inputs["sync_share"] == pytest.approx(0.25)


def test_interval_stays_below_the_window_plus_one() -> None:
    s = script(1)
    s.feed(40, sync_seconds=0.9, wait={"sampling": 0.3}, bins=MILD)
    assert s.rule.publish_every == 2


def test_interval_does_not_grow_while_the_learner_is_busy() -> None:
    # Actors then have time for it, and older weights would only make samples older.
    s = script(3)
    assert s.feed(40, sync_seconds=0.5, bins=MILD) == []


def test_interval_does_not_grow_without_room_in_drift() -> None:
    # D(s) = .001 + .006 s: D(3) = .019, one version more would be .025.
    s = script(3)
    s.feed(20, sync_seconds=0.5, wait={"sampling": 0.3}, bins=(bin_at(2, 0.013), bin_at(3, 0.019)))
    assert s.rule.publish_every == 1


def test_interval_falls_when_it_need_not_be_so_long() -> None:
    # At M − 1 = 2 loading would take .1/2 = 5 %, at 1 it would take 10 %: not below the limit.
    s = script(3, publish_every=3)
    made = s.feed(20, sync_seconds=0.1, bins=MILD)
    assert settings_of(made) == [("publish_every", 3, 2)]


def test_interval_falls_with_the_window() -> None:
    s = script(3, publish_every=4)
    made = s.feed(3, ess=0.5, sync_seconds=0.9)
    assert settings_of(made) == [("window", 3, 1), ("publish_every", 4, 2), ("ahead", 4 * P, 2 * P)]


# ---- groups under way --------------------------------------------------------------------------


def test_groups_that_always_stand_ready_are_too_many() -> None:
    s = script(2)  # ahead = 24
    top = (bin_at(2, 0.003),)
    assert [s.feed(1, bins=top, ready_left=ready) for ready in (5, 9, 7)] == [[], [], []]
    made = s.feed(1, bins=top, ready_left=7)
    assert settings_of(made) == [("ahead", 24, 24 - 5)]
    assert made[0].inputs["standing"] == 5
    # One step without any left over shows that the rest are needed.
    for _ in range(8):
        assert s.feed(3, bins=top, ready_left=6) == []
        assert s.feed(1, bins=top, ready_left=0) == []


def test_ahead_rises_fast_and_never_beyond_the_window() -> None:
    s = script(1, ahead=P)
    made = s.feed(4, wait={"ahead": 0.3}, bins=MILD)
    assert settings_of(made) == [("ahead", 8, 12), ("ahead", 12, 16)]
    assert s.feed(10, wait={"ahead": 0.3}, bins=MILD) == []


def test_ahead_keeps_a_small_margin_above_a_step() -> None:
    s = script(2)
    s.feed(30, bins=(bin_at(2, 0.003),), ready_left=30)
    assert s.rule.ahead == P + 1


def test_a_fall_that_was_wrong_is_not_soon_repeated() -> None:
    s = script(3)
    top = (bin_at(3, 0.003),)
    falls = []
    for _ in range(4):
        before = s.step
        while not (made := s.feed(1, bins=top, ready_left=2)):
            assert s.step < before + 200
        assert made[0].new == made[0].old - 2
        falls.append(s.step - before)
        s.feed(2, wait={"ahead": 0.5}, bins=top)
    assert falls == sorted(falls)
    assert falls[-1] >= 4 * falls[0]


# ---- start, checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"window": 9}, "window = 9, max_window = 8"),
        ({"window": 1, "publish_every": 3}, "publish_every = 3 must lie between 1 and window"),
        ({"window": 1, "ahead": 17}, "ahead = 17 must lie between P = 8"),
        ({"window": 1, "ahead": 7}, "ahead = 7 must lie between P = 8"),
    ],
)
def test_a_start_that_breaks_a_bound_is_refused(start: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveRule(SchedulerSettings(), P, **start)
