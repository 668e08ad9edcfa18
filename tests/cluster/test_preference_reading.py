"""Preference files: duplicates, contradictions, the split by prompt, and what the report says of them."""

import dataclasses
import gzip
import itertools
import json
import math
import random

import pytest
from data_helpers import put_aside, write

from cluster.data_files import Quarantine
from cluster.preferences.reading import load_preferences
from cluster.preferences.settings import PreferenceSettings
from cluster.preferences.split import heldout_prompts, part_of
from rewards.preferences.annotator import Candidate, SimulatedAnnotator
from rewards.preferences.records import prompt_key

FILLING = [{"prompt": f"filling {i}", "chosen": "good", "rejected": "bad"} for i in range(40)]


def pair(prompt, chosen, rejected, **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def load(tmp_path, rows, **settings):
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl")
    file = write(tmp_path / "pairs.jsonl", rows)
    return load_preferences(PreferenceSettings(train=str(file), **settings), quarantine), quarantine


def texts(labels):
    return sorted((label.prompt, label.chosen, label.rejected) for label in labels)


# --- rows ------------------------------------------------------------------------------------------------


def test_every_line_is_accounted_for_with_its_number(tmp_path):
    rows = [
        *FILLING[:5],
        b"{broken",
        b"",
        pair("p", "same", "same"),
        FILLING[0],
        pair("p", "", "x"),
        {"prompt": "p", "chosen": "x"},
    ]
    data, quarantine = load(tmp_path, rows)
    assert put_aside(quarantine) == [
        (6, "not JSON"),
        (8, "identical responses"),
        (9, "duplicate"),
        (10, "empty response"),
        (11, "missing column"),
    ]
    (source,) = data.report.sources
    assert (source.lines, source.good, source.blank, sum(source.put_aside.values())) == (11, 5, 1, 5)
    assert source.first_lines["duplicate"] == [9]
    assert len(data.train) + len(data.heldout) == 5
    assert sorted(label.line for label in data.train + data.heldout) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", ["lines", "array", "folder"])
def test_packed_files_are_read(tmp_path, shape):
    text = json.dumps(FILLING) if shape == "array" else "".join(json.dumps(row) + "\n" for row in FILLING)
    folder = tmp_path / "helpful-base"
    folder.mkdir()
    file = folder / "train.jsonl.gz"
    file.write_bytes(gzip.compress(text.encode()))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    named = {"train": str(tmp_path), "subset": folder.name} if shape == "folder" else {"train": str(file)}
    data = load_preferences(PreferenceSettings(**named), quarantine)
    assert len(data.train) + len(data.heldout) == 40
    file.write_bytes(gzip.compress(text.encode())[:-30])
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz' cannot be read to its end .*download is whole"):
        load_preferences(PreferenceSettings(**named), quarantine)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_tables_of_conversations_are_read(tmp_path, suffix):
    import datasets

    def told(text):
        return [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": text}]

    rows = [{"chosen": told(f"4{n}"), "rejected": told("5"), "score": 1.5} for n in range(3)]
    rows += [{"chosen": [{"role": "user", "content": "x"}, *told("4")[1:]], "rejected": None, "score": None}]
    rows += [
        {"chosen": [{"role": "user", "content": "x"}, *told("4")[1:]], "rejected": told("y"), "score": 1}
    ]
    rows[-1]["rejected"][0] = {"role": "user", "content": "x"}
    table, file = datasets.Dataset.from_list(rows), tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        table.to_parquet(file)
    else:
        table.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    data = load_preferences(PreferenceSettings(train=str(file)), quarantine)
    assert sorted(label.chosen for label in data.train + data.heldout) == ["4", "40", "41", "42"]
    assert put_aside(quarantine) == [(4, "missing column")]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read after row 0"):
        load_preferences(PreferenceSettings(train=str(file)), quarantine)


def test_a_duplicate_is_the_same_label_of_the_same_annotator(tmp_path):
    rows = [
        *FILLING,
        pair("p", "a", "b", annotator="ada"),  # line 41
        pair("p", "a", "b", annotator="bob"),
        pair("p", "a", "b", annotator="ada"),  # again: a copy
        pair(" p", "a ", "b", annotator="bob"),  # again, but for white space
        pair("q", "a", "b", annotator="ada"),
    ]
    _, quarantine = load(tmp_path, rows)
    assert put_aside(quarantine) == [(43, "duplicate"), (44, "duplicate")]
    details = [json.loads(line)["detail"] for line in quarantine.path.read_text().splitlines()]
    assert details == ["the same label stands in line 41", "the same label stands in line 42"]


def test_composed_and_decomposed_letters_are_the_same_text_and_stay_as_they_are(tmp_path):
    """é as one character and as e with an accent."""
    one, two = "caf\u00e9", "cafe\u0301"
    rows = [
        *FILLING,
        pair(one, "oui", "non"),  # line 41
        pair(two, "oui", "non"),  # the same label
        pair(two, "oui", one),  # another pair of the same prompt
        pair(one, one, two),
        pair(one, two, "oui"),  # contradicts line 43
    ]
    data, quarantine = load(tmp_path, rows, contradictions="keep")
    assert put_aside(quarantine) == [(42, "duplicate"), (44, "identical responses")]
    assert data.report.findings.contradictory_lines == [(43, 45)]
    held = {label.line: label for label in data.train + data.heldout}
    assert len({held[line].prompt_key for line in (41, 43, 45)}) == 1
    assert (held[41].prompt, held[43].prompt, held[45].chosen) == (one, two, two)


def test_texts_that_stand_in_several_rows_are_held_once(tmp_path):
    rows = [pair("the same prompt", f"answer {i}", f"answer {i + 1}") for i in range(9)]
    data, _ = load(tmp_path, [*rows, *FILLING], heldout_fraction=0.02)
    mine = sorted((one for one in data.train if one.prompt == "the same prompt"), key=lambda one: one.line)
    assert len({id(one.prompt) for one in mine}) == 1
    assert all(one.rejected is other.chosen for one, other in itertools.pairwise(mine))


def test_a_source_without_a_pair_is_an_error_that_says_why(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"preferences.train = .* no good row \(2 × identical responses\), such as line 1: chosen",
    ):
        load(tmp_path, [pair("p", "x", "x"), pair("q", "x", "x")])
    with pytest.raises(ValueError, match=r"has no good row \(2 × contradiction\)"):
        load(tmp_path, [pair("p", "x", "y"), pair("p", "y", "x")])
    with pytest.raises(ValueError, match="only one distinct prompt"):
        load(tmp_path, [pair("p", "x", "y"), pair("p", "x", "z")])


def test_reading_stops_at_the_wanted_number_of_rows(tmp_path):
    data, _ = load(tmp_path, FILLING, max_rows=7)
    assert len(data.train) + len(data.heldout) == 7


# --- contradictions --------------------------------------------------------------------------------------

DISPUTED = [
    *FILLING,
    pair("p", "a", "b", annotator="ada"),  # 41: two against one
    pair("p", "a", "b", annotator="bob"),  # 42
    pair("p", "b", "a", annotator="cyd"),  # 43
    pair("q", "a", "b"),  # 44: one against one
    pair("q", "b", "a"),  # 45
    pair("r", "b", "a", annotator="ada"),  # 46: one against one of more weight
    pair("r", "a", "b", annotator="ada", weight=3.0),  # 47
]


@pytest.mark.parametrize(
    ("policy", "aside"),
    [("majority", [43, 44, 45, 46]), ("put-aside", [41, 42, 43, 44, 45, 46, 47]), ("keep", [])],
)
def test_contradictions_are_settled_by_the_policy_and_told_with_their_lines(tmp_path, policy, aside):
    data, quarantine = load(tmp_path, DISPUTED, contradictions=policy)
    assert put_aside(quarantine) == [(line, "contradiction") for line in aside]
    assert len(data.train) + len(data.heldout) == 47 - len(aside)
    findings = data.report.findings
    assert findings.contradictory_lines == [(41, 43), (44, 45), (46, 47)]
    assert (findings.contradictory.value, findings.contradictory.units) == (pytest.approx(3 / 43), 43)
    assert findings.self_contradictions == 1  # ada, on r
    said = " ".join(data.report.sentences())
    assert "3 pairs stand in both orders" in said
    assert "lines 41 and 43, 44 and 45, 46 and 47" in said


def test_contradictions_can_be_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"3 pairs stand in both orders \(lines 41 and 43, 44 and 45, 46 and 47\)"
    ):
        load(tmp_path, DISPUTED, contradictions="refuse")


def test_rows_of_nobody_named_vote_though_copies_are_put_aside(tmp_path):
    # Two rows say a, one says b; the second a is a copy in training, but a vote in the dispute.
    rows = [*FILLING, pair("q", "b", "a"), pair("q", "a", "b"), pair("q", "a", "b")]
    data, quarantine = load(tmp_path, rows)
    assert put_aside(quarantine) == [(43, "duplicate"), (41, "contradiction")]
    assert ("q", "a", "b") in texts(data.train + data.heldout)
    assert data.report.findings.agreement.pairs == 0  # whether they are opinions or copies is not known


@pytest.mark.parametrize(
    ("repeated", "copies", "single", "doubted"),
    [
        (300, 0, 40, True),  # nearly every pair stands in both orders
        (300, 300, 4000, True),  # few do, but as many stand twice in one: coin flips
        (300, 0, 4000, False),  # none stands twice in one: copies were taken out before
        (100, 300, 0, False),
    ],
)
def test_rows_of_nobody_named_that_contradict_each_other_are_a_doubt(
    tmp_path, repeated, copies, single, doubted
):
    rows = [pair(f"single {i}", "good", "bad") for i in range(single)]
    rows += [pair(f"both {i}", *order) for i in range(repeated) for order in ("ab", "ba")]
    rows += [pair(f"copy {i}", "good", "bad") for i in range(copies) for _ in range(2)]
    report = load(tmp_path, rows, contradictions="keep")[0].report
    assert report.findings.unnamed.pairs == repeated + copies
    told = [text for text in report.doubts if "without an annotator" in text]
    assert len(told) == len(report.doubts) == doubted


def test_rows_of_nobody_named_are_one_opinion_beside_named_ones(tmp_path):
    rows = [
        *FILLING,
        pair("p", "a", "b"),
        pair("p", "a", "b"),  # a copy of that, or a second opinion
        pair("p", "a", "b", annotator="ada"),
        pair("p", "b", "a", annotator="bob"),
        pair("q", "a", "b"),
        pair("q", "b", "a"),  # either way: no opinion of q
        pair("q", "b", "a", annotator="ada"),
        pair("q", "b", "a", annotator="bob"),
    ]
    agreed = load(tmp_path, rows, contradictions="keep")[0].report.findings.agreement
    # p: two of three alike, of three pairs of labels one agrees; q: both of two.
    assert (agreed.pairs, agreed.labels, agreed.raw.value) == (2, 5, pytest.approx((1 / 3 + 1) / 2))


# --- split -----------------------------------------------------------------------------------------------


def many(count, each=3):
    return [pair(f"prompt {i}", f"good {j}", f"bad {j}") for i in range(count) for j in range(each)]


def test_no_prompt_is_in_both_in_whatever_form_and_order(tmp_path):
    rows = many(200)
    for row in rows[::3]:  # every prompt once more, as chat messages
        row["prompt"] = [{"role": "user", "content": row["prompt"] + " "}]
    data, _ = load(tmp_path, rows)
    sides = [{label.prompt_key for label in side} for side in (data.train, data.heldout)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0]) + len(sides[1]) == 200
    assert 8 <= len(sides[1]) <= 35  # a tenth of 200, standard deviation 4.2
    random.Random(0).shuffle(rows)
    again, _ = load(tmp_path, rows)
    assert {label.prompt_key for label in again.heldout} == sides[1]


