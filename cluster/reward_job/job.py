"""Training a reward model, from configuration to report.

    prepare (pairs as tokens) → learner ranks → for each member: updates, held-out looks, checkpoints
      → scores of all responses, weights → reward_model/ with its card → read back and compared → evaluated

Only the learner ranks are started.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import checkpoint
from cluster.config_file import ConfigError
from cluster.job import Kind
from cluster.learner_ranks import put
from cluster.learner_run import LearnerRun
from cluster.monitor import Monitor, dump, write_atomically
from cluster.reward_job.account import account, warnings
from cluster.reward_job.config import RewardJobConfig
from cluster.reward_job.evaluation import evaluate_model
from cluster.reward_job.finish import (
    MEMBERS,
    REWARD_MODEL,
    adopt,
    finish,
    load_scores,
    member_path,
    save_scores,
)
from cluster.reward_job.inputs import HELDOUT, TRAIN, RewardInputs, describe_sets, prepare_reward_job
from cluster.reward_job.report import write_reward_report
from learner.reward_training import batches_an_epoch
from learner.reward_worker import RewardJob, RewardLearner
from rewards.models.card import EVALUATION, RewardCard, write_card
from rewards.models.embedding import EmbeddingCache, default_cache, model_digest, sequence_key

_SLICE_S = 1.0  # how long the updates of one call may take
_EMBED_AT_ONCE = 256  # sequences a rank embeds between two lines of progress
_SCORE_AT_ONCE = 8192  # sequences
_PROBES = 16  # sequences whose scores are compared once the model is on disk
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of |score| + 1, when it has been read back


class SavedModelDiffersError(RuntimeError):
    """The reward model on disk does not score as the one that was trained."""


class RewardRun(LearnerRun):
    """A run in progress; `_work` is the story, the rest its chapters."""

    worker = RewardLearner
    data = "preferences"

    def __init__(
        self, config: RewardJobConfig, inputs: RewardInputs, run_dir: Path, resume_from: Path | None
    ) -> None:
        """Raises ValueError where the data are not those that a resumed run was started with."""
        pairs = len(inputs.data.chosen)
        self._updates = config.run.epochs * batches_an_epoch(pairs, config.run.batch_size)  # of a member
        super().__init__(
            config, inputs, run_dir, resume_from, total_steps=self._updates * config.reward_model.members
        )
        self.config: RewardJobConfig = config
        self.inputs = inputs
        self._parameters: int | None = None
        self._card: RewardCard | None = None
        self._evaluation: dict[str, Any] = {}

    def announce(self, monitor: Monitor) -> None:
        """How many pairs there are, and what of them is in doubt."""
        monitor.event(f"data: {describe_sets(self.inputs.sets)}")
        self.inputs.quarantine.announce(monitor.event)
        for said in (*self.inputs.report.doubts, *warnings(self.inputs, self.config)):
            monitor.event(f"warning: {said}")

    async def _work(self) -> bool:
        await self._give_data()
        first, done = divmod(self.step, self._updates)
        for member in range(first, self.config.reward_model.members):
            await self._train_member(member, done)
            done = 0
            if self._stopping:
                return True
        await self._finish()
        return False

    # ---- before training -----------------------------------------------------------------------------------

    def _learner_job(self) -> RewardJob:
        config, inputs = self.config, self.inputs
        return RewardJob(
            model_path=str(inputs.model_path),
            attention=config.model.attention,
            learner=config.learner,
            optimizer=config.optimizer,
            reward=config.reward_model,
            seed=config.run.seed,
            epochs=config.run.epochs,
            batch_size=config.run.batch_size,
            pad_token_id=inputs.pad_token_id,
            vocabulary=inputs.vocabulary,
        )

    async def _give_data(self) -> None:
        embeddings = ""
        if self.config.reward_model.kind == "embedding":
            embeddings = str(await self._embed())
        await self._ranks.all("give_data", put(self.inputs.data), embeddings)

    async def _embed(self) -> Path:
        """A file of all sequences' embeddings; what the cache has is not computed again."""
        from safetensors.torch import save_file

        config, sequences = self.config, self.inputs.data.sequences
        root = Path(config.reward_model.cache).expanduser() if config.reward_model.cache else default_cache()
        digest = await asyncio.to_thread(model_digest, self.inputs.model_path)
        cache = EmbeddingCache(root, digest, config.learner.precision)
        keys = [sequence_key(sequences[number]) for number in range(len(sequences))]
        where = {key: number for number, key in enumerate(keys)}
        missing = cache.missing(keys)
        self._monitor.event(
            f"embeddings: {len(where) - len(missing):,} of {len(where):,} are in the cache already"
        )
        at_once = _EMBED_AT_ONCE * len(self._ranks)
        for start in range(0, len(missing), at_once):
            part = missing[start : start + at_once]
            slices = [part[i : i + _EMBED_AT_ONCE] for i in range(0, len(part), _EMBED_AT_ONCE)]
            arrays = await self._ranks.each(
                "embed", [[sequences[where[key]] for key in one] for one in slices]
            )
            cache.put(part, torch.from_numpy(np.concatenate(arrays)))
            done = start + len(part)
            if done == len(missing) or (start // at_once) % 10 == 9:
                self._monitor.event(f"embeddings: {done:,} of {len(missing):,} computed")
        table = await asyncio.to_thread(cache.get, keys)
        path = self.run_dir.resolve() / "inputs" / "embeddings.safetensors"
        await asyncio.to_thread(save_file, {"embeddings": table}, path)
        path.chmod(0o600)
        return path

    # ---- training ------------------------------------------------------------------------------------------

    async def _train_member(self, member: int, done: int) -> None:
        """Train a member to its end, or to the update at which a stop is asked for."""
        count = self.config.reward_model.members
        self._parameters = await self._ranks.all("begin_member", member)
        if done:
            await self._restore()
        elif count > 1:
            self._monitor.event(f"member {member + 1} of {count}")
        looks = self._looks()
        self._training = True
        pace = 0.0
        while done < self._updates and not self._stopping:
            slice_ = self._slice(done, pace)
            began = time.perf_counter()
            rows = await self._ranks.all("update", slice_)
            pace = (time.perf_counter() - began) / slice_
            done += slice_
            self.step = member * self._updates + done
            if self._is_due(self.config.run.evaluate_every, done):
                rows[-1] |= await self._look(looks)
            for number, row in enumerate(rows):
                step = self.step - len(rows) + 1 + number
                row["epoch"] = (step - member * self._updates) * self.config.run.epochs / self._updates
                self._monitor.step(row | {"learner_step": float(step)})
            if self._is_due(self.config.run.checkpoint_every, done) or self._stopping:
                if done == self._updates:
                    await self._leave_member(member)
                await self._checkpoint()
        self._training = False

    async def _leave_member(self, member: int) -> None:
        """Weights and scores of a trained member; they come before the checkpoint that needs them."""
        count = len(self.inputs.data.sequences)
        scores: list[float] = []
        for start in range(0, count, _SCORE_AT_ONCE):
            part = list(range(start, min(start + _SCORE_AT_ONCE, count)))
            scores += await self._ranks.all("score", part)
        (self.run_dir / MEMBERS).mkdir(mode=0o700, exist_ok=True)
        save_scores(self.run_dir, member, scores)
        await self._ranks.all("export", str(member_path(self.run_dir.resolve(), member)))

    def _is_due(self, every: int, done: int) -> bool:
        return done == self._updates or (every > 0 and done % every == 0)

    def _slice(self, done: int, pace: float) -> int:
        """Updates of the next call: about a second's, and none beyond the next look or checkpoint."""
        run = self.config.run
        ends = [
            self._updates,
            *(done - done % n + n for n in (run.evaluate_every, run.checkpoint_every) if n),
        ]
        most = max(1, int(_SLICE_S / pace)) if pace else 1
        return min([most, *(end - done for end in ends)])

    def _looks(self) -> tuple[list[int], list[int]]:
        """Sequences of the held-out pairs that are looked at during training: chosen, rejected."""
        heldout, most = self.inputs.sets[HELDOUT], self.config.run.evaluate_pairs
        drawn = np.random.default_rng(self.config.run.seed).permutation(len(heldout))[:most]
        return [heldout.chosen[i] for i in drawn], [heldout.rejected[i] for i in drawn]

    async def _look(self, looks: tuple[list[int], list[int]]) -> dict[str, float]:
        """Accuracy and log-likelihood of the member on held-out pairs."""
        chosen, rejected = looks
        used = sorted({*chosen, *rejected})
        scores = dict(zip(used, await self._ranks.all("score", used), strict=True))
        gap = np.array([scores[a] - scores[b] for a, b in zip(chosen, rejected, strict=True)])
        return {
            "preference/heldout_accuracy": float((gap > 0).mean()),
            "preference/heldout_loss": float(np.logaddexp(0.0, -gap).mean()),
        }

    # ---- the end -------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Put the model together, prove that it is what was trained, and measure it."""
        config, inputs = self.config, self.inputs
        raw = load_scores(self.run_dir, config.reward_model.members)
        folder, card = await asyncio.to_thread(finish, config, inputs, self.run_dir, raw)
        await self._prove(folder, raw)
        self._evaluation = evaluate_model(raw, card, inputs.data, inputs.sets, config.run.seed)
        found = self._evaluation[HELDOUT]["accuracy"]
        card = card.model_copy(
            update={
                "accuracy": found["value"],
                "accuracy_ci95": [found["low"], found["high"]],
                "heldout_pairs": len(inputs.sets[HELDOUT]),
            }
        )
        self._card = write_card(folder, card, inputs.sets[TRAIN].prompts)
        write_atomically(folder / EVALUATION, dump(self._evaluation, indent=1) + "\n")
        (folder / EVALUATION).chmod(0o600)
        adopt(folder, self.run_dir)
        self._monitor.event(
            f"held-out accuracy {found['value']:.3f} "
            f"(95 % interval {found['low']:.3f} to {found['high']:.3f}) "
            f"on {len(inputs.sets[HELDOUT])} pairs; version {self._card.version[:12]}"
        )

    async def _prove(self, folder: Path, raw: Any) -> None:
        """Compare scores of the model on disk with those of the one that was trained."""
        heldout = self.inputs.sets[HELDOUT]
        probe = sorted({*heldout.chosen, *heldout.rejected})[:_PROBES]
        read = np.asarray(await self._ranks.one(0, "read_back", str(folder.resolve()), probe))
        apart = np.abs(read - raw[:, probe]) / (1.0 + np.abs(raw[:, probe]))
        if not apart.max() <= _TOLERANCE[self.config.learner.precision]:
            raise SavedModelDiffersError(
                f"the reward model written to {folder} gives scores that are {apart.max():.2g} apart from "
                "the trained one's, relative to 1 + |score|: it is not offered for use"
            )

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null for what was not reached, or does not apply."""
        heldout = self._evaluation.get(HELDOUT, {})
        further = {
            name: found["accuracy"]
            for name, found in self._evaluation.items()
            if name not in (TRAIN, HELDOUT)
        }
        accuracy = heldout.get("accuracy") or {}
        train = self.inputs.sets[TRAIN]
        return super().summary() | {
            "accuracy": accuracy.get("value"),
            "accuracy_ci95": [accuracy["low"], accuracy["high"]] if accuracy else None,
            "accuracy_train": (self._evaluation.get(TRAIN) or {}).get("accuracy", {}).get("value"),
            "accuracy_elsewhere": further or None,
            "calibration_error": (heldout.get("calibration") or {}).get("ece"),
            "length_correlation": ((heldout.get("length") or {}).get("pearson") or {}).get("value"),
            "train_pairs": len(train),
            "train_prompts": len(set(train.prompts)),
            "heldout_pairs": len(self.inputs.sets[HELDOUT]),
            "members": self.config.reward_model.members,
            "parameters": self._parameters,
            "reward_model": str(self.run_dir / REWARD_MODEL) if self._card else None,
            "reward_model_version": self._card.version if self._card else None,
            **account(self.inputs, self.config),
        }

    def write_report(self) -> Path:
        """The report of a reward model."""
        return write_reward_report(self.run_dir)

    def leaves(self, status: str) -> str:
        """Where the reward model is, if the run came to its end."""
        return f"reward model in {self.run_dir / REWARD_MODEL}" if status == "completed" else ""


def _resumable(run_dir: Path, config: RewardJobConfig) -> tuple[Path, list[str]]:  # noqa: ARG001
    if (run_dir / REWARD_MODEL).is_dir():
        raise ConfigError(
            f"--resume: the run in {run_dir} is finished, its reward model is in {run_dir / REWARD_MODEL}; "
            "start a new run to train another"
        )
    return checkpoint.latest(run_dir / "checkpoints")


def _prepare(config: RewardJobConfig, run_dir: Path, resume_from: Path | None) -> RewardRun:
    return RewardRun(config, prepare_reward_job(config, run_dir), run_dir, resume_from)


KIND = Kind(_resumable, _prepare)
