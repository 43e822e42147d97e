"""A copy to another database has every row of every table, and can be served only when it is complete."""

from collections.abc import Callable
from itertools import count, product
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from tests.support import population
from tests.support.postgres import Cluster
from tokenauth.cli.copy import copy_database
from tokenauth.errors import CopyError, StartError
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores import copying, schema
from tokenauth.stores.copying import CopyReport
from tokenauth.stores.open import open_store
from tokenauth.stores.tables import metadata

NewUrl = Callable[[str], str]

REST = [pytest.param(*pair, marks=pytest.mark.faults) for pair in product(["sqlite", "postgres"], repeat=2)]
PAIRS = [("sqlite", "postgres"), *(REST[at] for at in (0, 2, 3))]
KINDS = ["sqlite", pytest.param("postgres", marks=pytest.mark.faults)]


@pytest.fixture
def new_url(tmp_path: Path, request: pytest.FixtureRequest) -> NewUrl:
    """Return a function that makes the URL of a new database; PostgreSQL starts with the first one."""
    numbers = count()

    def make(kind: str) -> str:
        name = f"copied_{next(numbers)}"
        if kind == "sqlite":
            return f"sqlite+aiosqlite:///{tmp_path}/{name}.db"
        cluster: Cluster = request.getfixturevalue("postgres")
        name = f"{name}_{tmp_path.name}"[-60:]
        request.addfinalizer(lambda: cluster.drop(name))
        return cluster.create(name)

    return make


async def copy(source: str, target: str) -> CopyReport:
    return await copy_database(DatabaseSettings(url=source), DatabaseSettings(url=target), lambda *_: None)


async def filled(url: str, seed: int = 1, size: int = 300) -> str:
    await population.create(url)
    await population.write(url, population.generate(seed, size))
    return url


async def schema_of(url: str) -> object:
    """Return the definitions of all tables and indexes, as the database has them, and the revision."""
    sqlite = "SELECT name, sql FROM sqlite_master"
    postgres = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"

    def definitions(db: Connection) -> object:
        rows = db.execute(text(sqlite if url.startswith("sqlite") else postgres))
        return {name: " ".join((sql or "").split()) for name, sql in rows}, schema.version(db)

    return await population.on_connection(url, definitions)


@pytest.mark.extended
@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_a_copy_and_its_copy_have_all_rows(new_url: NewUrl, source: str, target: str) -> None:
    first = await filled(new_url(source))
    there, back = new_url(target), new_url(source)
    out, home = await copy(first, there), await copy(there, back)
    wanted = await population.read(first)
    assert [len(wanted[table.name]) for table in metadata.sorted_tables] == [300] * len(metadata.tables)
    assert await population.read(there) == wanted
    assert await population.read(back) == wanted
    assert await schema_of(there) == await schema_of(await filled(new_url(target), size=0))
    assert [table.digest for table in out.tables] == [table.digest for table in home.tables]
    assert [(table.rows, table.corrected) for table in out.tables] == [(300, 0)] * len(metadata.tables)


async def test_numbers_that_are_equal_become_different(new_url: NewUrl) -> None:
    """On PostgreSQL two tokens can have the same number. The order of those that differ stays."""
    source, target = new_url("postgres"), new_url("sqlite")
    rows = population.generate(2, 9)["tokens"]
    numbers = [7, 7, 7, 8, 8, 20, 21, 21, -5]
    await population.create(source)
    await population.write(source, {"tokens": [{**row, "number": n} for row, n in zip(rows, numbers, strict=True)]})
    await copy(source, target)
    given = {row["digest"]: n for row, n in zip(rows, numbers, strict=True)}
    copied = sorted((token[0], given[token[1]]) for token in (await population.read(target))["tokens"])
    assert [number for number, _ in copied] == [-5, 7, 8, 9, 10, 11, 20, 21, 22]
    assert [before for _, before in copied] == sorted(numbers)


@pytest.mark.parametrize("target", KINDS)
async def test_numbers_go_on_after_the_highest(new_url: NewUrl, target: str) -> None:
    """Also after one that was deleted since: no number of the log is given twice."""
    source, there = new_url("sqlite"), new_url(target)
    await population.create(source)
    await population.write(source, {"revocations": [{"seq": seq, "digest": b"x" * 32, "at": 1.0} for seq in (5, 9)]})
    await population.on_connection(source, lambda db: db.execute(text("DELETE FROM revocations WHERE seq = 9")))
    await copy(source, there)
    insert = text("INSERT INTO revocations (digest, at) VALUES ('', 1) RETURNING seq")
    assert await population.on_connection(there, lambda db: db.execute(insert).scalar()) == 10


class Interrupted(Exception):
    """Ends a copy in the middle."""


def stop(*_: object) -> None:
    raise Interrupted


