"""The configuration as frozen records. Every default and every bound is here, and only here."""

import ipaddress
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Literal

from msgspec import Meta

from tokenauth.models import ADMIN, NAME_PATTERN, FileLine, Member, Pool, User, is_visible
from tokenauth.settings.dialects import DIALECTS, DialectSettings
from tokenauth.settings.fields import SECRET, ScopeName, SettingError, Table, between, duration, file_path, text
from tokenauth.settings.origin import DOMAIN, NO_USER, Origin, check_origin, parse_origin

MAX_NAME = 256
"""Characters in a user name."""

RiskName = Literal[
    "shipped_password",
    "weak_hash",
    "costly_hash",
    "broad_trusted_proxies",
    "open_dialect",
    "readable_config",
    "writable_config",
    "exposed_database",
    "no_trusted_proxy",
    "no_tls",
    "readable_tls_key",
]
"""What `accept_risks` can name; `tokenauth.risks` finds them."""

_MAX_MEMBERS = 1000
_MAX_NOTE = 256

LABEL = r"[A-Za-z0-9._:=/+-]{1,64}"
"""The form of a member's label."""

_HOST = text(r"[\x21-\x7e]+", "a host or address such as '127.0.0.1' (this machine only) or '0.0.0.0' (all of IPv4)")


_SOCKET_MODE = text(r"0?[0-7]{3}", "a mode in octal digits, such as '0660'")

_SOCKET = "/run/tokenauth/tokenauth.sock"

_MAX_SOCKET = 103 if sys.platform == "darwin" else 107
"""Bytes of the path of a Unix socket."""


class ServerSettings(Table, frozen=True):
    """Where the service listens, and which pages and proxies it trusts."""

    host: Annotated[str, _HOST] = "127.0.0.1"
    port: Annotated[int, between(0, 65535)] = 8000
    socket: Annotated[str, file_path(_SOCKET)] = ""
    socket_mode: Annotated[str, _SOCKET_MODE] = "0660"
    tls_certificate: Annotated[str, file_path("/etc/tokenauth/tls.pem")] = ""
    tls_key: Annotated[str, file_path("/etc/tokenauth/tls.key")] = ""
    workers: Annotated[int, between(1, 64)] = 1
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    accept_risks: tuple[RiskName, ...] = ()
    access_log: bool = False
    docs: bool = True
    reload: Literal["signal", "watch"] = "signal"

    @property
    def reachable_host(self) -> str:
        """The host under which a program on this machine reaches the service."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    def __post_init__(self) -> None:
        for number, origin in enumerate(self.cors_origins):
            _check_cors_origin(f"cors_origins[{number}]", origin)
        size = len(os.fsencode(self.socket))
        if size > _MAX_SOCKET:
            raise SettingError("socket", f"is a path of {size} bytes; a socket can have at most {_MAX_SOCKET}")
        if self.socket.startswith("@"):
            raise SettingError("socket", f"must be a path such as {_SOCKET!r}")
        for key, other in (("tls_key", "tls_certificate"), ("tls_certificate", "tls_key")):
            if getattr(self, other) and not getattr(self, key):
                raise SettingError(key, f"is missing: {other} needs it")
        if self.socket and self.tls_certificate:
            raise SettingError("tls_certificate", "must not be set with socket: TLS is the job of the proxy there")
        for number, proxy in enumerate(self.trusted_proxies):
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                problem = "must be an IP address or network"
                raise SettingError(f"trusted_proxies[{number}]", problem, f": {error}") from None

    @property
    def behind_proxy(self) -> bool:
        """Whether a reverse proxy is trusted, which passes on requests of others."""
        return bool(self.trusted_proxies or self.socket)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect to `host`."""
        return _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback  # Python 3.11 does not look inside


def _check_cors_origin(key: str, text: str) -> None:
    """Raise SettingError unless this is an origin that a browser sends."""
    origin = parse_origin(text)
    if origin is not None and not origin.below:
        return
    if "@" in text:
        raise SettingError(key, NO_USER)
    hint = ""
    if "*" in text:
        hint = "; wildcards are not supported, list each origin"
    elif re.fullmatch(r"https?://[^/\s]+/.*", text):
        hint = "; write it without the slash and what follows"
    elif text != text.lower():
        hint = "; write it in lower case, as browsers send it"
    raise SettingError(key, "must be an origin such as 'https://app.example.com'", f", not {text[:80]!r}{hint}")


