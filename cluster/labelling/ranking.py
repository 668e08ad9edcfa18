"""Which pairs of a pool to have labelled: pairs of responses to one prompt, ranked by an acquisition rule.

    pool ─► pairs, thinned at random ─► reward model: differences of rewards, features ─► rule ─► ranked file

A reward model is asked about each response once. What is labelled already is left out of the pairs, and
`d-optimal` starts from what it taught.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.labelling.files import Pool
from cluster.labelling.records import Candidates, Pair, Side
from rewards.preferences import acquisition
from rewards.preferences.records import Preference, Prompt, pair_key

Array = NDArray[np.float64]
Item = tuple[Prompt, str, bool]


class Scorer(Protocol):
    """The part of a reward model that ranking needs."""

    def encode(self, items: Sequence[Item]) -> Any:
        """ValueError for an item that the model cannot read."""
        ...

    def score(self, items: Sequence[Item]) -> Any:
        """Gives `raw`, (K, N): σ of a difference is a member's probability of a preference."""
        ...

    def features(self, items: Sequence[Item]) -> Any:
        """(N, D)."""
        ...


@dataclass(frozen=True, slots=True)
class RankOptions:
    """`count` pairs at most; of more than `most_pairs` a random part is looked at; `ridge` is λ."""

    rule: str = "random"
    count: int = 100
    seed: int = 0
    ridge: float = 1.0
    most_pairs: int = 10_000

    def __post_init__(self) -> None:
        if self.rule not in acquisition.RULES:
            raise ValueError(f"--rule {self.rule}: choose one of {', '.join(acquisition.RULES)}")
        for name in ("count", "most_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be 1 or more; raise it"
                )
        if not self.ridge > 0:
            raise ValueError(f"--ridge {self.ridge:g}: must be above 0; raise it")


@dataclass(frozen=True, slots=True)
class Ranking:
    """The pairs, best first, and what they were chosen from; `unreadable`: why the model refused some."""

    pairs: list[Pair]
    possible: int
    drawn: int
    considered: int
    labelled_already: int
    unreadable: Mapping[str, int] = field(default_factory=dict)


