"""The monitor's files, and what must never be written down."""

import json
import math
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from monitor_helpers import rows, settings

from cluster import redact as redaction
from cluster.monitor import Monitor, UnknownMetricError, read_rows, write_atomically
from cluster.redact import redact, scrub

CANARY_ENV = "canary-of-the-environment-42"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_API_KEY", CANARY_ENV)


# --- files ---------------------------------------------------------------------------------------------


def test_a_row_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 2, strict=True) as monitor:
        monitor.step({"learner_step": 1, "reward/mean": 0.5, "heldout/reward": None})
        assert rows(tmp_path / "metrics.jsonl") == [
            {
                "learner_step": 1,
                "reward/mean": 0.5,
                "heldout/reward": None,
                "monitor/nonfinite_values": 0,
                "monitor/unknown_metrics": 0,
                "monitor/wandb_errors": 0,
            }
        ]


def test_numbers_that_json_does_not_have_are_null_and_counted(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 2) as monitor:
        monitor.step(
            {"learner_step": 1, "reward/mean": math.nan, "kl/sequence": math.inf, "lag/max": np.int64(2)}
        )
        monitor.step({"learner_step": 2, "reward/mean": math.nan, "loss/policy": np.float32(0.5)})
    first, second = rows(tmp_path / "metrics.jsonl")
    assert (first["reward/mean"], first["kl/sequence"], first["lag/max"]) == (None, None, 2)
    assert (first["monitor/nonfinite_values"], second["monitor/nonfinite_values"]) == (2, 3)
    assert second["loss/policy"] == 0.5
    events = (tmp_path / "events.log").read_text()
    assert events.count("'reward/mean' is nan") == 1  # said once
    assert events.count("'kl/sequence' is inf") == 1


def test_an_unknown_metric_is_written_and_is_an_error_where_asked(tmp_path: Path) -> None:
    row = {"learner_step": 1, "no_such/metric": 1.0}
    with Monitor(tmp_path / "a", settings(), {}, 1) as monitor:
        monitor.step(row)
        monitor.step(row)
    assert [r["monitor/unknown_metrics"] for r in rows(tmp_path / "a" / "metrics.jsonl")] == [1, 1]
    assert (tmp_path / "a" / "events.log").read_text().count("no_such/metric") == 1
    with Monitor(tmp_path / "b", settings(), {}, 1, strict=True) as monitor:
        with pytest.raises(UnknownMetricError, match="no_such/metric"):
            monitor.step(row)
        assert rows(tmp_path / "b" / "metrics.jsonl")[0]["no_such/metric"] == 1.0


def test_a_row_needs_its_axis(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 1) as monitor:
        with pytest.raises(ValueError, match="learner_step"):
            monitor.step({"reward/mean": 1.0})
        with pytest.raises(ValueError, match="warmup/step"):
            monitor.warmup({"warmup/loss": 1.0})


