"""Hashing and verifying passwords. This is the only module that knows passlib."""

import math
import os
import re
import resource
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

from passlib.context import CryptContext
from passlib.exc import PasslibHashWarning
from passlib.hash import argon2

from tokenauth.errors import ConfigError, InvalidCredentials
from tokenauth.executor import Executor
from tokenauth.models import User
from tokenauth.settings import htpasswd
from tokenauth.settings.model import PasswordSettings

MIN_LENGTH = 8
"""Characters that a new password must have."""

MAX_LENGTH = 1024
"""Characters that a password may have. A longer one is refused before any hashing."""

_SCHEMES = CryptContext(["argon2", "bcrypt", "scrypt", "pbkdf2_sha256"])

_MIN_WORK = {"bcrypt": 2**10, "scrypt": 2**14 * 8, "pbkdf2_sha256": 100_000}
"""Work below which a hash is weak: rounds, for scrypt blocks of memory (N * r)."""

_SLOW = 1.0
"""Seconds. With a hash that takes longer, a few logins delay all others."""

_NEGLIGIBLE = 5e-6
"""Seconds. If all hashes take less, as those of random secrets may, they are computed on the event loop.

In a thread, hashing has the lowest priority, and yet needs the interpreter's lock for most of such a time: then each
login waits for other processes of the machine, and is committed alone.
"""

_MAX_SECONDS = 10.0
"""Seconds. A hash that takes longer is refused, since clients and proxies would give up first."""

_MAX_PARALLELISM = 64
"""Threads that one hash may start. The setting passwords.parallelism has the same bound."""

_SCRYPT_KIB = int((2**31 - 1) / 1.05 / 1024)
"""Memory that scrypt may use: `maxmem` of Python is a C int, and passlib adds 5 %."""

_GROUPS = 8
"""Groups of users with hashes of one cost. Choosing a group takes the same time for any number of users."""

_BCRYPT_BYTES = 72
"""Bytes of a password that bcrypt uses; it ignores the rest."""


class CannotHash(Exception):
    """A hash could not be computed, most likely for lack of memory. The text says what the hash costs."""


class Cost(NamedTuple):
    """The cost of one hash. `seconds` is an estimate for one core."""

    scheme: str
    memory_kib: int
    seconds: float
    threads: int = 1

    @property
    def is_slow(self) -> bool:
        """Whether a few simultaneous logins with such a hash delay all others."""
        return self.seconds > _SLOW

    def __str__(self) -> str:
        return f"{self.scheme} with {_size(self.memory_kib)} for about {self.seconds:.2g} s"


class _Hash(NamedTuple):
    """A parsed hash: `text` is the form that is verified, `record` is the object of passlib."""

    text: str
    scheme: str
    record: Any


class _Dummy(NamedTuple):
    """A hash that no password matches. It represents a group of users whose hashes have exactly this cost."""

    text: str
    key: bytes
    users: int

    def score(self, name: str) -> float:
        """Return the weight of a name for this hash: rendezvous hashing, weighted by the number of users."""
        drawn = int.from_bytes(blake2b(name.encode(errors="surrogatepass"), key=self.key, digest_size=8).digest())
        return math.log((drawn + 0.5) / 2**64) / self.users


