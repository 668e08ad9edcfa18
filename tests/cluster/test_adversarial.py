"""Adversarial imitation in a run: what is refused, what is held out, versions on their way, a whole run."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.records import DiscriminatorProof, DiscriminatorUpdate, Group, SampledGroup
from actors.settings import ScoringSettings
from cluster.adversarial import hold_out, learner_class, load_metrics
from cluster.config import JobConfig
from cluster.config_file import ConfigError, dump_config, parse_config
from cluster.metrics import lookup
from cluster.remote import WorkerFailedError, WorkerLostError
from cluster.scoring_pool import ScoringPool
from learner.discriminator_worker import AdversarialWorker
from learner.worker import LearnerWorker

JOB = """
[run]
name = "adversarial"
steps = 3
batch_size = 16
evaluate_prompts = 8
checkpoint_every = 2
[model.scratch]
hidden_size = 32
layers = 1
heads = 1
max_length = 32
[task]
kind = "reversal"
length = 3
train_size = 64
heldout_size = 8
demonstrations = 128
corruption = 0.0
[warmup]
steps = 4
batch_size = 16
[[reward]]
kind = "discriminator"
[[reward]]
kind = "task"
name = "gold"
role = "evaluate"
[discriminator]
lr = 3e-3
updates = 2
label_smoothing = 0.05
gradient_penalty = 0.01
[rollout]
group_size = 4
max_new_tokens = 6
[monitor]
console = "plain"
wandb = "disabled"
"""


def job(*overrides: str) -> JobConfig:
    return parse_config(JOB, list(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("reward.0.kind=exact",), r"discriminator\.lr = 0\.003 has no effect"),
        (("task.demonstrations=0", "warmup.steps=0"), r"reward\.kind .*needs demonstrations"),
        (("learner.zero_stage=3",), r"discriminator\.gradient_penalty = 0\.01.*ZeRO-3"),
        (("learner.gradient_checkpointing=true",), r"discriminator\.gradient_penalty"),
        (("rollout.dynamic_sampling=true",), r"rollout\.dynamic_sampling"),
        (("discriminator.label_smoothing=0.5",), r"discriminator\.label_smoothing"),
        (("discriminator.replay=1.0",), r"discriminator\.replay"),
        (("discriminator.learning_rate=1.0",), r"learning_rate"),
    ],
)
def test_what_cannot_work_is_refused(override: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(*override)


def test_a_job_with_a_discriminator() -> None:
    config = job()
    assert parse_config(dump_config(config)) == config
    assert learner_class(config) is AdversarialWorker
    plain = JOB.replace('kind = "discriminator"', 'kind = "exact"').split("[discriminator]")
    rest = plain[1].partition("[rollout]")[2]
    assert learner_class(parse_config(f"{plain[0]}[rollout]{rest}")) is LearnerWorker
    # A file of demonstrations may serve the discriminator alone.
    assert job("warmup.steps=0", "warmup.data=demonstrations.jsonl").warmup.data


def test_whole_prompts_are_held_out() -> None:
    pairs = [((number % 4,), (number,)) for number in range(12)]
    learned, heldout = hold_out(pairs, 0.25, seed=0)
    assert len(heldout) == 3
    assert not {prompt for prompt, _ in learned} & {prompt for prompt, _ in heldout}
    assert hold_out(pairs, 0.0, seed=0) == (pairs, [])
    assert hold_out(pairs[:1] * 3, 0.5, seed=0) == (pairs[:1] * 3, [])


def test_the_slowest_actor_stands_for_all() -> None:
    proofs = [DiscriminatorProof("a", 1, 1e-6, 0.2), DiscriminatorProof("b", 1, 1e-5, 0.1)]
    metrics = load_metrics(proofs)
    assert metrics == {"discriminator/probe_max_difference": 1e-5, "timing_s/discriminator_load": 0.2}
    assert all(lookup(name) for name in metrics)
    assert load_metrics([]) == {}


# --- versions on their way -------------------------------------------------------------------------------


def nothing(*_: Any) -> None:
    """Never fails, says nothing."""


class Actor:
    """A scoring actor that says with which version it scored; `fails` may raise as the real one would."""

    def __init__(self, name: str, fails: Callable[[str, Any], None] = nothing) -> None:
        self.name, self.place, self.fails = name, 0, fails
        self.version = -1
        self.loads: list[int] = []
        self.scored: list[tuple[int, int]] = []

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        await asyncio.sleep(0)
        if method == "load_discriminator":
            update = args[0]
            self.fails(self.name, update)
            self.version = update.version
            self.loads.append(update.version)
            return DiscriminatorProof(self.name, update.version, 0.0, 0.0)
        if method == "score":
            self.fails(self.name, None)
            self.scored += [(group.group_id, self.version) for group in args[0]]
            return [Group(g.group_id, g.prompt, (), self.name, 0.0, 0.0) for g in args[0]]
        assert method == "start"
        return None

    def kill(self) -> None:
        pass


def update(version: int) -> DiscriminatorUpdate:
    return DiscriminatorUpdate(version, {}, "{}", (), ())


def sampled(number: int) -> SampledGroup:
    return SampledGroup(number, None, (), "rollout-0", 0.0)  # type: ignore[arg-type]


def serve(pool: ScoringPool, story: Callable[[], Any]) -> None:
    async def both() -> None:
        serving = asyncio.create_task(pool.run())
        telling = asyncio.create_task(story())
        await asyncio.wait([serving, telling], return_when=asyncio.FIRST_COMPLETED, timeout=10)
        done = serving if serving.done() else telling
        for task in (serving, telling):
            task.cancel()
        await asyncio.gather(serving, telling, return_exceptions=True)
        if not done.cancelled() and done.exception() is not None:
            raise done.exception()  # type: ignore[misc]
        assert telling.done()
        assert not telling.cancelled(), "the story did not end"

    asyncio.run(both())


def test_what_is_taken_up_after_an_announcement_is_scored_by_it() -> None:
    actors = [Actor("a"), Actor("b")]
    pool = ScoringPool(actors, ScoringSettings())  # type: ignore[arg-type]

    async def story() -> None:
        pool.announce(update(0))
        await asyncio.gather(*(pool.score(sampled(number)) for number in range(20)))
        pool.announce(update(1))
        pool.announce(update(2))  # the one between need not be loaded
        await asyncio.gather(*(pool.score(sampled(number)) for number in range(20, 40)))

    serve(pool, story)
    versions = {number: version for actor in actors for number, version in actor.scored}
    assert sorted(versions) == list(range(40))
    assert {versions[number] for number in range(20)} == {0}
    assert {versions[number] for number in range(20, 40)} == {2}
    assert [proof.version for proof in pool.take_proofs()].count(2) >= 1
    assert pool.take_proofs() == []


def test_the_time_in_which_all_actors_score_is_counted() -> None:
    actors = [Actor("a"), Actor("b")]
    pool = ScoringPool(actors, ScoringSettings())  # type: ignore[arg-type]
    lone: list[float] = []

    async def story() -> None:
        await pool.score(sampled(0))
        lone.append(pool.saturated_lap())
        await asyncio.gather(*(pool.score(sampled(number)) for number in range(1, 60)))

    began = time.perf_counter()
    serve(pool, story)
    assert lone == [0.0]  # one was free
    assert 0 < pool.saturated_lap() < time.perf_counter() - began
    assert pool.saturated_lap() == 0.0


def test_an_idle_actor_loads_without_being_asked_to_score() -> None:
    actor = Actor("a")
    pool = ScoringPool([actor], ScoringSettings())  # type: ignore[list-item]

    async def story() -> None:
        pool.announce(update(5))
        while actor.loads != [5]:
            await asyncio.sleep(0.001)

    serve(pool, story)
    assert actor.scored == []


def test_a_successor_loads_before_it_scores() -> None:
    def dies(name: str, about: Any) -> None:
        if name == "a" and about is None:
            raise WorkerLostError("a died")

    successor = Actor("a.2")
    pool = ScoringPool(
        [Actor("a", dies)],  # type: ignore[list-item]
        ScoringSettings(),
        create=lambda _: successor,  # type: ignore[arg-type, return-value]
        on_event=nothing,
    )

    async def story() -> None:
        pool.announce(update(7))
        await pool.score(sampled(1))

    serve(pool, story)
    assert successor.scored == [(1, 7)]


def test_a_file_that_gave_way_to_a_newer_one_is_no_failure_and_any_other_is() -> None:
    def gone(name: str, about: Any) -> None:
        if about is not None and about.version == 1:
            pool.announce(update(2))
            raise WorkerFailedError("v00000001.safetensors is missing")

    actor = Actor("a", gone)
    pool = ScoringPool([actor], ScoringSettings())  # type: ignore[list-item]

    async def story() -> None:
        pool.announce(update(1))
        await pool.score(sampled(1))

    serve(pool, story)
    assert actor.scored == [(1, 2)]

    def corrupt(name: str, about: Any) -> None:
        if about is not None:
            raise WorkerFailedError("corrupt")

    pool = ScoringPool([Actor("a", corrupt)], ScoringSettings())  # type: ignore[list-item]
    with pytest.raises(ExceptionGroup) as failure:
        serve(pool, story)
    assert failure.group_contains(WorkerFailedError, match="corrupt")


# --- a whole run -----------------------------------------------------------------------------------------


def train(folder: Path, *arguments: str) -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "cluster.cli", "train", "job.toml", "--run-dir", "run", *arguments]
    environment = os.environ | {"PYTHONPATH": root, "NO_COLOR": "1"}
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_a_run_trains_both_sides_and_is_resumed(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    (tmp_path / "job.toml").write_text(JOB)
    train(tmp_path)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *steps = rows
    assert before["heldout/reward"] == 0.0  # version 0 has no opinion
    assert before["heldout/reward/discriminator/version"] == 0.0
    assert [row["discriminator/score_lag_max"] <= 2 for row in steps] == [True] * 3
    assert steps[0]["reward/discriminator/version"] == 0.0
    assert 0.0 < steps[-1]["reward/discriminator/version"] <= 2.0
    assert steps[-1]["heldout/reward/discriminator/version"] == 3.0
    assert steps[0]["loss/discriminator"] == pytest.approx(0.693, abs=0.02)
    assert all(row["discriminator/gradient_penalty"] >= 0 for row in steps)
    assert steps[-1]["discriminator/probe_max_difference"] < 1e-3
    assert steps[-1]["discriminator/replay_size"] == 48
    assert steps[-1]["monitor/unknown_metrics"] == 0
    saved = run / "checkpoints" / "step_000002" / "discriminator"
    model = AutoModelForSequenceClassification.from_pretrained(saved / "model")
    assert float(model.score.weight.detach().abs().max()) > 0
    train(tmp_path, "--resume", "--set", "run.steps=5")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["learner_step"] for row in rows][-2:] == [4, 5]
    assert rows[-1]["discriminator/replay_size"] == 80  # those of the first three steps were there again
    assert rows[-2]["reward/discriminator/version"] == pytest.approx(3.0)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert "gold" in summary["heldout_final"]
    assert not list(Path("/dev/shm").glob(f"headrace-{os.getuid()}-adversarial-*"))
