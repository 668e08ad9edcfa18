"""A rollout actor whose samples are guided: a `RolloutWorker` with a guide inside its engine.

Its completions carry log-probabilities of the guided distribution that they were sampled from.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.decoding.settings import GUIDE, Guidance, GuideSpec
from actors.engine import EngineDied, WatchedEngine
from actors.records import SampledGroup, SampleRequest
from actors.rollout import EngineFacts, RolloutWorker
from actors.settings import RolloutSettings, SyncSettings
from rewards.user_function import plain

PROCESSOR = "actors.decoding.processor:GuidedLogits"


class GuidedWorker(RolloutWorker):
    """Samples from π_g ∝ π·e^{w·score} instead of π; see `actors.decoding.guided`."""

    def __init__(
        self,
        name: str,
        model_path: str,
        rollout: RolloutSettings,
        sync: SyncSettings,
        *,
        dtype: str,
        max_length: int,
        seed: int,
        device: str,
        guide: GuideSpec,
        guidance: Guidance,
    ) -> None:
        """As a `RolloutWorker`; every request is guided by `guide`, as strongly as `guidance` says."""
        super().__init__(
            name, model_path, rollout, sync, dtype=dtype, max_length=max_length, seed=seed, device=device
        )
        if rollout.tensor_parallel > 1:
            raise ValueError(
                f"rollout.tensor_parallel = {rollout.tensor_parallel}: guided decoding runs beside the "
                "policy on one GPU; set it to 1"
            )
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-guide-"))
        self._trouble = self._folder / "trouble.txt"
        self._guide = guide.model_copy(update={"trouble": str(self._trouble), "device": device})
        self._guidance = guidance
        self._spec = replace(
            self._spec, logits_processor=PROCESSOR, additional={GUIDE: self._guide.model_dump_json()}
        )
        self._engine = WatchedEngine(self._spec)

    async def start(self, version: int = 0) -> EngineFacts:
        """Start the engine and the guide in it."""
        try:
            return await super().start(version)
        except EngineDied as error:
            raise self._explained(error) from error

    async def sample(self, request: SampleRequest) -> SampledGroup:
        """Draw a group of guided samples; EngineDied says why where the guide could not go on."""
        try:
            return await super().sample(request)
        except EngineDied as error:
            raise self._explained(error) from error

    async def stop(self) -> None:
        """Stop the engine, and the guide with it."""
        await super().stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _request_params(self, request: SampleRequest) -> Any:
        params = super()._request_params(request)
        carried: dict[str, Any] = self._guidance.model_dump()
        if self._guide.kind != "value":  # tokens that a text has to stand in for also need their row
            carried |= {
                "source": plain(request.prompt.source or request.prompt.text, "the prompt"),
                "row": plain(dict(request.prompt.row), "the row"),
            }
        params.extra_args = {GUIDE: carried}
        return params

    def _explained(self, error: EngineDied) -> EngineDied:
        if not self._trouble.is_file():
            return error
        reason = self._trouble.read_text(encoding="utf-8")
        return EngineDied(f"{self._engine.whom}: guided decoding stopped: {reason}")
