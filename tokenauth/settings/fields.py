"""What all tables of the configuration have in common."""

import msgspec

from tokenauth.models import is_scope


class Duration(float):
    """Seconds, written as a number or as "30s", "5m", "24h", "7d"."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """A table of the file: it cannot be changed, and knows its keys."""


def check_between(key: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless a number is in its range."""
    if not low <= value <= high:
        raise ValueError(f"{key}: must be from {low:.15g} to {high:.15g}, and is {value:.15g}")


def check_scope(key: str, scope: str) -> None:
    """Raise ValueError unless a word can be a scope."""
    if not is_scope(scope):
        raise ValueError(f"{key}: {scope!r} is not printable ASCII with no blank, quote or backslash")
