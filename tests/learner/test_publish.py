"""The send side: the file, the choice of backend, and what vLLM's native engines are told."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from actors.settings import SyncSettings
from actors.weight_files import verify
from learner.publish import (
    ParameterStream,
    RolloutSyncClient,
    TensorMeta,
    WeightPublisher,
    native_init_info,
    resolve_backend,
    weight_source,
    write_safetensors,
)

EMBED = torch.arange(6, dtype=torch.float32).reshape(3, 2) / 7


def parameters() -> Iterator[tuple[str, torch.Tensor]]:
    yield "embed.weight", EMBED
    yield "norm.weight", torch.tensor([1.0, float("inf")])
    yield "steps", torch.tensor(5)


def stream(dtype: torch.dtype = torch.bfloat16) -> ParameterStream:
    return ParameterStream(parameters, dtype)


def read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_metadata_and_iteration_agree_after_the_cast() -> None:
    made = stream()
    assert made.metadata() == [
        TensorMeta("embed.weight", torch.bfloat16, (3, 2)),
        TensorMeta("norm.weight", torch.bfloat16, (2,)),
        TensorMeta("steps", torch.int64, ()),
    ]
    assert made.metadata() == [TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in made]
    assert made.metadata()[0].nbytes == 3 * 2 * 2


def test_vllms_weight_source_says_the_same() -> None:
    source = weight_source(stream())
    found = [(name, t.dtype, tuple(t.shape)) for name, t in source]
    assert found == [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    assert list(source) != [], "a second pass starts anew"


def test_the_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    made = stream()
    path = tmp_path / "v1.safetensors"
    size, sha256 = write_safetensors(path, made.metadata(), made)
    data = path.read_bytes()
    assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left"
    found = read(path)
    assert list(found) == ["embed.weight", "norm.weight", "steps"]
    for name, tensor in made:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    # 12 bytes of embedding, then 4 of norm, then 8 of steps, from the end of the header on.
    header_length = int.from_bytes(data[:8], "little")
    offsets = [entry["data_offsets"] for entry in json.loads(data[8 : 8 + header_length]).values()]
    assert offsets == [[0, 12], [12, 16], [16, 24]]
    assert size == 8 + header_length + 24


def test_tensors_that_change_between_syncs_are_refused(tmp_path: Path) -> None:
    metadata = stream().metadata()
    other = [(name, tensor.float()) for name, tensor in stream()]
    with pytest.raises(RuntimeError, match=r"announced .*embed\.weight.*bfloat16.*got .*float32"):
        write_safetensors(tmp_path / "v1.safetensors", metadata, other)
    with pytest.raises(ValueError, match="zip"):
        write_safetensors(tmp_path / "v1.safetensors", metadata, list(stream())[:-1])
    assert list(tmp_path.iterdir()) == []


def test_rank_zero_publishes_and_others_only_gather(tmp_path: Path) -> None:
    passes = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        passes.append(1)
        yield from parameters()

    first, second = (
        WeightPublisher(
            ParameterStream(counted, torch.float32), backend="shared", run_id="r", rank=rank, root=tmp_path
        )
        for rank in (0, 1)
    )
    assert second.publish(3, [[1, 2]], [[-0.5]]) is None
    gathered = len(passes)
    update = first.publish(3, [[1, 2]], [[-0.5]])
    assert len(passes) - gathered == gathered, "every rank takes part in every pass"
    assert update is not None
    assert (update.version, update.probe_token_ids, update.probe_logprobs) == (3, ((1, 2),), ((-0.5,),))
    payload = update.payload
    assert payload["backend"] == "shared"
    assert payload["object_ref"] is None
    verify(Path(payload["path"]), payload["bytes"], payload["sha256"])
    second.close()
    assert Path(payload["path"]).exists()
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_two_versions_are_kept(tmp_path: Path) -> None:
    publisher = WeightPublisher(stream(), backend="shared", run_id="r", rank=0, root=tmp_path)
    paths = []
    for version in range(4):
        update = publisher.publish(version, [[1, 2]], [[-0.5]])
        assert update is not None
        paths.append(Path(update.payload["path"]))
    assert [path.exists() for path in paths] == [False, False, True, True]
    publisher.close()


@pytest.mark.parametrize(
    ("backend", "device", "colocated", "expected"),
    [
        ("auto", "cpu", False, "shared"),
        ("auto", "cuda", False, "nccl"),
        ("auto", "cuda", True, "ipc"),
        ("shared", "cuda", True, "shared"),
        ("nccl", "cuda", False, "nccl"),
    ],
)
def test_backend(backend: Any, device: str, colocated: bool, expected: str) -> None:
    assert resolve_backend(SyncSettings(backend=backend), device, colocated) == expected


@pytest.mark.parametrize(
    ("backend", "device", "colocated"),
    [("nccl", "cpu", False), ("ipc", "cpu", True), ("ipc", "cuda", False), ("nccl", "cuda", True)],
)
def test_backends_that_cannot_work_are_refused(backend: Any, device: str, colocated: bool) -> None:
    with pytest.raises(ValueError, match=rf'sync\.backend = "{backend}".*use "'):
        resolve_backend(SyncSettings(backend=backend), device, colocated)


def test_nccl_group_holds_rank_zero_and_every_engines_workers() -> None:
    info = native_init_info("nccl", 0, engines=3, workers_per_engine=2, address="10.0.0.1")
    assert (info.backend, info.world_size, info.master_address, info.is_sender) == (
        "nccl",
        7,
        "10.0.0.1",
        True,
    )
    assert 0 < info.master_port < 65536
    assert not native_init_info("nccl", 1, 3, 2, "10.0.0.1").is_sender
    assert native_init_info("ipc", 0, 1, 1, "").backend == "ipc"


def test_each_engine_gets_ranks_of_its_own() -> None:
    client = RolloutSyncClient({"a": None, "b": None, "c": None}, workers_per_actor=2, seconds=5)
    payloads = client.init_payloads({"rank_offset": 1, "world_size": 7})
    # Rank 0 is the learner's; a's two workers are 1 and 2, b's 3 and 4, c's 5 and 6.
    assert {name: payload["rank_offset"] for name, payload in payloads.items()} == {"a": 1, "b": 3, "c": 5}
    assert client.init_payloads({"packed": False})["b"] == {"packed": False}


def test_the_client_speaks_vllms_protocol() -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    assert isinstance(RolloutSyncClient({}, 1, 5), VLLMWeightSyncClient)


def test_native_backends_need_the_actors() -> None:
    with pytest.raises(ValueError, match="needs the rollout actors' handles"):
        WeightPublisher(stream(), backend="nccl", run_id="r", rank=0)
