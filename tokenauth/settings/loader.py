"""Loads TOML with environment variables into typed settings. A mistake becomes an error of one line."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, time
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from tokenauth.errors import ConfigError
from tokenauth.nesting import toml_is_deeper_than
from tokenauth.settings import durations, htpasswd
from tokenauth.settings.fields import SettingError, Table
from tokenauth.settings.files_read import FilesRead, open_regular
from tokenauth.settings.model import ServerSettings, Settings

T = TypeVar("T", bound=Table)


OWN, SHIPPED = Path("tokenauth.toml"), Path("config.toml")
"""In the working directory: the file that `tokenauth init` writes, and the one that the checkout has."""


def find(path: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the file: the one given, or TOKENAUTH_CONFIG, or what is in the working directory.

    Raises ConfigError.
    """
    if path == "":
        raise ConfigError("--config: is empty; name a file, or leave the option out")
    own = OWN if OWN.exists() else SHIPPED
    return Path(path or environ.get("TOKENAUTH_CONFIG") or own)


def load(path: Path, environ: Mapping[str, str] = os.environ, files: FilesRead | None = None) -> Settings:
    """Read the file. Raises ConfigError: one line with the key path, what is wrong, and a hint.

    `files` gets all files that are read.
    """
    if files is not None:
        files.note(path)
    text = read(path, environ)
    with naming(path):
        return parse(text, environ, files)


def read(path: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Return the text of the file. Raises ConfigError."""
    fix = "name another one with --config"
    if path == Path(environ.get("TOKENAUTH_CONFIG", "")):
        fix = "change TOKENAUTH_CONFIG in the environment, which names it"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # TOML knows which line ends it allows
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; write one with `tokenauth init`, or {fix}") from None
    except PermissionError as error:
        fix = "run this as the user of the service, or let this user read it"
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {fix}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; {fix}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {not_utf8(error)}") from None


@contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """Put the path of a file or of a key in front of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def parse(text: str, environ: Mapping[str, str] = os.environ, files: FilesRead | None = None) -> Settings:
    """Read TOML text. Raises ConfigError as `load` does."""
    return _read_tree(parse_toml(text), environ, FilesRead() if files is None else files)


def examine(
    text: str, environ: Mapping[str, str] = os.environ
) -> tuple[Settings | None, Sequence[str], Collection[str]]:
    """Read TOML text as far as possible: return the settings, all mistakes, and the keys whose variables are missing.

    Each mistake is the message of a ConfigError. A key whose variable is missing counts as absent; inside an array, the
    variable counts as empty, and a user of whom something is missing is left out. After any other mistake there are no
    settings.
    """
    mistakes: list[str] = []
    missing: dict[str, list[str]] = {}
    settings = None
    try:
        settings = _read_tree(parse_toml(text), environ, FilesRead(), mistakes, missing)
    except ConfigError as error:
        mistakes.append(str(error))
    others = [mistake for mistake in dict.fromkeys(mistakes) if mistake.partition(": ")[0] not in missing]
    if settings is not None:
        incomplete = {path.partition("].")[0] for path in missing}
        users = [user for at, user in enumerate(settings.users) if f"users[{at}" not in incomplete]
        settings = msgspec.structs.replace(settings, users=tuple(users))
    return (None if mistakes else settings), [*chain.from_iterable(missing.values()), *others], missing.keys()


def _read_tree(
    tree: dict[str, Any],
    environ: Mapping[str, str],
    files: FilesRead,
    mistakes: list[str] | None = None,
    missing: dict[str, list[str]] | None = None,
) -> Settings:
    if isinstance(tree.get("users_file"), str):  # the short form
        tree["users_file"] = {"path": tree["users_file"]}
    settings = _Reader(_substitute(tree, environ, files, missing), mistakes).table(Settings, tree, "")
    if not settings.users_file.path:
        return settings
    files.note(settings.users_file.path)
    more = htpasswd.read(settings.users_file, settings.users_by_name)
    return msgspec.structs.replace(settings, users=(*settings.users, *more))


def override(settings: Settings, **options: object) -> Settings:
    """Replace settings of `server` by options of a command, unless they are None. Raises ConfigError."""
    given = {key: value for key, value in options.items() if value is not None}
    types = {field.encode_name: field.type for field in msgspec.structs.fields(ServerSettings)}
    values = {key: _Reader({}).value(types[key], value, f"--{key}") for key, value in given.items()}
    return msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, **values))


