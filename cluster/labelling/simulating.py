"""A simulated annotator at work: the same files as a person's, from gold rewards."""

from collections.abc import Callable, Sequence

from cluster.labelling.records import Annotation, Pair, Side
from cluster.labelling.session import shown_first
from rewards.preferences.annotator import Candidate, SimulatedAnnotator
from rewards.tasks.registry import get_task

Gold = Callable[[Pair], tuple[float, float]]
"""The true rewards of a pair's a and b."""


def simulate(
    pairs: Sequence[Pair], annotator: SimulatedAnnotator, gold: Gold, *, tie_within: float = 0.0
) -> list[Annotation]:
    """One annotation for each pair; a tie where the gold rewards differ by less than `tie_within`."""
    if not tie_within >= 0:
        raise ValueError(f"--tie-within {tie_within:g}: must be 0 or more; raise it")
    annotations = []
    for pair in pairs:
        rewards = gold(pair)
        first = shown_first(pair, annotator.name, annotator.seed)
        if abs(rewards[0] - rewards[1]) < tie_within:
            annotations.append(Annotation(pair.key, "tie", annotator.name, first))
            continue
        a, b = (Candidate(side.text, one) for side, one in zip((pair.a, pair.b), rewards, strict=True))
        choice = annotator.prefers_first(pair.prompt, a, b)
        annotations.append(Annotation(pair.key, "a" if choice else "b", annotator.name, first))
    return annotations


def gold_of_pool(pair: Pair) -> tuple[float, float]:
    """The gold rewards that the pool brought along."""
    if pair.a.gold is None or pair.b.gold is None:
        raise ValueError(
            f"RANKED: pair {pair.key[:16]} has no gold rewards; give the pool a column gold with a number "
            "for each response and rank it anew, or use --task or --reward-model"
        )
    return pair.a.gold, pair.b.gold


def gold_of_task(kind: str) -> Gold:
    """The gold reward of a generated task, by the columns of the pool."""
    task = get_task(kind)

    def gold(pair: Pair) -> tuple[float, float]:
        row = {**pair.row, "prompt": pair.prompt}
        one, other = (_graded(task.gold, row, side, kind) for side in (pair.a, pair.b))
        return one, other

    return gold


def _graded(grade: Callable[..., float], row: dict[str, object], side: Side, kind: str) -> float:
    try:
        return float(grade(row, side.text, side.finished))
    except ValueError as error:
        raise ValueError(f"--task {kind}: line {side.line} of the pool cannot be graded: {error}") from error


def gold_of_model(
    score: Callable[[list[tuple[object, str, bool]]], Sequence[float]], pairs: Sequence[Pair]
) -> Gold:
    """A reward model's value as gold, asked for all pairs at once."""
    items = [(pair.prompt, side.text, side.finished) for pair in pairs for side in (pair.a, pair.b)]
    values = [float(value) for value in score(list(items))]
    found = {pair.key: (values[2 * number], values[2 * number + 1]) for number, pair in enumerate(pairs)}
    return lambda pair: found[pair.key]
