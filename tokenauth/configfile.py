"""The configuration file: TOML and the environment in, records out, and one clear line for each mistake."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgspec

from tokenauth.config import Config, Duration, Section
from tokenauth.errors import ConfigError


def find(path: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Say which file holds: the one named, then TOKENAUTH_CONFIG, then ./config.toml."""
    return Path(path or environ.get("TOKENAUTH_CONFIG") or "config.toml")


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the file; a mistake in it raises ConfigError, one line with the key path."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one with --config or TOKENAUTH_CONFIG") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return parse(text, environ)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str, environ: Mapping[str, str] = os.environ) -> Config:
    """Make records of TOML text; a mistake in it raises ConfigError, one line with the key path."""
    try:
        tree = tomllib.loads(text)
        from_environment = _expand(tree, environ)
    except RecursionError:
        raise ConfigError("not TOML: nested too deep") from None
    except ValueError as error:
        raise ConfigError(f"not TOML: {error}") from None
    while True:
        try:
            return msgspec.convert(tree, Config, dec_hook=_decode)
        except msgspec.ValidationError as error:
            problem, _, at = str(error).partition(" - at `$")
            path = at.rstrip("`").lstrip(".")
            spot = from_environment.pop(path, None)
            if spot is None or not _reread(*spot):
                raise ConfigError(_explain(problem, path)) from None


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _decode(kind: type, value: object) -> object:
    """Read what msgspec has no word for: durations."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", value)
        if match is not None:
            return Duration(float(match[1]) * _UNITS[match[2]])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return Duration(value)
    raise ValueError(f"{str(value)[:80]!r} is not a duration such as '24h', '5m', '30s' or a number of seconds")


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")

Spot = tuple[Any, str | int]
"""A table or an array, and the key or the index in it."""


def _expand(tree: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Spot]:
    """Put the environment's values into the strings that ask for them; say where that was, by key path."""
    changed = {}
    for path, (holder, key) in list(_strings(tree, "")):
        text = holder[key]

        def value(match: re.Match[str], path: str = path) -> str:
            found = environ.get(match[1], match[2])
            if found is None:
                raise ConfigError(
                    f"{path}: the environment has no {match[1]}; set it, or write ${{{match[1]}:-default}}"
                )
            if not found.isprintable():
                raise ConfigError(f"{path}: what the environment has as {match[1]} is not printable text")
            return found

        holder[key] = _VARIABLE.sub(value, text)
        if holder[key] != text:
            changed[path] = (holder, key)
    return changed


def _strings(node: Any, path: str) -> Iterator[tuple[str, Spot]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        here = f"{path}[{key}]" if isinstance(node, list) else f"{path}.{key}".lstrip(".")
        if isinstance(value, str):
            yield here, (node, key)
        elif isinstance(value, dict | list):
            yield from _strings(value, here)


def _reread(holder: Any, key: str | int) -> bool:
    """Take a string from the environment for the number or the truth value that it spells."""
    try:
        holder[key] = msgspec.convert(holder[key], bool | int | float, strict=False)
    except msgspec.ValidationError:
        return False
    return True


def _explain(problem: str, path: str) -> str:
    if problem.partition(":")[0] in _keys(path):
        return f"{path}.{problem}".lstrip(".")
    unknown = re.search(r"unknown field `(.*)`", problem, re.DOTALL)
    if unknown is None:
        missing = re.search(r"missing required field `(.*)`", problem)
        if missing is not None:
            return f"{path}.{missing[1]}: is missing"
        return f"{path}: {problem[0].lower()}{problem[1:]}" if path else problem
    name = unknown[1] if unknown[1].isprintable() else repr(unknown[1])
    key = f"{path}.{name}".lstrip(".")
    known = _keys(path)
    close = difflib.get_close_matches(unknown[1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{key}: there is no such key; {hint}"


def _keys(path: str) -> list[str]:
    """List the keys that may stand in the table at `path`."""
    kind: Any = Config
    for part in re.findall(r"\w+", path):
        if not part.isdigit():
            kind = next(field.type for field in msgspec.structs.fields(kind) if field.name == part)
            kind = next(iter(get_args(kind)), kind)
    if not issubclass(kind, Section):
        return []
    return [field.encode_name for field in msgspec.structs.fields(kind)]
