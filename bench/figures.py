"""Figures: what must be reached, what was measured, and the verdict."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx

from bench import machine

_FAILURES = (RuntimeError, OSError, httpx.HTTPError, subprocess.SubprocessError)
"""What ends a row and not the benchmark."""


class Sample(NamedTuple):
    """The result of one round."""

    value: float
    rate: float | None = None
    """Requests per second."""
    p99_ms: float | None = None
    note: str = ""
    p999_ms: float | None = None
    points: Sequence[float] = ()
    """The value for each of several sizes, for the chart."""


Sampler = Callable[[], Sample]
"""Measures one round."""


class Figure(NamedTuple):
    """One line of the table, before it is measured."""

    name: str
    title: str
    bound: float | None
    """The value that must be reached; None if the figure is only shown."""
    unit: str
    """Empty for a ratio."""
    prepare: Callable[[], AbstractContextManager[Sampler]]
    at_most: bool = False
    """Smaller is better: `bound` must not be exceeded."""
    rounds: int | None = None
    """Number of rounds, if it is not that of all figures."""

    def show(self, value: float) -> str:
        """Format a value of this figure."""
        digits = 0 if self.unit in {"MB", "/s", "bytes", "us"} else 2
        return f"{value:,.{digits}f} {self.unit}".strip()


class Row(NamedTuple):
    """One line of the table."""

    figure: Figure
    samples: Sequence[Sample]
    problem: str = ""
    """Why rounds are missing."""

    @property
    def measured(self) -> float | None:
        """The median of the rounds."""
        return _median([sample.value for sample in self.samples])

    @property
    def rate(self) -> float | None:
        """The median of the requests per second."""
        return _median([sample.rate for sample in self.samples])

    @property
    def p99_ms(self) -> float | None:
        """The median of the 99th percentiles of the response time."""
        return _median([sample.p99_ms for sample in self.samples])

    @property
    def p999_ms(self) -> float | None:
        """The median of the 99.9th percentiles of the response time."""
        return _median([sample.p999_ms for sample in self.samples])

    @property
    def points(self) -> Sequence[float]:
        """The medians of the values for several sizes."""
        return [median(values) for values in zip(*(sample.points for sample in self.samples), strict=True)]

    @property
    def note(self) -> str:
        """The problem, or the note of the last round."""
        return self.problem or (self.samples[-1].note if self.samples else "")

    @property
    def verdict(self) -> str:
        """Whether the bound is reached."""
        if self.measured is None:
            return "not measured"
        if self.figure.bound is None:
            return ""
        sign = -1 if self.figure.at_most else 1
        return "ok" if self.measured * sign >= self.figure.bound * sign else "missed"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def measure(figure: Figure, rounds: int, deadline: float, directory: Path) -> Row:
    """Measure a figure in rounds. A failure, or the deadline, ends its row, and the others are still measured."""
    samples: list[Sample] = []
    problem = ""
    rounds = figure.rounds or rounds
    try:
        if time.monotonic() < deadline:
            log_progress(f"{figure.name}: preparing")
            with figure.prepare() as sample:
                while len(samples) < rounds and time.monotonic() < deadline:
                    log_progress(f"{figure.name}: round {len(samples) + 1} of {rounds}")
                    machine.page_in(directory)
                    samples.append(sample())
    except _FAILURES as error:
        problem = f"{type(error).__name__}: {error}"
        log_progress(f"{figure.name}: {problem}")
    if len(samples) < rounds:
        problem = f"{len(samples)} of {rounds} rounds: {problem or 'the time was up (--minutes)'}"
    row = Row(figure, samples, problem)
    if row.measured is not None:  # now, in case that the benchmark does not get to its end
        log_progress(f"{figure.name}: {figure.show(row.measured)}; {row.note}")
    return row


_began = time.monotonic()


def log_progress(what: str) -> None:
    """Print progress to standard error."""
    sys.stderr.write(f"[{time.monotonic() - _began:5.0f} s] {what}\n")
