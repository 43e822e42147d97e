"""The figures about PostgreSQL: one durable server, on the core of the load generator."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from bench import load, world
from bench.figures import Figure, Sample, Sampler
from bench.leasing import CONNECTIONS as LEASE_CONNECTIONS
from bench.limit import BareServer, Comparison
from bench.load import CONNECTIONS
from bench.machine import LOAD_CORE, on_core
from bench.revocation_delay import measure_revocation_delay
from bench.waiting import TABLES
from bench.world import MILLION, Running, value
from tests.support import postgres_programs
from tests.support.postgres import Cluster, cluster
from tokenauth.settings import loader

_DATABASE = "bench"

_REVOKED, _WATCHED = 100_000, 50_000
"""Live tokens beyond the million: those that are revoked, and those whose revocation another node waits for."""

_POOL, _KEPT, _RELEASED = 100_000, 10_000, 200_000
"""Number of tokens that are free at the start of a round, kept alive again and again, and released once each."""

_CHUNK = 100_000
"""Number of rows that one statement inserts."""

_WARM = 2
"""Seconds of load before the first round."""

_TABLES = """
[pools.large]
lease_ttl = "1h"
[pools.leased]
lease_ttl = "1h"
"""

_FILL_TOKENS = """
    INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent)
    SELECT sha256(lpad(n::text, 64, '0')::bytea), 'user' || n % {users}, ('{{{credentials}}}'::text[])[n % {users} + 1],
           extract(epoch FROM now()), extract(epoch FROM now())::bigint + 86400,
           '10.0.' || n % 256 || '.' || n % 199, 'Browser/' || n % 40
    FROM generate_series({first}, {last}) AS n
    ORDER BY 1
"""
_FILL_LEASED = """
    INSERT INTO pool_tokens (pool, value, free_at, holder, fence, username, retired)
    SELECT 'leased', lpad(n::text, 64, '0'), extract(epoch FROM now()) + 86400, 'worker-7', 1, 'user0', false
    FROM generate_series({first}, {last}) AS n
"""
_FILL_FREE = """
    INSERT INTO pool_tokens (pool, value, free_at, fence, retired)
    SELECT 'large', gen_random_uuid(), extract(epoch FROM now()), 0, false
    FROM generate_series(1, {lacking})