def find_paths(settings: Settings) -> dict[str, str]:
    """Return all settings that are paths, by key. Empty ones are not set."""
    tables = ((name, getattr(settings, name)) for name in _fields(Settings))
    paths = {
        _join(name, key): getattr(table, field.name)
        for name, table in tables
        if isinstance(table, Table)
        for key, field in _fields(type(table)).items()
        if _Field.of(field.type).option("path")
    }
    scheme, _, location = settings.database.url.partition(":///")
    paths["database.url"] = location if scheme.startswith("sqlite") else ""
    return paths


def describe_relative_paths(settings: Settings) -> str:
    """Say where relative paths begin, and which settings have one; "" if none has."""
    keys = [key for key, path in find_paths(settings).items() if path and not os.path.isabs(path)]
    return f"relative paths begin in {Path.cwd()}: {', '.join(keys)}" if keys else ""


_MAX_DEPTH = 32
_TOO_DEEP = f"arrays and tables are nested more than {_MAX_DEPTH} deep"


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises ConfigError, one line."""
    if toml_is_deeper_than(_MAX_DEPTH, text):
        raise ConfigError(_TOO_DEEP)
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"not TOML: {_explain(str(error), text)}") from None


def not_utf8(error: UnicodeDecodeError) -> str:
    """Say where a file is not UTF-8, and what to do."""
    line = error.object[: error.start].count(b"\n") + 1
    return f"line {line} is not UTF-8: save the file as UTF-8"


# Before Python 3.14, tomllib gives the place of a mistake only in its message.
_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_KEY = r"""\s*(?P<key>(?:[\w.-]|"[\w. -]*"|'[\w. -]*')+)\s*=\s*"""
_STATEMENT = re.compile(_KEY + "(?P<value>.*)", re.ASCII)
_UNCLOSED = re.compile(_KEY + "'[^']*$", re.ASCII)
_LONG_NUMBER = re.compile(r"^[\w .\"'-]+=\s*[+-]?[0-9_]{4300,}", re.ASCII | re.MULTILINE)
_HEADER = re.compile(r"\s*(\[{1,2}[\w.-]+\]{0,2})\s*(?:#.*)?$", re.ASCII)


def _explain(message: str, text: str) -> str:
    """Add the beginning of the line to a message of tomllib, and a hint. Values are not shown: they may be secret."""
    place = _PLACE.search(message)
    if place is None:
        long = _LONG_NUMBER.search(text)
        if long is None:
            return message
        line = text.count("\n", 0, long.end()) + 1
        return f"line {line}: this number is too long"
    lines = text.rstrip().split("\n")
    number = min(int(place[1] or len(lines)), len(lines))
    problem = message[: place.start()]
    if problem == 'Expected "\'"':  # tomllib names the end of the file
        number = next((at for at, line in enumerate(lines, 1) if _UNCLOSED.match(line)), number)
    if re.search("\"{3}|'{3}", "".join(lines[:number])):  # the line may be a part of a string, and that a secret
        return f"line {number}: {problem}"
    if statement := _STATEMENT.match(lines[number - 1]):
        hint = _value_hint(problem, statement["key"], statement["value"])
        return f"line {number}, `{statement['key']} = ...`: {problem}{hint}"
    if header := _HEADER.match(lines[number - 1]):
        twice = problem.startswith(("Cannot declare", "Cannot overwrite"))
        hint = "; this table exists already: put all its keys under one header" if twice else ""
        return f"line {number}, `{header[1]}`: {problem}{hint}"
    return f"line {number}: {problem}"


def _value_hint(problem: str, key: str, value: str) -> str:
    if problem.startswith("Cannot "):
        return f"; `{key}` is set already: remove one of the two"
    if word := re.match(r"(true|false)\b", value, re.IGNORECASE):
        return f"; write {word[1].lower()}"
    if re.match(r"(yes|no|on|off)\b", value, re.IGNORECASE):
        return "; write true or false"
    if value[:1] in {'"', "'"}:
        unclosed = value.rstrip().count(value[0]) % 2
        return f"; the closing {value[0]} is missing" if unclosed else ""
    bare = value[:1] not in {"[", "{"} and problem.startswith(("Invalid value", "Expected newline"))
    return f'; strings need quotes: {key} = "..."' if bare else ""


class _Field(NamedTuple):
    """The parts of a field's type."""

    annotation: Any
    kind: Any
    meta: Meta
    """Its bounds, its description, and what is in its `extra`: duration, secret, tables."""

    @classmethod
    @cache
    def of(cls, annotation: Any) -> "_Field":
        """Split an annotation. `| None` is left out, since TOML has no null."""
        if get_origin(annotation) in {UnionType, Union}:
            annotation = next(member for member in get_args(annotation) if member is not type(None))
        if get_origin(annotation) is Annotated:
            return cls(annotation, *get_args(annotation))
        return cls(annotation, annotation, Meta())

    def option(self, key: str) -> Any:
        return (self.meta.extra or {}).get(key)

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.meta.description is not None:
            return self.meta.description
        if get_origin(self.kind) is Literal:
            return f"one of {', '.join(get_args(self.kind))}"
        if self.option("duration"):
            assert self.meta.ge is not None
            assert self.meta.le is not None
            bounds = f"from {durations.in_units(self.meta.ge)} to {durations.in_units(self.meta.le)}"
            return f"a duration {bounds}, such as '24h', '5m', '30s' or a number of seconds"
        bounds = "" if self.meta.ge is None else f" from {self.meta.ge} to {self.meta.le}"
        return f"{_TYPES[self.kind]}{bounds}"

    def actual(self, value: object, secret: bool) -> str:
        """Describe a wrong value: by its type or, if the type is right, by itself unless it is secret."""
        right = isinstance(value, _VALUES.get(self.kind, str)) and not isinstance(value, bool)
        if right or (self.option("duration") and isinstance(value, str)):
            return "" if secret or self.option("secret") else f", not {_shorten(value)}"
        return f", not {_type_of(value)}"


