"""The order of pairs, the loss of a batch, and updates that ranks and micro-batches do not change."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import run_ranks
from tiny_learner import VOCABULARY, save_model

from cluster.scratch import build_tokenizer
from learner.reward_module import Sequences
from learner.reward_training import (
    PairData,
    batch_loss,
    batch_of,
    batches_an_epoch,
    bootstrap_weights,
    head_seed,
    relative_weights,
)
from learner.reward_worker import RewardJob, RewardLearner, write_classifier
from learner.settings import LearnerSettings, OptimizerSettings
from rewards.models.settings import RewardModelSettings
from rewards.models.transformer import choose_padding, load_classifier

LN2 = math.log(2.0)


# --- order and weights -----------------------------------------------------------------------------------


def test_every_epoch_trains_every_pair_once_in_an_order_of_its_own() -> None:
    """10 pairs in batches of at most 4: 3 batches of 3, 3 and 4."""
    assert batches_an_epoch(10, 4) == 3
    orders = []
    for member, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = [batch_of(3 * epoch + k, pairs=10, batch_size=4, seed=5, member=member) for k in range(3)]
        assert [len(batch) for batch in batches] == [3, 3, 4]
        orders.append([i for batch in batches for i in batch])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert batch_of(4, pairs=10, batch_size=4, seed=5, member=0) == orders[1][3:6]


def test_a_bootstrap_keeps_the_pairs_of_a_prompt_together() -> None:
    """Poisson(1) has mean 1 and variance 1: over 4,000 prompts both lie within 0.1 (5 standard errors)."""
    prompts = [n // 2 for n in range(8000)]
    weights = np.array(bootstrap_weights(prompts, seed=1, member=0))
    assert (weights[0::2] == weights[1::2]).all()
    assert weights.mean() == pytest.approx(1.0, abs=0.1)
    assert weights.var() == pytest.approx(1.0, abs=0.12)
    assert bootstrap_weights(prompts, seed=1, member=1) != weights.tolist()
    assert head_seed(1, 0) != head_seed(1, 1)


# --- the loss --------------------------------------------------------------------------------------------


def loss_of(settings: dict[str, Any], scores: list[float], **pairs: Any) -> float:
    values: dict[str, Any] = {"chosen": [0], "rejected": [1], "margin": [0.0], "weight": [1.0]}
    values |= {"lengths": [1] * len(scores)} | pairs
    tensor = torch.tensor([scores], dtype=torch.float64)
    loss, _ = batch_loss(tensor, RewardModelSettings(**settings), **values)
    return float(loss)


def test_losses_of_a_batch_by_hand() -> None:
    """σ(ln 3) = 3/4. Gap ln 3: −log 3/4; with a margin of ln 3: log 2; centring adds c·(r_w + r_l)²."""
    plain = {"centring": 0.0}
    gap = [math.log(3.0), 0.0]
    assert loss_of(plain, gap) == pytest.approx(-math.log(0.75))
    assert loss_of(plain, gap, margin=[math.log(3.0)]) == pytest.approx(-math.log(0.75))  # not asked for
    assert loss_of(plain | {"margin": True}, gap, margin=[math.log(3.0)]) == pytest.approx(LN2)
    assert loss_of({"centring": 0.5}, gap) == pytest.approx(-math.log(0.75) + 0.5 * math.log(3.0) ** 2)
    # Classification, each response by itself: ½(−log σ(ln 3) − log σ(−0)) = ½(−log ¾ + log 2).
    assert loss_of({"loss": "classification"}, gap) == pytest.approx(0.5 * (-math.log(0.75) + LN2))


def test_weights_are_relative_and_sequences_may_be_shared() -> None:
    """Pairs (0 over 1) with loss −log ¾ and (2 over 0) with gap 0, loss log 2; weights 3:1, also as 6:2."""
    scores = [math.log(3.0), 0.0, math.log(3.0)]
    pairs: dict[str, Any] = {"chosen": [0, 2], "rejected": [1, 0], "margin": [0.0] * 2}
    for weight in ([3.0, 1.0], [6.0, 2.0]):
        loss = loss_of({"centring": 0.0}, scores, weight=relative_weights(weight), **pairs)
        assert loss == pytest.approx((3 * -math.log(0.75) + LN2) / 4)
    assert loss_of({"centring": 0.0}, scores, weight=relative_weights([0.0, 0.0]), **pairs) == 0.0


@pytest.mark.parametrize("scale", [1e-300, 0.01, 1.0, 50.0, 8e307])
def test_what_a_pair_counts_does_not_hang_on_its_batch(scale: float) -> None:
    """Weights 0, 1, 2, of mean 1, in batches of one: losses 0·log 2, 1·log 2, 2·(−log ¾), whatever the scale.

    Their mean is the loss of all three in one batch. Figures are means within the batch all the same: the
    gap of the heaviest is ln 3, not twice that, and the batch without weight has none.
    """
    scores = torch.tensor([[math.log(3.0), 0.0, 0.0]], dtype=torch.float64)
    weight = relative_weights([0.0, 1.0 * scale, 2.0 * scale])
    chosen, rejected, expected = [1, 1, 0], [2, 2, 1], [0.0, LN2, -2 * math.log(0.75)]

    def of(pairs: list[int]) -> tuple[float, dict[str, float]]:
        loss, figures = batch_loss(
            scores,
            RewardModelSettings(centring=0.0),
            chosen=[chosen[i] for i in pairs],
            rejected=[rejected[i] for i in pairs],
            lengths=[1] * 3,
            margin=[0.0] * len(pairs),
            weight=[weight[i] for i in pairs],
        )
        return float(loss), figures

    alone = [of([i]) for i in range(3)]
    assert [loss for loss, _ in alone] == pytest.approx(expected)
    assert of([0, 1, 2])[0] == pytest.approx(sum(expected) / 3)
    assert alone[2][1]["preference/margin"] == pytest.approx(math.log(3.0))
    assert of([0, 1, 2])[1]["preference/margin"] == pytest.approx(2 * math.log(3.0) / 3)
    assert "preference/margin" not in alone[0][1]


# --- what is written -------------------------------------------------------------------------------------


def test_a_saved_model_pads_on_the_right_whatever_its_tokenizer_did(tmp_path: Path) -> None:
    """GPT-2 counts positions from a row's first place, so padding before a text would change its score."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer("abcdefgh", 32)
    tokenizer.padding_side = "left"
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    job = dataclasses.replace(
        make_job(str(tmp_path / "first"), micro_batch_tokens=64),
        pad_token_id=tokenizer.pad_token_id,
        vocabulary=len(tokenizer),
    )
    model = load_classifier(job.model_path, precision="float32", device="cpu", pad_token_id=job.pad_token_id)
    torch.nn.init.normal_(model.score.weight)
    saved = tmp_path / "saved"
    write_classifier(job, model, model.state_dict(), saved)

    plain = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    after = AutoTokenizer.from_pretrained(saved)
    assert (after.padding_side, after.pad_token_id) == ("right", tokenizer.pad_token_id)
    texts = ("a", "abcdefgh", "hgf")
    rows = [[*after(text)["input_ids"], after.eos_token_id] for text in texts]
    with torch.no_grad():
        single = [float(plain(torch.tensor([row])).logits[0, 0]) for row in rows]
        padded = plain(**after.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
        before = plain(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
    np.testing.assert_allclose(padded, single, atol=1e-5)
    assert np.abs(before.numpy() - single).max() > 0.1  # the first tokenizer's padding would show


def test_a_new_padding_token_beyond_the_embeddings_of_a_llama(tmp_path: Path) -> None:
    """Its embeddings know which token pads, and refuse one that they do not have."""
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer("abcdefgh", 32)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    folder, size = tmp_path / "first", len(tokenizer)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape)).save_pretrained(folder)
    pad = choose_padding(tokenizer)
    assert (pad, len(tokenizer)) == (size, size + 1)
    job = dataclasses.replace(
        make_job(str(folder), micro_batch_tokens=64), pad_token_id=pad, vocabulary=len(tokenizer)
    )
    model = load_classifier(folder, precision="float32", device="cpu", pad_token_id=pad)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.score.weight)
    write_classifier(job, model, model.state_dict(), tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1)
    with torch.no_grad():
        ((padded,), (single,)) = (
            plain(torch.tensor([row])).logits[0] for row in ([3, 4, 5, pad, pad], [3, 4, 5])
        )
    assert float(padded) == pytest.approx(float(single), abs=1e-6)


