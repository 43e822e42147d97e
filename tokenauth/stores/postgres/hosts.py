"""The hosts of a PostgreSQL URL: which URLs are valid, and which host is the primary."""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import asyncpg
from sqlalchemy import URL

_OPTIONS = {"host", "port", "ssl", "prepared_statement_cache_size"}
"""The options that a URL may have, as SQLAlchemy and asyncpg read them."""

_SSL = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
"""The values of `ssl`."""

PATIENCE = 0.1
"""Seconds that other hosts have to answer, too, when the first has: two may believe that they are the primary."""

FIRST_PATIENCE = 1.0
"""The same for the first connection of a process, which knows of no promotion yet."""

_TIMELINE = """
    SELECT system_identifier, CASE WHEN pg_is_in_recovery() THEN 0
        ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END
    FROM pg_control_system()
"""
"""The identifier of a server, which its standbys share, and the timeline to which it writes; 0 for a standby."""

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


if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]  # only in the stubs
else:
    _Connection = asyncpg.Connection


class NoPrimary(OSError):
    """No host of a URL is the primary. The text says of each host what it is."""

    def __init__(self, states: Sequence[str], errors: Sequence[BaseException]) -> None:
        """Take what each host is, and why those could not be used to which no connection was opened."""
        super().__init__(f"no host is the primary: {', '.join(states)}")
        self.errors = errors


class HostConnection(_Connection):
    """A connection to one host of a URL: usually to the primary."""

    address = ""
    """The host and the port."""

    system_identifier = timeline = 0
    """What `_TIMELINE` returns; 0 if the server does not tell it."""

    unconfirmed = False
    """Whether commits on it may be lost: one did not wait for synchronous standbys, or another server was promoted."""

    async def read_timeline(self) -> None:
        self.system_identifier, self.timeline = await self.fetchrow(_TIMELINE) or (0, 0)

    def read_warning(self, message: asyncpg.PostgresLogMessage) -> None:
        """Read whether a commit is unconfirmed. The text of that warning is translated, the function's name is not."""
        if message.server_source_function == "SyncRepWaitForLSN":
            self.unconfirmed = True


class Primaries:
    """Connects to the primary among the hosts of a URL.

    A former primary that was stopped, or cut off, believes that it is the primary until it learns otherwise. Each
    promotion begins a timeline with a higher number. So a server on an earlier timeline than one that was seen is
    refused, and of two that are found the later one is taken. Open connections to the former one are closed then: what
    waits for its answer could wait for a standby that has left it.
    """

    def __init__(self) -> None:
        self.promotions = 0
        """How often a later timeline was seen: connections that were open then may have been closed for it."""
        self.on_promotion: Callable[[], object] = lambda: None
        """Is called when a later timeline was seen."""
        self.address = ""
        """The address of the last connection: where the primary is."""
        self._newest: dict[int, int] = {}
        self._open: WeakSet[HostConnection] = WeakSet()

    async def connect(self, **arguments: Any) -> HostConnection:
        """Connect to the primary. All hosts are tried at once, so none delays the others for long (PATIENCE).

        Raises what the driver raises for a single host, and NoPrimary if there are several, or the one is a standby.
        Raises TooManyConnectionsError if the last one, or each that may be the primary, takes no more.
        """
        limit = PATIENCE if self._newest else FIRST_PATIENCE
        attempts = {asyncio.create_task(open_connection(each)): address_of(each) for each in for_each_host(arguments)}
        found: list[HostConnection] = []
        chosen: HostConnection | None = None
        try:
            waiting = {*attempts}
            while waiting:
                patience = None if self._latest(found) is None else limit
                done, waiting = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for attempt in done:
                    if attempt.exception() is None:
                        found.append(attempt.result())
                        self.observe(found[-1])
            chosen = self._latest(found)
        finally:
            for attempt in attempts:
                attempt.cancel()
                attempt.add_done_callback(partial(_abort, chosen))
        if chosen is None:
            states = {address: attempt.exception() for attempt, address in attempts.items()}
            last = states.get(self.address)
            raise last if isinstance(last, asyncpg.TooManyConnectionsError) else _no_primary(states)
        self.address = chosen.address
        self._open.add(chosen)
        return chosen

    def observe(self, found: HostConnection) -> None:
        """Remember the timeline of a server; close the connections to the one that it has replaced, if it has.

        They are closed when what has just been answered on them was taken: asyncpg fails otherwise.
        """
        if found.timeline > self._newest.get(found.system_identifier, 0):
            self._newest[found.system_identifier] = found.timeline
            self.promotions += 1
            for one in filter(self._is_former, [*self._open]):
                one.unconfirmed = True
                asyncio.get_running_loop().call_soon(one.terminate)
            self.on_promotion()

    def _is_former(self, connection: HostConnection) -> bool:
        """Return whether another server has been promoted since this one was."""
        return connection.timeline < self._newest.get(connection.system_identifier, 0)

    def _latest(self, found: Iterable[HostConnection]) -> HostConnection | None:
        return next((one for one in found if not self._is_former(one)), None)


def for_each_host(arguments: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the driver's arguments for each host of a URL."""
    arguments = {name: value for name, value in arguments.items() if name != "prepared_statement_cache_size"}
    if not isinstance(arguments.get("host"), list):
        return [arguments]
    each = zip(arguments["host"], arguments["port"], strict=True)
    return [{**arguments, "host": host, "port": port} for host, port in each]


def address_of(arguments: Mapping[str, Any]) -> str:
    """Name a host and its port."""
    host, port = arguments.get("host") or "its socket", arguments.get("port")
    return f"{host}:{port}" if port else str(host)


def _no_primary(states: Mapping[str, BaseException | None]) -> BaseException:
    """Return the error of hosts, none of which is the primary. An error of None: it was, until another was promoted.

    If each that may be the primary takes no more connections, that is the error: open connections may still work.
    """
    errors = [error for error in states.values() if error is not None]
    possible = [error for error in errors if not isinstance(error, asyncpg.TargetServerAttributeNotMatched)]
    are_full = all(isinstance(error, asyncpg.TooManyConnectionsError) for error in possible)
    if possible and (are_full or len(states) == 1):
        return possible[0]
    return NoPrimary([f"{address} {_state(error)}" for address, error in states.items()], errors)


def _state(error: BaseException | None) -> str:
    """Say what a host is, of the error that it was refused for."""
    match error:
        case None:
            return "is a former primary (make it a standby of the new one)"
        case asyncpg.TargetServerAttributeNotMatched():
            return "is a standby"
        case ConnectionRefusedError():
            return "refuses connections"
        case TimeoutError():
            return "does not answer"
    words = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return f"cannot be used ({words.splitlines()[0][:100]})"


async def open_connection(arguments: Mapping[str, Any]) -> HostConnection:
    """Connect to one host, and ask for its timeline. Raises what the driver raises."""
    connection: HostConnection = await asyncpg.connect(**arguments, connection_class=HostConnection)
    connection.address = address_of(arguments)
    connection.add_log_listener(lambda _, message: connection.read_warning(message))
    try:
        await connection.read_timeline()
    except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError, asyncpg.FeatureNotSupportedError):
        pass  # it speaks PostgreSQL's protocol, but has no timelines
    except BaseException:
        connection.terminate()
        raise
    return connection


def _abort(chosen: HostConnection | None, attempt: "asyncio.Task[HostConnection]") -> None:
    """Close a connection that is not needed any more."""
    if not attempt.cancelled() and attempt.exception() is None and attempt.result() is not chosen:
        attempt.result().terminate()
