"""PoolStore on SQLite: cost does not depend on the size of a pool. SQLite's steps are counted; nothing is timed."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest

from tests.support.servers import START
from tests.support.steps import Direct, answer, steps
from tokenauth.models import LeaseCheck, Pool
from tokenauth.stores.store import PoolStore

FEW, MANY = 400, 20_000
MOST_LEASED = Pool("most leased", lease_ttl=60, token_ttl=240)
ALL_LEASED, MOST_FREE = replace(MOST_LEASED, name="all leased"), replace(MOST_LEASED, name="most free")
AGEING = replace(MOST_LEASED, name="most lapsed and expired", ages_while_leased=True)
LEASED = {MOST_LEASED: 0.98, ALL_LEASED: 1.0, MOST_FREE: 0.02, AGEING: 0.98}
PREFILLED, BOUNDED = replace(MOST_LEASED, capacity=MANY, prefill=True), replace(MOST_LEASED, capacity=2 * MANY)
IN_LINE = Pool("a line", lease_ttl=60)
INSERT = "INSERT INTO pool_tokens (pool, value, free_at, holder, fence, retired) VALUES (?, ?, ?, ?, 1, 0)"

INSERT_REQUEST = (
    "INSERT INTO pool_requests (number, pool, username, id, holder, count, priority, labels, since, turn, kept_until,"
    " asks, answers) VALUES (?, ?, ?, ?, '', 1, 0, '[]', ?, ?, ?, 1, 0)"
)

Ask = Callable[[PoolStore], Awaitable[object]]

CHEAP: dict[str, Ask] = {
    "assign": lambda pools: pools.assign(MOST_LEASED, "ann", START),
    "assign, and most are free": lambda pools: pools.assign(MOST_FREE, "ann", START),
    "assign, and none is free": lambda pools: pools.assign(ALL_LEASED, "ann", START),
    "assign, and most have expired": lambda pools: pools.assign(AGEING, "ann", START),
    "assign with prefill": lambda pools: pools.assign(PREFILLED, "ann", START),
    "keep_alive": lambda pools: pools.keep_alive(MOST_LEASED, "t300", START, LeaseCheck("ann", 1)),
    "keep_alive of a free token": lambda pools: pools.keep_alive(MOST_FREE, "t101", START, include_free=True),
    "release": lambda pools: pools.release(MOST_LEASED, "t300", START),
    "force_end": lambda pools: pools.force_end(MOST_LEASED, "t300", START, "ops"),
    "find_forced_end": lambda pools: pools.find_forced_end(MOST_LEASED, "t300"),
    "an unknown token": lambda pools: pools.release(MOST_LEASED, "t", START),
    "delete": lambda pools: pools.delete(MOST_LEASED, "t300", START),
    "delete with a successor": lambda pools: pools.delete(MOST_LEASED, "t300", START, "x"),
    "generate": lambda pools: pools.generate(MOST_LEASED, ["x"], START),
    "keep_alive_free": lambda pools: pools.keep_alive_free(MOST_FREE, START, START, 5),
    "purge": lambda pools: pools.purge(MOST_FREE, START, 5),
    "get": lambda pools: pools.get(MOST_LEASED, "t300", START),
    "list_tokens": lambda pools: pools.list_tokens(MOST_LEASED, START, "t300", 5),
    "list_leases": lambda pools: pools.list_leases(MOST_LEASED, START, (START + 30, 0), 5),
    "list_requests": lambda pools: pools.list_requests(IN_LINE, START, 5, (START - 200, 0)),
}

COUNTING: dict[str, Ask] = {
    "a counted lease": lambda pools: pools.assign(PREFILLED, "ann", START, counted=True),
    "release_next": lambda pools: pools.release_next(PREFILLED, START),
    "generate with a capacity": lambda pools: pools.generate(BOUNDED, ["x"], START),
    "count": lambda pools: pools.count(BOUNDED, START),
    "count_line": lambda pools: pools.count_line(IN_LINE, (START - 200, 0), START),
}
"""These count tokens or requests along an index: a step or two for each."""


def rows(pool: Pool, leased: float, count: int) -> Iterator[tuple[str, str, float, str | None]]:
    """Return rows of which some are leased and some have expired."""
    for number in range(count):
        if number * 7919 % 100 < leased * 100:
            since = -239 if pool is AGEING else 1
            yield pool.name, f"t{number}", START + since + number % 59, "ann"
        else:
            yield pool.name, f"t{number}", START - (300 if number % 20 == 0 else number % 200), None


def requests(count: int) -> Iterator[tuple[int, str, str, str, float, float, float]]:
    """Return the rows of a line."""
    for number in range(count):
        at = START - 300 + number % 300
        yield number + 1, IN_LINE.name, f"user {number}", f"r{number}", at, at, START + 60


@pytest.fixture(scope="module")
def small_and_large() -> Iterator[tuple[Direct, Direct]]:
    """Create two databases of very different size."""
    few, many = Direct(), Direct()
    with closing(few.connection), closing(many.connection):
        for database, count in ((few, FEW), (many, MANY)):
            for pool, leased in LEASED.items():
                database.connection.executemany(INSERT, rows(pool, leased, count))
            database.connection.executemany(INSERT_REQUEST, requests(count))
        yield few, many


@pytest.mark.parametrize("what", CHEAP)
def test_an_operation_costs_the_same_among_more_tokens(small_and_large: tuple[Direct, Direct], what: str) -> None:
    few, many = (
        steps(partial(CHEAP[what], PoolStore(database)), database.connection)[0] for database in small_and_large
    )
    assert 0 < many <= few + 20, f"{few} steps among {FEW} tokens, {many} among {MANY}"


@pytest.mark.parametrize("what", CHEAP | COUNTING)
def test_it_finds_its_rows_through_an_index(small_and_large: tuple[Direct, Direct], what: str) -> None:
    """Neither a whole table is read, nor is anything sorted but the first few of two ranges."""
    connection = small_and_large[1].connection
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    asyncio.run(answer((CHEAP | COUNTING)[what](PoolStore(small_and_large[1]))))
    connection.set_trace_callback(None)
    tables = ("pool_tokens", "forced_ends", "pool_requests")
    asked = [statement for statement in statements if any(table in statement for table in tables)]
    assert asked
    for statement in asked:
        for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {statement}"):
            assert not step.startswith(("SCAN pool_tokens", "SCAN pool_requests")), f"{step}: {statement}"
            few = statement.count("LIMIT") > 2
            assert few or "TEMP B-TREE" not in step, f"{step}: {statement}"
