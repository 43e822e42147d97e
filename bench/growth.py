"""The figures about growth: what an operation costs with 10,000,000 tokens and 1,000,000 leases, of that with 1,000."""

import json
import os
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from statistics import mean
from typing import NamedTuple

from bench import load, machine, traffic, world
from bench.figures import Figure, Sample, Sampler, log_progress
from bench.mixed import TABLES, WEIGHTS, Mix, expect, is_done, is_ok, leasing, login, probe
from bench.traffic import Check, Make, Outcome
from bench.world import USERS, Running, credentials_of, value
from tests.support.postgres import Cluster

SIZES = {"1,000": 1000, "100,000": 100_000, "10,000,000": 10_000_000}
"""Numbers of tokens, as they are shown. Pools have as many leased tokens, up to MAX_LEASES."""

SMALL, *_, LARGE = SIZES.values()
MAX_LEASES = 1_000_000
_FREE = 1000
"""Number of free tokens of each pool."""

_COUNTS = {"probe": 5000, "issue": 2000, "revoke": 2000, "lease": 4000}
"""Number of requests of one measurement."""

_ROUNDS = 9
"""Number of rounds: many short ones, so that the sizes are measured soon after each other."""

_LOOK_UPS = """
cache_size = 1
ttl = "30d"
idle = "20d"
"""
"""Settings of [tokens] with which each probe is a look-up, and no use of a token is due to be written."""

_BOUND = 1.1

EXPIRED = 50_000
"""Number of expired tokens that are swept in one measurement of its cost."""

BACKLOG = 300_000
"""Number of tokens that expire between two rounds of the sweeper: 5,000 a second."""

_SWEEP_RATE = 5000.0
_SWEEP_TIMEOUT = 150.0
"""Seconds within which expired tokens must be gone: two rounds of the sweeper."""

_LOOK = 0.2
"""Seconds between two looks at what is left of them."""

_END_DUTY = "DELETE FROM marks WHERE name = 'sweep'"
"""Ends the duty of the server that ended last: otherwise the next one would not sweep before that has lapsed."""

_SPAN = 43200
"""Seconds over which the logins of a database are spread. The first of them lives for as long still."""


class Databases(ABC):
    """What differs between the two stores."""

    prefix: str
    shown: str

    @abstractmethod
    def create(self, tokens: int) -> Path:
        """Create a database with tokens and leases; return its configuration."""

    @abstractmethod
    def files(self, config: Path) -> Iterable[Path]:
        """Return the files of a database."""

    @abstractmethod
    def expire(self, config: Path, tokens: int) -> None:
        """Add tokens that have expired. The next server sweeps at its start."""

    @abstractmethod
    def count_expired(self, config: Path) -> int:
        """Return the number of tokens that have expired."""

    @abstractmethod
    def cpu_seconds(self) -> float:
        """Return the CPU time that the database server has used."""

    @abstractmethod
    def sizes(self, config: Path) -> tuple[int, int]:
        """Return the bytes of the tokens and of the pool tokens on disk, with their indexes."""


_FILL_FILE = """
    WITH RECURSIVE numbers(n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM numbers WHERE n < {last})
    INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent)
    SELECT digest(n), 'user' || (n % {users}), credential(n % {users}), {since} + n * {distance},
           CAST({since} + n * {distance} AS INTEGER) + 86400, '10.0.' || (n % 256) || '.' || (n % 199),
           'Browser/' || (n % 40)
    FROM numbers
"""
_LATE_INDEXES = ("tokens_by_digest", "tokens_by_expiry")
_BEFORE_DIGESTS = 0.85
"""The share of the tokens that is inserted before the index by digest is made, which is several times as fast.

The rest, in random order, splits all its pages: then it is as full as if it had been there from the start, 88 %.
"""


