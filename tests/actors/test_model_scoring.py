"""Scoring actors with reward models: batches over groups, and rewards that only evaluations ask."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_reward_model import ALPHABET, plain_score, save_reward_model

from actors.records import Completion, Group, Prompt, RewardFailure, SampledGroup
from actors.scoring import ScoringWorker, ShippedModels
from actors.settings import ScoringSettings
from actors.shipping import ship
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings
from rewards.base import RewardRequest
from rewards.build import build_reward
from rewards.model_reward import ModelReward, model_facts, refuse_other_versions
from rewards.settings import RewardSettings, TaskSettings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reference, a reward model, its held-out twin of three members, and one that shares a label."""
    root = tmp_path_factory.mktemp("models")
    shape = ScratchSettings(hidden_size=32, layers=1, heads=1, max_length=64)
    return {
        "reference": build_scratch_model(shape, ALPHABET, root / "reference", 0),
        "proxy": save_reward_model(root / "proxy", prompts=["a", "b"], mean=0.25, std=2.0),
        "judge": save_reward_model(root / "judge", seed=7, members=3, prompts=["c", "d"]),
        "nosy": save_reward_model(root / "nosy", seed=9, prompts=["d", "b"]),
    }


def tables(folders: dict[str, Path]) -> list[RewardSettings]:
    return [
        RewardSettings(kind="model", name="proxy", path=str(folders["proxy"]), weight=0.5),
        RewardSettings(kind="model", name="judge", path=str(folders["judge"]), role="evaluate"),
        RewardSettings(kind="task", name="gold", role="evaluate"),
    ]


def make_worker(folders: dict[str, Path], rewards: list[RewardSettings]) -> ScoringWorker:
    return ScoringWorker(
        "scorer-0",
        str(folders["reference"]),
        rewards,
        TaskSettings(kind="reversal"),
        ScoringSettings(),
        dtype="float32",
        attention="sdpa",
        temperature=1.0,
        micro_batch_tokens=64,
        chunk_tokens=16,
        device="cpu",
    )


@pytest.fixture
def worker(folders: dict[str, Path]) -> Any:
    made = make_worker(folders, tables(folders))
    made.start()
    yield made
    made.stop()


class Counted:
    """A loaded reward model that remembers how many items each call had."""

    def __init__(self, reward: Any) -> None:
        self.model = reward._model
        self.calls: list[int] = []
        reward._model = self

    def encode(self, items: Any) -> Any:
        return self.model.encode(items)

    def score(self, items: Any) -> Any:
        self.calls.append(len(items))
        return self.model.score(items)


def counted(worker: ScoringWorker) -> dict[str, Counted]:
    assert worker._reward is not None
    parts = [part.reward for part in worker._reward._parts if isinstance(part.reward, ModelReward)]
    return {reward.label: Counted(reward) for reward in parts}


def group(number: int, prompt: str, *texts: str, finished: bool = True) -> SampledGroup:
    completions = tuple(
        Completion((5, 6), (-1.0, -1.0), (0, 0), text, "stop" if finished else "length") for text in texts
    )
    row = {"answer": prompt[::-1]}
    return SampledGroup(number, Prompt(f"p{number}", (1, 5), "shown", row, prompt), completions, "r", 0.1)


def test_groups_of_a_call_are_one_batch_and_the_score_is_transformers_own(
    worker: ScoringWorker, folders: dict[str, Path]
) -> None:
    models = counted(worker)
    groups = [
        group(1, "ab=", "ba", "b"),
        group(2, "cdef:", "fedc"),
        group(3, "g", "g", "", "jj", finished=False),
    ]
    scored = worker.score(groups)
    assert models["proxy"].calls == [2 + 1 + 3]
    assert models["judge"].calls == []  # a training group never waits for what only evaluates
    for sampled, one in zip(groups, scored, strict=True):
        assert isinstance(one, Group)
        for completion, trajectory in zip(sampled.completions, one.trajectories, strict=True):
            raw = plain_score(
                folders["proxy"], str(sampled.prompt.source), completion.text, completion.finished
            )
            expected = (raw - 0.25) / 2.0
            assert trajectory.components == {"proxy": pytest.approx(expected, abs=1e-5)}
            assert trajectory.reward == pytest.approx(0.5 * expected, abs=1e-5)


