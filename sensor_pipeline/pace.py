"""How fast readings come in and are ingested, from what is seen of a topic's offsets time and again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Batches come and go within seconds, so that a shorter look would see only their rhythm.
_SHORTEST_SECONDS = 60
_LONGEST_SECONDS = 180
# Not behind: a lag that this many seconds of readings make, or a rate that is short by no more than noise.
_TOLERATED_SECONDS = 30
_TOLERATED_SHARE = 0.1


@dataclass(frozen=True)
class Pace:
    """Offsets a second that came in and that were ingested, over some minutes, and how many are left."""

    arriving: float
    ingested: float
    lag: int

    @property
    def falls_behind(self) -> bool:
        """Whether more comes in than is ingested, and what is left is more than batches leave in their rhythm."""
        too_slow = self.ingested < (1 - _TOLERATED_SHARE) * self.arriving
        return too_slow and self.lag > _TOLERATED_SECONDS * self.arriving


class PaceWatch:
    """Remembers what was seen over the last minutes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def see(self, now: float, end: int, lag: int) -> Pace | None:
        """Note a topic's end offsets and what is left of them, both summed up over its partitions.

        Args:
            now: seconds by any clock that only goes forward.

        Returns:
            The pace since about three minutes ago; None as long as less than one minute was seen.
        """
        self._seen.append((now, end, end - lag))
        while len(self._seen) > 1 and now - self._seen[1][0] >= _LONGEST_SECONDS:
            self._seen.popleft()
        since, first_end, first_done = self._seen[0]
        seconds = now - since
        if seconds < _SHORTEST_SECONDS:
            return None
        return Pace((end - first_end) / seconds, (end - lag - first_done) / seconds, lag)
