"""What a job asks of its hosts: memory, shared memory, disk, folders, model folders, reward files."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config import JobConfig
from cluster.doctor_model import named_models, whole_policy
from cluster.plan_memory import Memory, estimate, model_size
from cluster.plan_model import Workload
from learner.settings import ScratchSettings

GIB = 1024**3
# Python, torch, vLLM or DeepSpeed, and Ray in one process: the demo's four, with a tiny model, take 3.7 GiB.
RUNTIME_GIB = 1.0
_SCRATCH_ALPHABET = 256  # characters, at most about; an embedding row each
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Needs:
    """GiB where not said otherwise; `memory` is None where the model's size is not known."""

    memory: Memory | None
    processes: int
    object_store: float
    checkpoint: float | None  # one of them
    checkpoints: int  # that lie on disk at one time
    folders: tuple[str, ...]
    inputs: tuple[str, ...]  # folders and files that every host must have
    device: str

    @property
    def runtime(self) -> float:
        """For the processes themselves."""
        return self.processes * RUNTIME_GIB

    @property
    def disk(self) -> float | None:
        """For the run folder."""
        return None if self.checkpoint is None else self.checkpoint * self.checkpoints


def needs_of(config: JobConfig, run_dir: Path) -> Needs:
    """The needs of a job. Where a model file is damaged its size is unknown; another check tells of it."""
    size = _size(config)
    workload = Workload().changed("size", **size).changed(
        "lengths", kind="fixed", median=float(config.rollout.max_new_tokens)
    )  # fmt: skip
    memory = estimate(config, workload, actors=config.rollout.actors, window=config.scheduler.largest_window)
    return Needs(
        memory=memory,
        processes=config.learner.ranks + config.rollout.actors + config.scoring.actors + 1,  # and the driver
        object_store=config.cluster.object_store_gib,
        checkpoint=_checkpoint(config, size.get("parameters", 0.0)),
        checkpoints=config.run.keep_checkpoints + 1,  # a new one is whole before an old one goes
        folders=(str(run_dir.absolute()), os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()),
        inputs=tuple(_input_paths(config)),
        device=config.learner.device,
    )


def _input_paths(config: JobConfig) -> Iterator[str]:
    """Model folders, and files of reward functions."""
    for name in named_models(config).values():
        folder = Path(name).expanduser()
        if folder.is_dir():
            yield str(folder.resolve())
    for one in config.reward:
        source = one.function.rpartition(":")[0]
        if source.endswith(".py"):
            yield str(Path(source).expanduser().resolve())


def _size(config: JobConfig) -> dict[str, float]:
    if config.model.scratch is not None:
        return scratch_size(config.model.scratch)
    folder = whole_policy(config)
    return {} if folder is None else model_size(folder)


def scratch_size(shape: ScratchSettings) -> dict[str, float]:
    """Parameters of a Llama from scratch, embeddings for the largest alphabet, and its cache a token."""
    width, inner = shape.hidden_size, 32 * -(-(8 * shape.hidden_size // 3) // 32)
    layer = 4 * width * width + 3 * width * inner + 2 * width
    embeddings = _SCRATCH_ALPHABET * width * (1 if shape.tied_embeddings else 2)
    return {
        "parameters": float(shape.layers * layer + embeddings + width),
        "kv_values_per_token": 2.0 * shape.layers * width,
    }


def _checkpoint(config: JobConfig, parameters: float) -> float | None:
    """Weights in the compute precision, and float32 weights and Adam's two moments for each trained model."""
    if not parameters:
        return None
    width = 4 if config.learner.precision == "float32" else 2
    return parameters * config.trained_models * (width + 3 * _FLOAT32) / GIB


def needed_memory(needs: Needs, *, on_gpu: bool) -> float:
    """GiB of the job's processes, where the size of its model is known, and its object store."""
    memory = needs.memory
    assert memory is not None
    models = 0.0 if on_gpu else memory.learner + memory.rollout + memory.scoring
    return models + memory.shared + needs.object_store + needs.runtime


def describe_memory(needs: Needs, need: float) -> str:
    """Of what the need is made up."""
    memory = needs.memory
    assert memory is not None
    return (
        f"the job needs about {need:.1f} GiB and its activations (learner {memory.learner:.2f}, rollouts "
        f"{memory.rollout:.2f}, scoring {memory.scoring:.2f}, object store {needs.object_store:.2f}, "
        f"{needs.processes} processes of {RUNTIME_GIB:g})"
    )
