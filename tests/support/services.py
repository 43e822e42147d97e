"""Services in the process of the test, with a clock that it moves."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.support.servers import START, write_config
from tokenauth.clock import Clock
from tokenauth.service import Service, create_service
from tokenauth.settings import loader


@asynccontextmanager
async def running(directory: Path, settings: str, clock: Clock) -> AsyncIterator[Service]:
    """Run a service, without its sweeper. Its pools are filled."""
    service = create_service(loader.load(write_config(directory, settings)), clock, monotonic=lambda: 0.0)
    async with service.running():
        await service.pools.prefill()
        yield service


class Opener:
    """Opens services on one database, each with its own settings of tokens."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self.database = directory / "tokenauth.db"
        self.now = START
        self._directory = directory
        self._stack = stack

    async def open(self, tokens: str = "") -> Service:
        made = running(self._directory, f"[tokens]\n{tokens}", lambda: self.now)
        return await self._stack.enter_async_context(made)
