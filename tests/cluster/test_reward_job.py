"""A reward model's job: its configuration, its inputs, its evaluation, and whole runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import JobConfig
from cluster.config_file import ConfigError, dump_config, load_job, parse_config, parse_job
from cluster.job import run_job
from cluster.reward_job.account import account, warnings
from cluster.reward_job.config import RewardJobConfig
from cluster.reward_job.evaluation import evaluate_model
from cluster.reward_job.finish import FlatRewardError, normalisation
from cluster.reward_job.inputs import HELDOUT, TRAIN, PairSet, RewardInputs, prepare_reward_job
from cluster.run_folder import RunFolder
from learner.reward_module import Sequences
from learner.reward_training import PairData
from rewards.models.card import RewardCard, TextFormat, read_card, read_label_keys
from rewards.models.loading import load_reward_model
from rewards.preferences.records import prompt_key

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
objective = "reward_model"

[run]
epochs = 4
batch_size = 16
evaluate_every = 5
checkpoint_every = 5

[model.scratch]
hidden_size = 64
layers = 2
heads = 2
max_length = 32

[preferences]
train = "pairs.jsonl"
heldout_fraction = 0.25

[monitor]
console = "off"
wandb = "disabled"

[learner]
device = "cpu"
threads = 2

[optimizer]
lr = 2e-3
"""


