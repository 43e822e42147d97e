"""What was found, as a table for people and as JSON for programs."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.figures import Figure, Row

Facts = Mapping[str, str | int]

_HEADS = ("what", "measured", "at least", "aim", "verdict", "rounds", "per second", "p99 ms")


def table(facts: Facts, bare_rates: Sequence[float], rows: Sequence[Row]) -> str:
    """Write everything as text."""
    head = [
        "{cpu}, {cores} cores; Python {python}, uvicorn {uvicorn}, SQLite {sqlite}, on {filesystem}".format(**facts)
        + (f", PostgreSQL {facts['postgres']}" if "postgres" in facts else ""),
    ]
    if bare_rates:
        head.append(
            f"the limit: the bare HTTP server answers {median(bare_rates):,.0f} requests a second here (median)"
        )
    head.append("Rates and milliseconds hold for this machine at this hour; what can be compared are the ratios.")
    cells = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(_align(line, widths)).rstrip() for line in cells]
    notes = [f"{row.figure.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*head, "", lines[0], "  ".join("-" * width for width in widths), *lines[1:], "", *notes]).rstrip()


def document(facts: Facts, bare_rates: Sequence[float], rows: Sequence[Row]) -> dict[str, Any]:
    """Make one JSON document of everything, with all rounds."""
    bare = {"median": median(bare_rates) if bare_rates else None, "rounds": list(bare_rates)}
    return {"machine": dict(facts), "bare_rate": bare, "rows": [_record(row) for row in rows]}


def _record(row: Row) -> dict[str, Any]:
    figure = row.figure
    return {
        "name": figure.name,
        "what": figure.title,
        "unit": figure.unit or "ratio",
        "measured": row.measured,
        "at_least": figure.at_least,
        "aim": figure.aim,
        "smaller_is_better": figure.smaller_is_better,
        "verdict": row.verdict,
        "rate": row.rate,
        "p99_ms": row.p99_ms,
        "rounds": [sample._asdict() for sample in row.samples],
    }


def _cells(row: Row) -> tuple[str, ...]:
    figure = row.figure
    return (
        figure.title,
        figure.show(row.measured),
        _bound(figure, figure.at_least),
        _bound(figure, figure.aim),
        row.verdict,
        " - ".join(map(figure.show, row.range)) if len(row.samples) > 1 else "",
        "" if row.rate is None else f"{row.rate:,.0f}",
        "" if row.p99_ms is None else f"{row.p99_ms:.2f}",
    )


def _bound(figure: Figure, value: float | None) -> str:
    return "" if value is None else f"{'<=' if figure.smaller_is_better else '>='} {figure.show(value)}"


def _align(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    return [first, *(cell.strip().rjust(len(cell)) for cell in others)]
