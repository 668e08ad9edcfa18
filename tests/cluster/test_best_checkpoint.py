"""The best checkpoint is pointed to and stays, whatever else goes."""

import json
from pathlib import Path

from cluster import best_checkpoint, checkpoint


def write(checkpoints: Path, step: int) -> Path:
    folder = checkpoint.begin(checkpoints, step)
    (folder / "weights").write_bytes(b"x" * step)
    return checkpoint.commit(checkpoints, step, {"step": step}, keep=best_checkpoint.KEEP_ALL)


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("step_*"))


def test_the_best_stays_until_another_one_is(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        written = write(tmp_path, step)
        if step == 1:
            best_checkpoint.mark(tmp_path, 1, {"reward": 0.5})
        best_checkpoint.prune(tmp_path, 2, written=written)
    assert names(tmp_path) == ["step_000001", "step_000003", "step_000004"]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 1,
        "folder": "step_000001",
        "reward": 0.5,
    }
    assert (tmp_path / "best.json").stat().st_mode & 0o777 == 0o600
    best_checkpoint.mark(tmp_path, 4, {"reward": 0.6})
    best_checkpoint.prune(tmp_path, 1, written=tmp_path / "step_000004")
    assert names(tmp_path) == ["step_000004"]
    assert best_checkpoint.marked(tmp_path) == tmp_path / "step_000004"


def test_what_was_just_written_stays_among_newer_ones(tmp_path: Path) -> None:
    for step in (5, 8):
        write(tmp_path, step)
    best_checkpoint.prune(tmp_path, 1, written=write(tmp_path, 6))  # after a resume from step 5
    assert names(tmp_path) == ["step_000006", "step_000008"]


def test_no_pointer_and_one_to_nowhere(tmp_path: Path) -> None:
    assert best_checkpoint.marked(tmp_path) is None
    best_checkpoint.mark(tmp_path, 3, {})
    assert best_checkpoint.marked(tmp_path) is None
    best_checkpoint.unmark(tmp_path)
    best_checkpoint.unmark(tmp_path)
    assert not (tmp_path / "best.json").exists()


def test_a_resume_points_to_what_its_checkpoint_knew(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step)
    best_checkpoint.mark(tmp_path, 4, {"reward": 0.9})
    best_checkpoint.restore(tmp_path, {"step": 2, "reward": 0.5})  # the run goes on from step 2 or 3
    assert best_checkpoint.marked(tmp_path) == tmp_path / "step_000002"
    best_checkpoint.restore(tmp_path, {"step": 3, "reward": 0.7})  # whose checkpoint is gone
    assert not (tmp_path / "best.json").exists()
    best_checkpoint.restore(tmp_path / "new", {})
