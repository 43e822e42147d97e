"""The configuration as frozen records. Every default lives here, and only here."""

import ipaddress
import math
import os
import re
import unicodedata
from collections.abc import Mapping
from functools import cached_property

import msgspec

from tokenauth.models import Pool, User
from tokenauth.settings.dialects import DialectsSettings, PasswordDialectSettings
from tokenauth.settings.fields import Duration, Table, check_between, check_scope

MAX_NAME = 256
"""Characters that a user name may have."""


RISKS = (
    "shipped_password",
    "weak_hash",
    "costly_hash",
    "trusts_everybody",
    "open_dialect",
    "readable_config",
    "writable_config",
    "exposed_database",
)
"""What `accept_risks` may name; `tokenauth.risks` finds them."""


class ServerSettings(Table, frozen=True):
    """Where the service listens, and whom it believes."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    accept_risks: tuple[str, ...] = ()
    access_log: bool = False
    docs: bool = True

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        if not re.fullmatch(r"[\x21-\x7e]+", self.host):
            raise ValueError(
                f"host: {self.host!r} is no address; say '127.0.0.1' for this machine only, '0.0.0.0' for all of IPv4"
            )
        check_between("port", self.port, 0, 65535)
        check_between("workers", self.workers, 1, 64)
        for risk in self.accept_risks:
            if risk not in RISKS:
                raise ValueError(f"accept_risks: there is no risk {risk!r}; there are {', '.join(RISKS)}")
        for origin in self.cors_origins:
            if not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise ValueError(f"cors_origins: {origin!r} is not an origin such as 'https://app.example.com'")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"trusted_proxies: takes addresses and networks; {error}") from None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class DatabaseSettings(Table, frozen=True):
    """Where tokens are kept."""

    url: str = "sqlite+aiosqlite:///tokenauth.db"
    connections: int = 8

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        check_between("connections", self.connections, 1, 1000)


class TokenSettings(Table, frozen=True):
    """The terms on which tokens are issued."""

    ttl: Duration = Duration(24 * 3600)
    per_user: int = 100
    cache_size: int = 100_000

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        check_between("ttl", self.ttl, 1, 10 * 365 * 86400)
        check_between("per_user", self.per_user, 0, 1_000_000)
        check_between("cache_size", self.cache_size, 1, 100_000_000)


class PasswordSettings(Table, frozen=True):
    """What one password hash costs, and how many may be computed at once."""

    memory_kib: int = 19 * 1024
    time_cost: int = 2
    parallelism: int = 1
    threads: int = 0
    queue: int = 64

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        check_between("parallelism", self.parallelism, 1, 64)
        check_between("memory_kib", self.memory_kib, 8 * self.parallelism, 1 << 20)
        check_between("time_cost", self.time_cost, 1, 100)
        check_between("threads", self.threads, 0, 256)
        check_between("queue", self.queue, 1, 10_000)

    @property
    def lanes(self) -> int:
        """Threads that hash: as many as cores, when the file says 0."""
        return self.threads or _usable_cores()


class ThrottleSettings(Table, frozen=True):
    """How many logins may fail, and how long the next one then has to wait."""

    free: int = 5
    network_free: int = 100
    delay: Duration = Duration(1)
    max_delay: Duration = Duration(15 * 60)
    forget: Duration = Duration(3600)

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        check_between("free", self.free, 1, 1_000_000)
        check_between("network_free", self.network_free, 1, 1_000_000)
        check_between("delay", self.delay, 1, 3600)
        check_between("max_delay", self.max_delay, self.delay, 86400)
        check_between("forget", self.forget, self.max_delay, 30 * 86400)


class UserSettings(Table, frozen=True):
    """A user as the file has it."""

    username: str
    password: str
    scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        if not self.username or len(self.username) > MAX_NAME or self.username != self.username.strip():
            raise ValueError(f"username: takes 1 to {MAX_NAME} characters, with no blank at either end")
        if any(unicodedata.category(letter) in {"Cc", "Cf", "Cs"} for letter in self.username):
            raise ValueError("username: takes no control characters and no invisible ones")
        for scope in self.scopes:
            check_scope("scopes", scope)


_ISSUER = re.compile(r"(https://[^/?#\s\"\\]+|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?)(/[^/?#\s\"\\{}]+)*")
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")


class OAuthSettings(Table, frozen=True):
    """How the service calls itself in its metadata (RFC 8414)."""

    issuer: str = ""

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        authority = self.issuer.partition("//")[2].partition("/")[0]
        if "@" in authority:  # what is before it is not repeated: it may be a password
            raise ValueError("issuer: takes no user and no password; leave out all between '//' and '@'")
        if self.issuer and not _ISSUER.fullmatch(self.issuer):
            raise ValueError(
                f"issuer: {self.issuer!r} is not a URL such as 'https://auth.example.com', with no query and no slash"
                " at its end; http goes with this machine only"
            )
        if not authority.isascii():
            raise ValueError(f"issuer: the host {authority!r} has letters beyond ASCII; write it as 'xn--...'")
        match = _AUTHORITY.fullmatch(authority)
        if self.issuer and (match is None or not 1 <= int(match["port"] or 1) <= 65535):
            raise ValueError(f"issuer: {authority!r} is no host, or its port is not from 1 to 65535")


class PoolSettings(Table, frozen=True):
    """A pool as the file has it."""

    capacity: int | None = None
    token_ttl: Duration | None = None
    lease_ttl: Duration = Duration(60)
    prefill: bool = False
    scope: str | None = None
    manage_scope: str = "admin"

    def __post_init__(self) -> None:
        """Hold the values to what can work."""
        if self.capacity is not None:
            check_between("capacity", self.capacity, 0, 100_000_000)
        if self.token_ttl is not None:
            check_between("token_ttl", self.token_ttl, 1, 10 * 365 * 86400)
        check_between("lease_ttl", self.lease_ttl, 1, 10 * 365 * 86400)
        if self.prefill and self.capacity is None:
            raise ValueError("prefill: keeps `capacity` tokens in being; say how many that are")
        if self.prefill and self.token_ttl is not None:
            raise ValueError("token_ttl: does not go with prefill, whose tokens wait for ever")
        if self.scope is not None:
            check_scope("scope", self.scope)
        check_scope("manage_scope", self.manage_scope)


class Settings(Table, frozen=True):
    """All that the file says."""

    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    tokens: TokenSettings = TokenSettings()
    passwords: PasswordSettings = PasswordSettings()
    throttle: ThrottleSettings = ThrottleSettings()
    oauth: OAuthSettings = OAuthSettings()
    users: tuple[UserSettings, ...] = ()
    pools: dict[str, PoolSettings] = msgspec.field(default_factory=dict)
    dialects: DialectsSettings = DialectsSettings()

    def __post_init__(self) -> None:
        """Refuse what is right by itself and wrong together."""
        self._check_users()
        self._check_pools()

    def _check_users(self) -> None:
        seen: set[str] = set()
        for entry in self.users:
            if canonical(entry.username) in seen:
                raise ValueError(f"users: has {entry.username!r} twice (capitals do not tell names apart)")
            seen.add(canonical(entry.username))

    def _check_pools(self) -> None:
        for name in self.pools:
            if not re.fullmatch(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,64}", name):
                raise ValueError(
                    f"pools: {name!r} is not a name of 1 to 64 letters, digits, dots, dashes and underscores"
                )
        for name, dialect in self.dialects.chosen().items():
            pool = self.pools.get(dialect.pool)
            if pool is None:
                known = ", ".join(self.pools) or "none"
                raise ValueError(f"dialects.{name}.pool: there is no [pools.{dialect.pool}]; known are: {known}")
            if pool.scope is not None and not dialect.require_token:
                raise ValueError(
                    f"dialects.{name}.require_token: must be true, since [pools.{dialect.pool}] needs a scope"
                )
            if isinstance(dialect, PasswordDialectSettings) and not pool.prefill:
                raise ValueError(f"dialects.{name}.pool: [pools.{dialect.pool}] must have prefill = true")

    @cached_property
    def reach(self) -> str | None:
        """Say how others than the users of this machine can reach the service; None if they cannot.

        A loopback address is no protection where a reverse proxy passes on what comes from outside.
        """
        if not self.server.loopback:
            return f"server.host: {self.server.host!r} can be reached by others"
        if self.server.trusted_proxies:
            return "server.trusted_proxies: names a proxy, through which others can reach the service"
        if self.oauth.issuer.startswith("https:"):
            return f"oauth.issuer: {self.oauth.issuer!r} says that others can reach the service"
        return None

    @cached_property
    def terms(self) -> Mapping[str, Pool]:
        """The pools by name."""
        return {
            name: Pool(
                name,
                lease_ttl=entry.lease_ttl,
                token_ttl=math.inf if entry.token_ttl is None else entry.token_ttl,
                capacity=entry.capacity,
                prefill=entry.prefill,
                scope=entry.scope,
                manage_scope=entry.manage_scope,
                ages_while_leased=self.dialects.token_pool is not None and self.dialects.token_pool.pool == name,
            )
            for name, entry in self.pools.items()
        }

    @cached_property
    def directory(self) -> Mapping[str, User]:
        """The users by canonical name."""
        return {
            name: User(name, entry.password, entry.scopes)
            for entry in self.users
            for name in [canonical(entry.username)]
        }


def canonical(username: str) -> str:
    """Write a user name in the one form in which names are compared, counted and stored."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", username).casefold())


def _usable_cores() -> int:
    """Return how many cores this process may use; on Linux that can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
