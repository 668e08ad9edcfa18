"""Acquisition rules against brute force, numbers by hand, and what they must not depend on."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rewards.preferences.acquisition import (
    NEED_FEATURES,
    NEED_MEMBERS,
    RULES,
    bald,
    binary_entropy,
    choose,
    fisher_scores,
    greedy_d_optimal,
    label_variance,
    prior_precision,
)


def pool(seed: int = 0, pairs: int = 60, features: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(pairs, features)) * np.array([3.0, 1.0, 1.0, 0.3, 0.1])[:features]
    return z, (z @ rng.normal(size=(features, 4))).T


def test_entropy_and_bald_by_hand() -> None:
    # p of two members: (.9, .1) → H(.5) − H(.1) = log 2 − .32508; (.7, .7) → 0; both sure → 0.
    logit = {p: math.log(p / (1 - p)) for p in (0.9, 0.1, 0.7)}
    found = bald(np.array([[logit[0.9], logit[0.7], 50.0], [logit[0.1], logit[0.7], 50.0]]))
    entropy = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert found == pytest.approx([math.log(2) - entropy, 0.0, 0.0], abs=1e-12)
    assert binary_entropy(np.array([0.0, 0.5, 1.0])) == pytest.approx([0.0, math.log(2), 0.0])


def test_scores_by_hand() -> None:
    # Mean Δr: −3, 0.5, 2, 0. Variances over two members: 1, .25, 9, 4.
    members = np.array([[-2.0, 1.0, 5.0, 2.0], [-4.0, 0.0, -1.0, -2.0]])
    assert choose("entropy", 4, members=members) == [3, 1, 2, 0]
    assert choose("max-difference", 2, members=members) == [0, 2]
    assert choose("variance", 3, members=members) == [2, 3, 0]
    assert label_variance(np.array([[math.log(3)]])) == pytest.approx([3 / 16])


def test_greedy_d_optimal_is_greedy_on_the_determinant() -> None:
    # Brute force: at each pick, the pair whose v·zzᵀ raises log det the most.
    z, members = pool()
    past, past_members = pool(1, pairs=7)
    precision = prior_precision(5, past, past_members, ridge=0.5)
    expected_precision = 0.5 * np.eye(5)
    for row, reward in zip(past, past_members.mean(axis=0), strict=True):
        p = 1 / (1 + math.exp(-reward))
        expected_precision += p * (1 - p) * np.outer(row, row)
    np.testing.assert_allclose(precision, expected_precision, atol=1e-12)
    variance = label_variance(members)
    current, expected = precision.copy(), []
    for _ in range(25):
        gains = []
        for i in range(len(z)):
            grown = np.linalg.slogdet(current + variance[i] * np.outer(z[i], z[i]))[1]
            gain = grown - np.linalg.slogdet(current)[1]
            assert gain == pytest.approx(
                math.log1p(variance[i] * z[i] @ np.linalg.solve(current, z[i])), abs=1e-9
            )
            gains.append(-np.inf if i in expected else gain)
        expected.append(int(np.argmax(gains)))
        current += variance[expected[-1]] * np.outer(z[expected[-1]], z[expected[-1]])
    assert greedy_d_optimal(z, variance, precision, 25) == expected
    found = choose(
        "d-optimal",
        25,
        difference=z,
        members=members,
        labelled=past,
        labelled_members=past_members,
        ridge=0.5,
    )
    assert found == expected


def test_fisher_scores_are_the_gradient_of_the_log_determinant() -> None:
    # ∂ log det(λI + Σ w_i·v_i·z_i z_iᵀ)/∂w_i at w = 1, which autograd gives.
    z, members = pool()
    variance = label_variance(members)
    w = torch.ones(len(z), dtype=torch.float64, requires_grad=True)
    rows = torch.tensor(z)
    information = (
        0.7 * torch.eye(5, dtype=torch.float64) + (rows * (w * torch.tensor(variance))[:, None]).T @ rows
    )
    torch.logdet(information).backward()
    assert w.grad is not None
    np.testing.assert_allclose(fisher_scores(z, variance, 0.7), w.grad.numpy(), atol=1e-9)
    assert choose("fisher", 60, difference=z, members=members, ridge=0.7) == list(np.argsort(-w.grad.numpy()))


def test_d_optimal_does_not_repeat_itself_where_fisher_does() -> None:
    # Ten copies of one long pair and one short pair of another direction.
    z = np.array([[2.0, 0.0]] * 10 + [[0.0, 1.5]])
    members = np.zeros((1, 11))
    fisher = choose("fisher", 2, difference=np.vstack([z, [[0.0, 1.5]] * 40]), members=np.zeros((1, 51)))
    assert all(index < 10 for index in fisher)
    found = choose("d-optimal", 2, difference=z, members=members)
    assert found[0] < 10
    assert found[1] == 10
    # What is labelled already counts: after many labels of the long direction the short one is first.
    assert choose("d-optimal", 1, difference=z, members=members, labelled=[[2.0, 0.0]] * 10) == [10]


@pytest.mark.parametrize("rule", RULES)
def test_which_response_stands_first_does_not_matter(rule: str) -> None:
    z, members = pool()
    sign = np.where(np.random.default_rng(5).random(60) < 0.5, -1.0, 1.0)
    plain = choose(rule, 20, difference=z, members=members, seed=2)
    assert choose(rule, 20, difference=z * sign[:, None], members=members * sign, seed=2) == plain
    assert len(set(plain)) == 20


@pytest.mark.parametrize("rule", RULES)
def test_equal_pairs_are_taken_in_an_order_of_the_seed(rule: str) -> None:
    options = {"difference": np.ones((50, 3)), "members": np.ones((2, 50))}
    first = choose(rule, 10, seed=0, **options)
    assert first == choose(rule, 10, seed=0, **options)
    assert first != choose(rule, 10, seed=1, **options)
    assert sorted(choose(rule, 50, seed=3, **options)) == list(range(50))


def test_random_needs_no_model() -> None:
    assert sorted(choose("random", 4, size=4)) == [0, 1, 2, 3]
    assert "random" not in NEED_MEMBERS | NEED_FEATURES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, r"rule = 'best': choose one of random, entropy"),
        ({"count": 61}, r"count = 61: there are 60 candidate pairs"),
        ({"rule": "bald", "members": np.zeros((1, 60))}, r"bald.*there is 1: use a reward model of several"),
        ({"rule": "entropy", "members": None}, r"needs the rewards of a reward model"),
        ({"rule": "fisher", "difference": None}, r"needs the features of a reward model"),
        ({"ridge": 0.0}, r"ridge = 0.0: must be above 0"),
        ({"members": np.zeros((2, 59))}, r"numbers differ: .*'difference': 60, 'members': 59"),
        ({"labelled": np.zeros((3, 4))}, r"labelled has 4 features and the candidates 5"),
        ({"difference": np.full((60, 5), np.nan)}, r"difference holds values that are not finite"),
        ({"rule": "random", "difference": None, "members": None}, r"give difference, members or size"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    z, members = pool()
    given = {"rule": "d-optimal", "count": 5, "difference": z, "members": members} | options
    with pytest.raises(ValueError, match=message):
        choose(**given)


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "active_labels.py"
    spec = importlib.util.spec_from_file_location("active_labels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_newton_fit_of_the_benchmark_has_no_gradient_left() -> None:
    module = benchmark()
    rng = np.random.default_rng(0)
    z, first = rng.normal(size=(80, 6)), rng.random(80) < 0.6
    centre, weight = rng.normal(size=(3, 6)), rng.exponential(size=(3, 80))
    found = module.fit_linear(z, first.astype(float), ridge=0.3, centre=centre, weight=weight)
    for w, c, k in zip(found, centre, weight, strict=True):
        p = 1 / (1 + np.exp(-z @ w))
        np.testing.assert_allclose(z.T @ (k * (p - first)) + 0.3 * (w - c), 0.0, atol=1e-8)
    again = module.fit_linear(
        z, first.astype(float), ridge=0.3, centre=centre, weight=weight, start=found + 3.0
    )
    np.testing.assert_allclose(again, found, atol=1e-8)


def test_informative_labels_beat_random_ones_and_undecided_pairs_do_not() -> None:
    # The experiment itself, small: 6 mixed worlds, 5 batches. Signs are those of the full one.
    module = benchmark()
    areas = {rule: [] for rule in ("random", "entropy", "bald", "d-optimal", "fisher")}
    for seed in range(6):
        world = module.World(seed, module.WORLDS["mixed"])
        for rule, values in areas.items():
            values.append(np.mean(module.learn(world, rule, batches=5)))
    gain = {rule: np.mean(np.array(values) - areas["random"]) for rule, values in areas.items()}
    assert min(gain["bald"], gain["d-optimal"], gain["fisher"]) > 0.02
    assert gain["entropy"] < -0.02


def test_holm_by_hand() -> None:
    # Sorted: .01·3 = .03, .02·2 = .04, .03·1 = .03 but never less than the one before: .04.
    found = benchmark().holm({"a": 0.03, "b": 0.01, "c": 0.02})
    assert found == pytest.approx({"b": 0.03, "c": 0.04, "a": 0.04})
