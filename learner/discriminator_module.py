"""A discriminator's trained module: a transformer under a scalar head that reads a sequence's last token.

Legend: N sequences of a micro-batch, R rows, L tokens of a row, H hidden size.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.language_model import last_hidden
from learner.discriminator_objectives import penalty_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Discriminator(nn.Module):
    """Logits of packed sequences. A head that starts at 0 gives each of them D = ½: no opinion, no reward."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        *,
        penalty: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Logits (1, N) float32 and, if asked for and gradients are wanted, Σ ‖∂logit/∂embeddings‖², else 0.

        `positions` point to the tokens before the last ones, which are `targets`.
        """
        del targets
        if not (penalty and torch.is_grad_enabled()):
            hidden = last_hidden(self.model.base_model, input_ids, position_ids, positions + 1)
            return self.model.score(hidden).float().T, hidden.new_zeros((), dtype=torch.float32)
        embedded = self.model.get_input_embeddings()(input_ids)
        output = self.model.base_model(inputs_embeds=embedded, position_ids=position_ids, use_cache=False)
        states = output.last_hidden_state
        logits = self.model.score(states.reshape(-1, states.shape[-1])[positions + 1]).float().T
        return logits, penalty_of(logits[0], embedded)