@cache
def _fields(record: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """Return the fields of a record by key. To find them takes as long as to read the table of a user."""
    return {field.encode_name: field for field in msgspec.structs.fields(record)}


class _Reader:
    """Converts a parsed file into settings. An error names the key path of the mistake."""

    def __init__(self, variables: Mapping[str, str], mistakes: list[str] | None = None) -> None:
        """`variables` has the environment variables that were substituted, by key path.

        With `mistakes`, it adds all but the last one to that list, and reads on.
        """
        self._variables = variables
        self._mistakes = mistakes

    def table(self, record: type[T], tree: object, path: str) -> T:
        """Read one table."""
        fields = _fields(record)
        with self._reading_on():
            _items(tree, path, list(fields))
        items = tree if isinstance(tree, dict) else {}
        values = {}
        for key, field in fields.items():
            with self._reading_on():
                if key in items:
                    values[field.name] = self.value(field.type, items[key], _join(path, key))
                elif field.required:
                    raise ConfigError(f"{_join(path, key)}: is missing")
        if self._mistakes and any(field.required and field.name not in values for field in fields.values()):
            raise ConfigError(self._mistakes[-1])
        try:
            return record(**values)
        except SettingError as error:
            variable = self._variables.get(f"{path}.{error.key}".lstrip("."))
            text = str(error) if variable is None else f"{error.key}: {error.problem}, from {variable}"
            raise ConfigError(f"{path}.{text}".lstrip(".")) from None

    @contextmanager
    def _reading_on(self) -> Iterator[None]:
        """Collect a mistake, if all are wanted."""
        try:
            yield
        except ConfigError as error:
            if self._mistakes is None:
                raise
            self._mistakes.append(str(error))

    def value(self, annotation: Any, value: object, path: str) -> Any:
        """Read the value at `path` as the annotated type."""
        field = _Field.of(annotation)
        origin = get_origin(field.kind)
        if origin is tuple:
            inner = get_args(field.kind)[0]
            if not isinstance(value, list):
                hint = _array_hint(path, inner, value)
                raise ConfigError(f"{path}: must be an array, not {_type_of(value)}{hint}")
            return tuple(self.value(inner, item, f"{path}[{index}]") for index, item in enumerate(value))
        if origin is dict:
            kinds = field.option("tables")
            items = _items(value, path, kinds)
            inner = get_args(field.kind)[1]
            return {key: self.value(kinds[key] if kinds else inner, items[key], _join(path, key)) for key in items}
        if isinstance(field.kind, type) and issubclass(field.kind, Table):
            return self.table(field.kind, value, path)
        return self._scalar(field, value, path)

    def _scalar(self, field: _Field, value: object, path: str) -> Any:
        variable = self._variables.get(path)
        convert = partial(msgspec.convert, strict=variable is None)  # a variable has numbers as text
        duration = field.option("duration")
        try:
            return convert(_seconds(value) if duration else value, field.annotation)
        except msgspec.ValidationError:
            with suppress(msgspec.ValidationError):
                value = value if duration else convert(value, field.kind)
        # A variable's value is not shown: it may be the wrong variable, which has a secret.
        actual = field.actual(value, secret=variable is not None)
        source = "" if variable is None else f", from {variable}"
        raise ConfigError(f"{path}: must be {field.expected}{actual}{source}")


def _items(tree: object, path: str, known: Collection[str] | None) -> dict[str, Any]:
    """Return the items of a table. Raises ConfigError for a key that is not in `known`; None allows every key."""
    if not isinstance(tree, dict):
        header = path + ("" if known else ".NAME")
        hint = f": write [{header}], with one pair of brackets" if isinstance(tree, list) and path else ""
        raise ConfigError(f"{path}: must be a table, not {_type_of(tree)}{hint}")
    for key in tree:
        if known is not None and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{_join(path, key[:80])}: there is no such key; {hint}")
    return tree


def _array_hint(path: str, inner: Any, value: object) -> str:
    """Say how an array is written, to someone who wrote one value."""
    if isinstance(inner, type) and issubclass(inner, Table):
        return f": write [[{path}]], with two pairs of brackets" if isinstance(value, dict) else ""
    return ': write ["..."]' if isinstance(value, str) else ""


_VALUES: Mapping[Any, type | tuple[type, ...]] = {str: str, int: (int, float), float: (int, float), bool: bool}

_TYPES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "an array",
    dict: "a table",
    date: "a date",
    time: "a time",
}


