"""Win rates of a policy over the one before it."""

import math
import random
from dataclasses import replace

import pytest

from cluster.evaluation import Evaluation
from cluster.win_rates import win_rates

PROMPTS = [f"p{number}" for number in range(200)]


def evaluation(lengths: dict[str, float], **components: dict[str, float]) -> Evaluation:
    first = next(iter(components.values()))
    return Evaluation(0, first, [], 0, 0.0, 5.0, components, lengths=lengths)


def test_wins_and_ties_by_hand() -> None:
    same = dict.fromkeys(PROMPTS, 5.0)
    before = evaluation(same, gold=dict.fromkeys(PROMPTS, 0.0))
    # 120 won, 40 tied, 40 lost: (120 + 20) / 200
    gold = {name: 1.0 if n < 120 else 0.0 if n < 160 else -1.0 for n, name in enumerate(PROMPTS)}
    found = win_rates(before, evaluation(same, gold=gold))
    assert found["gold"]["raw"] == pytest.approx(0.7)
    low, high = found["gold"]["raw_ci95"]
    assert low < 0.7 < high
    # Nothing is longer than anything: length explains nothing.
    assert found["gold"]["length_controlled"] == pytest.approx(0.7, abs=0.02)
    assert (found["gold"]["length_coefficient"], found["gold"]["identified"]) == (0.0, True)
    assert found["gold"]["strength"] > 0


def test_rounding_is_no_win() -> None:
    same = dict.fromkeys(PROMPTS, 5.0)
    first, second = (0.1 + 0.2 + 0.3) / 3, (0.3 + 0.2 + 0.1) / 3
    assert first > second  # the same samples in another order
    gold = {"before": dict.fromkeys(PROMPTS, second), "after": dict.fromkeys(PROMPTS, first)}
    # Single precision, on a prompt whose own mean is near 0.
    gold = {side: means | {"p0": 1e-9, "p1": 1.0} for side, means in gold.items()}
    gold["after"]["p0"] = 2e-8
    before, after = (evaluation(same, gold=gold[side]) for side in ("before", "after"))
    assert win_rates(before, after)["gold"]["raw"] == 0.5
    after = evaluation(same, gold=gold["after"] | {"p1": 1.0 + 1e-4})
    assert win_rates(before, after)["gold"]["raw"] == pytest.approx(0.5 + 0.5 / len(PROMPTS))


def test_a_win_by_length_alone_is_none() -> None:
    rng = random.Random(0)
    before = evaluation(dict.fromkeys(PROMPTS, 10.0), judge=dict.fromkeys(PROMPTS, 0.0))
    # Longer by 0 to 9 tokens, and preferred with σ(δ/3): mostly won, and by length alone.
    longer = {name: 10.0 + rng.randrange(10) for name in PROMPTS}
    chance = {name: 1 / (1 + math.exp(-(length - 10) / 3)) for name, length in longer.items()}
    judge = {name: 1.0 if rng.random() < chance[name] else -1.0 for name in PROMPTS}
    found = win_rates(before, evaluation(longer, judge=judge))["judge"]
    assert found["raw"] > 0.7
    low, high = found["length_controlled_ci95"]
    assert low < 0.5 < high


def test_where_length_alone_decides_there_is_no_controlled_rate() -> None:
    before = evaluation(dict.fromkeys(PROMPTS, 10.0), judge=dict.fromkeys(PROMPTS, 0.0))
    lengths = {name: 10.0 + (1 + n % 5) * (1 if n % 3 else -1) for n, name in enumerate(PROMPTS)}
    judge = {name: length - 10.0 for name, length in lengths.items()}  # the longer one is the better one
    found = win_rates(before, evaluation(lengths, judge=judge))["judge"]
    assert (found["length_controlled"], found["length_controlled_ci95"]) == (None, None)
    assert found["identified"] is False
    assert found["length_coefficient"] > 5
    # One prompt of equal length tells what its outcome is worth.
    same = win_rates(before, evaluation(lengths | {"p0": 10.0}, judge=judge | {"p0": 1.0}))["judge"]
    assert same["identified"] is True
    assert same["length_controlled"] > 0.5


def test_what_was_not_measured_is_left_out() -> None:
    lengths = dict.fromkeys(PROMPTS, 5.0)
    before = evaluation(lengths, gold=dict.fromkeys(PROMPTS, 0.0))
    after = evaluation(lengths, gold={"p0": 1.0}, twin=dict.fromkeys(PROMPTS, 1.0))
    assert win_rates(before, after) == {}  # twin: not before; gold: one prompt in common
    assert win_rates(replace(before, lengths={}), before) == {}  # written by an older version
    beside = evaluation(lengths, **{"proxy/std": dict.fromkeys(PROMPTS, 0.0)})
    assert win_rates(beside, beside) == {}
