"""Learner and vLLM agree on every sampled token after real updates, also where embeddings are tied."""

from pathlib import Path
from typing import Any

import pytest
from engine_helpers import LoopThread, make_worker, request, save_model
from tiny_learner import in_one_rank, make_job

from actors.language_model import load_causal_model, response_logprobs
from actors.records import Group, SampledGroup, Trajectory
from learner.worker import LearnerWorker

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
PROMPTS = [(3, 4, 5), (9, 8, 7, 6), (20, 21), (15, 3, 15, 3)]


def score(sampled: SampledGroup) -> Group:
    """A reward for low tokens, and the sampler itself as reference."""
    trajectories = tuple(
        Trajectory(c, sum(t < 16 for t in c.token_ids) / len(c.token_ids), {}, c.logprobs)
        for c in sampled.completions
    )
    return Group(sampled.group_id, sampled.prompt, trajectories, sampled.actor, sampled.seconds, 0.0)


def largest_difference(learner: LearnerWorker, sampled: list[SampledGroup], folder: Path) -> float:
    """max |log π of the learner's exported policy − log μ| over all sampled tokens."""
    learner.export(str(folder))
    model = load_causal_model(str(folder), dtype="float32", attention="sdpa", device="cpu")
    flat = [(group.prompt.token_ids, c) for group in sampled for c in group.completions]
    logprobs = response_logprobs(
        model,
        [(prompt, c.token_ids) for prompt, c in flat],
        temperature=1.0,
        micro_batch_tokens=512,
        chunk_tokens=64,
    )
    return max(
        abs(own - sampler)
        for row, (_, completion) in zip(logprobs, flat, strict=True)
        for own, sampler in zip(row.tolist(), completion.logprobs, strict=True)
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logprobs_agree_after_three_updates(tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, tied=tied)
    loop, engine = LoopThread(), make_worker(folder)
    loop.run(engine.start(), 200)

    def sample(first: int) -> list[SampledGroup]:
        return [loop.run(engine.sample(request(first + i, *ids))) for i, ids in enumerate(PROMPTS)]

    def work(learner: LearnerWorker) -> None:
        learner.open_publisher("shared", f"three-{tied}-{tmp_path.name}"[:60], [(3, 4, 5, 6), (20, 7, 9)])
        before = sample(0)
        sampled: Any = before
        for version in range(3):
            learner.step([score(group) for group in sampled], version)
            update = learner.publish(version + 1)
            assert update is not None
            proof = loop.run(engine.load_weights(update))
            assert proof.probe_max_abs_diff < 1e-3
            sampled = sample(10 * (version + 1))
            assert {v for group in sampled for c in group.completions for v in c.versions} == {version + 1}
        assert largest_difference(learner, sampled, tmp_path / "after") < 1e-3
        # The updates moved the policy, so agreement is not that of weights that never changed.
        assert largest_difference(learner, before, tmp_path / "again") > 0.05

    try:
        in_one_rank(make_job(str(folder), optimizer={"lr": 1e-2}), work)
    finally:
        loop.run(engine.stop())
        loop.close()