def test_the_summary_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Monitor(tmp_path, settings(), {}, 1) as monitor:
        monitor.summary(
            {"status": "running", "kl_final": math.nan, "hub_token": "abc", "versions": {"a": (1, 2)}}
        )
        before = (tmp_path / "summary.json").read_text()
        assert json.loads(before) == {
            "status": "running",
            "kl_final": None,
            "hub_token": "[redacted]",
            "versions": {"a": [1, 2]},
        }

        def fail(_: int) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(tmp_path / "summary.json", "half")
        assert (tmp_path / "summary.json").read_text() == before
        assert not list(tmp_path.glob(".summary*"))


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 9) as monitor:
        for step in range(1, 6):
            monitor.step({"learner_step": step, "reward/mean": step / 10})
            monitor.samples(step, [{"prompt": "p", "completion": str(step), "reward": 1.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"learner_step": 6, "rew')  # killed here
    with Monitor(tmp_path, settings(), {}, 9, resume_from=3) as monitor:
        monitor.step({"learner_step": 4, "reward/mean": 0.9})
    found = [(row["learner_step"], row["reward/mean"]) for row in rows(tmp_path / "metrics.jsonl")]
    assert found == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]
    superseded = [row["learner_step"] for row in rows(tmp_path / "metrics.superseded.jsonl")]
    assert superseded == [4, 5]
    assert [row["completion"] for row in rows(tmp_path / "samples.jsonl")] == ["1", "2", "3"]


def test_decisions_and_times_go_to_files_of_their_own_and_are_rewound_with_the_rest(tmp_path: Path) -> None:
    decision = {
        "setting": "window",
        "old": 1,
        "new": 2,
        "reason": "the learner waited",
        "inputs": {"a": None},
    }
    with Monitor(tmp_path, settings(), {}, 9) as monitor:
        for step in (1, 2, 3):
            monitor.decision(step, decision, f"scheduler: window 1 → 2 at {step}")
            monitor.trace(
                [{"learner_step": step, "group": step}, {"learner_step": step, "train_from_s": 0.5}]
            )
    assert rows(tmp_path / "decisions.jsonl")[0] == {"learner_step": 1} | decision
    assert "scheduler: window 1 → 2 at 3" in (tmp_path / "events.log").read_text()
    with Monitor(tmp_path, settings(), {}, 9, resume_from=2):
        pass
    assert [row["learner_step"] for row in rows(tmp_path / "decisions.jsonl")] == [1, 2]
    assert [row["learner_step"] for row in rows(tmp_path / "rollouts.jsonl")] == [1, 1, 2, 2]
    assert [row["learner_step"] for row in rows(tmp_path / "decisions.superseded.jsonl")] == [3]


def test_lines_that_are_no_rows_are_left_out_when_read(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n[1]\n\xff\n{"a": 2}\n{"a"')
    assert list(read_rows(tmp_path / "m.jsonl")) == [{"a": 1}, {"a": 2}]
    assert list(read_rows(tmp_path / "none.jsonl")) == []


# --- secrets -------------------------------------------------------------------------------------------


def test_texts_under_telling_names_are_redacted_at_any_depth() -> None:
    assert redact(
        {
            "max_new_tokens": 64,
            "tokenizer": "kept",
            "API_KEY": "a",
            "password": "",
            "nested": [{"client_secret": "b", "name": "kept"}],
            "token": {"value": "c", "days": 3},
            "keys": ["d", "e"],
        }
    ) == {
        "max_new_tokens": 64,
        "tokenizer": "kept",
        "API_KEY": "[redacted]",
        "password": "",
        "nested": [{"client_secret": "[redacted]", "name": "kept"}],
        "token": {"value": "[redacted]", "days": 3},
        "keys": ["[redacted]", "[redacted]"],
    }


def test_values_of_secret_variables_are_scrubbed_from_texts() -> None:
    assert scrub(f"401 for key {CANARY_ENV}!") == "401 for key [redacted]!"


def test_variables_that_a_reward_needs_are_secrets_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "_named", set())
    monkeypatch.setenv("JUDGE", "canary-of-a-judge-44")
    assert scrub("canary-of-a-judge-44") == "canary-of-a-judge-44"
    with Monitor(tmp_path, settings(), {"scoring": {"reward_env": ["JUDGE"]}}, 1) as monitor:
        monitor.event("the judge refused canary-of-a-judge-44")
        monitor.samples(1, [{"prompt": "p", "completion": "I am canary-of-a-judge-44"}])
    assert "refused [redacted]" in (tmp_path / "events.log").read_text()
    assert rows(tmp_path / "samples.jsonl")[0]["completion"] == "I am [redacted]"


def test_what_is_started_inherits_no_secret_but_those_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_named", {"JUDGE"})
    secrets = (
        "WANDB_API_KEY",
        "GITHUB_PAT",
        "SSH_PASSPHRASE",
        "SENTRY_DSN",
        "DB_PASSWORD",
        "JUDGE",
        "MY_TOKEN",
    )
    for name in (*secrets, "TOKENIZERS_PARALLELISM", "PATH_TO_IT", "AUTHOR"):
        monkeypatch.setenv(name, "a-value")
    assert set(secrets) - set(redaction.secret_variables(["MY_TOKEN"])) == {"MY_TOKEN"}
    assert not {"TOKENIZERS_PARALLELISM", "PATH_TO_IT", "AUTHOR", "PATH"} & set(redaction.secret_variables())


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:pass-word@host/path", "https://me:[redacted]@host/path"),
        (
            "postgres://:s3cret@db:5432 and http://host:80/a@b",
            "postgres://:[redacted]@db:5432 and http://host:80/a@b",
        ),
        ("Authorization: Bearer abcdefgh.ijk-l", "Authorization: Bearer [redacted]"),
        ('{"authorization": "Basic YWJj"}', '{"authorization": "Basic [redacted]"}'),
        ("the bearer certificate", "the bearer certificate"),
    ],
)
def test_passwords_in_addresses_and_tokens_in_headers_are_scrubbed(text: str, clean: str) -> None:
    assert scrub(text) == clean


@pytest.mark.parametrize("spell", [repr, json.dumps, urllib.parse.quote_plus, lambda key: f"?k={key}&x"])
def test_a_secret_is_found_however_it_is_spelled(
    spell: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "ab+c/d='\\äz")
    shown = scrub(f"refused: {spell(os.environ['A_TOKEN'])}")
    assert "[redacted]" in shown
    assert "ab" not in shown


def test_of_two_secrets_one_within_the_other_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghijkl")
    assert scrub("abcdefghijkl") == "[redacted]"


def test_rows_have_the_load_of_hosts_that_are_watched(tmp_path: Path) -> None:
    load = {"host/h/cpu_fraction": 0.5}
    with Monitor(tmp_path, settings(), {}, 2) as monitor:
        monitor.step({"learner_step": 1.0})
        monitor.watched(lambda: load)
        monitor.step({"learner_step": 2.0})
    first, second = rows(tmp_path / "metrics.jsonl")
    assert "host/h/cpu_fraction" not in first
    assert second["host/h/cpu_fraction"] == 0.5


def test_an_alert_is_an_event_too(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(alert_reward_errors=0.1), {}, 1) as monitor:
        monitor.alert("restart", "rollout-0 is replaced")
        monitor.reward_errors(1, 10)
        monitor.reward_errors(2, 10)
    events = (tmp_path / "events.log").read_text()
    assert "rollout-0 is replaced" in events
    assert events.count("rewards fail: ") == 1
