"""Leases that are acquired, kept alive and released."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import HandClock, Server
from tests.wire.client_pools.clients import Client, Connect
from tests.wire.client_pools.conftest import MANY, TTL
from tests.wire.client_pools.proxy import Proxy
from tokenauth import errors
from tokenauth.client import TokenAuth

PassTime = Callable[[float], object]


def lease_ends(admin: PoolUser, pool: str = "permit") -> list[int | None]:
    """Return when the leases of a pool end."""
    return [member.get("lease_expiry_time") for member in admin.members(pool)]


def test_a_token_is_held_until_the_block_ends(client: Client, admin: PoolUser, clock: HandClock) -> None:
    with client.lease("permit", holder="ci-7") as lease:
        lease.check()
        (member,) = admin.members("permit")
        assert (member["token"], member["holder"], member["fence"]) == (lease.token, lease.holder, lease.fence)
        assert lease.holder == "ci-7"
        assert member["lease_expiry_time"] == clock() + TTL
    assert admin.counts("permit") == (1, 0)


def test_a_released_lease_is_lost(client: Client) -> None:
    with client.lease("permit") as lease:
        assert not lease.lost.is_set()
    assert lease.lost.wait(0)
    with pytest.raises(errors.LeaseLost):
        lease.check()


def test_the_holder_is_by_default_the_user(client: Client) -> None:
    with client.lease("permit") as lease:
        assert lease.holder == "admin"


def test_no_lease_shows_its_token(client: Client) -> None:
    with client.lease("permit", holder="ci-7") as lease:
        assert lease.token not in repr(lease)
        assert "ci-7" in repr(lease)


def test_no_log_shows_the_token_of_a_lease(
    client: Client, admin: PoolUser, clock: HandClock, pass_time: PassTime, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in a keep-alive nor in a release, at any log level."""
    caplog.set_level(logging.DEBUG)
    with client.lease("permit") as lease:
        pass_time(TTL / 3)
        until(lambda: lease_ends(admin) == [clock() + TTL], "the lease was kept alive")
    messages = [record.getMessage() for record in caplog.records if record.name == "httpx"]
    for method in ("PUT", "DELETE"):
        assert any(f"{method} " in text and "/api/pools/permit/leases/(token)" in text for text in messages)
    assert lease.token not in caplog.text


def test_a_lease_is_kept_alive_during_the_whole_block(
    client: Client, admin: PoolUser, clock: HandClock, pass_time: PassTime
) -> None:
    with client.lease("permit") as lease:
        for _ in range(3):
            pass_time(TTL / 3)
            until(lambda: lease_ends(admin) == [clock() + TTL], "the lease runs from now")
        lease.check()
        assert admin.members("permit")[0]["fence"] == lease.fence


def test_a_keep_alive_counts_from_before_its_request(
    client: Client, admin: PoolUser, clock: HandClock, proxy: Proxy, pass_time: PassTime
) -> None:
    with client.lease("permit") as lease:
        proxy.hold()
        pass_time(TTL / 3)
        proxy.wait_for_response()
        pass_time(TTL / 2)
        proxy.resume()
        until(
            lambda: lease_ends(admin) == [int(clock() + TTL)],
            "the next keep-alive was sent at once",
        )
        lease.check()


def test_many_leases_are_held_at_once(client: Client, admin: PoolUser, clock: HandClock, pass_time: PassTime) -> None:
    with ExitStack() as stack:
        leases = [stack.enter_context(client.lease("permits")) for _ in range(MANY)]
        assert len({lease.token for lease in leases}) == MANY
        pass_time(TTL / 3)
        until(lambda: lease_ends(admin, "permits") == [clock() + TTL] * MANY, "all leases run from now")
    assert admin.counts("permits") == (MANY, 0)


def test_a_refusal_says_when_the_next_lease_ends(client: Client, admin: PoolUser, clock: HandClock) -> None:
    admin.assign("permit")
    clock.advance(5)
    with pytest.raises(errors.NoFreeToken) as refusal, client.lease("permit"):
        raise AssertionError("there was no token")
    assert refusal.value.retry_after == TTL - 5


def test_more_leases_than_a_user_may_have_are_refused(client: Client, admin: PoolUser) -> None:
    admin.assign("each")
    with pytest.raises(errors.TooManyLeases, match="as many tokens"), client.lease("each"):
        raise AssertionError("one user may have one")


@pytest.mark.parametrize(
    ("pool", "options", "kind", "message"),
    [
        pytest.param("nowhere", {}, errors.UnknownPool, "no pool of this name", id="no-such-pool"),
        pytest.param("a?b#c", {}, errors.UnknownPool, "no pool of this name", id="no-pool-can-be-named-so"),
        pytest.param("..", {}, errors.UnknownPool, "no pool of this name", id="another-path"),
        pytest.param("", {}, errors.UnknownPool, "no pool of this name", id="no-name"),
        pytest.param("p" * 100_000, {}, errors.UnknownPool, "no pool of this name", id="too-long"),
        pytest.param("guarded", {}, errors.InsufficientScope, "the scope 'write'", id="scope"),
        pytest.param("permit", {"holder": "a\tb"}, errors.InvalidRequest, "holder: has a", id="holder"),
    ],
)
def test_a_refusal_is_raised(
    client: Client, pool: str, options: dict[str, Any], kind: type[errors.Refusal], message: str
) -> None:
    with pytest.raises(kind, match=message) as refusal, client.lease(pool, **options):
        raise AssertionError("this was refused")
    assert type(refusal.value) is kind


@pytest.mark.parametrize(
    ("path", "headers", "kind"),
    [
        pytest.param("", {}, errors.TokenRequired, id="no-login"),
        pytest.param("", {"X-Token": "t" * 64}, errors.InvalidToken, id="bad-login"),
        pytest.param("/nowhere", {}, errors.UnknownToken, id="bad-address"),
    ],
)
def test_a_misconfigured_client_gets_an_error(
    connect: Connect, proxy: Proxy, path: str, headers: dict[str, str], kind: type[errors.Refusal]
) -> None:
    with pytest.raises(errors.Refusal) as refusal, connect(proxy.url + path, headers=headers).lease("permit"):
        raise AssertionError("this was refused")
    assert type(refusal.value) is kind


def test_automatic_login_opens_the_pool_of_a_scope(connect: Connect, server: Server) -> None:
    with connect(server.url, auth=TokenAuth(server.url, "ann", "ann-secret")).lease("guarded") as lease:
        assert lease.holder == "ann"
