"""Whether a model's folder can be opened without harm. Standard library only.

transformers and vLLM choose among a folder's files by rules of their own: an index can name pickled shards
beside a safetensors file that nobody reads, or files outside the folder; a link can lead to a file of the
user's that was never part of the model, and a pipe is waited for without end. So all that is looked at before
either library sees the folder.
"""

import json
import math
import struct
from pathlib import Path

_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_SAFE = ".safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_OPENED = {_SAFE, ".json", ".jinja", ".txt", ".model", ".tiktoken"}  # what libraries open by themselves
_LONGEST_HEAD = 100 << 20  # bytes, as the format itself limits it
_CONFIG = "config.json"
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # of which each has a tensor at least
_EXTENTS = ("vocab_size", "hidden_size", "n_embd", "intermediate_size", "num_labels")  # and these an entry
_SAVE = "save the model again with save_pretrained"


class DamagedError(ValueError):
    """A file of weights that is not what it should be."""


def unsafe_weights(folder: Path) -> str | None:
    """Why a model's folder is not opened, and the remedy, as the end of a message; None if it can be."""
    if unsafe := unsafe_files(folder):
        return unsafe
    if not any(folder.glob(f"*{_SAFE}")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        found = (
            f"only pickled weights ({', '.join(pickled[:3])}), which could run code" if pickled else "none"
        )
        return f"weights must be *{_SAFE}, found {found}; {_SAVE}"
    index = folder / _INDEX
    return (_unsafe_index(folder, index) if index.exists() else None) or _damaged(folder) or oversized(folder)


def unsafe_files(folder: Path) -> str | None:
    """The same of the files' kinds alone: what is no file, a link that leads elsewhere, an adapter."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in _OPENED:
            continue
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no file"
            return f"{path.name} is {kind}; copy the whole folder, or {_SAVE}"
        if path.is_symlink() and path.suffix != _SAFE and not _stays(folder, path):
            return (
                f"{path.name} is a link out of the folder, to {path.resolve()}, and what it leads to would "
                "get into checkpoints; put the file itself in its place"
            )
    if (folder / _ADAPTER).exists():
        return (
            f"{_ADAPTER} makes it an adapter of another model, and adapters are not applied here; merge it "
            "into that model (merge_and_unload of peft) and save the whole"
        )
    return None


def _stays(folder: Path, path: Path) -> bool:
    """Whether a link leads to a file of the same folder, or to the blobs of the hub's cache that it is in."""
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parents[1] / "blobs")
    target = path.resolve()
    return any(target.is_relative_to(home) for home in homes)


def _unsafe_index(folder: Path, index: Path) -> str | None:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{_INDEX} cannot be read as a map of weights ({error!r}); {_SAVE}"
    for name in sorted({shard if isinstance(shard, str) else type(shard).__name__ for shard in shards}):
        if name != Path(name).name or not name.endswith(_SAFE):
            return f"{_INDEX} names {name!r}, which is no *{_SAFE} file of this folder; {_SAVE}"
        if not (folder / name).is_file():
            return f"{_INDEX} names {name!r}, which is not there: copy the whole folder"
    return None


def _damaged(folder: Path) -> str | None:
    for path in sorted(folder.glob(f"*{_SAFE}")):
        try:
            check_safetensors(path)
        except DamagedError as error:
            said = str(error).replace(str(path), path.name)
            return f"{said}; copy or download the file again"
    return None


def oversized(folder: Path) -> str | None:
    """The same of a config.json that asks for more than the weights hold: it would fill memory first.

    Raises DamagedError where the weights cannot be read.
    """
    shapes = [shape for path in folder.glob(f"*{_SAFE}") for shape in check_safetensors(path)]
    entries = sum(math.prod(shape) for shape in shapes)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever opens it says so
    parts = [config, *config.values()] if isinstance(config, dict) else []
    for part in (one for one in parts if isinstance(one, dict)):
        for names, most, of in ((_COUNTS, len(shapes), "tensors"), (_EXTENTS, entries, "numbers")):
            for name in names:
                value = part.get(name)
                if isinstance(value, int) and value > most:
                    return (
                        f"{_CONFIG} says {name} = {value}, but the weights hold {most} {of} in all; copy the "
                        f"whole folder, or {_SAVE}"
                    )
    return None


def check_safetensors(path: Path) -> list[list[int]]:
    """The tensors' shapes; raises DamagedError unless they can be read and fill the rest of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise DamagedError(f"{path}: its head is cut off")
            if length > _LONGEST_HEAD:
                raise DamagedError(f"{path}: its head of {length} bytes is longer than the format allows")
            head = json.loads(file.read(length))
        tensors = {name: entry for name, entry in head.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes = [[int(extent) for extent in entry["shape"]] for entry in tensors.values()]
    except DamagedError:
        raise
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise DamagedError(f"{path}: is no safetensors file ({type(error).__name__}: {error})") from None
    if end != size - 8 - length:
        raise DamagedError(f"{path}: holds {size - 8 - length} bytes of tensors where its head says {end}")
    return shapes
