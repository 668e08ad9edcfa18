"""Weight sync against a real vLLM: what is loaded is proved, what is wrong is refused by name."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import LoopThread, logprobs, make_worker, perturb, probe_of, request, save_model

from actors.ipc_handles import decode_update, encode_update
from actors.records import WeightUpdate
from actors.rollout import SyncRefused
from actors.weight_files import SharedFolder, WeightFileError, local_file, remove_stale, sha256_of
from learner.publish import ParameterStream, WeightPublisher

# -- files ------------------------------------------------------------------------------------------------


def payload_of(path: Path, host: str, refs: list[Any] | None = None) -> dict[str, Any]:
    return {
        "run_id": "r",
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "host": host,
        "object_ref": refs,
    }


def test_the_last_holder_removes_the_folder(tmp_path: Path) -> None:
    first, second = SharedFolder("r", tmp_path), SharedFolder("r", tmp_path)
    assert first.path.stat().st_mode & 0o777 == 0o700
    first.file(1).write_bytes(b"x")
    first.close()
    assert second.file(1).exists()
    second.close()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_files_are_kept(tmp_path: Path) -> None:
    folder = SharedFolder("r", tmp_path)
    for version in (8, 9, 10, 11):
        folder.file(version).write_bytes(b"x")
        folder.keep_last(2)
    assert [p.name for p in sorted(folder.path.glob("v*"))] == [
        "v00000010.safetensors",
        "v00000011.safetensors",
    ]
    folder.close()


def test_a_killed_runs_folder_is_removed_by_the_next_start_and_a_living_ones_is_not(tmp_path: Path) -> None:
    living = SharedFolder("living", tmp_path)
    code = (
        "import sys, time, pathlib; from actors.weight_files import SharedFolder\n"
        "f = SharedFolder('killed', pathlib.Path(sys.argv[1])); f.file(1).write_bytes(b'x')\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert remove_stale(tmp_path) == []
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert [path.name for path in remove_stale(tmp_path)] == [f"headrace-{os.getuid()}-killed"]
    assert list(tmp_path.iterdir()) == [living.path]
    living.close()


@pytest.mark.parametrize("run_id", ["", "a/b", "..", "x" * 65])
def test_a_run_id_is_one_plain_name(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ValueError, match="run id"):
        SharedFolder(run_id, tmp_path)


def test_a_host_fetches_the_bytes_once(tmp_path: Path) -> None:
    source = tmp_path / "v1.safetensors"
    source.write_bytes(b"weights")
    payload = payload_of(source, "another-host", ["reference"])
    copies = SharedFolder("copies", tmp_path)
    fetched = []

    def fetch(reference: Any, seconds: float) -> memoryview:
        fetched.append(reference)
        return memoryview(b"weights")

    for _ in range(2):
        path = local_file(payload, 1, lambda _: copies, 5, fetch)
        assert path.parent == copies.path
        assert path.read_bytes() == b"weights"
    assert fetched == ["reference"]
    copies.close()


def test_a_bad_copy_is_thrown_away(tmp_path: Path) -> None:
    source = tmp_path / "v1.safetensors"
    source.write_bytes(b"weights")
    payload = payload_of(source, "another-host", ["reference"])
    copies = SharedFolder("copies", tmp_path)
    with pytest.raises(WeightFileError, match="corrupt"):
        local_file(payload, 1, lambda _: copies, 5, lambda *_: memoryview(b"weighty"))
    assert not copies.file(1).exists()
    copies.close()


def test_a_file_on_another_host_without_a_reference_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "v1.safetensors"
    source.write_bytes(b"weights")

    def no_folder(_: str) -> SharedFolder:
        raise AssertionError("no folder is needed")

    with pytest.raises(WeightFileError, match=r"lies on host another-host.*tell the publisher"):
        local_file(payload_of(source, "another-host"), 1, no_folder, 5)


def test_cuda_handles_cross_as_plain_values() -> None:
    arguments = (
        *(torch.Tensor, torch.Size([2, 3]), (3, 1), 0, torch.storage.TypedStorage, torch.bfloat16, 0),
        *(b"handle", 4096, 0, False, b"counter", 8, b"event", True),
    )
    update = {
        "names": ["w"],
        "dtype_names": ["bfloat16"],
        "shapes": [[2, 3]],
        "ipc_handles": [{"GPU-1": arguments}],
    }
    plain = encode_update(update)
    assert plain["ipc_handles"][0]["GPU-1"] == [
        *(None, [2, 3], [3, 1], 0, None, "bfloat16", 0),
        *(b"handle", 4096, 0, False, b"counter", 8, b"event", True),
    ]
    assert decode_update(plain) == update
    plain["ipc_handles"][0]["GPU-1"][5] = "load"
    with pytest.raises(ValueError, match="dtype 'load'"):
        decode_update(plain)


# -- on a real engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


class Learner:
    """A learner's end: the model, and publishing with a probe."""

    def __init__(self, model: Any, root: Path) -> None:
        self.model, self.root = model, root
        self.publisher = self._publisher(model.named_parameters, "good")

    def _publisher(self, parameters: Any, run_id: str) -> WeightPublisher:
        stream = ParameterStream(parameters, torch.float32)
        return WeightPublisher(stream, backend="shared", run_id=run_id, rank=0, root=self.root)

    def publish(self, version: int) -> WeightUpdate:
        update = self.publisher.publish(version, *probe_of(self.model))
        assert update is not None
        return update

    def publish_as(self, version: int, change: Any) -> WeightUpdate:
        """An update whose tensors went through `change` first."""
        publisher = self._publisher(lambda: change(dict(self.model.named_parameters())).items(), "changed")
        update = publisher.publish(version, *probe_of(self.model))
        assert update is not None
        return update


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learner]:
    folder = tmp_path_factory.mktemp("model")
    made = Learner(save_model(folder, rare_end=True), tmp_path_factory.mktemp("shm"))
    made.folder = folder
    yield made
    made.publisher.close()


