"""Examples, packing, and updates that ranks and micro-batches do not change, against plain transformers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import run_ranks
from tiny_learner import VOCABULARY, save_model

from actors.packing import Pair
from learner.preference_batch import NONE, Examples, PreferenceData, Responses, measure, usual_weight
from learner.preference_settings import (
    DPOSettings,
    ImitationSettings,
    IPOSettings,
    KTOSettings,
    Method,
    SimPOSettings,
)
from learner.preference_training import pack_together, plan_parts, sequence_sums
from learner.preference_worker import PreferenceJob, PreferenceLearner
from learner.reward_module import Sequences
from learner.settings import LearnerSettings, ModelSettings, OptimizerSettings

LN3 = math.log(3.0)


def responses_of(pairs: list[Pair]) -> Responses:
    return Responses(
        Sequences.of([*prompt, *response] for prompt, response in pairs),
        np.array([len(prompt) for prompt, _ in pairs], np.int32),
    )


def pairs_of(chosen: list[int], rejected: list[int], **columns: Any) -> Examples:
    count = len(chosen)
    return Examples(
        tuple(chosen),
        tuple(rejected),
        tuple(columns.get("mismatched", ())),
        tuple(columns.get("margin", [0.0] * count)),
        tuple(columns.get("weight", [1.0] * count)),
    )


# --- figures ---------------------------------------------------------------------------------------------


def test_figures_of_pairs_by_hand() -> None:
    """log π = −2, −3, −1 and log π_ref = −3, −2, −1 make h = 1, −1, 0. β = ½.

    Pairs (0 over 1) and (1 over 2): βΔ = 1 and −½; one of two is right; rewards ½ and −½ against −½ and 0.
    """
    data = responses_of([([1], [2, 3]), ([1], [4]), ([5], [6])])
    examples = pairs_of([0, 1], [1, 2], margin=[0.5, 0.0], weight=[3.0, 1.0])
    logprobs, reference = {0: -2.0, 1: -3.0, 2: -1.0}, [-3.0, -2.0, -1.0]
    found = measure(DPOSettings(beta=0.5), data, examples, [0, 1], logprobs=logprobs, reference=reference)
    first, second = (math.log1p(math.exp(-gap)) for gap in (1.0, -0.5))
    assert found.loss == pytest.approx((3 * first + second) / 4)
    assert (found.better, found.worse) == ([1.0, -1.0], [-1.0, 0.0])
    assert found.figures == pytest.approx(
        {
            "preference/accuracy": 0.5,
            "preference/chosen_reward": 0.0,
            "preference/rejected_reward": -0.25,
            "preference/margin": 0.25,
            "preference/chosen_logprob": -2.5,
            "preference/rejected_logprob": -2.0,
        }
    )
    offset = DPOSettings(beta=0.5, margin=True)
    found = measure(offset, data, examples, [0], logprobs=logprobs, reference=reference)
    assert found.loss == pytest.approx(math.log1p(math.exp(-0.5)))
    # IPO on means: responses of 2, 1 and 1 tokens, so h/|y| = ½, −1, 0; aim 1/(2·¼) = 2.
    settings = IPOSettings(tau=0.25, average=True)
    found = measure(settings, data, examples, [0], logprobs=logprobs, reference=reference)
    assert found.loss == pytest.approx((1.5 - 2.0) ** 2)
    # SimPO: log π/|y| = −1, −3: 2·2 − ½ = 3½, whatever the reference.
    found = measure(SimPOSettings(beta=2.0, gamma=0.5), data, examples, [0], logprobs=logprobs, reference=[])
    assert found.loss == pytest.approx(math.log1p(math.exp(-3.5)))
    assert found.figures["preference/chosen_reward"] == -2.0


def test_figures_of_labelled_responses_by_hand() -> None:
    """h = ln 3 (good), −ln 3 (bad), and 0 and 2·ln 3 on mismatched prompts: z₀ = ln 3, β = 1.

    Good: 1 − σ(0) = ½ and not above z₀; bad: 1 − σ(2 ln 3) = 1/10, since e^{2 ln 3} = 9, and right.
    """
    data = responses_of([([1], [2]), ([3], [4]), ([1], [4]), ([3], [2])])
    examples = pairs_of([0, NONE], [NONE, 1], mismatched=[2, 3])
    assert [examples.sequences(i) for i in range(2)] == [[0], [1]]
    found = measure(
        KTOSettings(beta=1.0),
        data,
        examples,
        [0, 1],
        logprobs={0: LN3, 1: -LN3, 2: 0.0, 3: 2 * LN3},
        reference=[0.0] * 4,
    )
    assert found.loss == pytest.approx((0.5 + 0.1) / 2)
    assert found.figures["preference/reference_point"] == pytest.approx(LN3)
    assert found.figures["preference/accuracy"] == 0.5
    assert found.figures["preference/margin"] == pytest.approx(2 * LN3)


def test_a_labelled_response_of_weight_two_counts_as_two_for_the_reference_point_too() -> None:
    """Mismatched h = 0, 2·ln 3 and 5 with weights 2, 1 and 0: z₀ = (0 + 0 + 2·ln 3)/3.

    The loss and z₀ are those of the responses written out: the first twice, the last not at all.
    """
    data = responses_of([([1], [2]), ([3], [4]), ([1], [4]), ([3], [2]), ([3], [3])])
    weighted = pairs_of([0, NONE, 0], [NONE, 1, NONE], mismatched=[2, 3, 4], weight=[2.0, 1.0, 0.0])
    written_out = pairs_of([0, 0, NONE], [NONE, NONE, 1], mismatched=[2, 2, 3])
    logprobs, reference = {0: LN3, 1: -LN3, 2: 0.0, 3: 2 * LN3, 4: 5.0}, [0.0] * 5
    found, expected = (
        measure(KTOSettings(), data, examples, range(3), logprobs=logprobs, reference=reference)
        for examples in (weighted, written_out)
    )
    assert found.figures["preference/reference_point"] == pytest.approx(2 * LN3 / 3)
    assert expected.figures["preference/reference_point"] == pytest.approx(2 * LN3 / 3)
    assert found.loss == pytest.approx(expected.loss)


def test_a_batch_counts_by_its_weights_against_those_of_the_whole_set() -> None:
    """Batches of one example: their losses over the set add up to the weighted sum, whatever the scale."""
    light = pairs_of([0, 0, 0, 0], [1, 1, 1, 1], weight=[0.1, 0.1, 0.1, 0.1])
    mixed = pairs_of([0, 0, 0, 0], [1, 1, 1, 1], weight=[2.0, 1.0, 1.0, 0.0])
    assert [usual_weight(light, [i]) for i in range(4)] == pytest.approx([0.1] * 4)
    assert [usual_weight(mixed, [i]) for i in range(4)] == pytest.approx([1.0] * 4)
    assert usual_weight(mixed, [0, 3]) == pytest.approx(2.0)
    assert usual_weight(pairs_of([0], [1], weight=[0.0]), [0]) == 1.0  # the loss is 0 then


# --- packing ---------------------------------------------------------------------------------------------


def test_examples_share_micro_batches_that_have_room() -> None:
    """25 tokens hold 24 less padding: 20 + 4 and 13 + 9 fit, 30 stands alone."""
    assert plan_parts([9, 30, 4, 13, 20], 25) == [[1], [4, 2], [3, 0]]
    assert plan_parts([], 25) == []


def test_what_belongs_together_is_one_micro_batch_of_little_padding() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        sizes = draw.integers(1, 30, size=int(draw.integers(1, 12)))
        pairs = [([1] * int(size), [2] * int(draw.integers(1, 30))) for size in sizes]
        batch = pack_together(pairs)
        assert batch.real_tokens == sum(len(a) + len(b) for a, b in pairs)
        assert batch.real_tokens / batch.total_tokens >= 0.96
        sums = sequence_sums(torch.ones(len(batch.targets)), batch, len(pairs))
        assert sums.tolist() == [len(response) for _, response in pairs]


# --- updates ---------------------------------------------------------------------------------------------


def make_data(seed: int = 0, pairs: int = 7) -> PreferenceData:
    """Pairs of responses of 1 to 7 tokens, two of them sharing one; weights and margins differ."""
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return draw.integers(0, VOCABULARY, int(draw.integers(low, high))).tolist()

    prompts = [ids(1, 5) for _ in range(pairs)]
    prompts[1] = prompts[0]
    sequences: list[Pair] = [(prompt, ids(1, 8)) for prompt in prompts for _ in range(2)]
    sequences += [(prompts[i], sequences[2 * ((i + 2) % pairs)][1]) for i in range(pairs)]
    chosen, rejected = [2 * i for i in range(pairs)], [2 * i + 1 for i in range(pairs)]
    rejected[1] = rejected[0]
    mismatched = [2 * pairs + i for i in range(pairs)]
    columns = {"weight": [1.0, 2.0, *[1.0] * (pairs - 2)], "margin": [0.1] * pairs, "mismatched": mismatched}
    return PreferenceData(responses_of(sequences), pairs_of(chosen, rejected, **columns))


def labelled(data: PreferenceData) -> PreferenceData:
    """The same responses, one an example: good and bad in turn."""
    train = data.train
    good = [index if i % 2 == 0 else NONE for i, index in enumerate(train.chosen)]
    bad = [NONE if i % 2 == 0 else index for i, index in enumerate(train.rejected)]
    columns = {"weight": train.weight, "mismatched": train.mismatched}
    return PreferenceData(data.responses, pairs_of(good, bad, **columns))


METHODS: list[Method] = [
    DPOSettings(beta=0.5, label_smoothing=0.1, margin=True),
    IPOSettings(tau=0.2),
    SimPOSettings(),
    KTOSettings(beta=0.5, undesirable_weight=1.5),
]


def make_job(path: str, method: Method, **learner: Any) -> PreferenceJob:
    return PreferenceJob(
        model_path=path,
        reference_path="",
        model=ModelSettings(path=path),
        learner=LearnerSettings(**{"micro_batch_tokens": 4096, "device": "cpu"} | learner),
        optimizer=OptimizerSettings(lr=1e-3, max_grad_norm=1e6),
        warmup=ImitationSettings(steps=2, batch_size=4, lr=1e-3),
        method=method,
        seed=0,
        epochs=2,
        batch_size=4,
    )


def train(rank: int, world_size: int, jobs: list[PreferenceJob], folder: str) -> Any:
    """Each job from its start: (rows, reference, scores, weights); the last one saved and restored midway."""
    results = []
    for number, job in enumerate(jobs):
        data = make_data()
        if isinstance(job.method, KTOSettings):
            data = labelled(data)
        learner = PreferenceLearner(rank, world_size, job)
        learner.start("", 0)  # the group is there already
        learner.give_data(data)
        rows = learner.warmup_updates(2)
        learner.make_reference()
        rows += learner.update(2)
        if number == len(jobs) - 1:
            learner.save(folder)
            again = PreferenceLearner(rank, world_size, job)
            again.start("", 0)
            again.give_data(data)
            assert again.restore(folder) == 2
            assert again.reference() == learner.reference()
            learner = again
        rows += learner.update(2)
        assert learner.total_updates == 4  # 7 examples in batches of 4, twice
        engine = learner._ready()[0]
        weights = {
            name: tensor.numpy().copy() for name, tensor in engine.full_parameters(engine.module.model)
        }
        results.append((rows, learner.reference(), learner.score([0, 3, 5]), weights))
    return results


@pytest.mark.integration
def test_ranks_and_micro_batches_change_nothing(tmp_path: Path) -> None:
    """Every objective on one rank and on two, with one micro-batch or many, at ZeRO 0 and 3.

    The second batch of 3 examples, in parts of one each, leaves one rank short, which then runs dummies. The
    last job of each list is saved after two updates and goes on from there in a new learner.
    """
    path = save_model(tmp_path / "model")
    small = {"micro_batch_tokens": 16}
    one = [make_job(path, method) for method in METHODS]
    many = [make_job(path, method, **small) for method in METHODS]
    sharded = [make_job(path, METHODS[0], zero_stage=3, **small)]
    (alone,) = run_ranks(train, 1, [*one, *many], str(tmp_path / "alone"), timeout_s=200)
    together = run_ranks(train, 2, [*many, *sharded], str(tmp_path / "together"), timeout_s=200)
    expected = alone[: len(METHODS)]
    others = [alone[len(METHODS) :], *([*one_rank[: len(METHODS)]] for one_rank in together)]
    compared = [(e, o) for other in others for e, o in zip(expected, other, strict=True)]
    compared += [(expected[0], one_rank[-1]) for one_rank in together]
    for (rows, reference, scores, weights), (rows_2, reference_2, scores_2, weights_2) in compared:
        for number, (row, other) in enumerate(zip(rows, rows_2, strict=True)):
            # At the reference (row 2) h = 0 up to rounding, which alone decides who is ahead.
            unlike = {"memory/learner", "timing_s/learner_step", *(["preference/accuracy"] * (number == 2))}
            for key in row.keys() - unlike:
                assert row[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), key
        assert reference == pytest.approx(reference_2, abs=1e-4)
        assert scores == pytest.approx(scores_2, abs=1e-3)
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, weights_2[name], atol=5e-5, err_msg=name)
    # The first update begins at the reference: h = 0 there.
    rows = expected[0][0]
    assert rows[2]["preference/margin"] == pytest.approx(0.0, abs=1e-5)
    assert rows[-1]["loss/preference"] < rows[2]["loss/preference"]


def gradient_norm_by_hand(path: str, data: PreferenceData, members: list[int], beta: float) -> float:
    """Of DPO at the reference: ‖Σ −(β/2)·w·(∇log π_w − ∇log π_l)‖ / (n·mean w), by plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    total = torch.zeros(())
    for i in members:
        for index, sign in ((data.train.chosen[i], 1.0), (data.train.rejected[i], -1.0)):
            prompt, response = data.responses[index]
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            picked = torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)]
            total = total + sign * data.train.weight[i] * picked.sum()
    loss = -beta / 2 * total / (len(members) * sum(data.train.weight) / len(data.train.weight))
    loss.backward()
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def first_update(rank: int, world_size: int, job: PreferenceJob) -> Any:
    learner = PreferenceLearner(rank, world_size, job)
    learner.start("", 0)
    learner.give_data(make_data())
    learner.make_reference()
    reference = learner.reference()
    from learner.reward_training import batch_of

    return learner.update(1)[0], batch_of(0, pairs=7, batch_size=4, seed=0, member=0), reference


@pytest.mark.integration
def test_the_first_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    ((row, members, reference),) = run_ranks(first_update, 1, make_job(path, DPOSettings(beta=0.5)))
    assert row["optimizer/grad_norm"] == pytest.approx(
        gradient_norm_by_hand(path, make_data(), members, 0.5), rel=1e-4
    )
    assert row["loss/preference"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert len(reference) == 21
    assert max(reference) < 0
