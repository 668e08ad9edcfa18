"""Model folders from others: no code of theirs runs, no pickle is read, nothing outside the folder."""

import ast
import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.end_tokens import end_tokens
from actors.language_model import load_causal_model
from cluster.data import DataSettings, Encoder
from cluster.data_files import BadRow
from cluster.generation.policy import policy_folder
from cluster.prepare import load_model_config, load_tokenizer, resolve_model
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings
from rewards.models import foreign, transformer
from rewards.models.card import TextFormat
from rewards.models.text import EncodingError, RewardEncoder
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


@pytest.mark.parametrize("door", WEIGHTS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**8), ("num_labels", 10**9), ("vocab_size", 10**12), ("hidden_size", 10**9)],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_full(
    door: str, name: str, value: int, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=rf"config\.json says {name} = {value}, but the weights hold \d+ "):
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


# --- Broken and odd folders ------------------------------------------------------------------------------


def edited(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def other_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


ODD_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "a division by zero": {"num_attention_heads": 0},
    "a text for a number": {"num_attention_heads": "two"},
    "a list for a name": {"model_type": ["llama"]},
    "no type of numbers": {"dtype": "os"},
    "no quantization": {"quantization_config": "evil"},
    "no end token": {"eos_token_id": "x"},
}


@pytest.mark.parametrize("odd", ODD_CONFIGURATIONS)
@pytest.mark.parametrize("door", DOORS)
def test_an_odd_configuration_is_one_message(door: str, odd: str, folder: Path) -> None:
    edited(folder, "config.json", **ODD_CONFIGURATIONS[odd])
    with pytest.raises(ValueError, match="model") as refused:
        DOORS[door](folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("values", [{"hidden_act": "evil"}, {"vocab_size": -3}, {"pad_token_id": 999}])
@pytest.mark.parametrize("door", ["policy", "reward model", "embeddings"])
def test_a_configuration_that_no_model_can_have_is_one_message(
    door: str, values: dict[str, Any], folder: Path
) -> None:
    edited(folder, "config.json", **values)
    with pytest.raises(ValueError, match="cannot be opened"):
        DOORS[door](folder)


@pytest.mark.parametrize("door", WEIGHTS)
def test_damaged_weights_are_refused_before_any_library_reads_them(door: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: holds \d+ bytes .*copy or download"):
        WEIGHTS[door](folder)


@pytest.mark.parametrize("door", ["policy", "reward model", "embeddings"])
def test_weights_of_other_shapes_are_one_message(door: str, folder: Path) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if "q_proj" in name)
        weights[name] = weights[name][:3].contiguous()

    other_weights(folder, cut)
    with pytest.raises(ValueError, match=r"other shapes than its config\.json says"):
        DOORS[door](folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("door", ["policy", "reward model", "embeddings"])
def test_weights_without_a_number_are_refused(door: str, value: float, folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][7, 3] = value  # a token that a short trial does not meet

    other_weights(folder, spoil)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight have entries that are NaN or infinite"):
        DOORS[door](folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja", "merges.txt"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to a device"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind: str, name: str, folder: Path) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if kind == "link to nothing" else "/dev/zero")
    for opened in (*WEIGHTS.values(), load_tokenizer, transformer.load_tokenizer):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            opened(folder)


def test_a_link_takes_no_file_of_the_users_along(folder: Path, tmp_path: Path) -> None:
    """The tokenizer's files go into every checkpoint, and to other hosts."""
    secret = tmp_path / "netrc"
    secret.write_text("machine x password y")
    (folder / "merges.txt").symlink_to(secret)
    for opened in (*WEIGHTS.values(), load_tokenizer):
        with pytest.raises(ValueError, match=r"merges\.txt is a link out of the folder, to .*netrc"):
            opened(folder)


def test_links_of_the_hubs_cache_and_to_large_weights_are_fine(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "1"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert unsafe_weights(snapshot) is None
    (folder / "model.safetensors").rename(tmp_path / "large")
    (folder / "model.safetensors").symlink_to(tmp_path / "large")
    assert unsafe_weights(folder) is None


@pytest.mark.parametrize("door", WEIGHTS)
def test_an_adapter_is_not_taken_for_a_model(door: str, folder: Path) -> None:
    edited(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="evil/evil")
    with pytest.raises(ValueError, match=r"adapter of another model.*merge"):
        WEIGHTS[door](folder)


@pytest.mark.parametrize("token", ["a", "<eos>"])
def test_a_tokenizer_of_a_larger_model_is_refused(token: str, folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"][token] = 4711
    for added in tokenizer["added_tokens"]:
        added["id"] = 4711 if added["content"] == token else added["id"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"1 tokens beyond the model's vocabulary of 12 \('.*' is 4711\)"):
        load_tokenizer(folder)


def test_padding_beyond_the_vocabulary_is_fine(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.add_special_tokens({"pad_token": "<another>"})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id == 12


def test_end_tokens_are_numbers_of_tokens(folder: Path) -> None:
    edited(folder, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match=r"names '</s>' as an end token"):
        end_tokens(str(folder))
    edited(folder, "generation_config.json", eos_token_id=[2, 5, -1])
    assert end_tokens(str(folder)) == {2, 5}


@pytest.mark.parametrize("text", ['{"folder": "../.."}', '{"folder": ".."}', '{"folder": 3}', "[]", "{"])
def test_a_runs_pointer_leads_to_its_own_checkpoints(text: str, folder: Path, tmp_path: Path) -> None:
    pointer = tmp_path / "run" / "checkpoints" / "latest.json"
    pointer.parent.mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "policy")  # where ../.. would lead
    pointer.write_text(text)
    with pytest.raises(
        ValueError, match=r"--policy .*: its latest\.json cannot be read .*; name a checkpoint"
    ):
        policy_folder(tmp_path / "run")
    shutil.copytree(folder, pointer.parent / "step_000001" / "policy")
    pointer.write_text('{"folder": "step_000001"}')
    assert policy_folder(tmp_path / "run") == pointer.parent / "step_000001" / "policy"


# --- Chat templates --------------------------------------------------------------------------------------

TEMPLATES = {
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch TRAP') }}",
    "a file": "{% include '/etc/passwd' %}",
    "zero": "{{ 1 / 0 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "memory": "{{ 'a' * 1000000000000000 }}",
    "length": "{{ 'a' * 11000000 }}",
    "a codec": "{{ 'a'.encode('evil') }}",
    "half a pair": "{{ '\\ud800' }}",
    "nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_hostile_template_costs_its_rows_and_nothing_else(
    template: str, folder: Path, tmp_path: Path
) -> None:
    trap = tmp_path / "it-ran"
    (folder / "chat_template.jinja").write_text(TEMPLATES[template].replace("TRAP", str(trap)))
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, DataSettings(train="x"), 16)
    with pytest.raises(BadRow) as bad:
        encoder.prompt({"prompt": [{"role": "user", "content": "abc"}]})
    assert bad.value.reason == "chat template refused"
    text = TextFormat(max_length=16, apply_chat_template="auto")
    with pytest.raises(EncodingError, match="chat template refused"):
        RewardEncoder(tokenizer, text).encode("abc", "x", True)
    assert not trap.exists()


def test_a_template_without_end_ends_the_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loop)
    monkeypatch.setattr(foreign, "_RENDER_S", 0.1)
    encoder = Encoder(load_tokenizer(folder), DataSettings(train="x"), 16)
    with pytest.raises(ValueError, match=r"chat template did not end within 0\.1 s") as refused:
        encoder.prompt({"prompt": "abc"})
    assert not isinstance(refused.value, BadRow)
