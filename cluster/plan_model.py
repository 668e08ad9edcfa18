"""What the simulator must know of a workload: how long things take, and how long responses are.

A `Workload` is a TOML file (`headrace plan --model`), or comes from a run (`cluster.calibrate`). All times
are seconds of work on resources of one's own; `[sharing]` says which work shares the same cores.
"""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tomli_w
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator
from scipy.special import ndtr, ndtri

from cluster.sim_engine import token_seconds
from rewards.settings import Settings


class Lengths(Settings):
    """`[lengths]`: response tokens of one sample."""

    kind: Literal["fixed", "lognormal", "pareto", "quantiles"] = Field(
        "lognormal", description="Shape: all alike, log-normal, Pareto, or as measured."
    )
    median: float = Field(64, gt=0, description="Median length; fixed: the length.")
    sigma: float = Field(0.6, ge=0, description="lognormal: standard deviation of log length.")
    alpha: float = Field(1.5, gt=0, description="pareto: P(length > x) falls as x^−alpha.")
    quantiles: list[float] = Field(
        default_factory=list,
        description="quantiles: lengths at evenly spaced ranks, the least to the longest.",
    )
    within_group: float = Field(
        0.0, ge=0, lt=1, description="Correlation of lengths of one prompt: 0, all of them independent."
    )

    def at(self, rank: NDArray[np.float64]) -> NDArray[np.float64]:
        """The length with a share `rank` of all lengths below it."""
        match self.kind:
            case "fixed":
                return np.full_like(rank, self.median)
            case "lognormal":
                return np.asarray(self.median * np.exp(self.sigma * ndtri(rank)))
            case "pareto":  # x_min · (1 − u)^(−1/α), with the median at u = 1/2
                return np.asarray(self.median * (2 * (1 - rank)) ** (-1 / self.alpha))
            case "quantiles":
                places = np.linspace(0.0, 1.0, len(self.quantiles))
                return np.asarray(np.interp(rank, places, np.asarray(self.quantiles)))

    def groups(self, group_size: int, cap: int, rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
        """Lengths of one group after another, each from 1 to `cap`; a Gaussian copula within a group."""
        shared, own = self.within_group**0.5, (1 - self.within_group) ** 0.5
        while True:
            normal = shared * rng.standard_normal((512, 1)) + own * rng.standard_normal((512, group_size))
            lengths = np.clip(np.rint(self.at(np.clip(ndtr(normal), 1e-12, 1 - 1e-12))), 1, cap)
            yield from map(tuple, lengths.astype(int).tolist())


class Generation(Settings):
    """`[generation]`: one rollout engine."""

    token_s: list[list[float]] = Field(
        [[1, 0.01], [64, 0.02]],
        min_length=1,
        description="Points [n, seconds a token takes while n sequences run], straight between and beyond.",
    )
    prompt_tokens: float = Field(64, ge=0, description="Mean length of a prompt.")
    prompt_token_s: float = Field(0.0, ge=0, description="Seconds to read one token of a prompt.")
    speeds: list[float] = Field(
        [1.0], min_length=1, description="Relative speeds of the actors, given in turn where there are more."
    )

    @field_validator("token_s")
    @classmethod
    def _pairs_that_rise(cls, points: list[list[float]]) -> list[list[float]]:
        if any(len(point) != 2 or min(point) <= 0 for point in points):
            raise ValueError("must be pairs [sequences, seconds], each above 0")
        if len({point[0] for point in points}) < len(points):
            raise ValueError("has two points for the same number of sequences")
        return points

    @field_validator("speeds")
    @classmethod
    def _positive_speeds(cls, speeds: list[float]) -> list[float]:
        if min(speeds) <= 0:
            raise ValueError("must be above 0")
        return speeds

    def table(self, most: int, limit: int, speed: float) -> list[float]:
        """τ(n), n = 0 … most, of an engine that runs `limit` sequences at once."""
        points = [(point[0], point[1]) for point in self.token_s]
        return [seconds / speed for seconds in token_seconds(points, most, limit)]


class Scoring(Settings):
    """`[scoring]`: one call of a scoring actor, for up to 16 groups."""

    call_s: float = Field(0.0, ge=0, description="Seconds a call, however many groups.")
    group_s: float = Field(0.01, ge=0, description="Seconds a group.")


class Learner(Settings):
    """`[learner]`: one step."""

    step_s: float = Field(0.0, ge=0, description="Seconds a step, however many tokens.")
    token_s: float = Field(1e-4, ge=0, description="Seconds a token of prompts and responses.")
    variation: float = Field(0.0, ge=0, le=1, description="Standard deviation over mean of a step's time.")


class Sync(Settings):
    """`[sync]`: weights from the learner to the actors."""

    publish_s: float = Field(0.05, ge=0, description="The learner's seconds to gather and send weights.")
    load_s: float = Field(0.05, ge=0, description="Seconds in which an actor loads and samples nothing.")
    actor_s: float = Field(0.0, ge=0, description="Added to `load_s` for every actor there is.")
    probe_s: float = Field(0.05, ge=0, description="Seconds to prove loaded weights; sampling goes on.")


class Sharing(Settings):
    """`[sharing]`: cores that learner, actors and scorers share; more wanted than there are slows all."""

    cores: float = Field(0.0, ge=0, description="Cores that are shared; 0: everyone has his own.")
    learner: float = Field(1.0, ge=0, description="Cores that the learner uses while it trains.")
    actor: float = Field(1.0, ge=0, description="Cores that an actor uses while it has work.")
    scoring: float = Field(1.0, ge=0, description="Cores that a scoring actor uses while it has work.")


class Failures(Settings):
    """`[failures]`: rollout actors that are lost."""

    mean_s_between: float = Field(
        0.0, ge=0, description="Mean seconds from loss to loss of one actor; 0: none."
    )
    recovery_s: float = Field(60.0, ge=0, description="Seconds until a lost actor is back.")


class Drift(Settings):
    """`[drift]`: how sampler and learner differ at lag s, in nats a token: D(s) = a + b·s."""

    engine: float = Field(0.0, ge=0, description="a: the engines' own difference.")
    per_version: float = Field(0.0, ge=0, description="b: drift a version.")
    ess_per_version: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the effective sample size that is left at each further version.",
    )
    noise: float = Field(0.0, ge=0, description="Relative noise of a measured D(s).")