def test_added_rows_move_no_prompt_to_the_other_side(tmp_path):
    before, _ = load(tmp_path, many(100))
    after, _ = load(tmp_path, many(300))
    known = {label.prompt_key for label in before.train + before.heldout}
    held = {label.prompt_key for label in after.heldout}
    assert held & known == {label.prompt_key for label in before.heldout}


def test_the_halves_are_disjoint_and_whole_and_share_the_held_out_prompts(tmp_path):
    whole, _ = load(tmp_path, many(200))
    a, _ = load(tmp_path, many(200), part="a")
    b, _ = load(tmp_path, many(200), part="b")
    assert texts(a.train + b.train) == texts(whole.train)
    assert {one.prompt_key for one in a.train}.isdisjoint(one.prompt_key for one in b.train)
    assert texts(a.heldout) == texts(b.heldout) == texts(whole.heldout)
    assert 60 <= len({one.prompt_key for one in a.train}) <= 120
    assert "half 'a' of the prompts" in " ".join(a.report.sentences())


def test_an_empty_half_is_an_error(tmp_path):
    rows = [one for one in many(60, each=1) if part_of(prompt_key(one["prompt"]), 0) == "b"][:4]
    with pytest.raises(ValueError, match=r"preferences.part = 'a' is empty: all 3 training prompts"):
        load(tmp_path, rows, part="a", heldout_fraction=0.001)


