"""Everything below HTTP, wired together: what the server runs, and what the command line uses."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from tokenauth import file_descriptors, values
from tokenauth.credentials import Credentials
from tokenauth.errors import ConfigError, RetryLater
from tokenauth.login_queue import LoginQueue
from tokenauth.logs import log
from tokenauth.models import Clock, ForwardClock, Instant, User
from tokenauth.passwords import Passwords
from tokenauth.pools import NewValue, Pools
from tokenauth.settings.model import Config
from tokenauth.stores.open import open_store
from tokenauth.stores.store import Store
from tokenauth.throttle import Throttle
from tokenauth.tokens import Tokens

_MAKERS: Mapping[str, NewValue] = {
    "token-pool": values.new_uuid,
    "random-token-generator": values.new_uuid,
    "token-management-service": values.new_prefixed,
}
"""What makes tokens that look as the clients of a dialect expect."""


class Service(NamedTuple):
    """The parts, and their life."""

    config: Config
    users: dict[str, User]
    clock: ForwardClock
    store: Store
    passwords: Passwords
    throttle: Throttle
    credentials: Credentials
    tokens: Tokens
    pools: Pools

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store and bring its schema up to date; close it at the end. Raises StartError."""
        behind = self.clock.advance(await self.store.start(self.clock.advance))
        if behind > 1:
            log.warning("clock_is_behind", seconds=round(behind), action="time goes on from where it was")
        self.tokens.queue.start()
        telling: set[asyncio.Task[None]] = set()

        def tell(now: Instant) -> None:
            task = asyncio.create_task(self._remember(now))
            telling.add(task)
            task.add_done_callback(telling.discard)

        self.clock.leapt = tell
        try:
            yield
        finally:
            self.clock.leapt = None
            await asyncio.gather(*telling)
            await self.throttle.close()
            await self.tokens.close()
            await self.store.stop(self.clock())
            self.passwords.close()

    async def ready(self) -> str | None:
        """Return what keeps this process from serving, if anything does: the first that its parts report."""
        try:
            for part in (file_descriptors.ready, self.tokens.ready, self.passwords.ready, self.store.ready):
                trouble = await part()
                if trouble is not None:
                    return trouble
        except MemoryError:
            return "out of memory"
        return None

    def change_users(self, removed: Iterable[str], changed: Mapping[str, User]) -> None:
        """Go on with other users than those of the configuration: one who is removed is refused from now on."""
        for name in removed:
            self.users.pop(name, None)
        self.users.update(changed)
        self.passwords.read_users()

    async def _remember(self, now: Instant) -> None:
        with suppress(RetryLater):  # then it is written down with whatever is written next
            await self.store.remember(now)


def create_service(
    config: Config, clock: Clock | None = None, ticks: Clock = time.monotonic, serving: bool = True
) -> Service:
    """Wire up what a configuration describes, without HTTP. Without a `clock` it is the store's. Raises ConfigError.

    `serving`: create the database if there is none. Commands must not, or a wrong directory would look like success.
    """
    users = dict(config.directory)
    passwords = Passwords(config.passwords, users)
    store = open_store(config.database, config.tokens.cache_size, clock, serving)
    now = ForwardClock(store.clock, ticks)
    queue = LoginQueue(config.passwords.lanes, config.passwords.queue)
    throttle = Throttle(config.throttle, config.server.workers, store, now, queue)
    credentials = Credentials(users, passwords, throttle, now)
    tokens = Tokens(config.tokens, users, store, credentials, now)
    pools = Pools(config.terms, store, now, _makers(config))
    return Service(config, users, now, store, passwords, throttle, credentials, tokens, pools)


def _makers(config: Config) -> Mapping[str, NewValue]:
    """Say which pools' tokens look as a dialect has them. Raises ConfigError for a pool in which two looks meet."""
    makers: dict[str, NewValue] = {}
    for name, terms in config.dialects.chosen().items():
        make = _MAKERS.get(name)
        if make is not None and makers.setdefault(terms.pool, make) is not make:
            raise ConfigError(
                f"dialects.{name}.pool: the tokens in [pools.{terms.pool}] look as another dialect has them;"
                " give each dialect a pool of its own"
            )
    return makers
