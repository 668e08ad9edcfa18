"""The rollout actor: one vLLM engine that samples groups and loads, and proves, new weights.

`RolloutWorker` is a plain class; `cluster` wraps it with `ray.remote` as an asynchronous actor. Many `sample`
calls run at once; one `load_weights` runs beside them:

    check the file → pause → load → label with the version → drop cached prefixes → resume → prove

Requests in flight stay: their tokens so far keep their version and log μ, and their key-value entries are
computed anew, so each later token is sampled from exactly the policy whose version it carries.
"""

import asyncio
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from actors.end_tokens import end_tokens
from actors.engine import EngineDied, EngineSpec, WatchedEngine, node_id
from actors.proof import (
    DEFAULT_TOLERANCE,
    Table,
    max_abs_diff,
    mean_abs_diff,
    probe_tolerance,
    runs_old_weights,
)
from actors.records import Completion, SampledGroup, SampleRequest, SyncProof, WeightUpdate
from actors.settings import RolloutSettings, SyncSettings
from actors.shipping import ShippedFolder, local_folder
from actors.waits import DeadlineExceeded
from actors.weight_files import SharedFolder, WeightFileError, host_id, local_file, remove_stale

__all__ = ["ActorHealth", "DeadlineExceeded", "EngineDied", "EngineFacts", "RolloutWorker", "SyncRefused"]

_TRANSFER_ENGINES = {"shared": "headrace_shared", "nccl": "nccl", "ipc": "headrace_ipc"}


class SyncRefused(RuntimeError):  # noqa: N818 - reads better where it is raised and caught
    """A weight update was not taken, or not proved; the message names actor, version and reason."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine turned out to be."""

    actor: str
    vllm_version: str
    dtype: str
    max_num_seqs: int
    kv_tokens: int
    engine_pid: int
    node_id: str
    host_id: str
    start_seconds: float
    warmup_seconds: float


@dataclass(frozen=True, slots=True)
class ActorHealth:
    """An actor's answer to `check`."""

    actor: str
    version: int
    groups_in_flight: int
    sequences_in_flight: int


def load_timeout(rollout: RolloutSettings, sync: SyncSettings) -> float:
    """Seconds in which an actor loads and proves weights.

    With `sync.in_flight = "wait"` the requests in flight finish first, which may take all their time.
    """
    return sync.timeout_s + (rollout.generate_timeout_s if sync.in_flight == "wait" else 0.0)


def completion_from(output: Any, ends: frozenset[int], whom: str) -> Completion:
    """A vLLM `CompletionOutput` as our record, with every promise of the record checked."""
    tokens = tuple(output.token_ids)
    logprobs = tuple(output.logprobs.logprobs)
    if tuple(output.logprobs.token_ids) != tokens:
        raise RuntimeError(f"{whom}: log-probabilities of other tokens than the {len(tokens)} sampled ones")
    for position, logprob in enumerate(logprobs):
        if not math.isfinite(logprob):
            raise RuntimeError(
                f"{whom}: log-probability {logprob} of sampled token {tokens[position]} at position "
                f"{position}: the policy's weights or logits are not finite"
            )
    versions = [int(span.version) for span in output.weight_versions for _ in range(span.start, span.end)]
    reason = output.finish_reason
    if reason not in ("stop", "length"):
        raise RuntimeError(
            f"{whom}: a sample ended with {reason!r} instead of an end token or the length limit"
        )
    if reason == "stop" and tokens[-1] not in ends:
        raise RuntimeError(f"{whom}: a sample stopped after token {tokens[-1]}, which is no end token")
    finish: Literal["stop", "length"] = "stop" if reason == "stop" else "length"
    return Completion(tokens, logprobs, tuple(versions), output.text, finish)


