"""The only switch on a database URL."""

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from tokenauth.errors import ConfigError
from tokenauth.stores.base import Store
from tokenauth.stores.sqlite import SqliteStore


def open_store(url: str, cache_size: int) -> Store:
    """Make the store that a URL names, not yet started. Raises ConfigError."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError("database.url: not a URL such as 'sqlite+aiosqlite:///tokenauth.db'") from None
    if parsed.drivername != "sqlite+aiosqlite":
        raise ConfigError(f"database.url: {parsed.drivername!r} is no store of tokenauth; use sqlite+aiosqlite")
    if parsed.database in {None, "", ":memory:"}:
        raise ConfigError(
            "database.url: names no file; write three slashes and a path, as in 'sqlite+aiosqlite:///tokenauth.db'"
        )
    return SqliteStore(parsed, cache_size)
