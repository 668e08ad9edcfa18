"""What people see while prompts are answered, on standard error, and the tables of an evaluation."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Progress:
    """A bar with tokens a second and the mean score; lines, a tenth of the way each, where no one watches."""

    def __init__(self, total: int, *, done: int = 0) -> None:
        self._console = Console(stderr=True)
        self._total, self._done, self._left_out = total, done, 0
        self._tokens, self._scores, self._sum = 0, 0, 0.0
        self._first = 0.0
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting the actors", total=total, completed=done)
        if done:
            self._console.print(f"going on after {done} of {total} prompts", highlight=False)

    def advance(self, tokens: int, scores: Sequence[float]) -> None:
        """A prompt is done; `tokens` were sampled for it, and these scores written."""
        self._first = self._first or time.monotonic()
        self._tokens += tokens
        self._scores += len(scores)
        self._sum += sum(scores)
        self._step()

    def left_out(self) -> None:
        """A prompt is done with, since a reward failed on it."""
        self._left_out += 1
        self._step()

    def _step(self) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done, description=self.in_words())
        every = max(1, self._total // 10)
        if not self._console.is_terminal and (self._done % every == 0 or self._done == self._total):
            print(f"{self._done} of {self._total} prompts: {self.in_words()}", file=sys.stderr, flush=True)

    def in_words(self) -> str:
        """For example `5120 tokens/s, mean score 0.61`."""
        seconds = time.monotonic() - self._first if self._first else 0.0
        words = [f"{self._tokens / seconds:.0f} tokens/s"] if seconds > 1 else [f"{self._tokens} tokens"]
        if self._scores:
            words.append(f"mean score {self._sum / self._scores:.3f}")
        if self._left_out:
            words.append(f"{self._left_out} left out")
        return ", ".join(words)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def print_evaluation(found: Mapping[str, Any], folder: Path) -> None:
    """The tables of evaluation.json, on standard output."""
    console = Console()
    console.print(
        f"{found['prompts']} prompts with {found['samples']} samples each from {found['policy']}: reward "
        f"{_number(found['reward'])}, {found['response_tokens']['mean']:.1f} tokens",
        highlight=False,
        markup=False,  # a folder's name may hold brackets
        soft_wrap=True,
    )
    labels = list(found["best_of_n"][0]["judged"])
    table = Table("n", "KL", "bound", "win rate", "reward", *labels, title="Best of n")
    for row in found["best_of_n"]:
        mark = "" if row["reliable"] else " *"
        table.add_row(
            f"{row['n']}{mark}",
            _number(row["kl"]),
            f"{row['kl_bound']:.3f}",
            _number(row["win_rate"]),
            _number(row["reward"]),
            *(_number(row["judged"][label]) for label in labels),
        )
    console.print(table, markup=False)
    if any(not row["reliable"] for row in found["best_of_n"]):
        console.print("* fewer than 4n samples a prompt: wide, and its KL too small", highlight=False)
    if found["pass_at_k"]:
        passes = Table("k", "pass@k", title=f"Reward of {found['pass_at_k']['threshold']:g} or more")
        for row in found["pass_at_k"]["rows"]:
            passes.add_row(str(row["k"]), _number(row))
        console.print(passes)
    if "against" in found:
        console.print(_wins(found["against"]), markup=False)
    console.print(
        f"in {folder}: evaluation.json, samples.jsonl, best_of_n.png",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _wins(against: Mapping[str, Any]) -> Table:
    table = Table("judged by", "wins", "at equal length", "φ", title=Text(f"Against {against['policy']}"))
    for label, rate in against["win_rates"].items():
        raw, controlled = (_range(rate, name) for name in ("raw", "length_controlled"))
        table.add_row(label, raw, controlled, f"{rate['length_coefficient']:.2f}")
    return table


def _range(rate: Mapping[str, Any], name: str) -> str:
    if rate[name] is None:
        return "unidentified"
    low, high = rate[f"{name}_ci95"]
    return f"{rate[name]:.1%} [{low:.1%}, {high:.1%}]"


def _number(row: Mapping[str, Any]) -> str:
    half = "" if row["ci95"] is None else f" ± {row['ci95']:.3f}"
    return f"{row['mean']:.3f}{half}"
