"""report.html of a reward model: the page of every run, with pictures and a table of its own."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.console import number
from cluster.monitor import write_atomically
from cluster.report import REPORT, page
from cluster.report_data import load_run
from cluster.reward_job.evaluation import read_evaluation
from cluster.reward_job.figures import draw_reward_model

_PICTURES_BEGIN = '<section class="pictures">'


def write_reward_report(run_dir: Path) -> Path:
    """Write the report of a finished, running or killed run; returns its path."""
    run = load_run(run_dir)
    evaluation = read_evaluation(run_dir / "reward_model")
    text = page(run, draw_reward_model(run, evaluation))
    section = _section(run.summary, evaluation)
    text = text.replace(_PICTURES_BEGIN, section + _PICTURES_BEGIN, 1)
    path = run_dir / REPORT
    write_atomically(path, text)
    return path


def _section(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """A table with a row for each set of pairs."""
    rows = "".join(_row(name, found) for name, found in evaluation.items() if name != "train")
    parts = []
    if rows:
        head = "".join(
            f"<th>{name}</th>"
            for name in (
                "pairs",
                "accuracy",
                "drop",
                "calibration error",
                "score and length",
                "the same, within prompts",
                "gold, within prompts",
            )
        )
        parts.append(
            f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    if version := summary.get("reward_model_version"):
        parts.append(f"<p>Version {html.escape(str(version)[:16])}.</p>")
    return f"<section><h2>How good it is</h2>{''.join(parts)}</section>" if parts else ""


def _row(name: str, found: Mapping[str, Any]) -> str:
    length = found.get("length") or {}
    calibration = found.get("calibration") or {}
    gold = found.get("gold") or {}
    cells = (
        number(found.get("pairs")),
        _estimate(found.get("accuracy")),
        _estimate(found.get("accuracy_drop")) + (" (detected)" if found.get("drop_detected") else ""),
        f"{number(calibration.get('ece'))} (by chance up to {number(calibration.get('ece_by_chance'))})",
        _estimate(length.get("pearson")),
        _estimate(length.get("pearson_within")),
        _estimate(gold.get("spearman_within")),
    )
    shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    title = "held out" if name == "heldout" else name
    return f"<tr><th>{html.escape(title)}</th>{shown}</tr>"


def _estimate(found: Any) -> str:
    """For example `0.741 (0.702 to 0.777)`; too few rows may tell a value without an interval, or nothing."""
    if not isinstance(found, Mapping) or found["value"] is None:
        return "–"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.3f} (interval unknown)"
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
