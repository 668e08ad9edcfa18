"""The trained modules of reward models, and how sequences become their micro-batches.

Both modules take a micro-batch's tensors, as the engine hands them over, and answer (scores, penalty): scores
(heads, N) of the micro-batch's N sequences, the first head being the reward, and a penalty of the heads' own
weights, 0 for all but ODIN.

Legend: N sequences of a micro-batch, R rows, L tokens of a row, H hidden size, D embedding size.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actors.language_model import last_hidden
from actors.packing import MicroBatch, pack
from rewards.models.embedding import RewardHead
from rewards.preferences.losses import odin_head_penalty, odin_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answer = tuple[Tensor, Tensor]


class LengthHeads(nn.Module):
    """ODIN's two heads, (H,) each, used centred and of unit norm: quality and length.

    The quality head is the parameter of the model's own head. One module with one call, so that ZeRO-3
    gathers both weights at once.
    """

    def __init__(self, quality: nn.Parameter) -> None:
        super().__init__()
        self.quality = quality
        self.following = nn.Parameter(torch.empty_like(quality))

    def weights(self) -> Tensor:
        """(2, H), as they are trained."""
        return torch.cat([self.quality, self.following])

    def forward(self, hidden: Tensor) -> Answer:
        """(2, N) rewards of (N, H) states, and |ŵ_Q·ŵ_L|."""
        heads = odin_heads(self.weights().float())
        return heads @ hidden.float().T, odin_head_penalty(self.weights().float())


class RewardTransformer(nn.Module):
    """A transformer under a scalar head that reads each sequence's last token."""

    def __init__(self, model: "PreTrainedModel", *, odin: bool, seed: int) -> None:
        """The heads start from normal weights of standard deviation 1/√(H + 1), drawn with `seed`."""
        super().__init__()
        self.model: Any = model
        self.lengths = LengthHeads(model.score.weight) if odin else None
        draw = torch.Generator().manual_seed(seed)
        heads = [model.score.weight] if self.lengths is None else [*self.lengths.parameters()]
        for weight in heads:
            start = torch.randn(weight.shape, generator=draw) * (weight.shape[-1] + 1) ** -0.5
            with torch.no_grad():
                weight.copy_(start.to(weight))

    @property
    def value_head(self) -> nn.Module:
        """What `optimizer.critic_lr` is for."""
        head: nn.Module = self.model.score if self.lengths is None else self.lengths
        return head

    def forward(self, input_ids: Tensor, position_ids: Tensor, positions: Tensor, targets: Tensor) -> Answer:
        """Scores (heads, N); `positions` point to the tokens before the last ones, which are `targets`."""
        del targets
        hidden = last_hidden(self.model.base_model, input_ids, position_ids, positions + 1)
        if self.lengths is not None:
            answer: Answer = self.lengths(hidden)
            return answer
        return self.model.score(hidden).float().T, hidden.new_zeros((), dtype=torch.float32)


class RewardOnEmbeddings(nn.Module):
    """A small network on frozen embeddings."""

    def __init__(self, head: RewardHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, input_ids: Tensor, position_ids: Tensor, positions: Tensor, targets: Tensor) -> Answer:
        """Scores (1, N) of the embeddings (N, D) that stand in the place of token ids."""
        del position_ids, positions, targets
        return self.head(input_ids)[None].float(), input_ids.new_zeros(())


# --- Sequences → micro-batches ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sequences:
    """Numbered sequences of token ids, end to end in one array; `starts` has one entry more than they."""

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Sequences":
        """Number them as they come."""
        tokens, starts = array("i"), array("q", [0])
        for sequence in sequences:
            tokens.extend(sequence)
            starts.append(len(tokens))
        return cls(np.array(tokens, dtype=np.int32), np.array(starts, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        ids: list[int] = self.tokens[self.starts[number] : self.starts[number + 1]].tolist()
        return ids

    def size(self, number: int) -> int:
        """Tokens of a sequence."""
        return int(self.starts[number + 1] - self.starts[number])


class Inputs(Protocol):
    """The sequences of a job, by number."""

    def cost(self, index: int) -> int:
        """What a sequence weighs when they are shared out between ranks."""

    def batches(self, indices: Sequence[int], micro_batch_tokens: int) -> list[MicroBatch]:
        """Micro-batches of these sequences; `sequence` in them counts from the first of `indices`."""

    def dummy(self) -> MicroBatch:
        """A smallest micro-batch, to keep a rank in step that has nothing to do."""


class TokenInputs:
    """Token sequences, packed into rows."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences

    def cost(self, index: int) -> int:
        """Its tokens."""
        return self._sequences.size(index)

    def batches(self, indices: Sequence[int], micro_batch_tokens: int) -> list[MicroBatch]:
        """Packed rows. The last token stands as the one to predict, so one position comes out a sequence."""
        rows = [self._sequences[i] for i in indices]
        pairs = [(row[:-1], row[-1:]) for row in rows]
        return pack(pairs, micro_batch_tokens=micro_batch_tokens) if pairs else []

    def dummy(self) -> MicroBatch:
        """Two tokens."""
        return pack([([0], [0])], micro_batch_tokens=2)[0]


class EmbeddingInputs:
    """Rows of a table of embeddings (all sequences, D), which stand where token ids would."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def cost(self, index: int) -> int:
        """Every row is as dear as any other."""
        del index
        return 1

    def batches(self, indices: Sequence[int], micro_batch_tokens: int) -> list[MicroBatch]:
        """At most `micro_batch_tokens` rows at a time."""
        starts = range(0, len(indices), micro_batch_tokens)
        return [self._rows(indices[start : start + micro_batch_tokens], start) for start in starts]

    def _rows(self, indices: Sequence[int], first: int) -> MicroBatch:
        rows = torch.arange(len(indices))
        embeddings = self._table[torch.tensor(indices, dtype=torch.long)]
        zeros = torch.zeros(len(indices), dtype=torch.long)
        return MicroBatch(embeddings, rows, rows, zeros, rows + first, zeros, len(indices))

    def dummy(self) -> MicroBatch:
        """One row of zeros."""
        one = torch.zeros(1, dtype=torch.long)
        return MicroBatch(torch.zeros(1, self._table.shape[1]), one, one, one, one, one, 1)