@pytest.fixture(scope="module")
def worker(loop: LoopThread, learner: Any) -> Iterator[Any]:
    made = make_worker(learner.folder)
    loop.run(made.start(), 200)
    loop.run(made.load_weights(learner.publish(0)))
    yield made
    loop.run(made.stop())


def flipped(update: WeightUpdate) -> None:
    path = Path(update.payload["path"])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncated(update: WeightUpdate) -> None:
    path = Path(update.payload["path"])
    path.write_bytes(path.read_bytes()[:-4])


def removed(update: WeightUpdate) -> None:
    Path(update.payload["path"]).unlink()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("damage", "message"), [(flipped, "corrupt"), (truncated, "truncated"), (removed, "missing")]
)
def test_a_damaged_file_is_refused_and_the_old_weights_stay(
    worker: Any, loop: LoopThread, learner: Any, damage: Any, message: str
) -> None:
    update = learner.publish(90)
    damage(update)
    with pytest.raises(SyncRefused, match=f"rollout actor rollout-0, weight version 90: .*{message}"):
        loop.run(worker.load_weights(update))
    group = loop.run(worker.sample(request(1, 3, 4)))
    assert {v for c in group.completions for v in c.versions} == {worker._version}


def without_norm(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}


def with_stranger(tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "model.stranger.weight": torch.zeros(2)}


