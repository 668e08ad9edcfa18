"""pass@k against the enumeration of all subsets and of all outcomes, and what counts as a pass."""

import itertools
import math

import pytest

from actors.decoding.best_of_n import pass_at_k
from actors.records import Completion, Group, Prompt, Trajectory
from cluster.pass_at_k import PassRule, over_prompts, values_of_k


def test_it_is_the_share_of_subsets_with_a_sample_that_passes() -> None:
    for passed, k in itertools.product(range(6), range(1, 6)):
        outcomes = [True] * passed + [False] * (5 - passed)
        subsets = list(itertools.combinations(outcomes, k))
        share = sum(map(any, subsets)) / len(subsets)
        place = values_of_k(5).index(k) if k in values_of_k(5) else None
        found = over_prompts({"a": [passed, 5]})
        assert pass_at_k(outcomes, k) == pytest.approx(share, abs=1e-9)
        assert place is None or found[k][0] == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("chance", [0.1, 0.5])
def test_it_has_no_bias(chance: float) -> None:
    """Σ_c C(4, c) p^c (1 − p)^(4 − c) · pass@k(c of 4) = 1 − (1 − p)^k."""
    weight = [math.comb(4, c) * chance**c * (1 - chance) ** (4 - c) for c in range(5)]
    for k in (1, 2, 4):
        mean = sum(weight[c] * over_prompts({"a": [c, 4]})[k][0] for c in range(5))
        assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-9)


def test_the_interval_is_over_prompts() -> None:
    # n = 2; c = 0, 1, 2 give pass@1 = 0, .5, 1: mean .5, s = .5, half = 4.302653·.5/√3 = 1.242069;
    # pass@2 = 0, 1, 1: mean 2/3, s = .577350 = 1/√3, half = 4.302653/3 = 1.434218.
    found = over_prompts({"a": [0, 2], "b": [1, 2], "c": [2, 2]})
    assert found.keys() == {1, 2}
    assert found[1] == (pytest.approx(0.5), pytest.approx(1.242069, abs=1e-6))
    assert found[2] == (pytest.approx(2 / 3), pytest.approx(1.434218, abs=1e-6))
    assert over_prompts({"a": [1, 2]}) == {1: (pytest.approx(0.5), None), 2: (pytest.approx(1.0), None)}
    assert over_prompts({}) == {}


def test_k_goes_up_in_powers_of_two_to_the_number_of_samples() -> None:
    assert [values_of_k(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def group(name: str, *samples: tuple[float, dict[str, float]]) -> Group:
    completion = Completion((5,), (-1.0,), (0,), "x", "stop")
    trajectories = tuple(Trajectory(completion, reward, parts, (-1.0,)) for reward, parts in samples)
    return Group(0, Prompt(name, (1,), name), trajectories, "rollout-0", 0.1, 0.1)


def test_a_sample_passes_that_reaches_the_threshold() -> None:
    a = group("a", (0.9, {"tests": 1.0}), (1.0, {"tests": 0.5}), (1.1, {"tests": 0.0}))
    unjudged = group("b", (2.0, {}), (2.0, {"tests": 1.0}), (0.0, {"tests": 1.0}))
    assert PassRule(1.0).counts([a, unjudged]) == {"a": [2, 3], "b": [2, 3]}
    assert PassRule(0.5, "tests").counts([a, unjudged]) == {"a": [2, 3]}
    assert PassRule(1.0, "tests").counts([a]) == {"a": [1, 3]}


def test_a_reward_of_0_or_1_needs_no_threshold() -> None:
    binary = [group("a", (1.0, {}), (0.0, {})), group("b", (0.0, {}), (0.0, {}))]
    assert PassRule().counts(binary) == {"a": [1, 2], "b": [0, 2]}
    assert PassRule().counts([*binary, group("c", (0.5, {}), (1.0, {}))]) == {}  # it has levels between
    assert PassRule().counts([group("a", (1.0, {}))]) == {}  # of one sample it is the reward's mean
    assert PassRule(1.0).counts([group("a", (1.0, {}))]) == {"a": [1, 1]}
