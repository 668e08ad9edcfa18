"""From annotations to preference rows: every line is accounted for, and training reads what comes out."""

import json
from pathlib import Path
from typing import Any

import pytest
from labelling_helpers import label, make_pair, read_rows, write_pairs, write_rows

from cluster.data_files import Quarantine
from cluster.labelling.merging import merge
from cluster.labelling.records import Annotation, Choice, Pair
from cluster.labelling.session import Session
from cluster.labelling.simulating import gold_of_pool, gold_of_task, simulate
from cluster.preferences.reading import load_preferences
from cluster.preferences.settings import PreferenceSettings
from rewards.preferences.annotator import SimulatedAnnotator
from rewards.tasks.reversal import ReversalTask

PAIRS = [make_pair(f"p{n}", f"x{n}", f"y{n}") for n in range(6)]
KEYS = [pair.key for pair in PAIRS]


def note(number: int, choice: Choice, annotator: str = "ann", **more: Any) -> Annotation:
    return Annotation(KEYS[number], choice, annotator, **more)


def test_every_line_is_accounted_for() -> None:
    lines = [
        note(0, "a", first="a"),
        note(1, "b", first="a", margin=0.5),
        note(2, "tie"),
        note(3, "skip"),
        note(0, "undo"),
        note(0, "b", first="b"),  # in place of what was undone
        note(1, "a", first="b"),  # changes ann's mind without undo
        Annotation("unknown", "a", "ann", line=8),
        note(4, "undo", line=9),  # nothing to undo
        note(1, "b", "bob", first="b"),  # bob disagrees: both labels stay
    ]
    rows, report = merge(PAIRS, [("one", lines[:6]), ("two", lines[6:])])
    assert [(row["chosen"], row["rejected"], row["annotator"], row.get("shown_first")) for row in rows] == [
        ("y0", "x0", "ann", "chosen"),
        ("x1", "y1", "ann", "rejected"),
        ("y1", "x1", "bob", "chosen"),
    ]
    assert (report.decided, report.ties, report.skips, report.undone, report.revised) == (3, 1, 1, 2, 1)
    assert (report.tie_keys, report.skip_keys) == ([KEYS[2]], [KEYS[3]])
    assert report.outside == ["two, line 8: pair unknown is not in the ranked file"]
    assert report.problems == ["two, line 9: undo, but nothing is chosen for the pair"]
    accounted = (
        report.undone + report.revised + len(report.outside) + report.ties + report.skips + report.decided
    )
    assert report.lines == len(lines) == accounted + len(report.problems)
    assert report.unlabelled == 2  # pairs 4 and 5
    assert report.by_annotator == {"ann": {"decided": 2, "ties": 1, "skips": 1}, "bob": {"decided": 1}}


def test_the_share_of_what_was_shown_first_has_wilsons_interval() -> None:
    _, report = merge(PAIRS, [("one", [note(n, "a", first="a" if n < 4 else "b") for n in range(5)])])
    # 4 of 5, z = 1.96: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    # = (.8 + .384146 ± 1.959964·√(.032 + .038415)) / 1.768292 = (1.184146 ± .520090) / 1.768292
    assert report.shown_first_chosen == 0.8
    assert report.shown_first_ci95 == pytest.approx([0.375536, 0.963774], abs=1e-5)


def test_columns_of_the_pool_come_along_without_changing_what_a_preference_says() -> None:
    row = {"answer": 7, "weight": "heavy", "margin": -1, "subset": ["no name"], "key": "mine"}
    pair = make_pair("p", "x", "y", a={"gold": 1.0, "finished": False}, b={"gold": 2.0}, row=row)
    made = merge([pair], [("one", [Annotation(pair.key, "b", "ann", margin=0.5)])])[0][0]
    assert made == {
        "prompt": "p",
        "chosen": "y",
        "rejected": "x",
        "annotator": "ann",
        "margin": 0.5,
        "key": pair.key,
        "rule": "random",
        "finished": {"chosen": True, "rejected": False},
        "gold_chosen": 2.0,
        "gold_rejected": 1.0,
        "answer": 7,
        "pool_weight": "heavy",
        "pool_margin": -1,
        "pool_subset": ["no name"],
        "pool_key": "mine",
    }


