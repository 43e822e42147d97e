"""The types of settings. Each declares which values are valid; the loader reports any other."""

from typing import Annotated

import msgspec
from msgspec import Meta

from tokenauth.models import SCOPE_PATTERN

TEN_YEARS = 10 * 365 * 86400.0


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the file. Each field declares its bounds; `__post_init__` checks fields against each other.

    The loader checks both. The bounds of a field are not checked when a record is created in Python.
    """


class SettingError(ValueError):
    """A value that cannot be used.

    `key` is its path in the table, `problem` a phrase such as "must be a string". `shown` quotes the value and is added
    to the problem, unless the value comes from an environment variable: that may be the wrong one, which has a secret.
    """

    def __init__(self, key: str, problem: str, shown: str = "") -> None:
        super().__init__(f"{key}: {problem}{shown}")
        self.key = key
        self.problem = problem


def between(low: int, high: int) -> Meta:
    return Meta(ge=low, le=high)


def duration(high: float = TEN_YEARS, low: float = 1) -> Meta:
    """Bound a number of seconds, which the file can also write as "30s", "5m", "24h" or "7d"."""
    return Meta(ge=low, le=high, extra={"duration": True})


def text(pattern: str, description: str, secret: bool = False) -> Meta:
    """Require that a string matches a pattern. An error has the `description` of valid strings, and shows no secret."""
    return Meta(pattern=rf"\A(?:{pattern})\Z", description=description, extra={"secret": secret})


def file_path(example: str) -> Meta:
    """Require the path of a file. A relative one begins in the working directory."""
    return Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z", description=f"a path such as {example!r}", extra={"path": True})


SECRET = Meta(extra={"secret": True})
"""Marks a field whose value no error shows."""

ScopeName = Annotated[str, text(SCOPE_PATTERN, "a word of printable ASCII without blanks, quotes or backslashes")]
