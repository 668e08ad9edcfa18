"""Alerts: what somebody who is not looking should hear of. Pure bookkeeping; the monitor sends them."""

import time
from collections import Counter
from collections.abc import Callable
from typing import get_args

from cluster.monitor_settings import AlertKind, MonitorSettings

_WORDS: dict[AlertKind, str] = {
    "restart": "started again",
    "sync": "weight sync refused",
    "stop": "stopped",
    "failure": "failed",
    "reward": "reward errors",
    "overoptimisation": "reward over-optimised",
    "discriminator": "discriminator out of balance",
}
SERIOUS: frozenset[AlertKind] = frozenset({"sync", "failure"})
assert _WORDS.keys() == set(get_args(AlertKind))

WON = 0.95
"""A discriminator that is right more often than this tells policy and demonstrations apart for good."""
GUESS = (0.48, 0.52)
"""One whose accuracy is in here guesses."""
ACCURACY_STEPS = 5
"""So many steps in a row are worth an alert: one or two may be chance."""
_IMBALANCES = {
    "won": f"the discriminator has won: discriminator/accuracy was above {WON:g} for {ACCURACY_STEPS} steps "
    "in a row; it scores all responses alike, and the policy learns nothing: lower discriminator.updates or "
    "discriminator.lr, or set discriminator.label_smoothing or discriminator.gradient_penalty",
    "guesses": f"the discriminator guesses: discriminator/accuracy was {GUESS[0]:g} to {GUESS[1]:g} for "
    f"{ACCURACY_STEPS} steps in a row; its reward is noise to the policy: stop here if a [[reward]] with "
    'role = "evaluate" says that the policy is good, else raise discriminator.updates or discriminator.lr, '
    "or lower optimizer.lr",
}

Send = Callable[[AlertKind, str, str], None]
"""Called with kind, title and text."""


class Alerts:
    """Decides which alerts go out: kinds that are switched on, and one of a kind in `alert_every_s`."""

    def __init__(
        self,
        name: str,
        settings: MonitorSettings,
        event: Callable[[str], None],
        send: Send,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`event` is for every alert, `send` for those that go out; `name` is the run's."""
        self._name, self._settings = name, settings
        self._event, self._send, self._now = event, send, now
        self._last: dict[AlertKind, float] = {}
        self._held: Counter[AlertKind] = Counter()
        self._errors_said = 0
        self._balance, self._steps_of_balance = "", 0
        self._balances_said: set[str] = set()

    def raise_alert(self, kind: AlertKind, text: str) -> None:
        """Say it, and send it unless its kind is switched off or was sent a short while ago."""
        self._event(text)
        if kind not in self._settings.alerts:
            return
        if not self._due(kind):
            self._held[kind] += 1
            return
        self._last[kind] = self._now()
        held = self._held.pop(kind, 0)
        more = f" (and {held} more of this kind since the last alert)" if held else ""
        self._send(kind, f"{_WORDS[kind]}: {self._name}", text + more)

    def reward_errors(self, failed: int, scored: int) -> None:
        """Tell of reward errors once their share of all scored groups is past `alert_reward_errors`.

        Both count from the start of the run. Said again only after more errors, and not before it is due.
        """
        limit = self._settings.alert_reward_errors
        if failed <= self._errors_said or failed <= limit * scored or not self._due("reward"):
            return
        self._errors_said = failed
        self.raise_alert(
            "reward",
            f"rewards fail: {failed} of {scored} groups so far ({failed / scored:.0%}) were left out, more "
            f"than monitor.alert_reward_errors = {limit:g}; the reasons are in events.log",
        )

    def discriminator_accuracy(self, accuracy: float) -> None:
        """Tell of one that has won, or guesses, for `ACCURACY_STEPS` steps in a row: once of each."""
        balance = "won" if accuracy > WON else "guesses" if GUESS[0] <= accuracy <= GUESS[1] else ""
        self._steps_of_balance = self._steps_of_balance + 1 if balance == self._balance else 1
        self._balance = balance
        if not balance or self._steps_of_balance < ACCURACY_STEPS or balance in self._balances_said:
            return
        self._balances_said.add(balance)
        self.raise_alert("discriminator", f"warning: {_IMBALANCES[balance]}")

    def _due(self, kind: AlertKind) -> bool:
        last = self._last.get(kind)
        return last is None or self._now() - last >= self._settings.alert_every_s