"""
_COUNT_LEASED = "SELECT count(*) FROM pool_tokens WHERE pool = '{}' AND free_at > extract(epoch FROM now())"
_COUNT_FREE = "SELECT count(*) FROM pool_tokens WHERE pool = 'large' AND holder IS NULL"
_COUNT_REVOKED = "SELECT count(*) FROM revocations"
_COUNT_ISSUED = "SELECT (SELECT count(*) FROM tokens) + (SELECT count(*) FROM revocations)"


class PostgresRows:
    """The figures, and the PostgreSQL server that they share. It is started when it is first needed."""

    def __init__(self, directory: Path, bare: BareServer, seconds: int) -> None:
        self._directory = directory
        self._bare = bare
        self._seconds = seconds
        self._offsets = {"revoke": MILLION, "release": 0}
        self._names = map("issue_{}".format, count())
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._config: Path | None = None
        self._server: Running | None = None

    def __enter__(self) -> "PostgresRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def version(self) -> int | None:
        """The major version of the server, if it was started."""
        return None if self._cluster is None else self._cluster.version

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        tokens, pools = f"{CONNECTIONS} connections", f"{LEASE_CONNECTIONS} connections"
        return (
            Figure("pg-hot", "PostgreSQL: GET /api/token, 500 hot tokens", 0.75, "", self._hot),
            Figure("pg-million", "PostgreSQL: GET /api/token, 1,000,000 tokens", None, "/s", self._million),
            Figure("pg-issue", f"PostgreSQL: POST /api/token, {tokens}", 2000, "/s", self._issue),
            Figure("pg-revoke", f"PostgreSQL: DELETE /api/token, {tokens}", None, "/s", self._revoke),
            Figure("pg-assign", f"PostgreSQL: assign from 100,000, {pools}", 1500, "/s", self._assign),
            Figure("pg-keep", f"PostgreSQL: keep alive, {pools}", None, "/s", self._keep),
            Figure("pg-release", f"PostgreSQL: release, {pools}", None, "/s", self._release),
            Figure("pg-refuse", "PostgreSQL: until another node refuses", 10, "ms", self._refuse, at_most=True),
        )

    @contextmanager
    def _hot(self) -> Iterator[Sampler]:
        """Validate few tokens, all of which are cached."""
        server = self._serve()
        load.run(server.port, "hot", _WARM)

        yield lambda: self._measured(server, "hot", CONNECTIONS).sample()

    @contextmanager
    def _million(self) -> Iterator[Sampler]:
        """Validate a million tokens, of which few are cached."""
        server = self._serve()
        load.run(server.port, "million", _WARM)
        yield lambda: _rate(self._measured(server, "million", CONNECTIONS))

    @contextmanager
    def _issue(self) -> Iterator[Sampler]:
        """Log in with a negligible hash, each round into a new database."""

        def sample() -> Sample:
            name = next(self._names)
            config = world.write_config(self._directory / name, url=self.cluster().create(name))
            with world.tokenauth(config) as server:
                login = {"username": "user0", "password": "secret"}
                token = server.client.post("/api/token", json=login).raise_for_status().json()["token"]
                _require_valid(server, token)
                found = self._changing("issue", CONNECTIONS, partial(self._count, _COUNT_ISSUED, name), 0, server)
            self.cluster().drop(name)
            return found

        yield sample

    @contextmanager
    def _revoke(self) -> Iterator[Sampler]:
        """Revoke one token after the other."""
        _require_valid(self._serve(), value(MILLION))
        yield lambda: self._changing(
            "revoke", CONNECTIONS, partial(self._count, _COUNT_REVOKED), self._offsets["revoke"]
        )

    @contextmanager
    def _assign(self) -> Iterator[Sampler]:
        """Lease tokens that are never released, from a pool that the statistics of PostgreSQL do not know yet."""
        self._serve()

        def sample() -> Sample:
            lacking = _POOL - self._count(_COUNT_FREE)
            self.cluster().execute(_FILL_FREE.format(lacking=lacking), _DATABASE)
            return self._changing("assign", LEASE_CONNECTIONS, partial(self._count, _COUNT_LEASED.format("large")), 0)

        yield sample

    @contextmanager
    def _keep(self) -> Iterator[Sampler]:
        """Extend leases."""
        server = self._serve()
        yield lambda: _rate(self._measured(server, "keep", LEASE_CONNECTIONS))

    @contextmanager
    def _release(self) -> Iterator[Sampler]:
        """Release one token after the other."""
        self._serve()
        leased = _COUNT_LEASED.format("leased")
        yield lambda: self._changing(
            "release", LEASE_CONNECTIONS, lambda: -self._count(leased), self._offsets["release"]
        )

    @contextmanager
    def _refuse(self) -> Iterator[Sampler]:
        """Revoke tokens on one node, and ask another node about each until it refuses."""
        first = self._serve()
        assert self._config is not None
        tokens = map(value, range(MILLION + _REVOKED, MILLION + _REVOKED + _WATCHED))
        with world.tokenauth(self._config, None) as second:
            yield lambda: measure_revocation_delay(first.port, second.port, tokens, self._seconds)

    def waiting_config(self) -> Path:
        """Create a database for the figures about the waiting line."""
        name = next(self._names)
        return world.write_config(self._directory / name, tables=TABLES, url=self.cluster().create(name))

    def _changing(
        self, kind: str, connections: int, counted: Callable[[], int], offset: int, server: Running | None = None
    ) -> Sample:
        """Send changes, and compare the responses with the database."""
        before = counted()
        found = self._measured(server or self._serve(), kind, connections, offset)
        found.require_changes(counted() - before, connections)
        if kind in self._offsets:
            self._offsets[kind] += found.result.requests + 2 * connections
        return _rate(found)

    def _measured(self, server: Running, kind: str, connections: int, offset: int = 0) -> Comparison:
        return self._bare.compare(lambda: load.run(server.port, kind, self._seconds, connections, offset))

    def _count(self, query: str, database: str = _DATABASE) -> int:
        return int(self.cluster().execute(query, database)[0][0])

    def cluster(self) -> Cluster:
        """Return the PostgreSQL server. It is started at the first call."""
        if self._cluster is None:
            with on_core(LOAD_CORE):  # the server inherits it
                self._cluster = self._stack.enter_context(cluster())
        return self._cluster

    def _serve(self) -> Running:
        """Return the server of all figures that do not need a new database."""
        if self._server is None:
            self._config = world.write_config(
                self._directory / "postgres", tables=_TABLES, url=self.cluster().create(_DATABASE)
            )
            self._fill(self._config)
            self._server = self._stack.enter_context(world.tokenauth(self._config))
            for token in (value(0), value(MILLION - 1)):
                _require_valid(self._server, token)
        return self._server

    def _fill(self, config: Path) -> None:
        """Insert tokens into a new database."""
        world.migrate(config)
        users = loader.load(config).users_by_name
        credentials = ",".join(f'"{users[f"user{number}"].credential}"' for number in range(world.USERS))
        for statement, total in ((_FILL_TOKENS, MILLION + _REVOKED + _WATCHED), (_FILL_LEASED, _KEPT + _RELEASED)):
            for first in range(0, total, _CHUNK):
                last = min(total, first + _CHUNK) - 1
                self.cluster().execute(
                    statement.format(first=first, last=last, users=world.USERS, credentials=credentials), _DATABASE
                )
        for statement in ("VACUUM ANALYZE", "CHECKPOINT"):  # now, not during a measurement
            self.cluster().execute(statement, _DATABASE)
        os.sync()


def missing() -> str | None:
    """Return what the rows of PostgreSQL lack, or None."""
    return None if postgres_programs.find() else postgres_programs.REMEDY


def _rate(found: Comparison) -> Sample:
    result = found.result
    return Sample(result.rate, result.rate, result.p99_ms, f"{found.ratio:.2f} of the limit")


def _require_valid(server: Running, token: str) -> None:
    answer = server.client.get("/api/token", params={"token": token}).json()
    if answer["valid"] is not True:
        raise RuntimeError(f"GET /api/token answered {answer}")