def rank(
    pool: Pool,
    options: RankOptions,
    *,
    open_model: Callable[[], Scorer] | None = None,
    labelled: Sequence[Preference] = (),
    source: str = "",
    model_version: str = "",
) -> Ranking:
    """Rank a pool's pairs. ValueError where there are none, or the rule needs a model and there is none."""
    if options.rule != "random" and open_model is None:
        raise ValueError(
            f"--rule {options.rule} needs a reward model: name its folder with --reward-model, or use "
            "--rule random"
        )
    possible = sum(len(entry.sides) * (len(entry.sides) - 1) // 2 for entry in pool.entries)
    done = {preference.key for preference in labelled}
    drawn = draw_pairs(pool.entries, options.most_pairs, options.seed)
    pairs = [pair for pair in drawn if pair.key not in done]
    if not pairs:
        why = f"all {len(drawn)} are labelled already" if drawn else "no prompt has two different responses"
        raise ValueError(f"POOL has no pair to label: {why}; add responses")
    provenance: dict[str, Any] = {"pool": source, "pool_sha256": pool.sha256, "seed": options.seed}
    taken = len(drawn) - len(pairs)
    if options.rule == "random" or open_model is None:
        count = min(options.count, len(pairs))
        order = acquisition.choose("random", count, size=len(pairs), seed=options.seed)
        chosen = [replace(pairs[i], rule="random", provenance=provenance) for i in order]
        return Ranking(chosen, possible, len(drawn), len(pairs), taken)
    asked = _Asked(open_model(), with_features=options.rule in acquisition.NEED_FEATURES)
    readable = [pair for pair in pairs if asked.can_read((pair.prompt, pair.a, pair.b))]
    if not readable:
        raise ValueError(
            f"--reward-model can read no pair of the pool ({_listed(asked.refused)}); use another model "
            "or pool"
        )
    chosen = _by_model(readable, options, asked, labelled, provenance | {"reward_model": model_version})
    return Ranking(chosen, possible, len(drawn), len(readable), taken, dict(asked.refused))


def draw_pairs(entries: Sequence[Candidates], most: int, seed: int) -> list[Pair]:
    """All pairs of the pool in its order, or `most` of them at random.

    Which response is called a is drawn too: neither a pool's order nor a rule can favour one of them.
    """
    rng = random.Random(seed)
    ends: list[int] = []
    total = 0
    for entry in entries:
        total += len(entry.sides) * (len(entry.sides) - 1) // 2
        ends.append(total)
    numbers: Sequence[int] = range(total) if total <= most else sorted(rng.sample(range(total), most))
    pairs = []
    place = 0
    for number in numbers:
        while number >= ends[place]:
            place += 1
        entry = entries[place]
        i, j = unrank(number - (ends[place - 1] if place else 0), len(entry.sides))
        one, other = entry.sides[i], entry.sides[j]
        a, b = (one, other) if rng.random() < 0.5 else (other, one)
        key = pair_key(entry.prompt, a.text, b.text)
        pairs.append(Pair(key, entry.prompt, a, b, "", None, {}, entry.row))
    return pairs


def unrank(number: int, size: int) -> tuple[int, int]:
    """The pair of that number among (0, 1), (0, 2), …, (0, n−1), (1, 2), …, (n−2, n−1)."""
    i = 0
    while number >= size - 1 - i:
        number -= size - 1 - i
        i += 1
    return i, i + 1 + number


def _by_model(
    pairs: Sequence[Pair],
    options: RankOptions,
    asked: "_Asked",
    labelled: Sequence[Preference],
    provenance: dict[str, Any],
) -> list[Pair]:
    """The best pairs by the rule, each with its score and with what the model thinks of it."""
    members, z = asked.differences([(pair.prompt, pair.a, pair.b) for pair in pairs])
    past_members, past_z = None, None
    if options.rule == "d-optimal":
        past = [
            (
                one.prompt,
                Side(one.chosen, 0, 0, one.chosen_finished),
                Side(one.rejected, 0, 0, one.rejected_finished),
            )
            for one in labelled
        ]
        past = [one for one in past if asked.can_read(one)]
        if past:
            past_members, past_z = asked.differences(past)
    count = min(options.count, len(pairs))
    order = acquisition.choose(
        options.rule,
        count,
        difference=z,
        members=members,
        labelled=past_z,
        labelled_members=past_members,
        ridge=options.ridge,
        seed=options.seed,
    )
    scores = rule_scores(
        options.rule,
        order,
        members=members,
        z=z,
        past_z=past_z,
        past_members=past_members,
        ridge=options.ridge,
    )
    chosen = []
    for index, score in zip(order, scores, strict=True):
        predicted = {
            "difference": float(members[:, index].mean()),
            "std": float(members[:, index].std()),
        }
        chosen.append(
            replace(
                pairs[index],
                rule=options.rule,
                score=score,
                provenance=provenance | {"ridge": options.ridge, "predicted": predicted},
            )
        )
    return chosen


def rule_scores(
    rule: str,
    order: Sequence[int],
    *,
    members: Array,
    z: Array | None,
    past_z: Array | None,
    past_members: Array | None,
    ridge: float,
) -> list[float]:
    """The number by which each pair was chosen, larger is sooner; for d-optimal its gain when taken."""
    picked = list(order)
    if rule == "d-optimal":
        assert z is not None
        start = acquisition.prior_precision(z.shape[1], past_z, past_members, ridge)
        return gains(z[picked], acquisition.label_variance(members)[picked], start)
    if rule == "fisher":
        assert z is not None
        found = acquisition.fisher_scores(z, acquisition.label_variance(members), ridge)
    elif rule == "bald":
        found = acquisition.bald(members)
    elif rule == "variance":
        found = members.var(axis=0)
    else:
        found = np.abs(members.mean(axis=0)) * (-1.0 if rule == "entropy" else 1.0)
    return [float(score) for score in found[picked]]


def gains(z: Array, variance: Array, precision: Array) -> list[float]:
    """log det(M + v·zzᵀ) − log det M = log(1 + v·zᵀM⁻¹z) of each row z in turn; each adds v·zzᵀ to M."""
    inverse = np.linalg.inv(precision)
    found = []
    for row, v in zip(z, variance, strict=True):
        u = inverse @ row
        information = float(v * (row @ u))
        found.append(float(np.log1p(information)))
        inverse = inverse - (v / (1.0 + information)) * np.outer(u, u)
    return found


Compared = tuple[Prompt, Side, Side]


class _Asked:
    """A reward model that is asked about each response once."""

    def __init__(self, model: Scorer, *, with_features: bool) -> None:
        self._model, self._with_features = model, with_features
        self._readable: dict[tuple[int, str, bool], bool] = {}
        self.refused: Counter[str] = Counter()

    def can_read(self, pair: Compared) -> bool:
        """Whether the model can read both responses; counts each that it cannot."""
        prompt, a, b = pair
        return self._can_read(prompt, a) & self._can_read(prompt, b)

    def _can_read(self, prompt: Prompt, side: Side) -> bool:
        identity = _identity(prompt, side)
        if identity not in self._readable:
            try:
                self._model.encode([(prompt, side.text, side.finished)])
            except ValueError as error:
                self.refused[str(getattr(error, "reason", error))] += 1
                self._readable[identity] = False
            else:
                self._readable[identity] = True
        return self._readable[identity]

    def differences(self, pairs: Sequence[Compared]) -> tuple[Array, Array | None]:
        """Of a − b: the members' raw rewards, (K, N), and the features, (N, D), where they are wanted."""
        items: list[Item] = []
        places: dict[tuple[int, str, bool], int] = {}
        for prompt, a, b in pairs:
            for side in (a, b):
                if places.setdefault(_identity(prompt, side), len(items)) == len(items):
                    items.append((prompt, side.text, side.finished))
        first = np.array([places[_identity(prompt, a)] for prompt, a, _ in pairs], dtype=np.int64)
        second = np.array([places[_identity(prompt, b)] for prompt, _, b in pairs], dtype=np.int64)
        rewards = np.asarray(self._model.score(items).raw, dtype=np.float64)
        features = None
        if self._with_features:
            found = np.asarray(self._model.features(items))
            features = found[first].astype(np.float64) - found[second]
        return rewards[:, first] - rewards[:, second], features


def _identity(prompt: Prompt, side: Side) -> tuple[int, str, bool]:
    """One prompt object serves all pairs of its entry."""
    return id(prompt), side.text, side.finished


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in counts.items())


def describe(ranking: Ranking, pool: Pool, out: Path) -> str:
    """What was done, in a few lines."""
    lines = [f"{len(ranking.pairs)} pairs in {out}, best first, of {ranking.considered} that were looked at"]
    left = ranking.possible - ranking.drawn
    if ranking.labelled_already:
        lines.append(f"{ranking.labelled_already} pairs are labelled already and were left out")
    if left:
        lines.append(f"{left} more pairs of the pool were left out at random (--most-pairs)")
    if ranking.unreadable:
        lines.append(
            f"the reward model cannot read some responses ({_listed(ranking.unreadable)}): they take no part"
        )
    if pool.repeated:
        lines.append(f"{pool.repeated} responses repeat another one of their prompt and count once")
    return "\n".join(lines)
