"""A discriminator on a learner rank: updates, weights for the scoring actors, checkpoints.

    step's responses ─┬─► plan of the updates ─► packed micro-batches ─► loss / global counts ─► updates
    replay ───────────┤                                                                            │
    demonstrations ───┘                                  scoring actors ◄─ version v + probe ◄─────┘

It learns after the policy's own step, from the very groups that the policy was trained on; those then go into
the replay. Every method is collective: call it on all ranks.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.language_model import DTYPES
from actors.packing import Pair
from actors.records import DiscriminatorUpdate, Group
from actors.weight_files import SHARED_MEMORY
from learner.checkpoint import copy_tokenizer
from learner.discriminator_data import Replay, UpdatePlan, plan_updates
from learner.discriminator_module import Discriminator
from learner.discriminator_objectives import classification_metrics, discriminator_loss
from learner.engine import TrainingEngine, all_reduce, barrier
from learner.publish import ParameterStream, SharedFiles
from learner.reward_module import Sequences, TokenInputs
from learner.reward_training import Share, gather_scores, score_sequences
from learner.settings import LearnerSettings, OptimizerSettings
from rewards.discriminator_settings import DiscriminatorSettings
from rewards.models.transformer import load_classifier

_STATE, _REPLAY = "discriminator.json", "replay.safetensors"


@dataclass(frozen=True, slots=True)
class DiscriminatorJob:
    """All that a rank is told. `label` is that of the `[[reward]]`; `probe` proves the weights of a version.

    `heldout` are demonstrations that are never learned from.
    """

    model_path: str
    label: str
    settings: DiscriminatorSettings
    attention: str
    learner: LearnerSettings
    optimizer: OptimizerSettings
    seed: int
    demonstrations: tuple[Pair, ...]
    heldout: tuple[Pair, ...]
    probe: tuple[tuple[int, ...], ...]


class DiscriminatorTrainer:
    """The discriminator of one rank, with its optimizer, its replay and its place in the demonstrations."""

    def __init__(self, job: DiscriminatorJob, *, device: str, rank: int, ranks: int) -> None:
        """Load the model; ValueError where it cannot have a scalar head on its last token."""
        self._job, self._rank, self._ranks = job, rank, ranks
        settings = job.settings
        model: Any = load_classifier(
            job.model_path,
            precision=job.learner.precision,
            device=device,
            # Fused attention has no second derivative.
            attention="eager" if settings.gradient_penalty else job.attention,
        )
        if job.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._engine = TrainingEngine(
            Discriminator(model),
            name="discriminator",
            learner=job.learner,
            optimizer=job.optimizer.model_copy(update={"lr": settings.lr}),
            device=device,
        )
        self._replay = Replay(settings.replay_size)
        self._consumed = 0
        self._files: SharedFiles | None = None

    # --- Learning ----------------------------------------------------------------------------------------

    def step(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """Learn from a learner step's groups; `version` is the number of steps taken before it.

        The metrics of an update come from the logits before it. Its fresh responses were never learned from,
        so they say how well the discriminator knows responses that it has not seen.
        """
        began = time.perf_counter()
        settings, fresh = self._job.settings, _pairs(groups)
        plans = plan_updates(
            fresh=len(fresh),
            replayable=len(self._replay),
            demonstrations=len(self._job.demonstrations),
            consumed=self._consumed,
            updates=settings.updates,
            replay=settings.replay,
            seed=self._job.seed,
            step=version,
        )
        heldout = self._heldout(len(fresh))
        rows = [self._update(plan, fresh) for plan in plans]
        self._consumed += sum(len(plan.demonstrations) for plan in plans)
        self._replay.add(fresh)
        names = {name for row in rows for name in row}
        metrics = {name: _mean([row[name] for row in rows if name in row]) for name in names}
        return (
            metrics
            | heldout
            | score_lags(groups, self._job.label, version)
            | {
                "discriminator/lr": settings.lr,
                "discriminator/replay_size": float(len(self._replay)),
                "discriminator/epoch": self._consumed / len(self._job.demonstrations),
                "timing_s/discriminator": time.perf_counter() - began,
            }
        )

    def _update(self, plan: UpdatePlan, fresh: Sequence[Pair]) -> dict[str, float]:
        """One optimizer update; each rank computes its share of the sequences."""
        job, engine, settings = self._job, self._engine, self._job.settings
        shown = [job.demonstrations[i] for i in plan.demonstrations]
        pairs = [*shown, *(fresh[i] for i in plan.fresh), *(self._replay[i] for i in plan.replayed)]
        count = len(pairs)
        demonstrated = torch.arange(count) < len(shown)
        is_fresh = ~demonstrated & (torch.arange(count) < len(shown) + len(plan.fresh))
        inputs = _inputs(pairs)
        share = self._share(inputs, count)
        totals = torch.zeros(2, dtype=torch.float64)
        answers: list[Tensor] = []
        for number, one in enumerate(share.batches):
            logits, penalty = engine.forward(one or inputs.dummy(), penalty=settings.gradient_penalty > 0)
            answers.append(logits)
            penalty = 0.5 * settings.gradient_penalty * penalty / count
            if one is None:
                loss = 0.0 * (logits.sum() + penalty)
            else:
                loss, _ = discriminator_loss(
                    logits[0],
                    demonstrated[share.places(one)].to(logits.device),
                    smoothing=settings.label_smoothing,
                    demonstrations=len(shown),
                    responses=count - len(shown),
                )
                totals += torch.tensor([float(loss.detach()), float(penalty.detach())])
                loss = loss + penalty
            engine.backward(loss, last=number == len(share.batches) - 1)
        norm = engine.step(settings.lr)
        known = gather_scores(share, answers, engine.device)[0]
        loss_sum, penalty_sum = all_reduce(totals.to(engine.device)).tolist()
        penalties = {"discriminator/gradient_penalty": penalty_sum} if settings.gradient_penalty else {}
        return {
            "loss/discriminator": loss_sum,
            "discriminator/grad_norm": norm,
            **penalties,
            **classification_metrics(known, demonstrated, is_fresh),
        }

    def _heldout(self, most: int) -> dict[str, float]:
        """How it judges demonstrations that it never learns from, at most as many as there are responses."""
        pairs = self._job.heldout[:most]
        if not pairs:
            return {}
        logits = torch.tensor(self.logits(pairs))
        right = (logits > 0).double() + 0.5 * (logits == 0)
        return {
            "discriminator/accuracy_heldout": float(right.mean()),
            "discriminator/logit_heldout": float(logits.mean()),
        }

    def logits(self, pairs: Sequence[Pair]) -> list[float]:
        """The logits of these sequences with the present weights, the same on all ranks."""
        tokens = self._job.learner.micro_batch_tokens
        return score_sequences(
            self._engine,
            _inputs(pairs),
            range(len(pairs)),
            micro_batch_tokens=tokens,
            rank=self._rank,
            ranks=self._ranks,
        )

    def _share(self, inputs: TokenInputs, count: int) -> Share:
        tokens = self._job.learner.micro_batch_tokens
        return Share.of(
            self._engine,
            inputs,
            range(count),
            micro_batch_tokens=tokens,
            rank=self._rank,
            ranks=self._ranks,
        )

    # --- Weights out -------------------------------------------------------------------------------------

    def open(self, run_id: str, *, remote_hosts: bool, root: Path = SHARED_MEMORY) -> None:
        """Open the way to the scoring actors; `remote_hosts`: some of them may be on other hosts."""
        stream = ParameterStream(
            lambda: self._engine.full_parameters(self._engine.module.model),
            DTYPES[self._job.learner.precision],
        )
        self._files = SharedFiles(stream, run_id, self._rank, remote_hosts, root)

    def publish(self, version: int) -> DiscriminatorUpdate | None:
        """Send the weights out as `version`, with the probe that proves them; rank 0 has the answer."""
        assert self._files is not None, "open comes first"
        payload = self._files.send(version)
        probe = self._job.probe
        logits = self.logits([((), sequence) for sequence in probe])
        if self._rank:
            return None
        config = json.dumps(self._engine.module.model.config.to_dict(), default=str, sort_keys=True)
        return DiscriminatorUpdate(version, payload, config, probe, tuple(logits))

    def close(self) -> None:
        """Leave no published files behind; safe to call twice."""
        if self._files is not None:
            self._files.close()
            self._files = None

    # --- Checkpoints -------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write all that `restore` needs; `folder/model` opens with AutoModelForSequenceClassification."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        model = self._engine.module.model
        weights = {
            name: tensor.to("cpu", copy=True).contiguous()
            for name, tensor in self._engine.full_parameters(model)
            if self._rank == 0
        }
        self._engine.save(folder / "state")
        if self._rank == 0:
            model.save_pretrained(folder / "model", state_dict=weights)
            copy_tokenizer(self._job.model_path, folder / "model", None)
            save_file(self._replay.tensors(), folder / _REPLAY)
            state = {"consumed": self._consumed, "made_with": self._made_with()}
            (folder / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        barrier()

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote; ValueError where it is not this run's discriminator."""
        from safetensors.torch import load_file

        path = folder / _STATE
        if not path.is_file():
            raise ValueError(f"checkpoint {folder}: it has no {_STATE}, so its run trained no discriminator")
        state = json.loads(path.read_text(encoding="utf-8"))
        for name, now in self._made_with().items():
            then = state["made_with"].get(name)
            if then != now:
                raise ValueError(
                    f"checkpoint {folder} was made with {name} = {then!r}, this run has {now!r}: the "
                    "discriminator goes on with the demonstrations that it began with; set it back, or start "
                    "a new run"
                )
        self._engine.load(folder / "state")
        self._replay.restore(load_file(folder / _REPLAY))
        self._consumed = state["consumed"]

    def _made_with(self) -> dict[str, Any]:
        """What a checkpoint's place in the data goes with."""
        return {"demonstrations": len(self._job.demonstrations), "run.seed": self._job.seed}


def with_model(job: DiscriminatorJob, model_path: str) -> DiscriminatorJob:
    """The job on a host where the model lies elsewhere."""
    return dataclasses.replace(job, model_path=model_path)


def score_lags(groups: Sequence[Group], label: str, version: int) -> dict[str, float]:
    """How many steps old the discriminators were that scored these samples: step − version of each score."""
    name = f"{label}/version"
    lags = [version - t.components[name] for group in groups for t in group.trajectories]
    assert min(lags) >= 0, f"a sample has a score of a discriminator after version {version}"
    return {"discriminator/score_lag_mean": sum(lags) / len(lags), "discriminator/score_lag_max": max(lags)}


def _pairs(groups: Sequence[Group]) -> list[Pair]:
    return [
        (group.prompt.token_ids, trajectory.completion.token_ids)
        for group in groups
        for trajectory in group.trajectories
    ]


def _inputs(pairs: Sequence[Pair]) -> TokenInputs:
    return TokenInputs(Sequences.of([*prompt, *response] for prompt, response in pairs))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
