"""One rank of a learner that trains reward models: what its driver calls, in the order in which it calls it.

    rendezvous (rank 0) → use_model → start → [embed …] → give_data
      → for each member: begin_member, [restore], update, update, …; save now and then; score, export
      → read_back → stop

`rendezvous`, `use_model`, `sees`, `embed` and `read_back` are for one rank each; all else is collective: call
it on all ranks. The class knows nothing of Ray's remote calls.
"""

import gc
import json
import os
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.language_model import DTYPES
from learner.checkpoint import copy_tokenizer
from learner.engine import TrainingEngine, barrier
from learner.rank import LearnerRank
from learner.reward_module import EmbeddingInputs, Inputs, RewardOnEmbeddings, RewardTransformer, TokenInputs
from learner.reward_training import (
    PairData,
    batch_of,
    batches_an_epoch,
    bootstrap_weights,
    head_seed,
    relative_weights,
    reward_update,
    score_sequences,
)
from learner.schedule import learning_rate
from learner.settings import LearnerSettings, OptimizerSettings
from rewards.models.embedding import HEAD_FILE, RewardHead, input_statistics
from rewards.models.loading import load_reward_model
from rewards.models.settings import RewardModelSettings
from rewards.models.transformer import (
    HEAD,
    choose_padding,
    hidden_at_end,
    load_backbone,
    load_classifier,
    load_tokenizer,
)
from rewards.preferences.losses import odin_heads

_STATE = "reward_learner.json"


@dataclass(frozen=True, slots=True)
class RewardJob:
    """All that a rank is told. `model_path` is a folder; `pad_token_id` ends padded sequences."""

    model_path: str
    attention: str
    learner: LearnerSettings
    optimizer: OptimizerSettings
    reward: RewardModelSettings
    seed: int
    epochs: int
    batch_size: int
    pad_token_id: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class RewardFacts:
    """What a rank turned out to be, once started."""

    rank: int
    device: str
    seconds: float