class Passwords:
    """Verifies passwords in a few low-priority threads, or on the event loop if all hashes are negligible."""

    def __init__(self, settings: PasswordSettings, users: Mapping[str, User] | None = None) -> None:
        """Parse the hashes of the users. Raises ConfigError for a hash that this machine cannot verify."""
        self._argon2id = argon2.using(
            type="ID",
            memory_cost=settings.memory_kib,
            time_cost=settings.time_cost,
            parallelism=settings.parallelism,
        )
        self._executor = Executor(self._verify, settings.thread_count, settings.queue, low_priority=True)
        self._settings = settings
        self._users = {} if users is None else users
        self._memory_kib = machine_memory_kib()
        new = _read(
            f"$argon2id$v=19$m={settings.memory_kib},t={settings.time_cost},p={settings.parallelism}"
            f"${'A' * 22}${'A' * 43}"
        )
        self.new_cost = _cost(new)
        """The cost of the hashes that `hash` creates."""
        problem = self._too_costly(self.new_cost)
        if problem is not None:
            raise ConfigError(f"passwords: a hash of this memory_kib and time_cost {problem}: lower them")
        self._texts: dict[str, str] = {}
        self._dummy_of: dict[str, str] = {}
        self._costs = {new.text: self.new_cost}
        self._new = _Dummy(new.text, b"", 1)
        self.read_users()

    def read_users(self) -> None:
        """Parse the hashes of the users again, after the users have changed. Raises ConfigError as `__init__` does."""
        self._dummies = self._make_dummies() or [self._new]
        self._one_cost = len({each.text for each in self._dummies}) == 1
        # One costly hash has all computed in threads: names of users and others must be answered alike.
        self._negligible = all(self._costs[each.text].seconds < _NEGLIGIBLE for each in self._dummies)

    def hash(self, password: str) -> str:
        """Hash a password with argon2id at the configured cost. Return it in the PHC string format.

        Raises CannotHash.
        """
        try:
            return str(self._argon2id.hash(password))
        except Exception:
            raise CannotHash(str(self.new_cost)) from None

    def assess(self, user: User) -> tuple[Cost, bool]:
        """Return what it costs to verify a password of a user, and whether the hash is weak.

        A weak one costs an attacker less than the settings ask for, or than is usual for its scheme.
        """
        read = _read(user.password_hash)
        return _cost(read), self._is_weak(read)

    def needs_too_much_memory(self, cost: Cost, workers: int) -> bool:
        """Return whether the hashes computed at the same time can take more than half of the machine's memory."""
        return cost.memory_kib * self._settings.thread_count * workers > self._memory_kib / 2

    def _is_weak(self, read: _Hash) -> bool:
        _, scheme, record = read
        if scheme != "argon2":
            work = record.rounds if scheme == "pbkdf2_sha256" else 2**record.rounds
            return bool(work * (record.block_size if scheme == "scrypt" else 1) < _MIN_WORK[scheme])
        less = record.memory_cost < self._settings.memory_kib or record.rounds < self._settings.time_cost
        return bool(less) or record.type != "id" or record.version != 19

    async def verify(self, pairs: Sequence[tuple[str, str]]) -> tuple[User, str]:
        """Return the user and the password of the first pair that matches.

        `pairs` are the canonical names and the passwords of one attempt. All of them are hashed, and if one cannot be
        hashed, none is answered. An unknown name takes as long to reject as a wrong password. Raises
        InvalidCredentials, CannotHash, or Overloaded when more attempts wait than passwords.queue allows.
        """
        users = [self._users.get(name) for name, _ in pairs]
        jobs = []
        for user, (name, password) in zip(users, pairs, strict=True):
            hashed = self._dummy_for(name)
            if user is not None:
                hashed = self._texts.get(user.password_hash, user.password_hash)
            jobs.append((password, hashed))
        matches = self._verify(jobs) if self._negligible else await self._executor.run(jobs)
        for user, (name, password), matched in zip(users, pairs, matches, strict=True):
            now = self._users.get(name)  # the users may have changed meanwhile
            if user is not None and matched and now is not None and now.credential == user.credential:
                return now, password
        raise InvalidCredentials

    async def ready(self) -> str | None:
        """Return why passwords cannot be verified, or None."""
        problem = self._executor.problem()
        return None if problem is None else f"passwords cannot be verified: {problem}"

    def close(self) -> None:
        self._executor.close()

    def _make_dummies(self) -> list[_Dummy]:
        """Create a dummy hash for each cost that hashes of users have. Raises ConfigError."""
        hashes: dict[tuple[str, int], list[str]] = {}
        for number, user in enumerate(self._users.values()):
            key = f"users_file.path: {user.origin}" if user.origin else f"users[{number}].password"
            dummy = self._dummy_of.get(user.password_hash) or self._make_dummy(user, key)
            group = sha256(user.username.encode(errors="surrogatepass")).digest()[0] % _GROUPS
            hashes.setdefault((dummy, group), []).append(user.password_hash)
        # The smallest hash is a secret that all workers and nodes have, and that few edits of users change.
        return [
            _Dummy(text, sha256(f"{group} {min(secrets)}".encode()).digest()[:16], len(secrets))
            for (text, group), secrets in hashes.items()
        ]

    def _make_dummy(self, user: User, key: str) -> str:
        """Parse the hash of a user; return a dummy of exactly its cost. Raises ConfigError that names the `key`."""
        try:
            read = _read(user.password_hash)
        except ValueError:
            raise ConfigError(
                f"{key}: the password of {user.username!r} is not a hash that can be verified"
                f" (argon2, bcrypt, scrypt, pbkdf2_sha256){_eaten(user.password_hash)}; {how_to_renew(user)}"
            ) from None
        self._texts[user.password_hash], self._costs[read.text] = read.text, _cost(read)
        problem = self._too_costly(self._costs[read.text])
        if problem is not None:
            raise ConfigError(f"{key}: the password hash of {user.username!r} {problem}; {how_to_renew(user)}")
        dummy = self._dummy_of[user.password_hash] = _without_password(read)
        self._costs[dummy] = self._costs[read.text]
        return dummy

    def _dummy_for(self, name: str) -> str:
        """Return the hash to compute for a name that no user has.

        It is always the same for a name. Its costs are distributed as those of the users, and cannot be predicted
        without their hashes. A change of one user changes it for as few names as possible.
        """
        if self._one_cost:
            return self._dummies[0].text
        return max(self._dummies, key=lambda each: each.score(name)).text

    def _too_costly(self, cost: Cost) -> str | None:
        """Return why this machine cannot compute such a hash in time, or None."""
        limit = min(self._memory_kib, _SCRYPT_KIB) if cost.scheme == "scrypt" else self._memory_kib
        if cost.memory_kib > limit:
            return f"needs {_size(cost.memory_kib)} of memory to check, but only {_size(limit)} is available"
        if cost.seconds > _MAX_SECONDS:
            return f"takes about {cost.seconds:,.0f} seconds to check; the limit is {_MAX_SECONDS:.0f}"
        if cost.threads > _MAX_PARALLELISM:
            return f"takes {cost.threads} threads to check; the limit is {_MAX_PARALLELISM}"
        return None

    def _verify(self, jobs: Sequence[tuple[str, str]]) -> list[bool]:
        """Compute all hashes; return which passwords match. Raises CannotHash."""
        return [self._matches(*job) for job in jobs]

    def _matches(self, password: str, hashed: str) -> bool:
        secret = sent = password.encode(errors="surrogatepass")
        if hashed.startswith("$2"):  # bcrypt cannot hash these: they do not match, and must take as long as others
            secret = sent.replace(b"\0", b"?")[:_BCRYPT_BYTES]
        try:
            return bool(_SCHEMES.verify(secret, hashed)) and secret == sent
        except Exception:  # the hash was parsed before, so the machine is the cause
            raise CannotHash(str(self._costs.get(hashed, "unknown"))) from None


