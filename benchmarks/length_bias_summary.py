"""The summary of `length_bias`: means over seeds by bias and method, claims with intervals, and a table."""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.active_labels import holm

BIASES = (0.0, 0.1, 0.2, 0.3)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
END = SIZES.index(64)
METHODS = ("bradley-terry", "residual", "odin")
NEAR_ZERO, DEAREST = 0.1, 0.02  # bounds of |ρ|, and of the accuracy lost on unbiased labels

Array = NDArray[np.float64]
Row = dict[str, Any]


def interval(values: Any) -> Row:
    """Mean, 95 % t interval and two-sided p of (seeds,) values against 0."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return {"mean": float(x.mean()), "low": None, "high": None, "p": None}
    error = float(x.std(ddof=1)) / len(x) ** 0.5
    half = float(stats.t.ppf(0.975, len(x) - 1)) * error
    p = float(2 * stats.t.sf(abs(x.mean()) / error, len(x) - 1)) if error > 0 else float(x.mean() == 0)
    return {"mean": float(x.mean()), "low": float(x.mean()) - half, "high": float(x.mean()) + half, "p": p}


class Cells:
    """The figures of a part by seed; only seeds that have every cell count."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = {(row["seed"], row["bias"], row["method"]): row for row in rows}
        cells = [(bias, method) for bias in BIASES for method in METHODS]
        self.seeds = [
            seed
            for seed in sorted({seed for seed, _, _ in self._rows})
            if all((seed, *cell) in self._rows for cell in cells)
        ]

    def of(self, bias: float, method: str, name: str) -> Array:
        """(seeds,) or (seeds, sizes)."""
        return np.array([self._rows[seed, bias, method][name] for seed in self.seeds], dtype=np.float64)


def summarise(rows: list[Row], ceilings: list[Row]) -> Row | None:
    """Means by bias and method, the claims, and what gold without its slope on length has; None before any
    seed is complete.
    """
    cells = Cells(rows)
    if not cells.seeds:
        return None
    scalars = [name for name, value in rows[0].items() if isinstance(value, float) and name != "bias"]
    table = [
        {
            "bias": bias,
            "method": method,
            "gold": cells.of(bias, method, "gold").mean(axis=0).tolist(),
            "gold_ci95": [interval(column) for column in cells.of(bias, method, "gold").T],
            "proxy": cells.of(bias, method, "proxy").mean(axis=0).tolist(),
            **{name: interval(cells.of(bias, method, name)) for name in scalars},
        }
        for bias in BIASES
        for method in METHODS
    ]
    names = [name for name in (ceilings[0] if ceilings else {}) if name != "seed"]
    return {
        "seeds": len(cells.seeds),
        "table": table,
        "ceiling": {name: interval([row[name] for row in ceilings]) for name in names},
        "claims": claims(cells) + secondary_claims(cells),
    }


