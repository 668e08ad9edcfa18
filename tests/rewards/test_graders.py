"""Built-in rewards: what counts as right, as wrong, and as a row that cannot be graded."""

from decimal import Decimal

import pytest

from rewards.base import RewardError, RewardRequest, Score
from rewards.build import build_reward, check_rewards, check_row, required_columns
from rewards.combined import CombinedReward, Part
from rewards.final_number import close, last_number
from rewards.settings import RewardSettings, TaskSettings


def request(completion, finished=True, **row):
    return RewardRequest("prompt", completion, row, finished)


def build(*tables, task=None, timeout_s=5.0):
    settings = [RewardSettings(**table) for table in tables]
    return build_reward(settings, task, timeout_s=timeout_s, memory_gib=4.0)


def score_one(table, completion, **row):
    reward = build(table)
    try:
        (answer,) = reward.score([request(completion, **row)])
    finally:
        reward.close()
    return answer


@pytest.mark.parametrize(
    ("completion", "answer", "ignore_case", "expected"),
    [
        ("  Paris\n", "Paris", False, 1.0),
        ("paris", "Paris", False, 0.0),
        ("paris", "Paris", True, 1.0),
        ("STRASSE", "Straße", True, 1.0),
        ("Paris!", "Paris", True, 0.0),
        ("", "Paris", True, 0.0),
        ("42", 42, False, 1.0),
    ],
)
def test_exact_match(completion, answer, ignore_case, expected):
    result = score_one({"kind": "exact", "ignore_case": ignore_case}, completion, answer=answer)
    assert result == Score(expected, {"exact": expected})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"no column 'answer' \(its columns: 'question'\)"),
        ({"answer": None}, "column 'answer' is None"),
        ({"answer": ["a"]}, "neither text nor a number"),
        ({"answer": True}, "neither text nor a number"),
        ({"answer": "  "}, "column 'answer' is empty"),
    ],
)
@pytest.mark.parametrize("kind", ["exact", "numeric"])
def test_a_row_without_a_usable_answer_is_an_error_not_a_zero(kind, row, message):
    result = score_one({"kind": kind}, "42", **row)
    assert isinstance(result, RewardError)
    assert result.reward == kind
    with pytest.raises(RewardError, match=message):
        raise result


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 7", "7"),
        ("first 3, then 12.", "12"),
        ("1,234.5 metres", "1234.5"),
        ("1,2,3", "3"),  # a list, not thousands
        ("1234,567", "567"),  # no thousands group either
        ("-3", "-3"),
        ("x=-3", "-3"),
        ("x = −4", "-4"),  # U+2212
        ("10-3", "3"),  # an operator after a digit
        ("(10)-3", "3"),
        ("10 - 3", "3"),
        ("3/4", "0.75"),
        ("-3/4", "-0.75"),
        (r"\frac{3}{4}", "0.75"),
        (r"so \boxed{\frac{1}{8}} of 12", "0.125"),
        (r"\boxed{1} or \boxed{12} in step 3", "12"),
        (r"\boxed{x} = 3", None),  # the box is the answer, and holds no number
        (r"\boxed{7", "7"),
        ("6.02e23", "6.02E+23"),
        ("1e-3", "0.001"),
        (".5", "0.5"),
        ("$1,000", "1000"),
        ("-$5", "-5"),
        ("none", None),
        ("", None),
        ("5/0", None),
        ("٣", None),  # an Arabic-Indic three is not read
        ("#### 72", "72"),
    ],
)
def test_last_number(text, number):
    found = last_number(text)
    assert found == (None if number is None else Decimal(number))


def test_numbers_of_any_size_compare_exactly_and_fast():
    # 2**53 + 1 equals 2**53 as a float; here the difference is 1.
    assert not close(Decimal(2**53 + 1), Decimal(2**53), 0.5)
    huge = last_number("1e999999999999")
    assert huge is None or not close(huge, Decimal(1), 1e-6)
    assert last_number("9" * 100_000) is not None
    assert last_number("1,111" * 20_000) is not None


@pytest.mark.parametrize(
    ("completion", "answer", "tolerance", "expected"),
    [
        ("so 0.3333333", "1/3", 1e-6, 1.0),  # differs by 3.3e-8
        ("so 0.333", "1/3", 1e-6, 0.0),  # differs by 3.3e-4
        ("so 0.333", "1/3", 1e-3, 1.0),
        ("41", "work, work #### 42", 1e-6, 0.0),
        ("42", "work, work #### 42", 1e-6, 1.0),
        ("42.0", 42, 0.0, 1.0),
        ("no idea", 42, 1e-6, 0.0),
        ("nan", 42, 1e-6, 0.0),
    ],
)
def test_numeric(completion, answer, tolerance, expected):
    result = score_one({"kind": "numeric", "tolerance": tolerance}, completion, answer=answer)
    assert result == Score(expected, {"numeric": expected})


