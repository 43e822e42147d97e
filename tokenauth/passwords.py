"""Passwords: the only module that knows passlib; hashing runs in a lane of its own."""

import math
import os
import re
import resource
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
from tokenauth.settings.model import PasswordSettings

MIN_LENGTH = 8
"""Characters that a password must have when it is set."""

MAX_LENGTH = 1024
"""Characters of a password; a longer one is refused before any work."""

_SCHEMES = CryptContext(["argon2", "bcrypt", "scrypt", "pbkdf2_sha256"])

_LEAST_WORK = {"bcrypt": 2**10, "scrypt": 2**14 * 8, "pbkdf2_sha256": 100_000}
"""Work below which a hash is weak: rounds, and for scrypt the blocks of memory, N * r."""

_SLOW = 1.0
"""Seconds: a hash that takes longer lets a few logins stop all others."""

_TOO_SLOW = 10.0
"""Seconds: a hash that takes longer is refused, since clients and proxies give up before it is computed."""

_MAX_PARALLELISM = 64
"""Threads that one hash may start, as in [passwords]."""

_SCRYPT_KIB = int((2**31 - 1) / 1.05 / 1024)
"""Memory that Python lets scrypt use (`maxmem` is a C int), with the reserve that passlib adds."""

_GROUPS = 8
"""Groups of users of one cost, so that a choice among them is as fast for any number of users."""

_BCRYPT_BYTES = 72
"""Bytes of a password that bcrypt reads."""


class CannotHash(Exception):
    """The machine could not compute a hash, most likely for lack of memory. The text says what the hash costs."""


class Cost(NamedTuple):
    """What it takes to compute a hash once; the seconds are an estimate for one core."""

    scheme: str
    memory_kib: int
    seconds: float
    threads: int = 1

    def __str__(self) -> str:
        """Say it in a log line or a message."""
        return f"{self.scheme} with {_size(self.memory_kib)} for about {self.seconds:.2g} s"


class _Hash(NamedTuple):
    """A hash, taken apart: `text` is the form in which it is verified, `record` is passlib's."""

    text: str
    scheme: str
    record: Any


class _StandIn(NamedTuple):
    """A hash that no password matches, for a group of users whose hashes have exactly this cost."""

    text: str
    key: bytes
    users: int

    def score(self, name: str) -> float:
        """Say how much a name belongs here (rendezvous hashing, weighted by the users)."""
        drawn = int.from_bytes(blake2b(name.encode(errors="surrogatepass"), key=self.key, digest_size=8).digest())
        return math.log((drawn + 0.5) / 2**64) / self.users


