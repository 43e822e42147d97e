"""The events of a worker, while parts of what it looks at are slow or do not answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.servers import HandClock, write_config
from tokenauth.errors import InvalidCredentials, TooManyAttempts
from tokenauth.event_streams import Client, Stream, pause
from tokenauth.service import Service, create_service
from tokenauth.settings import loader
from tokenauth.status import NodeStatus

HOME = "203.0.113.7"
POOL = """
[pools.open]
capacity = 2
prefill = true
"""


@pytest.fixture
async def service(tmp_path: Path, hand_clock: HandClock) -> AsyncIterator[Service]:
    found = create_service(loader.load(write_config(tmp_path, POOL)), hand_clock)
    async with found.running():
        yield found


async def open_stream(service: Service) -> Stream:
    """Open a stream of an admin."""
    issued = await service.tokens.issue("admin", "admin", HOME, "")
    user = service.tokens.owner(issued.token)
    assert user is not None
    return await service.events.open(user, issued.token, Client(), None)


async def read_until(stream: Stream, event: str) -> None:
    async with asyncio.timeout(30):
        while f"event: {event}\n" not in (await stream.next()).decode():
            pass


async def throttle(service: Service, name: str) -> None:
    while True:
        with suppress(InvalidCredentials):
            try:
                async with service.throttle.attempt([name], HOME):
                    raise InvalidCredentials
            except TooManyAttempts:
                return


@pytest.mark.parametrize(("took", "expected"), [(0.001, 0.75), (0.1, 5), (3, 10), (150, 10)])
def test_a_slow_look_delays_the_next_one_by_seconds(took: float, expected: float) -> None:
    assert pause(took) == pytest.approx(expected)


async def test_a_hanging_main_process_delays_no_other_event(service: Service) -> None:
    asked = asyncio.Event()

    async def ask() -> NodeStatus:
        asked.set()
        return await asyncio.Future[NodeStatus]()

    service.node.ask = ask
    stream = await open_stream(service)
    await read_until(stream, "hello")
    async with asyncio.timeout(30):
        await asked.wait()
    pool = next(pool for pool in service.pools.usable_by() if pool.name == "open")
    await service.pools.generate(pool, 1)
    await service.pools.assign(pool, "holder")
    await read_until(stream, "pool")
    await service.events.shut_down()


async def test_clearing_a_throttled_user_is_an_event(service: Service) -> None:
    await throttle(service, "ann")
    stream = await open_stream(service)
    await read_until(stream, "throttle")
    assert await service.throttle.clear_user("ann", HOME, "operator")
    await read_until(stream, "throttle")
    await service.events.shut_down()
