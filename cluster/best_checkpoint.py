"""The checkpoint with the best held-out reward: `checkpoints/best.json` points to it; it is never dropped.

{"step": 120, "folder": "step_000120", "reward": 0.41, "by": "held-out"}
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoint import step_folder

BEST = "best.json"
KEEP_ALL = 1_000_000_000  # for `checkpoint.commit`: what goes is decided by `prune`, which knows the best


def mark(checkpoints: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Point to the checkpoint of `step`, whole or not at all."""
    folder = step_folder(checkpoints, step)
    temporary = checkpoints / f".{BEST}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"step": step, "folder": folder.name, **facts}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(0o600)
    temporary.replace(checkpoints / BEST)


def unmark(checkpoints: Path) -> None:
    """Point to none; there need be no pointer, nor a folder for it."""
    (checkpoints / BEST).unlink(missing_ok=True)


def restore(checkpoints: Path, facts: Mapping[str, Any]) -> None:
    """Let the pointer be that of the checkpoint which a run goes on from: what came after it is done anew.

    `facts` are empty where nothing was the best yet.
    """
    if facts and step_folder(checkpoints, facts["step"]).is_dir():
        mark(checkpoints, facts["step"], facts)
    else:
        unmark(checkpoints)


def marked(checkpoints: Path) -> Path | None:
    """The folder that is pointed to; None where there is no pointer or its folder is gone."""
    try:
        folder = checkpoints / json.loads((checkpoints / BEST).read_text(encoding="utf-8"))["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None


def prune(checkpoints: Path, keep: int, *, written: Path) -> None:
    """Drop all checkpoints but the newest `keep`, the best, and the one that was just written."""
    spared = {marked(checkpoints), written}
    for old in sorted(checkpoints.glob("step_*"))[:-keep]:
        if old not in spared:
            shutil.rmtree(old)
