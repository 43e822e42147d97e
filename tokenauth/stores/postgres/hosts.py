"""The hosts of a PostgreSQL URL: which URLs are valid, and which host is the primary."""

import asyncio
import re
from typing import Any

import asyncpg
from sqlalchemy import URL

_OPTIONS = {"host", "port", "ssl", "prepared_statement_cache_size"}
"""The options that a URL may have, as SQLAlchemy and asyncpg read them."""

_SSL = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
"""The values of `ssl`."""


_MAX_PORT = 65535
_PORT = re.compile(r":(\d+)$", re.ASCII)


def check(url: URL) -> None:
    """Raise ValueError for a URL that is probably mistyped. The message quotes no part of a password."""
    unknown = sorted(url.query.keys() - _OPTIONS)
    if unknown:
        raise ValueError(f"has no option {unknown[0]!r}; there are {', '.join(sorted(_OPTIONS))}")
    if url.query.get("ssl", "prefer") not in _SSL:
        raise ValueError(f"has an ssl that is not one of {', '.join(_SSL)}")
    hosts, ports = _several(url, "host"), _several(url, "port")
    ports += [found[1] for host in hosts if (found := _PORT.search(host))]
    ports += [] if url.port is None else [str(url.port)]
    if not all(port.isdecimal() and 1 <= int(port) <= _MAX_PORT for port in ports if port):
        raise ValueError(f"has a port that is not from 1 to {_MAX_PORT}")
    if any(".." in host or host.startswith(".") for host in [*hosts, url.host or ""] if "/" not in host):
        raise ValueError("has a host that begins with a dot, or has two dots in a row")
    if "@" in (url.host or "") or not set("@/:").isdisjoint(url.database or ""):
        raise ValueError("has more of @, / and : than it should; in a name or a password write %40, %2F and %3A")


def _several(url: URL, option: str) -> list[str]:
    """Return the values of an option that can be repeated, or have commas."""
    values = url.query.get(option, ())
    return ",".join([values] if isinstance(values, str) else values).split(",")


def name(url: URL) -> str:
    """Name a database, without user and password."""
    several = url.query.get("host", ())
    hosts = url.host or (several if isinstance(several, str) else ", ".join(several)) or "its socket"
    return f"{url.database} at {hosts}"


async def connect(**arguments: Any) -> asyncpg.Connection:
    """Connect to the host that is the primary. All are tried at once, so none delays the others."""
    arguments.pop("prepared_statement_cache_size", None)  # SQLAlchemy's own
    if not isinstance(arguments.get("host"), list):
        return await asyncpg.connect(**arguments)
    each = zip(arguments["host"], arguments["port"], strict=True)
    attempts = {
        asyncio.create_task(asyncpg.connect(**{**arguments, "host": host, "port": port})) for host, port in each
    }
    waiting: set[asyncio.Task[asyncpg.Connection]] = attempts
    chosen: asyncio.Task[asyncpg.Connection] | None = None
    error: BaseException | None = None
    try:
        while chosen is None and waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                error = attempt.exception()
                chosen = attempt if error is None else chosen
    finally:
        for attempt in attempts - {chosen}:
            attempt.cancel()
            attempt.add_done_callback(_abort)
    if chosen is None:
        raise error or OSError("no host")
    return chosen.result()


def _abort(late: "asyncio.Task[asyncpg.Connection]") -> None:
    """Close a connection that is not needed any more."""
    if not late.cancelled() and late.exception() is None:
        late.result().terminate()
