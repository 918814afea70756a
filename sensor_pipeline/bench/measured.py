"""A figure: values of some rounds against what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Bound:
    """What a figure must reach: at least, or at most, `limit`; `aim` is what would be good."""

    limit: float
    aim: float
    at_least: bool = True

    def holds(self, value: float) -> bool:
        """Whether the value reaches the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    `values` are the figure of each round, in `unit` (`x`: a ratio to the reference of the same round). `subject` and
    `reference` say in words what was measured and against what, in absolute terms, by their medians; `stages` is the
    profile: microseconds a reading that batches spent in each.
    """

    title: str
    values: Sequence[float]
    unit: str
    bound: Bound | None
    subject: str = ""
    reference: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median."""
        return median(self.values)

    @property
    def reaches(self) -> bool | None:
        """Whether it is what was asked for; None where nothing was."""
        return None if self.bound is None else self.bound.holds(self.value)


def per_second(readings: int, seconds: Sequence[float]) -> str:
    """A rate in words, by the median."""
    return f"{readings / median(seconds):,.0f} readings/s"
