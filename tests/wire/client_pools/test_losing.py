"""Leases that are lost: another client has the token, or time is up without a response."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import ROOT, HandClock, Server
from tests.wire.client.sites import Answer, Issuer, Seen, site
from tests.wire.client_pools.clients import Client, Connect, Watch
from tests.wire.client_pools.conftest import TTL
from tests.wire.client_pools.proxy import Proxy
from tokenauth import errors
from tokenauth.client import TokenAuth, lease

PassTime = Callable[[float], object]

FAILURES = {
    "nothing": b"",
    "proxy": b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<h1>Bad Gateway</h1>",
    "elsewhere": b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n<h1>Not Found</h1>",
    "no-lease": b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"status": "fine"}',
    "nested": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"[" * 20_000,
    "store": b'HTTP/1.1 503 X\r\nConnection: close\r\n\r\n{"error": "store_unavailable", "error_description": "."}',
}
"""Responses that a client may get instead of one of the server. None is about the lease."""


def is_free(admin: PoolUser) -> bool:
    """Return whether the only permit is free."""
    return admin.counts("permit") == (1, 0)


def end(admin: PoolUser) -> int:
    """Return when the lease of the only permit ends."""
    return int(admin.members("permit")[0]["lease_expiry_time"])


@pytest.mark.parametrize("reason", ["released", "deleted", "lapsed"])
def test_a_lease_is_lost_when_the_issuer_refuses_it(
    client: Client, admin: PoolUser, clock: HandClock, proxy: Proxy, watch: Watch, reason: str
) -> None:
    with client.lease("permit") as lease:
        if reason == "released":
            admin.release("permit", lease.token)
        elif reason == "deleted":
            admin.delete("permit", lease.token)
        else:
            clock.advance(TTL)
        lease.check()
        watch.advance(TTL / 3)
        assert lease.lost.wait(20)
        with pytest.raises(errors.LeaseLost):
            lease.check()
        proxy.replace(b"")
    assert proxy.replaced == 0, "nothing was released"


def test_a_lost_lease_does_not_release_the_next_one(client: Client, admin: PoolUser, watch: Watch) -> None:
    """The user and the holder are the same: only the fence differs."""
    with client.lease("permit") as lease:
        admin.release("permit", lease.token)
        after = admin.assign("permit")
        watch.advance(TTL / 3)
        assert lease.lost.wait(20)
    assert admin.keep_alive("permit", after.token, fence=lease.fence + 1)[0] == 200


def test_a_lost_lease_says_who_has_ended_it(client: Client, admin: PoolUser, watch: Watch) -> None:
    with client.lease("permit") as lease:
        forced = f"/permit/leases/{lease.token}?force=true"
        assert admin.call("DELETE", forced, {"reason": "device is stuck"}) == (204, None)
        watch.advance(TTL / 3)
        assert lease.lost.wait(20)
        with pytest.raises(errors.LeaseLost, match="'admin' has ended your lease"):
            lease.check()


def test_a_lease_lost_unnoticed_costs_no_other_holder(client: Client, admin: PoolUser) -> None:
    with client.lease("permit") as lease:
        admin.release("permit", lease.token)
        after = admin.assign("permit")
    assert admin.keep_alive("permit", after.token, fence=after.fence)[0] == 200


def test_a_lease_ends_by_time_without_a_response(client: Client, proxy: Proxy, pass_time: PassTime) -> None:
    """One thread waits for the event, none calls `check`, and a keep-alive hangs."""
    with ThreadPoolExecutor(1) as threads, client.lease("long") as lease:
        lost = threads.submit(lease.lost.wait)
        proxy.hold()
        pass_time(10)
        proxy.wait_for_response()
        pass_time(19)
        lease.check()
        pass_time(1)
        assert lost.result(7), "the keep-alive may take a third of the lease"
        proxy.resume()


def test_an_answer_that_comes_too_late_revives_nothing(
    client: Client, admin: PoolUser, proxy: Proxy, watch: Watch
) -> None:
    with client.lease("permit") as lease:
        proxy.hold()
        watch.advance(TTL / 3)
        proxy.wait_for_response()
        watch.advance(TTL)
        proxy.resume()
        until(lambda: is_free(admin), "the token is released")
        assert lease.lost.is_set()


def test_a_holder_that_was_suspended_loses_its_lease(client: Client, admin: PoolUser, watch: Watch) -> None:
    """The server would still extend it."""
    with client.lease("permit") as lease:
        watch.advance(TTL)
        with pytest.raises(errors.LeaseLost):
            lease.check()
        until(lambda: is_free(admin), "the token is released")
        assert lease.lost.is_set()


def test_a_lease_counts_from_before_its_request(client: Client, proxy: Proxy, pass_time: PassTime) -> None:
    def hold() -> bool:
        with client.lease("permit") as lease:
            lease.check()
            pass_time(1)
            return lease.lost.wait(20)

    proxy.hold()
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(hold)
        proxy.wait_for_response()
        pass_time(TTL - 1)
        proxy.replace(b"")  # otherwise it would be kept alive at once
        proxy.resume()
        assert lost.result()


def test_a_lease_already_over_is_not_started(client: Client, admin: PoolUser, proxy: Proxy, watch: Watch) -> None:
    def hold() -> None:
        with client.lease("permit"):
            raise AssertionError("its time is up")

    proxy.hold()
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(hold)
        proxy.wait_for_response()
        watch.advance(TTL)
        proxy.resume()
        with pytest.raises(errors.LeaseLost):
            held.result()
    assert is_free(admin)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_keep_alive_that_fails_is_tried_again(
    client: Client, admin: PoolUser, proxy: Proxy, pass_time: PassTime, failure: str
) -> None:
    with client.lease("permit") as lease:
        before = end(admin)
        proxy.replace(FAILURES[failure])
        pass_time(TTL / 3)
        proxy.wait_for_request()
        proxy.restore()
        pass_time(1)
        until(lambda: not pass_time(0.02) and end(admin) > before, "the lease was extended")
        lease.check()


@pytest.mark.parametrize("failure", FAILURES)
def test_an_issuer_without_an_answer_grants_nothing(
    connect: Connect, login: dict[str, str], proxy: Proxy, failure: str
) -> None:
    proxy.replace(FAILURES[failure])
    client = connect(proxy.url, headers=login)

    def asks_again() -> bool:
        """Return whether it does. On a busy machine, the first request may take the whole time."""
        before = proxy.replaced
        with pytest.raises(errors.IssuerUnavailable), client.lease("permit", wait=0.2):
            raise AssertionError("there is no lease")
        return proxy.replaced > before + 1

    until(asks_again, "it asks again")


def test_a_refused_login_is_not_repeated_each_second(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one delays the next login of the user, also that of a program with the new password."""
    monkeypatch.setattr(lease, "_random", lambda seconds: seconds)
    grant = b'{"token": "%b", "holder": "ann", "fence": 1, "expires_in": 9}' % (b"8" * 64)
    watch = _CountingWatch()
    issuer = Issuer()

    def answer(request: Seen) -> Answer:
        if request.path == "/api/token":
            return issuer(request)
        if request.method == "PUT":
            issuer.refuse = (401, {}, b"invalid credentials")
            return 401, {}, b"{}"
        return (201, {}, grant) if request.method == "POST" else (204, {}, b"")

    def look_again() -> None:
        """Wait until the keeper has read the clock in several turns."""
        reads = watch.reads
        until(lambda: watch.reads > reads + 20, "the clock was read")

    with site(answer) as home:
        client = connect(home.url, auth=TokenAuth(home.url, "ann", "ann-secret"), monotonic=watch)
        with client.lease("permit"):
            watch.advance(3)
            until(lambda: issuer.logins == 2, "it has tried to log in")
            look_again()
            watch.advance(2.5)
            look_again()
            assert issuer.logins == 2
            watch.advance(0.5)
            until(lambda: issuer.logins == 3, "it has tried again after half of the rest")


class _CountingWatch(Watch):
    reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return super().__call__()


def test_a_process_that_was_stopped_has_lost_its_lease(
    tmp_path: Path, server: Server, login: dict[str, str], admin: PoolUser
) -> None:
    """The clock of the server does not move: a request sent before the own clock is read would gain time."""
    clock = HandClock(tmp_path / "clock", create=True)
    command = [sys.executable, "-m", "tests.wire.client_pools.sleeper", server.url, login["X-Token"], str(clock.path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        clock.advance(TTL)
        process.send_signal(signal.SIGCONT)
        print("look", file=process.stdin, flush=True)
        assert process.stdout.readline() == "lost\n"
        process.stdin.close()
        assert process.wait(20) == 0
    assert is_free(admin)
