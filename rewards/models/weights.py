"""Whether a folder's weights are safetensors and nothing else. Standard library only.

transformers and vLLM choose among a folder's files by rules of their own: an index can name pickled shards
beside a safetensors file that nobody reads, or files outside the folder. So what an index names is looked at
too, before either library sees the folder.
"""

import json
from pathlib import Path

_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_SAFE = ".safetensors"
_INDEX = "model.safetensors.index.json"


def unsafe_weights(folder: Path) -> str | None:
    """Why the weights of a model's folder are not read, and the remedy, as the end of a message; None if they
    are fine.
    """
    if not any(folder.glob(f"*{_SAFE}")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        found = (
            f"only pickled weights ({', '.join(pickled[:3])}), which could run code" if pickled else "none"
        )
        return f"weights must be *{_SAFE}, found {found}; save the model again with save_pretrained"
    index = folder / _INDEX
    return _unsafe_index(folder, index) if index.exists() else None


def _unsafe_index(folder: Path, index: Path) -> str | None:
    remedy = "save the model again with save_pretrained"
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{_INDEX} cannot be read as a map of weights ({error!r}); {remedy}"
    for name in sorted({str(shard) for shard in shards}):
        if name != Path(name).name or not name.endswith(_SAFE):
            return f"{_INDEX} names {name!r}, which is no *{_SAFE} file of this folder; {remedy}"
        if not (folder / name).is_file():
            return f"{_INDEX} names {name!r}, which is not there: copy the whole folder"
    return None