class Passwords:
    """Verifies passwords a few at a time, in threads that give way to everything else."""

    def __init__(self, settings: PasswordSettings, users: Mapping[str, User] | None = None) -> None:
        """Read the hashes of the users. Raises ConfigError for one that this machine can never verify."""
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
        """What a hash that `hash` makes costs."""
        trouble = self._too_costly(self.new_cost)
        if trouble is not None:
            raise ConfigError(f"passwords: a hash of this memory_kib and time_cost {trouble}: lower them")
        self._texts: dict[str, str] = {}
        self._likes: dict[str, str] = {}
        self._costs = {new.text: self.new_cost}
        self._new = _StandIn(new.text, b"", 1)
        self.read_users()

    def read_users(self) -> None:
        """Read the hashes of the users; again after they have changed. Raises ConfigError as above."""
        self._stand_ins = self._make_stand_ins() or [self._new]
        self._alike = len({each.text for each in self._stand_ins}) == 1

    def hash(self, password: str) -> str:
        """Hash a password for the configuration: argon2id at the configured cost, PHC string format.

        Raises CannotHash.
        """
        try:
            return str(self._argon2id.hash(password))
        except Exception:
            raise CannotHash(str(self.new_cost)) from None

    def cost(self, user: User) -> Cost:
        """Say what it takes to check a password of this user."""
        return _cost(_read(user.password_hash))

    def slow(self, cost: Cost) -> bool:
        """Whether a hash takes so long that a few logins at once stop all others."""
        return cost.seconds > _SLOW

    def crowds(self, cost: Cost, workers: int) -> bool:
        """Whether as many of these hashes as are computed at once take more than half of the machine's memory."""
        return cost.memory_kib * self._settings.thread_count * workers > self._memory_kib / 2

    def weak(self, user: User) -> bool:
        """Whether a hash costs an attacker less than the configuration asks for, or than is usual for its scheme."""
        _, scheme, record = _read(user.password_hash)
        if scheme != "argon2":
            work = record.rounds if scheme == "pbkdf2_sha256" else 2**record.rounds
            return bool(work * (record.block_size if scheme == "scrypt" else 1) < _LEAST_WORK[scheme])
        less = record.memory_cost < self._settings.memory_kib or record.rounds < self._settings.time_cost
        return bool(less) or record.type != "id" or record.version != 19

    async def verify(self, claims: Sequence[tuple[str, str]]) -> tuple[User, str]:
        """Return the user whose name and password were sent, and the password.

        `claims` are canonical names and passwords that together are one try: all are hashed, and if one cannot be,
        nothing is said of any. An unknown name costs what the hash of some user costs. Raises InvalidCredentials,
        CannotHash, or Overloaded when more tries wait than `queue` allows.
        """
        users = [self._users.get(name) for name, _ in claims]
        jobs = []
        for user, (name, password) in zip(users, claims, strict=True):
            hashed = self._stand_in(name)
            if user is not None:
                hashed = self._texts.get(user.password_hash, user.password_hash)
            jobs.append((password, hashed))
        matches = await self._executor.run(jobs)
        for user, (name, password), matched in zip(users, claims, matches, strict=True):
            now = self._users.get(name)  # the users may have changed meanwhile
            if user is not None and matched and now is not None and now.credential == user.credential:
                return now, password
        raise InvalidCredentials

    async def ready(self) -> str | None:
        """Say what keeps passwords from being verified, if anything does."""
        trouble = self._executor.trouble()
        return None if trouble is None else f"passwords cannot be verified: {trouble}"

    def close(self) -> None:
        """Let the threads go."""
        self._executor.close()

    def _make_stand_ins(self) -> list[_StandIn]:
        """Make a hash without a password for each cost that users have. Raises ConfigError."""
        hashes: dict[tuple[str, int], list[str]] = {}
        for user in self._users.values():
            like = self._likes.get(user.password_hash) or self._like(user)
            group = sha256(user.username.encode(errors="surrogatepass")).digest()[0] % _GROUPS
            hashes.setdefault((like, group), []).append(user.password_hash)
        # The least of the hashes is a secret that all workers and nodes have, and that few edits change.
        return [
            _StandIn(text, sha256(f"{group} {min(secrets)}".encode()).digest()[:16], len(secrets))
            for (text, group), secrets in hashes.items()
        ]

    def _like(self, user: User) -> str:
        """Read a user's hash, and return one of exactly its cost that no password matches. Raises ConfigError."""
        try:
            read = _read(user.password_hash)
        except ValueError:
            raise ConfigError(
                f"users: the password of {user.username!r} is not a hash that can be verified"
                " (argon2, bcrypt, scrypt, pbkdf2_sha256); make one with `tokenauth hash-password`"
            ) from None
        self._texts[user.password_hash], self._costs[read.text] = read.text, _cost(read)
        trouble = self._too_costly(self._costs[read.text])
        if trouble is not None:
            mend = f"run `tokenauth user passwd {user.username}`"
            raise ConfigError(f"users: the password hash of {user.username!r} {trouble}; {mend}")
        like = self._likes[user.password_hash] = _without_password(read)
        self._costs[like] = self._costs[read.text]
        return like

    def _stand_in(self, name: str) -> str:
        """Choose the hash that is computed for a name that no user has.

        It is always the same for a name, its costs are distributed as the users' are, and nobody can foretell it
        without the users' hashes. A change of one user changes it for as few names as possible.
        """
        if self._alike:
            return self._stand_ins[0].text
        return max(self._stand_ins, key=lambda each: each.score(name)).text

    def _too_costly(self, cost: Cost) -> str | None:
        """Say why this machine cannot compute such a hash, or not in time."""
        limit = min(self._memory_kib, _SCRYPT_KIB) if cost.scheme == "scrypt" else self._memory_kib
        if cost.memory_kib > limit:
            return f"needs {_size(cost.memory_kib)} of memory to check, and {_size(limit)} is all that it can have here"
        if cost.seconds > _TOO_SLOW:
            return f"takes about {cost.seconds:,.0f} seconds to check, and {_TOO_SLOW:.0f} are the most"
        if cost.threads > _MAX_PARALLELISM:
            return f"takes {cost.threads} threads to check, and {_MAX_PARALLELISM} are the most"
        return None

    def _verify(self, jobs: Sequence[tuple[str, str]]) -> list[bool]:
        """Compute all hashes, in a thread, and say which passwords are right. Raises CannotHash."""
        return [self._matches(*job) for job in jobs]

    def _matches(self, password: str, hashed: str) -> bool:
        secret = sent = password.encode(errors="surrogatepass")
        if hashed.startswith("$2"):  # bcrypt cannot hash these: they are wrong, and must cost what others do
            secret = sent.replace(b"\0", b"?")[:_BCRYPT_BYTES]
        try:
            return bool(_SCHEMES.verify(secret, hashed)) and secret == sent
        except Exception:  # the hash was read before, so it is not at fault
            raise CannotHash(str(self._costs.get(hashed, "unknown"))) from None


