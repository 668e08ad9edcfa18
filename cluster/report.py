"""report.html: a run on one page that needs nothing else, made at any time from the run folder."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from cluster.console import clock, number, percent
from cluster.figures import Picture, draw_all
from cluster.figures_overoptimisation import SERIES, curves, draw_overoptimisation
from cluster.monitor import write_atomically
from cluster.preferences.section import preferences_section
from cluster.report_data import RunData, load_run
from cluster.visible import visible

REPORT = "report.html"
_MOST_SAMPLES = 12
_MOST_CHARACTERS = 2000
# What an evaluation shows of over-optimisation: heading, the value's name in the metrics, how it reads.
_EVALUATION = (
    ("√KL", "overoptimisation/kl_sqrt", number),
    ("trained reward", "overoptimisation/proxy", number),
    ("held-out reward", "overoptimisation/heldout", number),
    ("gold reward", "overoptimisation/gold", number),
    ("gap", "overoptimisation/gap", number),
    ("disagreement", "overoptimisation/disagreement", number),
    ("length", "heldout/response_tokens", number),
    ("EOS rate", "heldout/finished_fraction", percent),
)


def write_report(run_dir: Path) -> Path:
    """Write the report of a finished, running or killed run; returns its path."""
    run = load_run(run_dir)
    path = run_dir / REPORT
    pictures = draw_all(run)
    write_atomically(path, page(run, [*pictures[:1], *draw_overoptimisation(run), *pictures[1:]]))
    return path


def page(run: RunData, pictures: Sequence[Picture]) -> str:
    """The whole document. Everything that comes from the run is escaped."""
    body = [
        f"<header><h1>{_text(run.name)}</h1>{_headline(run)}</header>",
        _cards(run),
        _what_was_run(run),
        preferences_section(run.summary),
        '<section class="pictures">',
        *(_figure(picture) for picture in pictures),
        "</section>",
        _win_rates(run),
        _over_optimisation(run),
        _samples(run),
        _quarantine(run),
        _details("All of summary.json", _table(_numbers(run.summary))) if run.summary else "",
        _details("Configuration", f"<pre>{_text(_toml(run.config))}</pre>") if run.config else "",
        "<footer>Written by headrace. What each figure means and what is healthy: docs/metrics.md.</footer>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # No script and nothing from elsewhere, whatever a model may have written.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>headrace · {_text(run.name)}</title><style>{_CSS}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n' + "\n".join(
        [*(part for part in body if part), "</main></body></html>\n"]
    )


def _headline(run: RunData) -> str:
    total = run.setting("run.steps")
    steps = f"{run.steps_done:,}" + (f" of {total:,}" if isinstance(total, int) else "") + " learner steps"
    status = run.summary.get("status")
    words = [steps]
    if status is None:
        words.append("no summary.json: the run is still going on, or was killed")
    else:
        words.append(f"status: {status}")
        if isinstance(wall := run.summary.get("wall_s"), int | float):
            words.append(f"{clock(wall)} on the clock")
    lead = f'<p class="lead">{_text(" · ".join(words))}</p>'
    error = run.summary.get("error")
    return lead + (f'<p class="error">{_text(error)}</p>' if error else "")


def _cards(run: RunData) -> str:
    s = run.summary
    cards: list[tuple[str, str, str]] = []
    if s.get("reward_initial") is not None and s.get("reward_final") is not None:
        ends = f"{number(s['reward_initial'])} → {number(s['reward_final'])}"
        cards.append(("held-out reward", ends, "before → after"))
    if (gain := _gain(s)) is not None:
        cards.append(("gain", *gain))
    if s.get("kl_final") is not None:
        cards.append(("KL to the reference", number(s["kl_final"]), "nats a sequence"))
    if s.get("lag_max") is not None:
        bound = s.get("lag_bound")
        cards.append(("largest lag", number(s["lag_max"]), "" if bound is None else f"bound {number(bound)}"))
    if s.get("tokens_trained") is not None:
        cards.append(
            ("tokens trained", number(s["tokens_trained"]), f"{number(s.get('tokens_generated'))} sampled")
        )
    if isinstance(best := s.get("best"), dict) and best.get("step") is not None:
        cards.append(("best evaluation", f"step {number(best['step'])}", f"by {best.get('by')}"))
    if s.get("stop_rule"):
        cards.append(("stopped by", str(s["stop_rule"]).replace("_", " "), "a rule of [stop]"))
    if s.get("sync_probe_max_abs_diff") is not None:
        seen = number(s["sync_probe_max_abs_diff"])
        cards.append(("weight sync proof", seen, f"nats apart at most; {run.tolerance:g} allowed"))
    items = "".join(
        f'<div class="card"><span>{_text(name)}</span><b>{_text(value)}</b><small>{_text(note)}</small></div>'
        for name, value, note in cards
    )
    return f'<section class="cards">{items}</section>' if items else ""


def _gain(summary: Mapping[str, Any]) -> tuple[str, str] | None:
    """The gain and its interval in words, from `reward_gain` and `reward_gain_ci95` ([low, high])."""
    gain, interval = summary.get("reward_gain"), summary.get("reward_gain_ci95")
    if not isinstance(gain, int | float):
        return None
    note = ""
    if (
        isinstance(interval, list)
        and len(interval) == 2
        and all(isinstance(x, int | float) for x in interval)
    ):
        note = f"95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    return f"{gain:+.3f}", note


_SHOWN_SETTINGS = (
    ("objective", "objective"),
    ("model", "model.path"),
    ("task", "task.kind"),
    ("data", "data.train"),
    ("samples a step", "run.batch_size"),
    ("samples a prompt", "rollout.group_size"),
    ("longest response", "rollout.max_new_tokens"),
    ("rollout actors", "rollout.actors"),
    ("window S", "scheduler.window"),
    ("learning rate", "optimizer.lr"),
    ("KL coefficient β", "ppo.kl_coef"),
    ("value model", "ppo.value_model"),
    ("learner ranks", "learner.ranks"),
    ("ZeRO stage", "learner.zero_stage"),
    ("precision", "learner.precision"),
    ("seed", "run.seed"),
)


def _what_was_run(run: RunData) -> str:
    shown = {label: run.setting(path) for label, path in _SHOWN_SETTINGS}
    rewards = run.setting("reward")
    if isinstance(rewards, list):
        shown["reward"] = ", ".join(
            f"{r.get('weight', 1.0):g} × {r.get('name') or r.get('kind')}"
            for r in rewards
            if isinstance(r, dict) and r.get("role") != "evaluate"
        )
        shown["held-out rewards"] = ", ".join(
            str(r.get("name") or r.get("kind"))
            for r in rewards
            if isinstance(r, dict) and r.get("role") == "evaluate"
        )
    known = {label: value for label, value in shown.items() if value not in (None, "")}
    if scratch := run.setting("model.scratch"):
        known["model"] = f"Llama from scratch, {scratch.get('layers')} layers of {scratch.get('hidden_size')}"
    if not known:
        return ""
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in known.items())
    return f'<section><h2>What was run</h2><dl class="settings">{items}</dl></section>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.svg).decode("ascii")
    return (
        f'<figure id="{picture.key}"><h2>{_text(picture.title)}</h2>'
        f'<img alt="{_text(picture.title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _over_optimisation(run: RunData) -> str:
    """What the rules said, Gao's curves in numbers, and every evaluation."""
    verdicts = [d for d in run.decisions if d.get("setting") == "stop"]
    said = "".join(
        f"<li><b>Step {_text(v.get('learner_step'))}: {_text(str(v.get('rule')).replace('_', ' '))} "
        f"{'stopped the run' if _stopped(run, v) else 'warned'}.</b> {_text(v.get('reason'))} "
        f"<i>What it cannot see: {_text(v.get('blind_spot'))}</i></li>"
        for v in verdicts
    )
    fits, evaluations = _fits(run), _evaluations(run)
    if not said and not fits and not evaluations:
        return ""
    table = (
        "<p>Gao's form R(d) = d(α − β log d), d = √KL, through the first evaluation, with 95 % intervals:</p>"
        '<div class="scroll"><table><thead><tr><th>reward</th><th>α</th><th>β</th><th>highest at KL</th>'
        f"<th>turned over</th></tr></thead><tbody>{fits}</tbody></table></div>"
        if fits
        else ""
    )
    said = f"<ul>{said}</ul>" if said else ""
    return f"<section><h2>Over-optimisation</h2>{said}{table}{evaluations}</section>"


