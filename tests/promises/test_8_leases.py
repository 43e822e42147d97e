"""Promise 8: no two live leases of one token; never more live tokens than `capacity`; fences only grow."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest

from tests.support.connections import Connection
from tests.support.pool_users import PoolUser, refusal
from tests.support.servers import HandClock, Server, worker, write_config

T = TypeVar("T")
THREADS = 8


@pytest.fixture(scope="module")
def settings() -> str:
    return '[pools.any]\n[pools.hundred]\ncapacity = 100\ntoken_ttl = "5m"'


@pytest.fixture
def users(server: Server, sibling: Server) -> Iterator[list[PoolUser]]:
    """Return eight users, each with its own connection to one of two workers."""
    with ExitStack() as stack:
        ports = (server.port, sibling.port) * (THREADS // 2)
        yield [PoolUser(stack.enter_context(Connection(port))) for port in ports]


def at_once(users: list[PoolUser], work: Callable[[PoolUser], T]) -> list[T]:
    """Run `work` for all users at the same time."""
    barrier = Barrier(len(users))

    def begin(user: PoolUser) -> T:
        barrier.wait(30)
        return work(user)

    with ThreadPoolExecutor(len(users)) as threads:
        return list(threads.map(begin, users))


def test_400_concurrent_assigns_lease_400_tokens(users: list[PoolUser]) -> None:
    """The original token-pool leased 299, some of them twice."""
    tokens = users[0].generate("any", 400)
    taken = at_once(users, lambda user: [user.assign("any") for _ in range(400 // THREADS)])
    leases = [lease for each in taken for lease in each]
    assert sorted(lease.token for lease in leases) == sorted(tokens)
    assert {lease.fence for lease in leases} == {1}
    assert users[0].call("POST", "/any/leases") == refusal("no_free_token")


def test_the_last_free_token_is_leased_once(users: list[PoolUser]) -> None:
    for _ in range(10):
        users[0].empty("any")
        (token,) = users[1].generate("any")
        answers = at_once(users, lambda user: user.ask("POST", "/any/leases"))
        assert sorted(answer.status for answer in answers) == [201] + [409] * (THREADS - 1)
        users[0].release("any", token)


@pytest.mark.parametrize("count", [1, 7])
def test_capacity_100_never_allows_more_than_100_tokens(users: list[PoolUser], clock: HandClock, count: int) -> None:
    """Two original services generated 101 and 105. Leased tokens count too, and `count` is all or nothing."""
    clock.advance(400)

    def fill(user: PoolUser) -> int:
        made = 0
        while (answer := user.ask("POST", "/hundred/tokens", {"count": count})).status == 201:
            made += len(answer.json()["tokens"])
            assert user.ask("POST", "/hundred/leases").status == 201
            assert sum(user.counts("hundred")) <= 100
        assert (answer.status, answer.json()) == refusal("pool_full")
        return made

    made = sum(at_once(users, fill))
    assert made == 100 // count * count
    assert sum(users[0].counts("hundred")) == made


def test_a_fence_only_grows_across_leases_and_restarts(tmp_path: Path) -> None:
    config = write_config(tmp_path, "[pools.any]")
    clock = HandClock(tmp_path / "clock", create=True)
    fences: list[int] = []
    for _ in range(2):
        with worker(config, clock) as server, Connection(server.port) as connection:
            one, other = PoolUser(connection), PoolUser(connection)
            if not fences:
                one.generate("any")
            for user in (one, other, one):
                lease = user.assign("any")
                fences.append(lease.fence)
                one.keep_alive("any", lease.token)
                assert other.release("any", lease.token, fence=lease.fence) == (204, None)
                fences.append(other.assign("any").fence)
                clock.advance(60)
            assert one.counts("any") == (1, 0)
            clock.advance(-30)
            fences.append(one.assign("any").fence)
            clock.advance(90)
            server.kill()
    assert len(fences) == 14
    assert fences == list(range(1, len(fences) + 1))
