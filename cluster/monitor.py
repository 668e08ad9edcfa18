"""Writes down what a run does: local files first, then the terminal and a copy in Weights & Biases.

    step(row) ─► metrics.jsonl ─► W&B ─► console          samples(step, rows) ─► samples.jsonl ─► W&B table
    decision(row) ─► decisions.jsonl ─► console           trace(rows) ─► rollouts.jsonl
    warmup(row) ─► warmup.jsonl ─► W&B ─► console         event(text) ─► events.log ─► console
    summary(values) ─► summary.json ─► W&B                alert(kind, text) ─► event ─► W&B alert
    report(path) ─► W&B panel and artifact

One process has a Monitor; workers hand it typed values and log nothing themselves.
"""

import contextlib
import datetime
import json
import math
import numbers
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cluster.alerts import SERIOUS, Alerts
from cluster.console import make_console
from cluster.metrics import lookup
from cluster.monitor_settings import AlertKind, MonitorSettings
from cluster.redact import hide_variables, redact, scrub
from cluster.visible import entry, visible
from cluster.wandb_copy import LEARNER_AXIS, WARMUP_AXIS, WandbCopy

METRICS, WARMUP, SAMPLES = "metrics.jsonl", "warmup.jsonl", "samples.jsonl"
DECISIONS, TRACE = "decisions.jsonl", "rollouts.jsonl"
EVENTS, SUMMARY = "events.log", "summary.json"
_EARLIER_SAMPLES = 2000  # of earlier starts that a resumed offline run shows again

Value = float | int | None


class UnknownMetricError(KeyError):
    """A row has a name that `cluster.metrics` does not explain."""


