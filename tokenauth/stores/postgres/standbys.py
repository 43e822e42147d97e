"""The hosts of a URL beside the primary, which are asked whether one of them has been promoted.

A former primary does not know that it was replaced: it may even go on to commit. The server that has replaced it knows.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import asyncpg

from tokenauth.logs import log, safe_traceback
from tokenauth.stores.circuit_breaker import PAUSE
from tokenauth.stores.postgres import hosts

INTERVAL = 0.25
"""Seconds between two questions to a host while nothing waits for its answer."""

PATIENCE = 1.0
"""Seconds that a host has to answer. Then it counts as unreachable."""

_SILENCE = 60.0
"""Seconds until a host that does not tell its timeline is asked again: it may have been replaced."""

_EXPECTED = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a host that cannot be reached, or is about to stop, raises."""


class Standbys:
    """Asks all hosts of a URL but the primary, four times a second and on demand.

    One that cannot be reached is not waited for: it may be down for long.
    """

    def __init__(self, primaries: hosts.Primaries, arguments: Mapping[str, Any]) -> None:
        """Take the driver's arguments. If they have one host, none is asked."""
        each = hosts.for_each_host({**arguments, "target_session_attrs": "any"})
        self._hosts = [_Host(primaries, one) for one in each] if len(each) > 1 else []
        self._tasks: Sequence[asyncio.Task[None]] = ()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(host.watch()) for host in self._hosts]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self) -> bool:
        """Ask now, and return whether any could be asked.

        Then `Primaries` knows of each promotion before the call, unless that host is out of reach.
        """
        asked = [answered for host in self._hosts if (answered := host.ask()) is not None]
        for answered in asked:
            await answered.wait()
        return bool(asked)


class _Host:
    """One host. While it is the primary, it is not connected to."""

    def __init__(self, primaries: hosts.Primaries, arguments: Mapping[str, Any]) -> None:
        self._primaries = primaries
        self._arguments = arguments
        self._wake = asyncio.Event()
        self._logged = False
        self._answered: asyncio.Event | None = None  # set after the next question; None while it cannot be reached

    def ask(self) -> asyncio.Event | None:
        """Ask as soon as it has answered what it was asked before. The event is set when it has, or is lost."""
        self._wake.set()
        return self._answered

    async def watch(self) -> None:
        """Keep a connection while it is not the primary, and tells its timeline."""
        while True:
            pause = PAUSE
            try:
                if not self._is_primary():
                    connection = await hosts.open_connection(self._arguments)
                    try:
                        if connection.system_identifier:
                            await self._ask_on(connection)
                        else:
                            pause = _SILENCE
                    finally:
                        connection.terminate()
            except Exception as error:  # it cannot be reached
                if not isinstance(error, _EXPECTED) and not self._logged:
                    self._logged = True
                    log.error("unexpected_error", at=safe_traceback(error))
            await asyncio.sleep(pause)

    async def _ask_on(self, connection: hosts.HostConnection) -> None:
        answered, self._answered = asyncio.Event(), asyncio.Event()
        try:
            while not self._is_primary():
                self._primaries.observe(connection)
                answered.set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL):
                        await self._wake.wait()
                self._wake.clear()
                answered, self._answered = self._answered, asyncio.Event()
                async with asyncio.timeout(PATIENCE):
                    await connection.read_timeline()
        finally:
            answered.set()
            self._answered.set()
            self._answered = None

    def _is_primary(self) -> bool:
        return hosts.address_of(self._arguments) == self._primaries.address
