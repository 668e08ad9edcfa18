"""The report: every picture where there is data, nothing raw from a model, and any state of a run folder."""

import base64
import html
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cluster.drawing import moving_mean
from cluster.figures import draw_all
from cluster.report import write_report
from cluster.report_data import load_run

EVIL = "<script>alert('pwned')</script><img src=x onerror=alert(1)>"
ALL = ["reward", "kl", "length", "entropy", "lag", "timing", "waits", "proof", "mismatch", "warmup"]
CONFIG = """
objective = "ppo"
[run]
steps = 60
batch_size = 256
seed = 3
[model.scratch]
hidden_size = 128
layers = 4
[task]
kind = "reversal"
hub_token = "hf-canary-0123456789"
[[reward]]
kind = "task"
weight = 1.0
[rollout]
max_new_tokens = 12
[scheduler]
window = 2
[learner]
precision = "float32"
"""
SUMMARY: dict[str, Any] = {
    "status": "completed",
    "objective": "ppo",
    "steps": 60,
    "wall_s": 143.2,
    "reward_initial": 0.642,
    "reward_final": 0.913,
    "reward_gain": 0.271,
    "reward_gain_ci95": [0.239, 0.303],
    "kl_final": 2.91,
    "tokens_generated": 141_002,
    "tokens_trained": 138_240,
    "lag_bound": 2,
    "lag_max": 2,
    "sync_probe_max_abs_diff": 3.1e-6,
}