class DatabaseSettings(Table, frozen=True):
    """Where tokens are kept."""

    url: Annotated[str, SECRET] = "sqlite+aiosqlite:///tokenauth.db"
    connections: Annotated[int, between(1, 1000)] = 8


_MIN_IDLE = 60
"""Seconds. Uses are written some seconds later, and clients cache answers for a few seconds."""


class TokenSettings(Table, frozen=True):
    """How long tokens live, and how many there can be."""

    ttl: Annotated[float, duration()] = 24 * 3600
    idle: Annotated[float, duration(low=0)] = 0
    per_user: Annotated[int, between(0, 1_000_000)] = 100
    named_ttl: Annotated[float, duration()] = 90 * 86400
    max_named_ttl: Annotated[float, duration()] = 365 * 86400
    named_per_user: Annotated[int, between(1, 1000)] = 50
    named_tokens_end_with_password: bool = True
    cache_size: Annotated[int, between(1, 100_000_000)] = 100_000

    def __post_init__(self) -> None:
        shown = f", not {self.idle:g}"
        if 0 < self.idle < _MIN_IDLE:
            raise SettingError("idle", f"must be at least {_MIN_IDLE} s, or 0 (logins live for ttl)", shown)
        if self.idle % 4:
            raise SettingError("idle", "must be a multiple of 4 seconds", f"{shown}; write {int(self.idle) // 4 * 4}")
        if self.idle > self.ttl:
            raise SettingError("idle", "must not be more than ttl")
        if self.named_ttl > self.max_named_ttl:
            raise SettingError("named_ttl", "must not be more than max_named_ttl")


class PasswordSettings(Table, frozen=True):
    """What one password hash costs, and how many are computed at once."""

    memory_kib: Annotated[int, between(8, 1 << 20)] = 19 * 1024
    time_cost: Annotated[int, between(1, 100)] = 2
    parallelism: Annotated[int, between(1, 64)] = 1
    threads: Annotated[int, between(0, 256)] = 0
    queue: Annotated[int, between(1, 10_000)] = 64

    def __post_init__(self) -> None:
        least = 8 * self.parallelism
        if self.memory_kib < least:
            raise SettingError("memory_kib", f"must be at least {least} (8 times parallelism), not {self.memory_kib}")

    @property
    def thread_count(self) -> int:
        """The number of threads that hash. The setting 0 means one per core."""
        return self.threads or available_cores()


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS does not limit a process to some cores
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ThrottleSettings(Table, frozen=True):
    """How many logins can fail, and how long the next one then has to wait."""

    free: Annotated[int, between(1, 1_000_000)] = 5
    network_free: Annotated[int, between(1, 1_000_000)] = 100
    delay: Annotated[float, duration(3600)] = 1
    max_delay: Annotated[float, duration(86400)] = 15 * 60
    forget: Annotated[float, duration(30 * 86400)] = 3600

    def __post_init__(self) -> None:
        if self.max_delay < self.delay:
            raise SettingError("max_delay", "must not be less than delay")
        if self.forget < self.max_delay:
            raise SettingError("forget", "must not be less than max_delay")


class UserSettings(Table, frozen=True):
    username: str
    password: Annotated[str, SECRET]
    scopes: tuple[ScopeName, ...] = ()

    def __post_init__(self) -> None:
        if not self.username or len(self.username) > MAX_NAME or self.username != self.username.strip():
            raise SettingError("username", f"must have 1 to {MAX_NAME} characters, with no blank at either end")
        if not is_visible(self.username):
            raise SettingError("username", "must not have control characters or invisible ones")


class FileUserSettings(UserSettings, frozen=True):
    """A user of the users_file. `origin` is the place there."""

    origin: FileLine | None = None


class UsersFileSettings(Table, frozen=True):
    """A file of Apache's htpasswd with more users, and the scopes of all of them."""

    path: Annotated[str, file_path("/etc/tokenauth/htpasswd")] = ""
    scopes: tuple[ScopeName, ...] = ()


_ISSUER = re.compile(r"(https://[^/?#\s\"\\]+|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?)(/[^/?#\s\"\\{}]+)*")
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")


