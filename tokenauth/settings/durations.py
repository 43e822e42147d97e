"""Durations as text: "90d", "24h", "5m", "30s", or seconds without a unit."""

import re
from decimal import Decimal

from tokenauth.errors import InvalidRequest

Duration = str | int
"""A duration as a client sends it: a text, or whole seconds."""

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "": 1}


def parse(text: str) -> float | None:
    """Return the seconds of a duration, or None if the text is not one."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", text)
    return float(match[1]) * _UNITS[match[2]] if match else None


def parse_exact(text: str) -> int | None:
    """Return the same for a text from a client: without blanks, and a whole number of seconds."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([smhd]?)", text)
    seconds = Decimal(match[1]) * _UNITS[match[2]] if match else None
    return int(seconds) if seconds is not None and seconds == int(seconds) else None


def checked(field: str, value: Duration, low: float, high: float) -> float:
    """Return the seconds of a client's duration. Raises InvalidRequest if it is not one from `low` to `high`."""
    seconds = parse_exact(value) if isinstance(value, str) else value
    if seconds is None or not low <= seconds <= high:
        bounds = f"from {in_units(low)} to {in_units(high)}"
        raise InvalidRequest(f"{field}: must be a duration {bounds}, such as '24h', or a number of seconds.")
    return seconds


def in_units(seconds: float) -> str:
    """Write a duration in the largest unit of which it is a multiple."""
    unit, size = next((unit, size) for unit, size in _UNITS.items() if seconds % size == 0)
    return f"{seconds / size:.15g}{unit}"