def test_a_file_of_held_out_pairs_is_kept_apart(tmp_path):
    file = write(
        tmp_path / "held.jsonl", [pair("prompt 3", "x", "y"), pair("prompt 3", "x", "y"), pair("z", "x", "y")]
    )
    data, quarantine = load(tmp_path, many(5, each=2), heldout=str(file))
    assert texts(data.heldout) == [("prompt 3", "x", "y"), ("z", "x", "y")]
    assert {one.prompt for one in data.train} == {f"prompt {i}" for i in (0, 1, 2, 4)}
    assert put_aside(quarantine) == [(2, "duplicate"), (7, "in held-out set"), (8, "in held-out set")]
    assert [source.field for source in data.report.sources] == ["preferences.train", "preferences.heldout"]


def test_at_least_one_prompt_is_on_either_side():
    keys = [f"{i:064x}" for i in range(5)]
    assert len(heldout_prompts(keys, 1e-12, 0)) == 1
    assert len(heldout_prompts(keys, 1 - 1e-12, 0)) == 4


# --- what the report says --------------------------------------------------------------------------------


def compared(prompts, responses, label, annotators=("",)):
    """Every pair of every prompt's responses; `label(prompt, i, j, annotator)` says whether i wins."""
    rows = []
    for prompt, who in itertools.product(range(prompts), annotators):
        for i, j in itertools.combinations(range(responses), 2):
            won, lost = (i, j) if label(prompt, i, j, who) else (j, i)
            rows.append(pair(f"p{prompt}", f"answer {won}", f"answer {lost}", annotator=who))
    return rows


def test_labels_of_one_scale_with_noise_raise_no_doubt(tmp_path):
    rng = random.Random(0)
    golds = [[rng.gauss(0, 1.5) for _ in range(6)] for _ in range(60)]
    people = {name: SimulatedAnnotator(seed=i) for i, name in enumerate(("ada", "bob", "cyd"))}

    def label(prompt, i, j, who):
        first, second = (Candidate(f"answer {k}", golds[prompt][k]) for k in (i, j))
        return people[who].prefers_first(f"p{prompt}", first, second)

    report = load(tmp_path, compared(60, 6, label, people))[0].report
    low, high = report.findings.expected_cycles
    assert low < report.findings.cycles.value < high
    assert report.findings.cycles.units == 60 * math.comb(6, 3)
    assert (report.doubts, report.warnings) == ([], [])


def test_coin_flips_are_found_out(tmp_path):
    rng = random.Random(0)
    rows = compared(60, 5, lambda *_: rng.random() < 0.5, ("ada", "bob"))
    doubts = load(tmp_path, rows)[0].report.doubts
    assert any("no more than coin flips" in doubt for doubt in doubts)
    assert any("as frequent as coin flips make them" in doubt for doubt in doubts)


def test_cycles_beyond_the_noise_are_found_out(tmp_path):
    # Rock, paper, scissors in every prompt, and two annotators who always agree.
    report = load(tmp_path, compared(60, 3, lambda _, i, j, __: (j - i) % 3 == 1, ("ada", "bob")))[0].report
    assert report.findings.cycles.value == 1.0
    assert any("more cycles" in doubt and "no single scale of reward" in doubt for doubt in report.doubts)


