"""One row to one pair: every form that is read, every reason why one is not."""

import json

import pytest

from cluster.data_files import BadRow
from cluster.preferences.forms import REPLY_MARKS, parse_pair, shared_length
from cluster.preferences.settings import PreferenceSettings

HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
USER = {"role": "user", "content": "2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def bot(text):
    return {"role": "assistant", "content": text}


def parse(row, **settings):
    return parse_pair(row, 7, PreferenceSettings(train="x.jsonl", **settings))


GOOD = {
    "texts": ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?"),
    "prompt of messages": ({"prompt": [SYSTEM, USER], "chosen": "4", "rejected": "5"}, [SYSTEM, USER]),
    "replies as messages": ({"prompt": "2+2?", "chosen": [bot("4")], "rejected": [bot("5")]}, "2+2?"),
    "one reply a message": ({"prompt": "2+2?", "chosen": bot("4"), "rejected": "5"}, "2+2?"),
    "whole conversations": ({"chosen": [USER, bot("4")], "rejected": [USER, bot("5")]}, [USER]),
    "conversations and the prompt as text": (
        {"prompt": " 2+2? ", "chosen": [SYSTEM, USER, bot("4")], "rejected": [SYSTEM, USER, bot("5")]},
        [SYSTEM, USER],
    ),
    "conversations and a rendered prompt": (
        {"prompt": "<|user|>2+2?<|end|>", "chosen": [USER, bot("4")], "rejected": [USER, bot("5")]},
        [USER],
    ),
    "conversations and the prompt as messages": (
        {"prompt": [USER], "chosen": [USER, bot("4")], "rejected": [USER, bot("5")]},
        [USER],
    ),
    "only the prompt has the system message": (
        {"prompt": [SYSTEM, USER], "chosen": [USER, bot("4")], "rejected": [USER, bot("5")]},
        [SYSTEM, USER],
    ),
    "only the conversations have it": (
        {"prompt": [USER], "chosen": [SYSTEM, USER, bot("4")], "rejected": [SYSTEM, USER, bot("5")]},
        [SYSTEM, USER],
    ),
    "responses that go on from the prompt": (
        {"prompt": [USER], "chosen": [bot("?"), USER, bot("4")], "rejected": [bot("?"), USER, bot("5")]},
        [USER, bot("?"), USER],
    ),
    "ShareGPT names": (
        {
            "prompt": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        [USER],
    ),
    "contents in parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?", "image_url": None}]}],
            "chosen": [bot([{"type": "text", "text": "4"}, {"type": "text", "text": ""}])],
            "rejected": bot([{"type": "text", "text": "5"}]),
        },
        [USER],
    ),
    "null columns of Parquet structs": (
        {
            "chosen": [USER | {"name": None}, bot("4") | {"name": None}],
            "rejected": [USER | {"name": None}, bot("5") | {"name": None}],
        },
        [USER],
    ),
    "dialogues": ({"chosen": HH + "4", "rejected": HH + "5"}, HH),
    "dialogues that begin alike after the mark": ({"chosen": HH + "4", "rejected": HH + "4"[:0] + "5"}, HH),
    "dialogues beside their prompt": ({"prompt": HH, "chosen": HH + "4", "rejected": HH + "5"}, HH),
    "null prompt": ({"prompt": None, "chosen": HH + "4", "rejected": HH + "5"}, HH),
}


@pytest.mark.parametrize("form", GOOD)
def test_a_form_that_people_have_is_read(form):
    row, prompt = GOOD[form]
    label = parse(row)
    assert (label.prompt, label.chosen, label.rejected, label.line) == (prompt, "4", "5", 7)
    assert (label.margin, label.weight, label.annotator, label.subset, label.row) == (0.0, 1.0, "", "", None)


@pytest.mark.parametrize("mark", REPLY_MARKS)
def test_the_reply_begins_after_the_last_mark_that_both_share(mark):
    # The replies share their own beginning, "It is ", which stays with them.
    label = parse({"chosen": f"Q{mark}It is 4", "rejected": f"Q{mark}It is 5"})
    assert (label.prompt, label.chosen, label.rejected) == (f"Q{mark}", "It is 4", "It is 5")


def test_a_mark_of_ones_own():
    row = {"chosen": "Q => 4", "rejected": "Q => 5"}
    assert parse(row, reply_mark="=>").chosen == " 4"
    with pytest.raises(BadRow, match="no mark of a reply"):
        parse(row)


def test_replies_that_begin_with_an_ordinary_prompt_keep_it():
    # "hi" may well begin a reply to "hi"; only a prompt that ends with a mark is taken off.
    label = parse({"prompt": "hi", "chosen": "hi there", "rejected": "hi!"})
    assert (label.chosen, label.rejected) == ("hi there", "hi!")


def test_dialogues_become_messages_on_request():
    turns = [{"role": "user", "content": "hi"}, bot("hello"), USER]
    for row in (
        {"chosen": HH + " 4", "rejected": HH + " 5"},
        {"prompt": HH, "chosen": " 4", "rejected": " 5"},
    ):
        label = parse(row, dialogues="messages")
        assert (label.prompt, label.chosen, label.rejected) == (turns, "4", "5")


