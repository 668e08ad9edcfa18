"""One rank of a learner that trains a policy on preferences: what its driver calls, and in which order.

    rendezvous (rank 0) → use_model → start → give_data
      → restore, or warmup_updates … → make_reference
      → update, update, …; score and save now and then → stop

`rendezvous`, `use_model`, `sees` and `reference` are for one rank each; all else is collective: call it on
all ranks. The class knows nothing of Ray's remote calls.
"""

import dataclasses
import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.language_model import load_causal_model, response_logprobs
from actors.shipping import ShippedFolder, local_folder
from learner import checkpoint
from learner.engine import TrainingEngine, all_reduce, barrier
from learner.models import Policy
from learner.preference_batch import NONE, PreferenceData, needs_reference
from learner.preference_settings import ImitationSettings, Method
from learner.preference_training import Passes
from learner.rank import LearnerRank
from learner.reward_training import batch_of, batches_an_epoch
from learner.schedule import learning_rate
from learner.settings import LearnerSettings, ModelSettings, OptimizerSettings
from learner.supervised import supervised_update

_STATE = "preference_learner.json"
_REFERENCE = "reference.safetensors"
_IMITATION = 1_000_003  # the order of imitation is drawn apart from that of preferences


@dataclass(frozen=True, slots=True)
class PreferenceJob:
    """All that a rank is told. `model_path` is a folder, `reference_path` one too, or empty.

    Without a reference of its own it is the policy itself, as it is after the warm-up.
    """

    model_path: str
    reference_path: str
    model: ModelSettings
    learner: LearnerSettings
    optimizer: OptimizerSettings
    warmup: ImitationSettings
    method: Method
    seed: int
    epochs: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class PreferenceFacts:
    """What a rank turned out to be, once started."""

    rank: int
    device: str
    parameters: int
    seconds: float


