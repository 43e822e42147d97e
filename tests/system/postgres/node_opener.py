"""A process that opens a store by its URL, adds a token and ends. It first waits until the others have started."""

import asyncio
import fcntl
import sys
from hashlib import sha256

from tokenauth import logs
from tokenauth.models import Token
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store


async def add(url: str, number: str) -> None:
    store = open_store(DatabaseSettings(url, connections=1), 10)
    await store.start()
    assert await store.ready() is None
    await store.tokens.issue(Token.new(sha256(number.encode()).digest(), "ann", "", 1.0, 2**40), 0, store.clock())
    await store.stop(store.clock())


def main() -> None:
    """Begin when the lock on the start file is released."""
    start_file, url, number = sys.argv[1:]
    logs.configure(direct=True)  # tests read the log as soon as the process ends
    with open(start_file, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    asyncio.run(add(url, number))
