"""One vLLM engine, watched: every wait on it ends, by its result, by its death or by its deadline.

vLLM is imported here and in `engine_fork`, beside the receive side of weight sync, and only when an engine
starts: the environment that it reads at import has to be set first.
"""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil

from actors import engine_fork, engine_owner
from actors.settings import RolloutSettings
from actors.waits import DeadlineExceeded, abandon
from actors.weight_files import host_id
from rewards.models.foreign import opening

T = TypeVar("T")
_WATCH_SECONDS = 0.5
_STOP_SECONDS = 10.0


class EngineDied(RuntimeError):  # noqa: N818 - reads better where it is raised and caught
    """An engine core ended, was stopped, or reported that it can't go on; the message names the actor."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with."""

    name: str
    model_path: str
    settings: RolloutSettings
    dtype: str
    max_length: int
    seed: int
    device: str
    transfer_backend: str
    logits_processor: str = ""  # `module:Class` that vLLM loads beside its own
    additional: Mapping[str, Any] = field(default_factory=dict)  # what it reads of vLLM's configuration


_UNSAFE_VARIABLES = (
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
)


def refuse_unsafe_environment() -> None:
    """Raise `ValueError` for a variable that opens development routes, or lets what is unpickled run code."""
    for variable in _UNSAFE_VARIABLES:
        if os.environ.get(variable, "0") not in ("", "0"):
            raise ValueError(
                f"environment variable {variable}={os.environ[variable]}: it lets others run code here, "
                "through the engine or a file of weights; unset it"
            )