def test_a_file_joined_to_itself_does_not_make_ordinary_noise_a_doubt(tmp_path):
    """Copies would agree always, and then the cycles that noise of a fifth makes would be too many."""
    rng = random.Random(0)
    rows = compared(60, 4, lambda _, i, j, __: (i < j) == (rng.random() < 0.8))
    once, twice = load(tmp_path, rows)[0].report, load(tmp_path, rows + rows)[0].report
    assert once.findings.cycles.low > 0
    assert (once.findings.unnamed.pairs, twice.findings.unnamed.raw.value) == (0, 1.0)
    assert dataclasses.replace(twice.findings, unnamed=once.findings.unnamed) == once.findings
    assert (once.doubts, twice.doubts) == ([], [])


def test_differing_tastes_are_told_from_noise(tmp_path):
    # Each is consistent, each ranks by another rotation: a majority of them runs in circles (Condorcet).
    orders = {"ada": [0, 1, 2], "bob": [1, 2, 0], "cyd": [2, 0, 1]}

    def rows():
        for prompt in range(60):
            for i, j in itertools.combinations(range(3), 2):
                # One label a pair and annotator; whose stands first in the file differs from pair to pair.
                for who in random.Random(f"{prompt} {i} {j}").sample(sorted(orders), 3):
                    won, lost = (i, j) if orders[who].index(i) < orders[who].index(j) else (j, i)
                    yield pair(f"p{prompt}", f"answer {won}", f"answer {lost}", annotator=who)

    report = load(tmp_path, list(rows()), contradictions="keep")[0].report
    assert report.findings.cycles_within_annotators.value == 0
    assert any("their tastes differ" in doubt for doubt in report.doubts)


def test_an_annotator_who_reverses_the_labels_is_named(tmp_path):
    rows = compared(40, 4, lambda _, i, j, who: (i < j) != (who == "eve"), ("ada", "bob", "cyd", "eve"))
    report = load(tmp_path, rows)[0].report
    assert report.findings.checks[0].name == "eve"
    assert report.findings.checks[0].agrees.value == 0
    assert sum("Annotator" in doubt for doubt in report.doubts) == 1
    assert any("Annotator 'eve'" in doubt for doubt in report.doubts)


def test_a_bias_for_length_is_told(tmp_path):
    annotator, rng = SimulatedAnnotator(length_bias=0.3), random.Random(0)
    rows = []
    for i in range(400):
        first, second = (Candidate("x" * rng.randint(1, 20), 0.0) for _ in range(2))
        if first.text != second.text:
            label = annotator.label(f"p{i}", first, second)
            rows.append(pair(label.prompt, label.chosen, label.rejected))
    report = load(tmp_path, rows)[0].report
    assert report.findings.longer_chosen.low > 0.6
    assert "may learn length" in report.warnings[0]
    swapped = [pair(row["prompt"], row["rejected"], row["chosen"]) for row in rows]
    assert "may learn shortness" in load(tmp_path, swapped)[0].report.warnings[0]


def test_the_report_is_plain_json_and_says_what_it_cannot_tell(tmp_path):
    report = load(tmp_path, FILLING)[0].report
    told = json.loads(json.dumps(report.to_json()))
    assert told["train_pairs"] + told["heldout_pairs"] == 40
    assert told["findings"]["expected_cycles"] is None
    assert any("too few to say" in sentence for sentence in told["sentences"])
