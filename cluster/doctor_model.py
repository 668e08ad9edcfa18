"""Doctor's checks of model folders: weights, configuration, tokenizer. Offline; nothing of theirs is run."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import JobConfig
from cluster.doctor_records import JOB, Check
from cluster.plan_memory import model_size

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_POLICY = "model.path"
_INDEX = "model.safetensors.index.json"
_SAVE = "save the model with save_pretrained"


class DamagedError(ValueError):
    """A file of weights that is not what it should be."""


def model_checks(config: JobConfig) -> Iterator[Check]:
    """The policy's folder, and those of reference and critic where they are named."""
    if config.model.scratch is not None:
        yield Check("model", JOB, "ok", "[model.scratch]: made at the start, nothing to load")
    folders = local_models(config)
    for field, name in named_models(config).items():
        folder = folders.get(field)
        if folder is None:
            yield _not_here(field, name)
            continue
        yield weights_check(field, folder)
        yield pickles_check(field, folder)
        yield code_check(field, folder)
        yield configuration_check(field, folder)
        if field == _POLICY:
            yield tokenizer_check(field, folder)


def named_models(config: JobConfig) -> dict[str, str]:
    """The models that the configuration names, by field."""
    model = config.model
    named = {_POLICY: model.path, "model.reference": model.reference, "model.critic": model.critic}
    return {field: name for field, name in named.items() if name}


def local_models(config: JobConfig) -> dict[str, Path]:
    """Folders of the named models that are here, or in the hub's cache."""
    found = {
        field: _folder(name, config.model.revision if name == config.model.path else None)
        for field, name in named_models(config).items()
    }
    return {field: folder for field, folder in found.items() if folder is not None}


def whole_policy(config: JobConfig) -> Path | None:
    """The policy's folder if its weights are whole: sizes can be taken from it."""
    folder = local_models(config).get(_POLICY)
    return folder if folder is not None and weights_check(_POLICY, folder).status == "ok" else None


def _folder(name: str, revision: str | None) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _not_here(field: str, name: str) -> Check:
    if Path(name).is_absolute() or name.startswith(("~", ".")) or name.count("/") > 1:
        return Check(
            field,
            JOB,
            "fail",
            f"{name}: there is no such folder",
            f"correct {field}, or {_SAVE} to that folder",
        )
    return Check(
        field,
        JOB,
        "warn",
        f"{name} is no folder here and not in the hub's cache: the start will try to download it, unchecked",
        f"if it was meant as a folder, correct {field}; else download it before (hf download {name})",
    )


# ---- weights ----------------------------------------------------------------------------------------------


def weights_check(field: str, folder: Path) -> Check:
    """Weights are safetensors, all shards are there, and each file is as long as its head says."""
    name = f"{field} weights"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return Check(
            name, JOB, "fail", f"{folder} has no *.safetensors", f"{_SAVE}; pickled weights are never read"
        )
    try:
        missing = _indexed(folder) - {file.name for file in files}
        for file in files:
            check_safetensors(file)
    except DamagedError as error:
        return Check(name, JOB, "fail", str(error), "copy or download the file again")
    if missing:
        return Check(
            name,
            JOB,
            "fail",
            f"{_INDEX} names files that are not there: {_some(missing)}",
            "copy the whole folder",
        )
    size = model_size(folder)
    return Check(
        name, JOB, "ok", f"{size.get('parameters', 0):,.0f} parameters in {len(files)} safetensors file(s)"
    )


def _indexed(folder: Path) -> set[str]:
    path = folder / _INDEX
    if not path.exists():
        return set()
    try:
        return {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def check_safetensors(path: Path) -> None:
    """Raise DamagedError unless the head can be read and the tensors fill the rest of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise DamagedError(f"{path}: its head is cut off")
            head = json.loads(file.read(length))
        tensors = {name: entry for name, entry in head.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        for entry in tensors.values():
            [int(extent) for extent in entry["shape"]]
    except DamagedError:
        raise
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(f"{path}: is no safetensors file ({type(error).__name__}: {error})") from None
    if end != size - 8 - length:
        raise DamagedError(f"{path}: holds {size - 8 - length} bytes of tensors where its head says {end}")


def pickles_check(field: str, folder: Path) -> Check:
    """No pickled file beside the weights: nothing here opens one, but another tool might."""
    name = f"{field} pickles"
    found = {file.name for file in folder.iterdir() if file.suffix in _PICKLED}
    if found:
        return Check(
            name,
            JOB,
            "warn",
            f"{_some(found)} can run code when opened; headrace does not read them",
            f"remove them from {folder}",
        )
    return Check(name, JOB, "ok", "no pickled files")


def code_check(field: str, folder: Path) -> Check:
    """Whether the folder wants to bring code of its own: it is never run."""
    name = f"{field} code"
    asks = [file for file in ("config.json", "tokenizer_config.json") if "auto_map" in _json(folder / file)]
    if asks:
        return Check(
            name,
            JOB,
            "warn",
            f"auto_map in {' and '.join(asks)}: its own code is never run, transformers' classes are used",
            "make sure that they fit the weights: take auto_map out, load the model, and save it with "
            "save_pretrained",
        )
    return Check(name, JOB, "ok", "needs no code of its own")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the checks by transformers tell of it
        return {}
    return value if isinstance(value, dict) else {}


# ---- what transformers says -------------------------------------------------------------------------------


def configuration_check(field: str, folder: Path) -> Check:
    """transformers knows the architecture and it is a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = f"{field} configuration"
    remedy = f"give a folder of a causal language model; {_SAVE}"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        return Check(name, JOB, "fail", f"transformers cannot read it: {_line(error)}", remedy)
    kind = str(config.model_type)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Check(name, JOB, "fail", f"model_type {kind!r} is no causal language model", remedy)
    limit = getattr(config.get_text_config(), "max_position_embeddings", "no stated limit of")
    return Check(name, JOB, "ok", f"{kind}, {limit} tokens")


def tokenizer_check(field: str, folder: Path) -> Check:
    """The tokenizer loads and has an end token."""
    from transformers import AutoTokenizer

    name = f"{field} tokenizer"
    remedy = "save a tokenizer with an eos_token beside the model (tokenizer.save_pretrained)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        return Check(name, JOB, "fail", f"transformers cannot load it: {_line(error)}", remedy)
    if tokenizer.eos_token_id is None:
        return Check(name, JOB, "fail", "it has no end token, so no response could end", remedy)
    template = "with" if tokenizer.chat_template else "without"
    return Check(name, JOB, "ok", f"{len(tokenizer)} tokens, {template} a chat template")


def _line(error: Exception) -> str:
    """The first line of an error that may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(names: set[str]) -> str:
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
