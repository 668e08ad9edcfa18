"""From labels to a policy as a job: its configuration, its inputs, whole runs and their resumption."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config_file import ConfigError, dump_config, load_job, parse_job
from cluster.data_files import Quarantine
from cluster.job import run_job
from cluster.metrics import lookup
from cluster.preference_job.config import PreferenceJobConfig
from cluster.preference_job.inputs import PreferenceInputs, doubts, prepare_preference_job
from cluster.preference_job.labelled import has_labels, load_labelled
from cluster.preferences.settings import PreferenceSettings
from cluster.run_folder import RunFolder
from learner.preference_batch import NONE
from learner.preference_settings import DPOSettings, KTOSettings

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
objective = "dpo"

[run]
epochs = 2
batch_size = 16
evaluate_every = 5
checkpoint_every = 5

[model.scratch]
hidden_size = 32
layers = 1
heads = 1
max_length = 32

[preferences]
train = "rows.jsonl"
heldout_fraction = 0.25

[warmup]
steps = 12
batch_size = 16
lr = 5e-3

[monitor]
console = "off"
wandb = "disabled"

[learner]
device = "cpu"

[optimizer]
lr = 3e-3
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pairs(count: int = 96) -> list[dict[str, Any]]:
    """Of two texts the one with more `a` was preferred."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        texts = ["".join(draw.choice(list("aaxy"), int(draw.integers(3, 8)))) for _ in range(2)]
        texts.sort(key=lambda text: -text.count("a"))
        if texts[0].count("a") > texts[1].count("a"):
            prompt = "".join(draw.choice(list("bcdf"), 4))
            rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    return rows


def parse(folder: Path, *overrides: str, text: str = SMALL) -> PreferenceJobConfig:
    config = parse_job(text, [f'preferences.train="{folder}/rows.jsonl"', *overrides])
    assert isinstance(config, PreferenceJobConfig)
    return config


def prepare(folder: Path, *overrides: str, rows: list[dict[str, Any]]) -> PreferenceInputs:
    write_rows(folder / "rows.jsonl", rows)
    run_dir = folder / "run"
    run_dir.mkdir()
    return prepare_preference_job(parse(folder, *overrides), run_dir)


# --- configuration ---------------------------------------------------------------------------------------


def test_the_objective_says_whose_table_there_is(tmp_path: Path) -> None:
    config = parse(tmp_path)
    assert config.method == DPOSettings()
    assert (config.ipo, config.kto, config.simpo) == (None, None, None)
    assert parse_job(dump_config(config)) == config
    assert parse(tmp_path, 'objective="kto"', "kto.beta=0.3").method == KTOSettings(beta=0.3)


def test_what_a_run_writes_down_is_the_same_job_again(tmp_path: Path) -> None:
    """Columns that nobody named are not required of the rows when the file is given to another run."""
    config = parse(tmp_path)
    again = parse_job(dump_config(config))
    write_rows(tmp_path / "rows.jsonl", make_pairs(24))
    (tmp_path / "run").mkdir()
    assert isinstance(again, PreferenceJobConfig)
    assert len(prepare_preference_job(again, tmp_path / "run").data.train) > 0
    named = parse_job(dump_config(parse(tmp_path, 'preferences.weight_column="weight"')))
    assert isinstance(named, PreferenceJobConfig)
    assert named.preferences.required("weight_column")
    scores = [f'preferences.{side}_score_column="{side}_score"' for side in ("chosen", "rejected")]
    scored = parse(tmp_path, "dpo.margin=true", *scores)
    assert parse_job(dump_config(scored)) == scored


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["ipo.tau=0.1"], "ipo = 'a table' has no part in objective = \"dpo\"; leave it out"),
        (["dpo.betta=1"], "dpo.betta = 1: there is no such setting; did you mean 'beta'?"),
        (["dpo.beta=0"], "dpo.beta = 0"),
        (["dpo.label_smoothing=0.5"], "dpo.label_smoothing = 0.5"),
        (['model.path="x"'], "model.path = 'x' give exactly one of"),
        (['model.critic="x"'], "model.critic = 'x' has no part"),
        (['model.reference="x"'], "model.reference = 'x' cannot have the vocabulary of [model.scratch]"),
        (["rollout.actors=2"], "rollout = {'actors': 2}: there is no such setting"),
        (['text.system_prompt="s"', 'text.apply_chat_template="never"'], "text.system_prompt = 's' needs"),
        (['objective="kto"', "kto.desirable_weight=0.0", "kto.undesirable_weight=0.0"], "nothing to learn"),
        (
            ['preferences.chosen_score_column="a"', 'preferences.rejected_score_column="b"'],
            "preferences.chosen_score_column = 'a' makes margins",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, *overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resume_may_not_change_what_is_learned(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    RunFolder(run_dir, parse(tmp_path), resume=False).close()
    RunFolder(run_dir, parse(tmp_path, "run.checkpoint_every=7"), resume=True).close()
    with pytest.raises(ConfigError, match=r"dpo\.beta = 0\.2, but the run was started with 0\.1"):
        RunFolder(run_dir, parse(tmp_path, "dpo.beta=0.2"), resume=True)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "simpo"])