class Monitor:
    """The run's one writer of metrics, samples, events and the summary.

    `resume_from` is the learner step of the checkpoint that a run goes on from: rows after it, which the
    resumed run will write anew, move to `*.superseded.jsonl`. With `strict`, an unexplained metric name is an
    error after its row is written; without, it is counted and said once.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: MonitorSettings,
        config: Mapping[str, Any],
        total_steps: int,
        *,
        resume_from: int | None = None,
        strict: bool = False,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.nonfinite_values = 0
        self._strict = strict
        self._said: set[str] = set()
        self._hosts: Callable[[], Mapping[str, Value]] = dict
        self._unknown: Counter[str] = Counter()
        hide_variables(_secret_variables(config))
        for name in (METRICS, SAMPLES, DECISIONS, TRACE):
            _rewind(run_dir / name, 0 if resume_from is None else resume_from, fresh=resume_from is None)
        if resume_from is None:
            _rewind(run_dir / WARMUP, 0, fresh=True)
        self._files: dict[str, TextIO] = {
            name: (run_dir / name).open("a", encoding="utf-8", buffering=1)
            for name in (METRICS, WARMUP, SAMPLES, DECISIONS, TRACE, EVENTS)
        }
        self._console = make_console(settings.console, run_dir.name, total_steps)
        self._wandb = WandbCopy(
            run_dir,
            settings,
            config,
            first_row=_rows_written(run_dir),
            earlier=deque(read_rows(run_dir / SAMPLES), maxlen=_EARLIER_SAMPLES),
        )
        self._alerts = Alerts(run_dir.name, settings, self.event, self._send_alert)
        self._closed = False

    @property
    def wandb_errors(self) -> int:
        """Calls to W&B that failed."""
        return self._wandb.errors

    @property
    def wandb_mode(self) -> str:
        """online, offline or disabled: as intended until W&B has started, then as it really is."""
        return self._wandb.mode

    def step(self, row: Mapping[str, Value]) -> None:
        """Write the row of one learner step; it needs `learner_step`, 0 being before training."""
        if LEARNER_AXIS not in row:
            raise ValueError(f"a row of metrics needs {LEARNER_AXIS!r}, got {sorted(row)}")
        self._row(METRICS, {**self._hosts(), **row})
        accuracy = row.get("discriminator/accuracy")
        if accuracy is not None:
            self._alerts.discriminator_accuracy(accuracy)

    def watched(self, hosts: Callable[[], Mapping[str, Value]]) -> None:
        """From now on each step's row has what `hosts` tells of hosts and actors then."""
        self._hosts = hosts

    def warmup(self, row: Mapping[str, Value]) -> None:
        """Write the row of one supervised warm-up update; it needs `warmup/step`."""
        if WARMUP_AXIS not in row:
            raise ValueError(f"a row of the warm-up needs {WARMUP_AXIS!r}, got {sorted(row)}")
        self._row(WARMUP, row)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep samples for reading; see docs/data.md for the columns that the report uses."""
        clean = [
            {name: scrub(value) if isinstance(value, str) else value for name, value in row.items()}
            for row in rows
        ]
        for row in clean:
            self._files[SAMPLES].write(dump({LEARNER_AXIS: step, **row}) + "\n")
        self._wandb.samples(step, clean)

    def trace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the times of a step and of its groups: what `headrace plan` calibrates itself on."""
        for row in rows:
            self._files[TRACE].write(dump(row) + "\n")

    def decision(self, step: int, row: Mapping[str, Any], text: str) -> None:
        """Keep one decision of the scheduler with its inputs, and say it."""
        self._files[DECISIONS].write(dump({LEARNER_AXIS: step, **row}) + "\n")
        self.event(text)

    def event(self, text: str) -> None:
        """A line for people: into events.log with the time, and onto the terminal."""
        text = entry(scrub(text))
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._files[EVENTS].write(f"{now} {text}\n")
        self._console.event(text)

    def alert(self, kind: AlertKind, text: str) -> None:
        """An event that somebody who is not looking should hear of: W&B sends it on, if `alerts` has it."""
        self._alerts.raise_alert(kind, text)

    def reward_errors(self, failed: int, scored: int) -> None:
        """Groups left out and groups scored so far: an alert once that is more than `alert_reward_errors`."""
        self._alerts.reward_errors(failed, scored)

    def _send_alert(self, kind: AlertKind, title: str, text: str) -> None:
        self._wandb.alert(scrub(title), visible(scrub(text)), serious=kind in SERIOUS)

    def report(self, path: Path) -> None:
        """Give the report to W&B, as a panel and as a file."""
        self._wandb.report(path)

    def summary(self, values: Mapping[str, Any]) -> Path:
        """Write summary.json, whole or not at all."""
        clean = redact(values)
        write_atomically(self.run_dir / SUMMARY, dump(clean, indent=2) + "\n")
        self._wandb.summary(clean)
        return self.run_dir / SUMMARY

    def close(self, exit_code: int = 0) -> None:
        """End the display, W&B and the files; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._wandb.finish(exit_code)
        self._tell_news_of_wandb()
        if (command := self._wandb.sync_command()) is not None:
            self.event(f"to send this run to W&B: {command}")
        self._console.stop()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(0 if kind is None else 1)

    def _row(self, file: str, row: Mapping[str, Value]) -> None:
        clean: dict[str, Value] = {name: self._finite(name, value) for name, value in row.items()}
        unknown = [name for name in clean if lookup(name) is None]
        self._unknown.update(unknown)
        if file == METRICS:
            clean["monitor/nonfinite_values"] = self.nonfinite_values
            clean["monitor/unknown_metrics"] = len(self._unknown)
            clean["monitor/wandb_errors"] = self.wandb_errors
        self._files[file].write(dump(clean) + "\n")
        self._wandb.log(clean)
        self._console.row(clean)
        self._tell_news_of_wandb()
        for name in unknown:
            if self._strict:
                raise UnknownMetricError(
                    f"metric {name!r} is not explained in cluster/metrics.py: add it there"
                )
            self._once(name, f"metric {name!r} has no entry in docs/metrics.md")

    def _tell_news_of_wandb(self) -> None:
        if (news := self._wandb.news()) is not None:
            self.event(news)

    def _finite(self, name: str, value: Value) -> Value:
        if value is None:
            return None
        if isinstance(value, numbers.Integral):  # a bool too: 0 or 1
            return int(value)
        number = float(value)
        if math.isfinite(number):
            return number
        self.nonfinite_values += 1
        self._once(f"nonfinite {name}", f"metric {name!r} is {number}; it is written as null")
        return None

    def _once(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self.event(f"warning: {text}")


def dump(value: Any, indent: int | None = None) -> str:
    """JSON on ASCII, with null for numbers that JSON does not have."""
    return json.dumps(_jsonable(value), allow_nan=False, indent=indent)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, numbers.Integral):  # numpy's integers
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, also after a crash of the machine."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSON Lines file; a line cut off by a crash, or a missing file, gives none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _rows_written(run_dir: Path) -> int:
    """At least as many as the rows that earlier starts gave to W&B, by the lines of what it has copies of."""
    names = (METRICS, WARMUP, SAMPLES)
    paths = [run_dir / name for name in names] + [
        (run_dir / name).with_suffix(".superseded.jsonl") for name in names
    ]
    starts = len(list((run_dir / "wandb").glob("*run-*")))  # each may have sent a report
    return starts + sum(_lines(path) for path in paths if path.is_file())


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _secret_variables(config: Mapping[str, Any]) -> list[str]:
    """Environment variables that the job's configuration names as needed by a reward: keys, mostly."""
    scoring = config.get("scoring")
    names = scoring.get("reward_env", ()) if isinstance(scoring, Mapping) else ()
    return [str(name) for name in names]


def _rewind(path: Path, step: int, *, fresh: bool) -> None:
    """Keep the rows up to `step` (none if `fresh`); the others move to `NAME.superseded.jsonl`."""
    if not path.is_file() or not path.stat().st_size:
        return
    keep: list[str] = []
    aside: list[str] = []
    for row in read_rows(path):
        older = not fresh and int(row.get(LEARNER_AXIS, 0)) <= step
        (keep if older else aside).append(json.dumps(row) + "\n")
    if aside:
        with path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(aside)
    write_atomically(path, "".join(keep))
