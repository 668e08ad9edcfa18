"""From the labels of a source to what the report says of them."""

import numpy as np
from numpy.typing import NDArray

from cluster.preferences.labels import Contradiction, LabelTable
from cluster.preferences.report import (
    ENOUGH_REPEATED,
    LINES_SHOWN,
    AnnotatorCheck,
    Findings,
)
from rewards.preferences.agreement import Agreement, agreement
from rewards.preferences.shares import Share, share
from rewards.preferences.transitivity import count_triads, cycle_rate, spread_from_agreement

Ints = NDArray[np.int64]
_CHECKS_SHOWN = 20
_CHECK_LABELS = 10  # an annotator with fewer comparisons is not judged


def analyse(table: LabelTable) -> Findings:
    """Contradictions, agreement, cycles and length over all labels of a source."""
    contradictions = table.contradictions()
    agreed = _agreement(table)
    pooled = count_triads(table.prompt, table.chosen, table.rejected)
    named = table.annotator > 0
    # A group of its own for every annotator of a prompt.
    group = table.prompt[named] * len(table.annotators) + table.annotator[named]
    within = count_triads(group, table.chosen[named], table.rejected[named])
    return Findings(
        labels=len(table.labels),
        pairs=table.distinct_pairs,
        prompts=len(table.prompt_keys),
        annotators=len(table.annotators) - 1,
        contradictory=_contradictory(table, contradictions),
        contradictory_lines=[
            (table.labels[one.forward[0]].line, table.labels[one.backward[0]].line)
            for one in contradictions[:LINES_SHOWN]
        ],
        self_contradictions=sum(_by_one(table, one) for one in contradictions),
        agreement=agreed,
        unnamed=_unnamed(table),
        triads=int(pooled.complete.sum()),
        cycles=pooled.rate,
        cycles_within_annotators=within.rate,
        expected_cycles=_expected_cycles(agreed),
        longer_chosen=_longer_chosen(table),
        checks=_annotator_checks(table),
    )


def _contradictory(table: LabelTable, found: list[Contradiction]) -> Share:
    """The share of pairs in both orders, its interval over prompts."""
    size = len(table.prompt_keys)
    both = np.bincount(np.array([table.prompt_of(one.forward[0]) for one in found], np.int64), minlength=size)
    return share(both, np.bincount(table.pair_prompts(), minlength=size))


def _by_one(table: LabelTable, one: Contradiction) -> bool:
    """Whether a named annotator is on both sides."""
    names = [{table.labels[place].annotator for place in side} for side in (one.forward, one.backward)]
    return bool((names[0] & names[1]) - {""})


def _agreement(table: LabelTable) -> Agreement:
    """Agreement of labels that are known to be opinions of their own.

    Rows of nobody named have one of a pair at most, as a further row may be a copy, and none where they name
    either response: were only the rows that disagree counted, they would never be seen to agree.
    """
    pairs = []
    for places in table.repeated():
        unnamed = [place for place in places if not table.labels[place].annotator]
        counted = [place for place in places if place not in unnamed] if len(unnamed) > 1 else places
        signs = [table.forward(place) for place in counted]
        pairs.append((table.prompt_of(places[0]), sum(signs), len(signs) - sum(signs)))
    counts = np.array(pairs, np.int64).reshape(-1, 3)
    return agreement(counts[:, 0], counts[:, 1], counts[:, 2])


def _unnamed(table: LabelTable) -> Agreement:
    """Agreement of the rows of nobody named, copies counted as labels: at least as much as there is."""
    of = table.annotator == 0
    prompt, chosen, rejected = table.prompt[of], table.chosen[of], table.rejected[of]
    pair = np.stack([prompt, np.minimum(chosen, rejected), np.maximum(chosen, rejected)])
    _, first, place = np.unique(pair, axis=1, return_index=True, return_inverse=True)
    rows, forward = table.copies[of], chosen < rejected
    counts = (
        np.bincount(place.ravel(), rows * side, len(first)).astype(np.int64) for side in (forward, ~forward)
    )
    return agreement(prompt[first], *counts)


def _expected_cycles(agreed: Agreement) -> tuple[float, float] | None:
    """Lowest and highest rate of cycles that the agreement's interval allows."""
    if agreed.pairs < ENOUGH_REPEATED:
        return None
    spreads = (spread_from_agreement(agreed.raw.high), spread_from_agreement(agreed.raw.low))
    return cycle_rate(spreads[0]), cycle_rate(spreads[1])


def _longer_chosen(table: LabelTable) -> Share:
    """The share of labels that name the longer response in characters, of those of unequal length."""
    longer = np.array([len(one.chosen) - len(one.rejected) for one in table.labels], np.int64)
    size = len(table.prompt_keys)
    return share(
        np.bincount(table.prompt[longer > 0], minlength=size),
        np.bincount(table.prompt[longer != 0], minlength=size),
    )


def _annotator_checks(table: LabelTable) -> list[AnnotatorCheck]:
    """Agreement of each named annotator with the other labels of the same pairs, the lowest first."""
    met: dict[int, list[tuple[int, int, int]]] = {}
    for places in table.repeated():
        signs = [table.forward(place) for place in places]
        for place, sign in zip(places, signs, strict=True):
            same = signs.count(sign) - 1
            number = table.annotators[table.labels[place].annotator]
            if number:
                met.setdefault(number, []).append((table.prompt_of(place), same, len(places) - 1))
    names = {number: name for name, number in table.annotators.items()}
    checks = []
    for number, rows in met.items():
        prompts, hits, units = np.array(rows, np.int64).T
        if units.sum() < _CHECK_LABELS:
            continue
        _, cluster = np.unique(prompts, return_inverse=True)
        agrees = share(np.bincount(cluster, hits), np.bincount(cluster, units), independent=len(rows))
        checks.append(AnnotatorCheck(names[number], len(rows), agrees))
    return sorted(checks, key=lambda check: check.agrees.value)[:_CHECKS_SHOWN]
