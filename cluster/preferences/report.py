"""What a set of preferences is like: figures, and what they mean in words."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rewards.preferences.agreement import Agreement
from rewards.preferences.shares import Share
from rewards.preferences.transitivity import CHANCE, label_accuracy, spread_from_cycles

LINES_SHOWN = 50  # lines named a reason; quarantine.jsonl has all of them
ENOUGH_TRIADS = 30
ENOUGH_REPEATED = 20
LENGTH_WARNING = 0.55
FEW_CONTRADICTORY, MANY_CONTRADICTORY = 0.05, 1 / 3  # of all pairs


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """What became of every line of a source: lines = good + blank + the sum of put_aside.

    `first_lines` names the first lines of each reason.
    """

    field: str
    name: str
    lines: int
    good: int
    blank: int
    put_aside: Mapping[str, int]
    first_lines: Mapping[str, list[int]]

    def sentences(self) -> Iterator[str]:
        """What was read, and what was put aside and where."""
        yield f"{self.field} = {self.name!r}: {self.lines} lines, {self.good} pairs used, {self.blank} blank."
        for reason, count in sorted(self.put_aside.items(), key=lambda item: -item[1]):
            lines = ", ".join(map(str, self.first_lines[reason][:8]))
            yield f"Put aside: {count} × {reason} (lines {lines}{', …' if count > 8 else ''})."


@dataclass(frozen=True, slots=True)
class AnnotatorCheck:
    """How often one annotator's labels agree with the other labels of the same pairs."""

    name: str
    labels: int
    agrees: Share


@dataclass(frozen=True, slots=True)
class Findings:
    """Figures over all labels of the training source, held-out ones and contradictory ones too."""

    labels: int
    pairs: int
    prompts: int
    annotators: int
    contradictory: Share
    contradictory_lines: list[tuple[int, int]]
    self_contradictions: int
    agreement: Agreement
    unnamed: Agreement
    triads: int
    cycles: Share
    cycles_within_annotators: Share
    expected_cycles: tuple[float, float] | None
    longer_chosen: Share
    checks: list[AnnotatorCheck]

    def sentences(self, policy: str) -> Iterator[str]:
        """What was found, whether or not it is in doubt."""
        named = f", {self.annotators} named annotators" if self.annotators else ""
        yield f"{self.labels} labels of {self.pairs} pairs, {self.prompts} prompts{named}."
        if count := round(self.contradictory.value * self.contradictory.units):
            lines = ", ".join(f"{one} and {other}" for one, other in self.contradictory_lines[:5])
            yield (
                f"{count} pairs stand in both orders, {self.contradictory} of all (lines {lines}"
                f'{", …" if count > 5 else ""}); preferences.contradictions = "{policy}".'
            )
        if self.self_contradictions:
            yield f"In {self.self_contradictions} of them one named annotator gave both labels."
        if self.agreement.alpha is not None:
            yield (
                f"{self.agreement.pairs} pairs were labelled more than once: labels agree in "
                f"{self.agreement.raw}; Krippendorff's alpha {self.agreement.alpha:.2f} "
                f"[{self.agreement.alpha_low:.2f}, {self.agreement.alpha_high:.2f}]."
            )
        yield self._about_cycles()
        yield f"The longer response was chosen in {self.longer_chosen} of pairs of unequal length."

    def _about_cycles(self) -> str:
        if self.triads < ENOUGH_TRIADS:
            return (
                f"{self.triads} sets of three responses were compared in all three ways: too few to say "
                "whether preferences run in circles."
            )
        text = (
            f"Of {self.triads} sets of three responses compared in all three ways, {self.cycles} are cycles; "
            f"coin flips would give {100 * CHANCE:.0f} %"
        )
        if self.expected_cycles is not None:
            low, high = self.expected_cycles
            expected = f"{100 * low:.1f} to {100 * high:.1f} %"
            return f"{text}, Bradley-Terry with the noise of the repeated labels {expected}."
        right = 100 * label_accuracy(spread_from_cycles(self.cycles.value))
        return (
            f"{text}, Bradley-Terry needs for it that a label is right in {right:.0f} of 100 cases. Too few "
            "pairs were labelled more than once to check that."
        )

    def doubts(self) -> Iterator[str]:
        """Why Bradley-Terry may not hold."""
        alpha_low = self.agreement.alpha_low
        if self.agreement.pairs >= ENOUGH_REPEATED and alpha_low is not None and alpha_low <= 0:
            yield (
                f"Labels of the same pair agree in {self.agreement.raw}, no more than coin flips (50 %) do: "
                "there may be nothing to learn."
            )
        if self._unnamed_disagree():
            yield (
                f"Rows without an annotator, of pairs that stand in several, agree in {self.unnamed.raw}, "
                "copies counted: no more than coin flips (50 %) do. There may be nothing to learn."
            )
        if self.triads >= ENOUGH_TRIADS and self.cycles.high >= CHANCE:
            yield (
                f"Cycles among three responses are as frequent as coin flips make them ({self.cycles}; by "
                f"chance {100 * CHANCE:.0f} %): the labels show no order of the responses."
            )
        if (
            self.triads >= ENOUGH_TRIADS
            and self.expected_cycles is not None
            and self.cycles.low > self.expected_cycles[1]
        ):
            yield (
                f"There are more cycles ({self.cycles}) than Bradley-Terry allows with the noise of the "
                f"repeated labels (at most {100 * self.expected_cycles[1]:.1f} %): no single scale of reward "
                "orders these responses. Look for labels given by several criteria."
            )
        if (
            self.triads >= ENOUGH_TRIADS
            and self.cycles_within_annotators.units >= ENOUGH_TRIADS
            and self.cycles.low > self.cycles_within_annotators.high
        ):
            yield (
                f"Single annotators run in circles less ({self.cycles_within_annotators}) than all together "
                f"({self.cycles}): their tastes differ, and one reward is a compromise between them."
            )
        for check in self.checks:
            if check.agrees.high < 0.5:
                yield (
                    f"Annotator {check.name!r} agrees with the others in only {check.agrees} of "
                    f"{check.agrees.units} comparisons: the labels may be reversed."
                )

    def _unnamed_disagree(self) -> bool:
        """Whether rows of nobody named agree like coin flips or less, in no small part of the file.

        Less than coin flips is also what is left where copies were taken out before. Then pairs in both
        orders say little, unless they are many.
        """
        low, high = self.unnamed.alpha_low, self.unnamed.alpha_high
        if self.unnamed.pairs < ENOUGH_REPEATED or low is None or high is None:
            return False
        return low <= 0 and self.contradictory.low > (FEW_CONTRADICTORY if high >= 0 else MANY_CONTRADICTORY)

    def warnings(self) -> Iterator[str]:
        """What may be learned from the labels instead of quality."""
        if self.longer_chosen.low > LENGTH_WARNING:
            yield (
                f"The longer response was chosen in {self.longer_chosen}: a reward or policy may learn "
                "length. Compare with a loss that corrects for it, and look at length-controlled win rates."
            )
        elif self.longer_chosen.high < 1 - LENGTH_WARNING:
            yield (
                f"The longer response was chosen in only {self.longer_chosen}: a reward or policy may learn "
                "shortness. Compare with a loss that corrects for length."
            )


