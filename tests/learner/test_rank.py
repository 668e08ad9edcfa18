"""What all learner ranks share: the driver calls it by the same names, whatever is trained."""

import inspect
from pathlib import Path

import pytest
import torch

from actors.shipping import ship
from learner.rank import LearnerRank
from learner.reward_worker import RewardLearner
from learner.settings import (
    CorrectionSettings,
    LearnerSettings,
    ModelSettings,
    OptimizerSettings,
    PPOSettings,
    WarmupSettings,
)
from learner.worker import LearnerJob, LearnerWorker


def job(**learner: object) -> LearnerJob:
    return LearnerJob(
        model_path="elsewhere",
        model=ModelSettings(path="elsewhere"),
        learner=LearnerSettings.model_validate(learner),
        optimizer=OptimizerSettings(),
        ppo=PPOSettings(),
        correction=CorrectionSettings(),
        warmup=WarmupSettings(),
        temperature=1.0,
        seed=0,
        total_updates=1,
        max_length=8,
    )


@pytest.mark.parametrize("worker", [LearnerWorker, RewardLearner])
def test_a_job_of_ranks_alone_can_bring_its_model_to_any_kind_of_rank(worker: type) -> None:
    assert issubclass(worker, LearnerRank)
    # As cluster.learner_ranks calls it on a cluster: the folder and a deadline.
    inspect.signature(worker.use_model).bind(None, "shipped", 30.0)


def test_a_shipped_model_takes_the_place_of_the_named_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    worker = LearnerWorker(0, 1, job())
    worker.use_model(ship(tmp_path, put=bytes), 5.0)
    assert worker._job.model_path == str(tmp_path)
    assert worker.sees(str(tmp_path / "config.json"))
    assert not worker.sees(str(tmp_path / "absent"))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="outside a group of 2"):
        LearnerWorker(2, 2, job())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no GPU"):
        LearnerWorker(0, 1, job(device="cuda")).start("127.0.0.1", 1)
