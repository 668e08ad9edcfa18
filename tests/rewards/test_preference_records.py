"""Keys of prompts and pairs."""

import hashlib
import json

import pytest

from rewards.preferences.records import Preference, join_keys, pair_key, prompt_key, response_key

USER = [{"role": "user", "content": "hi there"}]


def test_a_pair_has_one_key_in_both_orders_and_another_for_another_prompt():
    first = Preference("hi", "yes", "no")
    assert (
        first.key
        == Preference("hi", "no", "yes", margin=2.0, annotator="a").key
        == pair_key("hi", "no", "yes")
    )
    assert first.prompt_key == prompt_key("hi")
    assert first.key != Preference("ho", "yes", "no").key
    assert first.key != Preference("hi", "yes", "maybe").key


def test_the_keys_are_those_of_the_definition():
    # Written out by hand, so that keys stored with a model stay comparable.
    def sha(text):
        return hashlib.sha256(text.encode()).hexdigest()

    prompt = sha(json.dumps([{"content": "hi", "role": "user"}]))
    low, high = sorted((sha("yes"), sha("no")))
    assert prompt_key("hi") == prompt
    assert pair_key("hi", "yes", "no") == sha(f"{prompt}\n{low}\n{high}") == join_keys(prompt, high, low)


@pytest.mark.parametrize(
    "same", [USER, " hi  there\n", [{"content": "hi there", "role": "user"}], "hi\tthere"]
)
def test_white_space_and_the_form_do_not_make_another_prompt(same):
    assert prompt_key(same) == prompt_key("hi there")


@pytest.mark.parametrize(
    "other",
    ["Hi there", "hithere", [{"role": "system", "content": "hi there"}], [*USER, *USER], []],
)
def test_another_prompt_has_another_key(other):
    assert prompt_key(other) != prompt_key("hi there")


def test_white_space_counts_inside_a_response_and_not_around_it():
    assert response_key(" a b\n") == response_key("a b") != response_key("a  b")


def test_how_a_letter_is_composed_makes_no_other_text():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert prompt_key(composed) == prompt_key(decomposed) != prompt_key("cafe")
    assert response_key(composed) == response_key(decomposed) != response_key("cafe")


def test_texts_that_no_encoding_takes_have_keys():
    assert len(pair_key("\ud800", "\udfff", "")) == 64