def test_the_examples_are_jobs(name: str) -> None:
    config = load_job(ROOT / "examples" / f"{name}.toml")
    assert isinstance(config, PreferenceJobConfig)
    assert config.objective == name
    assert (ROOT / config.preferences.train).is_file()


# --- inputs ----------------------------------------------------------------------------------------------


def test_pairs_become_tokens_and_what_cannot_be_read_is_put_aside(tmp_path: Path) -> None:
    """32 tokens hold <bos>, a prompt of 4, a response and <eos>: one of 40 letters does not fit."""
    rows = make_pairs(20)
    rows += [{"prompt": "bcdf", "chosen": "a" * 40, "rejected": "x"}, {"prompt": "b", "chosen": "a"}]
    inputs = prepare(tmp_path, rows=rows)
    assert len(inputs.data.train) + len(inputs.heldout) == 20
    assert dict(inputs.quarantine.counts) == {"missing column": 1, "over-long": 1}
    responses, train = inputs.data.responses, inputs.data.train
    from cluster.prepare import load_tokenizer

    tokenizer = load_tokenizer(inputs.model_path)
    read = []
    for i in range(len(train)):
        prompt, chosen = responses[train.chosen[i]]
        same, rejected = responses[train.rejected[i]]
        assert prompt == same
        assert prompt[0] == tokenizer.bos_token_id
        assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
        read.append(tuple(tokenizer.decode(ids) for ids in (prompt[1:], chosen[:-1], rejected[:-1])))
    written = {(row["prompt"], row["chosen"], row.get("rejected")) for row in rows}
    assert set(read) <= written
    trained = {prompt for prompt, _, _ in read}
    heldout = {tokenizer.decode(responses[i][0][1:]) for i in inputs.heldout.chosen}
    assert not trained & heldout
    # The same response to the same prompt is one sequence, however many pairs it is in.
    numbers = {*train.chosen, *train.rejected, *inputs.heldout.chosen, *inputs.heldout.rejected}
    assert numbers == set(range(len(responses)))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_response_that_was_cut_off_gets_no_end_token(objective: str, tmp_path: Path) -> None:
    """Chosen responses have an a, rejected ones none; id 2 is <eos>. Every rejected one was cut off."""
    cut = {"finished": {"chosen": True, "rejected": False}}
    rows = [{"prompt": p, "chosen": "ab", "rejected": "b", **cut} for p in "bcdfxy"]
    inputs = prepare(tmp_path, f'objective="{objective}"', rows=rows)
    train, responses = inputs.data.train, inputs.data.responses
    assert {responses[number][1][-1] == 2 for number in train.chosen if number != NONE} == {True}
    assert {responses[number][1][-1] == 2 for number in train.rejected if number != NONE} == {False}


def test_a_single_response_may_be_cut_off_too(tmp_path: Path) -> None:
    rows = [row | {"finished": bool(row["label"])} for row in labelled_rows()]
    inputs = prepare(tmp_path, 'objective="kto"', rows=[*rows, rows[0] | {"finished": "no"}])
    assert inputs.quarantine.counts["wrong type"] == 1
    train, responses = inputs.data.train, inputs.data.responses
    assert all(responses[number][1][-1] == 2 for number in train.chosen if number != NONE)
    assert all(responses[number][1][-1] != 2 for number in train.rejected if number != NONE)


def test_kto_takes_a_pair_as_two_responses(tmp_path: Path) -> None:
    inputs = prepare(tmp_path, 'objective="kto"', rows=make_pairs(20))
    train, responses = inputs.data.train, inputs.data.responses
    assert len(train) + len(inputs.heldout) == 40
    assert sum(number != NONE for number in train.chosen) == len(train) // 2
    for examples in (train, inputs.heldout):
        for i in range(len(examples)):
            (own,) = examples.sequences(i)
            mismatched = examples.mismatched[i]
            assert responses[mismatched][0] == responses[own][0]  # its prompt
            assert mismatched != own
    prompts = {tuple(responses[i][0]): set() for i in {*train.chosen, *train.rejected} - {NONE}}
    for i in {*train.chosen, *train.rejected} - {NONE}:
        prompts[tuple(responses[i][0])].add(tuple(responses[i][1]))
    trained = set().union(*prompts.values())
    matched = [responses[i] for i in train.mismatched]
    assert {tuple(response) for _, response in matched} <= trained
    # A response may have been written for two prompts, but hardly ever for just these.
    assert sum(tuple(r) in prompts[tuple(p)] for p, r in matched) <= len(matched) // 4
    assert {tuple(responses[i][1]) for i in inputs.heldout.mismatched} <= trained


def labelled_rows(count: int = 40) -> list[dict[str, Any]]:
    rows = []
    for i, pair in enumerate(make_pairs(count)):
        side = "chosen" if i % 3 else "rejected"
        prompt = pair["prompt"] + "bcdf"[i % 4]
        rows.append({"prompt": prompt, "completion": pair[side], "label": side == "chosen"})
    return rows


def test_kto_takes_single_responses_with_labels(tmp_path: Path) -> None:
    inputs = prepare(tmp_path, 'objective="kto"', rows=labelled_rows())
    train = inputs.data.train
    assert len(train) + len(inputs.heldout) + inputs.quarantine.counts.total() == 40
    good = sum(number != NONE for number in train.chosen)
    bad = sum(number != NONE for number in train.rejected)
    assert good + bad == len(train)
    assert good > bad > 0
    assert inputs.report is None
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="no good row"):  # not pairs
        prepare(other, rows=labelled_rows())


def test_labels_that_contradict_each_other_and_rows_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    base = [{"prompt": f"p{i}", "completion": "yes", "label": True} for i in range(8)]
    rows = [
        *base,
        {"prompt": "p0", "completion": "no", "label": 0},
        {"prompt": "p0", "completion": "yes", "label": False},  # against line 1, weight 1 each: neither stays
        {"prompt": "p1", "completion": "yes", "label": False, "weight": 0.5},  # weighs less than line 2
        {"prompt": "p2", "completion": " yes ", "label": True},  # the same as line 3
        {"prompt": "p3", "completion": "maybe", "label": 2},
        {"prompt": "p3", "completion": "", "label": True},
        {
            "prompt": [{"role": "user", "content": "p9"}],
            "completion": [{"role": "assistant", "content": "ok"}],
            "label": 1,
        },
    ]
    write_rows(path, rows)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    settings, kto = PreferenceSettings(train=str(path)), KTOSettings()
    assert has_labels(settings, kto, quarantine)
    found = load_labelled(settings, kto, quarantine)
    everything = {(str(one.prompt), one.completion, one.desirable) for one in (*found.train, *found.heldout)}
    expected = {(f"p{i}", "yes", True) for i in range(1, 8)} | {("p0", "no", False)}
    assert everything == expected | {("[{'role': 'user', 'content': 'p9'}]", "ok", True)}
    assert dict(quarantine.counts) == {
        "contradiction": 3,
        "duplicate": 1,
        "wrong label": 1,
        "empty response": 1,
    }
    assert not {one.prompt_key for one in found.train} & {one.prompt_key for one in found.heldout}
    with pytest.raises(ValueError, match=r'contradictions = "refuse", but .*lines 1 and 10'):
        load_labelled(settings.model_copy(update={"contradictions": "refuse"}), kto, quarantine)
    with pytest.raises(ValueError, match=r"preferences\.system_column = 's' has no effect"):
        load_labelled(settings.model_copy(update={"system_column": "s"}), kto, quarantine)


def test_labels_that_like_length_are_warned_of(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a long answer", "rejected": "short"} for i in range(60)]
    config = parse(tmp_path)
    assert "may learn length" in " ".join(doubts(prepare(tmp_path, rows=rows), config))
    even = [
        row if i % 2 else {**row, "chosen": "short", "rejected": "a long answer"}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "even").mkdir()
    assert list(doubts(prepare(tmp_path / "even", rows=even), config)) == []


def test_kto_needs_two_prompts_to_train_on(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": c, "label": c == "a"} for p in "bc" for c in "ax"]
    with pytest.raises(ValueError, match="to one prompt only"):
        prepare(tmp_path, 'objective="kto"', rows=rows)


# --- whole runs ------------------------------------------------------------------------------------------


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.integration
def test_a_run_learns_and_a_resumed_one_ends_the_same(tmp_path: Path) -> None:
    """DPO, and a run that was killed after its fifth update: its checkpoint is there, the rest is not."""
    write_rows(tmp_path / "rows.jsonl", make_pairs())
    whole = run_job(parse(tmp_path, "run.keep_checkpoints=9"), tmp_path / "whole")
    assert whole["status"] == "completed", whole["error"]
    # Before training the policy is its own reference: h = 0, so the loss is log 2.
    assert whole["heldout_loss_initial"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert whole["heldout_loss_final"] < whole["heldout_loss_initial"] - 0.02
    assert whole["heldout_accuracy"] > 0.6
    assert whole["heldout_margin"] > 0
    rows = rows_of(tmp_path / "whole")
    assert [row["learner_step"] for row in rows] == [float(step) for step in range(whole["steps"] + 1)]
    assert rows[-1]["preference/heldout_loss"] == whole["heldout_loss_final"]
    warmup = (tmp_path / "whole" / "warmup.jsonl").read_text().splitlines()
    assert json.loads(warmup[-1])["warmup/loss"] < json.loads(warmup[0])["warmup/loss"]
    assert all(lookup(name) is not None for row in rows for name in row)
    report = (tmp_path / "whole" / "report.html").read_text()
    assert all(f'id="preference_{name}"' in report for name in ("loss", "accuracy", "rewards", "logprobs"))
    assert "<h2>The preferences</h2>" in report

    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part, symlinks=True)
    for folder in (part / "checkpoints").glob("step_*"):
        if folder.name != "step_000005":
            shutil.rmtree(folder)
    resumed = run_job(parse(tmp_path), part, resume=True)
    assert resumed["status"] == "completed", resumed["error"]
    assert resumed["heldout_loss_final"] == pytest.approx(whole["heldout_loss_final"], abs=1e-9)
    assert [row["learner_step"] for row in rows_of(part)] == [row["learner_step"] for row in rows]

    from transformers import AutoModelForCausalLM

    folder = tmp_path / "whole" / "checkpoints" / f"step_{whole['steps']:06d}" / "policy"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32
    with pytest.raises(ConfigError, match="already has all of its"):
        run_job(parse(tmp_path), part, resume=True)


@pytest.mark.integration
def test_kto_on_two_ranks_against_a_reference_of_its_own(tmp_path: Path) -> None:
    """A policy after imitation, with the model from before it as the reference: h > 0 on what it imitated."""
    write_rows(tmp_path / "rows.jsonl", make_pairs())
    first = run_job(parse(tmp_path, "run.epochs=1"), tmp_path / "first")
    assert first["status"] == "completed", first["error"]
    policy = tmp_path / "first" / "checkpoints" / f"step_{first['steps']:06d}" / "policy"
    text = SMALL[: SMALL.index("[model.scratch]")] + SMALL[SMALL.index("[preferences]") :]
    write_rows(tmp_path / "rows.jsonl", labelled_rows(90))
    config = parse(
        tmp_path,
        'objective="kto"',
        f'model.path="{policy}"',
        f'model.reference="{tmp_path}/first/inputs/model"',
        "warmup.steps=0",
        "learner.ranks=2",
        text=text,
    )
    summary = run_job(config, tmp_path / "run")
    assert summary["status"] == "completed", summary["error"]
    first_row = rows_of(tmp_path / "run")[0]
    assert first_row["preference/heldout_reference_point"] > 0
    assert summary["heldout_loss_final"] < summary["heldout_loss_initial"]
