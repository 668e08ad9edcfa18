"""DeepSpeed, behind a small surface: the one file that imports it.

What differs from DeepSpeed's own conventions:

- An update takes as many micro-batches as the data need, the last of them marked by the caller; losses are
  already divided by the global count of tokens, so gradients are *summed*, over micro-batches and ranks.
- The learning rate is given with each update.
- An update with a gradient that is not finite is refused with `NonFiniteGradientError`, not skipped.
- Parameters come out whole and under the names of the Hugging Face checkpoint, whatever the ZeRO stage.
"""

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.packing import MicroBatch, pack
from learner.settings import LearnerSettings, OptimizerSettings

CHECKPOINT_TAG = "state"


class NonFiniteGradientError(RuntimeError):
    """A loss or gradient was infinite or not a number.

    The engine's weights are as they were before the refused update; earlier updates of the step stand.
    """


def start_process_group(
    *,
    rank: int,
    world_size: int,
    address: str,
    port: int,
    device: str,
    timeout_s: float,
    own_address: str,
) -> None:
    """Join this process to the learner's group, gloo on CPU and nccl on CUDA; returns once all are in it.

    The ranks meet at `address`; `own_address` is where the others reach this one.

    DeepSpeed keeps references to a process's first group for good, so it is joined once and kept until the
    process ends.
    """
    if dist.is_initialized():
        assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size), "already in another group"
        return
    os.environ.update(
        DS_ACCELERATOR=device,
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",  # a Ray actor sees its own GPU only
    )
    deepspeed = _deepspeed()
    limit = timedelta(seconds=timeout_s)
    backend = "gloo" if device == "cpu" else "nccl"
    if world_size > 1 and (name := interface_of(own_address)) is not None:
        # Left to itself gloo takes the address that the host's name has, which may be another network's.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    store = _store(rank, world_size, address, port, limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    with _quiet():
        # Its shared-memory collectives would be compiled here, for a minute; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=limit,
            rank=rank,
            world_size=world_size,
        )


def interface_of(address: str) -> str | None:
    """The network interface of this host that has an address; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    return None


def _store(rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> Any:
    """Where the ranks meet. Rank 0 listens at `address` alone; left to itself it would at all addresses."""
    listener = -1
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((address, port))
            bound.listen()
            listener = bound.detach()  # the store closes it
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world_size, rank == 0, timeout=timeout, master_listen_fd=None if rank else listener
    )


def all_reduce(values: Tensor, *, maximum: bool = False) -> Tensor:
    """The sum (or maximum) of a small tensor over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