def test_numeric_answer_without_a_number_is_an_error():
    result = score_one({"kind": "numeric", "answer_column": "gold"}, "42", gold="forty-two")
    assert isinstance(result, RewardError)
    assert result.reason == "the row's column 'gold' holds no number: 'forty-two'"


@pytest.mark.parametrize(
    ("pattern", "completion", "expected"),
    [
        (r"</answer>$", "x</answer>", 1.0),
        (r"</answer>$", "x</answer> ", 0.0),
        (r"answer: (\w+)", "the answer: blue", 1.0),
        (r"answer: (\w+)", "the answer: red", 0.0),
        (r"answer: (\w+)?", "the answer: !", 0.0),  # group 1 takes no part
    ],
)
def test_regex(pattern, completion, expected):
    result = score_one({"kind": "regex", "pattern": pattern}, completion, answer=" blue ")
    assert result == Score(expected, {"regex": expected})


def test_regex_with_a_group_needs_an_answer_and_without_one_does_not():
    without = score_one({"kind": "regex", "pattern": "b"}, "abc")
    assert without == Score(1.0, {"regex": 1.0})
    assert "no column 'answer'" in score_one({"kind": "regex", "pattern": "(b)"}, "abc").reason


def test_a_pattern_that_never_ends_is_an_error_and_the_next_call_works():
    reward = build({"kind": "regex", "pattern": r"^(a+)+$", "answer_column": "gold"}, timeout_s=1.0)
    try:
        hung, not_run = reward.score([request("a" * 60 + "b", gold="a"), request("a", gold="a")])
        (after,) = reward.score([request("a", gold="a")])
    finally:
        reward.close()
    assert hung.reason == "it did not answer within 1 s and was killed (scoring.reward_timeout_s)"
    assert not_run.reason.startswith("not run")
    assert after == Score(1.0, {"regex": 1.0})


def test_weighted_sum_has_every_raw_value_as_a_component():
    reward = build(
        {"kind": "exact", "weight": 2.0},
        {"kind": "numeric", "weight": -0.5, "name": "close", "tolerance": 10.0},
    )
    right, near, far = reward.score([request(text, answer="42") for text in ("42", "40", "0")])
    assert right == Score(2.0 * 1 - 0.5 * 1, {"exact": 1.0, "close": 1.0})
    assert near == Score(2.0 * 0 - 0.5 * 1, {"exact": 0.0, "close": 1.0})
    assert far == Score(0.0, {"exact": 0.0, "close": 0.0})


def test_one_error_leaves_the_other_requests_alone_and_asks_no_later_reward():
    class Recorder:
        label = "recorder"

        def __init__(self):
            self.seen = []

        def score(self, requests):
            self.seen += [r.completion for r in requests]
            return [Score(3.0, {"length": 1.0}) for _ in requests]

        def close(self):
            pass

    class OddOnes(Recorder):
        label = "odd"

        def score(self, requests):
            return [RewardError("odd", "bad") if r.completion == "b" else Score(1.0) for r in requests]

    recorder = Recorder()
    reward = CombinedReward([Part(1.0, OddOnes()), Part(2.0, recorder)])
    a, b, c = reward.score([request(text) for text in "abc"])
    assert a == c == Score(1.0 + 2.0 * 3.0, {"odd": 1.0, "recorder": 3.0, "recorder/length": 1.0})
    assert (b.reward, b.reason) == ("odd", "bad")
    assert recorder.seen == ["a", "c"]


def test_a_sum_that_overflows_is_an_error():
    reward = build({"kind": "exact", "weight": 1.7e308}, {"kind": "exact", "name": "b", "weight": 1.7e308})
    (answer,) = reward.score([request("x", answer="x")])
    assert isinstance(answer, RewardError)
    assert "inf" in answer.reason


def test_a_score_cannot_hold_what_is_not_finite():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number"):
            Score(bad)
        with pytest.raises(ValueError, match="length"):
            Score(0.0, {"length": bad})


