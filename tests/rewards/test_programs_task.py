"""The task of programs: prompts, programs and tests agree, and held-out functions are kept apart."""

import pytest
from programs_reference import expected_tests, meaning

from rewards.settings import TaskSettings
from rewards.tasks.programs import MAX_PROGRAM, Instance, _by_kind_and_word, _spoiled, _steps
from rewards.tasks.registry import get_task

TASK = get_task("programs")


def settings(**changes):
    small = {"train_size": 300, "heldout_size": 60, "demonstrations": 200}
    return TaskSettings(kind="programs", **{**small, **changes})


def steps(*words):
    """The steps of these words, each of the kind that the one before gives."""
    chosen, kind = [], words[0]
    for word in words[1:]:
        (step,) = (one for one in _steps(9) if one.words == word and one.before == kind)
        chosen.append(step)
        kind = step.after
    return tuple(chosen)


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (("number", "add 3"), "def f(x):return x+3"),
        (("number", "add 3", "times 2"), "def f(x):return (x+3)*2"),
        (("number", "times 2", "add 3"), "def f(x):return x*2+3"),
        (("number", "times 2", "mod 3"), "def f(x):return x*2%3"),  # from left to right, as it is read
        (("number", "minus 1", "minus 2"), "def f(x):return x-1-2"),
        (("number", "square", "square"), "def f(x):return (x**2)**2"),
        (("number", "negate", "square"), "def f(x):return (-x)**2"),
        (("number", "square", "negate"), "def f(x):return -x**2"),  # a power binds tighter than a sign
        (("number", "negate", "negate"), "def f(x):return -(-x)"),
        (("number", "add 1", "negate", "mod 4"), "def f(x):return -(x+1)%4"),  # a sign tighter than a product
        (("number", "add 1", "abs", "square"), "def f(x):return abs(x+1)**2"),
        (("list", "tail", "reverse", "first"), "def f(x):return x[1:][::-1][0]"),
        (("list", "double", "sort", "sum"), "def f(x):return sum(sorted(x*2))"),
        (("list", "double", "last"), "def f(x):return (x*2)[-1]"),
        (("text", "append a", "prepend b"), "def f(x):return 'b'+x+'a'"),
        (("text", "append a", "double", "upper"), "def f(x):return ((x+'a')*2).upper()"),
        (("text", "reverse", "length"), "def f(x):return len(x[::-1])"),
    ],
)
def test_the_code_of_steps(words, program):
    instance = Instance(words[0], steps(*words), ())
    assert instance.program == program
    assert instance.prompt == ", ".join(words) + ">"
    # These few are ours, so they may run here; what models write runs in the sandbox.
    names = {}
    exec(program, names)
    for test in expected_tests(instance.prompt):
        assert names["f"](*test["input"]) == test["output"]


@pytest.mark.parametrize(("numbers", "largest"), [(2, 4), (3, 9), (6, 99)])
def test_rows_are_what_their_words_say(numbers, largest):
    data = TASK.generate(settings(numbers=numbers, largest=largest))
    for row in data.train + data.heldout:
        assert row["tests"] == expected_tests(row["prompt"])
        assert len(row["answer"]) <= MAX_PROGRAM
        assert row["answer"].startswith("def f(x):return ")
        assert 1 <= row["prompt"].count(",") <= numbers
        outputs = [repr(test["output"]) for test in row["tests"]]
        assert 2 * max(map(outputs.count, outputs)) <= len(outputs)  # no constant passes most tests


def test_no_heldout_function_is_trained_on_or_demonstrated_in_other_words():
    data = TASK.generate(settings(numbers=2, demonstrations=1000))

    def functions(rows):
        return {
            (row["prompt"].split(",")[0], repr([t["output"] for t in expected_tests(row["prompt"])]))
            for row in rows
        }

    heldout = functions(data.heldout)
    assert heldout.isdisjoint(functions(data.train))
    assert heldout.isdisjoint(functions(data.demonstrations))


def test_the_words_mean_what_they_say():
    assert meaning("number, minus 4, negate, times 8>", 3) == 8  # -(3 − 4)·8
    assert meaning("list, tail, max>", [9, 1, 2]) == 2
    assert meaning("text, append a, reverse, upper>", "xy") == "AYX"


def test_the_only_step_from_a_text_to_a_number_can_be_spoiled():
    import random

    instance = Instance("text", steps("text", "length"), (2, 3, 6, 5, 8))
    other = _spoiled(random.Random(0), _by_kind_and_word(9), instance)
    assert other.outputs != instance.outputs


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"task.train_size = 50000, but only about \d+ .*raise task.numbers"):
        TASK.generate(settings(numbers=2, largest=4, train_size=50_000))


@pytest.mark.parametrize("row", [{}, {"tests": "none"}, {"tests": [{"input": [1]}]}])
def test_a_row_of_something_else_is_an_error(row):
    with pytest.raises(ValueError, match="tests"):
        TASK.gold(row, "def f(x):return x", True)


def test_gold_without_a_run_is_the_same_share():
    row = {"tests": expected_tests("number, abs>")}
    # 7 of the 10 inputs are not negative.
    assert TASK.gold(row, "def f(x):return x", True) == pytest.approx(0.7, abs=1e-12)
    assert TASK.gold(row, "def f(x):return x", False) == 0.0