def make_run(folder: Path, steps: int = 60) -> Path:
    """A finished run's folder, as the demo would leave it."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    losses = [0.4 + 2.8 * math.exp(-n / 30) + draw.gauss(0, 0.04) for n in range(1, 151)]
    warmup = [{"warmup/step": n, "warmup/loss": loss} for n, loss in enumerate(losses, start=1)]
    write(folder / "warmup.jsonl", warmup)
    rows: list[dict[str, Any]] = [{"learner_step": 0, "heldout/reward": 0.642, "heldout/reward_ci95": 0.03}]
    for n in range(1, steps + 1):
        grown = 1 - math.exp(-n / 18)
        rows.append(
            {
                "learner_step": n,
                "reward/mean": 0.64 + 0.27 * grown + draw.gauss(0, 0.02),
                "kl/sequence": 3.0 * grown + draw.gauss(0, 0.1),
                "length/mean": 9 + draw.gauss(0, 0.1) - 0.4 * grown,
                "policy/entropy": 0.55 - 0.3 * grown + draw.gauss(0, 0.01),
                "lag/mean": 0.2 if n == 1 else 1.1 + draw.gauss(0, 0.2),
                "lag/max": min(n - 1, 2),
                "scheduler/window": 2,
                "timing_s/step": 2.1 + draw.random() * 0.3 + (3 if n == 1 else 0),
                "timing_s/sync": 0.12 + draw.random() * 0.02,
                "wait/learner_s": 0.5 + draw.random() * 0.3 + (3 if n == 1 else 0),
                "perf/rollout_wait_fraction": 0.3 + draw.random() * 0.1,
                "sync/probe_max_abs_diff": 10 ** draw.uniform(-6.5, -5.5),
                "mismatch/ess": 0.97 - 0.05 * draw.random(),
            }
        )
        if n % 20 == 0:
            rows.append(
                {"learner_step": n, "heldout/reward": 0.64 + 0.27 * grown, "heldout/reward_ci95": 0.025}
            )
    write(folder / "metrics.jsonl", rows)
    samples = [
        {"learner_step": step, "prompt_id": f"heldout:{n}", "prompt": f"reverse: abc{n}", "completion": text,
         "reward": reward}
        for step, text, reward in ((0, f"cb{EVIL}", 0.31), (20, "cba", 0.6), (60, f"{EVIL}cba", 0.97))
        for n in range(4)
    ]  # fmt: skip
    write(folder / "samples.jsonl", samples)
    write(
        folder / "quarantine.jsonl", [{"line": 7, "reason": "not JSON"}, {"line": 9, "reason": "over-long"}]
    )
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo<&>")


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return write_report(finished).read_text()


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pictures_in(page: str) -> list[str]:
    return re.findall(r'<figure id="(\w+)">', page)


def test_a_finished_run_has_every_picture_and_its_figures(page: str) -> None:
    assert pictures_in(page) == ALL
    for words in ("0.642 → 0.913", "+0.271", "95 % interval +0.239 to +0.303", "60 of 60 learner steps",
                  "status: completed", "2:23 on the clock", "bound 2", "138,240",
                  "Llama from scratch, 4 layers of 128", "1 × task", "over-long"):  # fmt: skip
        assert words in page, words
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == len(ALL)
    for image in images:
        root = ElementTree.fromstring(base64.b64decode(image))
        assert root.tag.endswith("svg")


def test_the_page_needs_nothing_else_and_runs_no_script(page: str) -> None:
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page.lower()
    assert "default-src 'none'" in page


def test_what_a_model_wrote_is_escaped(page: str) -> None:
    assert EVIL not in page
    assert "<img src=x" not in page
    assert page.count(html.escape(EVIL)) == 8  # 4 prompts, before and after
    assert "demo&lt;&amp;&gt;" in page


def test_samples_pair_the_first_and_last_step(finished: Path) -> None:
    pairs = load_run(finished).before_and_after()
    assert [(before["learner_step"], after["learner_step"]) for before, after in pairs] == [(0, 60)] * 4
    assert all(before["prompt_id"] == after["prompt_id"] for before, after in pairs)


def test_secrets_of_the_configuration_stay_out(page: str) -> None:
    assert "hf-canary" not in page
    assert "[redacted]" in page


@pytest.mark.parametrize(
    "missing", ["summary.json", "config.toml", "metrics.jsonl", "samples.jsonl", "warmup.jsonl"]
)
def test_any_file_may_be_missing(missing: str, run: Path) -> None:
    (run / missing).unlink()
    page = write_report(run).read_text()
    expected = {"metrics.jsonl": ["reward", "warmup"], "warmup.jsonl": ALL[:-1]}.get(missing, ALL)
    assert pictures_in(page) == expected  # without metrics, the summary still has the held-out ends
    if missing == "summary.json":
        assert "still going on, or was killed" in page


def test_a_run_killed_in_mid_line_has_a_report(run: Path) -> None:
    (run / "summary.json").unlink()
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:11]) + lines[11][:40])  # rows of steps 0 to 10, and part of 11
    page = write_report(run).read_text()
    assert "10 of 60 learner steps" in page
    assert pictures_in(page) == ALL


def test_a_run_killed_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(b'{"learner_st')
    page = write_report(run).read_text()
    assert pictures_in(page) == []
    assert "0 learner steps" in page


def test_the_cause_of_a_failure_is_shown(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"status": "failed", "error": "RuntimeError: <b>gone</b>"}))
    page = write_report(run).read_text()
    assert "status: failed" in page
    assert "RuntimeError: &lt;b&gt;gone&lt;/b&gt;" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run folder: it has none of metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no run folder at"):
        write_report(tmp_path / "none")


def test_nulls_and_long_runs_are_drawn(run: Path) -> None:
    rows = [
        {
            "learner_step": n,
            "reward/mean": None if n % 7 == 0 else math.sin(n / 100),
            "lag/max": 3 if n == 1234 else 1,
        }
        for n in range(3000)
    ]
    write(run / "metrics.jsonl", rows)
    pictures = {picture.key: picture.svg for picture in draw_all(load_run(run))}
    assert {"reward", "lag"} <= pictures.keys()
    assert len(pictures["reward"]) < 200_000


def test_pass_at_k_is_drawn_where_two_evaluations_have_it(run: Path) -> None:
    assert "pass_at" not in {picture.key for picture in draw_all(load_run(run))}
    write(
        run / "metrics.jsonl",
        [
            {"learner_step": step, "heldout/reward": 0.1 * step}
            | {f"heldout/pass_at/{k}": min(1.0, 0.1 * k + 0.05 * step) for k in (1, 2, 4)}
            | {f"heldout/pass_at/{k}_ci95": 0.02 for k in (1, 2)}
            for step in (0, 5, 10)
        ]
        + [{"learner_step": 11, "heldout/pass_at/8": 0.9}],
    )
    data = load_run(run)
    assert data.passes() == [1, 2, 4]  # of k = 8 there is one point, which is no line
    assert "pass_at" in {picture.key for picture in draw_all(data)}


def test_the_scheduler_is_drawn(run: Path) -> None:
    causes = ("window", "ahead", "deadline", "sampling", "sync")
    rows = [
        {
            "learner_step": n,
            "timing_s/step": 1.0,
            "lag/max": min(n, 3),
            "lag/mean": 1.0,
            "lag/in_flight_mean": 0.4,
            "lag/in_queue_mean": 0.6,
            "scheduler/window": 1 + (n > 10),
            "mismatch/kl_by_lag/0": 1e-6,
            "mismatch/kl_by_lag/1": 0.01,
            "mismatch/engine": 1e-6,
            "mismatch/drift": 0.01,
            **{f"wait/by_cause/{cause}": 0.1 * (cause == "window") for cause in causes},
        }
        for n in range(1, 30)
    ]
    write(run / "metrics.jsonl", rows)
    (run / "config.toml").write_text('[scheduler]\nwindow = "adaptive"\nmax_drift = 0.05\n')
    decision = {"learner_step": 10, "setting": "window", "old": 1, "new": 2}
    write(run / "decisions.jsonl", [decision, {"learner_step": 12, "setting": "ahead", "old": 8, "new": 6}])
    histogram = {"edges": [0, 5, 10], "sampled": [6, 2], "trained": [6, 1]}
    (run / "summary.json").write_text(json.dumps({"length_histogram": histogram}))
    pictures = {picture.key: picture.svg for picture in draw_all(load_run(run))}
    assert {"lengths", "lag_split", "decisions", "wait_causes", "drift"} <= pictures.keys()
    (run / "config.toml").write_text("[scheduler]\nwindow = 1\n")
    assert "decisions" not in {picture.key for picture in draw_all(load_run(run))}


def test_the_same_folder_gives_the_same_pictures(finished: Path) -> None:
    run = load_run(finished)
    assert [picture.svg for picture in draw_all(run)] == [picture.svg for picture in draw_all(run)]


def test_heldout_points_come_from_rows_or_else_from_the_summary(run: Path) -> None:
    heldout = load_run(run).heldout()
    assert heldout[0] == (0.0, 0.642, 0.03)
    assert [step for step, _, _ in heldout] == [0, 20, 40, 60]
    write(run / "metrics.jsonl", [{"learner_step": 5, "reward/mean": 0.5}])
    assert load_run(run).heldout() == [(0.0, 0.642, 0.0), (5.0, 0.913, 0.0)]


def test_the_tolerance_is_the_set_one_or_the_precision_s(run: Path) -> None:
    assert load_run(run).tolerance == 0.01
    (run / "config.toml").write_text('[learner]\nprecision = "bfloat16"\n')
    assert load_run(run).tolerance == 0.25
    (run / "config.toml").write_text("[sync]\ntolerance = 0.5\n")
    assert load_run(run).tolerance == 0.5


def test_moving_mean() -> None:
    # Ends have one neighbour: (0+3)/2, (0+3+6)/3, (3+6)/2.
    assert moving_mean([0.0, 3.0, 6.0], 1) == [1.5, 3.0, 4.5]


def over_optimised(run: Path) -> None:
    """Give a run's folder the evaluations of a policy that games its reward: gold has α = 2.5, β = 1.25."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for n in range(9):
        d = n / 2
        gold = 0.5 + (d * (2.5 - 1.25 * math.log(d)) if d else 0)
        metrics.append(
            {
                "learner_step": 100 + n,
                "heldout/kl_sequence": d * d,
                "overoptimisation/kl_sqrt": d,
                "overoptimisation/proxy": 2 * d,
                "overoptimisation/heldout": d * (2 - 0.5 * d),
                "overoptimisation/heldout_ci95": 0.1,
                "overoptimisation/gold": gold,
                "overoptimisation/gold_ci95": 0.2,
                "overoptimisation/gap": 0.2 * d,
                "overoptimisation/disagreement": 0.2 + 0.05 * d,
                "heldout/response_tokens": 10.0 + n,
                "heldout/finished_fraction": 1 - n / 100,
            }
        )
    write(run / "metrics.jsonl", metrics)
    decision = {"learner_step": 108, "setting": "stop", "rule": "heldout_decline", "action": "stop",
                "reason": f"it fell {EVIL}", "blind_spot": "a shared bias"}  # fmt: skip
    write(run / "decisions.jsonl", [decision])
    with (run / "config.toml").open("a") as config:
        config.write("[stop]\ngap_limit = 1.0\ndisagreement_limit = 2.0\n")
    best = {"step": 104, "by": "held-out reward", "reward": 2.0}
    summary = SUMMARY | {"best": best, "stop_rule": "heldout_decline", "steps": 108}
    (run / "summary.json").write_text(json.dumps(summary))


