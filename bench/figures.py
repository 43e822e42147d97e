"""Figures: what is promised, what was measured, and what to think of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import NamedTuple

Pair = tuple[float, float]


class Sample(NamedTuple):
    """What one round found: the value that the figure is about, and what is told besides."""

    value: float
    rate: float | None = None
    p99_ms: float | None = None
    note: str = ""


Sampler = Callable[[], Sample]
"""Measures once."""


class Figure(NamedTuple):
    """One line of the table, before it is measured."""

    name: str
    title: str
    at_least: float | None
    aim: float | None
    """What is wanted; of some nothing is."""
    unit: str
    prepare: Callable[[], AbstractContextManager[Sampler]]
    times: int | None = None
    """How often it is measured: in each round, beside the others, or so often, alone."""

    @property
    def smaller_is_better(self) -> bool:
        """Whether `at_least` is really an "at most"."""
        return self.at_least is not None and self.aim is not None and self.aim < self.at_least

    def show(self, value: float) -> str:
        """Write a value of this figure."""
        digits = 0 if self.unit in {"MB", "/s"} else 2
        return f"{value:,.{digits}f} {self.unit}".strip()


class Row(NamedTuple):
    """One line of the table."""

    figure: Figure
    samples: Sequence[Sample]

    @property
    def measured(self) -> float:
        """The median of the rounds."""
        return median(sample.value for sample in self.samples)

    @property
    def range(self) -> Pair:
        """The least and the greatest of the rounds."""
        values = [sample.value for sample in self.samples]
        return min(values), max(values)

    @property
    def rate(self) -> float | None:
        """Requests a second."""
        return _median([sample.rate for sample in self.samples])

    @property
    def p99_ms(self) -> float | None:
        """Milliseconds within which 99 of 100 requests were answered."""
        return _median([sample.p99_ms for sample in self.samples])

    @property
    def note(self) -> str:
        """What is to be said about the last round."""
        return self.samples[-1].note

    @property
    def verdict(self) -> str:
        """Whether the aim is reached, or at least what must be."""
        sign = -1 if self.figure.smaller_is_better else 1
        value = self.measured * sign
        if self.figure.at_least is None or self.figure.aim is None:
            return ""
        if value >= self.figure.aim * sign:
            return "aim"
        return "ok" if value >= self.figure.at_least * sign else "below"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
