"""Finds the line of a key in a TOML file: tomllib does not say where a value came from."""

import re
from collections import Counter
from collections.abc import Iterator

_KEY = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_PATH = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_PATH})\s*\]")
_STATEMENT = re.compile(rf"\s*({_PATH})\s*=")


def find_line(text: str, path: str) -> int | None:
    """Return the number of the line that sets a key path such as "users[0].password", or else of its table."""
    lines = dict(reversed(list(_key_paths(text))))  # the first line of a path counts
    while path and path not in lines:
        path = re.sub(r"(\[\d+\]|\.[^.\[]+|^[^.\[]+)$", "", path)
    return lines.get(path)


def _key_paths(text: str) -> Iterator[tuple[str, int]]:
    """Yield the path of each key and of each table, with its line. Lines of a long string may look like keys."""
    table, arrays = "", Counter[str]()
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            table = _plain(header[2])
            if header[1] == "[[":
                arrays[table] += 1
                table = f"{table}[{arrays[table] - 1}]"
            yield table, number
        elif statement := _STATEMENT.match(line):
            yield f"{table}.{_plain(statement[1])}".lstrip("."), number


def _plain(path: str) -> str:
    return ".".join(key.strip("\"'") for key in re.findall(_KEY, path))
