"""The task of several right answers: its templates, its rows, and what is measured of a policy's answers."""

import itertools
import math
from collections import Counter

import pytest

from rewards.settings import TaskSettings
from rewards.tasks.modes import (
    LETTERS,
    WEIGHTS,
    ModesTask,
    mode_entropy,
    mode_of,
    mode_shares,
    precision,
    recall,
    templates,
)
from rewards.tasks.registry import get_task


def settings(**changes: object) -> TaskSettings:
    return TaskSettings.model_validate({"kind": "modes", "length": 4, "train_size": 500} | changes)


def test_the_four_templates_are_those_of_the_table_and_always_differ() -> None:
    assert templates("abcd") == ("abcd", "dcba", "bcda", "badc")
    assert templates("abc") == ("abc", "cba", "bca", "bac")  # the last letter of an odd word has no partner
    for length in range(3, len(LETTERS) + 1):  # letters are names: one word of each length says it for all
        assert len(set(templates(LETTERS[:length]))) == 4


def test_rows_are_apart_and_demonstrations_are_as_frequent_as_stated() -> None:
    data = ModesTask().generate(settings(heldout_size=100, demonstrations=4000, corruption=0.25))
    train, heldout = ({row["prompt"] for row in rows} for rows in (data.train, data.heldout))
    assert (len(train), len(heldout), len(train & heldout)) == (500, 100, 0)
    modes = [mode_of(row["prompt"][:-1], row["completion"]) for row in data.demonstrations]
    assert modes.count(None) == 1000  # a quarter of them, exactly
    assert not {row["prompt"] for row in data.demonstrations} & heldout
    valid = Counter(mode for mode in modes if mode is not None)
    for mode, weight in enumerate(WEIGHTS):
        # 3000 draws: five standard deviations of a share are 5·√(w(1 − w)/3000).
        assert abs(valid[mode] / 3000 - weight) < 5 * math.sqrt(weight * (1 - weight) / 3000)


def test_the_gold_reward_is_validity() -> None:
    task, row = get_task("modes"), {"prompt": "abcd>", "answer": "abcd"}
    for text, reward in {"abcd": 1, "dcba": 1, "bcda": 1, "badc": 1, "abdc": 0, "abc": 0, "abcda": 0}.items():
        assert task.gold(row, text, True) == reward, text
    assert task.gold(row, "abcd", False) == 0  # it did not end by itself
    for bad in ({"answer": "aa"}, {"answer": "aab"}, {"answer": 3}, {}):
        with pytest.raises(ValueError, match="answer"):
            task.gold(bad, "abcd", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"length": 2}, "task.length = 2"), ({"length": 9}, "task.length = 9"), ({"train_size": 1700}, "1680")],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModesTask().generate(settings(heldout_size=10, **changes))


def test_precision_recall_and_entropy_of_known_answers() -> None:
    # Of ten answers 4 are copied, 2 reversed, 1 swapped and 3 invalid.
    shares = mode_shares([0] * 4 + [1] * 2 + [3] + [None] * 3)
    assert shares == (0.4, 0.2, 0.0, 0.1)
    assert precision(shares) == pytest.approx(0.7)
    # Half of the demonstrated shares are .2, .15, .1, .05: all but the third are reached.
    assert recall(shares) == 0.75
    # Given validity 4/7, 2/7, 1/7: −Σ p log p.
    expected = -sum(p * math.log(p) for p in (4 / 7, 2 / 7, 1 / 7))
    assert mode_entropy(shares) == pytest.approx(expected)
    assert mode_entropy((0.0, 0.0, 0.0, 0.0)) == 0
    one_mode = mode_shares(itertools.repeat(2, 5))
    assert (precision(one_mode), recall(one_mode), mode_entropy(one_mode)) == (1, 0.25, 0)
