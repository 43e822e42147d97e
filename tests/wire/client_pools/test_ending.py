"""However a block ends, its token is released if possible, and no thread or task is left."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import HandClock, Server, log_in, worker, write_config
from tests.wire.client_pools.clients import KINDS, Client, Connect, Watch, connecting
from tests.wire.client_pools.conftest import MANY, TTL
from tests.wire.client_pools.proxy import Proxy
from tokenauth import errors
from tokenauth.client.auth import TokenAuth
from tokenauth.client.pools import AsyncPoolClient, PoolClient


@pytest.fixture
def stop(server: Server) -> Iterator[Callable[[], None]]:
    """Return what stops the worker until the end of the test."""
    yield lambda: server.process.send_signal(signal.SIGSTOP)
    server.process.send_signal(signal.SIGCONT)


class BlockError(Exception):
    pass


def test_an_error_in_the_block_propagates_and_releases(client: Client, admin: PoolUser) -> None:
    with pytest.raises(BlockError), client.lease("permit"):
        raise BlockError
    assert admin.counts("permit") == (1, 0)


def test_a_killed_issuer_does_not_break_the_end(connect: Connect, tmp_path: Path, settings: str, watch: Watch) -> None:
    def hold() -> None:
        with client.lease("permit") as lease:
            doomed.kill()
            watch.advance(TTL / 3)
            lease.check()
            raise BlockError

    with worker(write_config(tmp_path, settings), HandClock(tmp_path / "clock", create=True)) as doomed:
        with doomed.client() as http:
            token = log_in(http)
        client = connect(doomed.url, headers={"X-Token": token}, monotonic=watch)
        with pytest.raises(BlockError):
            hold()
        with pytest.raises(errors.IssuerUnavailable), client.lease("permit"):
            raise AssertionError("the server does not respond")


@pytest.mark.parametrize("seconds", [TTL / 3, TTL], ids=["held", "lost"])
def test_a_hanging_issuer_does_not_break_the_end(
    connect: Connect, login: dict[str, str], server: Server, stop: Callable[[], None], watch: Watch, seconds: float
) -> None:
    def hold() -> None:
        with client.lease("permit") as lease:
            stop()
            watch.advance(seconds)
            assert lease.lost.wait(0) is (seconds == TTL)
            raise BlockError

    client = connect(server.url, headers=login, monotonic=watch, timeout=1)
    with pytest.raises(BlockError):
        hold()


def test_ctrl_c_releases_and_leaves_no_thread(server: Server, admin: PoolUser) -> None:
    def keepers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "lease-keeper"]

    def hold() -> None:
        with pools.lease("permit"):
            assert len(keepers()) == 1
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        with PoolClient(server.url, headers={"X-Token": admin.token}) as pools:
            with pytest.raises(KeyboardInterrupt):
                hold()
            assert not keepers()
    finally:
        signal.signal(signal.SIGINT, before)
    assert admin.counts("permit") == (1, 0)


def test_a_lease_whose_thread_cannot_start_is_released(server: Server, admin: PoolUser) -> None:
    before = threading.stack_size(2**47)  # more than the address space has: as if memory were short
    try:
        with (
            PoolClient(server.url, headers={"X-Token": admin.token}) as pools,
            pytest.raises(RuntimeError, match="thread"),
            pools.lease("permit"),
        ):
            raise AssertionError("nothing keeps it alive")
    finally:
        threading.stack_size(before)
    assert admin.counts("permit") == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_out", [True, False], ids=["own", "shared"])
def test_a_client_that_closes_ends_its_own_login(server: Server, admin: PoolUser, kind: str, log_out: bool) -> None:
    auth = TokenAuth(server.url, "admin", "admin")
    before = admin.count_logins()
    with connecting(kind) as connect, connect(server.url, auth=auth, log_out=log_out).lease("permit"):
        assert admin.count_logins() == before + 1
    assert admin.count_logins() == before + (not log_out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_without_a_login_ends_none(server: Server, admin: PoolUser, kind: str) -> None:
    """Neither the token that it was given, nor a login that it did not need."""
    before = admin.count_logins()
    with connecting(kind) as connect:
        connect(server.url, auth=TokenAuth(server.url, "admin", "wrong"), log_out=True)
        with connect(server.url, headers={"X-Token": admin.token}, log_out=True).lease("permit"):
            pass
    assert admin.count_logins() == before


async def test_a_cancelled_task_releases_and_leaves_no_task(server: Server, admin: PoolUser) -> None:
    async def hold() -> None:
        async with pools.lease("permit"):
            held.set()
            await asyncio.Event().wait()

    held = asyncio.Event()
    async with AsyncPoolClient(server.url, headers={"X-Token": admin.token}) as pools:
        before = asyncio.all_tasks()
        task = asyncio.create_task(hold())
        await held.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before
        assert admin.counts("permit") == (1, 0)


async def test_a_token_granted_after_a_cancel_is_released(login: dict[str, str], admin: PoolUser, proxy: Proxy) -> None:
    """The server has granted the lease, and the response is in flight."""

    async def hold() -> None:
        async with pools.lease("permit"):
            raise AssertionError("it was cancelled")

    async with AsyncPoolClient(proxy.url, headers=login) as pools:
        proxy.hold()
        task = asyncio.create_task(hold())
        await asyncio.to_thread(proxy.wait_for_response)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert admin.counts("permit") == (0, 1)
        proxy.resume()
    assert admin.counts("permit") == (1, 0)


@pytest.mark.parametrize("name", [None, "the-name-of-the-caller"], ids=["own", "named"])
async def test_several_tokens_granted_before_a_cancel(
    login: dict[str, str], admin: PoolUser, server: Server, watch: Watch, name: str | None
) -> None:
    """They were waited for, and the response to the first keep-alive of one of them is in flight.

    They are released, unless the caller named the request: a program that is restarted gets them.
    """

    async def hold() -> None:
        async with pools.lease("permits", count=MANY, wait=60, request=name):
            raise AssertionError("it was cancelled")

    def hold_the_next() -> None:
        if granted.is_set():
            proxy.hold()

    def waits() -> bool:
        return bool(admin.call("GET", "/permits/requests")[1]["requests"])

    granted = threading.Event()
    proxy = Proxy(server.port, hold_the_next)
    with contextlib.closing(proxy):
        async with AsyncPoolClient(proxy.url, headers=login, monotonic=watch) as pools:
            lease = admin.assign("permits")
            task = asyncio.create_task(hold())
            await asyncio.to_thread(until, waits, "it waits")
            watch.advance(TTL / 3)
            granted.set()
            admin.release("permits", lease.token)
            await asyncio.to_thread(proxy.wait_for_response)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert admin.counts("permits") == (0, MANY)
            granted.clear()
            proxy.resume()
        assert admin.counts("permits") == ((0, MANY) if name else (MANY, 0))
        if name:
            async with (
                AsyncPoolClient(server.url, headers=login) as after,
                after.lease("permits", count=MANY, wait=60, request=name) as same,
            ):
                assert len(same.grants) == MANY


async def test_a_task_cancelled_twice_releases_its_token(login: dict[str, str], admin: PoolUser, proxy: Proxy) -> None:
    """The second cancellation comes during the release. `aclose` waits for that."""

    async def hold() -> None:
        async with pools.lease("permit"):
            proxy.hold()

    pools = AsyncPoolClient(proxy.url, headers=login)
    task = asyncio.create_task(hold())
    await asyncio.to_thread(proxy.wait_for_response)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    closing = asyncio.create_task(pools.aclose())
    done, _ = await asyncio.wait([closing], timeout=0.1)
    assert not done, "aclose waits for the release"
    proxy.resume()
    await closing
    assert admin.counts("permit") == (1, 0)
