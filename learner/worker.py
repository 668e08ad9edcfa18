"""One rank of the learner: what the controller calls, in the order in which it calls it.

    rendezvous (rank 0) → start → [restore | warmup_updates … → finish_warmup → export the reference]
      → step, publish, step, publish, …; save now and then → stop

Every method but `rendezvous` is collective: call it on all ranks. The class knows nothing of Ray's remote
calls; it is an ordinary class that can be made and used in one process.
"""

import dataclasses
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.language_model import load_causal_model
from actors.packing import Pair, pack, scatter
from actors.records import Group, WeightUpdate
from actors.shipping import ShippedFolder, local_folder
from actors.weight_files import host_id
from learner import checkpoint
from learner.batch import flatten
from learner.engine import TrainingEngine
from learner.kl import KLController
from learner.models import Critic, Policy
from learner.online_dpo import OnlineDPO
from learner.ppo import PPO
from learner.preference_settings import OnlineDPOSettings
from learner.rank import LearnerRank
from learner.schedule import learning_rate
from learner.settings import (
    CorrectionSettings,
    LearnerSettings,
    ModelSettings,
    OptimizerSettings,
    PPOSettings,
    WarmupSettings,
)
from learner.supervised import supervised_update

LearnerMetrics = dict[str, float]
"""A flat row; `cluster.metrics` says what each name means."""


@dataclass(frozen=True, slots=True)
class LearnerJob:
    """All that a rank is told.

    `model_path` is the folder or hub name that training starts from, `total_updates` the PPO updates of the
    whole run, over which the learning rate decays, `max_new_tokens` the longest response that is sampled.
    """

    model_path: str
    model: ModelSettings
    learner: LearnerSettings
    optimizer: OptimizerSettings
    ppo: PPOSettings
    correction: CorrectionSettings
    warmup: WarmupSettings
    temperature: float
    seed: int
    total_updates: int
    max_length: int
    max_new_tokens: int = 0
    online_dpo: OnlineDPOSettings | None = None


@dataclass(frozen=True, slots=True)
class LearnerFacts:
    """What a rank turned out to be, once started; `host_id` names the shared memory that it sees."""

    rank: int
    host_id: str
    device: str
    parameters: int
    model_type: str
    tied_embeddings: bool
    zero_stage: int
    seconds: float


