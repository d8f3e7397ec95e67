"""The time of a whole audit: how it is shared out, and when a part has to end."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from utils.journal import Journal
from utils.script import Stop

#: Share of its time that a part plans iterations for; the rest is for scoring, and for steps that
#: take longer than the ones that were measured.
PLANNED = 0.7
#: Share of a part's time after which its attack ends, so that its controls can be as long and the
#: test has the rest.
OF_THE_ATTACK = 0.4
#: Name under which a journal holds the seconds that a part has taken.
ELAPSED = "elapsed"


class Budget:
    """Shares a wall-clock time among parts of known weights, in the order in which they come.

    A part gets of the time that is left its weight's share of the weights of all parts that are
    still to come, itself included. So what a part does not use goes to the later ones, and one
    that took too long takes from them.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        """Start the clock."""
        self.seconds, self._clock = seconds, clock
        self._start, self._to_come = clock(), 0.0

    def add(self, weights: float) -> None:
        """Add the weights of parts that are to come."""
        self._to_come += weights

    def go_on(self, spent: float) -> None:
        """Count the `spent` seconds of a killed audit in the place of those since the start."""
        self._start = self._clock() - spent

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self.seconds - self.spent)

    def forecast(self, weight: float) -> float:
        """Return the seconds of a part to come if every part before it uses all of its own."""
        return self.left * weight / self._to_come

    def share(self, weight: float) -> float:
        """Return the seconds of the next part, which leaves those that are to come."""
        share = self.forecast(weight)
        self._to_come -= weight
        return share


class Watch:
    """Measures what a part takes, together with what it took before its audit was killed."""

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.monotonic):
        """Start; from now on every save writes the seconds until then."""
        self._clock = clock
        self._start = clock() - (journal.recall(ELAPSED) or 0.0)
        journal.note(ELAPSED, lambda: self.seconds, always=True)

    @property
    def seconds(self) -> float:
        """Seconds that the part has taken."""
        return self._clock() - self._start


class Deadline:
    """Asks work to end when a signal came or a time is over; a `Stop`.

    Time that is over counts only once the work has asked: what ended by itself was not stopped.
    """

    def __init__(self, seconds: float, others: Stop, clock: Callable[[], float] = time.monotonic):
        """Let `seconds` pass from now. others: what else ends the work, a signal."""
        self._others, self._clock, self._end = others, clock, clock() + seconds
        #: Whether the work was told that its time is over.
        self.is_late = False

    @property
    def should_stop(self) -> bool:
        """Whether a signal came or the time is over."""
        if self._others.should_stop:
            return True
        self.is_late = self.is_late or self._clock() >= self._end
        return self.is_late

    @property
    def stopped(self) -> bool:
        """Whether a signal came, or the work was told that its time is over."""
        return self.is_late or self._others.stopped


@dataclass(frozen=True)
class Pace:
    """Says what one iteration takes, in seconds."""

    #: With the client's gradient, or another one.
    attack: float
    #: With priors alone.
    prior: float

    @property
    def with_controls(self) -> float:
        """Of the attack and both controls that iterate, in seconds."""
        return 2 * self.attack + self.prior

    def iterations(self, seconds: float, most: int) -> int:
        """Return how many iterations, controls included, fit into a part of `seconds`."""
        return min(most, int(PLANNED * seconds / max(self.with_controls, 1e-9)))