def test_an_evaluation_asks_every_reward_and_trains_on_none_of_the_others(
    worker: ScoringWorker, folders: dict[str, Path]
) -> None:
    models = counted(worker)
    training = group(1, "ab", "ba")
    evaluation = dataclasses.replace(group(2, "ab", "ba", "ij"), evaluation=True)
    trained, evaluated = worker.score([training, evaluation])
    assert (models["proxy"].calls, models["judge"].calls) == ([3], [2])  # one batch over both kinds of group
    assert isinstance(trained, Group)
    assert isinstance(evaluated, Group)
    first, second = evaluated.trajectories
    assert first.reward == pytest.approx(trained.trajectories[0].reward, abs=1e-6)
    assert first.components.keys() == {"proxy", "judge", "judge/std", "gold"}
    assert first.components["gold"] == 1.0  # "ba" is "ab" reversed
    assert second.components["gold"] < 1.0
    members = [
        plain_score(folders["judge"] / f"member_{i}", "ab", "ij", finished=True) for i in range(3)
    ]  # the card says mean 0 and variance 1, so scores are the members' own
    assert second.components["judge"] == pytest.approx(np.mean(members), abs=1e-5)
    assert second.components["judge/std"] == pytest.approx(np.std(members), abs=1e-5)


def test_what_a_model_cannot_read_fails_its_own_group_only(worker: ScoringWorker) -> None:
    groups = [group(1, "ab", "ba"), group(2, "ab", "b" * 40), group(3, "ab", "é"), group(4, "ab", "b")]
    answers = worker.score(groups)
    assert [type(answer) for answer in answers] == [Group, RewardFailure, RewardFailure, Group]
    assert isinstance(answers[1], RewardFailure)
    assert answers[1].reward == "proxy"
    assert "44 tokens" in answers[1].reason  # begin, two of the prompt, forty, end
    assert isinstance(answers[2], RewardFailure)
    assert "vocabulary" in answers[2].reason


def test_a_score_that_is_no_number_is_an_error_and_not_a_reward(worker: ScoringWorker) -> None:
    assert worker._reward is not None
    reward = worker._reward._parts[0].reward
    assert isinstance(reward, ModelReward)
    assert reward._model is not None
    with torch.no_grad():
        reward._model._scorer._models[0].score.weight.fill_(float("nan"))  # type: ignore[attr-defined]
    (answer,) = worker.score([group(1, "ab", "ba")])
    assert isinstance(answer, RewardFailure)
    assert "nan" in answer.reason


def test_models_come_with_the_reference(folders: dict[str, Path]) -> None:
    worker = make_worker(folders, [RewardSettings(kind="model", name="proxy", path="not/here")])
    base, proxy = ship(folders["reference"], bytes), ship(folders["proxy"], bytes, nested=True)
    worker.use_model(ShippedModels(base.path, base.host, base.files, (("proxy", proxy),)), 5.0)
    worker.start()
    (scored,) = worker.score([group(1, "ab", "ba")])
    assert isinstance(scored, Group)
    worker.stop()


def refused(folders: dict[str, Path], *rewards: RewardSettings, directory: Path | None = None) -> str:
    with pytest.raises(ValueError, match="reward") as caught:
        build_reward(
            list(rewards), TaskSettings(kind="reversal"), timeout_s=1, memory_gib=1, directory=directory
        )
    return str(caught.value)


def test_a_judge_that_learned_from_the_same_labels_is_refused(folders: dict[str, Path]) -> None:
    proxy = RewardSettings(kind="model", name="proxy", path=str(folders["proxy"]))
    nosy = RewardSettings(kind="model", name="nosy", path=str(folders["nosy"]), role="evaluate")
    said = refused(folders, proxy, nosy)
    assert "labels of 1 prompts of which 'proxy' has labels too" in said  # "b"; "d" only nosy knows
    assert "disjoint labels" in said
    same = RewardSettings(kind="model", name="same", path=str(folders["proxy"]), role="evaluate")
    assert "the very model that 'proxy' trains on" in refused(folders, proxy, same)
    # Two models that are both trained on may share labels.
    both = nosy.model_copy(update={"role": "train"})
    build_reward([proxy, both], None, timeout_s=1, memory_gib=1).close()


def test_a_folder_that_is_no_reward_model_is_refused_with_the_remedy(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    table = RewardSettings(kind="model", name="proxy", path="nowhere")
    said = refused(folders, table, directory=tmp_path)
    assert "reward.path of 'proxy'" in said
    assert str(tmp_path / "nowhere") in said
    assert "reward.json" in said


def test_a_model_scores_only_where_it_is_loaded(folders: dict[str, Path]) -> None:
    reward = build_reward(tables(folders)[:1], None, timeout_s=1, memory_gib=1)
    with pytest.raises(AssertionError, match="load"):
        reward.score([RewardRequest("a", "b", {}, True)])


def test_a_resumed_run_goes_on_with_the_same_models(folders: dict[str, Path]) -> None:
    facts = model_facts(tables(folders))
    assert facts.keys() == {"proxy", "judge"}
    assert (facts["judge"].members, facts["judge"].labels, facts["judge"].role) == (3, 2, "evaluate")
    versions = {label: one.version for label, one in facts.items()}
    refuse_other_versions(versions, facts)
    refuse_other_versions({}, facts)  # a checkpoint that says nothing of them
    with pytest.raises(ValueError, match="the run was started with 000000000000: put that model back"):
        refuse_other_versions(versions | {"proxy": "0" * 64}, facts)
