"""A share with its 95 % interval, where units of the same prompt go together.

With h_c hits among t_c units of cluster c, C clusters and p = Σh/Σt, the variance of p is that of a ratio:

    v = C/(C − 1) · Σ (h_c − p·t_c)² / (Σt)²

The interval is Wilson's at the effective size p(1 − p)/v, at most Σt, with the t quantile of C − 1 degrees of
freedom: it stays within [0, 1], and does not collapse where p is 0 or 1 (there the size is C).
Source: Korn and Graubard, Survey Methodology 24 (1998), with Wilson's interval in place of the exact one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True, slots=True)
class Share:
    """`value` = hits / `units`, its 95 % interval [low, high]; all 0 to 1 with nothing counted."""

    value: float
    low: float
    high: float
    units: int

    def to_json(self) -> dict[str, float]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high, "units": self.units}

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


NO_SHARE = Share(0.0, 0.0, 1.0, 0)


def share(hits: NDArray[Any], units: NDArray[Any], independent: float | None = None) -> Share:
    """The share of hits over clusters: `hits` and `units` (C,).

    With a single cluster nothing is known of how clusters differ; its units count as `independent` draws
    (unset: all of them).
    """
    hits, units = np.asarray(hits, float), np.asarray(units, float)
    hits, units = hits[units > 0], units[units > 0]
    total, clusters = units.sum(), len(units)
    if not clusters:
        return NO_SHARE
    p = float(hits.sum() / total)
    if clusters == 1:
        return _wilson(p, independent or total, 1.96, int(total))
    variance = clusters / (clusters - 1) * float(((hits - p * units) ** 2).sum()) / total**2
    size = min(p * (1 - p) / variance, total) if variance > 0 and 0 < p < 1 else float(clusters)
    return _wilson(p, size, float(stats.t.ppf(0.975, clusters - 1)), int(total))


def _wilson(p: float, size: float, z: float, units: int) -> Share:
    """Wilson's interval of a share p seen in `size` independent draws."""
    scale = 1 + z * z / size
    centre = (p + z * z / (2 * size)) / scale
    half = z * np.sqrt(p * (1 - p) / size + z * z / (4 * size * size)) / scale
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Share(p, min(float(low), p), max(float(high), p), units)
