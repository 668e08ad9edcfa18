"""Which alerts go out, by a clock that the test turns."""

from pathlib import Path

import pytest
from monitor_helpers import settings

from cluster.alerts import Alerts
from cluster.monitor import Monitor
from cluster.monitor_settings import AlertKind, MonitorSettings


class Heard:
    """Alerts with a clock in hand, and what came of them."""

    def __init__(self, chosen: MonitorSettings) -> None:
        self.time = 0.0
        self.events: list[str] = []
        self.sent: list[tuple[AlertKind, str, str]] = []
        self.alerts = Alerts(
            "run-1",
            chosen,
            self.events.append,
            lambda kind, title, text: self.sent.append((kind, title, text)),
            lambda: self.time,
        )


def test_one_of_a_kind_goes_out_in_the_set_time_and_the_next_says_how_many_were_held_back() -> None:
    heard = Heard(settings(alert_every_s=600))
    for heard.time in (0.0, 10.0, 599.0, 600.0):
        heard.alerts.raise_alert("restart", f"rollout-0 is replaced at {heard.time:g}")
    heard.alerts.raise_alert("failure", "out of memory")
    assert heard.sent == [
        ("restart", "started again: run-1", "rollout-0 is replaced at 0"),
        (
            "restart",
            "started again: run-1",
            "rollout-0 is replaced at 600 (and 2 more of this kind since the last alert)",
        ),
        ("failure", "failed: run-1", "out of memory"),
    ]
    assert len(heard.events) == 5  # each of them is in events.log


def test_kinds_that_are_switched_off_are_events_only() -> None:
    heard = Heard(settings(alerts=["failure"]))
    heard.alerts.raise_alert("stop", "stopped by the user")
    heard.alerts.raise_alert("failure", "failed")
    assert [kind for kind, _, _ in heard.sent] == ["failure"]
    assert heard.events == ["stopped by the user", "failed"]


def test_reward_errors_are_told_past_their_share_and_again_only_when_there_are_more() -> None:
    heard = Heard(settings(alert_reward_errors=0.05, alert_every_s=600))
    heard.alerts.reward_errors(0, 0)
    heard.alerts.reward_errors(5, 100)  # 5 % is not past 5 %
    assert heard.events == []
    heard.alerts.reward_errors(6, 100)
    assert len(heard.events) == len(heard.sent) == 1
    assert "6 of 100 groups so far (6%)" in heard.sent[0][2]
    heard.time = 300.0
    heard.alerts.reward_errors(20, 100)  # too soon
    heard.time = 1000.0
    heard.alerts.reward_errors(6, 100)  # nothing new
    assert len(heard.events) == 1
    heard.alerts.reward_errors(21, 110)
    assert len(heard.events) == len(heard.sent) == 2


def test_a_share_of_0_tells_of_the_first_error() -> None:
    heard = Heard(settings(alert_reward_errors=0.0))
    heard.alerts.reward_errors(1, 4096)
    assert len(heard.sent) == 1


def test_a_discriminator_that_has_won_is_told_of_once_after_steps_in_a_row() -> None:
    heard = Heard(settings(alert_every_s=0))
    for accuracy in (0.96, 0.97, 0.98, 0.99, 0.95, 0.96, 0.97, 0.98, 0.99):  # 0.95 is not above it
        heard.alerts.discriminator_accuracy(accuracy)
    assert heard.sent == []
    for _ in range(20):
        heard.alerts.discriminator_accuracy(1.0)
    ((kind, title, text),) = heard.sent
    assert (kind, title) == ("discriminator", "discriminator out of balance: run-1")
    assert "discriminator/accuracy was above 0.95 for 5 steps in a row" in text
    assert "lower discriminator.updates" in text
    assert heard.events == [text]


def test_a_discriminator_that_guesses_is_told_of_by_itself() -> None:
    """Steps on either side count only in a row, and each of the two is told of by itself."""
    heard = Heard(settings(alert_every_s=0))
    for accuracy in (0.5, 0.52, 0.48, 0.51, 0.53, 0.97, 0.5, 0.49, 0.5, 0.47):
        heard.alerts.discriminator_accuracy(accuracy)
    assert heard.events == []
    for accuracy in [0.48, 0.5, 0.52, 0.5, 0.51, 0.5, *[0.97] * 6]:
        heard.alerts.discriminator_accuracy(accuracy)
    guesses, won = heard.events
    assert "guesses: discriminator/accuracy was 0.48 to 0.52" in guesses
    assert "else raise discriminator.updates" in guesses
    assert "has won" in won


def test_the_accuracy_comes_from_the_rows_of_steps(tmp_path: Path) -> None:
    with Monitor(tmp_path, settings(), {}, 10) as monitor:
        for step in range(1, 11):
            monitor.step({"learner_step": step, "discriminator/accuracy": 1.0})
            monitor.step({"learner_step": step, "heldout/reward": 0.5})  # an evaluation's, between them
    (said,) = [line for line in (tmp_path / "events.log").read_text().splitlines() if "has won" in line]
    assert "discriminator.label_smoothing" in said


def test_an_unknown_kind_of_alert_is_refused() -> None:
    with pytest.raises(ValueError, match="restart"):
        settings(alerts=["restarts"])