class OAuthSettings(Table, frozen=True):
    """What the service calls itself in its metadata (RFC 8414)."""

    issuer: Annotated[str, SECRET] = ""

    def __post_init__(self) -> None:
        authority = self.issuer.partition("//")[2].partition("/")[0]
        if "@" in authority:
            raise SettingError("issuer", NO_USER)
        if self.issuer and not _ISSUER.fullmatch(self.issuer):
            raise SettingError(
                "issuer",
                "must be a URL such as 'https://auth.example.com', without a query or a slash at its end (http only for"
                " this machine)",
                f", not {self.issuer!r}",
            )
        if not authority.isascii():
            raise SettingError(
                "issuer", "the host has letters outside ASCII: write it as 'xn--...'", f", not {authority!r}"
            )
        match = _AUTHORITY.fullmatch(authority)
        if self.issuer and (match is None or not 1 <= int(match["port"] or 1) <= 65535):
            problem = "must have a host, and a port from 1 to 65535 or none"
            raise SettingError("issuer", problem, f", not {authority!r}")


class BrowserSettings(Table, frozen=True, dict=True):
    """The login page, its cookie, and the pages that a browser is sent back to. Without a url there are none."""

    url: str = ""
    domain: str = ""
    return_to: tuple[str, ...] = ()
    remember_ttl: Annotated[float, duration()] = 30 * 86400

    def __post_init__(self) -> None:
        if not self.url:
            for key in ("domain", "return_to"):
                if getattr(self, key):
                    raise SettingError("url", f"is missing: {key} needs it, such as 'https://auth.example.com'")
            return
        host = self.origin.host
        if self.origin.below:
            raise SettingError("url", "must name one host", f", not {self.url!r}")
        if self.domain:
            self._check_domain(host)
        for number, origin in enumerate(self.return_origins):
            self._check_return(f"return_to[{number}]", origin)

    def _check_domain(self, host: str) -> None:
        if not DOMAIN.fullmatch(self.domain):
            hint = f"; write {self.domain[1:]!r}" if self.domain.startswith(".") else ""
            raise SettingError("domain", "must be a domain such as 'example.com'", f", not {self.domain[:80]!r}{hint}")
        if not self.origin.secure:
            raise SettingError("domain", "needs an https url; on this machine, all ports of a host share its cookies")
        if host != self.domain and not host.endswith(f".{self.domain}"):
            shown = f": {host!r} is not in {self.domain!r}"
            raise SettingError("domain", "must contain the host of url", shown)

    def _check_return(self, key: str, origin: Origin) -> None:
        if origin.secure != self.origin.secure:
            raise SettingError(key, f"must begin with {self.origin.scheme}, as url does, not with {origin.scheme}")
        if self.domain:
            if origin.host != self.domain and not origin.host.endswith(f".{self.domain}"):
                shown = f": {origin.host!r} is not in {self.domain!r}"
                raise SettingError(key, "must be in domain, or the cookie does not reach it", shown)
        elif origin.below or origin.host != self.origin.host:
            hint = "set browser.domain to a domain that both are in" if self.origin.secure else "use the host of url"
            shown = f"; the cookie of {self.origin.host!r} does not reach {str(origin).partition('//')[2]!r}"
            raise SettingError(key, f"is not reached by the cookie: {hint}", shown)

    @cached_property
    def origin(self) -> Origin:
        """The origin of the login page."""
        return check_origin("url", self.url)

    @cached_property
    def return_origins(self) -> tuple[Origin, ...]:
        """The origins that a browser may be sent back to, besides that of the login page."""
        return tuple(check_origin(f"return_to[{number}]", text) for number, text in enumerate(self.return_to))


