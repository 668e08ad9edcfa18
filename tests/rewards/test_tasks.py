"""Generated tasks: rows are right, repeatable and disjoint; gold rewards are what is documented."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from programs_reference import expected_tests

from rewards.base import RewardRequest
from rewards.build import build_reward
from rewards.settings import RewardSettings, TaskSettings
from rewards.tasks.base import corrupted
from rewards.tasks.countdown import expression_text
from rewards.tasks.expression import MAX_DEPTH, ExpressionError, evaluate
from rewards.tasks.registry import TASKS, get_task

# No deadline for an example: a busy machine is not a failure.
unhurried = hypothesis_settings(deadline=None, max_examples=80)

BEST = {"coverage": 4.0}  # the highest gold reward, where it is not 1
REVERSAL, COUNTDOWN = get_task("reversal"), get_task("countdown")


def settings(kind, **changes):
    small = {"train_size": 60, "heldout_size": 20, "demonstrations": 50}
    return TaskSettings(kind=kind, **{**small, **changes})


# --- All tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASKS)
def test_the_same_settings_give_the_same_rows_and_another_seed_others(kind):
    task = get_task(kind)
    assert task.generate(settings(kind)) == task.generate(settings(kind))
    assert task.generate(settings(kind)).train != task.generate(settings(kind, seed=1)).train


@pytest.mark.parametrize("kind", TASKS)
def test_sizes_columns_alphabet_and_gold_answers(kind):
    task = get_task(kind)
    data = task.generate(settings(kind))
    assert (len(data.train), len(data.heldout), len(data.demonstrations)) == (60, 20, 50)
    rows = data.train + data.heldout
    assert len({row["prompt"] for row in rows}) == 80
    assert golds(kind, [(row, row["answer"]) for row in rows]) == [BEST.get(kind, 1.0)] * 80
    assert all(set(row) == {"prompt", "completion"} for row in data.demonstrations)
    texts = [text for row in rows + data.demonstrations for text in row.values() if isinstance(text, str)]
    assert set("".join(texts)) <= set(task.alphabet())
    assert len(set(task.alphabet())) == len(task.alphabet())


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("corruption", [0.0, 0.3, 1.0])
def test_the_stated_share_of_demonstrations_is_spoiled(kind, corruption):
    task = get_task(kind)
    data = task.generate(settings(kind, corruption=corruption))
    found = golds(kind, [(gold_row(kind, row), row["completion"]) for row in data.demonstrations])
    assert sum(gold < BEST.get(kind, 1.0) for gold in found) == corruption * 50


def golds(kind, pairs):
    """The gold reward of each row and completion, as a run has it: one sandbox serves all programs."""
    try:
        reward = build_reward([RewardSettings(kind="task")], settings(kind), timeout_s=10, memory_gib=1)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        answers = reward.score([RewardRequest("", completion, row, True) for row, completion in pairs])
    finally:
        reward.close()
    return [answer.value for answer in answers]


def gold_row(kind, demonstration):
    """The row that a demonstration's prompt belongs to, worked out from the prompt alone."""
    prompt = demonstration["prompt"]
    if kind == "programs":
        return {"tests": expected_tests(prompt)}
    if kind == "reversal":
        return {"answer": prompt[:-1][::-1]}
    if kind in ("coverage", "modes"):
        return {"answer": prompt[:-1]}
    numbers, target = prompt.rstrip(":").split("=")
    return {"numbers": [int(number) for number in numbers.split()], "target": int(target)}


def test_corruption_is_spread_evenly():
    assert corrupted(5, 0.4) == [False, True, False, True, False]  # rounded sums 0, 1, 1, 2, 2 of .4 to 2.0
    assert sum(corrupted(1000, 0.3)) == 300


def test_an_unknown_task_is_refused():
    known = "countdown, coverage, modes, programs, reversal"
    with pytest.raises(ValueError, match=rf"task.kind = 'chess': choose one of {known}"):
        get_task("chess")


# --- Reversal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "finished", "expected"),
    [
        ("dcba", True, 1.0),
        ("dcb", True, 3 / 4),
        ("dcxa", True, 2 / 4),  # letters after the first wrong one do not count
        ("xcba", True, 0.0),
        ("", True, 0.0),
        ("dcbaa", True, 3 / 4),  # 4 right, 1 too many
        ("dcbaaaaaaaaa", True, 0.0),  # never below 0
        ("dxbaa", True, 0.0),  # 1 right, 1 too many
        ("dcba", False, 1.0 - 0.2),
        ("", False, -0.2),
        (" dcba\n", True, 1.0),
    ],
)
def test_reversal_gold(completion, finished, expected):
    assert REVERSAL.gold({"answer": "dcba"}, completion, finished) == pytest.approx(expected, abs=1e-12)


