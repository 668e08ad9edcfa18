"""A small network on frozen embeddings of a language model, and the embeddings' cache on disk.

    folder/backbone/              the language model and its tokenizer, as they were
    folder/[member_K/]head.safetensors   the network, and the mean and scale of its inputs

Legend: N sequences, D embedding size, K members.
"""

import hashlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rewards.models.card import RewardCard, member_folder
from rewards.models.transformer import hidden_at_end, load_backbone

BACKBONE = "backbone"
HEAD_FILE = "head.safetensors"
_KEY_BYTES = 32


class RewardHead(nn.Module):
    """ReLU network D → hidden sizes → 1 on inputs brought to mean 0 and variance 1."""

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, inputs: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        sizes = [inputs, *hidden_sizes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.score = nn.Linear(sizes[-1], 1, bias=False)
        self.register_buffer("input_mean", torch.zeros(inputs))
        self.register_buffer("input_scale", torch.ones(inputs))

    def hidden(self, embeddings: Tensor) -> Tensor:
        """(N, last hidden size): what the linear output is applied to."""
        x = (embeddings - self.input_mean) / self.input_scale
        x = x.to(self.score.weight.dtype)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N,) rewards of (N, D) embeddings."""
        rewards: Tensor = self.score(self.hidden(embeddings)).squeeze(-1)
        return rewards


def input_statistics(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) over (N, D); a dimension that does not vary is divided by 1."""
    mean = embeddings.double().mean(dim=0)
    scale = embeddings.double().std(dim=0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max().clamp_min(1e-12), scale, torch.ones_like(scale))
    return mean.float(), scale.float()


def load_head(folder: Path) -> RewardHead:
    """Open `head.safetensors`; ValueError if it is not what was written there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / HEAD_FILE
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"reward model {str(folder)!r}: {HEAD_FILE} cannot be read ({error})") from None
    count = sum(name.startswith("layers.") and name.endswith(".weight") for name in weights)
    try:
        hidden = [weights[f"layers.{i}.weight"].shape[0] for i in range(count)]
        head = RewardHead(weights["input_mean"].shape[0], hidden)
        head.load_state_dict(weights)
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"reward model {str(folder)!r}: {HEAD_FILE} does not fit together ({error}); train it again"
        ) from None
    return head.eval()


class EmbeddingScorer:
    """The members of a reward model of kind "embedding"."""

    def __init__(
        self, backbone: Any, heads: Sequence[RewardHead], device: str, micro_batch_tokens: int
    ) -> None:
        self._backbone = backbone
        self._heads = heads
        self._device = device
        self._tokens = micro_batch_tokens

    @classmethod
    def load(
        cls, folder: Path, card: RewardCard, device: str, precision: str, micro_batch_tokens: int
    ) -> "EmbeddingScorer":
        """Open the backbone and every member's head."""
        backbone = load_backbone(folder / BACKBONE, precision=precision, device=device)
        folders = [member_folder(folder, member, card.members) for member in range(card.members)]
        return cls(backbone, [load_head(one) for one in folders], device, micro_batch_tokens)

    def _embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return hidden_at_end(self._backbone, sequences, device=self._device, micro_batch_tokens=self._tokens)

    @torch.no_grad()
    def raw(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """(K, N) rewards."""
        embeddings = self._embed(sequences)
        return torch.stack([head(embeddings) for head in self._heads]).double().numpy()

    @torch.no_grad()
    def features(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(N, last hidden size): what the first member's linear output is applied to."""
        return self._heads[0].hidden(self._embed(sequences)).numpy()


# --- The cache -------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/headrace/embeddings`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace" / "embeddings"


def model_digest(folder: Path) -> str:
    """SHA-256 of what an embedding depends on: the model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def sequence_key(ids: Sequence[int]) -> bytes:
    """SHA-256 of a sequence of token ids."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).digest()


class EmbeddingCache:
    """Embeddings by model and tokens, in shards that are written whole and never changed.

    `root/MODEL/NAME.safetensors` has `keys` (M, 32) and `embeddings` (M, D). Several runs may use one cache
    at the same time: the worst that happens is that both compute the same.
    """

    def __init__(self, root: Path, model: str, precision: str) -> None:
        self._folder = root / f"{model[:32]}-{precision}"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._places: dict[bytes, tuple[Path, int]] = {}
        for shard in sorted(self._folder.glob("*.safetensors")):
            self._index(shard)

    def _index(self, shard: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard, framework="pt") as file:
                keys = file.get_tensor("keys").numpy()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"reward_model.cache: {shard} is damaged ({error}); delete that file, and its embeddings are "
                "computed again"
            ) from None
        for row, key in enumerate(keys):
            self._places[key.tobytes()] = (shard, row)

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """The distinct keys that have no embedding yet, in the order given."""
        return [key for key in dict.fromkeys(keys) if key not in self._places]

    def put(self, keys: Sequence[bytes], embeddings: Tensor) -> None:
        """Add a shard of embeddings (M, D)."""
        from safetensors.torch import save_file

        assert len(keys) == embeddings.shape[0], (len(keys), embeddings.shape)
        packed = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).copy())
        shard = self._folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        os.close(handle)
        tensors = {"keys": packed.reshape(-1, _KEY_BYTES), "embeddings": embeddings.float().contiguous()}
        save_file(tensors, name)
        Path(name).chmod(0o600)
        Path(name).replace(shard)
        self._index(shard)

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """(N, D) float32 in the order of the keys, all of which must be there."""
        from safetensors import safe_open

        by_shard: dict[Path, list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            shard, row = self._places[key]
            by_shard.setdefault(shard, []).append((place, row))
        found: Tensor | None = None
        for shard, places in by_shard.items():
            with safe_open(shard, framework="pt") as file:
                embeddings = file.get_tensor("embeddings")
            if found is None:
                found = torch.empty((len(keys), embeddings.shape[1]), dtype=torch.float32)
            found[[place for place, _ in places]] = embeddings[[row for _, row in places]]
        assert found is not None, "no keys were asked for"
        return found