_DOLLARS = {"argon2": 5, "2a": 3, "2b": 3, "2y": 3, "scrypt": 4, "pbkdf2-sha256": 4}
"""The number of `$` in a hash, by the name that it begins with."""

_ANONYMOUS = re.compile(r"=\d+=\d+,t=|(ln)?=\d+,r=\d+,p=|-sha256\$|[!-#%-~]{20,}\Z")
"""What can be left of a hash when its first `$` is gone with the word behind it."""


def _eaten(hashed: str) -> str:
    """Return a hint if a program may have replaced each `$...` of a hash: Docker Compose does, and so does a shell."""
    scheme = next((one for one in _DOLLARS if re.match(rf"\$?{one}", hashed)), None)
    if scheme is None:
        lacks = _ANONYMOUS.match(hashed) is not None
    else:
        optional = scheme == "argon2" and "v=" not in hashed
        lacks = hashed.count("$") < _DOLLARS[scheme] - optional
    hint = (
        ": it lacks `$` signs; if it came through Docker Compose, write each as `$$`, through a shell, quote it with '"
    )
    return hint if lacks else ""


def how_to_renew(user: User) -> str:
    """Return the command that sets a new password."""
    if user.origin is not None:
        return htpasswd.how_to_renew(user.origin.path, user.username)
    return f"run `tokenauth user passwd {shlex.quote(user.username)}`"


