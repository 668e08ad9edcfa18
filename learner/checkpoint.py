"""What a learner leaves on disk.

    folder/policy/               the language model and its tokenizer, as transformers and vLLM open them
    folder/value_head.safetensors    where a value head shares the policy
    folder/critic/               an own critic's backbone, and value_head.safetensors
    folder/deepspeed/NAME/state  weights, master weights and optimizer state of each engine, by DeepSpeed
    folder/learner.json          counters, β, and what the state was made with
    folder/rng_rank_N.safetensors    torch's generator of each rank

DeepSpeed's own files are pickles: restore only folders that your own run wrote. Who calls this makes the
folder appear whole or not at all.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from actors.language_model import DTYPES
from learner.engine import TrainingEngine, barrier
from learner.settings import LearnerSettings, ModelSettings

if TYPE_CHECKING:
    from learner.worker import LearnerJob


class Saved(Protocol):
    """What must be known of a job to save its policy: where the model came from, and its precision."""

    @property
    def model_path(self) -> str: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def learner(self) -> LearnerSettings: ...


TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
)


@dataclass(frozen=True, slots=True)
class LearnerState:
    """What a learner counts and adapts."""

    steps: int
    updates: int
    warmup_updates: int
    kl_coef: float
    warmed_up: bool

    def changed(self, **values: Any) -> "LearnerState":
        """A copy with other values."""
        return dataclasses.replace(self, **values)


def export_policy(engine: TrainingEngine, folder: Path, job: Saved, *, writes: bool) -> None:
    """Gather the policy (all ranks) and write it as a Hugging Face folder (the rank that writes)."""
    policy = engine.module
    weights = _collect(engine, policy.model, keep=writes)
    if writes:
        _write_model(policy.model, weights, folder, job.model_path, job)
        copy_tokenizer(job.model_path, folder, job.model.revision)
    barrier()


def save(
    folder: Path,
    engines: Sequence[TrainingEngine],
    state: LearnerState,
    job: "LearnerJob",
    *,
    rank: int,
    ranks: int,
) -> None:
    """Write a checkpoint; all ranks call it with a folder that they share."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    writes = rank == 0
    policy = engines[0]
    export_policy(policy, folder / "policy", job, writes=writes)
    if policy.module.value_head is not None:
        _save_head(policy, folder / "value_head.safetensors", writes=writes)
    if len(engines) == 2:
        critic = engines[1]
        weights = _collect(critic, critic.module.model, keep=writes)
        if writes:
            source = job.model.critic or job.model_path
            _write_model(critic.module.model, weights, folder / "critic", source, job)
        _save_head(critic, folder / "critic" / "value_head.safetensors", writes=writes)
    for engine in engines:
        engine.save(folder / "deepspeed" / engine.name)
    save_file({"torch": torch.get_rng_state()}, folder / f"rng_rank_{rank}.safetensors")
    if writes:
        record = {"state": dataclasses.asdict(state), "made_with": _made_with(job, ranks)}
        (folder / "learner.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    barrier()


def restore(
    folder: Path, engines: Sequence[TrainingEngine], job: "LearnerJob", *, rank: int, ranks: int
) -> LearnerState:
    """Read a checkpoint into the engines and give the counters that go with it."""
    from safetensors.torch import load_file

    path = folder / "learner.json"
    if not path.is_file():
        raise ValueError(f"checkpoint {folder}: it has no learner.json, so it was not written whole")
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, now in _made_with(job, ranks).items():
        then = record["made_with"].get(name)
        if then != now:
            raise ValueError(
                f"checkpoint {folder} was made with {name} = {then!r}, this run has {now!r}: DeepSpeed's "
                f"state fits one setting only. Set {name} back, or start a new run from "
                f"model.path = {str(folder / 'policy')!r}"
            )
    for engine in engines:
        engine.load(folder / "deepspeed" / engine.name)
    torch.set_rng_state(load_file(folder / f"rng_rank_{rank}.safetensors")["torch"])
    return LearnerState(**record["state"])


def copy_tokenizer(source: str, folder: Path, revision: str | None) -> None:
    """Put the tokenizer of a model folder or hub name beside saved weights, a folder's byte for byte."""
    origin = Path(source).expanduser()
    if origin.is_dir():
        for pattern in TOKENIZER_FILES:
            for file in origin.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    tokenizer.save_pretrained(folder)


def _made_with(job: "LearnerJob", ranks: int) -> dict[str, Any]:
    """The settings that a checkpoint cannot do without."""
    return {
        "learner.ranks": ranks,
        "learner.zero_stage": job.learner.zero_stage,
        "learner.precision": job.learner.precision,
        "learner.cpu_offload": job.learner.cpu_offload,
        "ppo.value_model": job.ppo.value_model,
    }


def _collect(engine: TrainingEngine, module: Any, *, keep: bool) -> dict[str, Tensor]:
    """Whole weights of a module on the CPU; ranks that do not keep them only take part in gathering."""
    return {
        name: tensor.to("cpu", copy=True).contiguous()
        for name, tensor in engine.full_parameters(module)
        if keep
    }


def _save_head(engine: TrainingEngine, path: Path, *, writes: bool) -> None:
    from safetensors.torch import save_file

    weights = _collect(engine, engine.module.value_head, keep=writes)
    if writes:
        save_file(weights, path)


def _write_model(model: Any, weights: dict[str, Tensor], folder: Path, source: str, job: Saved) -> None:
    """save_pretrained, but under the configuration that the model came with: training changes parts of it
    (no dropout, no cache) that a user of the saved model wants back."""
    from transformers import AutoConfig

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=weights)
    config = AutoConfig.from_pretrained(source, revision=job.model.revision, trust_remote_code=False)
    config.architectures = [type(model).__name__]
    config.dtype = DTYPES[job.learner.precision]
    config.save_pretrained(folder)