class SqliteDatabases(Databases):
    """Files. Their indexes have the form that logins give them."""

    prefix = ""
    shown = ""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sizes: dict[Path, tuple[int, int]] = {}

    def create(self, tokens: int) -> Path:
        config = world.write_config(self._directory / f"growth-{tokens}", tables=TABLES)
        world.migrate(config)
        credentials = credentials_of(config)
        since, distance, early = time.time() - _SPAN, _SPAN / tokens, int(tokens * _BEFORE_DIGESTS)
        with closing(sqlite3.connect(world.database(config), isolation_level=None)) as db:
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -4000000"):
                db.execute(f"PRAGMA {pragma}").fetchall()
            db.create_function("digest", 1, lambda number: sha256(value(number).encode()).digest())
            db.create_function("credential", 1, credentials.__getitem__)
            query = "SELECT sql FROM sqlite_master WHERE name = ?"
            by_digest, by_expiry = (db.execute(query, (index,)).fetchone()[0] for index in _LATE_INDEXES)
            for index in _LATE_INDEXES:
                db.execute(f"DROP INDEX {index}")
            db.execute("BEGIN")
            shared = {"users": USERS, "since": since, "distance": distance}
            db.execute(_FILL_FILE.format(first=0, last=early - 1, **shared))
            db.execute(by_digest)
            db.execute(_FILL_FILE.format(first=early, last=tokens - 1, **shared))
            db.execute(by_expiry)  # which only grows at its end: it can as well be made at last
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL")
        filled = world.database(config).stat().st_size
        world.fill_pool(config, "large", map(value, range(min(tokens, MAX_LEASES))), leased=True)
        self._sizes[config] = filled, world.database(config).stat().st_size - filled
        world.fill_pool(config, "large", (f"free-{number}" for number in range(_FREE)))
        return config

    def files(self, config: Path) -> Iterable[Path]:
        return [world.database(config)]

    def expire(self, config: Path, tokens: int) -> None:
        with closing(sqlite3.connect(world.database(config))) as db, db:
            ended = time.time() - 86400 - 3600
            db.executemany(world.INSERT_TOKEN, world.token_rows(config, tokens, ended, 600 / tokens, first=2 * LARGE))
            db.execute(_END_DUTY)
        os.sync()

    def count_expired(self, config: Path) -> int:
        with closing(sqlite3.connect(f"file:{world.database(config)}?mode=ro", uri=True)) as db:
            query = "SELECT count(*) FROM tokens WHERE expires_at <= ?"
            return int(db.execute(query, (int(time.time()) - 1800,)).fetchone()[0])

    def cpu_seconds(self) -> float:
        return 0.0

    def sizes(self, config: Path) -> tuple[int, int]:
        return self._sizes[config]


_FILL_TOKENS = """
    INSERT INTO tokens (number, digest, username, credential, issued_at, expires_at, address, user_agent)
    SELECT 1000000 * {since}::bigint + n, sha256(lpad(n::text, 64, '0')::bytea), 'user' || n % {users},
           ('{{{credentials}}}'::text[])[n % {users} + 1], {since} + (n - {first}) * {distance},
           ({since} + (n - {first}) * {distance})::bigint + 86400, '10.0.' || n % 256 || '.' || n % 199,
           'Browser/' || n % 40
    FROM generate_series({first}, {last}) AS n
"""
_FILL_POOL = """
    INSERT INTO pool_tokens (pool, value, free_at, holder, fence, username, retired)
    SELECT 'large', lpad(n::text, 64, '0'), extract(epoch FROM now()) + 86400, 'worker-7', 1, 'user0', false
    FROM generate_series(1, {leases}) AS n;
    INSERT INTO pool_tokens (pool, value, free_at, fence, retired)
    SELECT 'large', 'free-' || n, extract(epoch FROM now()), 0, false FROM generate_series(1, {free}) AS n
"""
_INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'tokens' AND indexname <> 'tokens_pkey'"


