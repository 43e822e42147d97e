"""The figures about pools and dialects."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench import load, world
from bench.figures import Figure, Sample, Sampler
from bench.limit import BareServer, Comparison
from bench.machine import SERVER_CORE
from bench.world import MILLION, Running, value

CONNECTIONS = 32
"""Connections of clients that lease."""

_KEPT, _RELEASED = 10_000, 600_000
"""Number of leased tokens that are kept alive again and again, and of those that are released once each."""

_SPARE = 500
"""Number of free tokens in the pool of each dialect."""

_TABLES = """
[pools.large]
lease_ttl = "1h"
[pools.small]
lease_ttl = "1h"
[pools.leased]
lease_ttl = "1h"
[pools.permits]
capacity = 500
lease_ttl = "1h"
prefill = true
[pools.uuids]
token_ttl = "1h"
lease_ttl = "1h"
[pools.bounded]
capacity = 1000
token_ttl = "1h"
lease_ttl = "1h"
[pools.owned]
capacity = 1000
token_ttl = "1h"
lease_ttl = "1h"
[dialects.simple-token-implement]
pool = "permits"
prefix = "/permits"
password = "secret"
[dialects.token-pool]
pool = "uuids"
prefix = "/uuids"
[dialects.random-token-generator]
pool = "bounded"
prefix = "/bounded"
[dialects.token-management-service]
pool = "owned"
prefix = "/owned"
"""


_DIALECTS = {
    "permits": "simple-token-implement",
    "uuids": "token-pool",
    "bounded": "random-token-generator",
    "owned": "token-management-service",
}


class LeaseRows:
    """The figures, and the database that they share."""

    def __init__(self, directory: Path, bare: BareServer, seconds: int) -> None:
        self._directory = directory
        self._bare = bare
        self._seconds = seconds
        self._released = 0
        self._config: Path | None = None

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        much = "durable, 32 connections"
        return (
            Figure("assign", f"assign from 1,000,000, {much}", 0.30, "", self._assign),
            Figure("keep", f"keep alive, {much}", 0.27, "", partial(self._plain, "keep")),
            Figure("release", f"release, {much}", 0.28, "", self._release),
            Figure("large", "assign and release, 1,000,000, of 1,000", 0.90, "", self._large),
            *(
                Figure(f"workers-{count}", f"assign and release, {count} workers, of 1", 1.0, "", several)
                for count, several in ((count, partial(self._several, count)) for count in (2, 8))
            ),
            *(
                Figure(kind, f"{name}, its operations in turn", 0.22, "", partial(self._plain, kind))
                for kind, name in _DIALECTS.items()
            ),
        )

    @contextmanager
    def _server(self, workers: int = 1, core: int | None = SERVER_CORE) -> Iterator[Running]:
        if self._config is None:
            self._config = self._fill()
        config = self._config
        if workers > 1:
            config = config.with_name(f"workers-{workers}.toml")
            config.write_text(self._config.read_text().replace("workers = 1\n", f"workers = {workers}\n"))
        with world.tokenauth(config, core) as server:
            yield server

    @contextmanager
    def _assign(self) -> Iterator[Sampler]:
        """Lease tokens that are never released, and count them in the database."""
        with self._server() as server:
            assert self._config is not None
            config = self._config

            def sample() -> Sample:
                before = world.count_leased(config, "large")
                found = self._compare(server, "assign")
                found.require_changes(world.count_leased(config, "large") - before, CONNECTIONS)
                return found.sample()

            yield sample

    @contextmanager
    def _release(self) -> Iterator[Sampler]:
        """Release one token after the other, and count them in the database."""
        with self._server() as server:
            assert self._config is not None
            config = self._config

            def sample() -> Sample:
                before = world.count_leased(config, "leased")
                found = self._compare(server, "release", self._released)
                found.require_changes(before - world.count_leased(config, "leased"), CONNECTIONS)
                self._released += found.result.requests + 2 * CONNECTIONS  # wrk does not wait for its last requests
                return found.sample()

            yield sample

    @contextmanager
    def _large(self) -> Iterator[Sampler]:
        """Lease and release in a pool of a million tokens and, before and after, in one of a thousand."""
        with self._server() as server:

            def rate(kind: str) -> float:
                return load.run(server.port, kind, self._seconds, CONNECTIONS).rate

            def sample() -> Sample:
                before, large, after = rate("pairs_small"), rate("pairs_large"), rate("pairs_small")
                return Sample(large / ((before + after) / 2), large)

            yield sample

    @contextmanager
    def _several(self, count: int) -> Iterator[Sampler]:
        """Lease and release with several workers and, before and after, with one; each time on all cores."""
        with self._server(core=None) as alone, self._server(count, core=None) as several:

            def run(server: Running) -> load.Result:
                return load.run(server.port, "pairs_small", self._seconds, CONNECTIONS)

            def sample() -> Sample:
                before, found, after = run(alone), run(several), run(alone)
                return Sample(found.rate / ((before.rate + after.rate) / 2), found.rate, found.p99_ms)

            yield sample

    @contextmanager
    def _plain(self, kind: str) -> Iterator[Sampler]:
        """Send requests whose responses wrk checks."""
        with self._server() as server:
            yield lambda: self._compare(server, kind).sample()

    def _compare(self, server: Running, kind: str, offset: int = 0) -> Comparison:
        return self._bare.compare(lambda: load.run(server.port, kind, self._seconds, CONNECTIONS, offset))

    def _fill(self) -> Path:
        config = world.write_config(self._directory / "leasing", tables=_TABLES)
        world.fill(config, 1)
        world.fill_pool(config, "large", (str(uuid.uuid4()) for _ in range(MILLION)))
        world.fill_pool(config, "small", (str(uuid.uuid4()) for _ in range(1000)))
        world.fill_pool(config, "leased", map(value, range(_KEPT + _RELEASED)), leased=True)
        for pool in ("uuids", "bounded", "owned"):
            world.fill_pool(config, pool, (str(uuid.uuid4()) for _ in range(_SPARE)))
        return config
