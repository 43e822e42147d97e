"""Many nodes start at once on an empty PostgreSQL, and newer releases change its schema while older nodes serve."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import pytest

from tests.support.connections import Connection
from tests.support.journal import background, until, workers
from tests.support.journal import start_together as workers_start_together
from tests.support.pool_users import PoolUser
from tests.support.postgres import Cluster
from tests.support.servers import START, Server, starting, worker
from tests.system.postgres.nodes import connected, fetch, fresh, nodes, write_config_for
from tests.system.postgres.test_schema import start, start_together, token
from tests.system.postgres.upgrades import COLUMNS, NEXT_GENERATION, NEXT_STEP, NEXT_STEPS, newer_release
from tokenauth.stores import schema

POOLS = "[tokens]\nper_user = 20\n\n[pools.p]\ncapacity = 20\nprefill = true"


@pytest.fixture
def url(postgres: Cluster) -> Iterator[str]:
    """Create a database with the schema."""
    with fresh(postgres) as made:
        yield made


@pytest.mark.parametrize("number", range(5))
def test_twenty_upgrades_of_an_empty_database_succeed(database: str, tmp_path: Path, number: int) -> None:
    start_together(database, 20, tmp_path)


def test_twenty_workers_start_on_an_empty_database(database: str, tmp_path: Path) -> None:
    workers_start_together(write_config_for(database, tmp_path, "[tokens]\nper_user = 0"), 20)


class Load:
    """Clients that log in, lease, release, probe and log out at one of the workers, and count the answers."""

    def __init__(self, servers: list[Server]) -> None:
        self._servers = servers
        self._turn = 0
        self._lock = Lock()
        self.answers: Counter[tuple[str, int]] = Counter()

    @property
    def length(self) -> int:
        """The number of answers."""
        return sum(self.answers.values())

    def __call__(self) -> None:
        """Run one session at the next worker."""
        with self._lock:
            self._turn += 1
            port = self._servers[self._turn % len(self._servers)].port
        with Connection(port) as connection:
            user = PoolUser(connection)
            lease = user.ask("POST", "/p/leases")
            statuses = [("lease", lease.status)]
            if lease.status == 201:
                check = {"fence": lease.json()["fence"]}
                path = f"/p/leases/{lease.json()['token']}"
                statuses += [(method, user.ask(method, path, check).status) for method in ("PUT", "DELETE")]
            assert connection.valid(user.token)
            connection.log_out(user.token)
            assert not connection.valid(user.token)
            statuses.append(("ready", connection.ask("GET", "/readyz").status))
        with self._lock:
            self.answers.update(statuses)


SUCCESSES = {("lease", 201), ("PUT", 200), ("DELETE", 204), ("ready", 200)}


def test_adding_a_column_disturbs_no_old_worker(url: str, tmp_path: Path) -> None:
    config = write_config_for(url, tmp_path, POOLS)
    with workers(config, None, 2) as servers:
        load = Load(servers)

        def served() -> None:
            length = load.length
            until(lambda: load.length > length + 100, "the clients are served")

        with background(load, 6):
            served()
            with ExitStack() as releases:
                for number, revision in enumerate(NEXT_STEPS):
                    changes = [change.replace('", sa.String', f'_{number}", sa.String') for change in COLUMNS]
                    releases.enter_context(newer_release(tmp_path, revision, *changes))
                    assert asyncio.run(start(url)) is None
                    served()
        assert set(load.answers) == SUCCESSES, load.answers
        with worker(config) as restarted, Connection(restarted.port) as connection:
            assert connection.ask("GET", "/readyz").status == 200
            Load([restarted])()
        errors = [one for server in servers for one in server.events() if one["level"] in {"error", "critical"}]
        assert not errors


async def test_a_migration_may_outlast_the_request_timeout(url: str, tmp_path: Path) -> None:
    with newer_release(tmp_path, NEXT_STEP, 'op.execute("SELECT pg_sleep(7)")'):
        assert set(await asyncio.gather(start(url), start(url))) == {None}
    assert await fetch(url, "SELECT version_num FROM alembic_version") == [(NEXT_STEP,)]


async def test_an_upgrade_that_waits_blocks_no_other_query(url: str, tmp_path: Path) -> None:
    """A backup reads all tables in one transaction. A lock that waits for it would block all later queries."""
    async with nodes(url) as (old,):
        with newer_release(tmp_path, NEXT_STEP, *COLUMNS):
            async with connected(url) as backup, backup.transaction():
                await backup.execute("SELECT FROM tokens")
                upgrade = asyncio.create_task(start(url))
                waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
                while not await fetch(url, waits):
                    assert not upgrade.done()
                for number in range(20):
                    await old.tokens.issue(token(number), 0, START)
                    assert await old.engine.token(token(number).digest) == token(number)
                assert not upgrade.done()
            assert await upgrade is None
            assert await old.ready() is None


def test_a_newer_generation_stops_old_workers(url: str, tmp_path: Path) -> None:
    config = write_config_for(url, tmp_path, POOLS)
    with worker(config) as old, Connection(old.port) as connection:
        with newer_release(tmp_path, NEXT_GENERATION, *COLUMNS):
            assert asyncio.run(start(url)) is None
        answer = connection.ask("GET", "/readyz")
        assert answer.status == 503
        assert f"schema is {NEXT_GENERATION}, this release needs {schema.HEAD}".encode() in answer.body
        with starting(config) as refused:
            assert refused.process.wait(60) != 0
            log = refused.log.read_text()
        assert f" has schema {NEXT_GENERATION}, which this release does not know" in log
        assert "Traceback" not in log
