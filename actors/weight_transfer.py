"""The receive side of weight sync: runs inside vLLM's engine core, on a CPU or a GPU.

vLLM calls `register` in the engine core and in its workers (entry-point group `vllm.general_plugins`). An
update comes in two chunks of one session. `check` changes nothing: it reads the file's header and asks the
model's own loader, with tensors that have a shape but no data, which parameters the file would set. `load`
then goes through vLLM's layerwise reload, the way that reaches weights which the CPU kernels have packed, and
ties the output embedding to the input embedding again where the model shares them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

from actors.ipc_handles import decode_update

BACKEND = "headrace_shared"
IPC_BACKEND = "headrace_ipc"


def register() -> None:
    """Register the backend once in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "SharedWeightTransferEngine")
        WeightTransferEngineFactory.register_engine(IPC_BACKEND, __name__, "PlainIPCWeightTransferEngine")


@dataclass
class SharedInitInfo(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class SharedUpdateInfo(WeightTransferUpdateInfo):
    """A weight file that the actor has verified, and whether to check or to load it."""

    action: Literal["check", "load"]
    path: str


class SharedWeightTransferEngine(WeightTransferEngine[SharedInitInfo, SharedUpdateInfo]):
    """Loads whole-model weights in checkpoint format from a safetensors file in shared memory."""

    init_info_cls = SharedInitInfo
    update_info_cls = SharedUpdateInfo

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        hf_config = self.model_config.hf_text_config
        self._tied = tied_heads(model, bool(getattr(hf_config, "tie_word_embeddings", False)))
        self._shapes = checkpoint_shapes(Path(self.model_config.model))

    def init_transfer_engine(self, init_info: SharedInitInfo) -> None:
        """Nothing to set up: every update names its file."""

    def start_weight_update(self) -> None:
        """Nothing yet: the model is touched by the `load` chunk only."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As in the base class, which would synchronise an accelerator where there is none."""
        if self.device.type == "cpu":
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: SharedUpdateInfo) -> None:
        """Check the file against the model, or load it."""
        if update_info.action == "check":
            self._check(update_info.path)
        else:
            self._load(update_info.path)

    def finish_weight_update(self) -> None:
        """Nothing left to do."""

    def shutdown(self) -> None:
        """Nothing is held."""

    def _check(self, path: str) -> None:
        shapes = header_shapes(path)
        for name, shape in shapes.items():
            expected = self._shapes.get(name, shape)
            if shape != expected:
                raise ValueError(f"{path}: tensor {name} has shape {shape}, the model's has {expected}")
        with recording_loaders(self.model) as reached:
            meta = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
            try:
                reached.update(self.model.load_weights(meta) or ())
            except (KeyError, AttributeError) as error:
                raise ValueError(f"{path}: the model has no place for tensor {error}") from error
        needed = {name for name, _ in self.model.named_parameters()} - self._tied_parameters()
        if missing := sorted(needed - reached):
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(f"{path}: no tensor for the model's {listed}")

    def _tied_parameters(self) -> set[str]:
        heads = {id(head.weight) for head, _ in self._tied}
        return {name for name, param in self.model.named_parameters() if id(param) in heads}

    def _load(self, path: str) -> None:
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(self.model)
        self.model.load_weights(read_tensors(path, self.device))
        finalize_layerwise_reload(self.model, self.model_config)
        for head, embedding in self._tied:
            # The reload fills the embedding and leaves the head's packed copy of it as it was.
            head.tie_weights(embedding)
            head.quant_method.process_weights_after_loading(head)


class PlainIPCWeightTransferEngine(IPCWeightTransferEngine):
    """vLLM's own `ipc` backend, fed with handles that need no unpickling. Not yet run on a GPU."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """Handles as plain values become what vLLM expects."""
        return super().parse_update_info(decode_update(update_dict))


def header_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a safetensors file; reads the header only."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_tensors(path: str, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, one at a time."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, file.get_tensor(name)


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the model folder's own tensors; empty for a hub name that is no folder here."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        shapes |= header_shapes(str(path))
    return shapes


def tied_heads(model: torch.nn.Module, tied: bool) -> list[tuple[Any, Any]]:
    """Pairs (output head, input embedding) which are two modules that share one weight.

    A model whose head *is* the embedding module needs no mending and gives no pair.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not tied:
        return []
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    embeddings = [
        module
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    pairs = [
        (head, embedding)
        for head in heads
        for embedding in embeddings
        if head.weight.data_ptr() == embedding.weight.data_ptr()
    ]
    if len(pairs) != len(heads):
        raise RuntimeError(
            f"{type(model).__name__} has tied embeddings, but {len(heads) - len(pairs)} of its output heads "
            "shares no weight with an input embedding: weight sync can't keep it current"
        )
    return pairs


@contextmanager
def recording_loaders(model: torch.nn.Module) -> Iterator[set[str]]:
    """Within it, `model.load_weights` changes nothing; yields the names of parameters that it reached."""
    reached: set[str] = set()
    saved: list[tuple[Any, Any]] = []

    def recorder(name: str) -> Any:
        def record(*_: Any, **__: Any) -> bool:
            reached.add(name)
            return True  # what expert loaders answer when the weight was theirs

        return record

    try:
        for name, param in model.named_parameters():
            saved.append((param, getattr(param, "weight_loader", None)))
            saved[-1][0].weight_loader = recorder(name)
        yield reached
    finally:
        for param, loader in saved:
            if loader is None:
                del param.weight_loader
            else:
                param.weight_loader = loader