class PreferenceLearner(LearnerRank):
    """A data-parallel rank: the policy, its optimizer, and log π_ref of every response."""

    def __init__(self, rank: int, world_size: int, job: PreferenceJob) -> None:
        super().__init__(rank, world_size, job)
        self._job: PreferenceJob = job
        self._engine: TrainingEngine | None = None
        self._data: PreferenceData | None = None
        self._reference: list[float] = []
        self._updates = 0
        self._imitated = 0

    # --- Start and end -----------------------------------------------------------------------------------

    def start(self, address: str, port: int) -> PreferenceFacts:
        """Join the group, load the policy and build its engine."""
        began = time.perf_counter()
        job = self._job
        self._join(address, port)
        torch.manual_seed(job.seed)
        model = self._load(job.model_path)
        if job.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = sum(parameter.numel() for parameter in model.parameters())
        policy = Policy(
            model,
            with_value_head=False,
            temperature=1.0,
            chunk_tokens=job.learner.logprob_chunk_tokens,
            entropy_gradient=False,
        )
        self._engine = TrainingEngine(
            policy, name="policy", learner=job.learner, optimizer=job.optimizer, device=self._device
        )
        return PreferenceFacts(self._rank, self._device, parameters, time.perf_counter() - began)

    def use_reference(self, model: ShippedFolder, seconds: float) -> None:
        """Before `make_reference`: take its folder from the driver's host, unless this is it.

        Raises ShippingError.
        """
        self._job = dataclasses.replace(self._job, reference_path=str(local_folder(model, seconds)))

    def stop(self) -> None:
        """Nothing outlasts the process."""

    def _load(self, path: str) -> Any:
        job = self._job
        return load_causal_model(
            path, dtype=job.learner.precision, attention=job.model.attention, device=self._device
        )

    # --- Data and reference ------------------------------------------------------------------------------

    def give_data(self, data: PreferenceData) -> None:
        """The job's responses and what is trained of them; counts from 0 again."""
        self._data, self._reference, self._updates = data, [], 0

    def warmup_updates(self, count: int) -> list[dict[str, float]]:
        """The next supervised updates on chosen responses; a row for each. The last one ends the warm-up."""
        rows = []
        for _ in range(count):
            rows.append(self._imitate())
        if self._imitated == self._job.warmup.steps:
            self._ready()[0].reset_optimizer()
        return rows

    def _imitate(self) -> dict[str, float]:
        engine, data = self._ready()
        settings, update = self._job.warmup, self._imitated
        chosen = sorted({number for number in data.train.chosen if number != NONE})
        batch = batch_of(
            update,
            pairs=len(chosen),
            batch_size=settings.batch_size,
            seed=self._job.seed,
            member=_IMITATION,
        )
        lr = learning_rate(
            update,
            peak=settings.lr,
            total=settings.steps,
            warmup=max(1, settings.steps // 10),
            schedule="cosine",
        )
        metrics = supervised_update(
            engine,
            [data.responses[chosen[place]] for place in batch],
            lr=lr,
            micro_batch_tokens=self._job.learner.micro_batch_tokens,
            rank=self._rank,
            ranks=self._ranks,
        )
        self._imitated += 1
        return {
            "warmup/step": float(self._imitated),
            "warmup/loss": metrics["loss/supervised"],
            "warmup/lr": lr,
            "warmup/grad_norm": metrics["optimizer/grad_norm"],
        }

    def make_reference(self) -> None:
        """Work out log π_ref of every response, once, with the policy as it is now or the folder's model."""
        _, data = self._ready()
        if not needs_reference(self._job.method):
            return
        everything = range(len(data.responses))
        if not self._job.reference_path:
            self._reference = self._passes().logprobs(everything)
            return
        model = self._load(self._job.reference_path)
        mine = everything[self._rank :: self._ranks]
        found = response_logprobs(
            model,
            [data.responses[number] for number in mine],
            temperature=1.0,
            micro_batch_tokens=self._job.learner.micro_batch_tokens,
            chunk_tokens=self._job.learner.logprob_chunk_tokens,
        )
        sums = torch.zeros(len(everything), dtype=torch.float64)
        for number, values in zip(mine, found, strict=True):
            sums[number] = values.double().sum()
        self._reference = all_reduce(sums.to(self._device)).tolist()

    def reference(self) -> list[float]:
        """log π_ref of every response; empty where the objective has no reference. Asked of one rank."""
        return self._reference

    # --- Training ----------------------------------------------------------------------------------------

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the whole job."""
        _, data = self._ready()
        return self._job.epochs * batches_an_epoch(len(data.train), self._job.batch_size)

    def update(self, count: int) -> list[dict[str, float]]:
        """The next updates, in one call so that small ones are not slowed by it; a row for each."""
        return [self._one_update() for _ in range(count)]

    def _one_update(self) -> dict[str, float]:
        began = time.perf_counter()
        _, data = self._ready()
        job, update = self._job, self._updates
        batch = batch_of(update, pairs=len(data.train), batch_size=job.batch_size, seed=job.seed, member=0)
        lr = learning_rate(
            update,
            peak=job.optimizer.lr,
            total=self.total_updates,
            warmup=job.optimizer.warmup_updates,
            schedule=job.optimizer.schedule,
            floor=job.optimizer.min_lr_fraction,
        )
        metrics = self._passes().update(job.method, data.train, batch=batch, reference=self._reference, lr=lr)
        self._updates += 1
        return metrics | {
            "memory/learner": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
            "timing_s/learner_step": time.perf_counter() - began,
        }

    def score(self, numbers: Sequence[int]) -> list[float]:
        """log π(y|x) of these responses with the present weights."""
        return self._passes().logprobs(numbers)

    def _passes(self) -> Passes:
        engine, data = self._ready()
        tokens = self._job.learner.micro_batch_tokens
        return Passes(engine, data.responses, tokens, self._rank, self._ranks)

    def _ready(self) -> tuple[TrainingEngine, PreferenceData]:
        assert self._engine is not None, "start comes first"
        assert self._data is not None, "give_data comes before this"
        return self._engine, self._data

    # --- What is written ---------------------------------------------------------------------------------

    def export(self, folder: str) -> None:
        """Write the policy as a folder that transformers and vLLM open, with its tokenizer."""
        engine, _ = self._ready()
        checkpoint.export_policy(engine, Path(folder), self._job, writes=self._rank == 0)

    def save(self, folder: str) -> None:
        """Write the policy and all that `restore` needs, every rank its share, into a folder that all see."""
        from safetensors.torch import save_file

        engine, _ = self._ready()
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.export(str(path / "policy"))
        engine.save(path / "deepspeed" / engine.name)
        if self._rank == 0:
            save_file({"logprobs": torch.tensor(self._reference, dtype=torch.float64)}, path / _REFERENCE)
            state = {"updates": self._updates, "imitated": self._imitated, "made_with": self._made_with()}
            handle = os.open(path / _STATE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(state, file)
        barrier()

    def restore(self, folder: str) -> int:
        """Go on from what `save` wrote, after `give_data`; gives the updates so far.

        The same batches follow, so that the weights become those of a run that was never interrupted.
        """
        from safetensors.torch import load_file

        engine, data = self._ready()
        path = Path(folder)
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        for name, now in self._made_with().items():
            if state["made_with"].get(name) != now:
                raise ValueError(
                    f"checkpoint {folder} was made with {name} = {state['made_with'].get(name)!r}, this run "
                    f"has {now!r}: set it back, or start a new run"
                )
        engine.load(path / "deepspeed" / engine.name)
        self._reference = load_file(path / _REFERENCE)["logprobs"].tolist()
        assert len(self._reference) in (0, len(data.responses)), "the reference is of other data"
        self._updates, self._imitated = int(state["updates"]), int(state["imitated"])
        return self._updates

    def _made_with(self) -> dict[str, Any]:
        settings = self._job.learner
        return {
            "learner.ranks": self._ranks,
            "learner.zero_stage": settings.zero_stage,
            "learner.precision": settings.precision,
            "learner.cpu_offload": settings.cpu_offload,
            "objective": type(self._job.method).__name__.removesuffix("Settings").lower(),
        }
