"""The door into vLLM: a logits processor that lets a guide tilt each row's next-token distribution.

vLLM calls it inside the engine, once a step for the whole batch, between the model and the sampler. Rows of
requests that carry no guidance (a warm-up, a probe) are left as they are. An error here ends the engine, so
its reason is first written where the actor looks for it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.decoding.guided import guided_logits, top_candidates
from actors.decoding.guides import Guide, Row, build_guide
from actors.decoding.settings import GUIDE, GuideSpec


class GuidedLogits(LogitsProcessor):
    """See the module's text."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
        self._spec = GuideSpec.model_validate_json(vllm_config.additional_config[GUIDE])
        self._rows: dict[int, Row] = {}
        with self._reporting():
            self._guide: Guide = build_guide(self._spec, str(vllm_config.model_config.tokenizer))

    def is_argmax_invariant(self) -> bool:
        """The likeliest token may be another one afterwards."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests as they come, go and move within the batch."""
        process_dict_updates(self._rows, batch_update, _row_of)

    def apply(self, logits: Tensor) -> Tensor:
        """Tilt the rows that are guided."""
        if self._rows:
            with self._reporting():
                self._tilt(logits)
        return logits

    def _tilt(self, logits: Tensor) -> None:
        """In place."""
        places, rows = zip(*sorted(self._rows.items()), strict=True)
        where = torch.tensor(places, device=logits.device)
        chosen = logits[where]
        candidates = top_candidates(chosen, max(row.top_k for row in rows))
        scores = self._guide.scores(rows, candidates).to(logits.device)
        weight = torch.tensor([row.weight for row in rows], device=logits.device)
        temperature = torch.tensor([row.temperature for row in rows], device=logits.device)
        logits[where] = guided_logits(chosen, candidates, scores, weight, temperature)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._spec.trouble:
                Path(self._spec.trouble).write_text(str(error), encoding="utf-8")
            raise


def _row_of(params: Any, prompt: list[int] | None, output: list[int]) -> Row | None:
    guidance = (params.extra_args or {}).get(GUIDE)
    if guidance is None:
        return None
    return Row(
        prompt=list(prompt or []),
        output=output,
        top_k=int(guidance["top_k"]),
        weight=float(guidance["weight"]),
        temperature=float(params.temperature),
        source=guidance.get("source", ""),
        columns=guidance.get("row", {}),
    )
