"""A process that opens a store on a database, adds a token and ends: it waits until others have begun, too."""

import asyncio
import fcntl
import sys
import warnings
from hashlib import sha256

from tokenauth.models import Token
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store


async def add(path: str, number: str) -> None:
    """Add one token."""
    store = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{path}"), 10)
    await store.start()
    assert await store.ready() is None
    await store.tokens.issue(Token(sha256(number.encode()).digest(), "ann", "", 1.0, 100), 0, 1.0)
    await store.stop(1.0)


def main() -> None:
    """Start when the lock on the start file is released."""
    line, path, number = sys.argv[1:]
    warnings.simplefilter("error")
    with open(line, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    asyncio.run(add(path, number))
