"""Limits how deeply JSON and TOML are nested, before a parser recurses into them: each Python has another limit."""

import re
from itertools import accumulate

# A string that is not closed extends to the end, so that the time is linear for any input.
_JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
_TOML_TEXT = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'  # up to two quotes can precede the three that close it
    r"|'''.*?'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|#[^\n]*",
    re.DOTALL,
)
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def json_opens_more_than(limit: int, text: str) -> bool:
    """Return whether JSON has more than `limit` arrays and objects, and so might be nested that deep."""
    return _opened(text) > limit and _opened(_JSON_STRING.sub("", text)) > limit


def toml_is_deeper_than(limit: int, text: str) -> bool:
    """Return whether TOML has arrays and inline tables within each other to a depth of more than `limit`."""
    if _opened(text) <= limit:
        return False
    brackets = re.findall(r"[\[\]{}]", _TOML_TEXT.sub("", text))
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > limit


def _opened(text: str) -> int:
    return text.count("[") + text.count("{")
