"""Simulates a day of attacks and logins, with the real throttle and SQLite store and a simulated clock.

`python -m bench.guesses` prints the table of docs/throttle.md. No passwords are hashed.
"""

import asyncio
import heapq
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

from tokenauth.errors import InvalidCredentials, TooManyAttempts
from tokenauth.login_queue import LoginQueue
from tokenauth.settings.model import DatabaseSettings, ThrottleSettings
from tokenauth.stores.open import open_store
from tokenauth.throttle import Throttle

DAY = 86400.0
START = 1_800_000_000.0
OFFICE = "203.0.113.7"
NEIGHBOUR = "203.0.113.200"

_TYPOS = 0.03
"""The share of users who mistype their password first."""


class Outcome(NamedTuple):
    """The number of compared guesses, of refused correct logins, and of all correct logins."""

    guesses: int
    refused: int
    logins: int


def _check_password(right: bool) -> None:
    if not right:
        raise InvalidCredentials


class Simulation:
    """A throttle, and counts of guesses and logins."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self.guesses = self.refused = self.logins = 0

    async def log_in(self, name: str, address: str, right: bool) -> float:
        """Try once. Return the seconds until the next attempt: 0 after a failure, below 0 after a success."""
        try:
            async with self._throttle.attempt([name], address, hashes=False):
                _check_password(right)
        except InvalidCredentials:
            return 0.0
        except TooManyAttempts as refusal:
            return float(refusal.retry_after)
        return -1.0

    async def user(self, name: str, address: str, typo: bool) -> None:
        """Log in, perhaps after a typo. A user who must wait for more than a minute in all counts as refused."""
        waited = 0.0
        if typo:
            await self.log_in(name, address, False)
        self.logins += 1
        while (wait := await self.log_in(name, address, True)) >= 0:
            waited += wait
            if waited > 60:
                self.refused += 1
                return

    async def guess(self, name: str, address: str) -> float:
        """Guess once. Return the seconds until the next guess."""
        wait = await self.log_in(name, address, False)
        self.guesses += wait == 0.0
        return wait


@asynccontextmanager
async def simulation(directory: Path) -> AsyncIterator[tuple[Simulation, list[float]]]:
    """Open an empty store. Yield a simulation on it, and a list with its time, to be changed."""
    now = [START]
    store = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{directory}/tokenauth.db"), 10)
    await store.start()
    throttle = Throttle(ThrottleSettings(), 1, store, lambda: now[0], LoginQueue(1, 64))
    yield Simulation(throttle), now
    await throttle.close()
    await store.stop(now[0])


Guess = Callable[[int], tuple[str, str]]
"""Returns the name and the address of a guess, by its number."""

ATTACKS: dict[str, tuple[int, Guess | None]] = {
    "no attack": (0, None),
    "1 address, 1 name": (1, lambda number: ("user0", "198.51.100.1")),
    "1 IPv6 /48, 1 name": (1000, lambda number: ("user0", f"2001:db8:1:{number % 1000:x}::1")),
    "botnet of 10 networks, 1 name": (10, lambda number: ("user0", f"{number % 10 + 1}.1.1.1")),
    "botnet of 1,000 networks, 1 name": (
        1000,
        lambda number: ("user0", f"{number % 200 + 1}.{number % 1000 // 200}.1.1"),
    ),
    "1 address, any names": (1, lambda number: (f"name{number}", "198.51.100.1")),
    "neighbour in the /24, any names": (1, lambda number: (f"name{number}", NEIGHBOUR)),
    "neighbour in the /24, names of users": (1, lambda number: (f"user{number % 500}", NEIGHBOUR)),
    "same address, made-up names": (1, lambda number: (f"name{number}", OFFICE)),
    "same address, 10 known users": (10, lambda number: (f"user{number % 10}", OFFICE)),
}
"""For each attack, the number of its networks, and its guesses."""


async def simulate(directory: Path, attack: str, users: int = 500, known: bool = True) -> Outcome:
    """Let the users of an office log in between 9 and 10, some after a typo, while an attacker guesses all day.

    known: the users logged in from there on the day before.
    """
    chance = Random(7)
    async with simulation(directory) as (tried, now):
        if known:
            for number in range(users):
                await tried.user(f"user{number}", OFFICE, False)
            now[0] += DAY
            tried.logins = 0
        begin = now[0]
        due: list[tuple[float, int, str, int]] = []
        order = count()
        for number in range(users):
            heapq.heappush(due, (begin + 9 * 3600 + chance.random() * 3600, next(order), "user", number))
        networks, guess = ATTACKS[attack]
        for number in range(networks):
            heapq.heappush(due, (begin + number * 0.001, next(order), "guess", number))
        while due and due[0][0] < begin + DAY:
            at, _, what, number = heapq.heappop(due)
            now[0] = max(now[0], at)
            if what == "user":
                await tried.user(f"user{number}", OFFICE, chance.random() < _TYPOS)
                continue
            assert guess is not None
            wait = await tried.guess(*guess(number))
            # the same network continues as soon as it may, with its next name
            heapq.heappush(due, (now[0] + max(wait, 0.01), next(order), "guess", number + networks))
        return Outcome(tried.guesses, tried.refused, tried.logins)


def row(name: str, outcome: Outcome) -> str:
    """Return a row of the table in docs/throttle.md."""
    return f"| {name} | {outcome.guesses:,} | {outcome.refused} of {outcome.logins} |"


if __name__ == "__main__":
    for name in ATTACKS:
        with tempfile.TemporaryDirectory() as directory:
            print(row(name, asyncio.run(simulate(Path(directory), name))), flush=True)