def password_problem(password: str) -> str | None:
    """Return why no user can have this password, or None."""
    if len(password) > MAX_LENGTH:
        return f"password: longer than {MAX_LENGTH} characters"
    if "\0" in password:
        return "password: has a NUL character"
    return None if is_text(password) else "password: is not Unicode text"


def is_text(text: str) -> bool:
    """Return whether a text can be encoded in UTF-8, so that it has no lone surrogate."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def machine_memory_kib() -> int:
    """Return the memory that this process can use: that of the machine, of its control group (Linux), or its limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    found += [limit for limit, _ in map(resource.getrlimit, (resource.RLIMIT_AS, resource.RLIMIT_DATA)) if limit >= 0]
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        found.append(int((Path("/sys/fs/cgroup") / group / "memory.max").read_text()))  # or "max"
    return min(found) // 1024


def _read(hashed: str) -> _Hash:
    """Parse a hash. Raises ValueError if no password can be verified against it.

    passlib also parses hashes that it cannot verify, so the parsed hash must be written as it was read.
    """
    if not re.fullmatch(r"[\x21-\x7e]+", hashed):
        raise ValueError("a hash is printable ASCII without blanks")
    try:
        scheme: str = _SCHEMES.identify(hashed, required=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PasslibHashWarning)  # about unused bits that it repairs
            record = _SCHEMES.handler(scheme).from_string(hashed)
        text = str(record.to_string())
    except Exception:  # passlib raises many kinds here, also AssertionError and LookupError
        raise ValueError("passlib cannot read it") from None
    if not _same(scheme, hashed, text) or not _computable(scheme, record):
        raise ValueError("no password can be verified against it")
    return _Hash(text, scheme, record)


def _same(scheme: str, hashed: str, text: str) -> bool:
    """Return whether passlib writes a hash as it was read, apart from notations that mean the same."""
    if scheme == "bcrypt":  # the last characters of salt and digest have unused bits
        return (hashed[:-32], hashed[-31:-1], len(hashed)) == (text[:-32], text[-31:-1], len(text))
    if scheme == "pbkdf2_sha256":
        return hashed.replace("+", ".") == text
    return hashed.replace("$v=16$", "$", 1) == text if scheme == "argon2" else hashed == text


def _computable(scheme: str, record: Any) -> bool:
    """Return whether the library accepts the parameters of a hash, and its digest is complete."""
    if scheme == "argon2":
        size = len(record.checksum)
        fits = 8 * record.parallelism <= record.memory_cost < 2**32
        return bool(fits) and record.data is None and size >= 16 and size % 4 == 0
    if scheme == "scrypt":  # RFC 7914 section 2
        return bool(record.rounds < 16 * record.block_size and record.block_size * record.parallelism < 2**30)
    return True


def _cost(read: _Hash) -> Cost:
    """Estimate the cost of a hash on a core of 2025. The order of magnitude is enough."""
    _, scheme, record = read
    if scheme == "argon2":
        thread_starts = 4 * record.parallelism * 2e-5 if record.parallelism > 1 else 0.0  # in each pass
        seconds = record.rounds * (record.memory_cost * 1e-6 + thread_starts)
        return Cost("argon2", record.memory_cost, seconds, record.parallelism)
    if scheme == "bcrypt":
        return Cost("bcrypt", 4, 2**record.rounds * 6e-5)
    if scheme == "scrypt":
        blocks = 2**record.rounds * record.block_size
        memory = 128 * record.block_size * (2**record.rounds + record.parallelism + 2)
        return Cost("scrypt", -(-memory // 1024), blocks * record.parallelism * 4e-7)
    return Cost("pbkdf2_sha256", 1, record.rounds * 3e-7)


def _without_password(read: _Hash) -> str:
    """Return a hash with exactly the same cost, whose salt and digest are dots."""
    for part in ("salt", "checksum"):
        was = getattr(read.record, part)
        setattr(read.record, part, "." * len(was) if isinstance(was, str) else b"." * len(was))
    return str(read.record.to_string())


def _size(kib: int) -> str:
    for unit, size in (("GiB", 1 << 20), ("MiB", 1 << 10)):
        if kib >= size:
            return f"{kib / size:.3g} {unit}"
    return f"{kib} KiB"
