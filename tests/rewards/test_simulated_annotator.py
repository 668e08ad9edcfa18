"""The simulated annotator: probabilities by hand, labels that do not depend on order, frequencies."""

import math

import pytest

from rewards.preferences.annotator import Candidate, SimulatedAnnotator

LOG3 = math.log(3)  # σ(log 3) = 3/4


@pytest.mark.parametrize(
    ("options", "first", "second", "expected"),
    [
        ({}, Candidate("a", LOG3), Candidate("b", 0.0), 0.75),
        ({}, Candidate("b", 0.0), Candidate("a", LOG3), 0.25),
        ({"temperature": 2.0}, Candidate("a", 2 * LOG3), Candidate("b", 0.0), 0.75),
        # Two characters more at b = ½ make up for a gold reward that is lower by 1.
        ({"length_bias": 0.5}, Candidate("aaa", 1.0), Candidate("b", 2.0), 0.5),
        ({"length_bias": -0.5}, Candidate("aaa", 1.0 + LOG3), Candidate("b", 0.0), 0.75),
        ({"length_bias": 0.1}, Candidate("a", 0.0, length=10 * LOG3), Candidate("b", 0.0, length=0), 0.75),
        ({"flip": 0.1}, Candidate("a", LOG3), Candidate("b", 0.0), 0.9 * 0.75 + 0.1 * 0.25),
        ({"flip": 1.0}, Candidate("a", LOG3), Candidate("b", 0.0), 0.25),
        ({"temperature": 0.0}, Candidate("a", 1e-9), Candidate("b", 0.0), 1.0),
        ({"temperature": 0.0}, Candidate("a", 1.0), Candidate("b", 1.0), 0.5),
        ({"temperature": 0.0, "flip": 0.2}, Candidate("a", 0.0), Candidate("b", 1.0), 0.2),
        ({"temperature": 1e-300}, Candidate("a", 1e300), Candidate("b", 0.0), 1.0),  # no overflow
        ({"temperature": 1e-300}, Candidate("a", -1e300), Candidate("b", 0.0), 0.0),
    ],
)
def test_probability(options, first, second, expected):
    assert SimulatedAnnotator(**options).probability(first, second) == pytest.approx(expected, abs=1e-12)


def pairs(count):
    return [
        (f"prompt {i}", Candidate(f"first {i}", LOG3), Candidate(f"second {i}", 0.0)) for i in range(count)
    ]


def test_a_pair_has_the_same_label_in_either_order_and_in_every_run():
    annotator = SimulatedAnnotator(seed=3)
    for prompt, first, second in pairs(200):
        label = annotator.prefers_first(prompt, first, second)
        assert annotator.prefers_first(prompt, second, first) is not label
        assert SimulatedAnnotator(seed=3).prefers_first(prompt, first, second) is label


def test_labels_have_the_stated_frequency_and_seeds_are_independent():
    # P = ¾: over 4000 pairs the standard deviation of the share is √(¾·¼/4000) = .0068; 4 of them are .027.
    # Two independent annotators agree with probability ¾² + ¼² = .625 (standard deviation .0077).
    votes = [[SimulatedAnnotator(seed=s).prefers_first(*pair) for pair in pairs(4000)] for s in (0, 1)]
    assert sum(votes[0]) / 4000 == pytest.approx(0.75, abs=0.027)
    agree = sum(one == other for one, other in zip(*votes, strict=True)) / 4000
    assert agree == pytest.approx(0.625, abs=0.031)


def test_a_label_is_signed_and_keeps_what_it_is_given():
    annotator = SimulatedAnnotator(temperature=0.0, name="ada")
    label = annotator.label("p", Candidate("worse", 0.0), Candidate("better", 1.0), weight=2.0, subset="new")
    assert (label.prompt, label.chosen, label.rejected) == ("p", "better", "worse")
    assert (label.annotator, label.weight, label.subset) == ("ada", 2.0, "new")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"annotator.temperature = -1.0: it must be 0 or more"),
        ({"temperature": math.nan}, r"annotator.temperature = nan: it must be a finite number"),
        ({"length_bias": math.inf}, r"annotator.length_bias = inf"),
        ({"flip": 1.5}, r"annotator.flip = 1.5: it is a share of labels"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedAnnotator(**options)


def test_nothing_can_be_preferred_of_equal_responses_or_by_infinite_rewards():
    with pytest.raises(ValueError, match="the two responses are the same, 'a'"):
        SimulatedAnnotator().prefers_first("p", Candidate("a", 0.0), Candidate(" a", 1.0))
    with pytest.raises(ValueError, match="gold rewards inf and"):
        SimulatedAnnotator().probability(Candidate("a", math.inf), Candidate("b", 0.0))
