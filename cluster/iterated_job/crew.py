"""The actors of an iterated job: those of reinforcement learning, with a learner that has other updates."""

from collections.abc import Sequence

import ray

from actors.packing import Pair
from cluster.learner_group import LearnerGroup
from cluster.remote import Remote
from cluster.workers import WorkerFactory
from learner.iterated_worker import IteratedWorker
from learner.preference_batch import PreferenceData

Rows = list[dict[str, float]]


class IteratedFactory(WorkerFactory):
    """Makes the learner's ranks of another class."""

    def learner(self, rank: int) -> Remote:
        """The learner's rank."""
        self._made["learner", rank] += 1
        return self._actor(IteratedWorker, "learner", rank, {}, rank, self._config.learner.ranks, self._job)


class IteratedLearner(LearnerGroup):
    """All ranks of the learner, with what an iteration asks of them."""

    async def imitate(self, batches: Sequence[Sequence[Pair]]) -> Rows:
        """One supervised update a batch; a row of metrics for each."""
        rows: Rows = await self._all("imitation_updates", ray.put(batches))
        return rows

    async def take_contrasts(self, data: PreferenceData, reference: Sequence[float]) -> None:
        """Give the pairs of an iteration to all ranks, and log π_t of their sequences if known."""
        await self._all("take_contrasts", ray.put(data), reference)

    async def reference(self) -> list[float]:
        """log π of the iteration's sequences with the present weights."""
        logprobs: list[float] = await self._all("reference")
        return logprobs

    async def contrast(self, batches: Sequence[Sequence[int]], beta: float) -> Rows:
        """One update of SPIN a batch of numbers of pairs; a row of metrics for each."""
        rows: Rows = await self._all("contrast_updates", batches, beta)
        return rows

    async def heldout_loss(self, demonstrations: Sequence[Pair]) -> float:
        """Mean −log π of the completions' tokens."""
        loss: float = await self._all("supervised_loss", demonstrations)
        return loss
