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
from tests.wire.client_pools.clients import Client, Watch
from tests.wire.client_pools.conftest import TTL
from tests.wire.client_pools.lines import Line
from tokenauth import errors

PassTime = Callable[[float], object]

FAILURES = {
    "nothing": b"",
    "proxy": b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n<h1>Bad Gateway</h1>",
    "elsewhere": b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n<h1>Not Found</h1>",
    "no-lease": b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"status": "fine"}',
    "store": b'HTTP/1.1 503 X\r\nConnection: close\r\n\r\n{"error": "store_unavailable", "error_description": "."}',
}
"""Responses that a client may get instead of one of the server. None says anything about the lease."""


def is_free(desk: PoolUser) -> bool:
    """Return whether the only permit is free."""
    return desk.counts("permit") == (1, 0)


def end(desk: PoolUser) -> int:
    """Return when the lease of the only permit ends."""
    return int(desk.members("permit")[0]["lease_expiry_time"])


@pytest.mark.parametrize("reason", ["released", "deleted", "lapsed"])
def test_a_lease_is_lost_when_the_issuer_refuses_it(
    client: Client, desk: PoolUser, clock: HandClock, line: Line, watch: Watch, reason: str
) -> None:
    with client.lease("permit") as lease:
        if reason == "released":
            desk.release("permit", lease.token)
        elif reason == "deleted":
            desk.delete("permit", lease.token)
        else:
            clock.advance(TTL)
        lease.check()
        watch.advance(TTL / 3)
        assert lease.lost.wait(20)
        with pytest.raises(errors.LeaseLost):
            lease.check()
        line.replace(b"")
    assert line.replaced == 0, "there was nothing to give back"


def test_a_lost_lease_does_not_release_the_next_one(client: Client, desk: PoolUser, watch: Watch) -> None:
    """The user and the holder are the same: only the fence differs."""
    with client.lease("permit") as lease:
        desk.release("permit", lease.token)
        after = desk.assign("permit")
        watch.advance(TTL / 3)
        assert lease.lost.wait(20)
    assert desk.keep_alive("permit", after.token, fence=lease.fence + 1)[0] == 200


def test_a_lease_lost_unnoticed_costs_no_other_holder(client: Client, desk: PoolUser) -> None:
    with client.lease("permit") as lease:
        desk.release("permit", lease.token)
        after = desk.assign("permit")
    assert desk.keep_alive("permit", after.token, fence=after.fence)[0] == 200


def test_a_lease_ends_by_time_while_no_answer_comes(client: Client, line: Line, pass_time: PassTime) -> None:
    """One thread waits for the event, none calls `check`, and a keep-alive hangs."""
    with ThreadPoolExecutor(1) as threads, client.lease("long") as lease:
        lost = threads.submit(lease.lost.wait)
        line.hold()
        pass_time(10)
        line.wait_for_answer()
        pass_time(19)
        lease.check()
        pass_time(1)
        assert lost.result(7), "a third of the lease is the time that the keep-alive may take"
        line.free()


def test_an_answer_that_comes_too_late_revives_nothing(
    client: Client, desk: PoolUser, line: Line, watch: Watch
) -> None:
    with client.lease("permit") as lease:
        line.hold()
        watch.advance(TTL / 3)
        line.wait_for_answer()
        watch.advance(TTL)
        line.free()
        until(lambda: is_free(desk), "the token is given back")
        assert lease.lost.is_set()


def test_a_holder_that_was_suspended_loses_its_lease(client: Client, desk: PoolUser, watch: Watch) -> None:
    """The server would still extend it."""
    with client.lease("permit") as lease:
        watch.advance(TTL)
        with pytest.raises(errors.LeaseLost):
            lease.check()
        until(lambda: is_free(desk), "the token is given back")
        assert lease.lost.is_set()


def test_a_lease_is_counted_from_before_it_was_asked_for(client: Client, line: Line, pass_time: PassTime) -> None:
    def hold() -> bool:
        with client.lease("permit") as lease:
            lease.check()
            pass_time(1)
            return lease.lost.wait(20)

    line.hold()
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(hold)
        line.wait_for_answer()
        pass_time(TTL - 1)
        line.replace(b"")  # otherwise it would be kept alive at once
        line.free()
        assert lost.result()


def test_a_lease_already_over_is_not_started(client: Client, desk: PoolUser, line: Line, watch: Watch) -> None:
    def hold() -> None:
        with client.lease("permit"):
            raise AssertionError("its time is up")

    line.hold()
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(hold)
        line.wait_for_answer()
        watch.advance(TTL)
        line.free()
        with pytest.raises(errors.LeaseLost):
            held.result()
    assert is_free(desk)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_keep_alive_that_fails_is_tried_again(
    client: Client, desk: PoolUser, line: Line, pass_time: PassTime, failure: str
) -> None:
    with client.lease("permit") as lease:
        before = end(desk)
        line.replace(FAILURES[failure])
        pass_time(TTL / 3)
        line.wait_for_request()
        line.restore()
        pass_time(1)
        until(lambda: not pass_time(0.02) and end(desk) > before, "the lease goes on")
        lease.check()


@pytest.mark.parametrize("failure", FAILURES)
def test_an_issuer_without_an_answer_grants_nothing(client: Client, line: Line, failure: str) -> None:
    line.replace(FAILURES[failure])
    with pytest.raises(errors.IssuerUnavailable), client.lease("permit", wait=60):
        raise AssertionError("there is no lease")


def test_a_process_that_was_stopped_has_lost_its_lease(
    tmp_path: Path, server: Server, login: dict[str, str], desk: PoolUser
) -> None:
    """The clock of the server stands still: if the process asked before it read its own, it would get more time."""
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
    assert is_free(desk)
