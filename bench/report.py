"""The results, as a table for people and as JSON for programs."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.figures import Figure, Row

Facts = Mapping[str, str | int]

_HEADS = ("what", "measured", "bound", "verdict", "rounds", "per second", "p99 ms")


def table(facts: Facts, bare_rates: Sequence[float], rows: Sequence[Row]) -> str:
    """Return everything as text."""
    head = [
        "{cpu}, {cores} cores; Python {python}, uvicorn {uvicorn}, SQLite {sqlite}, on {filesystem}".format(**facts)
        + (f", PostgreSQL {facts['postgres']}" if "postgres" in facts else ""),
    ]
    if bare_rates:
        head.append(f"limit: the bare ASGI function answers {median(bare_rates):,.0f} requests per second (median)")
    head.append("Compare the ratios: rates and milliseconds are those of this machine at this time.")
    cells = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(_align(line, widths)).rstrip() for line in cells]
    notes = [f"{row.figure.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*head, "", lines[0], "  ".join("-" * width for width in widths), *lines[1:], "", *notes]).rstrip()


def document(facts: Facts, bare_rates: Sequence[float], rows: Sequence[Row]) -> dict[str, Any]:
    """Return everything, with all rounds, as a JSON document."""
    bare = {"median": median(bare_rates) if bare_rates else None, "rounds": list(bare_rates)}
    return {"machine": dict(facts), "bare_rate": bare, "rows": [_record(row) for row in rows]}


def _record(row: Row) -> dict[str, Any]:
    figure = row.figure
    return {
        "name": figure.name,
        "what": figure.title,
        "unit": figure.unit or "ratio",
        "measured": row.measured,
        "bound": figure.bound,
        "at_most": figure.at_most,
        "verdict": row.verdict,
        "problem": row.problem,
        "rate": row.rate,
        "p99_ms": row.p99_ms,
        "p999_ms": row.p999_ms,
        "rounds": [sample._asdict() for sample in row.samples],
    }


def _cells(row: Row) -> tuple[str, ...]:
    figure = row.figure
    values = [sample.value for sample in row.samples]
    return (
        figure.title,
        "" if row.measured is None else figure.show(row.measured),
        _bound(figure),
        row.verdict,
        " - ".join(map(figure.show, (min(values), max(values)))) if len(values) > 1 else "",
        "" if row.rate is None else f"{row.rate:,.0f}",
        "" if row.p99_ms is None else f"{row.p99_ms:.2f}",
    )


def _bound(figure: Figure) -> str:
    return "" if figure.bound is None else f"{'<=' if figure.at_most else '>='} {figure.show(figure.bound)}"


def _align(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    return [first, *(cell.strip().rjust(len(cell)) for cell in others)]
