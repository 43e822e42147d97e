"""Leases over sockets: the holder, the end of the lease by the clock, and the state afterwards."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.connections import Connection
from tests.support.pool_users import Lease, PoolUser, refusal
from tests.support.servers import HandClock, Server, worker, write_config
from tokenauth.service import create_service
from tokenauth.settings import loader

POOLS = """
[pools.any]
[pools.waiting]
token_ttl = 300
"""
LEASE_TTL, TOKEN_TTL = 60, 300
TICK = 1 / 1024  # exact in binary

ChangeLease = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def settings() -> str:
    return POOLS


@pytest.fixture
def admin(server: Server, now: int) -> Iterator[PoolUser]:
    """Log in as admin at one worker, and empty a pool."""
    with Connection(server.port) as connection:
        user = PoolUser(connection)
        user.empty("any")
        yield user


@pytest.fixture
def sibling_admin(sibling: Server, now: int) -> Iterator[PoolUser]:
    """Log in as admin at the other worker."""
    with Connection(sibling.port) as connection:
        yield PoolUser(connection)


@pytest.fixture(params=["keep-alive", "release"])
def change_lease(request: pytest.FixtureRequest, sibling_admin: PoolUser) -> ChangeLease:
    """Return a function that keeps a lease alive or releases it: both check the same claim."""
    return sibling_admin.keep_alive if request.param == "keep-alive" else sibling_admin.release


def third_lease(user: PoolUser) -> Lease:
    """Lease a token that has been leased twice before, by another holder and by the same one."""
    (token,) = user.generate("any")
    for holder in ("ci-6", "ci-7"):
        assert user.assign("any", holder).token == token
        assert user.release("any", token) == (204, None)
    return user.assign("any", "ci-7")


@pytest.mark.parametrize(
    "claim",
    [{}, {"holder": "ci-7"}, {"fence": 3}, {"holder": "ci-7", "fence": 3}, {"holder": None, "fence": None}],
    ids=str,
)
def test_a_request_that_names_the_lease_may_use_it(
    admin: PoolUser, change_lease: ChangeLease, claim: dict[str, Any], clock: HandClock, now: int
) -> None:
    lease = third_lease(admin)
    assert lease.fence == 3
    clock.advance(10)
    kept = lease._replace(expiry_time=now + 70)
    assert change_lease("any", lease.token, **claim) in [(200, kept._asdict()), (204, None)]


@pytest.mark.parametrize(
    "claim",
    [
        {"holder": "ci-6"}, {"holder": "CI-7"}, {"holder": "ci-7 "}, {"holder": ""}, {"holder": "x" * 5000},
        {"holder": "\0"}, {"fence": 2}, {"fence": 4}, {"fence": 0}, {"fence": -1}, {"fence": -(2**63)},
        {"fence": 2**63}, {"fence": 2**64}, {"fence": 10**30},
        {"holder": "ci-7", "fence": 2}, {"holder": "ci-6", "fence": 3},
    ],
    ids=range(16),
)  # fmt: skip
def test_a_request_for_another_lease_changes_nothing(
    admin: PoolUser, change_lease: ChangeLease, claim: dict[str, Any], clock: HandClock
) -> None:
    lease = third_lease(admin)
    before = admin.members("any")
    clock.advance(10)
    assert change_lease("any", lease.token, **claim) == refusal("lease_lost")
    assert admin.members("any") == before
    assert change_lease("any", "another", **claim) == refusal("not_found")


def test_a_lease_ends_exactly_at_its_expiry_time(
    admin: PoolUser, sibling_admin: PoolUser, clock: HandClock, now: int
) -> None:
    (token,) = admin.generate("any")
    admin.assign("any")
    clock.set(now + LEASE_TTL - TICK)
    assert sibling_admin.call("POST", "/any/leases") == refusal("no_free_token")
    assert sibling_admin.counts("any") == (0, 1)
    clock.set(now + LEASE_TTL)
    assert admin.counts("any") == sibling_admin.counts("any") == (1, 0)
    assert sibling_admin.assign("any") == Lease(token, "admin", 2, now + 2 * LEASE_TTL, LEASE_TTL)


def test_a_lease_can_be_extended_up_to_its_end_repeatedly(
    admin: PoolUser, sibling_admin: PoolUser, clock: HandClock, now: int
) -> None:
    admin.generate("any")
    lease = sibling_admin.assign("any")
    for _ in range(3):
        clock.advance(LEASE_TTL - TICK)
        kept = lease._replace(expiry_time=int(clock() + LEASE_TTL))
        assert admin.keep_alive("any", lease.token) == (200, kept._asdict())
    assert list(admin.keep_alive("any", lease.token)[1]) == list(Lease._fields)
    clock.advance(LEASE_TTL)
    assert sibling_admin.counts("any") == (1, 0)


def test_a_lapsed_lease_is_lost_although_its_token_is_free(
    admin: PoolUser, change_lease: ChangeLease, clock: HandClock, now: int
) -> None:
    (token,) = admin.generate("any")
    admin.assign("any", "ci-7")
    clock.set(now + LEASE_TTL)
    for claim in ({}, {"holder": "ci-7"}, {"fence": 1}, {"holder": "ci-7", "fence": 1}, {"holder": None}):
        assert change_lease("any", token, **claim) == refusal("lease_lost")
    assert admin.call("GET", f"/any/tokens/{token}") == (200, {"token": token, "expiry_time": None, "fence": 1})
    assert admin.assign("any", "ci-7").fence == 2


def test_a_reassigned_lease_is_lost_for_its_first_holder(
    admin: PoolUser, change_lease: ChangeLease, clock: HandClock, now: int
) -> None:
    (token,) = admin.generate("any")
    admin.assign("any", "ci-7")
    clock.set(now + LEASE_TTL)
    assert admin.assign("any", "ci-8").token == token
    clock.advance(30)
    for claim in ({"holder": "ci-7"}, {"fence": 1}, {"holder": "ci-7", "fence": 1}):
        assert change_lease("any", token, **claim) == refusal("lease_lost")
    (member,) = admin.members("any")
    assert (member["holder"], member["fence"]) == ("ci-8", 2)
    assert member["lease_expiry_time"] == now + 2 * LEASE_TTL


def test_a_free_token_has_no_lease_to_change(admin: PoolUser, change_lease: ChangeLease) -> None:
    """Whether it has never been leased or was released."""
    (token,) = admin.generate("any")
    assert change_lease("any", token) == change_lease("any", token, fence=0) == refusal("lease_lost")
    admin.assign("any")
    assert admin.release("any", token) == (204, None)
    assert change_lease("any", token) == change_lease("any", token, holder="admin", fence=1) == refusal("lease_lost")


def test_the_other_worker_leases_a_released_token_at_once(admin: PoolUser, sibling_admin: PoolUser) -> None:
    (token,) = admin.generate("any")
    for fence in range(1, 20, 2):
        assert admin.assign("any").fence == fence
        assert sibling_admin.release("any", token, holder="admin", fence=fence) == (204, None)
        assert sibling_admin.assign("any").fence == fence + 1
        assert admin.release("any", token, fence=fence + 1) == (204, None)


def test_a_token_shows_its_holder_and_its_highest_fence(
    admin: PoolUser, sibling_admin: PoolUser, clock: HandClock, now: int
) -> None:
    (token,) = admin.generate("waiting")
    free = {"token": token, "expiry_time": now + TOKEN_TTL}
    leased = {"token": token, "expiry_time": now + LEASE_TTL + TOKEN_TTL, "user": "admin", "holder": "ci-7"}
    leased |= {"fence": 1, "leased_at": now, "lease_expiry_time": now + LEASE_TTL}

    def shown(expected: dict[str, Any], fence: int) -> None:
        for user in (admin, sibling_admin):
            assert user.call("GET", f"/waiting/tokens/{token}") == (200, {**expected, "fence": fence})
            assert user.members("waiting") == [expected], "a list shows the fence only of a leased token"

    shown(free, 0)
    sibling_admin.assign("waiting", "ci-7")
    shown(leased, 1)
    clock.set(now + LEASE_TTL)
    shown({**free, "expiry_time": now + LEASE_TTL + TOKEN_TTL}, 1)
    admin.assign("waiting")
    clock.advance(10)
    assert sibling_admin.release("waiting", token) == (204, None)
    shown({**free, "expiry_time": now + LEASE_TTL + 10 + TOKEN_TTL}, 2)


def test_a_token_expires_free_and_never_while_leased(
    admin: PoolUser, sibling_admin: PoolUser, clock: HandClock, now: int
) -> None:
    leased, free = admin.generate("waiting", 2)
    sibling_admin.assign("waiting")
    clock.set(now + TOKEN_TTL - TICK)
    assert admin.counts("waiting") == (2, 0)
    clock.set(now + TOKEN_TTL)
    assert sibling_admin.call("GET", f"/waiting/tokens/{free}") == refusal("not_found")
    assert admin.delete("waiting", free) == refusal("not_found")
    assert [member["token"] for member in admin.members("waiting")] == [leased]
    clock.set(now + LEASE_TTL + TOKEN_TTL - TICK)
    assert admin.assign("waiting").token == leased
    clock.advance(LEASE_TTL + TOKEN_TTL)
    assert sibling_admin.keep_alive("waiting", leased) == refusal("not_found")
    assert sibling_admin.call("POST", "/waiting/leases") == refusal("no_free_token")
    assert sibling_admin.counts("waiting") == (0, 0)


def test_a_clock_set_back_revives_no_lease_and_no_token(
    admin: PoolUser, sibling_admin: PoolUser, clock: HandClock, now: int
) -> None:
    (token,) = admin.generate("any")
    (expired,) = admin.generate("waiting")
    lease = sibling_admin.assign("any")
    clock.advance(TOKEN_TTL)
    assert admin.counts("waiting") == sibling_admin.counts("waiting") == (0, 0)
    clock.set(now)
    for user in (admin, sibling_admin):
        assert user.keep_alive("any", token, fence=lease.fence) == refusal("lease_lost")
        assert user.call("GET", f"/waiting/tokens/{expired}") == refusal("not_found")
    assert admin.assign("any") == Lease(token, "admin", 2, now + TOKEN_TTL + LEASE_TTL, LEASE_TTL)
    clock.advance(TOKEN_TTL)


async def migrate(config: Path) -> None:
    """Create the database."""
    async with create_service(loader.load(config)).running():
        pass


def test_leases_and_tokens_expire_without_a_sweeper(tmp_path: Path) -> None:
    """The sweep is marked as done in the far future, so expired rows stay in the database."""
    config = write_config(tmp_path, POOLS)
    clock = HandClock(tmp_path / "clock", create=True)
    asyncio.run(migrate(config))
    with closing(sqlite3.connect(tmp_path / "tokenauth.db")) as db, db:
        db.execute("REPLACE INTO marks (name, at) VALUES ('sweep', 9e9)")
    with worker(config, clock) as server, Connection(server.port) as connection:
        user = PoolUser(connection)
        user.generate("waiting", 2)
        assert user.assign("waiting").fence == 1
        clock.advance(TOKEN_TTL)
        assert user.counts("waiting") == (1, 0)
        assert user.assign("waiting").fence == 2
        assert user.counts("waiting") == (0, 1)
        assert not server.events("swept")
    with closing(sqlite3.connect(tmp_path / "tokenauth.db")) as db:
        assert db.execute("SELECT count(*) FROM pool_tokens").fetchone() == (2,)


def test_a_restart_keeps_tokens_leases_and_fences(tmp_path: Path) -> None:
    config = write_config(tmp_path, POOLS)
    clock = HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        user = PoolUser(connection)
        first, _ = user.generate("any", 2)
        (deleted,) = user.generate("waiting")
        user.assign("any", "ci-6")
        clock.advance(1)
        user.release("any", first)
        user.assign("any", "ci-7")
        lease = user.assign("any", "ci-8")
        assert (lease.token, lease.fence) == (first, 2)
        user.delete("waiting", deleted)
        before = user.members("any")
        server.kill()
    with worker(config, clock) as server, Connection(server.port) as connection:
        user = PoolUser(connection)
        assert user.members("any") == before
        assert user.members("waiting") == []
        assert user.keep_alive("any", lease.token, holder="ci-8", fence=2)[0] == 200
        assert user.keep_alive("any", lease.token, fence=1) == refusal("lease_lost")
        clock.advance(LEASE_TTL)
        assert sorted(user.assign("any").fence for _ in range(2)) == [2, 3]


def test_no_token_is_taken_for_a_holder(admin: PoolUser, server: Server) -> None:
    """It would be stored, listed and logged in clear."""
    with Connection(server.port) as connection:
        token = connection.log_in()
        connection.ask("POST", "/api/pools/any/tokens", {"count": 1}, X_Token=token)
        answer = connection.ask("POST", "/api/pools/any/leases", {"holder": token}, X_Token=token)
        assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
        answer = connection.ask("DELETE", "/api/pools/any/leases/x?force=true", {"reason": token}, X_Token=token)
        assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
        assert token not in str(answer.json())
