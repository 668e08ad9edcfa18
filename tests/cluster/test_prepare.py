"""What is checked before any actor starts: other models, a scratch model's alphabet, held-out rows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.config_file import parse_config
from cluster.prepare import Prepared, prepare
from cluster.scratch import build_scratch_model
from learner.settings import ScratchSettings

JOB = """
[model]
max_length = 32
[data]
train = "{folder}/train.jsonl"
heldout = "{folder}/heldout.jsonl"
[warmup]
steps = 1
data = "{folder}/warmup.jsonl"
[[reward]]
kind = "exact"
[rollout]
max_new_tokens = 8
"""
SCRATCH = "[model.scratch]\nhidden_size = 64\nheads = 2\nlayers = 1\nmax_length = 32\n"
FILES: dict[str, list[Any]] = {
    "train": [{"prompt": "ab", "answer": "1"}, {"prompt": "abc", "answer": 2}],
    "heldout": [{"prompt": "xy", "answer": "z"}],
    "warmup": [{"prompt": "ab", "completion": "q"}, {"prompt": "xy", "completion": "z"}],
}


def prepared(
    tmp_path: Path, files: dict[str, list[Any]] = FILES, overrides: tuple[str, ...] = (), model: str = SCRATCH
) -> Prepared:
    for name, rows in (FILES | files).items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    return prepare(parse_config(JOB.format(folder=tmp_path) + model, overrides), run)


def scratch_folder(folder: Path, alphabet: str, max_length: int = 32) -> Path:
    shape = {"hidden_size": 64, "heads": 2, "layers": 1, "max_length": max_length}
    return build_scratch_model(ScratchSettings.model_validate(shape), alphabet, folder, seed=0)


def test_the_alphabet_is_of_all_sources_and_held_out_prompts_are_not_warmed_up_on(tmp_path: Path) -> None:
    ready = prepared(tmp_path)
    letters = set(ready.tokenizer.get_vocab()) - {"<pad>", "<bos>", "<eos>", "<unk>"}
    assert letters == set("abc12xyzq")
    assert [p.source for p in ready.prompts.heldout.prompts] == ["xy"]
    assert len(ready.demonstrations) == 1  # that of "ab"; the one of "xy" is put aside
    assert dict(ready.quarantine.counts) == {"in held-out set": 1}
    assert (ready.reference_path, ready.critic_path) == (None, None)


@pytest.mark.parametrize(
    ("source", "rows", "says"),
    [
        ("heldout", ["{", "["], r"data\.heldout = .*heldout\.jsonl.* no good row \(2 × not JSON\)"),
        ("warmup", [{"prompt": "ab"}], r"warmup\.data = .*no good row \(1 × missing column\)"),
        ("train", [{"prompt": "ab", "answer": ["1"]}], r"data\.train = .*no good row \(1 × bad answer\)"),
    ],
)
def test_a_source_of_bad_rows_only_is_named(tmp_path: Path, source: str, rows: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prepared(tmp_path, {source: rows})


def test_sources_without_any_text_are_refused_for_their_rows_not_for_the_alphabet(tmp_path: Path) -> None:
    empty: dict[str, list[Any]] = {name: [{"question": "x"}] for name in FILES}
    with pytest.raises(ValueError, match=r"data\.heldout = .*no good row \(1 × missing column\)"):
        prepared(tmp_path, empty)
    assert "'prompt' is not among 'question'" in (tmp_path / "run" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("source", ["data.heldout", "warmup.data"])
def test_a_source_that_is_not_there_is_named_by_its_own_setting(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=rf"{source} = '/none\.jsonl': no such file"):
        prepared(tmp_path, overrides=(f"{source}=/none.jsonl",))


@pytest.mark.parametrize("key", ["reference", "critic"])
def test_another_model_must_fit_the_policy(tmp_path: Path, key: str) -> None:
    own = scratch_folder(tmp_path / "own", "abcxyzq12")
    fits = scratch_folder(tmp_path / "fits", "abcxyzq34")
    wider = scratch_folder(tmp_path / "wider", "abcxyzq123")
    short = scratch_folder(tmp_path / "short", "abcxyzq12", max_length=16)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((own / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(own / "model.safetensors", bare)

    def start(folder: Path) -> Prepared:
        overrides = (f"model.path={own}", f"model.{key}={folder}", "ppo.value_model=critic")
        return prepared(tmp_path, overrides=overrides, model="")

    ready = start(fits)
    assert ready.model_path == own.resolve()
    assert {"reference": ready.reference_path, "critic": ready.critic_path}[key] == fits.resolve()
    # The four special tokens and 10 or 9 characters.
    for folder, says in (
        (wider, "vocabulary of 14 tokens, the policy one of 13"),
        (short, "reads 16 tokens at most, less than the run's 32"),
        (pickled, r"weights must be \*\.safetensors"),
        (bare, "no configuration that transformers knows"),
        (tmp_path / "absent", "is not a folder here"),
    ):
        with pytest.raises(ValueError, match=rf"model\.{key} = .*{folder.name}.*{says}"):
            start(folder)
