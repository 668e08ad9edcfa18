"""A learner rank that trains a discriminator beside the policy: adversarial imitation.

rendezvous (rank 0) → start → [warmup …] → start_discriminator → [restore] → open_discriminator
  → publish_discriminator, then step (policy, then discriminator), publish, publish_discriminator, …
"""

from pathlib import Path
from typing import Any

from actors.records import DiscriminatorUpdate, Group
from actors.shipping import ShippedFolder, local_folder
from learner.discriminator import DiscriminatorJob, DiscriminatorTrainer, with_model
from learner.worker import LearnerMetrics, LearnerWorker

_FOLDER = "discriminator"


class AdversarialWorker(LearnerWorker):
    """A data-parallel rank of policy and discriminator."""

    _trainer: DiscriminatorTrainer | None = None

    def start_discriminator(
        self, job: DiscriminatorJob, shipped: ShippedFolder | None, seconds: float
    ) -> None:
        """Load the discriminator, after the warm-up; `shipped` is its model where it must be brought here."""
        if shipped is not None:
            job = with_model(job, str(local_folder(shipped, seconds)))
        self._trainer = DiscriminatorTrainer(job, device=self._device, rank=self._rank, ranks=self._ranks)

    @property
    def _discriminator(self) -> DiscriminatorTrainer:
        assert self._trainer is not None, "start_discriminator comes first"
        return self._trainer

    def step(self, groups: list[Group], version: int) -> LearnerMetrics:
        """One learner step of the policy, then one of the discriminator on the same groups."""
        metrics = super().step(groups, version)
        return metrics | self._discriminator.step(groups, version)

    def open_discriminator(self, run_id: str, remote_hosts: bool) -> None:
        """Open the way to the scoring actors."""
        self._discriminator.open(run_id, remote_hosts=remote_hosts)

    def publish_discriminator(self) -> DiscriminatorUpdate | None:
        """Send its weights out; the version is the number of learner steps taken. Rank 0 has the answer."""
        return self._discriminator.publish(self._state.steps)

    def stop(self) -> None:
        """Leave no published files behind."""
        super().stop()
        if self._trainer is not None:
            self._trainer.close()

    def save(self, folder: str) -> None:
        """Write all that `restore` needs, the discriminator in a folder of its own."""
        super().save(folder)
        self._discriminator.save(Path(folder) / _FOLDER)

    def restore(self, folder: str) -> Any:
        """Go on from what `save` wrote; gives the learner steps that the checkpoint has taken."""
        steps = super().restore(folder)
        self._discriminator.restore(Path(folder) / _FOLDER)
        return steps