def test_reward_error_survives_a_trip_between_processes():
    # Ray moves exceptions by pickle; this is its own data, made here.
    import pickle

    error = pickle.loads(pickle.dumps(RewardError("mine", "raised")))
    assert (error.reward, error.reason, str(error)) == ("mine", "raised", "reward 'mine': raised")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], r"add a \[\[reward\]\] table"),
        ([{"kind": "exact"}, {"kind": "exact"}], "reward.name = 'exact' is used twice"),
        ([{"kind": "exact", "name": "a b"}], "reward.name = 'a b'"),
        ([{"kind": "exact", "name": "missing_eos_penalty"}], "none of missing_eos_penalty"),
        ([{"kind": "exact", "name": "mean"}], "and none of .*mean"),  # `reward/mean` is the total's
        ([{"kind": "regex"}], "reward.pattern of 'regex' is missing"),
        ([{"kind": "regex", "pattern": "("}], r"reward.pattern = '\(' is not a regular expression"),
        ([{"kind": "exact", "pattern": "x"}], "reward.pattern = 'x' of 'exact' has no effect"),
        ([{"kind": "function"}], "reward.function of 'function' is missing"),
        ([{"kind": "exact", "function": "a:b"}], "reward.function = 'a:b' of 'exact' has no effect"),
        ([{"kind": "function", "function": "nocolon"}], "'module:function' or 'path/file.py:function'"),
        ([{"kind": "function", "function": "a-b:f"}], "'a-b' is no module name"),
        ([{"kind": "function", "function": "gone.py:f"}], "there is no file .*gone.py"),
        ([{"kind": "task"}], r"there is no \[task\] table"),
    ],
)
def test_settings_that_cannot_work_are_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        check_rewards([RewardSettings(**table) for table in tables], None)
    with pytest.raises(ValueError, match=message):
        build(*tables)


def test_a_reward_that_single_precision_cannot_square_is_an_error():
    class Huge:
        label = "huge"

        def score(self, requests):
            return [Score(value, {}) for value in (1e14, -1e16, 1e308)]

        def close(self):
            pass

    answers = CombinedReward([Part(10.0, Huge())]).score([request("x")] * 3)
    assert answers[0] == Score(1e15, {"huge": 1e14})
    assert [answer.reward for answer in answers[1:]] == ["reward", "reward"]
    assert "-1e+17, beyond ±1e+15; scale the reward" in answers[1].reason
    assert "is inf, beyond" in answers[2].reason


def test_the_task_reward_is_the_gold_reward():
    reward = build({"kind": "task"}, task=TaskSettings(kind="reversal"))
    good, cut, foreign = reward.score(
        [request("cba", answer="cba"), request("cb", finished=False, answer="cba"), request("x")]
    )
    assert good == Score(1.0, {"task": 1.0})
    assert cut.value == pytest.approx(2 / 3 - 0.2)
    assert foreign.reason.startswith("the row's column 'answer' is missing")


def test_required_columns():
    tables = [
        {"kind": "exact", "answer_column": "a"},
        {"kind": "numeric", "answer_column": "b"},
        {"kind": "regex", "pattern": "(x)", "answer_column": "c"},
        {"kind": "regex", "pattern": "x", "answer_column": "d"},
        {"kind": "function", "function": "m:f", "answer_column": "e"},
    ]
    assert required_columns([RewardSettings(**table) for table in tables]) == {"a", "b", "c"}


@pytest.mark.parametrize("kind", ["exact", "numeric", "regex"])
@pytest.mark.parametrize("answer", [True, False, ["a"], {"a": 1}, None, "", " ", "4", "x", 4, 0, -0.5])
def test_a_row_is_refused_exactly_where_the_grader_could_not_score_it(kind, answer):
    pattern = "(x)" if kind == "regex" else ""
    table = RewardSettings(kind=kind, pattern=pattern)
    graded = score_one({"kind": kind, "pattern": pattern}, "4", answer=answer)
    # By hand: only text that is not blank and numbers that are no flags; numeric wants a number in the text.
    fine = answer in ("4", "x", -0.5) or (type(answer) is int)
    fine = fine and not (kind == "numeric" and answer == "x")
    assert isinstance(graded, Score) == fine
    if fine:
        check_row([table], {"answer": answer})
    else:
        with pytest.raises(ValueError, match="column 'answer'"):
            check_row([table], {"answer": answer})


def test_a_row_is_judged_by_every_reward_that_reads_it():
    tables = [
        {"kind": "exact"},
        {"kind": "numeric", "answer_column": "number", "name": "n"},
        {"kind": "regex", "pattern": "no group", "answer_column": "unread"},
        {"kind": "function", "function": "m:f", "answer_column": "unread"},
    ]
    settings = [RewardSettings(**table) for table in tables]
    check_row(settings, {"answer": "a", "number": 1})
    with pytest.raises(ValueError, match="'number' holds no number: 'one'"):
        check_row(settings, {"answer": "a", "number": "one"})