def test_reversal_uses_the_whole_of_a_small_space_and_refuses_more():
    # 8² = 64 strings of two letters.
    data = REVERSAL.generate(settings("reversal", length=2, train_size=62, heldout_size=2))
    assert len({row["prompt"] for row in data.train + data.heldout}) == 64
    heldout = {row["prompt"] for row in data.heldout}
    assert heldout.isdisjoint(row["prompt"] for row in data.demonstrations)
    with pytest.raises(ValueError, match=r"task.train_size \+ task.heldout_size = 65, but there are only 64"):
        REVERSAL.generate(settings("reversal", length=2, train_size=63, heldout_size=2))


def test_reversal_of_the_greatest_length_works():
    assert len(REVERSAL.generate(settings("reversal", length=64)).train[0]["answer"]) == 64


# --- Countdown: generation -------------------------------------------------------------------------------


def puzzle(row):
    return tuple(sorted(row["numbers"])), row["target"]


@pytest.mark.parametrize(("numbers", "largest"), [(2, 9), (3, 9), (4, 99), (6, 30)])
def test_countdown_rows_are_solvable_puzzles_as_stated(numbers, largest):
    data = COUNTDOWN.generate(settings("countdown", numbers=numbers, largest=largest))
    for row in data.train + data.heldout:
        assert len(row["numbers"]) == numbers
        assert all(1 <= number <= largest for number in row["numbers"])
        assert 1 <= row["target"] <= 99
        assert row["prompt"] == f"{' '.join(map(str, row['numbers']))}={row['target']}:"
        solved = evaluate(row["answer"])
        assert (Counter(solved.numbers), solved.value) == (Counter(row["numbers"]), row["target"])


def test_no_heldout_puzzle_is_trained_on_or_demonstrated_in_any_order_of_its_numbers():
    # Two digits: few puzzles, so that an order-blind check would be needed to keep them apart.
    data = COUNTDOWN.generate(settings("countdown", numbers=2, demonstrations=500))
    heldout = {puzzle(row) for row in data.heldout}
    assert heldout.isdisjoint(puzzle(row) for row in data.train)
    assert heldout.isdisjoint(puzzle(gold_row("countdown", row)) for row in data.demonstrations)


def test_countdown_refuses_more_prompts_than_there_are():
    with pytest.raises(ValueError, match=r"task.train_size = 5000, but only about \d+ .*raise task.numbers"):
        COUNTDOWN.generate(settings("countdown", numbers=2, train_size=5000))
    with pytest.raises(ValueError, match=r"task.heldout_size = 5000, but only about \d+ "):
        COUNTDOWN.generate(settings("countdown", numbers=2, heldout_size=5000))


def test_spoiled_countdown_demonstrations_use_the_right_numbers():
    data = COUNTDOWN.generate(settings("countdown", corruption=1.0))
    for row in data.demonstrations:
        assert COUNTDOWN.gold(gold_row("countdown", row), row["completion"], True) == 0.1


# --- Countdown: the verifier -----------------------------------------------------------------------------

ROW = {"numbers": [3, 7, 25], "target": 46}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("25+3*7", 1.0),
        (" 25 + (3 * 7) ", 1.0),
        ("25+3*7=46", 1.0),
        ("25 + 3 × 7", 1.0),
        ("25−(0-3*7)", 0.0),  # 0 is not given
        ("--25+3*7", 1.0),
        ("25-(-3)*7", 1.0),
        ("7*3+25", 1.0),
        ("25*3-7", 0.1),  # 68
        ("3+7+25", 0.1),
        ("25/(3-7)", 0.1),  # -6.25
        ("25+3*7=47", 0.0),  # claims what is false
        ("25+3*7=", 0.0),
        ("25+3*7=46=46", 0.0),
        ("25+3*7=" + "9" * 5000, 0.0),
        ("46", 0.0),
        ("25+21", 0.0),
        ("25+3*7+7-7", 0.0),  # 7 three times
        ("25+7*7-3", 0.0),  # 7 twice
        ("25+3*7)", 0.0),
        ("(25+3*7", 0.0),
        ("25+3*", 0.0),
        ("25 3 7", 0.0),
        ("25//3*7", 0.0),
        ("25**3**7", 0.0),
        ("3*7+025", 0.0),
        ("25/(7-7)+3", 0.0),
        ("25/(3-3*7/7)", 0.0),
        ("2_5+3*7", 0.0),
        ("25.0+3*7", 0.0),
        ("25+3*7#", 0.0),
        ("２５+3*7", 0.0),  # full-width digits
        ("٢٥+3*7", 0.0),  # Arabic-Indic digits
        ("25e0+3*7", 0.0),
        ("0x19+3*7", 0.0),
        ("__import__('os').system('touch /tmp/x')", 0.0),
        ("(lambda: 46)()", 0.0),
        ("9**9**9**9**9", 0.0),
        ("9" * 100_000, 0.0),
        ("(" * 10_000 + "25+3*7" + ")" * 10_000, 0.0),
        ("-" * 10_000 + "25", 0.0),
        ("\x00", 0.0),
        ("\ud800", 0.0),
        ("", 0.0),
        ("()", 0.0),
    ],
)
def test_countdown_gold(completion, expected):
    assert COUNTDOWN.gold(ROW, completion, True) == expected