class PostgresDatabases(Databases):
    """Databases of one server. The tokens are made first, and their indexes after them.

    The pages of the primary key, whose digests are random, are filled to 70 %, as random inserts fill them.
    """

    prefix = "pg-"
    shown = "PostgreSQL: "

    def __init__(self, directory: Path, cluster: Callable[[], Cluster]) -> None:
        self._directory = directory
        self._cluster = cluster

    def create(self, tokens: int) -> Path:
        cluster, name = self._cluster(), f"growth_{tokens}"
        directory = self._directory / f"pg-growth-{tokens}"
        config = world.write_config(directory, tables=TABLES, url=cluster.create(name))
        world.migrate(config)
        indexes = cluster.execute(_INDEXES, name)
        self._run(
            config,
            "ALTER TABLE tokens DROP CONSTRAINT tokens_pkey",
            *(f"DROP INDEX {index}" for index, _ in indexes),
            self._fill(config, tokens, time.time() - _SPAN, _SPAN / tokens),
            "ALTER TABLE tokens ADD PRIMARY KEY (digest) WITH (fillfactor = 70)",
            "ALTER INDEX tokens_pkey RESET (fillfactor)",
            *(definition for _, definition in indexes),
            _FILL_POOL.format(leases=min(tokens, MAX_LEASES), free=_FREE),
            "VACUUM ANALYZE",
            "CHECKPOINT",
        )
        os.sync()
        return config

    def files(self, config: Path) -> Iterable[Path]:
        query = "SELECT oid FROM pg_database WHERE datname = current_database()"
        ((number,),) = self._cluster().execute(query, _database(config))
        return (self._cluster().directory / "data" / "base" / str(number)).glob("[0-9]*")

    def expire(self, config: Path, tokens: int) -> None:
        ended = time.time() - 86400 - 3600
        self._run(config, self._fill(config, tokens, ended, 600 / tokens, first=2 * LARGE), _END_DUTY)

    def count_expired(self, config: Path) -> int:
        query = "SELECT count(*) FROM tokens WHERE expires_at <= extract(epoch FROM now())::bigint - 1800"
        return int(self._cluster().execute(query, _database(config))[0][0])

    def cpu_seconds(self) -> float:
        """Return the CPU time of the server and its processes, including those that have ended."""
        pid = (self._cluster().directory / "data" / "postmaster.pid").read_text().split()[0]
        return world.cpu_seconds_of_tree(pid)

    def sizes(self, config: Path) -> tuple[int, int]:
        query = "SELECT pg_total_relation_size('tokens'), pg_total_relation_size('pool_tokens')"
        tokens, leases = self._cluster().execute(query, _database(config))[0]
        return int(tokens), int(leases)

    def _fill(self, config: Path, tokens: int, since: float, distance: float, first: int = 0) -> str:
        return _FILL_TOKENS.format(
            users=USERS,
            credentials=",".join(f'"{credential}"' for credential in credentials_of(config)),
            since=since,
            distance=distance,
            first=first,
            last=first + tokens - 1,
        )

    def _run(self, config: Path, *statements: str) -> None:
        """Run statements, which may take minutes."""
        cluster = self._cluster()
        options = ["-h", str(cluster.directory), "-p", str(cluster.port), "-U", "postgres", "-d", _database(config)]
        for statement in statements:
            cluster.run("psql", "-q", "-v", "ON_ERROR_STOP=1", *options, "-c", statement)


def _database(config: Path) -> str:
    return config.parent.name.removeprefix("pg-").replace("-", "_")


class Live:
    """Which tokens of a database are live, in all rows."""

    def __init__(self, tokens: int) -> None:
        """`tokens`: how many the database was made with."""
        self.tokens = tokens
        self.random = Random(tokens)
        self.issued: list[str] = []
        self._revoked: set[int] = set()

    def pop(self) -> str:
        """Return any live token, which is then revoked. Token 0, which leases, is not."""
        issued = self.issued
        if self.random.randrange(self.tokens - 1 - len(self._revoked) + len(issued)) < len(issued):
            at = self.random.randrange(len(issued))
            issued[at], issued[-1] = issued[-1], issued[at]
            return issued.pop()
        while True:
            number = self.random.randrange(self.tokens)
            if number not in self._revoked and number != 0:
                self._revoked.add(number)
                return value(number)


