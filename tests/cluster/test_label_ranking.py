"""Ranking pairs of a pool, with a linear reward model whose every number is known."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.labelling import arguments
from cluster.labelling.files import Pool
from cluster.labelling.ranking import RankOptions, describe, draw_pairs, gains, rank, unrank
from cluster.labelling.records import Candidates, Pair, Side
from rewards.preferences import acquisition
from rewards.preferences.records import Preference


def pool(*responses: str, prompts: int = 1) -> Pool:
    sides = tuple(Side(text, 1, number) for number, text in enumerate(responses))
    return Pool(tuple(Candidates(f"p{n}", sides) for n in range(prompts)), 0, 0, "hash")


class Linear:
    """Two members, features (n, n²) of a response that is a number n; r₁ = n, r₂ = n − 2·[n = 3]."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def encode(self, items: Sequence[Any]) -> None:
        if any(not text.isdigit() for _, text, _ in items):
            raise ValueError("no number")

    def score(self, items: Sequence[Any]) -> Any:
        self.asked += items
        n = np.array([float(text) for _, text, _ in items])
        return SimpleNamespace(raw=np.stack([n, n - 2.0 * (n == 3)]))

    def features(self, items: Sequence[Any]) -> Any:
        n = np.array([float(text) for _, text, _ in items], dtype=np.float32)
        return np.stack([n, n**2], axis=1)


def texts(pairs: Sequence[Pair]) -> list[set[str]]:
    return [{pair.a.text, pair.b.text} for pair in pairs]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_pairs_are_numbered_as_combinations_are(size: int) -> None:
    expected = list(itertools.combinations(range(size), 2))
    assert [unrank(number, size) for number in range(len(expected))] == expected


def test_all_pairs_of_each_prompt_or_as_many_as_are_wanted() -> None:
    entries = pool("a", "b", "c", prompts=40).entries
    everything = draw_pairs(entries, 1000, seed=0)
    assert len(everything) == len({pair.key for pair in everything}) == 120
    assert Counter(pair.prompt for pair in everything) == {f"p{n}": 3 for n in range(40)}
    some = draw_pairs(entries, 30, seed=0)
    assert len({pair.key for pair in some}) == 30
    assert {pair.key for pair in some} < {pair.key for pair in everything}
    assert [pair.key for pair in draw_pairs(entries, 30, seed=0)] == [pair.key for pair in some]
    # Which response is a is a fair coin: 120 throws, 5 standard deviations are 5·√120/2 ≈ 27.
    assert abs(sum(pair.a.response < pair.b.response for pair in everything) - 60) < 27


def test_random_needs_no_model_and_the_seed_decides() -> None:
    some = pool("1", "2", "3", "4", prompts=5)
    first = rank(some, RankOptions("random", 10, seed=1))
    assert (len(first.pairs), first.possible, first.considered) == (10, 30, 30)
    assert all((pair.rule, pair.score) == ("random", None) for pair in first.pairs)
    assert [pair.key for pair in rank(some, RankOptions("random", 10, seed=1)).pairs] == [
        pair.key for pair in first.pairs
    ]
    assert [pair.key for pair in rank(some, RankOptions("random", 10, seed=2)).pairs] != [
        pair.key for pair in first.pairs
    ]


def test_rules_choose_what_their_formulas_say() -> None:
    some = pool("1", "2", "3", "7")
    # Mean differences of reward (r₁ + r₂)/2: 1, 2, 2, 7 for 1, 2, 3, 7. The members disagree about 3 only.
    expected = {
        "entropy": ({"2", "3"}, 0.0),
        "max-difference": ({"1", "7"}, 6.0),
        "variance": (None, 1.0),  # any pair with 3: differences d and d ± 2 have variance 1
    }
    for rule, (best, score) in expected.items():
        model = Linear()
        top = rank(some, RankOptions(rule, 1), open_model=lambda model=model: model).pairs[0]
        assert texts([top])[0] == (best or texts([top])[0])
        assert "3" in texts([top])[0] or rule == "max-difference"
        assert top.score == pytest.approx(score, abs=1e-12)
        assert len(model.asked) == 4  # each response once, not once a pair
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, 0.0])))  # 3 against 1: differences 2 and 0
    entropy = -(sigmoid * np.log(sigmoid) + (1 - sigmoid) * np.log(1 - sigmoid))
    mean = sigmoid.mean()
    bald = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)) - entropy.mean()
    found = rank(some, RankOptions("bald", 6), open_model=Linear).pairs
    assert next(pair.score for pair in found if texts([pair])[0] == {"1", "3"}) == pytest.approx(bald)