def test_a_system_column_comes_first_where_there_is_none():
    row = {"s": "Be brief.", "prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert parse(row, system_column="s").prompt == [SYSTEM, USER]
    other = {"role": "system", "content": "Be long."}
    assert parse(row | {"prompt": [other, USER]}, system_column="s").prompt == [other, USER]
    assert parse(row | {"s": None}, system_column="s").prompt == "2+2?"


ROW = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


def test_optional_columns_are_read_where_they_stand():
    label = parse(ROW | {"margin": 1, "weight": 0.5, "annotator": 12, "subset": "maths", "gold": 3})
    assert (label.margin, label.weight, label.annotator, label.subset) == (1.0, 0.5, "12", "maths")
    assert label.row is None
    assert parse(ROW | {"margin": None}).margin == 0.0
    off = parse(ROW | {"margin": "n/a", "weight": []}, margin_column="", weight_column="")
    assert (off.margin, off.weight) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("told", "read"),
    [
        (None, (True, True)),
        ({"chosen": True, "rejected": False}, (True, False)),
        ({"chosen": False}, (False, True)),
        ({"chosen": None, "rejected": False}, (True, False)),  # as a Parquet struct has it
    ],
)
def test_a_response_is_finished_unless_the_row_says_that_it_was_cut_off(told, read):
    label = parse(ROW | {"finished": told})
    assert (label.chosen_finished, label.rejected_finished) == read
    renamed = parse(ROW | {"finished": "yes", "ends": told or {}}, finished_column="ends")
    assert (renamed.chosen_finished, renamed.rejected_finished) == read
    off = parse(ROW | {"finished": "yes"}, finished_column="")
    assert (off.chosen_finished, off.rejected_finished) == (True, True)


SHP = {
    "prompt_column": "history",
    "chosen_column": "human_ref_A",
    "rejected_column": "human_ref_B",
    "choice_column": "labels",
    "choice_first": 1,
    "choice_second": "0",
}


@pytest.mark.parametrize(
    ("value", "better"), [(1, "A"), (0, "B"), (1.0, "A"), ("0", "B"), (2, None), (True, None), (None, None)]
)
def test_a_column_says_which_of_two_responses_is_better(value, better):
    row = {
        "history": "2+2?",
        "human_ref_A": "of A",
        "human_ref_B": "of B",
        "labels": value,
        "score_A": 3 if better == "A" else 1,
        "score_B": 2,
        "finished": {"chosen": False, "rejected": True},
    }
    scores = {"chosen_score_column": "score_A", "rejected_score_column": "score_B"}
    if better is None:
        with pytest.raises(BadRow, match=r"no choice: 'labels' is|missing column: 'labels' is null"):
            parse(row, **SHP)
        return
    before = json.dumps(row)
    label = parse(row, **SHP, **scores)
    worse = {"A": "B", "B": "A"}[better]
    assert (label.prompt, label.chosen, label.rejected) == ("2+2?", f"of {better}", f"of {worse}")
    assert label.margin == 1.0
    assert (label.chosen_finished, label.rejected_finished) == (
        (False, True) if better == "A" else (True, False)
    )
    assert json.dumps(row) == before
    with pytest.raises(BadRow, match="missing column: 'human_ref_B' is not among"):
        parse({name: row[name] for name in ("history", "human_ref_A", "labels")}, **SHP)


def test_values_that_only_look_wrong_are_read():
    label = parse(ROW | {"margin": " 1.5", "weight": "2", "annotator": 3.0, "subset": 4.0})
    assert (label.margin, label.weight, label.annotator, label.subset) == (1.5, 2.0, "3", "4")


@pytest.mark.parametrize(
    ("column", "value"), [("margin", "n/a"), ("weight", True), ("annotator", 3.5), ("finished", "yes")]
)
def test_a_column_that_means_something_else_need_not_be_read(column, value):
    with pytest.raises(BadRow, match=f'preferences.{column}_column = "" leaves the column unread'):
        parse(ROW | {column: value})
    assert parse(ROW | {column: value}, **{f"{column}_column": ""}).chosen == "4"


def test_columns_that_are_named_are_required():
    assert parse(ROW | {"m": 2.0}, margin_column="m", margin_scale=0.5).margin == 1.0
    assert parse(ROW | {"gold": 3, "other": 1}, keep_columns=["gold"]).row == {"gold": 3}
    for settings in ({"margin_column": "m"}, {"annotator_column": "annotator"}, {"keep_columns": ["gold"]}):
        with pytest.raises(BadRow, match="missing column"):
            parse(ROW, **settings)


def test_scores_give_the_margin_only_when_asked_for():
    row = ROW | {"score_chosen": 8.5, "score_rejected": 6}
    asked = {"chosen_score_column": "score_chosen", "rejected_score_column": "score_rejected"}
    assert parse(row).margin == 0.0
    assert parse(row, **asked, margin_scale=0.1).margin == pytest.approx(0.25)
    with pytest.raises(BadRow, match="scores contradict: chosen scores 5, rejected 6"):
        parse(row | {"score_chosen": 5}, **asked)