def _evaluations(run: RunData) -> str:
    """A row for each evaluation of a run that tracks over-optimisation."""
    found = [row for row in run.metrics if row.get("overoptimisation/kl_sqrt") is not None]
    shown = [column for column in _EVALUATION if any(row.get(column[1]) is not None for row in found)]
    if not shown:
        return ""
    heads = "".join(f"<th>{_text(head)}</th>" for head in ("step", *(head for head, _, _ in shown)))
    rows = "".join(
        f"<tr><th>{_text(row.get('learner_step'))}</th>"
        + "".join(f"<td class=n>{_text(text(row.get(name)))}</td>" for _, name, text in shown)
        + "</tr>"
        for row in found
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return _details("Every evaluation", f'<div class="scroll">{table}</div>')


def _win_rates(run: RunData) -> str:
    """How often the trained policy beats the one before it, by each reward."""
    found = run.summary.get("win_rates") or {}
    rows = "".join(
        f"<tr><th>{_text(label)}</th><td>{_share(rate, 'raw')}</td>"
        f"<td>{_share(rate, 'length_controlled')}</td>"
        f"<td class=n>{number(rate.get('length_coefficient'))}</td></tr>"
        for label, rate in found.items()
    )
    if not rows:
        return ""
    return (
        "<section><h2>Wins over the policy before</h2><p>Share of held-out prompts with a higher reward "
        "after training, with 95 % intervals; controlled: as if responses were as long as before. φ: what "
        "length adds to the log-odds of a win, above 0 where longer responses win.</p>"
        '<div class="scroll"><table><thead><tr><th>judged by</th><th>wins</th><th>length controlled</th>'
        f"<th>φ</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _share(rate: Mapping[str, Any], name: str) -> str:
    if rate[name] is None:
        return "unidentified: length alone decides every prompt"
    low, high = rate[f"{name}_ci95"]
    return f"{rate[name]:.1%} ({low:.1%} to {high:.1%})"


def _stopped(run: RunData, verdict: Mapping[str, Any]) -> bool:
    """Whether it is the one that ended the run."""
    return (
        verdict.get("action") == "stop"
        and verdict.get("rule") == run.summary.get("stop_rule")
        and verdict.get("learner_step") == run.summary.get("steps", run.steps_done)
    )


def _fits(run: RunData) -> str:
    rows = ""
    found = curves(run)
    for name, _, label in SERIES:
        fit = found[name].fit() if name in found and len(found) > 1 else None
        if fit is None:
            continue
        peak = "none" if fit.peak is None else number(fit.peak**2)
        turned = "yes" if fit.turns_over(max(found[name].d) ** 2) else "not shown"
        cells = (
            label,
            f"{number(fit.alpha)} ({number(fit.alpha_low)} to {number(fit.alpha_high)})",
            f"{number(fit.beta)} ({number(fit.beta_low)} to {number(fit.beta_high)})",
            peak,
            turned,
        )
        rows += "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    return rows


def _samples(run: RunData) -> str:
    pairs = run.before_and_after()
    if not pairs:
        return ""
    rows = "".join(
        f"<tr><td>{_block(before.get('prompt'))}</td>"
        f"<td>{_block(before.get('completion'))}</td><td class=n>{_text(_reward(before))}</td>"
        f"<td>{_block(after.get('completion'))}</td><td class=n>{_text(_reward(after))}</td></tr>"
        for before, after in pairs[:_MOST_SAMPLES]
    )
    last = pairs[0][1].get("learner_step")
    return (
        "<section><h2>Samples, before and after</h2>"
        f"<p>The same held-out prompts, before training and after step {_text(last)}.</p>"
        '<div class="scroll"><table class="samples"><thead><tr><th>prompt</th><th>before</th><th>reward</th>'
        f"<th>after</th><th>reward</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _reward(row: Mapping[str, Any]) -> str:
    value = row.get("reward")
    return number(value) if isinstance(value, int | float) else "–"


def _quarantine(run: RunData) -> str:
    if not run.quarantined:
        return ""
    return (
        "<section><h2>Rows put aside</h2><p>These data rows were not used; quarantine.jsonl names their "
        f"lines.</p>{_table(run.quarantined)}</section>"
    )


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(key)}</th><td>{_text(_plain(v))}</td></tr>" for key, v in values.items())
    return f'<div class="scroll"><table class="pairs">{rows}</table></div>'


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary without what a picture or a section shows better."""
    elsewhere = ("length_histogram", "verdicts")
    return {key: value for key, value in summary.items() if key not in elsewhere}


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _toml(config: Mapping[str, Any]) -> str:
    return tomli_w.dumps(dict(config))


def _block(value: Any) -> str:
    text = str("" if value is None else value)
    cut = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
    return f"<pre>{_text(cut)}</pre>"


def _text(value: Any) -> str:
    return html.escape(visible(str(value)), quote=True)


_CSS = """
:root{color-scheme:light;--ink:#26323d;--soft:#5d6975;--line:#e1e6ea;--accent:#0072B2}
*{box-sizing:border-box}
body{margin:0;background:#f6f8f9;color:var(--ink);
  font:16px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{margin:0;font-size:1.9rem;overflow-wrap:anywhere}h2{margin:0 0 .5rem;font-size:1.1rem}
.lead{margin:.25rem 0 1.5rem;color:var(--soft)}
.error{margin:0 0 1.5rem;padding:.7rem 1rem;border-left:4px solid #D55E00;
  background:#fff;overflow-wrap:anywhere}
section{margin:0 0 1.75rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:.75rem}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;
  padding:.8rem 1rem;display:flex;flex-direction:column}
.card span{color:var(--soft);font-size:.85rem}
.card b{font-size:1.2rem;white-space:nowrap;font-variant-numeric:tabular-nums}
.card small{color:var(--soft)}
.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:.4rem 1.25rem;margin:0}
.settings dt{color:var(--soft);font-size:.8rem}.settings dd{margin:0;overflow-wrap:anywhere}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1rem}
figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:10px;padding:1rem}
figure img{display:block;width:100%;height:auto}figcaption{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;background:#fff;border:1px solid var(--line)}
.samples{width:100%}
th,td{text-align:left;vertical-align:top;padding:.4rem .7rem;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;font-size:.85rem}.pairs th{font-weight:500;color:var(--soft)}
.n{font-variant-numeric:tabular-nums;white-space:nowrap}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
  font:.875rem/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
details{margin:0 0 .75rem}summary{cursor:pointer;color:var(--accent);padding:.25rem 0}
footer{margin-top:2rem;color:var(--soft);font-size:.85rem}
"""