class LearnerWorker(LearnerRank):
    """A data-parallel rank: the policy, its critic, their optimizers and the counters of training."""

    def __init__(self, rank: int, world_size: int, job: LearnerJob) -> None:
        super().__init__(rank, world_size, job)
        self._job: LearnerJob = job
        self._policy: TrainingEngine | None = None
        self._critic: TrainingEngine | None = None
        self._publisher: Any = None
        self._probe: tuple[tuple[int, ...], ...] = ()
        self._state = checkpoint.LearnerState(
            steps=0, updates=0, warmup_updates=0, kl_coef=job.ppo.kl_coef, warmed_up=False
        )

    # --- Start and end -----------------------------------------------------------------------------------

    def use_models(self, policy: ShippedFolder, critic: ShippedFolder | None, seconds: float) -> None:
        """Before `start`: take the models from the driver's host, unless this is it. Raises ShippingError."""
        model = self._job.model
        if critic is not None:
            model = model.model_copy(update={"critic": str(local_folder(critic, seconds))})
        self._job = dataclasses.replace(self._job, model=model)
        self.use_model(policy, seconds)

    def start(self, address: str, port: int) -> LearnerFacts:
        """Join the group, load the model and build the engines."""
        began = time.perf_counter()
        job = self._job
        self._join(address, port)
        torch.manual_seed(job.seed)
        model = self._load(job.model_path, job.model.revision)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        own_critic = job.ppo.value_model == "critic"
        policy = Policy(
            model,
            with_value_head=job.ppo.value_model == "head",
            temperature=job.temperature,
            chunk_tokens=job.learner.logprob_chunk_tokens,
            entropy_gradient=job.ppo.entropy_coef > 0,
        )
        self._policy = self._engine(policy, "policy")
        if own_critic and (job.model.critic or not job.warmup.steps):
            self._start_critic()
        return LearnerFacts(
            self._rank,
            host_id(),
            self._device,
            parameters,
            str(model.config.model_type),
            bool(model.config.tie_word_embeddings),
            job.learner.zero_stage,
            time.perf_counter() - began,
        )

    def stop(self) -> None:
        """Leave no published files behind; the process group goes with the process."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    # --- Warm-up -----------------------------------------------------------------------------------------

    def warmup_updates(self, batches: Sequence[Sequence[Pair]]) -> list[LearnerMetrics]:
        """One supervised update a batch of (prompt, completion) token ids; a row of metrics for each.

        Called in slices, so that the controller can show progress. The end token belongs in the completion.
        """
        settings, rows = self._job.warmup, []
        for batch in batches:
            update = self._state.warmup_updates
            lr = learning_rate(
                update,
                peak=settings.lr,
                total=settings.steps,
                warmup=max(1, settings.steps // 10),
                schedule="cosine",
            )
            metrics = supervised_update(
                self._engines[0],
                batch,
                lr=lr,
                micro_batch_tokens=self._job.learner.micro_batch_tokens,
                rank=self._rank,
                ranks=self._ranks,
            )
            self._state = self._state.changed(warmup_updates=update + 1)
            rows.append(
                {
                    "warmup/step": float(update + 1),
                    "warmup/loss": metrics["loss/supervised"],
                    "warmup/lr": lr,
                    "warmup/grad_norm": metrics["optimizer/grad_norm"],
                }
            )
        return rows

    def supervised_loss(self, demonstrations: Sequence[Pair]) -> float:
        """Mean −log π of the completions' tokens, in nats, at temperature 1, with the present weights."""
        batches = pack(demonstrations, micro_batch_tokens=self._job.learner.micro_batch_tokens)
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                logprobs = self._engines[0].forward(batch, temperature=1.0)[0]
                total -= float(logprobs.double().sum())
                tokens += logprobs.numel()
        return total / tokens

    def finish_warmup(self) -> None:
        """Start PPO with fresh optimizer state; an own critic starts from the policy as it is now."""
        self._engines[0].reset_optimizer()
        if self._job.ppo.value_model == "critic" and self._critic is None:
            self._start_critic()
        self._state = self._state.changed(warmed_up=True)

    # --- PPO ---------------------------------------------------------------------------------------------

    def step(self, groups: list[Group], version: int) -> LearnerMetrics:
        """One learner step; all ranks get all groups. `version` is the number of steps taken so far."""
        began = time.perf_counter()
        state, job = self._state, self._job
        if version != state.steps:
            raise ValueError(f"step {version} was asked for, but the learner has taken {state.steps} steps")
        samples = flatten(groups, version)
        updates = job.ppo.epochs * job.ppo.minibatches
        controller = self._controller()
        metrics = self._method().step(
            samples,
            controller=controller,
            seed=job.seed * 1_000_003 + version,
            rates=[self._rates(state.updates + k) for k in range(updates)],
        )
        after = controller.after(metrics["kl/sequence"], len(samples))
        self._state = state.changed(steps=version + 1, updates=state.updates + updates, kl_coef=after.coef)
        metrics["optimizer/updates"] = float(self._state.updates)
        metrics["memory/learner"] = _peak_memory_gib()
        metrics["timing_s/learner_step"] = time.perf_counter() - began
        return metrics

    def _method(self) -> PPO | OnlineDPO:
        """What a step does with its samples."""
        job = self._job
        if job.online_dpo is not None:
            return OnlineDPO(
                self._engines[0],
                job.online_dpo,
                job.ppo.epochs,
                job.ppo.minibatches,
                job.learner.micro_batch_tokens,
                self._rank,
                self._ranks,
            )
        return PPO(
            self._engines[0],
            self._critic,
            job.ppo,
            job.correction,
            job.learner.micro_batch_tokens,
            self._rank,
            self._ranks,
            job.max_new_tokens,
        )

    def _controller(self) -> KLController:
        settings = self._job.ppo
        horizon = settings.kl_horizon if settings.kl_control == "adaptive" else None
        return KLController(self._state.kl_coef, settings.kl_target, horizon)

    def _rates(self, update: int) -> tuple[float, float]:
        """Learning rates of policy and critic for an update, counted over the whole run."""
        settings = self._job.optimizer
        share = learning_rate(
            update,
            peak=1.0,
            total=self._job.total_updates,
            warmup=settings.warmup_updates,
            schedule=settings.schedule,
            floor=settings.min_lr_fraction,
        )
        critic_peak = settings.critic_lr if settings.critic_lr is not None else settings.lr
        return share * settings.lr, share * critic_peak

    # --- Weights out -------------------------------------------------------------------------------------

    def probe(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π of every token but the first of each sequence, at temperature 1, with the present weights."""
        pairs: list[Pair] = [(ids[:1], ids[1:]) for ids in token_ids]
        batches = pack(pairs, micro_batch_tokens=self._job.learner.micro_batch_tokens)
        with torch.no_grad():
            values = [self._engines[0].forward(batch, temperature=1.0)[0].cpu() for batch in batches]
        return [logprobs.tolist() for logprobs in scatter(batches, values, len(pairs))]

    def parameters_for_publish(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, whole tensor) of the language model; tied weights come once."""
        engine = self._engines[0]
        return engine.full_parameters(engine.module.model)

    def open_publisher(
        self,
        backend: str,
        run_id: str,
        probe_token_ids: Sequence[Sequence[int]],
        transport: dict[str, Any] | None = None,
    ) -> None:
        """Prepare `publish`: a `WeightPublisher` on every rank; `transport` are its further arguments.

        With `nccl` the actors join at this host's address, as Ray's other nodes know it.
        """
        from actors.language_model import DTYPES
        from learner.publish import ParameterStream, WeightPublisher

        stream = ParameterStream(self.parameters_for_publish, DTYPES[self._job.learner.precision])
        arguments = dict(transport or {})
        if backend == "nccl":
            import ray

            arguments.setdefault("address", ray.util.get_node_ip_address())
        self._probe = tuple(tuple(ids) for ids in probe_token_ids)
        self._publisher = WeightPublisher(
            stream,
            backend=backend,  # type: ignore[arg-type]
            run_id=run_id,
            rank=self._rank,
            **arguments,
        )

    def publish(self, version: int) -> WeightUpdate | None:
        """Send the weights out as `version`, with the probe that proves them; rank 0 has the answer."""
        assert self._publisher is not None, "open_publisher comes first"
        update: WeightUpdate | None = self._publisher.publish(version, self._probe, self.probe(self._probe))
        return update

    def export(self, folder: str) -> None:
        """Write the policy as a folder that transformers and vLLM open, with its tokenizer."""
        checkpoint.export_policy(self._engines[0], Path(folder), self._job, writes=self._rank == 0)

    # --- Checkpoints -------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write all that `restore` needs, every rank its share, into a folder that all ranks see."""
        checkpoint.save(
            Path(folder), self._engines, self._state, self._job, rank=self._rank, ranks=self._ranks
        )

    def restore(self, folder: str) -> int:
        """Go on from what `save` wrote: the same batches then give the same weights, bit for bit.

        Gives the number of learner steps that the checkpoint has taken.
        """
        if self._job.ppo.value_model == "critic" and self._critic is None:
            self._start_critic()
        self._state = checkpoint.restore(
            Path(folder), self._engines, self._job, rank=self._rank, ranks=self._ranks
        )
        return self._state.steps

    # --- Helpers -----------------------------------------------------------------------------------------

    @property
    def _engines(self) -> list[TrainingEngine]:
        """The policy's engine and, where there is one, the critic's."""
        assert self._policy is not None, "start comes first"
        return [self._policy] if self._critic is None else [self._policy, self._critic]

    def _start_critic(self) -> None:
        """Build an own critic, from its own folder or from the policy's present weights."""
        job = self._job
        if job.model.critic:
            model = self._load(job.model.critic, None)
        else:
            model = self._load(job.model_path, job.model.revision)
            weights = {name: tensor.clone() for name, tensor in self.parameters_for_publish()}
            absent = model.load_state_dict(weights, strict=False)
            assert not absent.unexpected_keys, absent
        self._critic = self._engine(Critic(model), "critic")

    def _load(self, path: str, revision: str | None) -> Any:
        model = load_causal_model(
            path,
            dtype=self._job.learner.precision,
            attention=self._job.model.attention,
            device=self._device,
            revision=revision,
        )
        if self._job.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _engine(self, module: torch.nn.Module, name: str) -> TrainingEngine:
        return TrainingEngine(
            module,
            name=name,
            learner=self._job.learner,
            optimizer=self._job.optimizer,
            device=self._device,
        )


def _peak_memory_gib() -> float:
    """Largest resident memory of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
