"""Doctor's checks of model folders: weights, configuration, tokenizer. Offline; nothing of theirs is run."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.config import JobConfig
from cluster.doctor_records import JOB, Check
from cluster.plan_memory import model_size
from rewards.models.foreign import opening, refuse_tokens_beyond
from rewards.models.weights import DamagedError, check_safetensors, oversized, unsafe_files

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_POLICY = "model.path"
_INDEX = "model.safetensors.index.json"
_SAVE = "save the model with save_pretrained"


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
        if unsafe := unsafe_files(folder):
            found, _, remedy = unsafe.partition("; ")
            yield Check(f"{field} files", JOB, "fail", f"{folder}: {found}", remedy)
            continue
        whole = weights_check(field, folder)
        yield whole
        if whole.status == "ok" and (larger := oversized(folder)):
            yield Check(f"{field} configuration", JOB, "fail", *larger.split("; ", 1))
            continue
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
    if folder is None or unsafe_files(folder):
        return None
    whole = weights_check(_POLICY, folder).status == "ok"
    return folder if whole and oversized(folder) is None else None


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


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
    asks = sorted(
        file.name
        for file in folder.glob("*.json")
        if file.name not in (_INDEX, "tokenizer.json") and "auto_map" in _json(file)
    )
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
    except (OSError, ValueError, RecursionError):  # the checks by transformers tell of it
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
        with opening("transformers cannot read it", remedy):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            text = config.get_text_config()
    except ValueError as error:
        return Check(name, JOB, "fail", str(error).removesuffix(f"; {remedy}"), remedy)
    kind = str(config.model_type)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Check(name, JOB, "fail", f"model_type {kind!r} is no causal language model", remedy)
    limit = getattr(text, "max_position_embeddings", "no stated limit of")
    return Check(name, JOB, "ok", f"{kind}, {limit} tokens")


def tokenizer_check(field: str, folder: Path) -> Check:
    """The tokenizer loads and has an end token."""
    from transformers import AutoTokenizer

    name = f"{field} tokenizer"
    remedy = "save a tokenizer with an eos_token beside the model (tokenizer.save_pretrained)"
    try:
        with opening("transformers cannot load it", remedy):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError as error:
        return Check(name, JOB, "fail", str(error).removesuffix(f"; {remedy}"), remedy)
    if tokenizer.eos_token_id is None:
        return Check(name, JOB, "fail", "it has no end token, so no response could end", remedy)
    try:
        refuse_tokens_beyond("model.path", tokenizer, _vocabulary(folder))
    except ValueError as error:
        return Check(name, JOB, "fail", str(error), "save model and tokenizer that belong together")
    template = "with" if tokenizer.chat_template else "without"
    return Check(name, JOB, "ok", f"{len(tokenizer)} tokens, {template} a chat template")


def _vocabulary(folder: Path) -> int:
    """Tokens that the model has; without end where its configuration, which has a check, does not say."""
    known = _json(folder / "config.json")
    nested = known.get("text_config")
    size = known.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else sys.maxsize


def _some(names: set[str]) -> str:
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
