"""Coverage: the gold reward by hand, the sets that are held out, the demonstrations."""

import pytest

from rewards.settings import TaskSettings
from rewards.tasks.registry import get_task

TASK = get_task("coverage")
ROW = {"answer": "abcd"}


def generate(**changes):
    small = {"train_size": 60, "heldout_size": 20, "demonstrations": 400}
    return TASK.generate(TaskSettings(kind="coverage", **{**small, **changes}))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("abcd", 4.0),
        ("dcba", 4.0),
        ("abcdabcd", 4.0),  # eight characters are free
        ("abcdabcda", 4.0 - 0.15),
        ("aaaa", 1.0),
        ("abcde", 4.0 - 0.5),
        ("abcdee", 4.0 - 0.5),  # a wrong one twice counts once
        ("efgh", -2.0),
        ("", 0.0),
        ("abcd>", 4.0 - 0.5),
        (" abcd\n", 4.0),
        ("abcdefghijkl" * 2 + "abcdefgh", 4.0 - 0.5 * 8 - 0.15 * 24),  # 32 characters, 24 too many
    ],
)
def test_gold(completion, expected):
    assert TASK.gold(ROW, completion, True) == pytest.approx(expected, abs=1e-12)
    assert TASK.gold(ROW, completion, False) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("row", [{}, {"answer": "abc"}, {"answer": "abcz"}, {"answer": 4}])
def test_a_row_of_something_else_is_an_error(row):
    with pytest.raises(ValueError, match="not a row of this generated task"):
        TASK.gold(row, "abcd", True)


def symbols(row):
    return frozenset(row["prompt"][:-1])


def test_no_set_of_a_held_out_prompt_is_trained_on_in_any_order():
    data = generate(train_size=4096, heldout_size=256)
    heldout = {symbols(row) for row in data.heldout}
    # 495 sets; 495·256/4352 = 29.1 of them for held-out prompts.
    assert len(heldout) == 29
    assert heldout.isdisjoint(symbols(row) for row in [*data.train, *data.demonstrations])
    assert len({symbols(row) for row in data.train}) == 495 - 29


def test_sizes_beyond_the_space_are_refused():
    # 11 sets hold 256 held-out prompts, the other 484 hold 24·484 = 11616.
    generate(train_size=11616, heldout_size=256)
    with pytest.raises(
        ValueError, match=r"task.train_size = 11617 and task.heldout_size = 256 need 496 sets"
    ):
        generate(train_size=11617, heldout_size=256)


def test_demonstrations_have_all_lengths_and_a_middling_reward():
    data = generate(demonstrations=4000, corruption=1.0)
    golds = [
        TASK.gold({"answer": row["prompt"][:-1]}, row["completion"], True) for row in data.demonstrations
    ]
    lengths = {len(row["completion"]) for row in data.demonstrations}
    assert lengths == set(range(1, 25))
    assert max(golds) < 4
    assert sum(golds) / len(golds) == pytest.approx(0.7, abs=0.1)


def test_good_demonstrations_are_the_best_and_of_several_lengths():
    data = generate(corruption=0.0)
    found = {
        TASK.gold({"answer": row["prompt"][:-1]}, row["completion"], True) for row in data.demonstrations
    }
    assert found == {4.0}
    assert {len(row["completion"]) for row in data.demonstrations} == {4, 5, 6, 7, 8}
