"""While a database does not answer, operations are refused at once, until a probe succeeds."""

import asyncio
import math
import os
import resource
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Self

import asyncpg
import pytest
import structlog
from sqlalchemy import make_url

from tests.contract.conftest import Place, Places, token
from tests.support.patience import be_patient
from tests.support.servers import START
from tests.support.tcp_proxy import Proxy
from tokenauth.errors import StartError, StoreUnavailable
from tokenauth.models import CountUpdate, Pool, Use
from tokenauth.stores import circuit_breaker
from tokenauth.stores.engine import Change, Transaction
from tokenauth.stores.sqlite import engine as sqlite_engine
from tokenauth.stores.sqlite import writer as sqlite
from tokenauth.stores.sqlite.engine import SqliteEngine
from tokenauth.stores.tables import metadata

POOL = Pool("p", lease_ttl=60)
FULL = Pool("full", lease_ttl=60)
"""A pool without tokens."""
Operation = Callable[[Place], Awaitable[object]]

WRITES: Mapping[str, Operation] = {
    "tokens.issue": lambda place: place.tokens.issue(token(2), 5, START),
    "tokens.revoke": lambda place: place.tokens.revoke(token(1).digest, START),
    "tokens.revoke_all": lambda place: place.tokens.revoke_all("ann", START),
    "tokens.note_uses": lambda place: place.tokens.note_uses(
        [Use(token(1).digest, START, int(START), 0, START)], START
    ),
    "tokens.purge": lambda place: place.tokens.purge(START, 10),
    "pools.generate": lambda place: place.pools.generate(POOL, ["c"], START),
    "pools.fit": lambda place: place.pools.fit(replace(POOL, capacity=5), ["d"], START),
    "pools.assign": lambda place: place.pools.assign(POOL, "ann", START),
    "pools.keep_alive": lambda place: place.pools.keep_alive(POOL, "a", START),
    "pools.keep_alive_free": lambda place: place.pools.keep_alive_free(POOL, START, START, 10),
    "pools.release": lambda place: place.pools.release(POOL, "a", START),
    "pools.force_end": lambda place: place.pools.force_end(POOL, "a", START, "ops"),
    "pools.release_next": lambda place: place.pools.release_next(POOL, START),
    "pools.delete": lambda place: place.pools.delete(POOL, "a", START),
    "pools.purge": lambda place: place.pools.purge(POOL, START, 10),
    "pools.ask": lambda place: place.pools.ask(POOL, "ann", "1", "x", START, keep=9),
    "pools.take_turns": lambda place: place.pools.take_turns(POOL, {("ann", "1"): 1}, START),
    "pools.leave": lambda place: place.pools.leave(POOL, ("ann", "1"), START),
    "failures.update": lambda place: place.failures.update([CountUpdate(bytes(16), 1, at=START)], START),
    "failures.purge": lambda place: place.failures.purge(START, 10),
    "save_time": lambda place: place.store.save_time(START),
    "acquire_duty": lambda place: place.store.acquire_duty("sweep", START, START + 1),
    "purge_revocations": lambda place: place.store.purge_revocations(START, 10),
}
READS: Mapping[str, Operation] = {
    "tokens.get": lambda place: place.store.tokens.get(token(7).digest),
    "tokens.find": lambda place: place.tokens.find(token(1).id),
    "tokens.list": lambda place: place.tokens.list("ann", START, 10),
    "pools.get": lambda place: place.pools.get(POOL, "a", START),
    "pools.count": lambda place: place.pools.count(POOL, START),
    "pools.list_requests": lambda place: place.pools.list_requests(POOL, START, 10),
    "pools.find_forced_end": lambda place: place.pools.find_forced_end(POOL, "a"),
    "pools.find_place": lambda place: place.pools.find_place(POOL, ("ann", "1"), START),
    "pools.may_have_turn": lambda place: place.pools.may_have_turn(POOL, {("ann", "1"): 1}, START),
    "pools.lost_places": lambda place: place.pools.lost_places(POOL, {("ann", "1"): 1}, START),
    "pools.list_tokens": lambda place: place.pools.list_tokens(POOL, START, "", 10),
    "failures.get": lambda place: place.failures.get([bytes(16)]),
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timeouts, so that the tests are quick. A probe may take long: the machine may be busy."""
    for name, seconds in {"SLOW": 0.1, "TIMEOUT": 30.0, "PROBE_TIMEOUT": 60.0, "PAUSE": 0.05}.items():
        monkeypatch.setattr(circuit_breaker, name, seconds)
    monkeypatch.setattr(sqlite, "_PROBE_BUSY_TIMEOUT", 50)
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 300)
    monkeypatch.setattr(sqlite, "_PRAGMAS", ("busy_timeout = 300", *sqlite._PRAGMAS[1:]))


@contextmanager
def probes_that_hang() -> Iterator[None]:
    """Let probes fail soon: the database does not answer.

    Before it stops to answer, wait for `ready_again`: on a busy machine that was slow, and a probe is running, which
    may take longer.
    """
    with pytest.MonkeyPatch.context() as hanging:
        hanging.setattr(circuit_breaker, "PROBE_TIMEOUT", 0.5)
        yield


@pytest.fixture
async def filled(place: Place) -> Place:
    """Add something to change."""
    await place.tokens.issue(token(1), 0, START)
    await place.pools.generate(POOL, ["a", "b"], START)
    return place


async def refused(place: Place, operation: Operation) -> float:
    """Check that an operation is refused; return after how many seconds."""
    began = monotonic()
    with pytest.raises(StoreUnavailable):
        await operation(place)
    return monotonic() - began


async def refused_at_once(place: Place, operation: Operation) -> None:
    """Check that an operation is refused before it waits for the database: within a few turns of the event loop."""
    attempt = asyncio.ensure_future(refused(place, operation))
    for _ in range(10):
        await asyncio.sleep(0)
    assert attempt.done()
    await attempt


async def ready_again(place: Place) -> None:
    """Wait until the store is ready, without a write."""
    async with asyncio.timeout(20):
        while await place.store.ready() is not None:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


@asynccontextmanager
async def locked(place: Place) -> AsyncIterator[None]:
    """Take the locks that every write needs, as another program can."""
    if place.url.startswith("sqlite"):
        with closing(sqlite3.connect(make_url(place.url).database or "", isolation_level=None)) as file:
            file.execute("BEGIN IMMEDIATE")
            yield
            file.execute("ROLLBACK")
        return
    db = await asyncpg.connect(place.url.replace("+asyncpg", ""))
    try:
        async with db.transaction():
            await db.execute(f"LOCK TABLE {', '.join(metadata.tables)} IN SHARE MODE")
            yield
    finally:
        await db.close()


@asynccontextmanager
async def full(place: Place) -> AsyncIterator[None]:
    """Let no file grow, as on a full disk; PostgreSQL becomes read-only, as after some faults."""
    if place.url.startswith("sqlite"):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = os.stat(f"{make_url(place.url).database}-wal").st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    name = make_url(place.url).database
    await _alter(place.url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    try:
        yield
    finally:
        await _alter(place.url, f'ALTER DATABASE "{name}" RESET default_transaction_read_only')


async def _alter(url: str, statement: str) -> None:
    """Change a setting of a database, and close the connections that use the old one."""
    db = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await db.execute("SET default_transaction_read_only = off")
        await db.execute(statement)
        await db.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    finally:
        await db.close()


HARMS: Mapping[str, Callable[[Place], AbstractAsyncContextManager[None]]] = {"locked": locked, "full": full}


@pytest.mark.parametrize("harm", HARMS)
async def test_after_a_failed_write_others_are_refused_at_once(filled: Place, harm: str) -> None:
    """Reads go on, and the store recovers soon, also without a write."""
    with structlog.testing.capture_logs() as logs:
        async with HARMS[harm](filled):
            await refused(filled, WRITES["tokens.issue"])
            assert await filled.store.ready() is not None
            for operation in WRITES.values():
                await refused_at_once(filled, operation)
            for operation in READS.values():
                await operation(filled)
        await ready_again(filled)
        for operation in WRITES.values():
            await operation(filled)
    assert [entry["event"] for entry in logs if "_writable" in entry["event"]] == [
        "store_not_writable",
        "store_writable_again",
    ]


async def test_places_outlive_an_outage_and_dead_ones_do_not(filled: Place) -> None:
    """Those who waited when it began could not ask again: they can for 10 seconds after its end."""
    began = filled.engine.clock()
    for id, at, keep in (("live", began, 9.0), ("patient", began, 600.0), ("dead", began - 60, 15.0)):
        await filled.pools.ask(FULL, "ann", id, "x", at, keep=keep)

    async def kept(seconds: float) -> list[str]:
        return [
            id
            for id in ("live", "patient", "dead")
            if await filled.pools.find_place(FULL, ("ann", id), began + seconds) is not None
        ]

    assert await kept(9.5) == ["patient"]
    async with locked(filled), asyncio.timeout(20):
        await refused(filled, WRITES["save_time"])
        while await filled.store.ready() is None:  # noqa: ASYNC110 - a probe has not failed yet
            await asyncio.sleep(0.01)
    await ready_again(filled)
    assert await kept(9.5) == ["live", "patient"]
    assert await kept(60) == ["patient"]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_an_outage_keeps_places_of_those_in_front(filled: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait, its end does not take longer."""
    monkeypatch.setattr("tokenauth.stores.changes.request_rows._MAX_KEPT", 1)
    began = filled.engine.clock()
    for id in ("first", "second"):
        await filled.pools.ask(FULL, "ann", id, "x", began, keep=5.0)
    async with locked(filled):
        await refused(filled, WRITES["save_time"])
    await ready_again(filled)
    kept = [id for id in ("first", "second") if await filled.pools.find_place(FULL, ("ann", id), began + 7)]
    assert kept == ["first"]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_probe_that_hangs_loses_no_place(filled: Place) -> None:
    """It began before the outage, as when the disk stalls in its commit."""
    assert isinstance(filled.engine, SqliteEngine)
    began = filled.engine.clock()
    await filled.pools.ask(FULL, "ann", "live", "x", began, keep=5.0)
    await ready_again(filled)
    goes_on = threading.Event()
    connection, circuit = filled.engine.writer._connection, filled.engine.writer._circuit
    connection.set_trace_callback(lambda statement: statement == "COMMIT" and goes_on.wait(60))
    with probes_that_hang():
        circuit.start_probe()
        while await filled.store.ready() is None:
            pass
        await asyncio.sleep(2 * circuit_breaker.PAUSE)  # the next one waits for it
    goes_on.set()
    await ready_again(filled)
    connection.set_trace_callback(None)
    assert await filled.pools.find_place(FULL, ("ann", "live"), began + 7) is not None


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_probe_behind_a_write_that_waits_for_the_lock_names_the_lock(
    filled: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several workers, a write waits for another worker first, so it has waited for SQLite's lock only briefly."""
    assert isinstance(filled.engine, SqliteEngine)
    monkeypatch.setattr(circuit_breaker, "PROBE_TIMEOUT", 60.0)
    writer = filled.engine.writer
    writer._connection.execute("PRAGMA busy_timeout = 60000")
    async with asyncio.timeout(30):
        async with locked(filled):
            writing = asyncio.ensure_future(WRITES["save_time"](filled))
            while writer._lock_requested_at == math.inf:  # noqa: ASYNC110  (its thread tells nothing)
                await asyncio.sleep(0)
            writer._circuit.start_probe()
            await writer._circuit.wait_for_probe()
            assert (writer._circuit.problem or "").startswith("database is locked")
            assert not writing.done()
        await asyncio.gather(writing, return_exceptions=True)
    await ready_again(filled)


async def test_what_waits_behind_a_failure_is_refused_with_it(filled: Place) -> None:
    """Hundreds at the same time wait no longer than one: they are refused before the write that failed."""
    ended: list[asyncio.Future[float]] = []
    async with locked(filled):
        first = asyncio.ensure_future(refused(filled, WRITES["save_time"]))
        for _ in range(10):  # turns of the event loop: now it is being written
            await asyncio.sleep(0)
        waiting = [asyncio.ensure_future(refused(filled, WRITES["save_time"])) for _ in range(200)]
        for attempt in (first, *waiting):
            attempt.add_done_callback(ended.append)
        others = [asyncio.ensure_future(refused(filled, operation)) for operation in WRITES.values()]
        await asyncio.gather(first, *waiting, *others)
    assert ended == [*waiting, first]
    await ready_again(filled)


async def test_one_probe_at_a_time_is_made_however_many_ask(filled: Place) -> None:
    """A refused request does not reach the database."""
    async with locked(filled):
        await refused(filled, WRITES["save_time"])
        for _ in range(300):
            await asyncio.gather(*(refused(filled, WRITES["save_time"]) for _ in range(10)))
            assert await filled.store.ready() is not None
        assert sum("_probe_until_it_works" in str(task.get_coro()) for task in asyncio.all_tasks()) <= 2
    await ready_again(filled)


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)  # a probe of PostgreSQL needs every table
async def test_a_failure_of_one_operation_stops_no_other(filled: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table is missing, and the probe does not need it."""
    monkeypatch.setattr(circuit_breaker, "QUICK", 60.0)
    rename = 'ALTER TABLE failures RENAME TO "gone"', 'ALTER TABLE "gone" RENAME TO failures'
    with closing(sqlite3.connect(make_url(filled.url).database or "", isolation_level=None)) as db:
        db.execute(rename[0])
        for _ in range(20):
            await refused(filled, WRITES["failures.update"])
            await WRITES["save_time"](filled)
            await READS["tokens.get"](filled)
            assert "no such table: failures" in (await filled.store.ready() or ""), "no login can be judged"
        db.execute(rename[1])
    await WRITES["failures.update"](filled)
    assert await filled.store.ready() is None


NEEDED = {"tokens": "tokens.get", "failures": "failures.get", "pool_tokens": "pools.get"}


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
@pytest.mark.parametrize("table", [*NEEDED, "revocations"])
async def test_an_unreadable_table_is_unready_and_logged_once(filled: Place, table: str) -> None:
    """A cached token is answered while revocations can be read; a failed look-up is logged with its reason."""
    await filled.store.tokens.get(token(1).digest)
    reads = {"revocations": "tokens.get", **NEEDED}
    with (
        closing(sqlite3.connect(make_url(filled.url).database or "", isolation_level=None)) as db,
        structlog.testing.capture_logs() as logs,
    ):
        db.execute(f'ALTER TABLE {table} RENAME TO "gone"')
        await asyncio.sleep(0)
        for _ in range(20):
            await refused(filled, READS[reads[table]])
            assert (await filled.store.ready() or "").startswith(f"store unreachable: no such table: {table}")
        if table == "revocations":
            await refused(filled, lambda place: place.store.tokens.get(token(1).digest))
        else:
            assert await filled.store.tokens.get(token(1).digest) == token(1)
        db.execute(f'ALTER TABLE "gone" RENAME TO {table}')
        await ready_again(filled)
        await READS[reads[table]](filled)
        async with asyncio.timeout(20):
            while len(logs) < 2:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.01)
    assert [(entry["event"], entry.get("reason")) for entry in logs] == [
        ("store_unreachable", f"no such table: {table}"),
        ("store_reachable_again", None),
    ]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_listing_that_cannot_be_read_is_logged(filled: Place) -> None:
    """Listings use other connections than look-ups."""
    with (
        closing(sqlite3.connect(make_url(filled.url).database or "", isolation_level=None)) as db,
        structlog.testing.capture_logs() as logs,
    ):
        db.execute('ALTER TABLE tokens RENAME TO "gone"')
        for _ in range(3):
            await refused(filled, READS["tokens.list"])
        db.execute('ALTER TABLE "gone" RENAME TO tokens')
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("store_unreachable", "no such table: tokens")]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_damaged_value_is_not_quoted_in_the_log(filled: Place) -> None:
    """The driver's message has the text of the column: here the value of a token of a pool."""
    with (
        closing(sqlite3.connect(make_url(filled.url).database or "", isolation_level=None)) as db,
        structlog.testing.capture_logs() as logs,
    ):
        db.execute("UPDATE pool_tokens SET username = CAST(x'53454352455480' AS TEXT) WHERE value = 'a'")
        await refused(filled, READS["pools.get"])
        await refused(filled, READS["pools.list_tokens"])
    assert logs[0]["event"] == "store_unreachable"
    assert "SECRET" not in str(logs)


@contextmanager
def cut_off(places: Places) -> Iterator[Proxy]:
    """Put a network between this node and PostgreSQL that can go silent.

    Without TLS: asyncpg leaves an error that nobody retrieves when a connection is given up while it asks for that.
    """
    url = (places.directory / "url").read_text()
    parsed = make_url(url)
    with Proxy(parsed.port or 5432) as proxy:
        through = parsed.set(port=proxy.port).update_query_dict({"ssl": "disable"})
        (places.directory / "url").write_text(through.render_as_string(hide_password=False))
        yield proxy


@pytest.mark.parametrize("places", ["postgres"], indirect=True)
@pytest.mark.parametrize("how", ["freeze", "cut"])
async def test_a_node_cut_off_for_a_second_refuses_at_once(
    places: Places, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads as well as writes; what was under way ends then, too; and it is back when the network is."""
    with cut_off(places) as proxy:
        place = await places.open()
        await place.tokens.issue(token(1), 0, START)
        await place.pools.generate(POOL, ["a", "b"], START)
        await ready_again(place)
        monkeypatch.setattr(circuit_breaker, "TIMEOUT", 60.0)
        with probes_that_hang():
            getattr(proxy, how)()
            began = monotonic()
            under_way = [asyncio.ensure_future(refused(place, READS["tokens.list"])) for _ in range(20)]
            under_way += [asyncio.ensure_future(refused(place, WRITES["pools.assign"])) for _ in range(20)]
            await asyncio.gather(*under_way)
            assert monotonic() - began < 20, "must not wait for their own timeouts"
            assert await place.store.ready() is not None
        everything = {**READS, **WRITES}
        for operation in everything.values():
            await refused_at_once(place, operation)
        proxy.heal()
        await ready_again(place)
        for operation in everything.values():
            await operation(place)
        await places.close(place)


@pytest.mark.parametrize("places", ["postgres"], indirect=True)
async def test_a_lost_feed_alone_refuses_nothing(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database answers: tokens are looked up there meanwhile."""
    be_patient(monkeypatch)
    place = await places.open()
    await place.tokens.issue(token(1), 0, START)
    for _ in range(5):
        await _alter(place.url, "SELECT 1")
        for name in ("pools.assign", "save_time", "failures.update", "purge_revocations", *READS):
            await {**READS, **WRITES}[name](place)
        assert await place.store.ready() is None


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_refused_waiting_write_is_not_written_later(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller got an error; here it waits for the lock longer than for an answer."""
    monkeypatch.setattr(circuit_breaker, "TIMEOUT", 0.15)
    place = await places.open()
    async with locked(place):
        await refused(place, WRITES["tokens.issue"])
    await ready_again(place)
    assert await place.tokens.list("ann", START, 10) == []


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_commit_that_hangs_refuses_what_comes_after_it(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an fsync of 8 seconds; here a change blocks the writer's thread. Its caller gets an error in time."""
    monkeypatch.setattr(circuit_breaker, "TIMEOUT", 4.0)
    read, write = os.pipe()
    place = await places.open()
    await ready_again(place)
    with structlog.testing.capture_logs() as logs:

        class Hang(Change[None]):
            @classmethod
            def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[None]:
                os.read(read, 1)
                return [None]

        stuck = asyncio.ensure_future(refused(place, lambda place: place.engine.apply(Hang(now=START))))
        await asyncio.sleep(0.05)
        with probes_that_hang():
            behind = [asyncio.ensure_future(refused(place, WRITES["save_time"])) for _ in range(20)]
            await asyncio.gather(*behind)
            assert "did not answer" in (await place.store.ready() or "")
        assert not stuck.done(), "its caller waits longer"
        for operation in WRITES.values():
            await refused_at_once(place, operation)
        for operation in READS.values():
            await operation(place)
        async with asyncio.timeout(60):
            assert await stuck > circuit_breaker.TIMEOUT - 0.1
        os.write(write, b"x")
        await ready_again(place)
    os.close(read)
    os.close(write)
    await place.store.save_time(START)
    assert [entry["event"] for entry in logs] == ["store_not_writable", "store_writable_again"]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_disk_that_cannot_be_measured_is_an_outage(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that is gone fails to say how much is free, too."""
    monkeypatch.setattr(sqlite_engine, "WATCH_INTERVAL", 3600)  # or it would notice first that the file is gone
    place = await places.open()
    file = Path(make_url(place.url).database or "")
    directory = file.parent
    moved = directory.with_name("moved")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = file.with_name(file.name + "-wal").stat().st_size
    directory.rename(moved)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        with structlog.testing.capture_logs() as logs:
            await refused(place, WRITES["tokens.issue"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        moved.rename(directory)
    (said,) = [entry["reason"] for entry in logs if entry["event"] == "store_not_writable"]
    assert said == "disk I/O error"


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_failed_checkpoint_is_logged(places: Places) -> None:
    """SQLite does not report it, and the -wal file grows until the disk is full."""
    place = await places.open()
    assert isinstance(place.engine, SqliteEngine)
    writer = place.engine.writer
    await place.pools.generate(POOL, [f"{number:0200}" for number in range(3000)], START)
    await ready_again(place)  # on a busy machine that was slow, and a probe is writing
    file = make_url(place.url).database or ""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with structlog.testing.capture_logs() as logs:
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(file).st_size, before[1]))
        try:
            await writer.check_wal()
            assert await place.store.ready() is not None
            await writer.check_wal()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        await writer.check_wal()
        assert await place.store.ready() is None
    events = [entry["event"] for entry in logs if entry["event"].startswith("checkpoint_")]
    assert events == ["checkpoint_failed", "checkpoint_recovered"]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_failed_checkpoint_is_soon_repeated(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the next regular check until the store is ready again."""
    monkeypatch.setattr(sqlite_engine, "CHECKPOINT_INTERVAL", 3600)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = await places.open()
    assert isinstance(place.engine, SqliteEngine)
    file = make_url(place.url).database or ""
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(file).st_size, before[1]))
        await place.pools.generate(POOL, [f"{number:0200}" for number in range(60)], START)
        monkeypatch.setattr(sqlite_engine, "CHECKPOINT_INTERVAL", 0)
        checking = asyncio.ensure_future(place.engine._check_wal())
        await asyncio.sleep(0)
        monkeypatch.setattr(sqlite_engine, "CHECKPOINT_INTERVAL", 3600)
        async with asyncio.timeout(20):
            while await place.store.ready() is None:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await ready_again(place)
    checking.cancel()


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_the_log_of_writes_shrinks_after_a_long_reader(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a reader keeps an old snapshot, it has to grow."""
    monkeypatch.setattr(sqlite, "_PRAGMAS", tuple(map(_smaller, sqlite._PRAGMAS)))
    place = await places.open()
    file = make_url(place.url).database or ""
    with closing(sqlite3.connect(file, isolation_level=None)) as reader:
        reader.execute("BEGIN").execute("SELECT count(*) FROM marks").fetchall()
        for number in range(5):
            await place.pools.generate(POOL, [f"{number}-{each:0200}" for each in range(500)], START)
        assert os.stat(f"{file}-wal").st_size > 300_000
    for number in range(3):
        await place.store.save_time(START + number)
    assert os.stat(f"{file}-wal").st_size <= 110_000


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_reader_that_lets_the_log_grow_is_logged(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the reader has gone, the file is cut without a write; the service works meanwhile."""
    monkeypatch.setattr(sqlite, "_WAL_LIMIT", 100_000)
    monkeypatch.setattr(sqlite, "_WAL_ALARM", 300_000)
    place = await places.open()
    assert isinstance(place.engine, SqliteEngine)
    writer, file = place.engine.writer, make_url(place.url).database or ""

    async def grow(times: int) -> None:
        for _ in range(times):
            await place.pools.generate(POOL, [f"{os.urandom(8).hex()}-{each:0200}" for each in range(500)], START)
        await writer.check_wal()

    with (
        closing(sqlite3.connect(file, isolation_level=None)) as reader,
        structlog.testing.capture_logs() as logs,
    ):
        reader.execute("BEGIN").execute("SELECT count(*) FROM marks").fetchall()
        await grow(3)
        assert logs[0]["event"] == "checkpoint_blocked"
        assert logs[0]["action"].endswith(f"fuser -v {file}")
        await writer.check_wal()
        assert len(logs) == 1
        await grow(8)
        assert await place.store.ready() is None
        reader.execute("COMMIT")
        await writer.check_wal()
        assert os.stat(f"{file}-wal").st_size == 0
        await writer.check_wal()
    assert [entry["event"] for entry in logs] == ["checkpoint_blocked", "checkpoint_blocked", "checkpoint_recovered"]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
async def test_a_deleted_database_file_stops_the_store(places: Places, suffix: str) -> None:
    """Another process would create a new one, and the two would not see each other's writes."""
    place = await places.open()
    await place.tokens.issue(token(1), 0, START)
    file = make_url(place.url).database or ""
    with structlog.testing.capture_logs() as logs:
        os.unlink(file + suffix)
        for _ in range(2):
            reason = await place.store.ready() or ""
            assert "restart tokenauth" in reason
            assert ("begins an empty database" in reason) is (suffix == "")
        for operation in (*READS.values(), *WRITES.values()):
            await refused(place, operation)
    replaced = [entry["file"] for entry in logs if entry["event"] == "store_file_replaced"]
    assert replaced == [os.path.basename(file) + suffix]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_path_that_leads_nowhere_stops_the_store(places: Places) -> None:
    """As one does that this user may not look at: what is written cannot be found there."""
    place = await places.open()
    await place.tokens.issue(token(1), 0, START)
    file = make_url(place.url).database or ""
    with structlog.testing.capture_logs() as logs:
        os.unlink(file)
        os.symlink(file, file)
        for _ in range(2):
            assert "restart tokenauth" in (await place.store.ready() or "")
        for operation in (*READS.values(), *WRITES.values()):
            await refused(place, operation)
    assert [entry["file"] for entry in logs if entry["event"] == "store_file_replaced"] == [os.path.basename(file)]


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_log_of_writes_that_is_cut_off_is_no_other_file(places: Places) -> None:
    """A backup may do that, and so does SQLite itself."""
    place = await places.open()
    await place.tokens.issue(token(1), 0, START)
    with closing(sqlite3.connect(make_url(place.url).database or "")) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
    assert await place.store.ready() is None


@pytest.mark.parametrize("places", ["sqlite"], indirect=True)
async def test_a_reader_that_cannot_open_ends_the_start(places: Places) -> None:
    """The writer has opened the file, which says that it has the schema of this release."""
    place = await places.open()
    file = make_url(place.url).database or ""
    await places.close(place)
    with closing(sqlite3.connect(file)) as db:
        db.execute("DROP TABLE revocations")
    with pytest.raises(StartError, match=f"the database {file} cannot be used: no such table: revocations"):
        await places.open()


def _smaller(pragma: str) -> str:
    name = pragma.partition(" ")[0]
    return {"journal_size_limit": "journal_size_limit = 100000", "wal_autocheckpoint": "wal_autocheckpoint = 20"}.get(
        name, pragma
    )
