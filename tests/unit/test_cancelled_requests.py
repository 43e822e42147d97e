"""Requests that are cancelled while the database writes: what they have done is logged, and so audited."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.support.servers import HandClock
from tests.support.services import running
from tokenauth import revocation_queue
from tokenauth.errors import InvalidCredentials, StoreUnavailable
from tokenauth.login_queue import never_disconnected
from tokenauth.models import ANY_LEASE, IssuedToken
from tokenauth.named_tokens import Requester
from tokenauth.pools import MAX_COUNT
from tokenauth.service import Service
from tokenauth.stores.engine import Change

SETTINGS = """
[tokens]
per_user = 2
[pools.p]
[pools.busy]
[pools.phones]
lease_ttl = "60s"
[[pools.phones.members]]
name = "pixel"
"""
HERE = "192.0.2.1"


class Scene:
    """A service in which there is something to end."""

    def __init__(self, service: Service, clock: HandClock) -> None:
        self.service = service
        self.clock = clock
        self.pool = service.pools.find("p")
        self.busy = service.pools.find("busy")
        self.phones = service.pools.find("phones")
        self.written = asyncio.Event()
        """Whether a change waits to be written."""

    async def begin(self) -> None:
        self.logins = [await self.log_in(), await self.log_in()]
        self.named = await self.service.named_tokens.issue("ann", "job", None, None, Requester())
        [self.value] = await self.service.pools.generate(self.pool, 1)
        self.phone = (await self.service.pools.assign(self.phones, "desk", "ann")).value
        await self.reserve()
        await self.service.store.pools.ask(self.busy, "ann", "1", "desk", self.clock(), keep=1000)
        with pytest.raises(InvalidCredentials):
            await self.service.tokens.issue("ann", "wrong", HERE, "")
        writer = self.service.store.engine.writer  # type: ignore[attr-defined]
        apply = writer.apply

        def noted(change: Change[Any]) -> Awaitable[Any]:
            self.written.set()
            answer: Awaitable[Any] = apply(change)
            return answer

        writer.apply = noted

    async def wait_for_write(self, act: asyncio.Future[Any]) -> None:
        """Wait until a change waits to be written. Fail if the act ends without one."""
        act.add_done_callback(lambda _: self.written.set())
        await self.written.wait()
        assert not act.done(), f"the act has ended without a write: {act}"

    async def log_in(self) -> IssuedToken:
        return await self.service.tokens.grant(self.service.users["ann"], HERE, "", never_disconnected)

    async def lapse(self) -> None:
        self.clock.advance(100)
        await self.service.pools.note_lapsed(self.phones, self.clock(), MAX_COUNT)

    async def extend_lapsed(self) -> None:
        self.clock.advance(100)
        await self.service.pools.keep_alive_any(self.phones, self.phone)

    async def reserve(self) -> None:
        await self.service.pools.reserve(self.phones, "pixel", "1h", "ann", "", "boss")


Act = Callable[[Scene], Awaitable[object]]

ACTS: Mapping[str, Act] = {
    "log in": lambda scene: scene.log_in(),
    "log out": lambda scene: scene.service.tokens.log_out([scene.logins[0].value.encode()], HERE),
    "revoke one token": lambda scene: scene.service.tokens.revoke_id(scene.named.token.id, "ann"),
    "issue a named token": lambda scene: scene.service.named_tokens.issue("ann", "new", None, None, Requester()),
    "rotate a named token": lambda scene: scene.service.named_tokens.rotate(
        scene.named.token.id, "ann", "0", Requester()
    ),
    "generate": lambda scene: scene.service.pools.generate(scene.pool, 1, "boss"),
    "delete": lambda scene: scene.service.pools.delete(scene.pool, scene.value, "boss"),
    "reserve": Scene.reserve,
    "unreserve": lambda scene: scene.service.pools.unreserve(scene.phones, "pixel", "boss"),
    "end a lease": lambda scene: scene.service.pools.force_release(scene.phones, scene.phone, ANY_LEASE, "boss", None),
    "take over": lambda scene: scene.service.pools.take_over(
        scene.phones, scene.phone, "mine", "boss", ANY_LEASE, None
    ),
    "note a lapse": Scene.lapse,
    "extend a lapsed one": Scene.extend_lapsed,
    "leave the line": lambda scene: scene.service.pools.leave_line(scene.busy, "ann", "1"),
    "clear a user": lambda scene: scene.service.throttle.clear_user("ann", HERE, "boss"),
    "clear a network": lambda scene: scene.service.throttle.clear_network("192.0.2.0/24", "boss"),
}


async def events(act: Act, directory: Path, clock: HandClock, cancelled: bool) -> list[str]:
    """Return what is logged of an act until the service has stopped."""
    with ExitStack() as stack:
        async with running(directory, SETTINGS, clock) as service:
            scene = Scene(service, clock)
            await scene.begin()
            logs = stack.enter_context(structlog.testing.capture_logs())
            task = asyncio.ensure_future(act(scene))
            await scene.wait_for_write(task)
            if cancelled:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert task.cancelled() is cancelled
    return [event["event"] for event in logs]


@pytest.mark.parametrize("name", ACTS)
async def test_a_cancelled_act_is_logged(tmp_path: Path, hand_clock: HandClock, name: str) -> None:
    for directory in ("finished", "cancelled"):
        (tmp_path / directory).mkdir()
    expected = await events(ACTS[name], tmp_path / "finished", hand_clock, cancelled=False)
    assert expected
    assert await events(ACTS[name], tmp_path / "cancelled", hand_clock, cancelled=True) == expected


async def test_logins_that_a_cancelled_one_ended_are_logged(tmp_path: Path, hand_clock: HandClock) -> None:
    """Of logins that share a commit, the first one logs which logins it has ended."""
    async with running(tmp_path, SETTINGS, hand_clock) as service:
        scene = Scene(service, hand_clock)
        await scene.begin()
        with structlog.testing.capture_logs() as logs:
            first, *others = [asyncio.ensure_future(scene.log_in()) for _ in range(3)]
            await scene.wait_for_write(first)
            first.cancel()
            newest = [login.token.id for login in await asyncio.gather(*others)]
        issued = [event["id"] for event in logs if event["event"] == "token_issued"]
        revoked = [event["id"] for event in logs if event["event"] == "token_revoked"]
        assert issued[1:] == newest
        assert sorted(revoked) == sorted([issued[0], *(login.token.id for login in scene.logins)])


async def test_a_cancelled_log_out_everywhere_says_how_many(tmp_path: Path, hand_clock: HandClock) -> None:
    async with running(tmp_path, SETTINGS, hand_clock) as service:
        scene = Scene(service, hand_clock)
        await scene.begin()
        with structlog.testing.capture_logs() as logs:
            task = asyncio.ensure_future(service.tokens.revoke_all("ann", kind="login"))
            await scene.wait_for_write(task)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert [(event["event"], event["count"]) for event in logs] == [("revocation_interrupted", 2)]


async def test_a_log_out_everywhere_is_cancelled_also_if_its_write_fails(
    tmp_path: Path, hand_clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a caller that tries again after a failure never ends."""
    async with running(tmp_path, SETTINGS, hand_clock) as service:
        failing = asyncio.get_running_loop().create_future()
        begun = asyncio.Event()

        def fail(change: Change[Any]) -> Awaitable[Any]:
            begun.set()
            return failing

        with monkeypatch.context() as patch:
            patch.setattr(service.store.engine.writer, "apply", fail)  # type: ignore[attr-defined]
            task = asyncio.ensure_future(service.tokens.revoke_all("ann"))
            await begun.wait()
            task.cancel()
            failing.set_exception(StoreUnavailable())
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_held_log_out_that_is_written_at_a_stop_is_logged(
    tmp_path: Path, hand_clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation_queue, "RETRY", 0.001)
    async with running(tmp_path, SETTINGS, hand_clock) as service:
        scene = Scene(service, hand_clock)
        await scene.begin()
        with structlog.testing.capture_logs() as logs:
            service.tokens.revocations.add(scene.named.token.digest, HERE)
            await scene.written.wait()
            await service.tokens.close()
        assert [event["event"] for event in logs] == ["revocation_held_in_memory", "token_revoked"]
