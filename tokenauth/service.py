"""Everything below HTTP, wired together. The server and the command line both use it."""

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from tokenauth import file_descriptors
from tokenauth.audit.log import AuditLog
from tokenauth.background import Background
from tokenauth.clock import Clock, MonotonicClock
from tokenauth.credentials import Credentials
from tokenauth.errors import RetryLater
from tokenauth.event_streams import Events
from tokenauth.login_queue import LoginQueue
from tokenauth.logs import log
from tokenauth.metrics import Metrics
from tokenauth.models import Instant, ServedDatabase, User
from tokenauth.named_tokens import NamedTokens
from tokenauth.passwords import Passwords
from tokenauth.pools import Pools
from tokenauth.settings.model import Settings
from tokenauth.status import Node
from tokenauth.stores.open import open_store
from tokenauth.stores.store import Store
from tokenauth.throttle import Throttle
from tokenauth.tokens import Tokens
from tokenauth.topic_watcher import Watcher


class Service(NamedTuple):
    """The parts of a running tokenauth."""

    settings: Settings
    users: dict[str, User]
    clock: MonotonicClock
    store: Store
    passwords: Passwords
    throttle: Throttle
    credentials: Credentials
    tokens: Tokens
    named_tokens: NamedTokens
    pools: Pools
    metrics: Metrics
    audit: AuditLog | None
    node: Node
    events: Events

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store and upgrade its schema; close it at the end. Raises StartError."""
        behind = self.clock.advance(await self.store.start(self.clock.advance))
        if behind > 1:
            log.warning("clock_behind", seconds=round(behind), action="time continues from the last known time")
        self.tokens.revocations.start()
        saving = Background()
        self.clock.on_advance = lambda now: saving.start(self._save_time(now))
        try:
            yield
        finally:
            self.clock.on_advance = None
            await saving.close()
            await self.events.shut_down()
            await self.pools.waiting.close()
            await self.throttle.close()
            await self.named_tokens.background.close()
            await self.tokens.close()
            await self.store.stop(self.clock())
            self.passwords.close()

    async def ready(self) -> str | None:
        """Return why this process cannot serve requests, or None if it can."""
        try:
            for part in (file_descriptors.ready, self.tokens.ready, self.passwords.ready, self.store.ready):
                reason = await part()
                if reason is not None:
                    return reason
        except MemoryError:
            return "out of memory"
        return None

    def change_users(self, removed: Iterable[str], changed: Mapping[str, User]) -> None:
        """Apply a changed configuration of users. Tokens of removed users are refused from now on."""
        for name in removed:
            self.users.pop(name, None)
        self.users.update(changed)
        self.passwords.read_users()

    async def _save_time(self, now: Instant) -> None:
        with suppress(RetryLater):  # the next write saves it
            await self.store.save_time(now)


def create_service(
    settings: Settings,
    clock: Clock | None = None,
    monotonic: Clock = time.monotonic,
    serving: bool = True,
    served: ServedDatabase | None = None,
) -> Service:
    """Build the service that the settings describe. Raises ConfigError.

    clock: replaces the clock of the store. monotonic: sets the pace of time after `clock` is set back.
    serving: create the database if it does not exist. Commands do not: a wrong directory would look like success.
    served: the database that the server has been serving. No other is used, and none is created.
    """
    users = dict(settings.users_by_name)
    passwords = Passwords(settings.passwords, users)
    store = open_store(settings.database, settings.tokens.cache_size, clock, serving, served)
    monotonic_clock = MonotonicClock(store.clock, monotonic)
    queue = LoginQueue(settings.passwords.thread_count, settings.passwords.queue)
    throttle = Throttle(settings.throttle, settings.server.workers, store, monotonic_clock, queue, users)
    credentials = Credentials(users, passwords, throttle, monotonic_clock)
    tokens = Tokens(settings.tokens, users, store, credentials, monotonic_clock)
    store.tokens.share = tokens.revocations.share
    named_tokens = NamedTokens(settings.tokens, users, store, tokens, monotonic_clock)
    pools = Pools(settings.pools_by_name, store, monotonic_clock, settings.new_values)
    parts = store, passwords, throttle, credentials, tokens, named_tokens, pools
    audit = AuditLog(settings.audit) if settings.audit.file else None
    node = Node()
    events = Events(tokens, Watcher(pools, throttle, store, node, monotonic_clock))
    return Service(settings, users, monotonic_clock, *parts, Metrics(), audit, node, events)