class RewardLearner(LearnerRank):
    """A data-parallel rank: one member at a time, with its optimizer."""

    def __init__(self, rank: int, world_size: int, job: RewardJob) -> None:
        super().__init__(rank, world_size, job)
        self._job: RewardJob = job
        self._engine: TrainingEngine | None = None
        self._inputs: Inputs | None = None
        self._data: PairData | None = None
        self._table: Tensor | None = None
        self._backbone: Any = None
        self._weight: list[float] = []
        self._member = 0
        self._updates = 0

    # --- Start and end -----------------------------------------------------------------------------------

    def start(self, address: str, port: int) -> RewardFacts:
        """Join the group."""
        began = time.perf_counter()
        self._join(address, port)
        return RewardFacts(self._rank, self._device, time.perf_counter() - began)

    def stop(self) -> None:
        """Nothing outlasts the process."""

    # --- Data --------------------------------------------------------------------------------------------

    def embed(self, sequences: Sequence[Sequence[int]]) -> Any:
        """(N, D) float32 array: the last token's hidden state of each sequence, from the frozen model."""
        if self._backbone is None:
            self._backbone = load_backbone(
                self._job.model_path,
                precision=self._job.learner.precision,
                device=self._device,
                attention=self._job.attention,
            )
        tokens = self._job.learner.micro_batch_tokens
        return hidden_at_end(
            self._backbone, sequences, device=self._device, micro_batch_tokens=tokens
        ).numpy()

    def give_data(self, data: PairData, embeddings: str) -> None:
        """The job's pairs; `embeddings` is a safetensors file with one row a sequence, or empty."""
        self._data, self._backbone = data, None
        if self._job.reward.kind == "embedding":
            from safetensors.torch import load_file

            self._table = load_file(embeddings)["embeddings"]
            self._inputs = EmbeddingInputs(self._table)
        else:
            self._inputs = TokenInputs(data.sequences)

    @property
    def updates_a_member(self) -> int:
        """Optimizer updates that each member gets."""
        assert self._data is not None, "give_data comes first"
        return self._job.epochs * batches_an_epoch(len(self._data.chosen), self._job.batch_size)

    # --- Training ----------------------------------------------------------------------------------------

    def begin_member(self, member: int) -> int:
        """Build a member from its own seed; gives the number of its trained parameters."""
        assert self._data is not None, "give_data comes first"
        job = self._job
        self._member, self._updates, self._engine = member, 0, None
        gc.collect()  # the member before is gone before this one needs its room
        weight = relative_weights(self._data.weight)
        if job.reward.bootstrap:
            drawn = bootstrap_weights(self._data.prompt, seed=job.seed, member=member)
            weight = [a * b for a, b in zip(weight, drawn, strict=True)]
        self._weight = relative_weights(weight)
        module = self._on_embeddings() if job.reward.kind == "embedding" else self._transformer()
        settings = job.learner
        if job.reward.kind == "embedding":  # small enough to be exact; the setting is the backbone's
            settings = settings.model_copy(update={"precision": "float32"})
        self._engine = TrainingEngine(
            module, name="reward model", learner=settings, optimizer=job.optimizer, device=self._device
        )
        return sum(int(getattr(weight, "ds_numel", weight.numel())) for weight in module.parameters())

    def _transformer(self) -> RewardTransformer:
        job = self._job
        model = load_classifier(
            job.model_path,
            precision=job.learner.precision,
            device=self._device,
            attention=job.attention,
            pad_token_id=job.pad_token_id,
        )
        if job.vocabulary > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(job.vocabulary, mean_resizing=False)
        if job.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        seed = head_seed(job.seed, self._member)
        return RewardTransformer(model, odin=job.reward.loss == "odin", seed=seed)

    def _on_embeddings(self) -> RewardOnEmbeddings:
        assert self._table is not None
        assert self._data is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(head_seed(self._job.seed, self._member))
            head = RewardHead(self._table.shape[1], self._job.reward.hidden_sizes)
        trained = sorted({*self._data.chosen, *self._data.rejected})
        head.input_mean, head.input_scale = input_statistics(self._table[torch.tensor(trained)])
        return RewardOnEmbeddings(head.to(self._device))

    def update(self, count: int) -> list[dict[str, float]]:
        """The member's next updates, in one call so that small ones are not slowed by it; a row for each."""
        return [self._one_update() for _ in range(count)]

    def _one_update(self) -> dict[str, float]:
        began = time.perf_counter()
        engine, inputs, data = self._ready()
        job, update = self._job, self._updates
        batch = batch_of(
            update,
            pairs=len(data.chosen),
            batch_size=job.batch_size,
            seed=job.seed,
            member=self._member,
        )
        share = learning_rate(
            update,
            peak=1.0,
            total=self.updates_a_member,
            warmup=job.optimizer.warmup_updates,
            schedule=job.optimizer.schedule,
            floor=job.optimizer.min_lr_fraction,
        )
        head_lr = job.optimizer.lr if job.optimizer.critic_lr is None else job.optimizer.critic_lr
        metrics = reward_update(
            engine,
            inputs,
            data,
            job.reward,
            batch=batch,
            weight=self._weight,
            lr=share * job.optimizer.lr,
            head_lr=share * head_lr,
            micro_batch_tokens=job.learner.micro_batch_tokens,
            rank=self._rank,
            ranks=self._ranks,
        )
        self._updates += 1
        return metrics | {
            "memory/learner": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
            "timing_s/learner_step": time.perf_counter() - began,
        }

    def score(self, sequences: Sequence[int]) -> list[float]:
        """Raw rewards of these sequences of the job with the present weights."""
        engine, inputs, _ = self._ready()
        return score_sequences(
            engine,
            inputs,
            sequences,
            micro_batch_tokens=self._job.learner.micro_batch_tokens,
            rank=self._rank,
            ranks=self._ranks,
        )

    def _ready(self) -> tuple[TrainingEngine, Inputs, PairData]:
        assert self._engine is not None, "begin_member comes first"
        assert self._inputs is not None
        assert self._data is not None
        return self._engine, self._inputs, self._data

    # --- What is written ---------------------------------------------------------------------------------

    def export(self, folder: str) -> None:
        """Write the member's weights, whole or not at all, where a reward model's loader expects them."""
        engine, _, _ = self._ready()
        embedding = self._job.reward.kind == "embedding"
        part = engine.module.head if embedding else engine.module.model
        weights = {
            name: tensor.to("cpu", copy=True).contiguous()
            for name, tensor in engine.full_parameters(part)
            if self._rank == 0
        }
        if not embedding and engine.module.lengths is not None:
            both = {
                name: tensor.to("cpu", torch.float32, copy=True)
                for name, tensor in engine.full_parameters(engine.module.lengths)
            }
            heads = odin_heads(torch.cat([both["quality"], both["following"]]))
            if self._rank == 0:
                weights[f"{HEAD}.weight"] = heads[:1].to(weights[f"{HEAD}.weight"].dtype)
        if self._rank == 0:
            self._write(Path(folder), weights)
        barrier()

    def _write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        partial = folder.with_name(f".writing_{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700, parents=True)
        module = self._ready()[0].module
        if self._job.reward.kind == "embedding":
            from safetensors.torch import save_file

            whole = weights | {
                name: tensor.cpu().contiguous() for name, tensor in module.head.named_buffers()
            }
            save_file({name: tensor.float() for name, tensor in whole.items()}, partial / HEAD_FILE)
        else:
            write_classifier(self._job, module.model, weights, partial)
        for path in partial.iterdir():
            path.chmod(0o600)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def read_back(self, folder: str, sequences: Sequence[int]) -> list[list[float]]:
        """Raw rewards, a row a member, of the finished reward model on disk. Asked of rank 0, at the end."""
        assert self._data is not None
        self._engine = None
        gc.collect()
        saved = load_reward_model(
            folder,
            device=self._device,
            precision=self._job.learner.precision,
            micro_batch_tokens=self._job.learner.micro_batch_tokens,
        )
        rows: list[list[float]] = saved.raw([self._data.sequences[i] for i in sequences]).tolist()
        return rows

    def save(self, folder: str) -> None:
        """Write all that `restore` needs, every rank its share, into a folder that all ranks see."""
        engine, _, _ = self._ready()
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        engine.save(path / "deepspeed" / "reward_model")
        if self._rank == 0:
            state = {"member": self._member, "updates": self._updates, "made_with": self._made_with()}
            handle = os.open(path / _STATE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(state, file)
        barrier()

    def restore(self, folder: str) -> int:
        """Go on from what `save` wrote, after `begin_member`; gives the member's updates so far.

        The same batches follow, so that the weights become those of a run that was never interrupted.
        """
        engine, _, _ = self._ready()
        path = Path(folder)
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        for name, now in self._made_with().items():
            if state["made_with"].get(name) != now:
                raise ValueError(
                    f"checkpoint {folder} was made with {name} = {state['made_with'].get(name)!r}, this run "
                    f"has {now!r}: set it back, or start a new run"
                )
        assert state["member"] == self._member, "the driver and the checkpoint disagree on the member"
        engine.load(path / "deepspeed" / "reward_model")
        self._updates = int(state["updates"])
        return self._updates

    def _made_with(self) -> dict[str, Any]:
        settings = self._job.learner
        return {
            "learner.ranks": self._ranks,
            "learner.zero_stage": settings.zero_stage,
            "learner.precision": settings.precision,
            "learner.cpu_offload": settings.cpu_offload,
            "reward_model.kind": self._job.reward.kind,
            "reward_model.loss": self._job.reward.loss,
        }


def write_classifier(job: RewardJob, model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """As AutoModelForSequenceClassification opens it, under the configuration of the first model.

    The tokenizer pads on the right with the token that was trained with: positions that are counted from a
    row's first place, as GPT-2's are, would be others behind padding, and so would the scores.
    """
    from transformers import AutoConfig

    model.save_pretrained(folder, state_dict=weights)
    config = AutoConfig.from_pretrained(job.model_path, trust_remote_code=False)
    config.architectures = [type(model).__name__]
    config.dtype = DTYPES[job.learner.precision]
    config.num_labels = 1
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = job.pad_token_id
    text.vocab_size = max(int(text.vocab_size), job.vocabulary)
    config.save_pretrained(folder)
    copy_tokenizer(job.model_path, folder, None)
    tokenizer = load_tokenizer(Path(job.model_path))
    if (tokenizer.pad_token_id, tokenizer.padding_side) != (job.pad_token_id, "right"):
        choose_padding(tokenizer)
        tokenizer.save_pretrained(folder)