@dataclass(frozen=True, slots=True)
class PreferenceReport:
    """What was read, how it was split, what was found."""

    sources: tuple[SourceCounts, ...]
    part: str
    train_pairs: int
    train_prompts: int
    heldout_pairs: int
    heldout_prompts: int
    with_margin: int
    with_weight: int
    subsets: Mapping[str, int]
    policy: str
    findings: Findings

    @property
    def doubts(self) -> list[str]:
        """Why the Bradley-Terry assumption is in doubt; empty if nothing speaks against it."""
        return list(self.findings.doubts())

    @property
    def warnings(self) -> list[str]:
        """What a reward model may learn from this data instead of quality."""
        return list(self.findings.warnings())

    def sentences(self) -> list[str]:
        """What was read, put aside, split and found, a sentence each."""
        half = "" if self.part == "all" else f" (half {self.part!r} of the prompts)"
        return [
            *(sentence for source in self.sources for sentence in source.sentences()),
            f"{self.train_pairs} training pairs of {self.train_prompts} prompts{half}, {self.heldout_pairs} "
            f"held-out pairs of {self.heldout_prompts} prompts; no prompt is in both.",
            *self.findings.sentences(self.policy),
        ]

    def source_sentences(self) -> list[str]:
        """The same for a source that is not split, as its pairs are only scored."""
        return [
            *(sentence for source in self.sources for sentence in source.sentences()),
            *self.findings.sentences(self.policy),
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values only: all figures, `doubts`, `warnings` and `sentences`."""
        return {
            **asdict(self),
            "sentences": self.sentences(),
            "doubts": self.doubts,
            "warnings": self.warnings,
        }
