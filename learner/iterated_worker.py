"""A rank of the learner for jobs that learn from their own samples, iteration by iteration.

    start, warm-up, publish … as any learner; in each iteration
      imitation:  imitation_updates …                               (best of K samples, supervised)
      contrast:   take_contrasts → reference → contrast_updates …   (SPIN)

SPIN (Chen et al., arXiv 2401.01335) is DPO in which the chosen response is a demonstration, the rejected one
a sample of the policy π_t with which the iteration began, and π_t the reference. Its loss

    −log σ(β·[(log π(w) − log π_t(w)) − (log π(l) − log π_t(l))]),    l ~ π_t

has no gradient in the mean once samples have the law of the demonstrations.

Every method is collective: call it on all ranks. The updates of all iterations are counted together, and the
learning rate is scheduled over them.
"""

import time
from collections.abc import Sequence

from actors.packing import Pair
from learner.preference_batch import PreferenceData
from learner.preference_settings import DPOSettings
from learner.preference_training import Passes
from learner.supervised import supervised_update
from learner.worker import LearnerMetrics, LearnerWorker


class IteratedWorker(LearnerWorker):
    """A data-parallel rank."""

    _contrasts: PreferenceData | None = None
    _reference: Sequence[float] = ()

    def imitation_updates(self, batches: Sequence[Sequence[Pair]]) -> list[LearnerMetrics]:
        """One supervised update a batch of (prompt, response) token ids; a row of metrics for each."""
        rows = []
        for batch in batches:
            began = time.perf_counter()
            row = supervised_update(
                self._engines[0],
                batch,
                lr=self._rates(self._state.updates)[0],
                micro_batch_tokens=self._job.learner.micro_batch_tokens,
                rank=self._rank,
                ranks=self._ranks,
            )
            rows.append(self._counted({"supervised/loss": row.pop("loss/supervised"), **row}, began))
        return rows

    def take_contrasts(self, data: PreferenceData, reference: Sequence[float] = ()) -> None:
        """The pairs of an iteration, and log π_t of all their sequences where it is known already."""
        self._contrasts, self._reference = data, reference

    def reference(self) -> list[float]:
        """log π of each sequence of the iteration with the present weights, which are its π_t from now on."""
        passes = self._passes()
        self._reference = passes.logprobs(range(len(passes.responses)))
        return list(self._reference)

    def contrast_updates(self, batches: Sequence[Sequence[int]], beta: float) -> list[LearnerMetrics]:
        """One update of SPIN a batch, which numbers the iteration's pairs; a row of metrics for each."""
        assert self._contrasts is not None, "take_contrasts comes first"
        passes, rows = self._passes(), []
        for batch in batches:
            began = time.perf_counter()
            row = passes.update(
                DPOSettings(beta=beta),
                self._contrasts.train,
                batch=batch,
                reference=self._reference,
                lr=self._rates(self._state.updates)[0],
            )
            rows.append(self._counted(row, began))
        return rows

    def _passes(self) -> Passes:
        assert self._contrasts is not None, "take_contrasts comes first"
        return Passes(
            self._engines[0],
            self._contrasts.responses,
            self._job.learner.micro_batch_tokens,
            self._rank,
            self._ranks,
        )

    def _counted(self, row: LearnerMetrics, began: float) -> LearnerMetrics:
        """Count an update, and say so in its row."""
        updates = self._state.updates + 1
        self._state = self._state.changed(steps=updates, updates=updates)
        return row | {
            "optimizer/updates": float(updates),
            "timing_s/learner_step": time.perf_counter() - began,
        }