def claims(cells: Cells) -> list[Row]:
    """Each claim with its interval and whether it passes."""
    found: list[Row] = []

    def claim(text: str, values: Array, *, above: float | None = None, below: float | None = None) -> None:
        at = interval(values - (above if above is not None else below or 0.0))
        row = {"claim": text, **interval(values), "p": at["p"]}
        if row["low"] is None:
            row["passes"] = None
        else:
            row["passes"] = bool(row["low"] > above if above is not None else row["high"] < (below or 0.0))
        found.append(row)

    def change(bias: float, name: str, start: int = 0) -> Array:
        curves = cells.of(bias, "bradley-terry", name)
        return np.asarray(curves[:, END] - curves[:, start])

    worst = BIASES[-1]
    for method in METHODS:
        what = "above" if method == "bradley-terry" else "below"
        claim(
            f"b = {worst}, {method}: gold at its peak − gold at 64 is {what} "
            f"{'0: it turns over' if what == 'above' else 'that of bradley-terry'}",
            cells.of(worst, method, "turnover")
            - (0.0 if what == "above" else cells.of(worst, "bradley-terry", "turnover")),
            **{what: 0.0},
        )
    claim(f"b = {worst}: proxy at 64 − at 1 is above 0", change(worst, "proxy"), above=0.0)
    claim("b = 0: gold at 64 − at 1 is above 0", change(0.0, "gold"), above=0.0)
    fall = interval(cells.of(0.0, "bradley-terry", "turnover"))
    found.append(
        {
            "claim": "b = 0: gold at its peak − gold at 64 is not above 0: no turn",
            **fall,
            "p": None,  # no evidence of a turn is what is asked for, not evidence of none
            "passes": None if fall["low"] is None else fall["low"] <= 0,
        }
    )
    for low, high in itertools.pairwise(BIASES):
        rise = cells.of(high, "bradley-terry", "correlation") - cells.of(low, "bradley-terry", "correlation")
        claim(f"bradley-terry: ρ(reward, length) grows from b = {low} to {high}", rise, above=0.0)
    for method in METHODS[1:]:
        for bias in BIASES:
            size = np.abs(cells.of(bias, method, "correlation"))
            claim(f"b = {bias}, {method}: |ρ(reward, length)| is below {NEAR_ZERO}", size, below=NEAR_ZERO)
        for bias in BIASES:
            gain = cells.of(bias, method, "accuracy_gold") - cells.of(bias, "bradley-terry", "accuracy_gold")
            if bias >= 0.2:
                claim(f"b = {bias}, {method}: gold accuracy rises over bradley-terry's", gain, above=0.0)
            if bias == 0:
                text = f"b = 0, {method}: gold accuracy lost is below {100 * DEAREST:.0f} points"
                claim(text, -gain, below=DEAREST)
    p_values = {row["claim"]: row["p"] for row in found if row["p"] is not None}
    adjusted = holm(p_values)
    return [row | {"p_holm": adjusted.get(row["claim"])} for row in found]


def secondary_claims(cells: Cells) -> list[Row]:
    """Label accuracy lost on unbiased labels: the accuracy that the ODIN paper (arXiv 2402.07319) reports.

    The claims on gold accuracy stay the main ones: noise in the labels pulls every model's accuracy on them
    to 1/2, and with it the differences. These were added after results were known, so they stand outside the
    family of Holm's p-values.
    """
    found: list[Row] = []
    for method in METHODS[1:]:
        theirs, mine = (cells.of(0.0, name, "accuracy_labels") for name in ("bradley-terry", method))
        lost, most = interval(theirs - mine), f"{100 * DEAREST:.0f} points"
        found.append(
            {
                "claim": f"secondary, b = 0, {method}: label accuracy lost is below {most}",
                **lost,
                "p": interval(theirs - mine - DEAREST)["p"],
                "passes": None if lost["high"] is None else lost["high"] < DEAREST,
                "p_holm": None,
            }
        )
    return found


def show(name: str, summary: Row) -> None:
    """The summary as a table."""
    print(f"\n{name}, {summary['seeds']} seed(s); win rates of the best of 16 against one sample")
    print(
        "  b   method          gold at 1     8    64   128  turnover  ρ pooled  within  |gold  accuracy"
        "  labels  win: gold   raw  controlled"
    )
    for row in summary["table"]:
        at = [row["gold"][SIZES.index(n)] for n in (1, 8, 64, 128)]
        of = {key: value["mean"] for key, value in row.items() if isinstance(value, dict)}
        print(
            f"  {row['bias']:.1f} {row['method']:13s}      {' '.join(f'{value:5.2f}' for value in at)}"
            f"     {of['turnover']:+.2f}     {of['correlation']:+.3f}  {of['correlation_within']:+.3f} "
            f"{of['partial_within']:+.3f}    {of['accuracy_gold']:.3f}   {of['accuracy_labels']:.3f}"
            f"      {of['win_gold']:.3f} {of['win_raw']:.3f}       {of['win_controlled']:.3f}"
        )
    if most := {name: value["mean"] for name, value in summary["ceiling"].items()}:
        print(
            f"  gold itself goes with length at ρ = {most['correlation_of_gold']:+.3f}; less its slope on "
            f"length, ρ = {most['correlation']:+.3f}, it has an accuracy of "
            f"{most['accuracy_gold']:.3f} by gold, {most['accuracy_labels']:.3f} by labels of b = 0"
        )
    for row in summary["claims"]:
        bounds = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
        verdict = {True: "yes", False: "NO", None: "one seed tells no interval"}[row["passes"]]
        print(f"  {row['claim']}: {row['mean']:+.3f}{bounds} {verdict}")
