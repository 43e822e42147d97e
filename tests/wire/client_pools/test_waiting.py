"""Clients that wait in the line of a pool."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from secrets import token_hex
from typing import Any

import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.pool_users import Lease, PoolUser
from tests.support.servers import HandClock, Server
from tests.wire.client_pools.clients import Client, Connect, Watch
from tests.wire.client_pools.conftest import MANY, TTL
from tests.wire.client_pools.proxy import Proxy
from tokenauth import errors

PassTime = Callable[[float], object]

BUSY = b'HTTP/1.1 503 X\r\nConnection: close\r\n\r\n{"error": "store_unavailable", "error_description": "."}'


def line(admin: PoolUser, pool: str = "permit") -> list[dict[str, Any]]:
    """Return the requests that wait for a pool."""
    status, document = admin.call("GET", f"/{pool}/requests")
    assert status == 200, document
    return list(document["requests"])


class Waiter(threading.Thread):
    """A client that waits for the permit, and holds it until `let_go`."""

    def __init__(self, client: Client, pool: str = "permit", **options: Any) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._pool = pool
        self._options = {"wait": 600, "on_wait": self._note, **options}
        self._done = threading.Event()
        self._fences: Future[list[int]] = Future()
        self.places: list[tuple[int, int]] = []
        self.start()

    def _note(self, position: int, waiting: int) -> None:
        self.places.append((position, waiting))

    def run(self) -> None:
        """Wait, and hold."""
        try:
            with self._client.lease(self._pool, **self._options) as lease:
                self._fences.set_result([grant.fence for grant in lease.grants])
                self._done.wait()
        except BaseException as error:
            self._fences.set_exception(error)

    def waits(self) -> "Waiter":
        """Wait until it has a place."""
        until(lambda: bool(self.places), "it waits")
        return self

    def let_go(self) -> list[int]:
        """Wait until it has the permit, and release it. Return the fences."""
        fences = self._fences.result(60)
        self._done.set()
        self.join(60)
        return fences


@pytest.fixture
def name() -> str:
    """Return a name for a request that no other test uses."""
    return f"job-{token_hex(4)}"


@pytest.fixture
def before(admin: PoolUser) -> Lease:
    """Lease the permit, so that others wait."""
    assert line(admin) == []
    return admin.assign("permit")


def test_a_client_waits_until_a_token_is_released(client: Client, admin: PoolUser, before: Lease) -> None:
    waiter = Waiter(client, holder="ci-7").waits()
    assert waiter.places[0] == (1, 1)
    (request,) = line(admin)
    assert (request["position"], request["user"], request["holder"]) == (1, "admin", "ci-7")
    admin.release("permit", before.token)
    assert waiter.let_go() == [before.fence + 1]
    assert admin.counts("permit") == (1, 0)


def test_clients_are_served_in_their_order(client: Client, admin: PoolUser, before: Lease) -> None:
    first, second = (Waiter(client).waits() for _ in range(2))
    assert second.places[0] == (2, 2)
    admin.release("permit", before.token)
    assert first.let_go() == [before.fence + 1]
    assert second.let_go() == [before.fence + 2]


def test_a_client_waits_no_longer_than_its_limit(client: Client, admin: PoolUser, before: Lease, watch: Watch) -> None:
    with (
        pytest.raises(errors.NoFreeToken),
        client.lease("permit", wait=60, on_wait=lambda *_: watch.advance(60)),
    ):
        raise AssertionError("there was no token")
    until(lambda: line(admin) == [], "it has left the line")


def test_a_request_whose_lease_is_over_says_so(client: Client, name: str) -> None:
    with client.lease("permit", request=name):
        pass
    over = "its lease is over: use a new id for a new lease"
    with pytest.raises(errors.LeaseLost, match=over), client.lease("permit", request=name):
        raise AssertionError("there was no new lease")


def test_a_client_that_is_interrupted_leaves_the_line(client: Client, admin: PoolUser, before: Lease) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted), client.lease("permit", wait=60, on_wait=interrupt):
        raise AssertionError("there was no token")
    until(lambda: line(admin) == [], "it has left the line")


def test_a_lease_counts_from_when_it_was_granted(client: Client, admin: PoolUser, before: Lease, watch: Watch) -> None:
    """Not from when the request was sent that has waited for it."""
    waiter = Waiter(client).waits()
    watch.advance(2 * TTL)
    admin.release("permit", before.token)
    assert waiter.let_go() == [before.fence + 1]


def test_a_repeated_request_knows_how_long_it_lasts(
    client: Client, name: str, watch: Watch, pass_time: PassTime
) -> None:
    with client.lease("long", request=name) as lease:
        pass_time(4)
        with client.lease("long", request=name) as same:
            assert (lease.ends_at, same.ends_at) == (watch.now + 26, watch.now + 26)


def test_a_request_with_a_name_keeps_its_place(
    client: Client, admin: PoolUser, before: Lease, watch: Watch, name: str
) -> None:
    """So that the program can go on waiting, also after a restart."""
    for _ in range(2):
        with (
            pytest.raises(errors.NoFreeToken),
            client.lease("permit", request=name, wait=60, on_wait=lambda *_: watch.advance(60)),
        ):
            raise AssertionError("there was no token")
        assert [request["request"] for request in line(admin)] == [name]


def test_a_repeated_request_gets_the_same_lease(client: Client, name: str) -> None:
    with client.lease("permit", request=name) as lease, client.lease("permit", request=name) as same:
        assert (same.token, same.fence) == (lease.token, lease.fence)


def test_a_repeated_request_has_the_same_terms(client: Client, name: str) -> None:
    with (
        client.lease("permit", request=name),
        pytest.raises(errors.RequestDiffers),
        client.lease("permit", request=name, holder="another"),
    ):
        raise AssertionError("this was refused")


@pytest.mark.parametrize("options", [{"wait": 60}, {"request": "job"}], ids=["wait", "request"])
def test_a_lost_answer_costs_nothing(
    client: Client, admin: PoolUser, proxy: Proxy, options: dict[str, Any], name: str
) -> None:
    before = admin.assign("permit")
    admin.release("permit", before.token)
    proxy.hold()
    if "request" in options:
        options = {"request": name}
    waiter = Waiter(client, **{"wait": 0, "on_wait": None, **options})
    proxy.wait_for_response()
    assert admin.counts("permit") == (0, 1), "the token is leased"
    proxy.drop()
    assert waiter.let_go() == [before.fence + 1]


def test_an_outage_does_not_cost_the_place(client: Client, admin: PoolUser, before: Lease, proxy: Proxy) -> None:
    waiter = Waiter(client).waits()
    later = Waiter(client).waits()
    proxy.replace(BUSY)
    proxy.drop()
    proxy.wait_for_request()
    proxy.restore()
    admin.release("permit", before.token)
    assert waiter.let_go() == [before.fence + 1]
    assert later.let_go() == [before.fence + 2]


@pytest.mark.parametrize("answer", [b"", BUSY], ids=["none", "busy"])
def test_a_client_waits_for_a_server_that_starts(
    client: Client, admin: PoolUser, before: Lease, proxy: Proxy, answer: bytes
) -> None:
    """Before it has a place, too."""
    proxy.replace(answer)
    waiter = Waiter(client)
    until(lambda: proxy.replaced > 3, "it has asked more often than for a lost answer")
    proxy.restore()
    waiter.waits()
    admin.release("permit", before.token)
    assert waiter.let_go() == [before.fence + 1]


def test_several_tokens_are_leased_together(
    client: Client, admin: PoolUser, clock: HandClock, pass_time: PassTime
) -> None:
    with client.lease("permits", count=MANY) as lease:
        assert {grant.token for grant in lease.grants} == {member["token"] for member in admin.members("permits")}
        assert lease.token == lease.grants[0].token
        pass_time(TTL / 3)
        until(
            lambda: [member["lease_expiry_time"] for member in admin.members("permits")] == [clock() + TTL] * MANY,
            "all leases run from now",
        )
        lease.check()
    assert admin.counts("permits") == (MANY, 0)


def test_several_tokens_are_waited_for_together(client: Client, admin: PoolUser) -> None:
    before = [admin.assign("permits") for _ in range(2)]
    waiter = Waiter(client, "permits", count=MANY).waits()
    for lease in before:
        assert admin.counts("permits")[1] == len(before) - before.index(lease)
        admin.release("permits", lease.token)
    assert len(waiter.let_go()) == MANY


def test_a_lease_of_several_is_lost_with_the_first(client: Client, admin: PoolUser, watch: Watch) -> None:
    with client.lease("permits", count=2) as lease:
        admin.release("permits", lease.grants[1].token)
        lease.check()
        watch.advance(TTL / 3)
        assert lease.lost.wait(20)
        assert admin.counts("permits") == (MANY - 1, 1), "the other one is held until the block ends"
    assert admin.counts("permits") == (MANY, 0)


def test_too_many_tokens_are_refused_at_once(client: Client) -> None:
    with pytest.raises(errors.InvalidRequest), client.lease("permits", count=MANY + 1, wait=60):
        raise AssertionError("this was refused")


def test_a_lease_can_be_shorter(client: Client, admin: PoolUser, clock: HandClock) -> None:
    with client.lease("permit", ttl=TTL - 4):
        assert admin.members("permit")[0]["lease_expiry_time"] == clock() + TTL - 4


def test_only_managers_raise_their_priority(connect: Connect, server: Server) -> None:
    with Connection(server.port) as connection:
        ann = PoolUser(connection, "ann")
        client = connect(server.url, headers={"X-Token": ann.token})
        with pytest.raises(errors.InsufficientScope), client.lease("permit", wait=60, priority=1):
            raise AssertionError("this was refused")


def test_labels_choose_the_member(client: Client) -> None:
    with client.lease("phones", labels=["ios", "arm"]) as lease:
        assert (lease.name, lease.labels) == ("iphone-15", ("ios", "arm"))
        with pytest.raises(errors.NoFreeToken, match="no free member"), client.lease("phones", labels=["ios"]):
            raise AssertionError("there was no other")


def test_a_lease_is_lost_at_its_longest_time(
    client: Client, admin: PoolUser, clock: HandClock, watch: Watch, pass_time: PassTime
) -> None:
    """However often it is kept alive."""
    with client.lease("capped") as lease:
        started, started_here = clock(), watch()
        for third in range(1, 6):
            pass_time(TTL / 3)
            ttl = min(third * TTL / 3 + TTL, 2 * TTL)
            until(lambda: admin.members("capped")[0]["lease_expiry_time"] == started + ttl, "kept alive")  # noqa: B023
            until(lambda: lease.ends_at == started_here + ttl, "the client knows")  # noqa: B023
        lease.check()
        pass_time(TTL / 3)
        with pytest.raises(errors.LeaseLost):
            lease.check()


def test_labels_are_a_list(client: Client) -> None:
    with pytest.raises(TypeError, match="labels: takes a list"), client.lease("permit", labels="arm"):
        raise AssertionError("this was refused")
