"""What jobs have in common that start learner ranks and nothing else: reward models, imitation.

A subclass says what a rank is told (`learner_job`) and what is done with the ranks (`work`). Start and end,
Ctrl-C, checkpoints and resume are here.
"""

import asyncio
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from actors.shipping import ship
from cluster import checkpoint
from cluster.config_file import ConfigError
from cluster.data_files import Quarantine
from cluster.host_watch import host_watches
from cluster.learner_ranks import LearnerRanks
from cluster.monitor import Monitor
from cluster.placement import learner_session
from cluster.run_folder import CONFIG
from cluster.services import serving
from cluster.stopping import stop_signals
from cluster.summary import package_versions
from learner.rank import LearnerRank

_OF_ROLLOUTS = (
    *("reward_initial", "reward_final", "kl_final", "tokens_generated", "tokens_trained"),
    *("groups_dispatched", "groups_trained", "groups_dropped", "lag_bound", "lag_max", "lag_mean"),
    *("trainer_wait_fraction", "rollout_wait_fraction", "sync_s_mean", "sync_probe_max_abs_diff"),
    "padding_fraction",
)


class LearnerInputs(Protocol):
    """What has been made ready for the ranks."""

    @property
    def model_path(self) -> Path:
        """Folder of the model to begin with."""

    @property
    def quarantine(self) -> Quarantine:
        """The rows that were put aside."""

    @property
    def fingerprint(self) -> str:
        """A digest of the data as tokens: a resumed run must have the same."""


class LearnerRun(ABC):
    """A run in progress; `work` is the story."""

    worker: ClassVar[type[LearnerRank]]
    data: ClassVar[str]  # what the rows are called

    def __init__(
        self, config: Any, inputs: LearnerInputs, run_dir: Path, resume_from: Path | None, total_steps: int
    ) -> None:
        """Raises ConfigError where the data are not those that a resumed run was started with."""
        self.config = config
        self.run_dir = run_dir
        self.total_steps = total_steps
        self.step = 0
        self._inputs = inputs
        self._resume_from = resume_from
        if resume_from is not None:
            state = checkpoint.read_state(resume_from)
            if state.get("data") != inputs.fingerprint:
                raise ConfigError(
                    f"--resume: the {self.data} are not those that the run was started with (their rows, or "
                    "the tokens made of them, have changed); restore the files, or start a new run"
                )
            self.step = int(state["step"])
        self._stopping = False  # asked to
        self._training = False  # and able to stop with a checkpoint

    def session(self) -> AbstractContextManager[bool]:
        """Ray, with room for the learner ranks."""
        return learner_session(self.config.learner, self.config.cluster, self.run_dir)

    async def run(self, monitor: Monitor, *, cuda: bool) -> bool:
        """Run to the end; true if a stop was asked for on the way."""
        self._monitor = monitor
        self._task = asyncio.current_task()
        with stop_signals(self._stop):
            self._ranks = await LearnerRanks.gather(self.config, self.worker, self._learner_job(), cuda=cuda)
            try:
                every = self.config.monitor.hosts_every_s
                async with serving(*host_watches(every, self._ranks.everyone, monitor)):
                    await self._start()
                    return await self._work()
            finally:
                await self._ranks.dismiss()

    @abstractmethod
    def _learner_job(self) -> Any:
        """What each rank is told."""

    @abstractmethod
    async def _work(self) -> bool:
        """Train to the end, or to where `_stopping` is found to be set; true if that left it short."""

    async def _start(self) -> None:
        """Let the ranks meet, with the model on every host."""
        self._monitor.event("starting the learner")
        model = None
        if self.config.cluster.address:
            model = await asyncio.to_thread(ship, self._inputs.model_path)
        await self._ranks.start(model, self.run_dir.resolve() / CONFIG)

    async def _restore(self) -> None:
        """Take up the checkpoint, where there is one."""
        if self._resume_from is not None:
            await self._ranks.all("restore", str(self._resume_from.resolve()))

    async def _checkpoint(self) -> None:
        """Save what a resume needs; the folder appears whole or not at all."""
        root = self.run_dir / "checkpoints"
        folder = checkpoint.begin(root, self.step)
        await self._ranks.all("save", str(folder.resolve()))
        state = {"step": self.step, "data": self._inputs.fingerprint}
        keep = self.config.run.keep_checkpoints
        final = await asyncio.to_thread(checkpoint.commit, root, self.step, state, keep=keep)
        self._monitor.event(f"checkpoint {final}")

    def _stop(self) -> None:
        """Finish these updates and save; outside training, or the second time, stop at once."""
        assert self._task is not None
        if self._stopping or not self._training:
            self._task.cancel()
            return
        self._monitor.event("stopping after these updates, with a checkpoint; once more to stop at once")
        self._stopping = True

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of the run so far; null for what was not reached, or does not apply."""
        return {
            "objective": self.config.objective,
            "name": self.config.run.name,
            "steps": self.step,
            "rows_quarantined": dict(self._inputs.quarantine.counts),
            **dict.fromkeys(_OF_ROLLOUTS),
            "versions": package_versions(),
        }