class TrainingEngine:
    """One trained module with its optimizer.

    `forward` and `backward` run collectives under ZeRO-3, so every rank must make the same number of calls:
    `in_step` pads a rank's micro-batches with `None`, for which the caller runs `dummy_micro_batch` at
    weight 0.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        learner: LearnerSettings,
        optimizer: OptimizerSettings,
        device: str,
    ) -> None:
        if learner.cpu_offload and learner.zero_stage < 2:
            raise ValueError(
                f"learner.cpu_offload = true with learner.zero_stage = {learner.zero_stage}: "
                "offloading needs zero_stage 2 or 3"
            )
        deepspeed = _deepspeed()
        self.name = name
        self.device = torch.device(device)
        self._stage = learner.zero_stage
        if learner.precision == "bfloat16" and self._stage == 0:
            # DeepSpeed's stage 0 would add up gradients in bfloat16; stage 1 keeps them in float32.
            self._stage = 1
        self._clip = optimizer.max_grad_norm
        self._deepspeed = deepspeed
        self._world = dist.get_world_size()
        self._updates = 0
        size = sum(parameter.numel() for parameter in module.parameters())
        with _quiet():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=_adam(module, learner, optimizer),
                config=_config(learner, optimizer, stage=self._stage, parameters=size),
            )
        # Dropout is off everywhere, so training mode only decides about recomputing activations.
        self._engine.module.train(learner.gradient_checkpointing)

    @property
    def module(self) -> Any:
        """The trained module itself."""
        return self._engine.module

    def forward(self, batch: MicroBatch, **options: Any) -> Any:
        """What the module answers for a micro-batch."""
        batch = batch.to(self.device)
        return self._engine(batch.input_ids, batch.position_ids, batch.positions, batch.targets, **options)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; with the `last` micro-batch of an update, exchange it between ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; our losses are shares of a global mean and must be summed.
        self._engine.backward(loss * self._world)

    def step(self, lr: float, *, head_lr: float | None = None) -> float:
        """Clip, update and give the gradient's norm before clipping; `head_lr` is for a value head."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = head_lr if head_lr is not None and group["is_head"] else lr
        norm = self._clip_unsharded() if self._stage == 0 else None
        self._engine.step()
        if norm is None:
            if not self._engine.was_step_applied():
                self._refuse()
            norm = float(self._engine.get_global_grad_norm())
        self._updates += 1
        return norm

    def _clip_unsharded(self) -> float:
        """DeepSpeed does not look for bad gradients at stage 0; clipping here gives the norm at once."""
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self._clip))
        if not norm < float("inf"):
            self._refuse()
        return norm

    def _refuse(self) -> None:
        raise NonFiniteGradientError(
            f"{self.name}: the gradient of update {self._updates} is not finite; the update was refused: "
            "this engine's weights are as they were before this update; earlier updates of the step stand. "
            "Lower optimizer.lr or look at the rewards of this step"
        )

    def in_step(self, batches: Sequence[MicroBatch]) -> list[MicroBatch | None]:
        """This rank's micro-batches, filled up with `None` to the largest number that any rank has."""
        longest = int(all_reduce(torch.tensor(len(batches), device=self.device), maximum=True))
        return [*batches, *[None] * (longest - len(batches))]

    def dummy_micro_batch(self) -> MicroBatch:
        """Two tokens, to keep a rank in step that has nothing to do."""
        return pack([([0], [0])], micro_batch_tokens=2)[0]

    def reset_optimizer(self) -> None:
        """Forget all moments and step counts, in place: DeepSpeed keeps references to these tensors."""
        for state in self._engine.basic_optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0

    # --- Weights and checkpoints -------------------------------------------------------------------------

    def full_parameters(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter of `module`, one ZeRO-3 gather a submodule.

        All ranks must consume it to the end. The tensors are the live weights: copy what must outlast the
        next item.
        """
        seen: set[int] = set()
        for prefix, part in module.named_modules():
            owned: list[tuple[str, Tensor]] = []
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    owned.append((f"{prefix}.{name}" if prefix else name, parameter))
            if owned:
                with self._gathered([parameter for _, parameter in owned]):
                    for name, parameter in owned:
                        yield name, parameter.detach()

    def _gathered(self, parameters: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
        if self._stage < 3:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(parameters)
        return context

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state, every rank its share, into `folder`."""
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with the same ranks and ZeRO stage."""
        if not (folder / CHECKPOINT_TAG).is_dir():
            raise ValueError(f"checkpoint {folder}: no DeepSpeed state of the {self.name} in it")
        with _quiet():
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        if loaded is None:
            raise ValueError(f"checkpoint {folder}: DeepSpeed could not read the {self.name}'s state")


def _deepspeed() -> Any:
    """Import DeepSpeed without its messages: they come from its loggers and, in places, from print."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    with _quiet():
        import deepspeed
        from deepspeed.utils import logger
    logger.setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send DeepSpeed's prints nowhere; errors still arrive as exceptions."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _adam(module: nn.Module, learner: LearnerSettings, optimizer: OptimizerSettings) -> Any:
    """AdamW; weight decay, where set, leaves out biases and norms (anything but matrices).

    The parameters of a value head are groups of their own, marked `is_head`, with their own learning rate.
    """
    value_head = getattr(module, "value_head", None)
    heads = {id(p) for p in value_head.parameters()} if value_head is not None else set()
    sorted_by: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in module.parameters():
        decays = optimizer.weight_decay > 0 and parameter.ndim >= 2
        sorted_by.setdefault((id(parameter) in heads, decays), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "is_head": is_head, "weight_decay": optimizer.weight_decay if decays else 0.0}
        for (is_head, decays), parameters in sorted_by.items()
    ]
    options: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": (optimizer.betas[0], optimizer.betas[1]),
        "eps": optimizer.eps,
        "weight_decay": 0.0,
    }
    # Offloaded, the update runs on the CPU, where the fused kernel pays. DeepSpeed's own CPU Adam would be
    # compiled at first use, and waits for ever on the lock of a compilation that was killed.
    return torch.optim.AdamW(groups, fused=learner.cpu_offload, **options)


def _config(
    learner: LearnerSettings, optimizer: OptimizerSettings, *, stage: int, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are formal: the caller marks the end of each update."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        # The default bucket of 5e8 elements would take gigabytes beside a small model.
        "reduce_bucket_size": max(1_000_000, min(50_000_000, parameters)),
        "allgather_bucket_size": max(1_000_000, min(50_000_000, parameters)),
        "log_trace_cache_warnings": False,
    }
    if learner.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": optimizer.max_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if learner.precision == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