def test_division_is_exact():
    # 8/(3-8/3) = 24, which floating point gives as 23.99…
    row = {"numbers": [8, 3, 8, 3], "target": 24}
    assert COUNTDOWN.gold(row, "8/(3-8/3)", True) == 1.0


@pytest.mark.parametrize(
    ("completion", "finished", "expected"),
    [
        ("<think>25+3*7?</think> <answer> 25+3*7 </answer>", True, 1.0),
        ("<answer>3+7+25</answer> no: <answer>25+3*7</answer>", True, 1.0),  # the last counts
        ("<answer>25+3*7 = 46</answer> done", False, 1.0),  # closed before it was cut off
        ("thus <answer>25+3*7", True, 1.0),
        ("thus <answer>25+3*7", False, 0.0),
        ("25+3*7", False, 0.0),
        ("it is 25+3*7", True, 0.0),  # free text without a tag
        ("25+3*7</answer>", True, 0.0),
        ("<answer></answer>", True, 0.0),
    ],
)
def test_where_the_answer_stands(completion, finished, expected):
    assert COUNTDOWN.gold(ROW, completion, finished) == expected


def test_a_cut_off_response_has_no_expression():
    assert expression_text("1+2", True) == "1+2"
    assert expression_text("1+2", False) is None


@pytest.mark.parametrize(
    "row", [{}, {"numbers": [1, 2]}, {"numbers": "1 2", "target": 3}, {"numbers": [[1]], "target": 3}]
)
def test_a_row_of_something_else_is_an_error(row):
    with pytest.raises(ValueError, match=r"not a row of this generated task|not a list of whole numbers"):
        COUNTDOWN.gold(row, "1+2", True)


def test_depth_is_bounded_exactly():
    inside = "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH
    assert evaluate(inside).value == 1
    with pytest.raises(ExpressionError, match="nested more than"):
        evaluate(f"({inside})")


# A tree is a number, or (operator, left, right); it is written with all parentheses, and computed here.
trees = st.recursive(
    st.integers(0, 99), lambda inner: st.tuples(st.sampled_from("+-*/"), inner, inner), max_leaves=8
)


def written(tree):
    return str(tree) if isinstance(tree, int) else f"({written(tree[1])}{tree[0]}{written(tree[2])})"


def computed(tree):
    if isinstance(tree, int):
        return Fraction(tree)
    operator, left, right = tree[0], computed(tree[1]), computed(tree[2])
    if operator == "/":
        return left / right
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def leaves(tree):
    return (tree,) if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


@unhurried
@given(trees)
def test_any_tree_evaluates_to_its_exact_value(tree):
    try:
        expected = computed(tree)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="division by zero"):
            evaluate(written(tree))
        return
    result = evaluate(written(tree))
    assert (result.value, result.numbers) == (expected, leaves(tree))


@unhurried
@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 9)), max_size=8), st.integers(1, 9))
def test_precedence_and_associativity_are_those_of_arithmetic(rest, first):
    # Reference: fold the products first, then the sums, from left to right.
    terms, signs = [Fraction(first)], [1]
    for operator, number in rest:
        if operator in "+-":
            terms.append(Fraction(number))
            signs.append(1 if operator == "+" else -1)
        else:
            terms[-1] = terms[-1] * number if operator == "*" else terms[-1] / number
    text = str(first) + "".join(f"{operator}{number}" for operator, number in rest)
    assert evaluate(text).value == sum(sign * term for sign, term in zip(signs, terms, strict=True))


@unhurried
@given(st.one_of(st.text(max_size=40), st.text("0123456789+-*/()= <answer>", max_size=60)), st.booleans())
def test_gold_is_one_of_three_values_for_any_text(completion, finished):
    assert COUNTDOWN.gold({"numbers": [1, 2], "target": 3}, completion, finished) in (0.0, 0.1, 1.0)


@unhurried
@given(trees, st.integers(-5, 200))
def test_full_reward_means_the_target_and_every_number_once(tree, target):
    row = {"numbers": sorted(leaves(tree)), "target": target}
    gold = COUNTDOWN.gold(row, written(tree), True)
    try:
        assert gold == (1.0 if computed(tree) == target else 0.1)
    except ZeroDivisionError:
        assert gold == 0.0
    assert COUNTDOWN.gold({**row, "numbers": [*row["numbers"], 1]}, written(tree), True) == 0.0