# --- ranks and micro-batches -----------------------------------------------------------------------------


def make_data(pairs: int = 9, seed: int = 0) -> PairData:
    draw = np.random.default_rng(seed)
    sequences = [
        tuple(int(i) for i in draw.integers(0, VOCABULARY, int(draw.integers(3, 12))))
        for _ in range(2 * pairs - 2)
    ]
    chosen = [*range(0, 2 * pairs - 2, 2), 0]  # the last pair is of responses that others have too
    rejected = [*range(1, 2 * pairs - 2, 2), 3]
    return PairData(
        sequences=Sequences.of(sequences),
        lengths=tuple(len(sequence) - 2 for sequence in sequences),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        margin=tuple(float(x) for x in draw.random(pairs)),
        weight=tuple(float(x) for x in draw.integers(1, 3, pairs)),
        prompt=tuple(range(pairs)),
    )


def make_job(path: str, *, micro_batch_tokens: int, **changes: Any) -> RewardJob:
    learner = {"micro_batch_tokens": micro_batch_tokens, "device": "cpu"} | changes.get("learner", {})
    return RewardJob(
        model_path=path,
        attention="sdpa",
        learner=LearnerSettings(**learner),
        optimizer=OptimizerSettings(lr=1e-3, critic_lr=3e-3),
        reward=RewardModelSettings(hidden_sizes=[7], **changes.get("reward", {})),
        seed=1,
        epochs=3,
        batch_size=5,
        pad_token_id=0,
        vocabulary=VOCABULARY,
    )


