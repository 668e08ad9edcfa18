"""Which labels teach a reward model most: seven rules of choosing pairs, compared with random labels.

    python benchmarks/active_labels.py [--seeds 24] [--batches 10]

Writes active_labels.json. A linear Bradley-Terry model of D = 24 features learns from batches of 32 labels of
a simulated annotator who follows Bradley-Terry itself. All rules of a seed have the same world, the same
first batch (random) and the same label for each pair. After each batch: Spearman's ρ between learned and
true reward within prompts that no label is about. The area is the mean of ρ over the batches; a rule's gain
is its paired difference of area from random over seeds, with a 95 % t interval and p-values by Holm over the
rules. `labels` is the first number of labels at which a rule's mean curve reaches the end of random's.

There are two kinds of world. In an even one all prompts' responses differ equally; in a mixed one some
prompts get responses that are nearly alike, as real prompts do: pairs differ in how much they can tell.

Expected in mixed worlds: D-optimal is above random with its interval and needs at most 3/4 of the labels. In
even ones there is less to choose, and less to gain.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from rewards.preferences.acquisition import RULES, choose

HERE = Path(__file__).resolve().parent
FEATURES, BATCH, MEMBERS = 24, 32, 8
PROMPTS, RESPONSES = 64, 8
REWARD_SD = 1.5  # of the responses to one prompt; a label's logit is a difference of two rewards
RIDGE = 1.0  # the true head is drawn from the prior N(0, 1/RIDGE)
WORLDS = {"even": 0.0, "mixed": 0.7}  # standard deviation of the log of a prompt's spread

Array = NDArray[np.float64]


class World:
    """Prompts with responses, a true reward, and a label for every pair of responses to one prompt.

    Feature j has a standard deviation in proportion to 1/√j: some directions are seen more than others, as in
    learned features. A prompt's features are scaled by e^(uneven·N(0, 1)), at a mean square of 1.
    """

    def __init__(self, seed: int, uneven: float) -> None:
        rng = np.random.default_rng(seed)
        spread = np.arange(1, FEATURES + 1) ** -0.5
        spread *= REWARD_SD / np.linalg.norm(spread)
        shape = (2, PROMPTS, RESPONSES, FEATURES)
        train, self.test = rng.normal(size=shape) * spread
        factor = np.exp(uneven * rng.normal(size=(PROMPTS, 1, 1)) - uneven**2)
        train = train * factor
        head = rng.normal(size=FEATURES) / RIDGE**0.5
        first, second = np.triu_indices(RESPONSES, k=1)
        self.z: Array = (train[:, first] - train[:, second]).reshape(-1, FEATURES)
        self.label: Array = (rng.random(len(self.z)) < expit(self.z @ head)).astype(np.float64)
        self.gold_ranks = stats.rankdata(self.test @ head, axis=1)
        self.seed = seed

    def spearman(self, head: Array) -> float:
        """Mean of ρ within the test prompts; rewards do not tie, so ρ is Pearson's of the ranks."""
        ranks = stats.rankdata(self.test @ head, axis=1)
        middle = (RESPONSES + 1) / 2
        return float(((ranks - middle) * (self.gold_ranks - middle)).mean() / ((RESPONSES**2 - 1) / 12))


def fit_linear(
    z: Array, label: Array, *, ridge: float, centre: Array, weight: Array, start: Array | None = None
) -> Array:
    """argmin_w Σ c_i·[log(1 + e^{z_i·w}) − y_i·z_i·w] + λ/2·‖w − w₀‖², for each (c, w₀); (K, D).

    Newton's steps (iteratively reweighted least squares), halved where the loss would rise.
    z: (n, D); label: (n,); centre: (K, D), w₀; weight: (K, n), c; start: (K, D), where to begin.
    """
    w = (centre if start is None else start).copy()

    def loss(at: Array) -> Array:
        logits = at @ z.T
        data = (weight * (np.logaddexp(0.0, logits) - label * logits)).sum(axis=1)
        return np.asarray(data + 0.5 * ridge * np.square(at - centre).sum(axis=1))

    value = loss(w)
    for _ in range(50):
        p = expit(w @ z.T)
        gradient = (weight * (p - label)) @ z + ridge * (w - centre)
        curved = (weight * p * (1 - p))[:, None, :] * z.T  # (K, D, n)
        hessian = curved @ z
        step = np.linalg.solve(hessian + ridge * np.eye(z.shape[1]), gradient[..., None])[..., 0]
        size = np.ones(len(w))
        while ((reached := loss(w - size[:, None] * step)) > value + 1e-12 * np.abs(value)).any():
            size = np.where(reached > value + 1e-12 * np.abs(value), size / 2, size)
        w, value = w - size[:, None] * step, reached
        if np.abs(step).max() < 1e-7:  # the next step would be some 1e-14
            break
    return w