def test_from_a_pool_to_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": f"p{n}", "responses": ["good", "bad", "ugly"], "gold": [2, 1, 0]} for n in range(10)]
    rows.append({"prompt": chat, "responses": ["good", "bad"], "gold": [2, 1], "answer": "x"})
    source = write_rows(tmp_path / "pool.jsonl", [*rows, {"prompt": "p", "responses": None}])
    ranked, notes, out = (tmp_path / f"{name}.jsonl" for name in ("ranked", "notes", "preferences"))
    assert label("rank", source, "--count", 25, "--out", ranked) == 0
    assert label("simulate", ranked, "--temperature", 0, "--out", notes) == 0
    assert label("simulate", ranked, "--temperature", 0, "--out", notes) == 0  # nothing is left to do
    assert len(read_rows(notes)) == 25
    assert label("merge", ranked, notes, "--out", out) == 0
    said = capsys.readouterr()
    assert "1 rows were put aside (1 × missing column)" in said.err
    assert "25 pairs had one by simulated already" in said.out
    assert "25 decided, 0 ties and 0 skips" in said.out
    merged = read_rows(out)
    value = {"good": 2, "bad": 1, "ugly": 0}
    assert all(value[row["chosen"]] > value[row["rejected"]] for row in merged)
    # The keys are those of the reader's pairs, so what is labelled is recognised later.
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    data = load_preferences(PreferenceSettings(train=str(out)), quarantine)
    assert not quarantine.counts
    assert {pair.key for pair in (*data.train, *data.heldout)} == {row["key"] for row in merged}
    # What is labelled is not ranked again: 31 pairs in all, 6 are left.
    more = tmp_path / "more.jsonl"
    assert label("rank", source, "--labelled", out, "--out", more) == 0
    assert len(read_rows(more)) == 6
    assert not {row["key"] for row in read_rows(more)} & {row["key"] for row in merged}
    # And merging twice writes no label twice.
    assert label("simulate", more, "--out", tmp_path / "notes2.jsonl") == 0
    both = write_rows(tmp_path / "both.jsonl", [*read_rows(ranked), *read_rows(more)])
    final = tmp_path / "final.jsonl"
    assert label("merge", both, notes, tmp_path / "notes2.jsonl", "--existing", out, "--out", final) == 0
    assert read_rows(final)[:25] == merged
    assert len({row["key"] for row in read_rows(final)}) == len(read_rows(final)) == 31
    report = json.loads((tmp_path / "final.report.json").read_text())
    assert (report["existing"], report["present"], report["decided"]) == (25, 25, 31)


def test_a_ranked_file_with_choices_in_it_is_an_annotations_file(tmp_path: Path) -> None:
    ranked = write_pairs(tmp_path / "ranked.jsonl", PAIRS)
    filled = write_rows(tmp_path / "filled.jsonl", [row | {"choice": "b"} for row in read_rows(ranked)[:2]])
    assert label("merge", ranked, filled, "--out", tmp_path / "out.jsonl") == 0
    assert [row["chosen"] for row in read_rows(tmp_path / "out.jsonl")] == ["y0", "y1"]


