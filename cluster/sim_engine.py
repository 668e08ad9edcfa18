"""One simulated rollout engine: groups of sequences that share its speed, in virtual time.

Legend: n = sequences that run; τ(n) = seconds a token takes while n run; v = virtual time, the tokens that a
sequence present from the start would have by now. All sequences that run gain a token each τ(n) seconds, so
one that enters at v with length L ends at v + L whatever else comes and goes, and a change of n touches no
other sequence (processor sharing). The engine moves from one sequence's end to the next only when something
happens to it: a group done, a group entering, new weights.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Flight:
    """One group on its way: the lengths of its samples, and which version sampled how many tokens."""

    group_id: int
    lengths: Sequence[int]
    tokens: int
    dispatched: float
    admitted: int = 0  # the version that its actor was known to hold
    entered: float = 0.0  # v when its first token was sampled
    sampled: float = 0.0
    scored: float = 0.0
    actor: str = ""
    versions: list[tuple[int, int]] = field(default_factory=list)  # (version, tokens), oldest first

    @property
    def oldest_version(self) -> int:
        """The lowest version among its tokens."""
        return self.versions[0][0]


class Engine:
    """Sequences that run and groups that wait for room among at most `max_num_seqs` sequences.

    `seconds` is the engine's own clock; it may be ahead of the simulation's: the engine is then held up, by a
    prompt's forward pass or by loading weights, and samples nothing until that moment.
    """

    __slots__ = (
        "_ends",
        "_limit",
        "_prefill",
        "_prompt",
        "_tau",
        "busy_since",
        "draining",
        "loading",
        "loads",
        "name",
        "running",
        "seconds",
        "stamp",
        "v",
        "version",
        "waiting",
    )

    def __init__(
        self, name: str, seconds_per_token: Sequence[float], *, max_num_seqs: int, prompt_tokens: float,
        prefill_token_s: float, version: int, now: float,
    ) -> None:  # fmt: skip
        """`seconds_per_token[n]` is τ(n), for n from 0 to the most sequences that may ever run."""
        self.name = name
        self.version = version
        self.seconds = now
        self.v = 0.0
        self.stamp = 0  # of its newest prediction; older ones no longer hold
        self.draining = False  # groups that come wait for new weights
        self.loading = False
        self.busy_since: float | None = None
        self.running: list[tuple[float, int, Flight]] = []  # heap of (v when its longest ends, id, group)
        self.waiting: deque[Flight] = deque()
        self.loads: list[tuple[float, int]] = []  # (v, version) of every load that a running group has seen
        self._ends: list[float] = []  # −(v at its end) of each running sequence, ascending
        self._tau = seconds_per_token
        self._limit = max_num_seqs
        self._prompt = prompt_tokens
        self._prefill = prefill_token_s

    @property
    def empty(self) -> bool:
        """Whether it has no group at all."""
        return not self.running and not self.waiting

    def add(self, flight: Flight, now: float) -> None:
        """A group arrives; it enters at once if there is room."""
        self.advance(now)
        if self.waiting or self.draining or not self._has_room(flight):
            self.waiting.append(flight)
        else:
            self._start(flight)

    def advance(self, now: float) -> None:
        """Sample until `now`: v grows, sequences that reach their length leave."""
        clock = self.seconds
        if now <= clock:
            return
        ends, tau, v = self._ends, self._tau, self.v
        while ends:
            each = tau[len(ends)]
            end = -ends[-1]
            reached = clock + (end - v) * each
            if reached > now:
                v += (now - clock) / each
                break
            clock, v = reached, end
            ends.pop()
        self.v, self.seconds = v, now

    def next_change(self) -> float | None:
        """When the next group will be done, or a waiting group find room; None if nothing runs."""
        if not self.running:
            return None
        ends, tau, v, clock = self._ends, self._tau, self.v, self.seconds
        target = self.running[0][0]
        room = -1
        if self.waiting and not self.draining:
            room = max(0, self._limit - len(self.waiting[0].lengths))
        n = len(ends)
        while n:
            end = -ends[n - 1]
            clock += (end - v) * tau[n]
            v = end
            n -= 1
            if end >= target or n <= room:
                break
        return clock

    def collect(self, now: float) -> list[Flight]:
        """Advance to `now` and give the groups that are done; waiting groups enter where there is room."""
        self.advance(now)
        running, v = self.running, self.v
        done = []
        while running and running[0][0] <= v:
            flight = heapq.heappop(running)[2]
            flight.actor = self.name
            if self.loads:
                flight.versions = self._token_versions(flight)
            done.append(flight)
        if not running:
            self.loads.clear()
        if self.waiting:
            self._enter()
        return done

    def hold(self, now: float, seconds: float) -> float:
        """Sample nothing for so long, beginning now or when it is free again; gives the end."""
        self.advance(now)
        self.seconds += seconds
        return self.seconds

    def switch(self, version: int, now: float) -> None:
        """Go on with other weights: key-value entries of running sequences are computed anew."""
        self.advance(now)
        if self.running:
            first = min(flight.entered for _, _, flight in self.running)
            self.loads = [load for load in self.loads if load[0] >= first]
            self.loads.append((self.v, version))
        self.version = version
        if self._prefill:
            tokens = sum(
                len(flight.lengths) * self._prompt
                + sum(min(length, self.v - flight.entered) for length in flight.lengths)
                for _, _, flight in self.running
            )
            self.seconds += tokens * self._prefill
        self.draining = False
        self._enter()

    def lose(self) -> list[Flight]:
        """The engine died: all its groups, with what was sampled of them lost."""
        lost = [flight for _, _, flight in self.running] + list(self.waiting)
        self.running.clear()
        self.waiting.clear()
        self._ends.clear()
        return lost

    def _enter(self) -> None:
        while self.waiting and not self.draining and self._has_room(self.waiting[0]):
            self._start(self.waiting.popleft())

    def _has_room(self, flight: Flight) -> bool:
        return not self._ends or len(self._ends) + len(flight.lengths) <= self._limit

    def _start(self, flight: Flight) -> None:
        """A group's first token: the prompt is shared, so one forward pass over it holds the engine up."""
        v, ends = self.v, self._ends
        flight.entered = v
        flight.versions = [(self.version, flight.tokens)]
        ends.extend([-v - length for length in flight.lengths])
        ends.sort()  # two runs to merge, in one call
        heapq.heappush(self.running, (v + max(flight.lengths), flight.group_id, flight))
        self.seconds += self._prompt * self._prefill

    def _token_versions(self, flight: Flight) -> list[tuple[int, int]]:
        """(version, tokens) of a group: those sampled after a load have the newer version."""
        entered, found = flight.entered, flight.versions
        for at, version in self.loads:
            had = at - entered  # tokens that each sample had by then, if it was that long
            if had < 0:
                continue
            later = 0.0
            for length in flight.lengths:
                if length > had:
                    later += length - had
            if not (newer := round(later)):
                continue
            older, tokens = found.pop()
            if tokens > newer:
                found.append((older, tokens - newer))
            found.append((version, newer))
        return found


def token_seconds(curve: Sequence[tuple[float, float]], most: int, limit: int) -> list[float]:
    """τ(n) for n = 0 … `most` from points (n, seconds a token), straight between them and beyond the last.

    Beyond `limit` sequences an engine takes turns: τ(n) = τ(limit) · n / limit.
    """
    points = sorted(curve)
    table = [_interpolate(points, min(n, limit)) * max(1.0, n / limit) for n in range(most + 1)]
    table[0] = table[1]
    return table


def _interpolate(points: Sequence[tuple[float, float]], n: float) -> float:
    if len(points) == 1 or n <= points[0][0]:
        return points[0][1]
    after = next((i for i, (at, _) in enumerate(points) if at >= n), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return max(1e-12, y0 + (y1 - y0) * (n - x0) / (x1 - x0))
