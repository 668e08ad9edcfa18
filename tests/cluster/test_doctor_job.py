"""Doctor's checks of model folders, rewards, data and W&B, on real files; a hostile folder runs nothing."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from doctor_helpers import facts

from cluster.config import JobConfig
from cluster.config_file import parse_config
from cluster.doctor_job import input_checks, wandb_check
from cluster.doctor_model import model_checks, whole_policy
from cluster.doctor_needs import needs_of
from cluster.doctor_records import Check
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings
from rewards.models.weights import DamagedError, check_safetensors

SHAPE = {"hidden_size": 64, "heads": 2, "layers": 1, "max_length": 32}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    return build_scratch_model(ScratchSettings.model_validate(SHAPE), "abcxyz12", folder, seed=0)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(whole, tmp_path / "model")


def job(model: Path | str, folder: Path, extra: str = "", rows: list[str] | None = None) -> JobConfig:
    lines = rows or [json.dumps({"prompt": p, "answer": "1"}) for p in ("ab", "abc", "xy")]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return parse_config(
        f'[model]\npath = "{model}"\n[data]\ntrain = "{folder}/rows.jsonl"\n'
        f'[rollout]\nmax_new_tokens = 8\n{extra}\n[[reward]]\nkind = "exact"\n'
    )


def found(config: JobConfig) -> dict[str, Check]:
    checks = {one.name: one for one in model_checks(config)}
    assert all(one.host == "job" for one in checks.values())
    return checks


def test_a_whole_model(whole: Path, tmp_path: Path) -> None:
    checks = found(job(whole, tmp_path))
    assert {one.status for one in checks.values()} == {"ok"}
    # 12 tokens (4 special, 8 letters), width 64, inner 192: 2·12·64 + 4·64² + 3·64·192 + 2·64 + 64 = 54976.
    assert checks["model.path weights"].found == "54,976 parameters in 1 safetensors file(s)"
    assert checks["model.path configuration"].found == "llama, 32 tokens"
    assert checks["model.path tokenizer"].found == "12 tokens, without a chat template"


def test_weights_that_are_not_whole(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    check = found(job(folder, tmp_path))["model.path weights"]
    assert check.status == "fail"
    # 54976 float32 numbers are 219904 bytes.
    assert "holds 219894 bytes of tensors where its head says 219904" in check.found
    assert needs_of(job(folder, tmp_path), tmp_path).memory is None  # an unknown size, not a wrong one
    weights.write_bytes(data)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.safetensors"}}')
    assert "part-2.safetensors" in found(job(folder, tmp_path))["model.path weights"].found
    (folder / "model.safetensors.index.json").write_text("[]")
    assert found(job(folder, tmp_path))["model.path weights"].status == "fail"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 2) + b"{}" + b"surplus",
    ],
)
def test_damaged_safetensors_are_refused_in_words(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        check_safetensors(path)


def test_pickled_weights_are_refused_and_pickles_beside_weights_told_of(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    check = found(job(folder, tmp_path))["model.path pickles"]
    assert check.status == "warn"
    assert "pytorch_model.bin" in check.found
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors" in found(job(folder, tmp_path))["model.path weights"].found


def test_code_that_a_folder_brings_is_told_of_and_not_run(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "it-ran"
    for name in ("hostile.py", "configuration_hostile.py"):
        (folder / name).write_text(f"open({str(trap)!r}, 'w')\nclass A: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {"AutoConfig": "hostile.A", "AutoTokenizer": ["hostile.A", "hostile.A"]}
        (folder / name).write_text(json.dumps(values))
    checks = found(job(folder, tmp_path))
    assert checks["model.path code"].status == "warn"
    assert "config.json and tokenizer_config.json" in checks["model.path code"].found
    # An architecture that only the folder's own code knows cannot be used.
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "hostile"}
    (folder / "config.json").write_text(json.dumps(values))
    assert found(job(folder, tmp_path))["model.path configuration"].status == "fail"
    assert not trap.exists()


def test_a_configuration_beyond_its_weights_is_told_of_before_memory_is_full(
    folder: Path, tmp_path: Path
) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"num_labels": 10**9}
    (folder / "config.json").write_text(json.dumps(values))
    check = found(job(folder, tmp_path))["model.path configuration"]
    assert (check.status, "num_labels = 1000000000" in check.found) == ("fail", True)
    assert "save_pretrained" in check.remedy
    assert whole_policy(job(folder, tmp_path)) is None


@pytest.mark.parametrize(
    "values", [{"num_attention_heads": 0}, {"num_attention_heads": "two"}, {"model_type": ["llama"]}]
)
def test_an_odd_configuration_is_told_of_in_one_line(
    values: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | values))
    for name in ("configuration", "tokenizer"):
        check = found(job(folder, tmp_path))[f"model.path {name}"]
        assert check.status == "fail"
        assert "\n" not in check.found


def test_what_is_no_file_is_told_of_and_not_waited_for(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    checks = found(job(folder, tmp_path))
    assert "config.json is no file" in checks["model.path files"].found
    assert checks["model.path files"].remedy.startswith("copy the whole folder")
    assert "model.path tokenizer" not in checks
    assert needs_of(job(folder, tmp_path), tmp_path).memory is None


def test_a_tokenizer_of_another_model_is_told_of(folder: Path, tmp_path: Path) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"vocab_size": 5}))
    assert "beyond the model's vocabulary of 5" in found(job(folder, tmp_path))["model.path tokenizer"].found


def test_other_kinds_of_model(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert (
        "'vit' is no causal language model" in found(job(folder, tmp_path))["model.path configuration"].found
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert found(job(folder, tmp_path))["model.path tokenizer"].status == "fail"


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    assert found(job("/no/such/folder", tmp_path))["model.path"].status == "fail"
    check = found(job("nobody-here/no-model", tmp_path))["model.path"]
    assert check.status == "warn"
    assert "download" in check.found


# ---- rewards and data --------------------------------------------------------------------------------------


def inputs(config: JobConfig, *, model_ok: bool = True) -> dict[str, Check]:
    return {one.name: one for one in input_checks(config, model_ok=model_ok)}


def test_good_rows_and_rows_put_aside(whole: Path, tmp_path: Path) -> None:
    checks = inputs(job(whole, tmp_path))
    assert checks["rewards"].found == "can be used: exact (exact)"
    # Of three distinct prompts one is held out.
    assert checks["data"].found == "2 training and 1 held-out prompts, 0 demonstrations; none put aside"
    rows = [
        '{"prompt": "ab", "answer": "1"}',
        '{"prompt": "xy", "answer": "1"}',
        "{",
        '{"answer": "1"}',
        "[]",
        "{",
    ]
    check = inputs(job(whole, tmp_path, rows=rows))["data"]
    assert check.status == "warn"
    assert check.found.endswith("4 rows put aside: 2 × not JSON, 1 × missing column, 1 × not an object")


def test_data_that_cannot_be_read(whole: Path, tmp_path: Path) -> None:
    check = inputs(job(whole, tmp_path, rows=["{"]))["data"]
    assert (check.status, "no good row (1 × not JSON)" in check.found) == ("fail", True)
    assert "headrace-doctor" not in check.found  # the temporary folder is gone: not to be looked for
    gone = job(whole, tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    assert "no such file" in inputs(gone)["data"].found


def test_a_dataset_of_the_hub_is_not_fetched(whole: Path, tmp_path: Path) -> None:
    config = job(whole, tmp_path)
    assert config.data is not None
    hub = config.model_copy(update={"data": config.data.model_copy(update={"train": "nobody/nothing"})})
    assert inputs(hub)["data"].status == "warn"


def test_a_reward_function_that_cannot_be_used(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "grade.py").write_text("import no_such_module_1b2c\n")
    own = f'[[reward]]\nkind = "function"\nfunction = "{tmp_path}/grade.py:grade"\n'
    checks = inputs(job(whole, tmp_path, extra=own))
    assert checks["rewards"].status == "fail"
    assert "no_such_module_1b2c" in checks["rewards"].found
    assert checks["data"].status == "skipped"


def test_without_a_model_data_is_not_judged(whole: Path, tmp_path: Path) -> None:
    assert inputs(job(whole, tmp_path), model_ok=False)["data"].status == "skipped"


def test_a_task_and_a_model_from_scratch() -> None:
    shape = "\n".join(f"{name} = {value}" for name, value in SHAPE.items())
    config = parse_config(
        f'[model.scratch]\n{shape}\n[task]\nkind = "reversal"\n[rollout]\nmax_new_tokens = 12\n'
        '[[reward]]\nkind = "task"\n'
    )
    checks = inputs(config)
    assert {one.status for one in (*checks.values(), *model_checks(config))} == {"ok"}
    assert "256 training and 256 held-out" in checks["data"].found


def test_needs(whole: Path, tmp_path: Path) -> None:
    needs = needs_of(job(whole, tmp_path), tmp_path / "run")
    assert needs.memory is not None
    # Weights, gradients and Adam: 16 bytes for each of 54976 parameters.
    assert needs.memory.learner == pytest.approx(54976 * 16 / 2**30)
    assert needs.processes == 4  # learner, rollout, scoring, driver
    assert needs.checkpoint == pytest.approx(54976 * 16 / 2**30)  # weights twice, two moments
    assert needs.checkpoints == 3
    assert needs.inputs == (str(whole),)
    assert needs.folders[0] == str(tmp_path / "run")


# ---- W&B ---------------------------------------------------------------------------------------------------


def test_wandb_tells_mode_and_presence_and_never_the_key(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))

    def check(mode: str, permissions: int | None = None) -> Check:
        config = job(whole, tmp_path, extra=f'[monitor]\nwandb = "{mode}"')
        return wandb_check(config, facts(netrc_permissions=permissions))

    assert "offline" in check("auto").found
    assert check("disabled").found.startswith("disabled")
    assert check("online").status == "warn"
    assert "no key was found" in check("online").found
    monkeypatch.setenv("WANDB_API_KEY", "canary-" + "5" * 40)
    for mode in ("auto", "online"):
        assert check(mode).status == "ok"
        assert "from the environment" in check(mode).found
        assert "canary" not in str(check(mode))
    monkeypatch.delenv("WANDB_API_KEY")
    netrc.write_text("machine api.wandb.ai\n  login user\n  password canary-123\n")
    assert (check("auto", 0o600).status, check("auto", 0o644).status) == ("ok", "warn")
    assert "canary" not in str(check("auto", 0o644))
