"""Processes that write to one SQLite file wait for a file lock, and none waits long for a lock that is not released."""

import asyncio
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic

import pytest
import structlog

from tests.support.servers import START
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.sqlite import writer
from tokenauth.stores.sqlite.engine import SqliteEngine
from tokenauth.stores.store import Store


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Store]:
    store = open_store(DatabaseSettings(f"sqlite+aiosqlite:///{directory / 'tokenauth.db'}"), 10)
    await store.start()
    try:
        yield store
    finally:
        await store.stop(START)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with opened(tmp_path) as store:
        yield store


@contextmanager
def locked(directory: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock, as another process does. The yielded function releases it."""
    file = os.open(directory / "tokenauth.db-lock", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield lambda: fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def writer_of(store: Store) -> writer.SqliteWriter:
    assert isinstance(store.engine, SqliteEngine)
    return store.engine.writer


@pytest.fixture
def without_lock_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writes wait for the lock until it is free, however long that takes."""
    monkeypatch.setattr(writer, "LOCK_TIMEOUT", 3600)


async def write(store: Store) -> None:
    """Write something. Fails if it waits for a lock that is not released."""
    async with asyncio.timeout(60):
        await store.save_time(START)


async def waits(writing: asyncio.Future[None]) -> bool:
    """Whether a write waits."""
    return not (await asyncio.wait({writing}, timeout=0.2))[0]


@pytest.mark.usefixtures("without_lock_timeout")
async def test_a_write_waits_for_the_lock_and_no_longer(store: Store, tmp_path: Path) -> None:
    with locked(tmp_path) as end:
        writing = asyncio.ensure_future(write(store))
        assert await waits(writing)
        end()
        await writing


async def test_a_write_wakes_one_thread(store: Store) -> None:
    """The spare thread sleeps: waking it costs more than a small write."""

    def woken() -> dict[int, int]:
        """Count how often each executor's thread waited."""
        threads = [thread.native_id or 0 for thread in threading.enumerate() if thread.name.startswith("executor-")]
        status = {thread: Path(f"/proc/self/task/{thread}/status").read_text() for thread in threads}
        return {
            thread: int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for thread, text in status.items()
        }

    before = woken()
    for _ in range(100):
        await store.save_time(START)
    after = woken()
    assert len(before) >= 2
    assert sum(after[thread] > before[thread] + 10 for thread in before) == 1


async def test_a_lock_that_stays_held_delays_one_write(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may be suspended. Until it continues, writers rely on SQLite's own lock."""
    with locked(tmp_path):
        monkeypatch.setattr(writer, "LOCK_TIMEOUT", 0.1)
        began = monotonic()
        await write(store)
        assert monotonic() - began >= 0.1
        monkeypatch.setattr(writer, "LOCK_TIMEOUT", 3600)
        for _ in range(5):
            await write(store)
        assert await store.ready() is None
    async with asyncio.timeout(20):
        while writer_of(store)._write_lock.new_wait() is None:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)
    with locked(tmp_path) as end:
        writing = asyncio.ensure_future(write(store))
        assert await waits(writing)
        end()
        await writing


@pytest.mark.usefixtures("without_lock_timeout")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_process_that_ends_releases_the_lock(store: Store, tmp_path: Path, how: signal.Signals) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(  # noqa: ASYNC220 - it prints a line when it has the lock
        [sys.executable, "-c", code, str(tmp_path / "tokenauth.db-lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        writing = asyncio.ensure_future(write(store))
        assert await waits(writing)
        holder.send_signal(how)
        await writing


@pytest.mark.usefixtures("without_lock_timeout")
async def test_a_deleted_lock_file_is_created_again(store: Store, tmp_path: Path) -> None:
    """Until then processes with the old file lock it, and others a new one."""
    file = tmp_path / "tokenauth.db-lock"
    file.unlink()
    await write(store)
    writer_of(store).refresh_write_lock()
    with locked(tmp_path):
        writing = asyncio.ensure_future(write(store))
        assert await waits(writing)
    await writing


@pytest.mark.usefixtures("without_lock_timeout")
@pytest.mark.parametrize("place", ["directory", "link", "nowhere"])
async def test_writes_work_without_a_usable_lock_file(tmp_path: Path, place: str) -> None:
    file = tmp_path / "tokenauth.db-lock"
    if place == "directory":
        file.mkdir()
    else:
        file.symlink_to(tmp_path / "elsewhere" if place == "link" else "/proc/1/nothing")
    with structlog.testing.capture_logs() as logs:
        async with opened(tmp_path) as one, opened(tmp_path) as other:
            await write(one)
            await write(other)
            assert await one.ready() is None
    assert [entry["reason"] for entry in logs if entry["event"] == "write_lock_unusable"] != []
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o640])
async def test_the_lock_file_has_the_mode_of_the_database(tmp_path: Path, mode: int) -> None:
    database = tmp_path / "tokenauth.db"
    database.touch()
    database.chmod(mode)
    async with opened(tmp_path):
        found = (tmp_path / "tokenauth.db-lock").stat()
    assert stat.S_IMODE(found.st_mode) == mode
    assert (found.st_uid, found.st_gid) == (database.stat().st_uid, database.stat().st_gid)


async def test_writers_of_several_stores_alternate(tmp_path: Path) -> None:
    """Each writes while the others want to write too: none starves."""
    async with opened(tmp_path) as one, opened(tmp_path) as two, opened(tmp_path) as three:
        counts = {id(each): 0 for each in (one, two, three)}

        async def write(store: Store) -> None:
            while max(counts.values()) < 100:
                await store.save_time(START + counts[id(store)])
                counts[id(store)] += 1

        await asyncio.gather(write(one), write(two), write(three))
    assert min(counts.values()) * 5 > max(counts.values()) > 0