BAD = {
    "no chosen": ({"prompt": "x", "rejected": "5"}, "missing column"),
    "null rejected": ({"prompt": "x", "chosen": "4", "rejected": None}, "missing column"),
    "no prompt and no mark": ({"chosen": "It is 4", "rejected": "It is 5"}, "missing column"),
    "no prompt and only replies": ({"chosen": [bot("4")], "rejected": [bot("5")]}, "missing column"),
    "prompt a number": (ROW | {"prompt": 3}, "wrong type"),
    "prompt of blanks": (ROW | {"prompt": " \n"}, "empty prompt"),
    "prompt without messages": (ROW | {"prompt": []}, "empty prompt"),
    "dialogue without a prompt": (
        {"chosen": "\n\nAssistant: 4", "rejected": "\n\nAssistant: 5"},
        "empty prompt",
    ),
    "prompt ends with the assistant": (ROW | {"prompt": [bot("x")]}, "wrong type"),
    "chosen a number": (ROW | {"chosen": 4}, "wrong type"),
    "chosen without messages": (ROW | {"chosen": []}, "empty response"),
    "message without role": (ROW | {"chosen": [{"content": "4"}]}, "wrong type"),
    "message of parts": (ROW | {"chosen": [{"role": "assistant", "content": [1]}]}, "wrong type"),
    "message a text": (ROW | {"chosen": ["4"]}, "wrong type"),
    "last message the user's": ({"chosen": [USER], "rejected": [USER, bot("5")]}, "wrong type"),
    "several turns": (
        {"chosen": [USER, bot("4")], "rejected": [USER, bot("5"), USER, bot("4")]},
        "several turns",
    ),
    "dialogues that part early": (
        {"chosen": HH + " 4", "rejected": HH + " 5\n\nHuman: sure?\n\nAssistant: no"},
        "several turns",
    ),
    "another prompt": (
        {"prompt": "3+3?", "chosen": [USER, bot("4")], "rejected": [USER, bot("5")]},
        "prompt disagrees",
    ),
    "other messages": (
        {
            "prompt": [{"role": "user", "content": "3+3?"}],
            "chosen": [USER, bot("4")],
            "rejected": [USER, bot("5")],
        },
        "prompt disagrees",
    ),
    "identical": (ROW | {"rejected": " 4\n"}, "identical responses"),
    "identical conversations": (
        {"chosen": [USER, bot("4")], "rejected": [USER, bot("4")]},
        "identical responses",
    ),
    "empty chosen": (ROW | {"chosen": ""}, "empty response"),
    "blank rejected": (ROW | {"rejected": " \n"}, "empty response"),
    "margin a text": (ROW | {"margin": "n/a"}, "wrong type"),
    "margin with marks between digits": (ROW | {"margin": "1_000"}, "wrong type"),
    "margin a text beyond floats": (ROW | {"margin": "1e999"}, "non-finite number"),
    "annotator a fraction": (ROW | {"annotator": 3.5}, "wrong type"),
    "part an image": (
        ROW | {"chosen": [{"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "wrong type",
    ),
    "margin a flag": (ROW | {"margin": True}, "wrong type"),
    "margin below zero": (ROW | {"margin": -1}, "negative margin"),
    "weight below zero": (ROW | {"weight": -0.5}, "negative weight"),
    "weight beyond floats": (ROW | {"weight": 10**400}, "non-finite number"),
    "annotator a list": (ROW | {"annotator": ["a"]}, "wrong type"),
    "finished a flag": (ROW | {"finished": True}, "wrong type"),
    "finished without flags": (ROW | {"finished": {"chosen": 1}}, "wrong type"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_cannot_be_used_says_why(kind):
    row, reason = BAD[kind]
    with pytest.raises(BadRow) as caught:
        parse(row)
    assert caught.value.reason == reason


def test_empty_responses_can_be_kept():
    assert parse(ROW | {"rejected": ""}, empty_responses="keep").rejected == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heldout": "h.jsonl", "heldout_fraction": 0.2}, "exclude each other"),
        ({"chosen_score_column": "s"}, r'preferences.rejected_score_column = "": margins need both'),
        (
            {"chosen_score_column": "s", "rejected_score_column": "t", "margin_column": "m"},
            "both give the margin",
        ),
        ({"chosen_column": "a", "rejected_column": "a"}, "is the chosen column too"),
        ({"choice_column": "c", "choice_first": "0"}, "choice_column = 'c' needs two different values"),
        ({"choice_column": "c", "choice_first": "0", "choice_second": "0"}, "needs two different values"),
        ({"choice_column": "c", "choice_first": "0", "choice_second": 0}, "needs two different values"),
        ({"choice_first": 0}, "choice_first = 0 says what .* and there is none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSettings(train="x.jsonl", **settings)


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "", 0), ("a", "", 0), ("ab", "abc", 2), ("abcd", "abXd", 2), ("x", "y", 0)],
)
def test_shared_length(first, second, length):
    assert shared_length(first, second) == shared_length(second, first) == length