def test_without_a_decided_pair_nothing_is_written(tmp_path: Path) -> None:
    ranked = write_pairs(tmp_path / "ranked.jsonl", PAIRS)
    notes = write_rows(tmp_path / "notes.jsonl", [note(0, "tie").to_json(), note(1, "skip").to_json(), 3])
    with pytest.raises(
        ValueError, match=r"no pair is decided \(1 ties, 1 skips, 0 lines .* 1 lines that cannot be used"
    ):
        label("merge", ranked, notes, "--out", tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.jsonl", "ranked.jsonl"]


# ---- the simulated annotator -------------------------------------------------------------------------------


def test_a_simulated_annotator_labels_by_gold_ties_and_is_repeatable() -> None:
    pairs: list[Pair] = []
    for n in range(400):
        pairs.append(make_pair(f"p{n}", f"x{n}", f"y{n}", a={"gold": 1.0}, b={"gold": 0.0}))
    sure = simulate(pairs, SimulatedAnnotator(temperature=0.0), gold_of_pool)
    assert {one.choice for one in sure} == {"a"}
    assert {one.first for one in sure} == {"a", "b"}
    noisy = simulate(pairs, SimulatedAnnotator(temperature=1.0), gold_of_pool)
    # P(a) = σ(1) = .731; 400 labels have a standard deviation of √(400·.731·.269) = 8.9; 5 of them are 44.
    assert abs(sum(one.choice == "a" for one in noisy) - 292) < 44
    assert simulate(pairs, SimulatedAnnotator(temperature=1.0), gold_of_pool) == noisy
    # The same whichever response is called a.
    swapped = [
        make_pair(pair.prompt, pair.b.text, pair.a.text, a={"gold": 0.0}, b={"gold": 1.0}) for pair in pairs
    ]
    other = simulate(swapped, SimulatedAnnotator(temperature=1.0), gold_of_pool)
    assert [one.choice == "a" for one in noisy] == [one.choice == "b" for one in other]
    ties = simulate(pairs, SimulatedAnnotator(), gold_of_pool, tie_within=1.5)
    assert {one.choice for one in ties} == {"tie"}
    # A bias of 2 a character for three characters more outweighs a gold difference of 1.
    longer = [make_pair(f"p{n}", "short", "longlong", a={"gold": 1.0}, b={"gold": 0.0}) for n in range(5)]
    biased = simulate(longer, SimulatedAnnotator(temperature=0.0, length_bias=2.0), gold_of_pool)
    assert {one.choice for one in biased} == {"b"}


def test_gold_of_a_task_is_its_own_and_missing_gold_is_told() -> None:
    gold = ReversalTask().gold
    row = {"answer": "ba"}
    pair = make_pair("ab>", "ba", "bb", a={"finished": False}, row=row)
    assert gold_of_task("reversal")(pair) == (gold(row, "ba", False), gold(row, "bb", True))
    with pytest.raises(ValueError, match="--task reversal: line 1 of the pool cannot be graded"):
        gold_of_task("reversal")(make_pair("ab>", "x", "y"))
    with pytest.raises(ValueError, match="has no gold rewards; give the pool a column gold"):
        gold_of_pool(make_pair("p", "x", "y"))
    with pytest.raises(ValueError, match="--tie-within -1"):
        simulate([], SimulatedAnnotator(), gold_of_pool, tie_within=-1.0)


# ---- the session -------------------------------------------------------------------------------------------


def test_a_session_goes_on_from_its_own_annotations_only() -> None:
    earlier = [note(0, "a"), note(1, "b", "bob"), note(2, "tie"), note(2, "undo"), note(4, "skip")]
    session = Session(PAIRS, "ann", earlier=[*earlier, Annotation("unknown", "a", "ann")])
    assert [pair.prompt for pair in session.remaining()] == ["p1", "p2", "p3", "p5"]
    assert session.done == 2
    undone = session.undo()
    assert undone is not None
    assert (undone.key, undone.choice) == (KEYS[4], "undo")
    assert session.current == PAIRS[4]
    assert (session.undo(), session.undo()) != (None, None)
    assert session.undo() is None
    assert [pair.prompt for pair in session.remaining()] == ["p0", "p4", "p1", "p2", "p3", "p5"]


def test_the_order_of_presentation_is_a_fair_coin_that_depends_on_the_annotator() -> None:
    pairs = [make_pair(f"p{n}", "x", "y") for n in range(400)]
    ann, bob, later = Session(pairs, "ann"), Session(pairs, "bob"), Session(pairs, "ann", seed=1)
    firsts = [[one.first(pair) for pair in pairs] for one in (ann, bob, later)]
    # 400 fair coins: 5 standard deviations are 50.
    assert all(abs(sum(one == "a" for one in row) - 200) < 50 for row in firsts)
    for row in firsts[1:]:
        assert abs(sum(x == y for x, y in zip(firsts[0], row, strict=True)) - 200) < 50
    assert firsts[0] == [Session(pairs, "ann").first(pair) for pair in pairs]
