"""The schema in PostgreSQL: the migrations, concurrent upgrades, and older nodes that serve during an upgrade."""

import asyncio
import fcntl
import json
import os
import re
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.support.postgres import Cluster
from tests.support.processes import Forked
from tests.support.servers import START, TOKENAUTH, spawn
from tests.system.postgres.nodes import connected, fetch, nodes, write_config_for
from tests.system.postgres.upgrades import COLUMNS, NEXT_GENERATION, NEXT_STEP, newer_release
from tokenauth.errors import StartError
from tokenauth.models import CountUpdate, Pool, Token
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores import schema
from tokenauth.stores.open import open_store
from tokenauth.stores.tables import metadata

T = TypeVar("T")

CONDITIONS = "SELECT indexname, substring(indexdef FROM 'WHERE \\((.*)\\)$') FROM pg_indexes WHERE indexdef ~ ' WHERE '"
COLUMNS_OF = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
KEYS = """
    SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE contype = 'p' AND connamespace = 'public'::regnamespace
"""
SEQUENCES = "SELECT sequencename, last_value FROM pg_sequences"


async def on(url: str, work: Callable[[Connection], T]) -> T:
    """Run something with SQLAlchemy in a transaction."""
    async with create_async_engine(url, poolclass=NullPool).begin() as db:
        return await db.run_sync(work)


async def start(url: str) -> str | None:
    """Start a store and stop it. Return why it is not ready, or None."""
    async with nodes(url) as (store,):
        return await store.ready()


def token(number: int, user: str = "ann") -> Token:
    return Token.new(sha256(b"%d" % number).digest(), user, "c", START, int(START) + 100)


async def test_the_migrations_build_the_declared_tables(url: str) -> None:
    """Except the index of token digests, which are the primary key here."""

    def differences(db: Connection) -> list[Any]:
        options = {
            "compare_type": True,
            "include_object": lambda _, name, kind, *__: (kind, name) != ("index", "tokens_by_digest"),
        }
        found: list[Any] = compare_metadata(MigrationContext.configure(db, opts=options), metadata)
        return found

    assert await on(url, differences) == []


async def test_partial_indexes_have_the_same_conditions(url: str) -> None:
    """SQLAlchemy does not compare them, and the tables declare those of SQLite."""
    indexes = [index for table in metadata.sorted_tables for index in table.indexes]
    conditions = {index.name: index.dialect_options["sqlite"]["where"] for index in indexes}
    wanted = {name: str(condition) for name, condition in conditions.items() if condition is not None}
    assert wanted
    assert dict(await fetch(url, CONDITIONS)) == wanted


async def test_primary_keys_spread_over_their_index(url: str) -> None:
    assert dict(await fetch(url, KEYS)) == {
        "alembic_version": "PRIMARY KEY (version_num)",
        "tokens": "PRIMARY KEY (digest)",
        "revocations": "PRIMARY KEY (seq)",
        "failures": "PRIMARY KEY (key)",
        "marks": "PRIMARY KEY (name)",
        "pool_tokens": "PRIMARY KEY (number, pool)",
        "pool_requests": "PRIMARY KEY (number, pool)",
        "forced_ends": "PRIMARY KEY (pool, value)",
    }


async def test_values_sort_by_code_point_in_any_locale(url: str) -> None:
    columns = "SELECT collation_name FROM information_schema.columns WHERE table_name = 'pool_tokens'"
    assert await fetch(url, f"{columns} AND column_name = 'value'") == [("C",)]


async def test_issuing_and_leasing_use_no_sequence(url: str) -> None:
    async with nodes(url) as (store,):
        await store.pools.generate(Pool("p", 60), ["t1"], START)
        before = dict(await fetch(url, SEQUENCES))
        assert before == {"revocations_seq_seq": None, "pool_tokens_number_seq": 1, "pool_requests_number_seq": None}
        await asyncio.gather(*(store.tokens.issue(token(number), 100, START) for number in range(50)))
        await store.pools.assign(Pool("p", 60), "ann", START)
        await store.failures.update([CountUpdate(bytes(16), 1, at=START)], START)
        assert dict(await fetch(url, SEQUENCES)) == before
        listed = await store.tokens.list("ann", START, 99)
        assert len(listed) == 50


async def test_numbers_are_the_order_of_issue_on_every_node(url: str) -> None:
    async with nodes(url, 2) as (one, other):
        for number in range(10):
            await (one, other)[number % 2].tokens.issue(token(number), 0, START)
        assert await one.tokens.list("ann", START, 99) == [token(number) for number in range(9, -1, -1)]