class _Side:
    """A server on one of the databases."""

    def __init__(self, server: Running, live: Live, databases: Databases) -> None:
        self.server = server
        self._live = live
        self._random = live.random
        self._databases = databases
        self._held: list[str] = []
        self._steps = count()

    def cost(self, make: Make, requests: int) -> "_Cost":
        """Send requests on 64 connections, one after the other on each. Return what one costs."""
        before = self._cpu_seconds()
        found = traffic.run(self.server.port, {"": make}, traffic.at_once(requests, {"": 1}, self._random))
        return _Cost((self._cpu_seconds() - before) / requests * 1e6, found)

    def _cpu_seconds(self) -> float:
        return self.server.cpu_seconds() + self._databases.cpu_seconds()

    def probe(self) -> tuple[bytes, Check]:
        return probe(self._random.randrange(self._live.tokens)), _is_known

    def issue(self) -> tuple[bytes, Check]:
        return login(self._random.randrange(USERS)), self._was_issued

    def _was_issued(self, status: int, body: bytes) -> None:
        expect(status, 200)
        self._live.issued.append(json.loads(body)["token"])

    def revoke(self) -> tuple[bytes, Check]:
        """Revoke any live token."""
        return f"DELETE /api/token HTTP/1.1\r\nHost: bench\r\nX-Token: {self._live.pop()}\r\n\r\n".encode(), is_ok

    def lease(self) -> tuple[bytes, Check]:
        """Assign, and release what was assigned before, in turn."""
        path = "/api/pools/large/leases"
        if next(self._steps) % 2 and self._held:
            return leasing("DELETE", f"{path}/{self._held.pop(0)}"), is_done
        return leasing("POST", path), self._was_leased

    def _was_leased(self, status: int, body: bytes) -> None:
        expect(status, 201)
        self._held.append(json.loads(body)["token"])


class _Cost(NamedTuple):
    """What one request costs."""

    cpu: float
    """Microseconds of CPU time, with those of the database server."""
    found: Outcome

    @property
    def p99(self) -> float:
        """Milliseconds on one of 64 busy connections."""
        return self.found.percentiles("").p99


_Measured = Callable[[_Side], _Cost]