class Size(Settings):
    """`[size]`: the model, for the estimate of memory."""

    parameters: float = Field(0.0, ge=0, description="Parameters; 0: not known, no estimate.")
    kv_values_per_token: float = Field(
        0.0, ge=0, description="Key-value cache entries a token: 2 · layers · key-value heads · head width."
    )


class Workload(Settings):
    """All of it. Every table has defaults."""

    source: str = Field("", description="Where the figures come from, for people.")
    lengths: Lengths = Field(default_factory=lambda: Lengths.model_validate({}))
    generation: Generation = Field(default_factory=lambda: Generation.model_validate({}))
    scoring: Scoring = Field(default_factory=lambda: Scoring.model_validate({}))
    learner: Learner = Field(default_factory=lambda: Learner.model_validate({}))
    sync: Sync = Field(default_factory=lambda: Sync.model_validate({}))
    sharing: Sharing = Field(default_factory=lambda: Sharing.model_validate({}))
    failures: Failures = Field(default_factory=lambda: Failures.model_validate({}))
    drift: Drift = Field(default_factory=lambda: Drift.model_validate({}))
    size: Size = Field(default_factory=lambda: Size.model_validate({}))

    def changed(self, table: str, **values: object) -> "Workload":
        """A copy with other values in one table."""
        return self.model_copy(update={table: getattr(self, table).model_copy(update=values)})


def load_workload(path: Path, overrides: Sequence[str] = ()) -> Workload:
    """Read a workload file; ValueError names file, field, value and remedy."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--model {path}: there is no such file; give a TOML file of a workload") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--model {path}: cannot be read as TOML: {error}") from None
    from cluster.config_file import apply_override

    for override in overrides:
        apply_override(tables, override)
    try:
        return Workload.model_validate(tables)
    except ValidationError as error:
        raise ValueError(
            "\n".join(f"--model {path}: {_explain(detail)}" for detail in error.errors()[:5])
        ) from None


def dump_workload(workload: Workload) -> str:
    """A workload as TOML; `load_workload` reads it back."""
    return tomli_w.dumps(workload.model_dump(mode="json"))


def _explain(detail: object) -> str:
    assert isinstance(detail, dict)
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{field} = {detail['input']!r}: there is no such setting; remove it (docs/plan.md lists them)"
    return f"{field} = {detail['input']!r}: {detail['msg'].removeprefix('Value error, ')}; give another value"
