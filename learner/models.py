"""The trained modules: a policy (with or without a value head) and an own critic.

Both take a micro-batch's tensors and answer one number a predicted token, so that what is exchanged with
the engine is small. The value of the state before token t is read from the hidden state of t's predecessor,
the same state that predicts t.

Legend: R rows, L tokens of a row, N predicted response tokens, H hidden size, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.language_model import LogitTransform, chunked_logprobs, last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OutputHead(nn.Module):
    """The language model's output layer, run over chunks.

    It holds the same parameters as the model's own layer. Being one module with one call, ZeRO-3 gathers
    them once, however many chunks a rank has: ranks with different numbers of chunks stay in step.
    """

    def __init__(
        self, model: "PreTrainedModel", *, temperature: float, chunk_tokens: int, entropy_gradient: bool
    ) -> None:
        super().__init__()
        layer = model.get_output_embeddings()
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens
        self._entropy_gradient = entropy_gradient
        self._transform = LogitTransform.of(model)

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, both (N,), from (N, H) hidden states."""
        return chunked_logprobs(
            hidden,
            self.weight,
            self.bias,
            targets,
            temperature=self._temperature if temperature is None else temperature,
            chunk_tokens=self._chunk_tokens,
            transform=self._transform,
            entropy_gradient=self._entropy_gradient,
        )


def zero_value_head(model: "PreTrainedModel") -> nn.Linear:
    """A scalar head that starts at 0, so that the first advantages are the rewards themselves."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=model.dtype, device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class Policy(nn.Module):
    """A causal language model and, where it is shared, the value head."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        with_value_head: bool,
        temperature: float,
        chunk_tokens: int,
        entropy_gradient: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = OutputHead(
            model, temperature=temperature, chunk_tokens=chunk_tokens, entropy_gradient=entropy_gradient
        )
        self.value_head = zero_value_head(model) if with_value_head else None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        *,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities, entropies, values), each (N,) float32; values are 0 without a value head.

        `temperature` is the sampling temperature unless another one is given.
        """
        hidden = last_hidden(self.model.base_model, input_ids, position_ids, positions)
        logprobs, entropies = self.head(hidden, targets, temperature)
        if self.value_head is None:
            return logprobs, entropies, torch.zeros_like(logprobs)
        return logprobs, entropies, self.value_head(hidden).squeeze(-1).float()


class Critic(nn.Module):
    """A value model of its own: a language model's backbone under a scalar head."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model: Any = model.base_model
        self.value_head = zero_value_head(model)

    def forward(self, input_ids: Tensor, position_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """(N,) float32 values; `targets` is not looked at."""
        del targets
        hidden = last_hidden(self.model, input_ids, position_ids, positions)
        values: Tensor = self.value_head(hidden).squeeze(-1).float()
        return values
