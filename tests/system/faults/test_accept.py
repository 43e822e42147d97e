"""Accepting under load: new connections do not wait behind busy ones, and SIGTERM resets no established connection."""

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path

from tests.support.connections import Closed, Connection, NoAnswer, Refused
from tests.support.journal import background, serving, until
from tests.support.servers import worker, write_config

BUSY, NEW = 200, 400
PROBE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def test_sigterm_resets_no_established_connection(tmp_path: Path) -> None:
    """Clients connect as fast as they can, each for one request."""
    config = write_config(tmp_path)
    seen: Counter[str] = Counter()
    for _ in range(10):
        with serving(config, "--workers", "2") as server:
            answered = seen["answered"]

            def ask(port: int = server.port) -> None:
                try:
                    with Connection(port) as connection:
                        connection.ask("GET", "/healthz", Connection="close")
                    seen["answered"] += 1
                except Refused:
                    seen["refused"] += 1
                except (Closed, NoAnswer):
                    seen["reset"] += 1

            with background(ask, 8):
                until(lambda before=answered: seen["answered"] > before + 200, "the clients are busy")  # type: ignore[misc]
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(60) == 0
    assert seen["reset"] == 0, seen


def test_a_new_connection_waits_for_at_most_three_others(tmp_path: Path) -> None:
    busy: list[float] = []
    new: list[float] = []

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(PROBE)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(b'{"status":"ok"}'))

    async def keep_busy(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while len(new) < NEW:
            began = time.monotonic()
            await ask(reader, writer)
            busy.append(time.monotonic() - began)
        writer.close()

    async def connect(port: int) -> None:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await ask(reader, writer)
        new.append(time.monotonic() - began)
        writer.close()

    async def run(port: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(BUSY):
                tasks.create_task(keep_busy(port))
            await asyncio.sleep(1)
            for _ in range(NEW):
                tasks.create_task(connect(port))
                await asyncio.sleep(0.01)

    with worker(write_config(tmp_path)) as server:
        asyncio.run(run(server.port))
    assert _p99(new) < 3 * _p99(busy), (_p99(new), _p99(busy))


def _p99(times: list[float]) -> float:
    return sorted(times)[len(times) * 99 // 100]
