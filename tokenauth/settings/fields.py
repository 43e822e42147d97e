"""The types of settings: each declares what its values can be, and the loader says so when one is something else."""

from typing import Annotated

import msgspec
from msgspec import Meta

from tokenauth.models import SCOPE_PATTERN

TEN_YEARS = 10 * 365 * 86400.0


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the file. What one field can be is declared on it; `__post_init__` checks what fields can be together.

    Both are checked when a file is loaded. A record that is made directly must keep to its fields' bounds by itself.
    """


class SettingError(ValueError):
    """A value that cannot be used: `key` leads to it from the table, and `problem` is a phrase."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


def between(low: int, high: int) -> Meta:
    """Bound a number."""
    return Meta(ge=low, le=high)


def duration(low: float = 1, high: float = TEN_YEARS) -> Meta:
    """Bound a number of seconds, which the file can also write as "30s", "5m", "24h" or "7d"."""
    return Meta(ge=low, le=high, extra={"duration": True})


def text(pattern: str, description: str, secret: bool = False) -> Meta:
    """Hold a string to a pattern. Errors say that it must be `description`, and do not show a secret."""
    return Meta(pattern=rf"\A(?:{pattern})\Z", description=description, extra={"secret": secret})


SECRET = Meta(extra={"secret": True})
"""Marks a field whose value no error shows."""

ScopeName = Annotated[str, text(SCOPE_PATTERN, "a word of printable ASCII without blanks, quotes or backslashes")]