def test_over_optimisation_has_its_pictures_and_its_words(run: Path) -> None:
    over_optimised(run)
    page = write_report(run).read_text()
    assert pictures_in(page)[:3] == ["reward", "overoptimisation", "overoptimisation_rules"]
    assert "heldout decline stopped the run" in page
    assert "What it cannot see: a shared bias" in page
    assert EVIL not in page
    assert "step 104" in page
    # The gold points lie on Gao's curve, so the fit finds α and β; highest at KL = (e^(α/β − 1))² = e².
    assert "<td>2.50 (2.50 to 2.50)</td><td>1.25 (1.25 to 1.25)</td><td>7.39</td>" in page
    evaluations = page.split("Every evaluation")[1].split("</table>")[0]
    for head in ("√KL", "trained reward", "held-out reward", "gold reward", "gap", "length", "EOS rate"):
        assert f"<th>{head}</th>" in evaluations
    assert evaluations.count("<tr>") == 1 + 9
    assert "<td class=n>18.0</td><td class=n>92 %</td></tr></tbody>" in evaluations  # of the last
    turned = page.split("<td>gold reward</td>")[1].split("</tr>")[0]
    assert turned.endswith("<td>yes</td>")  # the peak, d = e, lies before the last evaluation's d = 4


def test_a_win_rate_that_length_alone_decides_is_said_to_be_unidentified(run: Path) -> None:
    rate = {"raw": 0.75, "raw_ci95": [0.7, 0.8], "length_coefficient": 1.5, "identified": True}
    told = rate | {"length_controlled": 0.6, "length_controlled_ci95": [0.5, 0.7]}
    untold = rate | {"length_controlled": None, "length_controlled_ci95": None, "identified": False}
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"win_rates": {"gold": told, "judge": untold}}))
    page = write_report(run).read_text()
    gold, judge = (page.split(f"<tr><th>{label}</th>")[1].split("</tr>")[0] for label in ("gold", "judge"))
    assert gold == "<td>75.0% (70.0% to 80.0%)</td><td>60.0% (50.0% to 70.0%)</td><td class=n>1.50</td>"
    assert "<td>unidentified: length alone decides every prompt</td>" in judge