def with_other_shape(tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "model.norm.weight": torch.zeros(3)}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_norm, "no tensor for the model's model.norm.weight"),
        (with_stranger, "stranger"),
        (with_other_shape, r"model.norm.weight has shape \(3,\), the model's has \(64,\)"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused_and_the_old_weights_stay(
    worker: Any, loop: LoopThread, learner: Any, change: Any, message: str
) -> None:
    with pytest.raises(SyncRefused, match=f"rollout actor rollout-0, weight version 90: .*{message}"):
        loop.run(worker.load_weights(learner.publish_as(90, change)))
    completion = loop.run(worker.sample(request(2, 3, 4))).completions[0]
    expected = logprobs(learner.model, (3, 4, *completion.token_ids))[1:]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.integration
def test_versions_only_go_up(worker: Any, loop: LoopThread, learner: Any) -> None:
    version = worker._version
    with pytest.raises(
        SyncRefused, match=f"version {version}: out of order, .* already has version {version}"
    ):
        loop.run(worker.load_weights(learner.publish(version)))
    other = replace(learner.publish(version + 1), payload={"backend": "nccl"})
    with pytest.raises(SyncRefused, match="sent by backend 'nccl', the actor receives by 'shared'"):
        loop.run(worker.load_weights(other))


@pytest.mark.integration
def test_requests_in_flight_live_through_two_syncs(worker: Any, loop: LoopThread, learner: Any) -> None:
    """Each token's log μ is that of the version it carries, given all tokens before it."""
    first = worker._version
    old = {first: [p.clone() for p in learner.model.parameters()]}

    async def scenario() -> tuple[Any, list[Any]]:
        sampling = asyncio.create_task(worker.sample(request(3, 3, 9, 4, size=96, new=240)))
        proofs = []
        for version in (first + 1, first + 2):
            await asyncio.sleep(0.2)  # of the second or more that the requests take
            perturb(learner.model, version)
            old[version] = [p.clone() for p in learner.model.parameters()]
            proofs.append(await worker.load_weights(learner.publish(version)))
        return await sampling, proofs

    group, proofs = loop.run(scenario())
    assert [proof.version for proof in proofs] == [first + 1, first + 2]
    assert all(proof.requests_in_flight > 0 for proof in proofs)
    assert all(proof.probe_max_abs_diff < 1e-3 for proof in proofs)
    assert len(group.completions) == 96, "none is lost"
    assert {v for c in group.completions for v in c.versions} == {first, first + 1, first + 2}
    for version, parameters in old.items():
        with torch.no_grad():
            for parameter, value in zip(learner.model.parameters(), parameters, strict=True):
                parameter.copy_(value)
        for completion in group.completions[:12]:
            expected = logprobs(learner.model, (3, 9, 4, *completion.token_ids))[2:]
            for token_version, found, wanted in zip(
                completion.versions, completion.logprobs, expected, strict=True
            ):
                if token_version == version:
                    assert found == pytest.approx(wanted, abs=1e-3)
    for completion in group.completions:
        assert list(completion.versions) == sorted(completion.versions)
        assert completion.finished or len(completion.token_ids) == 240


@pytest.mark.integration
def test_cached_prefixes_of_old_weights_are_dropped(worker: Any, loop: LoopThread, learner: Any) -> None:
    prompt = tuple(range(3, 30)) * 3  # 81 tokens: two whole blocks of 32 are cached

    async def cached_tokens() -> int:
        output = await worker._engine.generate(list(prompt), worker._params(1, 1, 1.0), 60, "a sample")
        return int(output.num_cached_tokens)

    assert [loop.run(cached_tokens()) for _ in range(2)] == [0, 64]
    perturb(learner.model, 7)
    loop.run(worker.load_weights(learner.publish(worker._version + 1)))
    completion = loop.run(worker.sample(request(4, *prompt, new=8))).completions[0]
    expected = logprobs(learner.model, prompt + completion.token_ids)[len(prompt) - 1 :]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.integration
def test_an_update_that_did_not_arrive_is_refused_below_the_tolerance(
    worker: Any, loop: LoopThread, learner: Any
) -> None:
    """The file has the weights of before; the probe says that each log-probability moved by 0.005."""
    version = worker._version + 1
    loop.run(worker.load_weights(learner.publish(version)))
    update = learner.publish(version + 1)
    moved = tuple(tuple(value - 0.005 for value in row) for row in update.probe_logprobs)
    message = f"rollout-0, weight version {version + 1}: the actor still runs the old weights: .*{version} on"
    with pytest.raises(SyncRefused, match=message):
        loop.run(worker.load_weights(replace(update, probe_logprobs=moved)))
    assert worker._version == version
    worker._refused = ""  # the engine's weights are in fact in order: let the tests below have it


@pytest.mark.integration
def test_a_wrong_probe_is_refused_by_name_for_good(worker: Any, loop: LoopThread, learner: Any) -> None:
    """Runs last: the engine then has weights that nobody vouches for."""
    version = worker._version + 1
    update = learner.publish(version)
    wrong = [list(row) for row in update.probe_logprobs]
    wrong[1][0] += 0.5
    update = replace(update, probe_logprobs=tuple(map(tuple, wrong)))
    message = (
        rf"rollout actor rollout-0, weight version {version}: probe .* by up to 0\.5 nats.*tolerance of 0\.01"
    )
    with pytest.raises(SyncRefused, match=message):
        loop.run(worker.load_weights(update))
    for call in (
        worker.sample(request(5, 3, 4)),
        worker.check(),
        worker.load_weights(learner.publish(version + 1)),
    ):
        with pytest.raises(SyncRefused, match=message):
            loop.run(call)


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "in_flight"), [("llama", "keep"), ("qwen2", "wait"), ("gpt2", "keep")])
def test_tied_embeddings_follow(kind: str, in_flight: str, loop: LoopThread, tmp_path: Path) -> None:
    """The trap: the packed output head stays behind, unseen by any checksum of parameters."""
    learner = Learner(save_model(tmp_path, kind, tied=True), tmp_path)
    worker = make_worker(tmp_path, sync={"in_flight": in_flight})
    try:
        loop.run(worker.start(), 200)
        for version in range(3):
            perturb(learner.model, version)
            proof = loop.run(worker.load_weights(learner.publish(version)))
            assert proof.probe_max_abs_diff < 1e-3
        completion = loop.run(worker.sample(request(1, 3, 4))).completions[0]
        expected = logprobs(learner.model, (3, 4, *completion.token_ids))[1:]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    finally:
        loop.run(worker.stop())
        learner.publisher.close()
