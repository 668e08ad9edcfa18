"""The send side of weight sync: every learner rank gathers, rank 0 publishes.

    named full parameters, gathered layer by layer → cast to the rollout's dtype → one of
      shared: one safetensors file in shared memory (and, for other hosts, Ray's object store)
      nccl, ipc: vLLM's own trainer engines, over `RolloutSyncClient`; not yet run on a GPU

`WeightPublisher.publish` is called on all ranks, because gathering ZeRO-3 shards is a collective.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from actors.ipc_handles import encode_update
from actors.records import WeightUpdate
from actors.settings import SyncSettings
from actors.weight_files import SHARED_MEMORY, SharedFolder, host_id, remove_stale

Backend = Literal["shared", "nccl", "ipc"]
NamedTensors = Callable[[], Iterator[tuple[str, torch.Tensor]]]
_FORMAT_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def resolve_backend(settings: SyncSettings, device: str, colocated: bool) -> Backend:
    """The backend that `sync.backend` means.

    Args:
        settings: `[sync]`.
        device: where learner and actors compute, `cpu` or `cuda`.
        colocated: whether the learner's rank 0 and the actors share a GPU.
    """
    backend = settings.backend
    if backend == "auto":
        return "shared" if device == "cpu" else "ipc" if colocated else "nccl"
    if device == "cpu" and backend != "shared":
        raise ValueError(
            f'sync.backend = "{backend}" needs CUDA, the run is on a CPU; use "shared" or "auto"'
        )
    if backend == "ipc" and not colocated:
        raise ValueError('sync.backend = "ipc" needs learner and actors on one GPU; use "nccl" or "auto"')
    if backend == "nccl" and colocated:
        raise ValueError('sync.backend = "nccl" can\'t have two ranks on one GPU; use "ipc" or "auto"')
    return backend


@dataclass(frozen=True)
class TensorMeta:
    """Name, type on the wire and full shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class ParameterStream:
    """The policy's parameters as they are published: gathered and cast.

    Iterating it is a collective on all learner ranks.
    """

    def __init__(self, parameters: NamedTensors, dtype: torch.dtype) -> None:
        """Keep the recipe.

        Args:
            parameters: a fresh pass over (name, full tensor), the same names in the same order each time;
                tied weights once, as the actors tie them themselves.
            dtype: the rollout engine's; floating-point tensors are cast to it, others stay.
        """
        self._parameters = parameters
        self._dtype = dtype
        self._metadata: list[TensorMeta] | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._parameters():
            full = tensor.detach()
            yield name, (full.to(self._dtype) if full.is_floating_point() else full).contiguous()

    def metadata(self) -> list[TensorMeta]:
        """What iteration yields. The first call is a pass of its own, a collective as well."""
        if self._metadata is None:
            self._metadata = [TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in self]
        return self._metadata


