"""The rollout actor on a real vLLM: what it samples, how it fails, and what it leaves behind."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from engine_helpers import END, LoopThread, logprobs, make_worker, probe_of, request, save_model, wait_gone

from actors.end_tokens import end_tokens
from actors.engine import (
    EngineDied,
    EngineSpec,
    engine_environment,
    refuse_head_size,
    refuse_unsafe_environment,
)
from actors.proof import max_abs_diff, mean_abs_diff, probe_tolerance, runs_old_weights
from actors.rollout import completion_from, load_timeout
from actors.settings import RolloutSettings, SyncSettings
from actors.waits import DeadlineExceeded
from actors.weight_files import SHARED_MEMORY, remove_stale

# -- pure parts -------------------------------------------------------------------------------------------


def output(**changes: Any) -> SimpleNamespace:
    """A vLLM `CompletionOutput` of three tokens over two versions."""
    fields = {
        "token_ids": [5, 6, END],
        "logprobs": SimpleNamespace(token_ids=[5, 6, END], logprobs=[-0.5, -1.0, -2.0]),
        "weight_versions": [
            SimpleNamespace(version="3", start=0, end=2),
            SimpleNamespace(version="4", start=2, end=3),
        ],
        "finish_reason": "stop",
        "text": "cd",
    }
    return SimpleNamespace(**fields | changes)


def test_spans_become_a_version_per_token() -> None:
    found = completion_from(output(), frozenset({END}), "rollout actor a")
    assert found.versions == (3, 3, 4)
    assert found.finish_reason == "stop"
    assert found.logprobs == (-0.5, -1.0, -2.0)


def test_a_logprob_that_is_not_finite_is_an_error_not_a_zero() -> None:
    bad = SimpleNamespace(token_ids=[5, 6, END], logprobs=[-0.5, float("-inf"), -2.0])
    with pytest.raises(
        RuntimeError, match=r"rollout actor a: log-probability -inf of sampled token 6 at pos"
    ):
        completion_from(output(logprobs=bad), frozenset({END}), "rollout actor a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "abort"}, "ended with 'abort'"),
        ({"finish_reason": "stop", "token_ids": [5, 6, 7]}, "other tokens"),
        (
            {"weight_versions": [SimpleNamespace(version="3", start=0, end=2)]},
            "one log-probability and version",
        ),
    ],
)
def test_outputs_that_break_the_contract_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        completion_from(output(**changes), frozenset({END}), "rollout actor a")


def test_a_stop_without_an_end_token_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no end token"):
        completion_from(output(), frozenset({9}), "rollout actor a")


def test_probe_difference() -> None:
    # |−1 − (−1.5)| = 0.5 is the largest; the second row is compared over its one scored place.
    assert max_abs_diff([[-1.0, -2.0], [-3.0]], [[-1.5, -2.25], [-3.0, -9.0]]) == 0.5
    assert max_abs_diff([[float("nan")]], [[-1.0]]) == float("inf")
    assert max_abs_diff([[-1.0]], [[float("nan")]]) == float("inf")
    # Two scored places are missing, or the only one: nothing is proved.
    assert max_abs_diff([[-1.0]], [[-1.0, -2.0, -3.0]]) == float("inf")
    assert max_abs_diff([[]], [[-1.0]]) == float("inf")


def test_mean_probe_difference() -> None:
    # (0.5 + 0.25 + 0) / 3; the last place of the second row is not scored.
    assert mean_abs_diff([[-1.0, -2.0], [-3.0]], [[-1.5, -2.25], [-3.0, -9.0]]) == pytest.approx(0.25)


def tables(seed: int, step: float, noise: float) -> tuple[list[list[float]], ...]:
    """Log-probabilities of 8 sequences of 31 tokens: of the old weights, the new, and the noise of an engine.

    An update moves each by about `step`; the engine's numbers are off by about `noise`.
    """
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(8, 31, generator=draw) - 3
    new = old + step * torch.randn(8, 31, generator=draw)
    off = noise * torch.randn(8, 31, generator=draw)
    return old.tolist(), new.tolist(), off.tolist()


def plus(table: list[list[float]], off: list[list[float]]) -> list[list[float]]:
    return (torch.tensor(table) + torch.tensor(off)).tolist()


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.01, 0.05])
@pytest.mark.parametrize("step", [0.0, 1e-6, 1e-3, 0.05, 0.5])
def test_noise_is_not_mistaken_for_old_weights(step: float, noise: float) -> None:
    """New weights, an engine as noisy as float32 (1e-6) up to bfloat16 (0.05), updates from none to large."""
    for seed in range(20):
        old, new, off = tables(seed, step, noise)
        assert not runs_old_weights(plus(new, off), old, new)


@pytest.mark.parametrize(("step", "noise"), [(1e-3, 1e-6), (0.005, 1e-3), (0.2, 0.05)])
def test_old_weights_are_seen_below_the_tolerance(step: float, noise: float) -> None:
    old, new, off = tables(0, step, noise)
    found = plus(old, off)
    assert runs_old_weights(found, old, new)
    assert not runs_old_weights([found[0][:15]], old[:1], new[:1]), "too few tokens to tell"


def test_waiting_for_requests_has_time_for_them() -> None:
    rollout = RolloutSettings(generate_timeout_s=50)
    assert load_timeout(rollout, SyncSettings(timeout_s=20)) == 20
    assert load_timeout(rollout, SyncSettings(timeout_s=20, in_flight="wait")) == 70


def test_tolerance_by_dtype_unless_set() -> None:
    assert probe_tolerance(SyncSettings(), "float32") == 0.01
    assert probe_tolerance(SyncSettings(), "bfloat16") == 0.25
    assert probe_tolerance(SyncSettings(tolerance=0.5), "float32") == 0.5


@pytest.mark.parametrize(
    "variable",
    ["VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"],
)
def test_unsafe_environment_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unsafe_environment()
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match=f"{variable}=1.*unset it"):
        refuse_unsafe_environment()


def test_engine_environment_shares_the_machine() -> None:
    spec = EngineSpec("a", "m", RolloutSettings(cores=0.5), "float32", 64, 0, "cpu", "headrace_shared")
    found = engine_environment(spec)
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["VLLM_CPU_KVCACHE_SPACE"] is None


def test_end_tokens_of_tokenizer_model_and_generation_config(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    save_model(tmp_path)
    assert end_tokens(str(tmp_path)) == {END}
    GenerationConfig(eos_token_id=[END, 7]).save_pretrained(tmp_path)
    assert end_tokens(str(tmp_path)) == {END, 7}


@pytest.mark.parametrize(("width", "accepted"), [(32, False), (64, True)])
def test_head_sizes_that_the_cpu_lacks_are_refused_early(tmp_path: Path, width: int, accepted: bool) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=width, num_attention_heads=2).save_pretrained(tmp_path)
    if accepted:
        refuse_head_size(str(tmp_path))
    else:
        with pytest.raises(
            ValueError, match="heads of size 16 don't run in vLLM on a CPU; choose hidden_size"
        ):
            refuse_head_size(str(tmp_path))


# -- on a real engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import GenerationConfig

    folder = tmp_path_factory.mktemp("model")
    model = save_model(folder)
    # What a hub model may bring: a second end token, and sampling defaults that must not apply.
    GenerationConfig(eos_token_id=[END, 7], do_sample=True, top_k=2, top_p=0.5).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def worker(loop: LoopThread, model_folder: tuple[Path, Any]) -> Iterator[Any]:
    made = make_worker(model_folder[0])
    made.facts = loop.run(made.start(), 200)
    yield made
    pid = made.facts.engine_pid
    loop.run(made.stop())
    assert wait_gone(pid), "the engine core outlived `stop`"


@pytest.mark.integration
def test_facts(worker: Any, loop: LoopThread) -> None:
    facts = worker.facts
    assert psutil.pid_exists(facts.engine_pid)
    # 2 layers × key and value × 1 head × 32 × 4 bytes = 512 bytes a token, in blocks of 32 tokens.
    assert facts.kv_tokens == int(0.05 * 2**30) // (512 * 32) * 32
    assert loop.run(worker.check()).groups_in_flight == 0


@pytest.mark.integration
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampled_distribution(
    worker: Any, loop: LoopThread, model_folder: tuple[Path, Any], temperature: float
) -> None:
    _, model = model_folder
    prompt = (3, 9, 4)
    group = loop.run(worker.sample(request(1, *prompt, size=8, new=24, temperature=temperature)))
    assert len(group.completions) == 8
    for completion in group.completions:
        expected = logprobs(model, prompt + completion.token_ids, temperature)[len(prompt) - 1 :]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
        assert set(completion.versions) == {0}


@pytest.mark.integration
def test_end_tokens_are_kept_and_the_folders_sampling_defaults_are_not(
    worker: Any, loop: LoopThread, model_folder: tuple[Path, Any]
) -> None:
    group = loop.run(worker.sample(request(2, 5, 6, size=64, new=60)))
    ended = [c for c in group.completions if c.finished]
    assert {c.token_ids[-1] for c in ended} == {END, 7}, "both end tokens end a response and stay in it"
    for completion in group.completions:
        assert not {END, 7} & set(completion.token_ids[:-1])
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == 60
        elif completion.token_ids[-1] == END:
            assert "<eos>" not in completion.text
    # top_k = 2 would leave two first tokens.
    assert len({c.token_ids[0] for c in group.completions}) > 2


@pytest.mark.integration
def test_a_request_that_does_not_fit_is_refused(worker: Any, loop: LoopThread) -> None:
    with pytest.raises(ValueError, match=r"prompt train:3: 200 tokens and 60 new ones exceed .* 256"):
        loop.run(worker.sample(request(3, *[4] * 200, new=60)))


@pytest.mark.integration
def test_a_deadline_names_actor_and_group_and_the_request_is_aborted(worker: Any, loop: LoopThread) -> None:
    worker._rollout = RolloutSettings(generate_timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match=r"0\.05 s for rollout actor rollout-0: group 4 \(64 samples"):
        loop.run(worker.sample(request(4, 3, 4, size=64, new=240)))
    worker._rollout = RolloutSettings()

    async def drained() -> int:
        for _ in range(100):
            health = await worker.check()
            if not health.sequences_in_flight:
                break
            await asyncio.sleep(0.05)
        return int(health.sequences_in_flight)

    assert loop.run(drained()) == 0
    assert len(loop.run(worker.sample(request(5, 3, 4))).completions) == 4


@pytest.mark.integration
def test_a_stopped_engine_core_is_noticed(worker: Any, loop: LoopThread) -> None:
    """SIGSTOP: no process has ended and no pipe has closed. Runs last: the engine is lost afterwards."""

    async def stop_while_sampling() -> float:
        sampling = asyncio.create_task(worker.sample(request(6, 3, 4, size=64, new=240)))
        await asyncio.sleep(0.1)
        os.kill(worker.facts.engine_pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(EngineDied, match=r"rollout actor rollout-0: .* is stopped .* it owed group 6"):
            await sampling
        with pytest.raises(EngineDied, match="rollout actor rollout-0"):
            await worker.check()
        return time.monotonic() - began

    assert loop.run(stop_while_sampling()) < 60, "noticed long before the deadline of 300 s"


@pytest.mark.integration
def test_in_ray_two_actors_share_a_machine_a_kill_is_reported_and_nothing_is_left(
    model_folder: tuple[Path, Any],
) -> None:
    import ray

    from actors.rollout import RolloutWorker
    from learner.publish import ParameterStream, WeightPublisher

    folder, model = model_folder
    settings = RolloutSettings(kv_cache_gib=0.05, max_num_seqs=32)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        namespace="test-rollout",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd())}},
    )
    try:
        remote = ray.remote(num_cpus=0.5, max_concurrency=64)(RolloutWorker)
        actors = [
            remote.remote(
                f"rollout-{i}",
                str(folder),
                settings,
                SyncSettings(),
                dtype="float32",
                max_length=256,
                seed=i,
                device="cpu",
            )
            for i in range(2)
        ]
        facts = ray.get([actor.start.remote() for actor in actors], timeout=400)
        groups = ray.get(
            [actor.sample.remote(request(i, 3, 4, size=8, new=32)) for i, actor in enumerate(actors)],
            timeout=60,
        )
        assert [group.actor for group in groups] == ["rollout-0", "rollout-1"]
        # Engines of different seeds draw different samples of the same prompt.
        drawn = [{c.token_ids for c in group.completions} for group in groups]
        assert drawn[0] != drawn[1]

        # The first takes the learner's file; the second, told that it lies on another host, a copy from the
        # object store.
        stream = ParameterStream(model.named_parameters, torch.float32)
        run_id = f"test-{os.getpid()}"
        publisher = WeightPublisher(stream, backend="shared", run_id=run_id, rank=0, remote_hosts=True)
        update = publisher.publish(1, *probe_of(model))
        assert update is not None
        elsewhere = replace(update, payload={**update.payload, "host": "another-host"})
        proofs = ray.get(
            [actors[0].load_weights.remote(update), actors[1].load_weights.remote(elsewhere)], timeout=60
        )
        assert [(proof.actor, proof.version) for proof in proofs] == [("rollout-0", 1), ("rollout-1", 1)]
        copies = SHARED_MEMORY / f"headrace-{os.getuid()}-{run_id}-copies"
        assert [path.name for path in copies.glob("v*")] == ["v00000001.safetensors"]
        publisher.close()
        assert not Path(update.payload["path"]).parent.exists()

        # The engine core of the first, held up so that it cannot be done, is killed in the middle of a group.
        os.kill(facts[0].engine_pid, signal.SIGSTOP)
        owed = actors[0].sample.remote(request(7, 3, 4, size=32, new=240))
        time.sleep(0.3)
        os.kill(facts[0].engine_pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match=r"rollout actor rollout-0: engine core \(pid \d+\)"):
            ray.get(owed, timeout=30)
        with pytest.raises(EngineDied):
            ray.get(actors[0].check.remote(), timeout=30)
        assert ray.get(actors[1].check.remote(), timeout=30).actor == "rollout-1"

        # The second actor is killed, its engine core stopped so that it can't act itself.
        os.kill(facts[1].engine_pid, signal.SIGSTOP)
        ray.kill(actors[1])
        assert wait_gone(facts[1].engine_pid), "an engine core outlived its actor"
        removed: list[Path] = []
        limit = time.monotonic() + 20  # the actor itself may still be on its way out
        while copies not in removed and time.monotonic() < limit:
            removed += remove_stale()
            time.sleep(0.1)
        assert copies in removed, "nothing is left in shared memory"
    finally:
        ray.shutdown()