def train(rank: int, ranks: int, cases: list[tuple[RewardJob, PairData, str]], folder: str) -> list[Any]:
    """Each job for 4 updates of a member: (last metrics, scores); with one rank also a resume after 2."""
    results = []
    for number, (job, data, embeddings) in enumerate(cases):
        learner = RewardLearner(rank, ranks, job)
        learner.start("", 0)  # the group is there already
        learner.give_data(data, embeddings)
        learner.begin_member(1)
        rows = learner.update(2)
        saved = f"{folder}/{ranks}_{number}"
        learner.save(saved)
        rows += learner.update(2)
        scores = learner.score(list(range(len(data.sequences))))
        other = RewardLearner(rank, ranks, job)
        other.start("", 0)
        other.give_data(data, embeddings)
        other.begin_member(1)
        assert other.restore(saved) == 2
        other.update(2)
        again = other.score(list(range(len(data.sequences))))
        results.append((rows[-1], scores, again))
    return results


def first_update(rank: int, ranks: int, job: RewardJob, weights: list[tuple[float, ...]]) -> list[Any]:
    """Metrics of the first update with each of the weights."""
    found = []
    for weight in weights:
        learner = RewardLearner(rank, ranks, job)
        learner.start("", 0)
        learner.give_data(replace(make_data(3), weight=weight), "")
        learner.begin_member(0)
        found += learner.update(1)
    return found


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_on_one_pair_is_as_large_as_its_weight(ranks: int, tmp_path: Path) -> None:
    """Three pairs of mean weight 1 or ⅔ in batches of one; the first has weight 1, then 2, then 0."""
    job = replace(make_job(save_model(tmp_path / "model"), micro_batch_tokens=64), batch_size=1)
    (first,) = batch_of(0, pairs=3, batch_size=1, seed=job.seed, member=0)

    def weights(mine: float, *others: float) -> tuple[float, ...]:
        return (*others[:first], mine, *others[first:])

    cases = [weights(1.0, 1.0, 1.0), weights(2.0, 0.0, 1.0), weights(0.0, 1.0, 1.0)]
    once, twice, never = run_ranks(first_update, ranks, job, cases)[0]
    for name in ("loss/reward_model", "optimizer/grad_norm"):
        assert twice[name] == pytest.approx(2 * once[name], rel=1e-3)
        assert never[name] == 0.0 < once[name]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bradley-terry", {"reward": {"margin": True, "bootstrap": True, "members": 2}}),
    ("odin, ZeRO 3", {"reward": {"loss": "odin"}, "learner": {"zero_stage": 3}}),
    ("classification, ZeRO 2", {"reward": {"loss": "classification"}, "learner": {"zero_stage": 2}}),
    ("embedding", {"reward": {"kind": "embedding"}}),
]


@pytest.mark.integration
def test_ranks_and_micro_batches_change_neither_losses_nor_scores(tmp_path: Path) -> None:
    """One rank with all in one micro-batch, and two ranks with some sequences each in several."""
    from safetensors.torch import save_file

    path, data = save_model(tmp_path / "model"), make_data()
    table = str(tmp_path / "table.safetensors")
    rows = torch.randn((len(data.sequences), 6), generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": rows}, table)

    def cases(tokens: int) -> list[tuple[RewardJob, PairData, str]]:
        return [
            (
                make_job(
                    path, micro_batch_tokens=3 if name == "embedding" and tokens == 16 else tokens, **changes
                ),
                data,
                table,
            )
            for name, changes in CASES
        ]

    (alone,) = run_ranks(train, 1, cases(4096), str(tmp_path))
    together = run_ranks(train, 2, cases(16), str(tmp_path))
    for (name, _), one, rank_0, rank_1 in zip(CASES, alone, *together, strict=True):
        for key in ("loss/reward_model", "loss/preference", "preference/accuracy", "optimizer/grad_norm"):
            assert one[0][key] == pytest.approx(rank_0[0][key], rel=2e-3, abs=2e-5), f"{name}: {key}"
        np.testing.assert_allclose(one[1], rank_0[1], atol=2e-4, err_msg=name)
        assert rank_0[1] == rank_1[1], name
        assert np.ptp(one[1]) > 1e-3, name  # the comparison can fail
        for trained in (one, rank_0):
            np.testing.assert_allclose(trained[1], trained[2], atol=1e-6, err_msg=f"{name}: resume")
