"""A discriminator on real engines: shards change nothing, it learns, a checkpoint goes on bit for bit."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import run_ranks
from tiny_learner import make_groups, save_model

from actors.records import Group
from learner.discriminator import DiscriminatorJob, DiscriminatorTrainer
from learner.settings import LearnerSettings, OptimizerSettings
from rewards.discriminator_settings import DiscriminatorSettings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def make_job(path: str, *, learner: dict[str, Any], **settings: Any) -> DiscriminatorJob:
    """Demonstrations that end in token 17, where random responses seldom do."""
    shown = [((n % 5, 3), (n % 7, 17)) for n in range(40)]
    return DiscriminatorJob(
        model_path=path,
        label="d",
        settings=DiscriminatorSettings(**settings),
        attention="sdpa",
        learner=LearnerSettings(**{"device": "cpu", "micro_batch_tokens": 24} | learner),
        optimizer=OptimizerSettings(lr=1.0),
        seed=0,
        demonstrations=tuple(shown[8:]),
        heldout=tuple(shown[:8]),
        probe=((1, 2, 3), (4, 4)),
    )


def scored(groups: list[Group], version: int) -> list[Group]:
    """The groups as if a discriminator of that version had scored them."""
    return [
        dataclasses.replace(
            group,
            trajectories=tuple(
                dataclasses.replace(t, components={"d": 0.0, "d/version": float(version)})
                for t in group.trajectories
            ),
        )
        for group in groups
    ]


def weights(trainer: DiscriminatorTrainer) -> dict[str, Any]:
    engine = trainer._engine
    return {name: tensor.numpy().copy() for name, tensor in engine.full_parameters(engine.module.model)}


def train(
    rank: int, ranks: int, jobs: list[DiscriminatorJob], batches: list[list[Group]], folder: str
) -> list[Any]:
    """Each job in turn; the first saves after two steps, and another trainer takes the third from there."""
    results: list[Any] = []
    for number, job in enumerate(jobs):
        trainer = DiscriminatorTrainer(job, device="cpu", rank=rank, ranks=ranks)
        rows = []
        for version, groups in enumerate(batches):
            if version == 2 and number == 0:
                trainer.save(Path(folder))
            rows.append(trainer.step(groups, version))
        results.append((rows, weights(trainer), trainer.logits([((1,), (2, 3)), ((4,), (5,))])))
    again = DiscriminatorTrainer(jobs[0], device="cpu", rank=rank, ranks=ranks)
    again.restore(Path(folder))
    row = again.step(batches[2], 2)
    results.append(([row], weights(again), []))
    return results


def test_ranks_and_stages_give_one_discriminator_and_a_checkpoint_goes_on(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")  # copied into checkpoints
    batches = [scored(make_groups(path, groups=4, size=3, seed=seed), 0) for seed in range(3)]
    settings: dict[str, Any] = {"lr": 2e-3, "updates": 2, "replay": 0.3, "replay_size": 20}
    jobs = [
        make_job(path, learner={"zero_stage": 0}, **settings, gradient_penalty=0.1),
        make_job(path, learner={"zero_stage": 2}, **settings, gradient_penalty=0.1),
        make_job(path, learner={"zero_stage": 0}, **settings, label_smoothing=0.1),
        make_job(path, learner={"zero_stage": 3}, **settings, label_smoothing=0.1),
    ]
    (alone,) = run_ranks(train, 1, jobs, batches, str(tmp_path / "one"), timeout_s=200)
    together = run_ranks(train, 2, jobs, batches, str(tmp_path / "two"), timeout_s=200)
    for number, (one, rank_0, rank_1) in enumerate(zip(alone, *together, strict=True)):
        for single, first, second in zip(one[0], rank_0[0], rank_1[0], strict=True):
            for name, value in single.items():
                if name.startswith("timing_s/"):
                    continue
                assert first[name] == pytest.approx(value, rel=5e-3, abs=5e-4), (number, name)
                assert second[name] == pytest.approx(first[name], rel=1e-6), (number, name)
        for name, weight in one[1].items():
            np.testing.assert_allclose(weight, rank_0[1][name], atol=2e-4, err_msg=f"{number} {name}")
    for a, b in ((0, 1), (2, 3)):  # ZeRO stages
        for name, weight in alone[a][1].items():
            np.testing.assert_allclose(weight, alone[b][1][name], atol=2e-4, err_msg=name)
    # The penalty and the smoothing did something.
    assert np.abs(alone[0][1]["score.weight"] - alone[2][1]["score.weight"]).max() > 1e-4
    assert all(row["discriminator/gradient_penalty"] >= 0 for row in alone[0][0])
    assert alone[0][0][-1]["discriminator/gradient_penalty"] > 0
    # No opinion at first: log 2, accuracy ½; after 6 updates it tells the end token.
    first, last = alone[2][0][0], alone[2][0][-1]
    assert first["discriminator/accuracy_heldout"] == 0.5
    assert last["loss/discriminator"] < first["loss/discriminator"]
    assert last["discriminator/accuracy"] > 0.8
    assert last["discriminator/score_lag_max"] == 2.0
    # A checkpoint goes on as the run would have.
    for results in (alone, together[0], together[1]):
        straight, resumed = results[0], results[-1]
        for name, weight in straight[1].items():
            np.testing.assert_array_equal(weight, resumed[1][name], err_msg=name)
        assert {k: v for k, v in resumed[0][0].items() if k[:6] != "timing"} == {
            k: v for k, v in straight[0][-1].items() if k[:6] != "timing"
        }


def test_a_checkpoint_of_other_demonstrations_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    job = make_job(path, learner={})
    (tmp_path / "saved").mkdir()

    (message,) = run_ranks(refuse, 1, job, str(tmp_path / "saved"), timeout_s=100)
    assert "demonstrations = 32, this run has 31" in message


def refuse(rank: int, ranks: int, job: DiscriminatorJob, folder: str) -> str:
    torch.manual_seed(0)
    trainer = DiscriminatorTrainer(job, device="cpu", rank=rank, ranks=ranks)
    trainer.save(Path(folder))
    fewer = dataclasses.replace(job, demonstrations=job.demonstrations[:31])
    other = DiscriminatorTrainer(fewer, device="cpu", rank=rank, ranks=ranks)
    with pytest.raises(ValueError, match="was made with") as refused:
        other.restore(Path(folder))
    with pytest.raises(ValueError, match=r"no discriminator\.json"):
        other.restore(Path(folder) / "elsewhere")
    return str(refused.value)