def learn(world: World, rule: str, batches: int) -> list[float]:
    """ρ after each batch of labels that `rule` chose; the first batch is random for all rules.

    The members weight the labels at random (exponential weights, a Bayesian bootstrap) and shrink to heads
    drawn from the prior, so that they disagree where no label has been.
    """
    rng = np.random.default_rng([world.seed, 1])
    priors = np.vstack([np.zeros(FEATURES), rng.normal(size=(MEMBERS, FEATURES)) / RIDGE**0.5])
    shares = np.vstack([np.ones(len(world.z)), rng.exponential(size=(MEMBERS, len(world.z)))])
    taken = choose("random", BATCH, size=len(world.z), seed=world.seed)
    curve: list[float] = []
    heads = None
    for batch in range(batches):
        heads = fit_linear(
            world.z[taken],
            world.label[taken],
            ridge=RIDGE,
            centre=priors,
            weight=shares[:, taken],
            start=heads,
        )
        curve.append(world.spearman(heads[0]))
        if batch == batches - 1:
            break
        free = np.setdiff1d(np.arange(len(world.z)), taken)
        picked = choose(
            rule,
            BATCH,
            difference=world.z[free],
            members=heads[1:] @ world.z[free].T,
            labelled=world.z[taken],
            labelled_members=heads[1:] @ world.z[taken].T,
            ridge=RIDGE,
            seed=1000 * world.seed + batch + 1,
        )
        taken = [*taken, *(int(index) for index in free[picked])]
    return curve


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the i-th smallest of m times m − i + 1, never falling."""
    adjusted, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return adjusted


def compare(curves: dict[str, Array]) -> list[dict[str, Any]]:
    """A row a rule; curves are (seeds, batches)."""
    areas = {rule: values.mean(axis=1) for rule, values in curves.items()}
    end = float(curves["random"].mean(axis=0)[-1])
    p_values = {
        rule: float(stats.ttest_rel(values, areas["random"]).pvalue)
        for rule, values in areas.items()
        if rule != "random"
    }
    adjusted = holm(p_values)
    rows = []
    for rule, values in curves.items():
        mean = values.mean(axis=0)
        reached = np.flatnonzero(mean >= end)
        row: dict[str, Any] = {
            "rule": rule,
            "spearman": [round(float(value), 4) for value in mean],
            "area": float(areas[rule].mean()),
            "labels": int((reached[0] + 1) * BATCH) if len(reached) else None,
        }
        if rule != "random":
            gain = areas[rule] - areas["random"]
            half = float(stats.t.ppf(0.975, len(gain) - 1)) * float(gain.std(ddof=1)) / len(gain) ** 0.5
            row |= {"gain": float(gain.mean()), "gain_ci95": half, "p_holm": adjusted[rule]}
        rows.append(row)
    return rows


def run(name: str, seeds: int, batches: int) -> list[dict[str, Any]]:
    """All rules in `seeds` worlds of a kind, printed and returned."""
    curves: dict[str, list[list[float]]] = {rule: [] for rule in RULES}
    for seed in range(seeds):
        world = World(seed, WORLDS[name])
        for rule in RULES:
            curves[rule].append(learn(world, rule, batches))
    rows = compare({rule: np.asarray(values) for rule, values in curves.items()})
    for row in rows:
        gain = f"{row['gain']:+.3f} ± {row['gain_ci95']:.3f} (p {row['p_holm']:.1e})" if "gain" in row else ""
        labels = row["labels"] or "never"
        print(f"{name:6s} {row['rule']:15s} area {row['area']:.3f}  {gain:26s} labels {labels}", flush=True)
    return rows


def main() -> None:
    """Run, print and write."""
    from machine import describe  # stands beside this file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument(
        "--batches", type=int, default=10, help=f"batches of {BATCH} labels, the first included"
    )
    options = parser.parse_args()
    if options.seeds < 2 or options.batches < 1:
        parser.error("--seeds must be at least 2 and --batches at least 1")
    began = time.perf_counter()
    worlds = {name: run(name, options.seeds, options.batches) for name in WORLDS}
    result = {
        "command": "python benchmarks/active_labels.py",
        "machine": describe(),
        "seconds": round(time.perf_counter() - began, 1),
        "seeds": options.seeds,
        "batch": BATCH,
        "labels_in_all": BATCH * options.batches,
        "features": FEATURES,
        "members": MEMBERS,
        "pool": PROMPTS * RESPONSES * (RESPONSES - 1) // 2,
        "worlds": worlds,
    }
    (HERE / "active_labels.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
