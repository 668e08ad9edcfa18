"""A checkpoint is whole and verified, or it does not count."""

import json
from pathlib import Path

import pytest

from cluster import checkpoint


def write(checkpoints: Path, step: int, keep: int = 2) -> Path:
    folder = checkpoint.begin(checkpoints, step)
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_bytes(bytes(range(256)) * step)
    return checkpoint.commit(checkpoints, step, {"step": step}, keep=keep)


def test_newest_is_found_with_its_state_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert checkpoint.latest(tmp_path) == (tmp_path / "step_000003", [])
    assert checkpoint.read_state(tmp_path / "step_000003") == {"step": 3}
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000002", "step_000003"]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"step": 3, "folder": "step_000003"}


def test_an_unfinished_write_is_invisible(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (checkpoint.begin(tmp_path, 2) / "half").write_text("...")
    assert checkpoint.latest(tmp_path)[0].name == "step_000001"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    weights = write(tmp_path, 2) / "policy" / "weights"
    content = weights.read_bytes()
    match damage:
        case "flip":
            weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "truncate":
            weights.write_bytes(content[:-1])
        case "remove":
            weights.unlink()
        case "add":
            (weights.parent / "extra.bin").write_bytes(b"x")
        case "manifest":
            (tmp_path / "step_000002" / "manifest.json").write_text("{")
    folder, problems = checkpoint.latest(tmp_path)
    assert folder.name == "step_000001"
    assert len(problems) == 1
    assert problems[0].startswith("step_000002: ")


def test_nothing_to_resume_from_says_why(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="there is none"):
        checkpoint.latest(tmp_path)
    (write(tmp_path, 1) / "policy" / "weights").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="policy/weights is missing"):
        checkpoint.latest(tmp_path)


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert checkpoint.latest(tmp_path)[0].name == "step_000001"
