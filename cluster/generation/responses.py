"""From a prompt's candidates and their scores to the lines that are written.

Ties for the best go to the candidate that was drawn first: draws are exchangeable, so that is a fair choice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.decoding.best_of_n import soft_choice
from actors.records import Completion, SampledGroup
from cluster.generation.settings import Strategy
from rewards.base import Score

Line = dict[str, Any]


def choose(strategy: Strategy, scores: Sequence[float], rng: np.random.Generator) -> list[int]:
    """The numbers of the candidates that become responses: one of each n in turn, in their order."""
    if strategy.n == 1:
        return list(range(strategy.samples))
    chosen = []
    for first in range(0, strategy.group_size, strategy.n):
        block = scores[first : first + strategy.n]
        if strategy.name == "best-of-n":
            place = int(np.argmax(block))
        else:
            place = int(rng.choice(strategy.n, p=soft_choice(block, strategy.soft_temperature)))
        chosen.append(first + place)
    return chosen


def response_lines(
    group: SampledGroup,
    scores: Sequence[Score] | None,
    strategy: Strategy,
    rng: np.random.Generator,
    version: str,
) -> list[Line]:
    """A line for each response: the prompt row's columns, and ours; those with names of ours under `row`."""
    values = [] if scores is None else [score.value for score in scores]
    return [
        _beside(group, _line(group.completions[place], None if scores is None else scores[place]))
        | ({"candidate_scores": _block(values, place, strategy.n)} if strategy.n > 1 else {})
        | {"strategy": strategy.name, "policy": version}
        for place in choose(strategy, values, rng)
    ]


def _block(values: Sequence[float], place: int, n: int) -> list[float]:
    first = place - place % n
    return list(values[first : first + n])


def _line(completion: Completion, score: Score | None) -> Line:
    line: Line = {
        "completion": completion.text,
        "finished": completion.finished,
        "tokens": len(completion.token_ids),
        "logprob": sum(completion.logprobs),
    }
    if score is not None:
        line |= {"score": score.value, "scores": dict(score.components)}
    return line


_SCORED = {"score", "scores", "candidate_scores"}
_OURS = {"prompt", "completion", "finished", "tokens", "logprob", "strategy", "policy", "row"} | _SCORED


def _beside(group: SampledGroup, line: Line) -> Line:
    """The line with the prompt and its row's other columns."""
    row = group.prompt.row
    prompt = group.prompt.source or group.prompt.text
    kept = {name: value for name, value in row.items() if name not in _OURS}
    clashing = {
        name: value
        for name, value in row.items()
        if name in _OURS and not (name == "prompt" and value == prompt)
    }
    return kept | {"prompt": prompt} | ({"row": clashing} if clashing else {}) | line