def _type_of(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return next(name for kind, name in _TYPES.items() if isinstance(value, kind))


def _shorten(value: object) -> str:
    """Return a value as TOML or Python writes it, at most 80 characters."""
    try:
        return repr(value)[:80]
    except ValueError:  # Python refuses to convert more than 4,300 digits
        return "so long a number"


def _seconds(value: object) -> object:
    """Return the seconds of a duration such as "24h". Return anything else unchanged."""
    seconds = durations.parse(value) if isinstance(value, str) else None
    return value if seconds is None else seconds


_MAX_SECRET = 64 * 1024
"""Bytes of a file that has the value of a variable."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def fill_in(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replace variables in a text as in a string of the file. Raises ConfigError."""
    _check_variables(text)
    return _fill_in(text, environ, FilesRead(), None)


def _substitute(
    tree: dict[str, Any], environ: Mapping[str, str], files: FilesRead, missing: dict[str, list[str]] | None = None
) -> dict[str, str]:
    """Replace variables in strings by the environment's values. Return their names, such as "${PORT}", by key path.

    With `missing`, the errors of variables without a value are put there by key path. Their key is removed; in an
    array, they count as empty.
    """
    found = {}
    for path, holder, key in list(_strings(tree, "", _MAX_DEPTH)):
        text = holder[key]
        if "${" not in text:
            continue
        with naming(path):
            _check_variables(text)
        names = [f"${{{match[1]}}}" for match in _VARIABLE.finditer(text)]
        if names:
            found[path] = " and ".join(names)
            errors: list[str] | None = None if missing is None else []
            with naming(path):
                holder[key] = _fill_in(text, environ, files, errors)
            if missing is not None and errors:
                missing[path] = [f"{path}: {error}" for error in dict.fromkeys(errors)]
                if "[" not in path:
                    del holder[key]
    return found


def _check_variables(text: str) -> None:
    if "${" in _VARIABLE.sub(lambda match: match[2] or "", text):
        raise ConfigError("has a '${' that begins neither ${NAME} nor ${NAME:-default}")


def _fill_in(text: str, environ: Mapping[str, str], files: FilesRead, errors: list[str] | None) -> str:
    """Replace the variables of one string. With `errors`, one without a value is empty, and its error is added there.

    Otherwise raises ConfigError.
    """

    def value(match: re.Match[str]) -> str:
        try:
            return _value_of(match[1], match[2], environ, files)
        except ConfigError as error:
            if errors is None:
                raise
            errors.append(str(error))
            return ""

    return _VARIABLE.sub(value, text)


def _value_of(name: str, default: str | None, environ: Mapping[str, str], files: FilesRead) -> str:
    """Return the value of a variable, or its default if it is empty or not set. Raises ConfigError."""
    value = _variable(name, environ, files)
    if not value and default is not None:
        return default
    if value is None:
        raise ConfigError(f"the environment has no {name}; set it, or write ${{{name}:-default}}")
    return value


def _variable(name: str, environ: Mapping[str, str], files: FilesRead) -> str | None:
    """Return the value of a variable, or the content of the file that NAME_FILE names; None if there is neither.

    Raises ConfigError. No error shows a value, nor the path: someone may have put the secret there.
    """
    value, file = environ.get(name), environ.get(f"{name}_FILE")
    if file and not value:
        files.note(file)
        return _read_secret(f"{name}_FILE", file)
    if file:
        raise ConfigError(f"{name} and {name}_FILE are both set in the environment; unset one of them")
    if value is not None and not value.isprintable():
        raise ConfigError(f"the value of {name} in the environment is not printable text")
    return value


def _read_secret(variable: str, file: str) -> str:
    """Return the text of a file that has one value, without the line break at its end. Raises ConfigError."""
    what = f"the file that {variable} in the environment names"
    try:
        with open_regular(file) as opened:
            data = opened.read(_MAX_SECRET + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror or error}; correct {variable}") from None
    except ValueError:  # not UTF-8, or a path with a NUL
        raise ConfigError(f"{what} is not printable text; correct {variable}") from None
    text = re.sub(r"\r?\n\Z", "", text)
    if len(data) > _MAX_SECRET or not text.isprintable():
        raise ConfigError(f"{what} must have one line of printable text, at most {_MAX_SECRET} bytes; correct the file")
    return text


def _strings(node: Any, path: str, depth: int) -> Iterator[tuple[str, Any, str | int]]:
    """Yield the key path of each string, the table or array that holds it, and its key or index there."""
    if depth == 0:
        raise ConfigError(f"{path.partition('.')[0]}: {_TOO_DEEP}")
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        here = f"{path}[{key}]" if isinstance(node, list) else _join(path, str(key))
        if isinstance(value, str):
            yield here, node, key
        elif isinstance(value, dict | list):
            yield from _strings(value, here, depth - 1)


def _join(path: str, key: str) -> str:
    """Return the path of a key in a table, as TOML writes it."""
    bare = key if re.fullmatch(r"[\w-]+", key) else json.dumps(key, ensure_ascii=not key.isprintable())
    return f"{path}.{bare}".lstrip(".")