@pytest.mark.extended
@pytest.mark.parametrize(("source", "target"), [("sqlite", "postgres"), REST[2]])
async def test_an_interrupted_copy_goes_on(
    new_url: NewUrl, source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step; and what has changed in the source since is copied too."""
    monkeypatch.setattr(f"tokenauth.stores.{source}.copying.BATCH", 7)
    monkeypatch.setattr(copying, "BATCH", 7)
    first, there = await filled(new_url(source), size=20), new_url(target)
    steps = 0
    for stop_at in count(5, 17):
        steps = 0

        def on_progress(*_: object, stop_at: int = stop_at) -> None:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                raise Interrupted

        try:
            await copy_database(DatabaseSettings(url=first), DatabaseSettings(url=there), on_progress)
        except Interrupted:
            with pytest.raises(StartError, match="unfinished copy"):
                await open_store(DatabaseSettings(url=there), 1).start()
            await population.on_connection(first, lambda db: db.execute(text(_CHANGE)))
        else:
            break
    assert stop_at > 30, "it was interrupted several times"
    assert await population.read(there) == await population.read(first)
    assert (await copy(there, new_url(source))).in_use is None


_CHANGE = "DELETE FROM tokens WHERE number IN (SELECT number FROM tokens ORDER BY number LIMIT 1)"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_copy_that_had_finished_says_so(new_url: NewUrl, kind: str) -> None:
    """As long as nothing has changed since."""
    source, target = await filled(new_url("sqlite"), size=20), new_url(kind)
    first, second = await copy(source, target), await copy(source, target)
    assert second.in_use is None
    assert [(table.added, table.corrected) for table in second.tables] == [(0, 0)] * len(metadata.tables)
    assert [table.digest for table in second.tables] == [table.digest for table in first.tables]
    await population.on_connection(source, lambda db: db.execute(text(_CHANGE)))
    before = await population.read(target)
    with pytest.raises(CopyError, match="is not empty; if a copy to it has finished, set"):
        await copy(source, target)
    assert await population.read(target) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_tables_for_a_copy_are_no_database(new_url: NewUrl, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is killed when it has made the tables and copied nothing."""
    source, target = await filled(new_url("sqlite"), size=3), new_url(kind)
    with monkeypatch.context() as patch:
        patch.setattr(copying.Side, "open_target", stop)
        with pytest.raises(Interrupted):
            await copy(source, target)
    with pytest.raises(StartError, match="unfinished copy of another database: run the same `tokenauth copy` again"):
        await open_store(DatabaseSettings(url=target), 1).start()
    await copy(source, target)
    assert await population.read(target) == await population.read(source)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_target_with_rows_is_refused(new_url: NewUrl, kind: str) -> None:
    source, target = await filled(new_url("sqlite"), size=3), await filled(new_url(kind), seed=2, size=3)
    before = await population.read(target)
    with pytest.raises(CopyError, match="is not empty"):
        await copy(source, target)
    assert await population.read(target) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unfinished_copy_of_another_database_is_refused(new_url: NewUrl, kind: str) -> None:
    source, other, target = new_url("sqlite"), new_url("sqlite"), new_url(kind)
    await filled(source, size=3)
    await filled(other, size=3)
    with pytest.raises(Interrupted):
        await copy_database(DatabaseSettings(url=source), DatabaseSettings(url=target), stop)
    with pytest.raises(CopyError, match=r"unfinished copy of .*copied_0\.db"):
        await copy(other, target)
    with pytest.raises(CopyError, match=r"--from: .* is an unfinished copy"):
        await copy(target, new_url("sqlite"))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_copy_is_not_finished_while_a_server_runs(
    new_url: NewUrl, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenauth.stores.sqlite.copying._TIMEOUT", 0.1)
    source, target = await filled(new_url(kind), size=20), new_url("sqlite")
    store = open_store(DatabaseSettings(url=source), 1)
    await store.start()
    for _ in range(2):
        report = await copy(source, target)
        assert report.in_use is not None
        assert ("127.0.0.1" if kind == "postgres" else "another program has it open") in report.in_use
        assert {table.digest for table in report.tables} == {None}
    with pytest.raises(StartError, match="unfinished copy"):
        await open_store(DatabaseSettings(url=target), 1).start()
    await store.stop(0)
    assert (await copy(source, target)).in_use is None
    assert await population.read(target) == await population.read(source)


@pytest.mark.faults
async def test_a_role_without_rights_sees_a_server(new_url: NewUrl, postgres: Cluster) -> None:
    """PostgreSQL tells it little about the connections of others."""
    source = await filled(new_url("postgres"), size=3)
    name = source.rpartition("/")[2]
    postgres.execute("CREATE ROLE mover LOGIN")
    try:
        for kind in ("TABLES", "SEQUENCES"):
            postgres.execute(f"GRANT ALL ON ALL {kind} IN SCHEMA public TO mover", name)
        store = open_store(DatabaseSettings(url=source), 1)
        await store.start()
        report = await copy(source.replace("tokenauth@", "mover@"), new_url("sqlite"))
        assert report.in_use is not None
        await store.stop(0)
    finally:
        postgres.execute("DROP OWNED BY mover", name)
        postgres.execute("DROP ROLE mover")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_target_that_a_server_uses_is_refused(new_url: NewUrl, kind: str) -> None:
    source, target = await filled(new_url("sqlite"), size=3), new_url(kind)
    store = open_store(DatabaseSettings(url=target), 1)
    await store.start()
    with pytest.raises(CopyError, match="is in use"):
        await copy(source, target)
    await store.stop(0)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_database_is_not_copied_to_itself(new_url: NewUrl, kind: str) -> None:
    url = await filled(new_url(kind), size=3)
    with pytest.raises(CopyError, match=r"same database|another `tokenauth copy`"):
        await copy(url, url)


def test_every_table_and_column_is_copied() -> None:
    tables = {copied.name: {*copied.columns} for copied in copying.TABLES}
    assert tables == {t.name: {c.name for c in t.c if c.computed is None} for t in metadata.sorted_tables}