def impossible(password: str) -> str | None:
    """Say why nobody can have this password."""
    if len(password) > MAX_LENGTH:
        return f"password: longer than {MAX_LENGTH} characters"
    if "\0" in password:
        return "password: has a NUL character"
    return None if is_text(password) else "password: is not Unicode text"


def is_text(text: str) -> bool:
    """Whether a text can be written in UTF-8: no half of a surrogate pair stands alone in it."""
    return not re.search("[\ud800-\udfff]", text)


def machine_memory_kib() -> int:
    """Return the memory that this process can have at the most: the machine's, its control group's, or its limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    found += [limit for limit, _ in map(resource.getrlimit, (resource.RLIMIT_AS, resource.RLIMIT_DATA)) if limit >= 0]
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        found.append(int((Path("/sys/fs/cgroup") / group / "memory.max").read_text()))  # or "max"
    return min(found) // 1024


def _read(hashed: str) -> _Hash:
    """Take a hash apart. Raises ValueError for one that no password can be verified against.

    passlib parses more than can be verified, so what it has parsed must come out as it went in.
    """
    if not re.fullmatch(r"[\x21-\x7e]+", hashed):
        raise ValueError("a hash is printable ASCII without blanks")
    try:
        scheme: str = _SCHEMES.identify(hashed, required=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PasslibHashWarning)  # of the bits that are repaired
            record = _SCHEMES.handler(scheme).from_string(hashed)
        text = str(record.to_string())
    except Exception:  # whatever passlib raises for what it cannot read: asserts and lookups among them
        raise ValueError("passlib cannot read it") from None
    if not _same(scheme, hashed, text) or not _possible(scheme, record):
        raise ValueError("no password can be verified against it")
    return _Hash(text, scheme, record)


def _same(scheme: str, hashed: str, text: str) -> bool:
    """Whether a hash is what passlib makes of it, but for the ways of writing that mean the same."""
    if scheme == "bcrypt":  # the last characters of salt and digest have bits that mean nothing
        return (hashed[:-32], hashed[-31:-1], len(hashed)) == (text[:-32], text[-31:-1], len(text))
    if scheme == "pbkdf2_sha256":
        return hashed.replace("+", ".") == text
    return hashed.replace("$v=16$", "$", 1) == text if scheme == "argon2" else hashed == text


def _possible(scheme: str, record: Any) -> bool:
    """Whether the library that computes a hash takes its numbers, and its digest is not one that was cut off."""
    if scheme == "argon2":
        size = len(record.checksum)
        fits = 8 * record.parallelism <= record.memory_cost < 2**32
        return bool(fits) and record.data is None and size >= 16 and size % 4 == 0
    if scheme == "scrypt":  # RFC 7914 section 2
        return bool(record.rounds < 16 * record.block_size and record.block_size * record.parallelism < 2**30)
    return True


def _cost(read: _Hash) -> Cost:
    """Estimate what a hash costs on a core of 2025: that it is the right order of magnitude is enough."""
    _, scheme, record = read
    if scheme == "argon2":
        starts = 4 * record.parallelism * 2e-5 if record.parallelism > 1 else 0.0  # of threads, in each pass
        seconds = record.rounds * (record.memory_cost * 1e-6 + starts)
        return Cost("argon2", record.memory_cost, seconds, record.parallelism)
    if scheme == "bcrypt":
        return Cost("bcrypt", 4, 2**record.rounds * 6e-5)
    if scheme == "scrypt":
        blocks = 2**record.rounds * record.block_size
        memory = 128 * record.block_size * (2**record.rounds + record.parallelism + 2)
        return Cost("scrypt", -(-memory // 1024), blocks * record.parallelism * 4e-7)
    return Cost("pbkdf2_sha256", 1, record.rounds * 3e-7)


def _without_password(read: _Hash) -> str:
    """Write a hash that costs exactly the same, with a salt and a digest of nothing."""
    for part in ("salt", "checksum"):
        was = getattr(read.record, part)
        setattr(read.record, part, "." * len(was) if isinstance(was, str) else b"." * len(was))
    return str(read.record.to_string())


def _size(kib: int) -> str:
    """Write an amount of memory."""
    for unit, size in (("GiB", 1 << 20), ("MiB", 1 << 10)):
        if kib >= size:
            return f"{kib / size:.3g} {unit}"
    return f"{kib} KiB"
