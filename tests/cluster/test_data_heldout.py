"""What is held out, and demonstrations."""

from pathlib import Path
from typing import Any

import pytest
from data_helpers import GOOD, load, put_aside, write

from cluster.data import (
    Quarantine,
    load_demonstrations,
    split_heldout,
)


def test_the_split_is_by_prompt_and_depends_on_the_seed_only(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"p {n // 2}", "answer": str(n)} for n in range(40)]  # 20 prompts, each twice
    data, _ = load(tmp_path, tokenizer, write(tmp_path / "d.jsonl", list(rows)), heldout_fraction=0.25)
    train = {p.text for p in data.train.prompts}
    heldout = {p.text for p in data.heldout.prompts}
    assert len(heldout) == 5  # a quarter of 20 prompts, with both rows of each
    assert len(data.heldout.prompts) == 10
    assert not train & heldout
    assert len(data.train.prompts) + len(data.heldout.prompts) == 40

    backwards = write(tmp_path / "b.jsonl", list(reversed(rows)))
    again, _ = load(tmp_path, tokenizer, backwards, heldout_fraction=0.25)
    assert {p.text for p in again.heldout.prompts} == heldout
    other, _ = load(tmp_path, tokenizer, backwards, heldout_fraction=0.25, seed=1)
    assert {p.text for p in other.heldout.prompts} != heldout


def test_the_held_out_part_is_never_empty_nor_everything(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", [GOOD[0], GOOD[1]])
    for fraction in (0.01, 0.99):
        data, _ = load(tmp_path, tokenizer, file, heldout_fraction=fraction)
        assert (len(data.train.prompts), len(data.heldout.prompts)) == (1, 1)
    with pytest.raises(ValueError, match="only one distinct prompt"):
        load(tmp_path, tokenizer, write(tmp_path / "e.jsonl", [GOOD[0], GOOD[0]]))


def test_max_heldout_bounds_the_split(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"p {n}"} for n in range(30)]
    source, _ = load(tmp_path, tokenizer, write(tmp_path / "d.jsonl", list(rows)), max_heldout=4,
                     heldout_fraction=0.5)  # fmt: skip
    assert (len(source.heldout.prompts), len(source.train.prompts)) == (4, 26)
    assert split_heldout(source.train, 0.5, 100, 0).heldout.prompts


def test_training_rows_that_are_held_out_too_are_put_aside(tmp_path: Path, tokenizer: Any) -> None:
    train = write(tmp_path / "d.jsonl", list(GOOD))
    heldout = write(tmp_path / "h.jsonl", [GOOD[3], {"prompt": "new"}])
    data, quarantine = load(tmp_path, tokenizer, train, heldout=str(heldout))
    assert put_aside(quarantine) == [(4, "in held-out set")]
    assert "say four" not in {p.text for p in data.train.prompts}
    assert [p.id for p in data.heldout.prompts] == ["heldout:1", "heldout:2"]


def test_demonstrations_end_with_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any] | bytes] = [
        {"prompt": "ab", "completion": "ba"},
        {"prompt": "ab", "completion": [{"role": "assistant", "content": "c"}]},
        {"prompt": "ab", "completion": " "},
        {"prompt": "ab"},
        {"prompt": "ab", "completion": 4},
        {"prompt": "abc", "completion": "abcd"},  # 1 + 3 + 4 + 1 tokens: more than 8
        {"prompt": "abc", "completion": "abc"},  # 1 + 3 + 3 + 1 = 8
        b"\xff",
    ]
    quarantine = Quarantine(tmp_path / "q.jsonl")
    file = write(tmp_path / "d.jsonl", rows)
    pairs = load_demonstrations(file, tokenizer, 8, quarantine=quarantine)
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert pairs == [
        ((bos, a, b), (b, a, eos)),
        ((bos, a, b), (c, eos)),
        ((bos, a, b, c), (a, b, c, eos)),
    ]
    reasons = ["empty completion", "missing column", "wrong type", "over-long", "bad UTF-8"]
    assert put_aside(quarantine) == list(zip([3, 4, 5, 6, 8], reasons, strict=True))


def test_demonstrations_of_held_out_prompts_are_put_aside(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": prompt, "completion": "c"} for prompt in ("ab", "a", "ab")]
    quarantine = Quarantine(tmp_path / "q.jsonl")
    taken = frozenset({tuple(tokenizer("ab")["input_ids"])})
    file = write(tmp_path / "d.jsonl", list(rows))
    pairs = load_demonstrations(file, tokenizer, 8, quarantine=quarantine, taken=taken)
    assert [prompt for prompt, _ in pairs] == [tuple(tokenizer("a")["input_ids"])]
    assert put_aside(quarantine) == [(1, "in held-out set"), (3, "in held-out set")]


def test_demonstrations_without_a_good_row_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"warmup\.data = .*d\.jsonl.* \(1 × missing column\)"):
        load_demonstrations(file, tokenizer, 8, quarantine=Quarantine(tmp_path / "q.jsonl"))