class GrowthRows:
    """The figures of one store, and its databases."""

    def __init__(self, databases: Databases, seconds: int) -> None:
        self._databases = databases
        self._seconds = seconds
        self._made: dict[int, Path] = {}
        self._live = {tokens: Live(tokens) for tokens in SIZES.values()}

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        name, shown = f"{self._databases.prefix}grown", f"{self._databases.shown}10,000,000 tokens"
        costs: Mapping[str, tuple[str, _Measured]] = {
            "probe": ("random probe, no cache", _probes),
            "issue": ("login", _issue),
            "revoke": ("log-out", _revoke),
            "lease": ("assign and release, 1,000,000 leases", _lease),
        }
        return (
            *(
                Figure(
                    f"{name}-{kind}",
                    f"{shown}: {title}",
                    _BOUND,
                    "x",
                    partial(self._costs, measured, kind),
                    True,
                    _ROUNDS,
                )
                for kind, (title, measured) in costs.items()
            ),
            Figure(f"{name}-start", f"{shown}: start", _BOUND, "x", self._start, True),
            Figure(f"{name}-sweep", f"{shown}: delete an expired token", _BOUND, "x", self._sweep, True, 1),
            Figure(
                f"{name}-backlog", f"{shown}: expiries swept under load", _SWEEP_RATE, "/s", self._backlog, rounds=1
            ),
            Figure(f"{name}-memory", f"{shown}: memory of a worker, full cache", 120, "MB", self._memory, True, 1),
            Figure(f"{name}-disk", f"{shown}: one token on disk", None, "bytes", self._disk, rounds=1),
        )

    def _config(self, tokens: int, more: str = "") -> Path:
        """Return the configuration of a database, with more settings of [tokens]. It is made at the first call."""
        if tokens not in self._made:
            began = time.monotonic()
            self._made[tokens] = self._databases.create(tokens)
            log_progress(f"made {tokens:,} tokens in {time.monotonic() - began:.0f} s")
        config = self._made[tokens]
        if more:
            text = config.read_text().replace("per_user = 0\n", f"per_user = 0\n{more}\n")
            config = config.with_name("more.toml")
            config.write_text(text)
            config.chmod(0o600)
        return config

    @contextmanager
    def _costs(self, measured: _Measured, kind: str) -> Iterator[Sampler]:
        """Compare the cost of a request with each number of tokens; that with the fewest is measured twice."""
        more = _LOOK_UPS if kind == "probe" else ""
        with ExitStack() as stack:
            sides = []
            for tokens in SIZES.values():
                stack.enter_context(machine.in_memory(self._databases.files(self._config(tokens))))
                server = stack.enter_context(world.tokenauth(self._config(tokens, more)))
                sides.append(_Side(server, self._live[tokens], self._databases))
            for side in sides:
                measured(side)  # warm

            def sample() -> Sample:
                first, *others = map(measured, sides)
                last = measured(sides[0])
                medium, large = others
                small = mean([first.cpu, last.cpu])
                rate = mean([first.found.rate, last.found.rate])
                note = (
                    f"{_compared([small, medium.cpu, large.cpu], 'microseconds of CPU')};"
                    f" {large.found.rate / rate:.2f} of its rate,"
                    f" p99 {large.p99:.1f} ms of {mean([first.p99, last.p99]):.1f} ms"
                )
                points = (small, medium.cpu, large.cpu)
                return Sample(large.cpu / small, large.found.rate, large.p99, note, points=points)

            yield sample

    @contextmanager
    def _start(self) -> Iterator[Sampler]:
        """Start: from exec until /readyz answers 200."""
        configs = [self._config(tokens) for tokens in SIZES.values()]

        def seconds(config: Path) -> float:
            with world.tokenauth(config) as server:
                return server.start_seconds

        def sample() -> Sample:
            first, medium, large = map(seconds, configs)
            small = mean([first, seconds(configs[0])])
            return Sample(large / small, note=_compared([small, medium, large], "s"))

        yield sample

    @contextmanager
    def _sweep(self) -> Iterator[Sampler]:
        """Let the sweeper delete tokens that have expired, and divide the CPU time by their number."""

        def cost(tokens: int) -> float:
            config = self._config(tokens)
            self._databases.expire(config, EXPIRED)
            with machine.in_memory(self._databases.files(config)):
                with world.tokenauth(config) as server:
                    used = self._swept(server, config, EXPIRED)
                with world.tokenauth(config) as server:
                    return (used - self._swept(server, config, 0)) / EXPIRED * 1e6

        def sample() -> Sample:
            small, medium, large = map(cost, SIZES.values())
            note = _compared([small, medium, large], "microseconds of CPU a token")
            return Sample(large / small, note=note, points=(small, medium, large))

        yield sample

    def _swept(self, server: Running, config: Path, tokens: int) -> float:
        """Wait until no expired tokens are left. Return the CPU time used from the start of the server on."""
        database = self._databases.cpu_seconds()
        deadline = time.monotonic() + _SWEEP_TIMEOUT
        while self._databases.count_expired(config):
            if time.monotonic() > deadline:
                raise RuntimeError(f"of {tokens} expired tokens, {self._databases.count_expired(config)} are left")
            time.sleep(_LOOK)
        return server.cpu_seconds() + self._databases.cpu_seconds() - database

    @contextmanager
    def _backlog(self) -> Iterator[Sampler]:
        """Sweep what has expired in a minute while the mix of requests is sent at half of saturation."""
        config = self._config(LARGE)

        def sample() -> Sample:
            random = Random(0)
            with machine.in_memory(self._databases.files(config)), world.tokenauth(config) as server:
                mix = Mix(server, random, LARGE, _is_known)
                saturated = traffic.run(server.port, mix.makers, traffic.at_once(10_000, WEIGHTS, random))
                calm = traffic.run(
                    server.port,
                    mix.makers,
                    traffic.at_random(saturated.rate / 2, 2 * self._seconds, WEIGHTS, random),
                )
            self._databases.expire(config, BACKLOG)
            with machine.in_memory(self._databases.files(config)), world.tokenauth(config) as server:
                mix = Mix(server, random, LARGE, _is_known)
                before, began = self._databases.count_expired(config), time.monotonic()
                plan = traffic.at_random(saturated.rate / 2, 4 * self._seconds, WEIGHTS, random)
                busy = traffic.run(server.port, mix.makers, plan)
                after, seconds = self._databases.count_expired(config), time.monotonic() - began
            swept = (before - after) / seconds
            probes = ("hot", "random")
            p99s = [run.percentiles(*kinds).p99 for kinds in (probes, ("login",)) for run in (busy, calm)]
            note = (
                "{:,} in {:.1f} s; p99 of probes {:.2f} ms, without expiries {:.2f} ms, of logins {:.1f} and {:.1f} ms"
            )
            note = note.format(before - after, seconds, *p99s)
            return Sample(swept, busy.rate, busy.percentiles(*probes).p99, note)

        yield sample

    @contextmanager
    def _memory(self) -> Iterator[Sampler]:
        """Validate more tokens than the cache holds, then measure the memory of the worker."""
        with world.tokenauth(self._config(LARGE)) as server:

            def sample() -> Sample:
                probed = load.fill_cache(server.port, self._seconds)
                sizes = server.memory()
                return Sample(sizes["rss"], note=f"RSS after {probed:,} tokens; PSS {sizes['pss']:.0f} MB")

            yield sample

    @contextmanager
    def _disk(self) -> Iterator[Sampler]:
        """Divide what the large database has more than the small one by the numbers of rows."""

        def sample() -> Sample:
            large, small = (self._databases.sizes(self._config(tokens)) for tokens in (LARGE, SMALL))
            tokens, leases = (one - other for one, other in zip(large, small, strict=True))
            note = f"a leased pool token {leases / (MAX_LEASES - SMALL):.0f} bytes; in all {sum(large) / 1e9:.2f} GB"
            return Sample(tokens / (LARGE - SMALL), note=note)

        yield sample


def _compared(values: Sequence[float], unit: str) -> str:
    """Show the value of each size, the largest first."""
    large, medium, small = (f"{each:.3g}" for each in reversed(values))
    return f"{large} {unit}, {medium} with 100,000, {small} with 1,000"


def _probes(side: _Side) -> _Cost:
    return side.cost(side.probe, _COUNTS["probe"])


def _issue(side: _Side) -> _Cost:
    """Log in, and end as many logins: the number of tokens stays."""
    found = side.cost(side.issue, _COUNTS["issue"])
    side.cost(side.revoke, _COUNTS["issue"])
    return found


def _revoke(side: _Side) -> _Cost:
    side.cost(side.issue, _COUNTS["revoke"])
    return side.cost(side.revoke, _COUNTS["revoke"])


def _lease(side: _Side) -> _Cost:
    return side.cost(side.lease, _COUNTS["lease"])


def _is_known(status: int, _: bytes) -> None:
    """Accept revoked tokens as well: another row has revoked some."""
    expect(status, 200)
