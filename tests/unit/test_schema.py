"""The schema: its migrations, upgrades, and the durability of commits."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import structlog
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests.support.servers import START
from tokenauth.errors import StartError
from tokenauth.models import Pool, PoolCounts, Token
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores import schema
from tokenauth.stores.open import open_store
from tokenauth.stores.sqlite.engine import SqliteEngine
from tokenauth.stores.tables import metadata


@contextmanager
def connected(file: Path | str) -> Iterator[Connection]:
    """Connect with SQLAlchemy, in a transaction that the driver does not control."""
    engine = create_engine(f"sqlite:///{file}", poolclass=NullPool, connect_args={"isolation_level": None})
    event.listen(engine, "begin", lambda db: db.exec_driver_sql("BEGIN IMMEDIATE"))
    with engine.begin() as db:
        yield db


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Connection]:
    """Connect to an empty file."""
    with connected(tmp_path / "tokens.db") as db:
        yield db


@pytest.fixture
def wanted() -> Iterator[Connection]:
    """Connect to a database that was created from the tables instead of the migrations."""
    with connected("") as db:
        metadata.create_all(db)
        yield db


def statements(db: Connection) -> dict[str, str]:
    """Return the SQL that SQLite stores for each table and index."""
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'alembic_version'"
    return {name: " ".join(sql.split()) for name, sql in db.execute(text(query))}


def test_the_required_revision_is_the_newest_migration() -> None:
    scripts = ScriptDirectory.from_config(schema.migrations())
    assert scripts.get_heads() == [schema.HEAD]
    assert scripts.get_bases() == [next(reversed(list(scripts.walk_revisions()))).revision], "one line, no branches"


def test_the_migrations_build_the_declared_tables(db: Connection, wanted: Connection) -> None:
    assert schema.upgrade(db, "tokens.db") is None
    options = {"compare_type": True, "compare_server_default": True}
    assert compare_metadata(MigrationContext.configure(db, opts=options), metadata) == []
    assert statements(db) == statements(wanted)


def test_an_upgrade_logs_the_previous_revision(db: Connection) -> None:
    assert schema.version(db) is None
    assert schema.upgrade(db, "tokens.db") is None
    assert schema.version(db) == schema.HEAD
    assert schema.upgrade(db, "tokens.db") == schema.HEAD


def upgrade_to(db: Connection, revision: str) -> None:
    """Upgrade a database to the schema of an earlier release."""
    settings = schema.migrations()
    settings.attributes["connection"] = db
    command.upgrade(settings, revision)


async def test_an_upgrade_keeps_the_first_release_s_rows(tmp_path: Path) -> None:
    """The rows are inserted in the form of revision 1.1."""
    path, token = (
        tmp_path / "tokens.db",
        Token.new(sha256(b"1").digest(), "ann", "c", START, int(START) + 100, "::1", "curl"),
    )
    with connected(path) as db:
        upgrade_to(db, "1.1")
        before = statements(db)
        row = (token.digest, "ann", "c", token.issued_at, token.expires_at, "::1", "curl")
        db.exec_driver_sql("INSERT INTO tokens VALUES (7, ?, ?, ?, ?, ?, ?, ?)", row)
        db.exec_driver_sql("INSERT INTO revocations VALUES (3, ?, ?)", (sha256(b"2").digest(), START))
        db.exec_driver_sql("INSERT INTO failures VALUES (?, 5, ?)", (bytes(16), START))
        db.exec_driver_sql("INSERT INTO marks VALUES ('clock', ?)", (START + 0.5,))
    store = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{path}"), 10)
    assert await store.start() == START + 0.5
    assert await store.ready() is None
    assert await store.tokens.get(token.digest) == token._replace(address="", user_agent="")
    assert await store.tokens.list("ann", START, 10) == [token]
    assert (await store.failures.get([bytes(16)]))[bytes(16)].count == 5
    pool = Pool("p", lease_ttl=60)
    assert await store.pools.count(pool, START) == PoolCounts(0, 0)
    assert await store.pools.generate(pool, ["t1"], START)
    assert await store.tokens.revoke(token.digest, START)
    await store.stop(START)
    with connected(path) as db:
        assert schema.version(db) == schema.HEAD
        changed = {"tokens", "tokens_by_user"}
        assert {name: sql for name, sql in statements(db).items() if name in before and name not in changed} == {
            name: sql for name, sql in before.items() if name not in changed
        }
        assert db.exec_driver_sql("SELECT seq FROM revocations").scalars().all() == [3, 4]


def test_a_downgrade_leaves_no_limited_token(db: Connection) -> None:
    """Without its name and scopes, it would be a login with all scopes of its user."""
    upgrade_to(db, "2.1")
    before = statements(db)
    upgrade_to(db, "3.1")
    insert = text(
        "INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent, name,"
        " scopes) VALUES (:digest, 'ann', 'c', 1, 2, '', '', :name, :scopes)"
    )
    for digest, name, scopes in (("1", None, None), ("2", "nightly", None), ("3", None, "read"), ("4", None, "")):
        db.execute(insert, {"digest": digest, "name": name, "scopes": scopes})
    settings = schema.migrations()
    settings.attributes["connection"] = db
    command.downgrade(settings, "2.1")
    assert db.exec_driver_sql("SELECT digest FROM tokens").scalars().all() == ["1"]
    assert statements(db) == before


def test_a_schema_of_a_newer_release_is_left_alone(db: Connection) -> None:
    schema.upgrade(db, "tokens.db")
    db.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartError) as refusal:
        schema.upgrade(db, "tokens.db")
    assert "has schema 9999" in str(refusal.value)
    assert "a newer tokenauth has used it" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert schema.version(db) == "9999"


def test_a_failed_upgrade_leaves_nothing_behind(tmp_path: Path) -> None:
    """The upgrade is one transaction. An index that exists already rolls everything back."""
    path = tmp_path / "tokens.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE mine (number)")
        other.execute("CREATE INDEX tokens_by_expiry ON mine (number)")
    with pytest.raises(OperationalError, match="index tokens_by_expiry already exists"), connected(path) as db:
        schema.upgrade(db, "tokens.db")
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",), ("tokens_by_expiry",)]


@pytest.mark.parametrize("exists", [False, True], ids=["no file", "an empty file"])
async def test_a_store_creates_its_schema(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "tokens.db"
    if exists:
        path.touch(0o640)
    store = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{path}"), 10)
    assert await store.start() == 0
    assert await store.ready() is None
    await store.stop(START)
    assert path.stat().st_mode & 0o777 == (0o640 if exists else 0o600)


async def test_a_store_with_a_changed_schema_is_not_ready(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    store = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{path}"), 10)
    await store.start()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    assert await store.ready() == f"schema is 9999, this release needs {schema.HEAD}"
    await store.stop(START)


async def test_a_commit_is_synced_to_the_disk(tmp_path: Path) -> None:
    """Otherwise a power failure would lose the last commits, even with WAL. `synchronous` must be FULL (2)."""
    store = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path}/tokens.db"), 10)
    assert isinstance(store.engine, SqliteEngine)
    await store.start()
    await store.tokens.issue(Token.new(sha256(b"1").digest(), "ann", "", START, int(START) + 1), 0, START)
    writer = store.engine.writer._connection
    pragmas = {name: writer.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
    assert (tmp_path / "tokens.db-wal").stat().st_size > 0
    await store.stop(START)


def count_elsewhere(path: Path) -> int:
    """Count the tokens in a file in another process, which also closes the file."""
    script = (
        "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM tokens').fetchone())"
    )
    return int(subprocess.run([sys.executable, "-c", script, path], capture_output=True, check=True).stdout)


async def test_a_second_store_does_not_block_the_first(tmp_path: Path) -> None:
    """Closing any descriptor of a file releases all POSIX locks of the process on it.

    Then the next process that closes the file believes that it is the last one, and deletes the log that is in use
    (https://sqlite.org/howtocorrupt.html, section 2.2).
    """
    path = tmp_path / "tokens.db"
    stores = [open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{path}"), 10) for _ in range(2)]
    for store in stores:
        await store.start()
    for count in range(1, 4):
        await stores[0].tokens.issue(
            Token.new(sha256(b"%d" % count).digest(), "ann", "", START, int(START) + 1), 0, START
        )
        assert count_elsewhere(path) == count, "an acknowledged token is missing"
    for store in stores:
        await store.stop(START)


@pytest.mark.parametrize(("had", "warned"), [("4.0", False), ("3.1", True), ("1.4", True)])
def test_an_upgrade_to_a_new_generation_says_what_to_stop(had: str, warned: bool) -> None:
    with structlog.testing.capture_logs() as logs:
        schema.log_upgrade(had, "tokens.db")
    [logged] = logs
    assert (logged["event"], logged["before"], logged["after"]) == ("schema_upgraded", had, schema.HEAD)
    assert (logged.get("action") == "stop all servers of the older release") is warned


def test_a_new_database_is_logged_with_its_place() -> None:
    with structlog.testing.capture_logs() as logs:
        schema.log_upgrade(None, "/srv/tokens.db")
    assert logs == [
        {"event": "database_created", "database": "/srv/tokens.db", "schema": schema.HEAD, "log_level": "info"}
    ]
