"""Simulated time: what is due when, in seconds of wall clock or of work."""

import itertools
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Act = Callable[[Any, int], None]
_Event = tuple[float, int, Act, Any, int]


class Agenda:
    """Two clocks with the events that are due on each.

    In a second of wall clock `rate` seconds of work are done, for all work alike: a change of the rate moves
    every event of work at once and touches none of them. An event is called with what was put down for it.
    """

    def __init__(self) -> None:
        self.wall = 0.0
        self.work = 0.0
        self.rate = 1.0
        self._numbers = itertools.count()  # events at one moment happen in the order they were put down
        self._wall_events: list[_Event] = []
        self._work_events: list[_Event] = []

    def after(self, seconds: float, act: Act, what: Any = None) -> None:
        """An event after so many seconds of work."""
        self.at_work(self.work + seconds, act, what)

    def at_work(self, when: float, act: Act, what: Any = None, stamp: int = 0) -> None:
        """An event at a moment of the clock of work."""
        heappush(self._work_events, (when, next(self._numbers), act, what, stamp))

    def after_wall(self, seconds: float, act: Act, what: Any = None) -> None:
        """An event after so many seconds of wall clock."""
        heappush(self._wall_events, (self.wall + seconds, next(self._numbers), act, what, 0))

    def advance(self) -> bool:
        """Let time pass until whatever is due first, and let it happen; false where nothing is due."""
        work, wall = self._work_events, self._wall_events
        if work and not (wall and wall[0][0] - self.wall < (work[0][0] - self.work) / self.rate):
            at, _, act, what, stamp = heappop(work)
            if at > self.work:
                self.wall += (at - self.work) / self.rate
                self.work = at
        elif wall:
            at, _, act, what, stamp = heappop(wall)
            if at > self.wall:
                self.work += (at - self.wall) * self.rate
                self.wall = at
        else:
            return False
        act(what, stamp)
        return True
