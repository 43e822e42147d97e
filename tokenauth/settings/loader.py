"""The configuration file: TOML and the environment in, records out, and one clear line for each mistake."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import msgspec

from tokenauth.errors import ConfigError
from tokenauth.nesting import toml_is_deeper_than
from tokenauth.settings.fields import Duration, Table
from tokenauth.settings.model import Settings


def find(path: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Say which file holds: the one named, then TOKENAUTH_CONFIG, then ./config.toml."""
    return Path(path or environ.get("TOKENAUTH_CONFIG") or "config.toml")


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the file; a mistake in it raises ConfigError, one line with the key path."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one with --config or TOKENAUTH_CONFIG") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    with naming(path):
        return parse(text, environ)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have a ConfigError name the file in which the mistake is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str, environ: Mapping[str, str] = os.environ) -> Settings:
    """Make records of TOML text; a mistake in it raises ConfigError, one line with the key path."""
    tree = parse_toml(text)
    from_environment = _expand(tree, environ)
    while True:
        try:
            return msgspec.convert(tree, Settings, dec_hook=_decode)
        except msgspec.ValidationError as error:
            problem, _, at = str(error).partition(" - at `$")
            path = _whole(at.rstrip("`").lstrip("."), tree)
            spot = from_environment.pop(path, None)
            if spot is None:
                raise ConfigError(_explain(problem, path)) from None
            if not _reread(spot.holder, spot.key):
                raise ConfigError(f"{_explain(problem, path)}, from {spot.text}") from None


_MAX_DEPTH = 32
_TOO_DEEP = f"arrays and tables are nested more than {_MAX_DEPTH} deep"


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises ConfigError, one line."""
    if toml_is_deeper_than(_MAX_DEPTH, text):
        raise ConfigError(_TOO_DEEP)
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"not TOML: {error}") from None


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


class _Filled(NamedTuple):
    """A string into which the environment's values were put: where it stands, and what the file has there."""

    holder: Any
    key: str | int
    text: str


def _expand(tree: dict[str, Any], environ: Mapping[str, str]) -> dict[str, _Filled]:
    """Put the environment's values into the strings that ask for them; say where that was, by key path."""
    changed = {}
    for path, (holder, key) in list(_strings(tree, "", _MAX_DEPTH)):
        text = holder[key]

        if "${" in _VARIABLE.sub(lambda match: match[2] or "", text):
            raise ConfigError(f"{path}: has a '${{' that begins neither ${{NAME}} nor ${{NAME:-default}}")

        def value(match: re.Match[str], path: str = path) -> str:
            found = environ.get(match[1]) or (environ.get(match[1]) if match[2] is None else match[2])
            if found is None:
                raise ConfigError(
                    f"{path}: the environment has no {match[1]}; set it, or write ${{{match[1]}:-default}}"
                )
            if not found.isprintable():
                raise ConfigError(f"{path}: what the environment has as {match[1]} is not printable text")
            return found

        holder[key] = _VARIABLE.sub(value, text)
        if holder[key] != text:
            changed[path] = _Filled(holder, key, text)
    return changed


def _strings(node: Any, path: str, depth: int) -> Iterator[tuple[str, Spot]]:
    if depth == 0:
        raise ConfigError(f"{path.partition('.')[0]}: {_TOO_DEEP}")
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        here = f"{path}[{key}]" if isinstance(node, list) else _key(path, str(key))
        if isinstance(value, str):
            yield here, (node, key)
        elif isinstance(value, dict | list):
            yield from _strings(value, here, depth - 1)


def _reread(holder: Any, key: str | int) -> bool:
    """Take a string from the environment for the number or the truth value that it spells."""
    try:
        holder[key] = msgspec.convert(holder[key], bool | int | float, strict=False)
    except msgspec.ValidationError:
        return False
    return True


def _key(path: str, name: str) -> str:
    """Write the path of a key as TOML has it."""
    bare = name if re.fullmatch(r"[\w-]+", name) else json.dumps(name, ensure_ascii=not name.isprintable())
    return f"{path}.{bare}".lstrip(".")


def _whole(path: str, tree: dict[str, Any]) -> str:
    """Put the name into a path where msgspec has none: it says `pools[...]` of any pool."""
    head, unnamed, tail = path.partition("[...]")
    if not unnamed:
        return path
    for name, table in tree[head].items():
        try:
            msgspec.convert(table, _kind(_key(head, name)), dec_hook=_decode)
        except msgspec.ValidationError:
            return _key(head, name) + tail
    return head


def _kind(path: str) -> Any:
    """Return the type of what stands at `path`."""
    kind: Any = Settings
    for part in re.findall(r'"(?:[^"\\]|\\.)*"|[^.\[\]]+', path):
        if get_origin(kind) in {dict, tuple}:
            kind = next(one for one in reversed(get_args(kind)) if one is not Ellipsis)
        else:
            kind = next(field.type for field in msgspec.structs.fields(kind) if field.encode_name == part)
            if get_origin(kind) is UnionType:
                kind = get_args(kind)[0]
    return kind


def _keys(path: str) -> list[str]:
    """List the keys that may stand in the table at `path`."""
    kind = _kind(path)
    if not isinstance(kind, type) or not issubclass(kind, Table):
        return []
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def _explain(problem: str, path: str) -> str:
    if problem.partition(":")[0] in _keys(path):
        return f"{path}.{problem}".lstrip(".")
    unknown = re.search(r"unknown field `(.*)`", problem, re.DOTALL)
    if unknown is None:
        missing = re.search(r"missing required field `(.*)`", problem)
        if missing is not None:
            return f"{path}.{missing[1]}: is missing"
        return f"{path}: {problem[0].lower()}{problem[1:]}" if path else problem
    known = _keys(path)
    close = difflib.get_close_matches(unknown[1], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{_key(path, unknown[1])}: there is no such key; {hint}"
