"""What a run's preferences are like, as a section of its report.html."""

import html
from collections.abc import Mapping
from typing import Any


def preferences_section(summary: Mapping[str, Any]) -> str:
    """Those trained on and held out, and each `[[evaluate]]` file's; nothing for a run without preferences.

    `summary` is that of summary.json; a run that was killed has none.
    """
    told = summary.get("preferences")
    if not told:
        return ""
    parts = [_said(told)]
    for name, other in (summary.get("preferences_elsewhere") or {}).items():
        parts.append(f"<h3>{html.escape(name)}</h3>{_said(other)}")
    return f"<section><h2>The preferences</h2>{''.join(parts)}</section>"


def _said(told: Mapping[str, list[str]]) -> str:
    """Doubts and warnings, and under them the figures in words."""
    marked = [f"In doubt: {doubt}" for doubt in told["doubts"]] + told["warnings"]
    above = "".join(f'<p class="error">{html.escape(text)}</p>' for text in marked)
    return above + "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in told["sentences"]) + "</ul>"