def start_together(url: str, count: int, directory: Path) -> None:
    """Start processes at the same time on an empty database. Each adds a token, and one creates the schema."""
    start_file, log = directory / "start", directory / "log"
    streams = [Path(os.devnull), log, log]
    with start_file.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        started = [
            Forked(
                "tests.system.postgres.node_opener",
                ["", str(start_file), url, str(number)],
                directory,
                streams,
                os.environ,
            )
            for number in range(count)
        ]
    assert [process.wait(60) for process in started] == [0] * count, log.read_text()
    assert asyncio.run(fetch(url, "SELECT count(*) FROM tokens")) == [(count,)]
    assert asyncio.run(fetch(url, "SELECT version_num FROM alembic_version")) == [(schema.HEAD,)]
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events == ["database_created"], "one process must create the schema, and none may log anything else"


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_nodes_upgrade_an_empty_database_at_once(
    postgres: Cluster, database: str, tmp_path: Path, isolation: str
) -> None:
    name = database.rpartition("/")[2].partition("?")[0]
    postgres.execute(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{isolation}'")
    start_together(database, 4, tmp_path)


_OTHERS_UPGRADE = "SELECT pg_advisory_xact_lock(hashtextextended('tokenauth schema', 0))"


async def test_a_start_without_an_upgrade_takes_no_lock(url: str) -> None:
    async with connected(url) as other, other.transaction():
        await other.execute(_OTHERS_UPGRADE)
        async with asyncio.timeout(10), nodes(url) as (node,):
            assert await node.ready() is None


async def test_a_start_logs_its_wait_for_an_upgrade_and_can_stop(database: str, tmp_path: Path) -> None:
    config = write_config_for(database, tmp_path)
    command = [TOKENAUTH, "serve", "--config", str(config), "--port", "0"]
    async with connected(database) as other, other.transaction():
        await other.execute(_OTHERS_UPGRADE)
        with spawn(command, tmp_path) as server:
            await asyncio.to_thread(server.wait, "schema_upgrade_blocked", 60)
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.process.wait, 20) == 0


async def test_older_nodes_serve_and_start_after_a_later_step(url: str, tmp_path: Path) -> None:
    async with nodes(url) as (old,):
        await old.tokens.issue(token(1), 0, START)
        with newer_release(tmp_path, NEXT_STEP, *COLUMNS):
            assert await start(url) is None
        assert {("tokens", "device"), ("pool_tokens", "note")} <= set(await fetch(url, COLUMNS_OF))
        assert await old.ready() is None
        await serve(old)
        async with nodes(url) as (again,):
            assert await again.ready() is None
            await serve(again)
    assert await fetch(url, "SELECT version_num FROM alembic_version") == [(NEXT_STEP,)]


async def serve(store: Any) -> None:
    """Use tokens and pools once."""
    assert await store.tokens.get(token(1).digest) == token(1)
    await store.tokens.issue(token(2), 100, START)
    assert token(2) in await store.tokens.list("ann", START, 9)
    assert await store.tokens.revoke(token(2).digest, START)
    pool = Pool("p", 60)
    await store.pools.generate(pool, ["t1"], START)
    assert (await store.pools.assign(pool, "ann", START)).token.value == "t1"
    assert await store.pools.delete(pool, "t1", START)


async def test_a_newer_generation_is_refused_and_logged(url: str, tmp_path: Path) -> None:
    async with nodes(url) as (old,):
        with newer_release(tmp_path, NEXT_GENERATION, *COLUMNS):
            assert await start(url) is None
        assert await old.ready() == f"schema is {NEXT_GENERATION}, this release needs {schema.HEAD}"
        with pytest.raises(
            StartError, match=rf"has schema {re.escape(NEXT_GENERATION)}, which this release does not know"
        ) as refusal:
            await start(url)
        assert f"has schema {NEXT_GENERATION}" in str(refusal.value)
        assert "a newer tokenauth has used it; install that release" in str(refusal.value)


@pytest.mark.parametrize(
    "failure", ["op.drop_column('tokens', 'nothing')", "raise RuntimeError"], ids=["in-the-database", "in-the-program"]
)
async def test_a_migration_that_fails_changes_nothing(url: str, tmp_path: Path, failure: str) -> None:
    before = await fetch(url, COLUMNS_OF)
    with newer_release(tmp_path, NEXT_STEP, COLUMNS[0], failure), pytest.raises((StartError, RuntimeError)):
        await start(url)
    assert await fetch(url, COLUMNS_OF) == before
    assert await fetch(url, "SELECT version_num FROM alembic_version") == [(schema.HEAD,)]
    assert await start(url) is None, "must leave no lock"


async def test_a_first_migration_that_fails_leaves_nothing_behind(database: str) -> None:
    await fetch(database, "CREATE SEQUENCE failures")
    with pytest.raises(StartError, match=re.escape('relation "failures" already exists')):
        await start(database)
    assert await fetch(database, COLUMNS_OF) == []


async def test_older_nodes_on_sqlite_serve_after_a_step(tmp_path: Path) -> None:
    settings = DatabaseSettings(f"sqlite+aiosqlite:///{tmp_path}/tokens.db")

    async def started() -> Any:
        store = open_store(settings, 10, lambda: START)
        await store.start()
        return store

    async def upgraded(revision: str) -> None:
        with newer_release(tmp_path, revision, *COLUMNS):
            await (await started()).stop(START)

    old = await started()
    await old.tokens.issue(token(1), 0, START)
    await upgraded(NEXT_STEP)
    again = await started()
    for store in (old, again):
        assert await store.ready() is None
        await serve(store)
        await store.stop(START)