def engine_environment(spec: EngineSpec) -> dict[str, str | None]:
    """Environment of the engine's processes; None stands for a variable that must not be set."""
    variables: dict[str, str | None] = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.logits_processor:
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the other runner has another interface for them
    if spec.device == "cpu":
        threads = str(spec.settings.threads or max(1, int(spec.settings.cores)))
        variables |= {
            # Several actors and the learner share a machine, so no engine binds itself to all of its cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "VLLM_CPU_KVCACHE_SPACE": None,  # whole GiB, and it would override `kv_cache_gib`
            # Lets the engine core run the model itself: one process fewer, with its imports and memory.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        if spec.settings.enforce_eager:
            # vLLM compiles a helper of its sampler even so, for half a minute of a small machine.
            variables["TORCH_COMPILE_DISABLE"] = "1"
    return variables


def refuse_head_size(model_path: str) -> None:
    """Raise `ValueError` for attention heads that vLLM's CPU kernels don't have, which it finds out late."""
    from transformers import AutoConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with opening(f"model {model_path}: its configuration cannot be read"):
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ValueError(
            f"model {model_path}: attention heads of size {size} don't run in vLLM on a CPU; choose "
            f"hidden_size and heads so that their ratio is one of {', '.join(map(str, sizes))}"
        )


def _engine_args(spec: EngineSpec) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    settings = spec.settings
    on_cpu = spec.device == "cpu"
    sized: dict[str, Any] = (
        {"kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30), "block_size": 32}
        if on_cpu
        else {"gpu_memory_utilization": settings.gpu_memory_utilization}
    )
    if spec.logits_processor:
        sized |= {
            "logits_processors": [spec.logits_processor],
            "async_scheduling": False,  # a processor must see the token that was sampled last
        }
    return AsyncEngineArgs(
        model=spec.model_path,
        dtype=spec.dtype,
        seed=spec.seed,
        max_model_len=spec.max_length,
        max_num_seqs=settings.max_num_seqs,
        tensor_parallel_size=1 if on_cpu else settings.tensor_parallel,
        distributed_executor_backend="uni" if on_cpu or settings.tensor_parallel == 1 else "mp",
        enforce_eager=settings.enforce_eager,
        load_format="safetensors",
        trust_remote_code=False,
        # Neutral sampling: a hub model's generation_config.json must not bring in its top-p or top-k.
        generation_config="vllm",
        # log μ is that of the distribution which was sampled from, after the temperature.
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        enable_log_requests=False,
        weight_transfer_config=WeightTransferConfig(backend=spec.transfer_backend),
        additional_config={**spec.additional, engine_owner.KEY: engine_owner.Owner(os.getpid())},
        **sized,
    )


class WatchedEngine:
    """A vLLM `AsyncLLM` in a process of its own, with a watch on that process."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.whom = f"rollout actor {spec.name}"
        self._llm: Any = None
        self._death: asyncio.Future[str] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._processes: list[psutil.Process] = []
        self._stopping = threading.Event()
        self._requests = 0

    @property
    def llm(self) -> Any:
        """vLLM's engine client."""
        if self._llm is None:
            raise EngineDied(f"{self.whom}: its engine is not running; `start` it first")
        return self._llm

    @property
    def pid(self) -> int:
        """Process id of the engine core."""
        return int(self._processes[0].pid)

    @property
    def _forks(self) -> bool:
        """Whether the core is forked: not where CUDA or a compiler's own processes come into it."""
        return self.spec.device == "cpu" and self.spec.settings.enforce_eager

    @property
    def unfinished(self) -> int:
        """Sequences that the engine has been asked for and has not finished."""
        return int(self.llm.get_num_unfinished_requests())

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the key-value cache."""
        cache = self.llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks or 0) * int(cache.block_size)

    async def start(self) -> None:
        """Start the engine core and the watch on it.

        Raises:
            ValueError: for an environment or settings that can't work.
            DeadlineExceeded: after `start_timeout_s`.
            EngineDied: where the core ended during its start; its reason stands in the log above.
        """
        refuse_unsafe_environment()
        for variable, value in engine_environment(self.spec).items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        before = set(psutil.Process().children(recursive=True))
        if self._forks:
            engine_fork.begin()
        seconds = self.spec.settings.start_timeout_s
        built = self._in_thread(self._build)
        try:
            done, _ = await asyncio.wait({built}, timeout=seconds)
            if not done:
                abandon(built)
                raise DeadlineExceeded(
                    f"waited {seconds:g} s for {self.whom}: its vLLM engine to start with model "
                    f"{self.spec.model_path} (rollout.start_timeout_s)"
                )
            try:
                self._llm = built.result()
            except RuntimeError as error:
                raise EngineDied(f"{self.whom}: its vLLM engine did not start: {error}") from error
        except BaseException:
            self._stopping.set()
            kill(set(psutil.Process().children(recursive=True)) - before)
            raise
        core = self._llm.engine_core.resources.engine_manager.processes[0]
        root = psutil.Process(core.pid)
        self._processes = [root, *root.children(recursive=True)]
        self._death = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._watch_processes(self._death))

    def _build(self) -> Any:
        with engine_fork.without_collection():
            from vllm.v1.engine.async_llm import AsyncLLM

        if self.spec.device == "cpu":
            refuse_head_size(self.spec.model_path)
        with engine_fork.forked_cores() if self._forks else contextlib.nullcontext():
            return AsyncLLM.from_engine_args(_engine_args(self.spec))

    def _in_thread(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Run a blocking function in a thread that lives until `stop`.

        The kernel sends a child its parent's death signal when the *thread* that made it ends, so the
        thread that makes the engine core has to outlive it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        pending = [future]  # emptied, since the thread lives long and must not keep the engine alive

        def settle(result: T | None, error: BaseException | None) -> None:
            waiting = pending.pop()
            if waiting.done():
                return
            if error is None:
                waiting.set_result(result)  # type: ignore[arg-type]
            else:
                waiting.set_exception(error)

        def body() -> None:
            try:
                result, error = function(), None
            except BaseException as raised:  # noqa: BLE001 - handed to whoever awaits
                result, error = None, raised  # type: ignore[assignment]
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(settle, result, error)
            del result, error
            self._stopping.wait()

        threading.Thread(target=body, name=f"engine-{self.spec.name}", daemon=True).start()
        return future

    async def _watch_processes(self, death: "asyncio.Future[str]") -> None:
        """Consumes nothing; ends when an engine process is dead or stopped, and says so through `death`."""
        before = ""
        while not death.done():
            trouble = self._trouble()
            # A stop is believed when seen twice in a row: debuggers and job control stop for a moment.
            if trouble and (trouble == before or "stopped" not in trouble):
                death.set_result(trouble)
            before = trouble
            await asyncio.sleep(_WATCH_SECONDS)

    def _trouble(self) -> str:
        core, *workers = self._processes
        try:
            status = core.status()
        except psutil.NoSuchProcess:
            return f"engine core (pid {core.pid}) is dead"
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return f"engine core (pid {core.pid}) is dead"
        if self.llm.errored:
            return f"engine core (pid {core.pid}) reported a fatal error"
        for process in (core, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                    return f"engine process {process.pid} is stopped (SIGSTOP)"
        return ""

    def ensure_alive(self) -> None:
        """Raise `EngineDied` where the engine is known to be dead."""
        if self._death is not None and self._death.done():
            raise EngineDied(f"{self.whom}: {self._death.result()}")
        if self.llm.errored:
            raise EngineDied(f"{self.whom}: {self._trouble() or 'engine core failed'}")

    async def guard(self, work: Coroutine[Any, Any, T], seconds: float, what: str) -> T:
        """The result of a call on the engine, or an error that names the actor and what was waited for.

        Raises:
            EngineDied: as soon as the engine core is seen to be dead or stopped.
            DeadlineExceeded: after `seconds`, if it is alive and makes no progress.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self.ensure_alive()
        except EngineDied:
            work.close()
            raise
        assert self._death is not None
        task = asyncio.ensure_future(work)
        waiting: set[asyncio.Future[Any]] = {task, self._death}
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            abandon(task)
            raise
        if task.done():
            try:
                return task.result()
            except EngineDeadError as error:
                reason = self._trouble() or "engine core died"
                raise EngineDied(f"{self.whom}: {reason} while it owed {what}") from error
        abandon(task)
        if self._death.done():
            raise EngineDied(f"{self.whom}: {self._death.result()} while it owed {what}")
        raise DeadlineExceeded(f"waited {seconds:g} s for {self.whom}: {what}")

    async def generate(self, prompt: list[int], params: Any, seconds: float, what: str) -> Any:
        """The finished vLLM `RequestOutput` of one request; it is aborted when the deadline passes."""
        from vllm.inputs.engine import tokens_input

        self._requests += 1
        request_id = f"{self.spec.name}-{self._requests}"

        async def last() -> Any:
            final = None
            async for output in self.llm.generate(tokens_input(prompt), params, request_id):
                final = output
            return final

        return await self.guard(last(), seconds, what)

    async def stop(self) -> None:
        """Shut the engine down; what does not end by itself is killed. Safe to call twice."""
        llm, self._llm = self._llm, None
        if self._watch is not None:
            self._watch.cancel()
        if self._death is not None and self._death.done():
            kill(set(self._processes))  # a core that is stopped would not hear that it should end
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # else it logs the end of the engine core as a failure
            shutdown = asyncio.get_running_loop().run_in_executor(
                None, lambda: llm.shutdown(timeout=_STOP_SECONDS)
            )
            await asyncio.wait({shutdown}, timeout=_STOP_SECONDS + 5)
            del llm, shutdown
        kill(set(self._processes))
        self._stopping.set()


def kill(processes: set[psutil.Process]) -> None:
    """SIGKILL the processes that are still there; psutil compares start times, so no reused id is hit."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def node_id() -> str:
    """Ray's name of this node, or the host's where no Ray runs."""
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_node_id()) if ray and ray.is_initialized() else host_id()