def write_pairs(
    path: Path, count: int = 160, *, seed: int = 0, prompts: str = "bcdf"
) -> list[dict[str, Any]]:
    """Of two texts the one with more `a` was preferred; lengths are unrelated to it."""
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        texts = ["".join(draw.choice(list("aaxy"), int(draw.integers(3, 9)))) for _ in range(2)]
        gold = [text.count("a") for text in texts]
        if gold[0] == gold[1]:
            continue
        better, worse = sorted(range(2), key=lambda i: -gold[i])
        rows.append(
            {
                "prompt": "".join(draw.choice(list(prompts), 4)),
                "chosen": texts[better],
                "rejected": texts[worse],
                "chosen_gold": gold[better],
                "rejected_gold": gold[worse],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def parse(text: str = SMALL, *overrides: str) -> RewardJobConfig:
    config = parse_job(text, overrides)
    assert isinstance(config, RewardJobConfig)
    return config


# --- configuration ---------------------------------------------------------------------------------------


def test_the_objective_says_which_settings_there_are() -> None:
    config = parse(SMALL, "run.epochs=2", 'reward_model.loss="residual"')
    assert (config.run.epochs, config.reward_model.loss) == (2, "residual")
    assert parse(dump_config(config)) == config
    ppo = '[model]\npath = "m"\n[data]\ntrain = "d"\n[[reward]]\nkind = "exact"\n'
    assert isinstance(parse_job(ppo), JobConfig)
    with pytest.raises(ConfigError, match="no rollouts"):
        parse_config(SMALL)
    with pytest.raises(ConfigError, match=r"there is no such objective; use one of ppo, .*reward_model"):
        parse_job('objective = "rewards"')


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.epoch=2", "run.epoch = 2: there is no such setting; did you mean 'epochs'?"),
        ('model.path="x"', "model.path = 'x' give exactly one of"),
        ('reward_model.loss="bt"', "reward_model.loss = 'bt'"),
        ("reward_model.bootstrap=true", "bootstrap = true with members = 1"),
        ('evaluation.chosen_gold_column="g"', "evaluation.rejected_gold_column"),
        ("rollout.actors=2", "rollout = {'actors': 2}: there is no such setting"),
        ("learner.cpu_offload=true", "learner.cpu_offload = True needs learner.zero_stage 2 or 3"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(SMALL, override)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_true_rewards_of_two_responses_in_any_order_are_refused() -> None:
    choice = (
        'preferences.choice_column="better"',
        'preferences.choice_first="0"',
        'preferences.choice_second="1"',
    )
    gold = ('evaluation.chosen_gold_column="g"', 'evaluation.rejected_gold_column="h"')
    parse(SMALL, *choice)
    with pytest.raises(ConfigError, match=r"evaluation\.chosen_gold_column = 'g' is of the better response"):
        parse(SMALL, *choice, *gold)


def test_a_resume_may_not_change_what_is_learned(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    RunFolder(run_dir, parse(), resume=False).close()
    RunFolder(run_dir, parse(SMALL, "run.checkpoint_every=7"), resume=True).close()
    with pytest.raises(
        ConfigError, match=r"reward_model\.loss = 'classification', but the run was started with"
    ):
        RunFolder(run_dir, parse(SMALL, 'reward_model.loss="classification"'), resume=True)


def test_the_example_is_a_job() -> None:
    config = load_job(ROOT / "examples" / "reward_model.toml")
    assert isinstance(config, RewardJobConfig)
    assert (ROOT / config.preferences.train).is_file()


# --- inputs ----------------------------------------------------------------------------------------------


def prepare(folder: Path, *overrides: str, text: str = SMALL) -> RewardInputs:
    run_dir = folder / "run"
    run_dir.mkdir()
    return prepare_reward_job(parse(text, f'preferences.train="{folder}/pairs.jsonl"', *overrides), run_dir)


def test_pairs_become_numbered_sequences(tmp_path: Path) -> None:
    """Two pairs of one prompt share a response, which is one sequence; an over-long row is put aside."""
    rows = [
        {"prompt": "p", "chosen": "ab", "rejected": "a"},
        {"prompt": "p", "chosen": "ab", "rejected": "b"},
        {"prompt": "q", "chosen": "b", "rejected": "a" * 60},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_pairs(tmp_path / "heldout.jsonl", 4)
    text = SMALL.replace("heldout_fraction = 0.25", f'heldout = "{tmp_path}/heldout.jsonl"')
    inputs = prepare(tmp_path, text=text)
    data = inputs.data
    assert len(data.chosen) == 2
    assert data.chosen[0] == data.chosen[1]
    assert data.prompt == (0, 0)
    # <bos> p a b <eos>: ids 1 and 2 are special, and the length leaves the end token out.
    ids = data.sequences[data.chosen[0]]
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 5)
    assert data.lengths[data.chosen[0]] == 2
    assert inputs.quarantine.counts["over-long"] == 1
    assert inputs.pad_token_id == 0


def test_a_response_that_was_cut_off_gets_no_end_token(tmp_path: Path) -> None:
    """As a reward model is asked in use. Id 2 is <eos>; both sides, in training and held out."""
    cut = {"chosen": False, "rejected": True}, {"chosen": True, "rejected": False}
    rows = [{"prompt": "p", "chosen": "ab", "rejected": "a", "finished": cut[0]}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "heldout.jsonl").write_text(json.dumps(rows[0] | {"prompt": "q", "finished": cut[1]}) + "\n")
    text = SMALL.replace("heldout_fraction = 0.25", f'heldout = "{tmp_path}/heldout.jsonl"')
    inputs = prepare(tmp_path, text=text)
    for name, ends in ((TRAIN, (False, True)), (HELDOUT, (True, False))):
        pairs = inputs.sets[name]
        sides = pairs.chosen[0], pairs.rejected[0]
        assert tuple(inputs.data.sequences[side][-1] == 2 for side in sides) == ends
        assert tuple(inputs.data.lengths[side] for side in sides) == (2, 1)


def test_pairs_from_elsewhere_leave_out_what_is_trained_on(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "pairs.jsonl", 40)
    other = [*rows, {"prompt": "zz", "chosen": "a", "rejected": "x"}]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    inputs = prepare(tmp_path, f'evaluate=[{{name = "other", file = "{tmp_path}/other.jsonl"}}]')
    trained = set(inputs.sets[TRAIN].prompts)
    assert trained.isdisjoint(inputs.sets["other"].prompts)
    assert prompt_key("zz") in inputs.sets["other"].prompts
    assert inputs.quarantine.counts["in training set"] > 0


def test_what_the_preferences_are_like_is_said_and_kept(tmp_path: Path) -> None:
    """Every longer response is chosen, every pair has a margin, and a file to evaluate on has a bad row."""
    rows = [{"prompt": f"p{n}", "chosen": "ab" * 3, "rejected": "a", "margin": 1.0} for n in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    far = [*({"prompt": one, "chosen": "a", "rejected": "b"} for one in ("f", "g")), {"prompt": "f"}]
    (tmp_path / "far.jsonl").write_text("".join(json.dumps(row) + "\n" for row in far))
    override = f'evaluate=[{{name = "far", file = "{tmp_path}/far.jsonl"}}]'
    inputs = prepare(tmp_path, override)
    said = warnings(inputs, parse(SMALL, override))
    assert len(said) == 2
    assert "may learn length" in said[0]
    assert f"{len(inputs.data.chosen)} of {len(inputs.data.chosen)} training pairs have a margin" in said[1]
    assert len(warnings(inputs, parse(SMALL, "reward_model.margin=true"))) == 1
    kept = account(inputs, parse(SMALL, override))
    assert kept["preferences"]["warnings"] == said
    assert "2 pairs used" in kept["preferences_elsewhere"]["far"]["sentences"][0]
    assert "1 × missing column (lines 3)" in kept["preferences_elsewhere"]["far"]["sentences"][1]


def test_a_wrong_model_or_file_is_one_message(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 20)
    text = (
        SMALL.split("[model.scratch]", maxsplit=1)[0]
        + '[model]\npath = "no/such/model"\n[preferences]\ntrain = "x"'
    )
    with pytest.raises(ValueError, match=r"model\.path = 'no/such/model'"):
        prepare_reward_job(parse(text), tmp_path)
    with pytest.raises(ValueError, match=r"evaluate\.file = 'no\.jsonl' \(name = 'far'\)"):
        prepare(tmp_path, 'evaluate=[{name = "far", file = "no.jsonl"}]')


# --- normalisation and evaluation ------------------------------------------------------------------------


def make_sets() -> tuple[PairData, dict[str, PairSet]]:
    """Training pairs over sequences 0–3, held out over 4–7, with lengths 1, 2, 3, 4 twice."""
    data = PairData(
        sequences=Sequences.of((n, n) for n in range(8)),
        lengths=(1, 2, 3, 4, 1, 2, 3, 4),
        chosen=(0, 2),
        rejected=(1, 3),
        margin=(0.0, 0.0),
        weight=(1.0, 1.0),
        prompt=(0, 1),
    )
    train = PairSet(chosen=[0, 2], rejected=[1, 3], prompts=["p", "q"], subsets=["", ""])
    heldout = PairSet(
        chosen=[4, 6],
        rejected=[5, 7],
        prompts=["r", "s"],
        subsets=["one", "two"],
        gold=[(1.0, 0.0), (1.0, 0.0)],
    )
    return data, {TRAIN: train, HELDOUT: heldout}


def stand_in(data: PairData, sets: dict[str, PairSet]) -> Any:
    class Inputs:
        pass

    inputs: Any = Inputs()
    inputs.data, inputs.sets = data, sets
    return inputs


def test_normalisation_is_over_the_training_responses_less_the_length_within_prompts() -> None:
    """Rewards 10 + L for prompt p (lengths 1, 2) and 20 + L for q (3, 4).

    Without residual: mean and std of (11, 12, 23, 24). With it the slope within prompts is 1, and what is
    left, (10, 10, 20, 20), has mean 15 and standard deviation 5.
    """
    data, sets = make_sets()
    raw = np.array([[11.0, 12.0, 23.0, 24.0, 7.0, 7.0, 7.0, 7.0]])
    slope, mean, std = normalisation(raw, stand_in(data, sets), residual=False)
    assert (slope, mean) == ([0.0], [17.5])
    assert std[0] == pytest.approx(np.sqrt(np.mean(np.square([6.5, 5.5, 5.5, 6.5]))))
    slope, mean, std = normalisation(raw, stand_in(data, sets), residual=True)
    np.testing.assert_allclose([*slope, *mean, *std], [1.0, 15.0, 5.0])
    with pytest.raises(FlatRewardError, match="the same reward"):
        normalisation(np.ones((1, 8)), stand_in(data, sets), residual=False)


def test_evaluation_of_two_held_out_pairs_by_hand() -> None:
    """Raw 2 over 0 is right, 1 over 1 a tie and so wrong: accuracy ½; mean loss (log(1+e⁻²) + log 2)/2."""
    data, sets = make_sets()
    raw = np.array([[0.0, 1.0, 2.0, 3.0, 2.0, 0.0, 1.0, 1.0]])
    card = RewardCard(
        kind="transformer",
        loss="bradley-terry",
        rule="mean",
        members=1,
        mean=[1.5],
        std=[2.0],
        length_slope=[0.0],
        text=TextFormat(max_length=8),
        labels=2,
    )
    found = evaluate_model(raw, card, data, sets, seed=0)
    heldout = found[HELDOUT]
    assert heldout["accuracy"]["value"] == 0.5
    assert heldout["log_likelihood"] == pytest.approx(-(np.log1p(np.exp(-2)) + np.log(2)) / 2)
    assert heldout["subsets"]["one"]["value"] == 1.0
    assert heldout["subsets"]["two"]["value"] == 0.0
    assert found[TRAIN]["accuracy"]["value"] == 0.0
    assert sorted(heldout["points"]) == [[1.0, 0.25], [2.0, -0.75], [3.0, -0.25], [4.0, -0.25]]
    assert json.loads(json.dumps(heldout, allow_nan=False)) == heldout


# --- whole runs ------------------------------------------------------------------------------------------


def start(folder: Path, run: str, *overrides: str, resume: bool = False) -> subprocess.Popen[str]:
    """`headrace train` in a process of its own."""
    (folder / "job.toml").write_text(SMALL)
    settings = [part for one in overrides for part in ("--set", one)]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "cluster.cli", "train", str(folder / "job.toml")),
            *("--run-dir", str(folder / run), *settings),
            *(["--resume"] if resume else []),
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def load_whole(folder: Path, *overrides: str) -> RewardJobConfig:
    config = load_job(folder / "job.toml", overrides)
    assert isinstance(config, RewardJobConfig)
    return config


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output, _ = process.communicate(timeout=170)
    assert process.returncode == code, output
    return output


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.integration
def test_a_transformer_learns_and_plain_transformers_give_its_scores(tmp_path: Path) -> None:
    """On two ranks; 120 pairs or so, told apart by a letter, are learned to far above chance."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = write_pairs(tmp_path / "pairs.jsonl")
    finish(start(tmp_path, "run", "learner.ranks=2", "learner.micro_batch_tokens=256"))
    run_dir = tmp_path / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["objective"]) == ("completed", "reward_model")
    assert summary["accuracy"] > 0.75
    page = (run_dir / "report.html").read_text()
    assert all(title in page for title in ("How good it is", "The preferences"))
    assert 'id="reliability"' in (run_dir / "report.html").read_text()
    metrics = rows_of(run_dir)
    assert [row["learner_step"] for row in metrics] == list(range(1, summary["steps"] + 1))
    assert metrics[-1]["loss/preference"] < metrics[0]["loss/preference"]

    folder = run_dir / "reward_model"
    card = read_card(folder)
    assert card.version == summary["reward_model_version"]
    assert read_label_keys(folder) < {prompt_key(row["prompt"]) for row in rows}
    assert not list(folder.rglob("*.bin"))
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model = load_reward_model(folder, micro_batch_tokens=64)
    items: list[Any] = [
        (row["prompt"], row[which], True) for row in rows[:12] for which in ("chosen", "rejected")
    ]
    texts = [prompt + response for prompt, response, _ in items]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        padded = plain(**batch).logits[:, 0].numpy()
        single = [float(plain(torch.tensor([one])).logits[0, 0]) for one in ids]
    ours = model.score(items)
    np.testing.assert_allclose(ours.raw[0], padded, atol=1e-5)
    np.testing.assert_allclose(ours.raw[0], single, atol=1e-5)
    backwards = load_reward_model(folder, micro_batch_tokens=4096).score(items[::-1])
    np.testing.assert_allclose(ours.value, backwards.value[::-1], atol=1e-5)


@pytest.mark.integration
def test_a_stopped_run_goes_on_to_the_same_model(tmp_path: Path) -> None:
    """Two members on embeddings: stopped by Ctrl-C in the middle and resumed, against one that was not."""
    write_pairs(tmp_path / "pairs.jsonl", 400)
    settings = (
        'reward_model.kind="embedding"',
        "reward_model.hidden_sizes=[32]",
        "reward_model.members=2",
        "reward_model.bootstrap=true",
        "run.epochs=16",
        "run.checkpoint_every=40",
        "run.evaluate_every=0",
    )
    stopped = start(tmp_path, "run", *settings)
    checkpoints = tmp_path / "run" / "checkpoints" / "latest.json"
    deadline = time.monotonic() + 120
    while not checkpoints.exists() and stopped.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    finish(stopped, 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    finish(start(tmp_path, "run", *settings, resume=True))
    finish(start(tmp_path, "whole", *settings))
    resumed, whole = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("run", "whole"))
    assert 40 <= summary["steps"] < resumed["steps"] == whole["steps"]
    cards = [read_card(tmp_path / run / "reward_model") for run in ("run", "whole")]
    np.testing.assert_allclose(cards[0].mean, cards[1].mean, rtol=1e-6)
    np.testing.assert_allclose(cards[0].std, cards[1].std, rtol=1e-6)
    assert cards[0].mean[0] != cards[0].mean[1]
    assert [row["learner_step"] for row in rows_of(tmp_path / "run")] == list(range(1, whole["steps"] + 1))
    items: list[Any] = [("bcdf", "aaax", True), ("bcdf", "xyxy", True)]
    first, second = (
        load_reward_model(tmp_path / run / "reward_model").score(items) for run in ("run", "whole")
    )
    np.testing.assert_allclose(first.members, second.members, atol=1e-5)
    assert first.value[0] > first.value[1]
    with pytest.raises(ConfigError, match="is finished"):
        run_job(load_whole(tmp_path, *settings), tmp_path / "run", resume=True)