def test_the_gain_of_d_optimal_is_the_growth_of_log_det() -> None:
    rng = np.random.default_rng(0)
    z, v = rng.normal(size=(5, 3)), rng.uniform(0.05, 0.25, size=5)
    information = 0.7 * np.eye(3)
    expected = []
    for row, weight in zip(z, v, strict=True):
        grown = information + weight * np.outer(row, row)
        expected.append(np.linalg.slogdet(grown)[1] - np.linalg.slogdet(information)[1])
        information = grown
    assert gains(z, v, 0.7 * np.eye(3)) == pytest.approx(expected, rel=1e-10)


def test_d_optimal_gains_fall_and_labelled_pairs_are_left_out_and_built_upon() -> None:
    some = pool("1", "2", "3", "7")
    fresh = rank(some, RankOptions("d-optimal", 6), open_model=Linear).pairs
    scores = [pair.score or 0.0 for pair in fresh]
    assert scores == sorted(scores, reverse=True)
    best = fresh[0]
    labelled = [Preference("p0", best.b.text, best.a.text)]  # the other way round: the same pair
    again = rank(some, RankOptions("d-optimal", 6), open_model=Linear, labelled=labelled)
    assert again.labelled_already == 1
    assert texts([best])[0] not in texts(again.pairs)
    # The label is in the matrix that it starts from: what comes next has the gain that it had as second.
    assert texts(again.pairs) == texts(fresh[1:])
    assert [pair.score for pair in again.pairs] == pytest.approx(scores[1:])


def test_labelled_responses_that_were_cut_off_are_asked_about_as_such() -> None:
    model = Linear()
    labelled = [Preference("p1", "9", "8", rejected_finished=False)]
    rank(pool("1", "2"), RankOptions("d-optimal", 1), open_model=lambda: model, labelled=labelled)
    assert [item for item in model.asked if item[0] == "p1"] == [("p1", "9", True), ("p1", "8", False)]


def test_responses_that_the_model_cannot_read_take_no_part_and_are_counted() -> None:
    found = rank(
        pool("1", "2", "x"), RankOptions("fisher", 5), open_model=Linear, model_version="v1", source="s"
    )
    assert texts(found.pairs) == [{"1", "2"}]
    assert found.unreadable == {"no number": 1}
    told = found.pairs[0].provenance
    assert (told["reward_model"], told["pool"], told["pool_sha256"]) == ("v1", "s", "hash")
    assert abs(told["predicted"]["difference"]) == 1.0
    assert "1 × no number" in describe(found, pool("1", "2", "x"), Path("out.jsonl"))
    with pytest.raises(ValueError, match="can read no pair"):
        rank(pool("x", "y"), RankOptions("fisher", 5), open_model=Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "--rule best: choose one of random, entropy"),
        ({"count": 0}, "--count 0: must be 1 or more"),
        ({"most_pairs": 0}, "--most-pairs 0"),
        ({"ridge": 0.0}, "--ridge 0: must be above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankOptions(**options)


def test_a_rule_without_a_model_and_a_pool_without_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="--rule bald needs a reward model"):
        rank(pool("1", "2"), RankOptions("bald"))
    with pytest.raises(ValueError, match="no prompt has two different responses"):
        rank(pool("1"), RankOptions())
    with pytest.raises(ValueError, match="all 1 are labelled already"):
        rank(pool("1", "2"), RankOptions(), labelled=[Preference("p0", "2", "1")])


def test_help_offers_the_rules_that_there_are() -> None:
    assert arguments.RULES == acquisition.RULES  # written out there, so that --help imports nothing heavy