def write_safetensors(
    path: Path, metadata: Sequence[TensorMeta], tensors: Iterable[tuple[str, torch.Tensor]]
) -> tuple[int, str]:
    """Write a safetensors file one tensor at a time; return its size and SHA-256.

    The format is an 8-byte little-endian header length, a JSON header, and the tensors' bytes without gaps.
    It is written next to `path` and moved there when whole, with mode 0600.

    Raises:
        RuntimeError: the tensors are not those that the metadata announces.
    """
    header: dict[str, Any] = {}
    offset = 0
    for meta in metadata:
        end = offset + meta.nbytes
        header[meta.name] = {
            "dtype": _FORMAT_NAMES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    partial = path.with_suffix(".part")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:

            def write(data: bytes | memoryview) -> None:
                digest.update(data)
                file.write(data)

            write(len(encoded).to_bytes(8, "little"))
            write(encoded)
            for (name, tensor), meta in zip(tensors, metadata, strict=True):
                found = TensorMeta(name, tensor.dtype, tuple(tensor.shape))
                if found != meta:
                    raise RuntimeError(f"weights to publish changed: announced {meta}, got {found}")
                write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
            size = file.tell()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return size, digest.hexdigest()


class SharedFiles:
    """Transport `shared`: a file a version, the last two kept, the folder gone after `close`."""

    def __init__(self, stream: ParameterStream, run_id: str, rank: int, remote: bool, root: Path) -> None:
        self._stream, self._rank, self._remote = stream, rank, remote
        self._run_id = run_id
        self._refs: list[Any] = []
        self._folder: SharedFolder | None = None
        if rank == 0:
            remove_stale(root)
            self._folder = SharedFolder(run_id, root)

    def send(self, version: int) -> dict[str, Any]:
        """Write a version's file; other ranks only take part in gathering."""
        metadata = self._stream.metadata()
        if self._folder is None:
            for _ in self._stream:
                pass
            return {}
        path = self._folder.file(version)
        size, sha256 = write_safetensors(path, metadata, self._stream)
        self._folder.keep_last(2)
        refs = [self._put(path)] if self._remote else None
        return {
            "run_id": self._run_id,
            "path": str(path),
            "bytes": size,
            "sha256": sha256,
            "host": host_id(),
            "object_ref": refs,
        }

    def _put(self, path: Path) -> Any:
        import numpy as np
        import ray

        reference = ray.put(np.memmap(path, dtype=np.uint8, mode="r"))
        self._refs = [*self._refs[-1:], reference]
        return reference

    def close(self) -> None:
        """Drop the object store's copies and the folder."""
        self._refs.clear()
        if self._folder is not None:
            self._folder.close()


class RolloutSyncClient:
    """vLLM's trainer-side client protocol over our rollout actors, each an engine of its own.

    vLLM's Ray client sends one payload to all; here each engine's workers need ranks of their own in the
    transfer group, so `rank_offset` grows by an engine's workers from actor to actor. Not yet run on a GPU.
    """

    def __init__(self, actors: Mapping[str, Any], workers_per_actor: int, seconds: float) -> None:
        """Keep the handles.

        Args:
            actors: Ray handles of `RolloutWorker`, by name.
            workers_per_actor: `rollout.tensor_parallel`.
            seconds: deadline of each call.
        """
        self._actors, self._workers, self._seconds = dict(actors), workers_per_actor, seconds

    def init_payloads(self, init_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Each actor's own init info."""
        payloads = {name: dict(init_info) for name in self._actors}
        for index, payload in enumerate(payloads.values()):
            if "rank_offset" in payload:
                payload["rank_offset"] += index * self._workers
        return payloads

    def _call(self, method: str, arguments: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        import ray

        calls = {
            name: getattr(actor, method).remote(*(arguments or {}).get(name, ()))
            for name, actor in self._actors.items()
        }
        ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=self._seconds)
        late = sorted(name for name, ref in calls.items() if ref not in set(ready))
        ray.get(ready)  # an actor's own error says more than another's lateness
        if late:
            raise TimeoutError(f"waited {self._seconds:g} s for rollout actors {', '.join(late)}: {method}")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every actor join the transfer group."""
        payloads = self.init_payloads(init_info)
        self._call("init_weight_transfer_engine", {name: (info,) for name, info in payloads.items()})

    def start_weight_update(self) -> None:
        """Pause every actor and start an update."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Let every actor receive a chunk."""
        if "ipc_handles" in update_info:
            update_info = encode_update(update_info)
        self._call("update_weights", dict.fromkeys(self._actors, (update_info,)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update; `RolloutWorker.load_weights` sets the version, resumes and proves."""
        del weight_version
        self._call("finish_weight_update")


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def native_init_info(backend: Backend, rank: int, engines: int, workers_per_engine: int, address: str) -> Any:
    """vLLM's trainer-side init info: the learner's rank 0 is rank 0 of a group with all engines' workers."""
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            rank=rank,
            master_address=address,
            master_port=free_port() if rank == 0 else 0,  # other ranks don't join the transfer group
            world_size=1 + engines * workers_per_engine,
            packed=True,
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=rank, packed=False)


def weight_source(stream: ParameterStream) -> Any:
    """The stream as vLLM's `WeightSource`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in stream.metadata()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(stream)

    return Source()


class NativeTransfer:
    """Transports `nccl` and `ipc`: vLLM's trainer engine drives the actors. Not yet run on a GPU."""

    def __init__(self, stream: ParameterStream, init_info: Any, client: RolloutSyncClient) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._engine = WeightTransferTrainerFactory.trainer_init(
            init_info, client=client, source=weight_source(stream)
        )

    def send(self, version: int) -> dict[str, Any]:
        """Send all weights; the actors stay paused until they are told the version."""
        del version
        self._engine.send_weights()
        return {}

    def close(self) -> None:
        """Leave the transfer group."""
        self._engine.shutdown()


class WeightPublisher:
    """Publishes the policy's weights. Make one on every learner rank, and call it on every one."""

    def __init__(
        self,
        stream: ParameterStream,
        *,
        backend: Backend,
        run_id: str,
        rank: int,
        remote_hosts: bool = False,
        client: RolloutSyncClient | None = None,
        engines: int = 1,
        workers_per_engine: int = 1,
        address: str = "127.0.0.1",
        root: Path = SHARED_MEMORY,
    ) -> None:
        """Open the transport.

        Args:
            stream: what to publish.
            backend: from `resolve_backend`.
            run_id: names the folder in shared memory.
            rank: this learner rank; rank 0 sends.
            remote_hosts: shared: some actor's `EngineFacts.host_id` is not this host's.
            client: nccl, ipc: the way to the actors.
            engines: nccl: number of rollout actors.
            workers_per_engine: nccl: `rollout.tensor_parallel`.
            address: nccl: rank 0's address as the actors reach it.
            root: shared: where the folder lies.
        """
        self._backend, self._rank = backend, rank
        self._transport: SharedFiles | NativeTransfer
        if backend == "shared":
            self._transport = SharedFiles(stream, run_id, rank, remote_hosts, root)
        else:
            if client is None:
                raise ValueError(f'sync.backend = "{backend}" needs the rollout actors\' handles')
            info = native_init_info(backend, rank, engines, workers_per_engine, address)
            self._transport = NativeTransfer(stream, info, client)

    def publish(
        self,
        version: int,
        probe_token_ids: Sequence[Sequence[int]],
        probe_logprobs: Sequence[Sequence[float]],
    ) -> WeightUpdate | None:
        """Publish the current weights as `version`; the update for the actors on rank 0, None elsewhere.

        Args:
            version: learner steps taken.
            probe_token_ids: sequences that the actors score to prove the weights.
            probe_logprobs: the learner's log-probabilities of all tokens but each sequence's first, at
                temperature 1, with these weights.
        """
        payload = self._transport.send(version)
        if self._rank != 0:
            return None
        return WeightUpdate(
            version=version,
            payload={"backend": self._backend, **payload},
            probe_token_ids=tuple(tuple(ids) for ids in probe_token_ids),
            probe_logprobs=tuple(tuple(logprobs) for logprobs in probe_logprobs),
        )

    def close(self) -> None:
        """Leave nothing behind in shared memory."""
        self._transport.close()
