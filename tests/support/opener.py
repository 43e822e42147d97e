"""A process that opens a store, adds a token and ends. It first waits until the other processes have started."""

import asyncio
import fcntl
import sys
import warnings
from hashlib import sha256

from tokenauth.models import Token
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store


async def add(path: str, number: str) -> None:
    store = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{path}"), 10)
    await store.start()
    assert await store.ready() is None
    await store.tokens.issue(Token.new(sha256(number.encode()).digest(), "ann", "", 1.0, 100), 0, 1.0)
    await store.stop(1.0)


def main() -> None:
    """Begin when the lock on the start file is released."""
    start_file, path, number = sys.argv[1:]
    warnings.simplefilter("error")
    with open(start_file, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    asyncio.run(add(path, number))
