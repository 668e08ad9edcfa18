"""The receive side of a discriminator's weights, in a scoring actor: fetch, check, load, prove.

The learner's logits of a probe batch come with every version. What is loaded must give the same, or the actor
refuses to score.
"""

import math
import time

from actors.proof import DEFAULT_TOLERANCE
from actors.records import DiscriminatorProof, DiscriminatorUpdate
from actors.weight_files import SharedFolder, local_file, remove_stale
from rewards.models.discriminator import DiscriminatorReward


class DiscriminatorRefused(RuntimeError):  # noqa: N818 - as SyncRefused
    """A version of the discriminator is not what the learner sent out."""


class DiscriminatorReceiver:
    """Brings versions into one reward; `close` at the end."""

    def __init__(self, actor: str, reward: DiscriminatorReward, precision: str) -> None:
        self._actor = actor
        self._reward = reward
        self._tolerance = DEFAULT_TOLERANCE[precision]
        self._copies: SharedFolder | None = None

    def load(self, update: DiscriminatorUpdate, seconds: float) -> DiscriminatorProof:
        """Load a version that is newer than the present one, and prove it.

        Raises WeightFileError for a file that is not whole, and DiscriminatorRefused where order or logits
        are wrong; `seconds` bounds the fetch from another host.
        """
        began = time.monotonic()
        if update.version <= self._reward.version:
            raise DiscriminatorRefused(
                f"{self._actor}: version {update.version} of the discriminator came after version "
                f"{self._reward.version}"
            )
        path = local_file(update.payload, update.version, self._open_copies, seconds)
        self._reward.load(path, update.config, update.version)
        found = self._reward.logits(update.probe_token_ids)
        worst = largest_difference(found, update.probe_logits)
        if not worst <= self._tolerance:
            raise DiscriminatorRefused(
                f"{self._actor}: with version {update.version} of the discriminator the probe's logits "
                f"differ by {worst:.3g} from the learner's, more than {self._tolerance}"
            )
        return DiscriminatorProof(self._actor, update.version, worst, time.monotonic() - began)

    def _open_copies(self, run_id: str) -> SharedFolder:
        if self._copies is None:
            remove_stale()
            self._copies = SharedFolder(f"{run_id}-copies")
        return self._copies

    def close(self) -> None:
        """Let go of the folder of copies; safe to call twice."""
        if self._copies is not None:
            self._copies.close()
            self._copies = None


def largest_difference(found: list[float], expected: tuple[float, ...]) -> float:
    """max |a − b| / max(1, |b|); infinite where either is not a number."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        known = math.isfinite(a) and math.isfinite(b)
        worst = max(worst, abs(a - b) / max(1.0, abs(b))) if known else math.inf
    return worst