class MemberSettings(Table, frozen=True):
    """A member of a pool: the token of one thing with a name, such as a device."""

    name: Annotated[str, text(NAME_PATTERN, "1 to 64 letters, digits, dots, dashes and underscores")]
    labels: tuple[Annotated[str, text(LABEL, "1 to 64 letters, digits and any of . _ : = / + -")], ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise SettingError("labels", "has a label twice")
        if len(self.note) > _MAX_NOTE or not is_visible(self.note):
            raise SettingError("note", f"must be one line of at most {_MAX_NOTE} visible characters")


_LISTEN = re.compile(r"(?:[!-9;-Z^-~]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", re.ASCII)


class MetricsSettings(Table, frozen=True):
    """Where Prometheus reads metrics; without an address there are none."""

    listen: str = ""

    def __post_init__(self) -> None:
        if self.listen and (_LISTEN.fullmatch(self.listen) is None or self.address[1] > 65535):
            problem = "must be an address and a port, such as '127.0.0.1:9180' or '[::1]:9180'"
            raise SettingError("listen", problem, f", not {self.listen[:80]!r}")

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port to listen on."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def exposure(self) -> str | None:
        """How others than this machine's users can read the metrics; None if they cannot."""
        if not self.listen or _is_loopback(self.address[0]):
            return None
        return f"metrics.listen: {self.listen!r} answers anyone who can reach it, without a login"


_AUDIT_FILE = "/var/log/tokenauth/audit.jsonl"

_MIN_KEY = 16
"""Characters of a key for the audit log."""


class AuditSettings(Table, frozen=True):
    """Where the audit log is written; without a file there is none."""

    file: Annotated[str, file_path(_AUDIT_FILE)] = ""
    max_mib: Annotated[int, between(0, 1 << 20)] = 64
    keep: Annotated[int, between(1, 1000)] = 10
    key: Annotated[str, SECRET] = ""

    def __post_init__(self) -> None:
        if self.file and (not self.file.startswith("/") or self.file.endswith("/")):
            problem = f"must be the full path of a file, such as {_AUDIT_FILE!r}"
            raise SettingError("file", problem, f", not {self.file[:80]!r}")
        if 0 < len(self.key) < _MIN_KEY:
            raise SettingError("key", f"must have at least {_MIN_KEY} characters, or be empty")


class PoolSettings(Table, frozen=True):
    """A pool of tokens to lease."""

    capacity: Annotated[int, between(0, 100_000_000)] | None = None
    token_ttl: Annotated[float, duration()] | None = None
    lease_ttl: Annotated[float, duration()] = 60
    lease_max: Annotated[float, duration()] | None = None
    reclaim_delay: Annotated[float, duration(86400, low=0)] = 0
    per_user: Annotated[int, between(1, 1_000_000)] | None = None
    prefill: bool = False
    scope: ScopeName | None = None
    manage_scope: ScopeName = ADMIN
    log_leases: bool = False
    members: tuple[MemberSettings, ...] = ()

    def __post_init__(self) -> None:
        if self.lease_max is not None and self.lease_max < self.lease_ttl:
            raise SettingError("lease_max", "must not be less than lease_ttl")
        if self.members:
            self._check_members()
        if self.prefill and self.capacity is None:
            raise SettingError("prefill", "needs `capacity`, the number of tokens to keep")
        if self.prefill and self.token_ttl is not None:
            raise SettingError("token_ttl", "must not be set with prefill, whose free tokens do not expire")

    def _check_members(self) -> None:
        for key, value in (
            ("capacity", self.capacity),
            ("token_ttl", self.token_ttl),
            ("prefill", self.prefill or None),
        ):
            if value is not None:
                raise SettingError(key, "must not be set with members: the pool has exactly these tokens")
        if len(self.members) > _MAX_MEMBERS:
            raise SettingError("members", f"must be at most {_MAX_MEMBERS}", f", not {len(self.members)}")
        names = {member.name: number for number, member in reversed([*enumerate(self.members)])}
        for number, member in enumerate(self.members):
            if names[member.name] != number:
                problem = f"{member.name!r} is the name of members[{names[member.name]}]: use another one"
                raise SettingError(f"members[{number}].name", problem)
            for label in member.labels:
                if label in names:
                    problem = f"{label!r} is the name of a member, and so selects that one: use another word"
                    raise SettingError(f"members[{number}].labels", problem)


_KINDS = Meta(extra={"tables": {name: dialect.settings for name, dialect in DIALECTS.items()}})


class Settings(Table, frozen=True, dict=True):
    """Everything that the file can set."""

    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    tokens: TokenSettings = TokenSettings()
    passwords: PasswordSettings = PasswordSettings()
    throttle: ThrottleSettings = ThrottleSettings()
    oauth: OAuthSettings = OAuthSettings()
    browser: BrowserSettings = BrowserSettings()
    metrics: MetricsSettings = MetricsSettings()
    audit: AuditSettings = AuditSettings()
    users_file: UsersFileSettings = UsersFileSettings()
    users: tuple[UserSettings, ...] = ()
    pools: dict[str, PoolSettings] = {}  # noqa: RUF012 - msgspec copies it for each record
    dialects: Annotated[dict[str, DialectSettings], _KINDS] = {}  # noqa: RUF012 - likewise

    def __post_init__(self) -> None:
        self._check_users()
        self._check_pools()
        self._check_dialects()
        if self.browser.url and self.browser.remember_ttl < self.tokens.ttl:
            raise SettingError("browser.remember_ttl", "must not be less than tokens.ttl")
        if self.server.tls_certificate and self.browser.url and not self.browser.origin.secure:
            raise SettingError("browser.url", "must begin with https, as there is a server.tls_certificate")

    def _check_users(self) -> None:
        seen: set[str] = set()
        for number, user in enumerate(self.users):
            if canonical(user.username) in seen:
                problem = f"{user.username!r} exists already (upper and lower case are the same): remove one of the two"
                raise SettingError(f"users[{number}].username", problem)
            seen.add(canonical(user.username))

    def _check_pools(self) -> None:
        for name in self.pools:
            if not re.fullmatch(NAME_PATTERN, name):
                raise SettingError(
                    "pools", f"{name!r} is not a name of 1 to 64 letters, digits, dots, dashes and underscores"
                )

    def _check_dialects(self) -> None:
        for name, dialect in self.dialects.items():
            key = f"dialects.{name}"
            pool = self.pools.get(dialect.pool)
            if pool is None:
                known = ", ".join(self.pools) or "none"
                shown = f": there is no [pools.{dialect.pool[:80]}]"
                raise SettingError(f"{key}.pool", f"must be one of the pools ({known})", shown)
            if pool.scope is not None and not dialect.require_token:
                raise SettingError(
                    f"{key}.require_token", f"must be true, because [pools.{dialect.pool}] needs a scope"
                )
            if pool.members:
                raise SettingError(f"{key}.pool", f"[pools.{dialect.pool}] must have no members: use another pool")
            if pool.per_user is not None and not dialect.require_token:
                raise SettingError(f"{key}.require_token", f"must be true, because [pools.{dialect.pool}] has per_user")
            if DIALECTS[name].needs_prefill and not pool.prefill:
                raise SettingError(f"{key}.pool", f"[pools.{dialect.pool}] must have prefill = true")
            new_value = DIALECTS[name].new_value
            if new_value is not None and self.new_values[dialect.pool] is not new_value:
                raise SettingError(
                    f"{key}.pool",
                    f"the tokens in [pools.{dialect.pool}] have the form of another dialect; give each dialect a pool"
                    " of its own",
                )

    @cached_property
    def exposure(self) -> str | None:
        """How others than this machine's users can reach the service; None if they cannot.

        A loopback address is no protection behind a reverse proxy that passes on requests from outside.
        """
        if self.server.socket:
            return f"server.socket: {self.server.socket!r} is for a proxy, through which others can reach the service"
        if not self.server.loopback:
            return f"server.host: {self.server.host!r} can be reached by others"
        if self.server.trusted_proxies:
            return "server.trusted_proxies: names a proxy, through which others can reach the service"
        if self.oauth.issuer.startswith("https:"):
            return f"oauth.issuer: {self.oauth.issuer!r} means that others can reach the service"
        if self.browser.url.lower().startswith("https:"):
            return f"browser.url: {self.browser.url!r} means that others can reach the service"
        return None

    @cached_property
    def pools_by_name(self) -> Mapping[str, Pool]:
        """The pools, for the service."""
        ageing = {dialect.pool for name, dialect in self.dialects.items() if DIALECTS[name].ages_while_leased}
        return {
            name: Pool(
                name,
                lease_ttl=pool.lease_ttl,
                token_ttl=math.inf if pool.token_ttl is None else pool.token_ttl,
                capacity=len(pool.members) if pool.members else pool.capacity,
                prefill=pool.prefill,
                scope=pool.scope,
                manage_scope=pool.manage_scope,
                log_leases=pool.log_leases,
                ages_while_leased=name in ageing,
                lease_max=math.inf if pool.lease_max is None else pool.lease_max,
                reclaim_delay=pool.reclaim_delay,
                per_user=pool.per_user,
                members={member.name: Member(member.name, member.labels, member.note) for member in pool.members},
            )
            for name, pool in self.pools.items()
        }

    @cached_property
    def new_values(self) -> Mapping[str, Callable[[], str]]:
        """What makes token values, by pool, where the clients of a dialect expect a certain form."""
        found: dict[str, Callable[[], str]] = {}
        for name, dialect in self.dialects.items():
            new_value = DIALECTS[name].new_value
            if new_value is not None:
                found.setdefault(dialect.pool, new_value)
        return found

    @cached_property
    def users_by_name(self) -> Mapping[str, User]:
        """The users by canonical name."""
        ends = self.tokens.named_tokens_end_with_password
        found = {}
        for user in self.users:
            name, origin = canonical(user.username), user.origin if isinstance(user, FileUserSettings) else None
            found[name] = User(name, user.password, user.scopes, ends, origin)
        return found


def canonical(username: str) -> str:
    """Return the one form of a user name in which names are compared, counted and stored."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", username).casefold())