class RolloutWorker:
    """One vLLM engine. Every call ends: with its result, or with an error that names this actor."""

    def __init__(
        self,
        name: str,
        model_path: str,
        rollout: RolloutSettings,
        sync: SyncSettings,
        *,
        dtype: str,
        max_length: int,
        seed: int,
        device: str,
    ) -> None:
        """Keep the settings; `start` does the work.

        Args:
            name: unique among the run's actors; every error carries it.
            model_path: folder or hub name, weights in safetensors.
            rollout: `[rollout]`.
            sync: `[sync]`, with `backend` resolved by the learner where it was `auto`.
            dtype: `float32` or `bfloat16`.
            max_length: prompt plus response, in tokens.
            seed: of this engine; give every actor its own.
            device: `cpu` or `cuda`.
        """
        if dtype not in DEFAULT_TOLERANCE:
            raise ValueError(f"dtype {dtype!r}: use one of {', '.join(DEFAULT_TOLERANCE)}")
        backend = sync.backend if sync.backend != "auto" else "shared" if device == "cpu" else "nccl"
        spec = EngineSpec(
            name, model_path, rollout, dtype, max_length, seed, device, _TRANSFER_ENGINES[backend]
        )
        self._name, self._rollout, self._sync, self._backend = name, rollout, sync, backend
        self._spec = spec
        self._engine = WatchedEngine(spec)
        self._tolerance = probe_tolerance(sync, dtype)
        self._version: int = 0
        self._loaded = False
        self._proved: WeightUpdate | None = None
        self._refused = ""
        self._groups: set[int] = set()
        self._loading: asyncio.Lock | None = None
        self._copies: SharedFolder | None = None
        self._ends: frozenset[int] = frozenset()

    # -- life ---------------------------------------------------------------------------------------------

    async def use_model(self, shipped: ShippedFolder) -> None:
        """Before `start`: take the model from the driver's host, unless this is it. Raises ShippingError."""
        seconds = self._rollout.start_timeout_s
        path = await asyncio.to_thread(local_folder, shipped, seconds)
        self._spec = replace(self._spec, model_path=str(path))
        self._engine = WatchedEngine(self._spec)

    async def start(self, version: int = 0) -> EngineFacts:
        """Start the engine on the weights of `model_path`, called `version`, and generate once to warm up."""
        self._loading = asyncio.Lock()
        started = time.monotonic()
        self._ends = end_tokens(self._spec.model_path)
        await self._engine.start()
        self._version = version
        seconds = self._rollout.start_timeout_s
        llm = self._engine.llm
        await self._engine.guard(
            llm.update_weight_version(str(version)), seconds, "to set its weights' version"
        )
        warm = time.monotonic()
        await self._engine.generate(
            [min(self._ends)], self._params(2, 8, 1.0), seconds, "its first generation, to warm up"
        )
        await self._probe([(min(self._ends),) * 2], seconds)
        await self._engine.guard(llm.reset_prefix_cache(), seconds, "to clear its cache after warming up")
        import vllm

        return EngineFacts(
            actor=self._name,
            vllm_version=vllm.__version__,
            dtype=self._spec.dtype,
            max_num_seqs=self._rollout.max_num_seqs,
            kv_tokens=self._engine.kv_tokens,
            engine_pid=self._engine.pid,
            node_id=node_id(),
            host_id=host_id(),
            start_seconds=warm - started,
            warmup_seconds=time.monotonic() - warm,
        )

    async def check(self) -> ActorHealth:
        """Say that the actor is well, or raise what ails it."""
        self._ensure_usable()
        self._engine.ensure_alive()
        return ActorHealth(self._name, self._version, len(self._groups), self._engine.unfinished)

    async def stop(self) -> None:
        """Stop the engine and remove fetched weights."""
        await self._engine.stop()
        if self._copies is not None:
            self._copies.close()
            self._copies = None

    # -- sampling -----------------------------------------------------------------------------------------

    def _params(self, samples: int, new_tokens: int, temperature: float) -> Any:
        from vllm import SamplingParams

        # No per-request seed: on a CPU a batch of seeded requests brings the engine down.
        return SamplingParams(
            n=samples,
            max_tokens=new_tokens,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=sorted(self._ends),
            output_kind=_final_only(),
        )

    def _request_params(self, request: SampleRequest) -> Any:
        return self._params(request.group_size, request.max_new_tokens, request.temperature)

    async def sample(self, request: SampleRequest) -> SampledGroup:
        """Draw a group of samples.

        Raises:
            ValueError: prompt and response don't fit into the context.
            SyncRefused: an earlier weight update failed, so nobody knows what this actor would sample from.
            EngineDied, DeadlineExceeded: the engine died, or took longer than `generate_timeout_s`.
        """
        self._ensure_usable()
        prompt = request.prompt
        if len(prompt.token_ids) + request.max_new_tokens > self._spec.max_length:
            raise ValueError(
                f"prompt {prompt.id}: {len(prompt.token_ids)} tokens and {request.max_new_tokens} new ones "
                f"exceed the model's {self._spec.max_length}; lower rollout.max_new_tokens or raise "
                "model.max_length"
            )
        started = time.monotonic()
        what = f"group {request.group_id} ({request.group_size} samples of prompt {prompt.id})"
        params = self._request_params(request)
        self._groups.add(request.group_id)
        try:
            output = await self._engine.generate(
                list(prompt.token_ids), params, self._rollout.generate_timeout_s, what
            )
        finally:
            self._groups.discard(request.group_id)
        self._ensure_usable()
        if len(output.outputs) != request.group_size:
            raise RuntimeError(f"{self._engine.whom}: {len(output.outputs)} samples came for {what}")
        whom = f"{self._engine.whom}, {what}"
        completions = tuple(completion_from(one, self._ends, whom) for one in output.outputs)
        return SampledGroup(request.group_id, prompt, completions, self._name, time.monotonic() - started)

    def _ensure_usable(self) -> None:
        if self._refused:
            raise SyncRefused(self._refused)

    # -- weights ------------------------------------------------------------------------------------------

    async def load_weights(self, update: WeightUpdate) -> SyncProof:
        """Load the weights of a version and prove them.

        What is wrong with an update before the model is touched (version, file, names, shapes) leaves the old
        weights in use. After that a failure is final: every later call raises it.

        Raises:
            SyncRefused: the update is not usable, or the probe shows other weights than the learner's.
            EngineDied, DeadlineExceeded: the engine died, or took longer than `load_timeout`.
        """
        assert self._loading is not None, "`start` comes first"
        async with self._loading:
            self._ensure_usable()
            whom = f"{self._engine.whom}, weight version {update.version}"
            self._check_order(update, whom)
            deadline = time.monotonic() + load_timeout(self._rollout, self._sync)
            path = await self._prepare(update, whom, deadline)
            try:
                return await self._load_and_prove(update, path, whom, deadline)
            except (EngineDied, DeadlineExceeded, SyncRefused) as error:
                self._refused = str(error)
                raise
            except Exception as error:
                self._refused = f"{whom}: loading failed: {error}"
                raise SyncRefused(self._refused) from error

    def _check_order(self, update: WeightUpdate, whom: str) -> None:
        if update.version < self._version or (self._loaded and update.version == self._version):
            raise SyncRefused(f"{whom}: out of order, the actor already has version {self._version}")
        backend = update.payload.get("backend")
        if backend != self._backend:
            raise SyncRefused(f"{whom}: sent by backend {backend!r}, the actor receives by {self._backend!r}")
        if not update.probe_token_ids:
            raise SyncRefused(f"{whom}: there is no probe to prove it with")

    async def _prepare(self, update: WeightUpdate, whom: str, deadline: float) -> Path | None:
        """All that can go wrong without touching the model; requests go on meanwhile."""
        if self._backend != "shared":
            return None
        seconds = max(0.001, deadline - time.monotonic())
        engine = self._engine
        try:
            path = await engine.guard(
                asyncio.to_thread(local_file, update.payload, update.version, self._open_copies, seconds),
                seconds,
                f"the weight file of version {update.version}",
            )
            await engine.guard(engine.llm.start_weight_update(), seconds, "to start a weight update")
            await engine.guard(
                self._send({"action": "check", "path": str(path)}), seconds, "to check a weight file"
            )
        except WeightFileError as error:
            raise SyncRefused(f"{whom}: {error}") from error
        except (EngineDied, DeadlineExceeded):
            raise
        except Exception as error:
            raise SyncRefused(f"{whom}: the engine refused the file: {error}") from error
        return path

    def _open_copies(self, run_id: str) -> SharedFolder:
        if self._copies is None:
            remove_stale()
            self._copies = SharedFolder(f"{run_id}-copies")
        return self._copies

    async def _send(self, info: Mapping[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.llm.update_weights(WeightTransferUpdateRequest(update_info=dict(info)))

    async def _load_and_prove(
        self, update: WeightUpdate, path: Path | None, whom: str, deadline: float
    ) -> SyncProof:
        engine, llm = self._engine, self._engine.llm

        async def step(work: Any, what: str) -> Any:
            remaining = max(0.001, deadline - time.monotonic())
            return await engine.guard(work, remaining, f"{what} for weight version {update.version}")

        started = time.monotonic()
        if path is not None:
            await step(self._pause(), "to pause")
            await step(self._send({"action": "load", "path": str(path)}), "to load the weights")
            await step(llm.finish_weight_update(), "to finish the load")
        in_flight = engine.unfinished
        await step(llm.update_weight_version(str(update.version)), "to label its weights")
        # Old key-value entries must not serve new weights: cached prefixes go, running requests recompute.
        if not await step(llm.reset_prefix_cache(reset_running_requests=True), "to drop cached prefixes"):
            raise SyncRefused(f"{whom}: the engine kept key-value entries of the old weights")
        await step(llm.resume_generation(), "to resume")
        loaded = time.monotonic()
        found = await self._probe(update.probe_token_ids, max(0.001, deadline - time.monotonic()))
        worst = max_abs_diff(found, update.probe_logprobs)
        if worst > self._tolerance:
            raise SyncRefused(
                f"{whom}: probe log-probabilities differ from the learner's by up to {worst:.4g} nats, "
                f"more than the tolerance of {self._tolerance:g} (sync.tolerance): the actor does not run "
                "these weights"
            )
        self._refuse_old_weights(found, update, whom)
        self._version, self._loaded = update.version, True
        self._proved = replace(update, payload={})  # the payload may hold the object store's copy
        return SyncProof(
            actor=self._name,
            version=update.version,
            probe_max_abs_diff=worst,
            load_seconds=loaded - started,
            probe_seconds=time.monotonic() - loaded,
            requests_in_flight=in_flight,
        )

    def _refuse_old_weights(self, found: Table, update: WeightUpdate, whom: str) -> None:
        last = self._proved
        if last is None or last.probe_token_ids != update.probe_token_ids:
            return
        old, new = last.probe_logprobs, update.probe_logprobs
        if runs_old_weights(found, old, new):
            raise SyncRefused(
                f"{whom}: the actor still runs the old weights: its probe log-probabilities are "
                f"{mean_abs_diff(found, old):.3g} nats from those of version {last.version} on average, and "
                f"{mean_abs_diff(found, new):.3g} from those of version {update.version}"
            )

    async def _pause(self) -> None:
        await self._engine.llm.pause_generation(mode=self._sync.in_flight, clear_cache=False)

    async def _probe(self, sequences: Iterable[tuple[int, ...]], seconds: float) -> list[list[float]]:
        """Log-probability, at temperature 1, of every token but the first of each sequence."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, output_kind=_final_only(), detokenize=False
        )
        outputs = await asyncio.gather(
            *(
                self._engine.generate(
                    list(ids)[: self._spec.max_length - 1], params, seconds, "a weight probe"
                )
                for ids in sequences
            )
        )
        return [list(output.prompt_logprobs.logprobs) for output in outputs]

    # -- native transfer (nccl, ipc): the learner drives these; not yet run on a GPU -------------------------

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Join the learner's transfer group."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info=dict(init_info))
        await self._native(
            self._engine.llm.init_weight_transfer_engine(request), "to join the transfer group"
        )

    async def start_weight_update(self) -> None:
        """Pause and get ready; `load_weights` of the same version labels, resumes and proves."""
        await self._native(self._pause(), "to pause")
        await self._native(self._engine.llm.start_weight_update(), "to start a weight update")

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Receive one chunk of weights."""
        await self._native(self._send(update_info), "to receive weights")

    async def finish_weight_update(self) -> None:
        """End the transfer; the engine stays paused until `load_weights`."""
        await self._native(self._engine.llm.finish_weight_update(), "to finish a weight update")

    async def _native(self, work: Any, what: str) -> None:
        await self._engine.guard(work, load_timeout(self._rollout, self._sync), what)


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY
