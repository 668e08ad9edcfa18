"""Model folders from others: no code of theirs runs, no pickle is read, nothing outside the folder."""

import ast
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.engine import end_tokens
from actors.language_model import load_causal_model
from cluster.generation.policy import policy_folder
from cluster.prepare import load_model_config, load_tokenizer, resolve_model
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings
from rewards.models import transformer
from rewards.models.weights import unsafe_weights

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"
DOORS: dict[str, Callable[[Path], Any]] = {
    "policy": lambda folder: load_causal_model(str(folder), dtype="float32", attention="sdpa", device="cpu"),
    "tokenizer": load_tokenizer,
    "configuration": lambda folder: load_model_config("model.path", folder),
    "end tokens": lambda folder: end_tokens(str(folder)),
    "reward model": lambda folder: transformer.load_classifier(folder, precision="float32", device="cpu"),
    "reward model's tokenizer": transformer.load_tokenizer,
    "embeddings": lambda folder: transformer.load_backbone(folder, precision="float32", device="cpu"),
}
WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "policy": DOORS["policy"],
    "reward model": DOORS["reward model"],
    "embeddings": DOORS["embeddings"],
    "model.path": lambda folder: resolve_model("model.path", str(folder), None),
    "generate": policy_folder,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    shape = ScratchSettings(hidden_size=64, layers=1, heads=2, max_length=32)
    return build_scratch_model(shape, "abcxyz12", folder, seed=0)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


@pytest.mark.parametrize("unknown", [False, True], ids=["known architecture", "only the folder knows it"])
@pytest.mark.parametrize("door", DOORS)
def test_code_of_a_folder_never_runs(door: str, unknown: bool, folder: Path, tmp_path: Path) -> None:
    """It may be opened without that code, or refused."""
    trap = tmp_path / "it-ran"
    (folder / "hostile.py").write_text(f"open({str(trap)!r}, 'w')\nclass A: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = dict.fromkeys(classes, "hostile.A") | {
            "AutoTokenizer": ["hostile.A", "hostile.A"]
        }
        if unknown:
            values |= {"model_type": "hostile", "tokenizer_class": "A"}
        (folder / name).write_text(json.dumps(values))
    with contextlib.suppress(ValueError):
        DOORS[door](folder)
    assert not trap.exists()


def test_every_call_to_transformers_says_that_code_is_not_trusted() -> None:
    """Left out, transformers asks at the terminal, where there is one."""
    found = 0
    for package in ("actors", "cluster", "learner", "rewards"):
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                    continue
                if call.func.attr not in ("from_pretrained", "from_config"):
                    continue
                if ast.unparse(call.func.value) == "GenerationConfig":  # numbers alone
                    continue
                found += 1
                words = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert words.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
    assert found >= 12


def shards(folder: Path, *names: str) -> None:
    """An index that names these files, beside weights that it does not name."""
    weights = {f"model.layers.{number}.x": name for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


@pytest.mark.parametrize("door", WEIGHTS)
@pytest.mark.parametrize("name", ["evil.bin", "../outside.safetensors", "/etc/passwd", "absent.safetensors"])
def test_an_index_leads_nowhere_but_to_safetensors_of_the_folder(
    door: str, name: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    shutil.copy(folder / "decoy.safetensors", tmp_path / "outside.safetensors")
    (folder / "evil.bin").write_bytes(b"\x80\x04.")
    shards(folder, name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        WEIGHTS[door](folder)


def test_whole_folders_are_fine(folder: Path) -> None:
    assert unsafe_weights(folder) is None
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shards(folder, "model-00001-of-00001.safetensors")
    assert unsafe_weights(folder) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    assert "cannot be read as a map of weights" in str(unsafe_weights(folder))
