"""Opens the store that a database URL names. No other module knows which databases there are."""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from tokenauth.clock import Clock
from tokenauth.errors import ConfigError
from tokenauth.models import DatabaseReport, ServedDatabase
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.sqlite import files

if TYPE_CHECKING:  # the main process only asks for files: it starts in half the time without SQLAlchemy
    from sqlalchemy import URL

    from tokenauth.stores.copying import Side
    from tokenauth.stores.engine import Engine
    from tokenauth.stores.store import Store

_NO_FILE = {None, "", ":memory:"}
_SQLITE, _POSTGRESQL = "sqlite+aiosqlite", "postgresql+asyncpg"


def open_store(
    settings: DatabaseSettings,
    cache_size: int,
    clock: Clock | None = None,
    serving: bool = True,
    served: ServedDatabase | None = None,
    copying: bool = False,
) -> "Store":
    """Return the store at a URL, not yet started. Raises ConfigError.

    Without a `clock` it uses this machine's, or PostgreSQL's. Unless it is for `serving`, a start creates no database.
    Neither does a start for a database that is already `served`. `copying`: a database that it creates is an unfinished
    copy of another.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    from tokenauth.stores.store import Store

    try:
        url = make_url(settings.url)
    except (ArgumentError, ValueError):
        raise ConfigError("database.url: not a URL such as 'sqlite+aiosqlite:///tokenauth.db'") from None
    options = settings.url.rpartition("?")[2] if "?" in settings.url else ""
    if not all(value for _, value in parse_qsl(options, keep_blank_values=True)):
        raise ConfigError("database.url: has an option without a value")  # SQLAlchemy would leave it out
    if url.drivername == _SQLITE:
        return Store(_sqlite(url, clock or time.time, serving, served, copying), cache_size)
    if url.drivername == _POSTGRESQL:
        return Store(_postgres(url, settings.connections, clock, serving, served, copying), cache_size)
    raise ConfigError(f"database.url: {url.drivername!r} is not supported; use {_SQLITE} or {_POSTGRESQL}")


def check_files(settings: DatabaseSettings) -> None:
    """Raise ConfigError if the files of a database show that this user cannot open or create it.

    Not for a process that has it open. A database on a server has no files.
    """
    path = _file(settings)
    if path is None:
        return
    problem = files.find_problem(path)
    if problem is None and os.path.exists(path) and not files.is_database(path):
        problem = f"{path} is not an SQLite database; move it away, or change database.url"
    if problem is not None:
        raise ConfigError(f"database.url: {problem}")


async def examine(settings: DatabaseSettings) -> DatabaseReport:
    """Look at the database without creating, upgrading or changing it. Raises ConfigError for a URL that is wrong.

    Not for a process that has it open.
    """
    open_store(settings, 1).clock  # noqa: B018  (for the errors of the URL; nothing is opened)
    path = _file(settings)
    if path is not None:
        from tokenauth.stores.sqlite.examination import examine as examine_file

        return examine_file(path)
    from sqlalchemy import make_url

    from tokenauth.stores.postgres.examination import examine as examine_server

    return await examine_server(make_url(settings.url))


def open_side(settings: DatabaseSettings) -> "Side":
    """Return the database at a URL that is valid, as one side of a copy."""
    path = _file(settings)
    if path is not None:
        from tokenauth.stores.sqlite.copying import SqliteSide

        return SqliteSide(path)
    from sqlalchemy import make_url

    from tokenauth.stores.postgres.copying import PostgresSide

    return PostgresSide(make_url(settings.url))


def is_same(one: DatabaseSettings, other: DatabaseSettings) -> bool:
    """Return whether two URLs name the same file. Databases on a server have no files."""
    paths = _file(one), _file(other)
    return None not in paths and os.path.realpath(paths[0] or "") == os.path.realpath(paths[1] or "")


def find_exposed_files(settings: DatabaseSettings) -> Sequence[str]:
    """Return a message for each file of a database that other users of this machine could read or change."""
    path = _file(settings)
    return [] if path is None else list(files.find_exposed(path))


def _file(settings: DatabaseSettings) -> str | None:
    """Return the absolute path of the database, or None if it is not a file."""
    scheme, _, location = settings.url.partition(":///")
    path = unquote(location.partition("?")[0])  # as SQLAlchemy decodes it
    return None if scheme != _SQLITE or path in _NO_FILE else os.path.abspath(path)


def _sqlite(url: "URL", clock: Clock, serving: bool, served: ServedDatabase | None, copying: bool) -> "Engine":
    from tokenauth.stores.sqlite.engine import SqliteEngine

    if url.database in _NO_FILE:
        raise ConfigError(
            "database.url: names no file; write three slashes and a path, as in 'sqlite+aiosqlite:///tokenauth.db'"
        )
    if url.host or url.username or url.password or url.port:
        raise ConfigError(
            "database.url: names a host or a user, and SQLite has only a path: 'sqlite+aiosqlite:///tokenauth.db',"
            " or with four slashes '/var/lib/tokenauth/tokenauth.db'"
        )
    if url.query:
        raise ConfigError(f"database.url: has no option {min(url.query)!r}; SQLite takes a path and no options")
    return SqliteEngine(url, clock, serving, served, copying)


def _postgres(
    url: "URL", connections: int, clock: Clock | None, serving: bool, served: ServedDatabase | None, copying: bool
) -> "Engine":
    from sqlalchemy.exc import ArgumentError

    if not url.database:
        raise ConfigError("database.url: names no database, as in 'postgresql+asyncpg://user@host/tokenauth'")
    try:
        from tokenauth.stores.postgres import hosts
        from tokenauth.stores.postgres.engine import PostgresEngine
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise ConfigError(
            "database.url: PostgreSQL needs asyncpg: install the extra `postgres` of tokenauth-server"
        ) from None
    try:
        hosts.check(url)
    except ValueError as error:
        raise ConfigError(f"database.url: {error}") from None
    try:
        return PostgresEngine(url, connections, clock, serving, serving and served is None, copying)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "database.url: has options that do not fit together; each host needs a port, as in ?host=a:5432&host=b:5432"
        ) from None
