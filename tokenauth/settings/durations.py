"""Durations as text: "90d", "24h", "5m", "30s", or seconds without a unit."""

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "": 1}


def parse(text: str) -> float | None:
    """Return the seconds of a duration, or None if the text is not one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text)
    return float(match[1]) * _UNITS[match[2]] if match else None


def in_units(seconds: float) -> str:
    """Write a duration in the largest unit of which it is a multiple."""
    unit, size = next((unit, size) for unit, size in _UNITS.items() if seconds % size == 0)
    return f"{seconds / size:.15g}{unit}"
