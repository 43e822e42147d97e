"""A log-out is always answered with 200 and applies. When the queue in memory is full, no token is accepted."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from tests.support.faulty import Faulty
from tests.support.servers import write_config
from tokenauth import revocation_queue, stores
from tokenauth.errors import Overloaded, StoreUnavailable
from tokenauth.revocation_queue import MAX_HELD, HeldRevocations, RevocationQueue, RevocationUpdate
from tokenauth.server.channel import HEARTBEAT, Serve, decode_order, encode_order
from tokenauth.service import Service, create_service
from tokenauth.settings import loader
from tokenauth.settings.model import Settings
from tokenauth.values import digest
from tokenauth.web.app import build_app

INVALID = {"valid": False, "expiry_time": None}
ADMIN = {"username": "admin", "password": "admin"}


class Scene:
    """A service whose store can be made to fail, and a client of it."""

    def __init__(self, service: Service, store: Faulty, client: httpx.AsyncClient) -> None:
        self.service = service
        self.store = store
        self.client = client
        self.queue = service.tokens.revocations

    async def log_in(self) -> str:
        """Return a new token."""
        answer = await self.client.post("/api/token", json=ADMIN)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["token"])

    async def log_out(self, token: str) -> None:
        """Log out. Assert that this is answered 200."""
        answer = await self.client.request("DELETE", "/api/token", json={"token": token})
        assert (answer.status_code, answer.json()) == (200, INVALID)

    async def statuses(self, token: str) -> list[int]:
        """Return the status of each way to use a token."""
        sent: dict[str, Any] = {"headers": {"X-Token": token}}
        form: dict[str, Any] = {"data": {"token": token, "client_id": "admin", "client_secret": "admin"}}
        answers = [
            await self.client.get("/api/me", **sent),
            await self.client.get("/auth", **sent),
            await self.client.get("/api/tokens", **sent),
            await self.client.get(f"/api/token?token={token}"),
            await self.client.post("/oauth/introspect", **form),
        ]
        valid = [answer.json().get("valid", answer.json().get("active")) for answer in answers[3:]]
        return [answer.status_code for answer in answers[:3]] + [
            answer.status_code if is_valid in {True, None} else 401
            for answer, is_valid in zip(answers[3:], valid, strict=True)
        ]

    async def written(self) -> None:
        """Wait until the queue is written."""
        if self.queue._writing is not None:
            await asyncio.wait_for(self.queue._writing, 60)
        assert self.queue.held == {}


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(revocation_queue, "RETRY", 0.01)
    monkeypatch.setattr(revocation_queue, "_MIN_CLOSE_TIME", 0.1)
    monkeypatch.setattr(revocation_queue, "MAX_HELD", 3)
    config = write_config(tmp_path).read_text().replace('["admin"]', '["admin", "introspect"]')
    (tmp_path / "config.toml").write_text(config)
    service = create_service(loader.load(tmp_path / "config.toml"))
    async with service.running():
        store = Faulty(service.store.tokens)
        service.store.tokens = store  # type: ignore[assignment]
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Scene(service, store, client)
        store.reading = store.writing = None


ALIVE = [200] * 5
REFUSED = [401] * 5
UNKNOWN = [503] * 5

FAULTS = [StoreUnavailable(), Overloaded(), ZeroDivisionError(), OSError(28, "no space"), MemoryError()]
FAULTS += [sqlite3.OperationalError("locked"), RecursionError(), KeyError("x"), TimeoutError()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("what", ["reading", "writing"])
async def test_a_logout_applies_on_any_store_error(scene: Scene, what: str, fault: Exception) -> None:
    token, other = await scene.log_in(), await scene.log_in()
    setattr(scene.store, what, fault)
    await scene.log_out(token)
    scene.store.reading = None
    assert await scene.statuses(token) == REFUSED
    assert await scene.statuses(other) == ALIVE
    await scene.queue._write()  # fails again, and does not end the retries
    scene.store.writing = None
    await scene.written()
    assert await scene.service.store.tokens.get(digest_of(token)) is None
    assert await scene.statuses(token) == REFUSED
    assert await scene.statuses(other) == ALIVE


def digest_of(token: str) -> bytes:
    """Return the digest of a token."""
    found = digest(token.encode())
    assert found is not None
    return found


async def test_a_held_token_is_not_listed(scene: Scene) -> None:
    token, other = await scene.log_in(), await scene.log_in()
    mine: dict[str, Any] = {"headers": {"X-Token": other}}
    id = (await scene.client.get("/api/me", headers={"X-Token": token})).json()["id"]
    scene.store.writing = StoreUnavailable()
    await scene.log_out(token)
    listed = (await scene.client.get("/api/tokens", **mine)).json()["tokens"]
    assert [each["current"] for each in listed] == [True]
    form = {"token": other, "client_id": "admin", "client_secret": "admin"}
    assert (await scene.client.post("/oauth/revoke", data=form)).status_code == 503
    assert (await scene.client.delete(f"/api/tokens/{id}", **mine)).status_code == 503
    assert (await scene.client.delete("/api/tokens", **mine)).status_code == 503
    assert await scene.statuses(other) == ALIVE
    assert await scene.service.tokens.ready() is None


async def test_a_full_queue_accepts_no_token(scene: Scene) -> None:
    """When the store is back, all tokens end, since it is not known which ones were logged out."""
    tokens = [await scene.log_in() for _ in range(6)]
    scene.store.writing = StoreUnavailable()
    for token in tokens[:3]:
        await scene.log_out(token)
    assert await scene.statuses(tokens[5]) == ALIVE
    with structlog.testing.capture_logs() as logs:
        for token in tokens[3:5]:
            await scene.log_out(token)
    assert [entry["event"] for entry in logs] == ["revocation_queue_full"]
    for token in tokens:
        assert await scene.statuses(token) == UNKNOWN
    ready = await scene.client.get("/readyz")
    assert (ready.status_code, "revocations" in ready.json()["reason"]) == (503, True)
    assert (await scene.client.post("/api/token", json=ADMIN)).status_code == 503
    scene.store.writing = None
    await scene.written()
    for token in tokens:
        assert await scene.statuses(token) == REFUSED
    assert (await scene.client.get("/readyz")).status_code == 200


async def test_what_a_failed_attempt_has_revoked_is_counted(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step revokes two tokens, and the second one fails until the fault is over."""
    monkeypatch.setattr(stores.store, "_STEP", 2)
    tokens = [await scene.log_in() for _ in range(5)]
    scene.store.writing = StoreUnavailable()
    for token in tokens[:4]:
        await scene.log_out(token)
    with closing(sqlite3.connect(tmp_path / "tokenauth.db")) as db:
        last = "NOT EXISTS (SELECT 1 FROM tokens LIMIT 1 OFFSET 2)"
        db.execute(f"CREATE TRIGGER fault BEFORE DELETE ON tokens WHEN {last} BEGIN SELECT RAISE(ABORT, 'no'); END")
        with structlog.testing.capture_logs() as logs:
            scene.store.writing = None
            await scene.queue._write()
            db.execute("DROP TRIGGER fault")
            await scene.written()
    shown = [{**entry} for entry in logs if "revo" in entry["event"]]
    both = {"user": "(all)", "kind": "all", "reason": "revocation_queue_full", "log_level": "warning"}
    assert shown == [
        {"event": "revocation_interrupted", "count": 2, **both},
        {"event": "tokens_revoked", "count": 3, **both},
    ]
    assert await scene.statuses(await scene.log_in()) == ALIVE


async def test_one_network_cannot_fill_the_queue(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger with made-up tokens must not log all users out. Further log-outs of the network wait."""
    monkeypatch.setattr(revocation_queue, "MAX_PER_NETWORK", 2)
    token, other = await scene.log_in(), await scene.log_in()
    scene.store.reading = scene.store.writing = StoreUnavailable()
    for number in range(2):
        await scene.log_out(f"{number}" * 64)
    waiting = asyncio.ensure_future(scene.log_out(token))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert len(scene.queue.held) == 2
    assert await scene.service.tokens.ready() is None
    scene.store.reading = scene.store.writing = None
    await waiting
    await scene.written()
    assert await scene.statuses(token) == REFUSED
    assert await scene.statuses(other) == ALIVE


async def test_one_bad_write_does_not_block_the_others(scene: Scene) -> None:
    tokens = [await scene.log_in() for _ in range(3)]
    scene.store.writing = StoreUnavailable()
    for token in tokens:
        await scene.log_out(token)
    scene.store.poison = digest_of(tokens[0])
    scene.store.writing = None
    for _ in range(2):
        await scene.queue._write()
    assert list(scene.queue.held) == [scene.store.poison]
    assert [await scene.statuses(token) for token in tokens] == [REFUSED] * 3
    scene.store.poison = None
    await scene.written()


async def test_a_stop_logs_the_revocations_it_loses(scene: Scene) -> None:
    tokens = [await scene.log_in() for _ in range(5)]
    scene.store.writing = StoreUnavailable()
    for token in tokens:
        await scene.log_out(token)
    with structlog.testing.capture_logs() as logs:
        await scene.service.tokens.close()
    assert [entry["event"] for entry in logs] == ["revocation_lost"] * 3 + ["revocations_lost"]
    scene.queue.held.clear()
    scene.queue._dropped = 0


async def test_each_revocation_is_queued_once_up_to_a_bound(scene: Scene) -> None:
    """A repeated log-out is queued once. A value that the store does not have is not queued."""
    token = await scene.log_in()
    scene.store.writing = StoreUnavailable()
    for _ in range(5):
        await scene.log_out(token)
        await scene.log_out("x" * 64)
        await scene.log_out("x")
    assert len(scene.queue.held) == 1
    assert await scene.service.tokens.ready() is None


class Machine:
    """Two workers of one database, with the main process between them."""

    def __init__(self, *services: Service) -> None:
        self.held = HeldRevocations()
        self.services = services
        self.stores = [Faulty(service.store.tokens) for service in services]
        self.queues = [service.tokens.revocations for service in services]
        for service, store, queue in zip(services, self.stores, self.queues, strict=True):
            service.store.tokens = store  # type: ignore[assignment]
            queue.publish = partial(self._share, queue)

    def _share(self, source: RevocationQueue, update: RevocationUpdate) -> None:
        self.held.apply(update)
        for queue in self.queues:
            if queue is not source:
                queue.apply(update)
        source.answered(update.number)

    def fail_writes(self, error: Exception | None) -> None:
        """Make all writes fail; with None, succeed again."""
        for store in self.stores:
            store.writing = error

    async def settled(self) -> None:
        """Wait until all queues are empty."""
        await until(lambda: not any(queue.active for queue in self.queues))
        assert (len(self.held), self.held.snapshot().dropped) == (0, 0)


@pytest.fixture
async def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    monkeypatch.setattr(revocation_queue, "RETRY", 0.01)
    monkeypatch.setattr(revocation_queue, "_MIN_CLOSE_TIME", 0.1)
    monkeypatch.setattr(revocation_queue, "MAX_HELD", 3)
    settings = loader.load(write_config(tmp_path))
    here, there = create_service(settings), create_service(settings)
    async with here.running(), there.running():
        yield (machine := Machine(here, there))
        machine.fail_writes(None)


async def log_in(service: Service) -> bytes:
    """Return the value of a new token."""
    return (await service.tokens.issue("admin", "admin", "192.0.2.1", "test")).value.encode()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a queue does in the background."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def is_valid(service: Service, value: bytes) -> bool | None:
    """Return whether a worker accepts a token; None if it does not know."""
    try:
        return await service.tokens.validate(value) is not None
    except StoreUnavailable:
        return None


async def test_all_workers_refuse_a_queued_revocation(machine: Machine) -> None:
    here = machine.services[0]
    ended, kept = await log_in(here), await log_in(here)
    machine.fail_writes(StoreUnavailable())
    await here.tokens.log_out([ended], "192.0.2.1")
    assert [await is_valid(service, ended) for service in machine.services] == [False, False]
    assert list(machine.held.snapshot().held) == [digest_of(ended.decode())]
    machine.stores[1].writing = None  # the other worker can write
    await until(lambda: not len(machine.held))
    assert machine.queues[0].active
    assert await is_valid(here, ended) is False
    machine.fail_writes(None)
    await machine.settled()
    assert [await is_valid(service, ended) for service in machine.services] == [False, False]
    assert [await is_valid(service, kept) for service in machine.services] == [True, True]


async def test_a_full_queue_refuses_all_tokens_on_every_worker(machine: Machine) -> None:
    """Also a worker that starts later. Once one has ended all tokens, no other ends them a second time."""
    here, there = machine.services
    tokens = [await log_in(here) for _ in range(5)]
    machine.fail_writes(StoreUnavailable())
    for token in tokens[:4]:
        await here.tokens.log_out([token], "192.0.2.1")
    assert [await is_valid(service, tokens[4]) for service in machine.services] == [None, None]
    late = RevocationQueue(there.store, there.clock)
    late.apply(machine.held.snapshot())
    assert late.problem is not None
    machine.stores[0].writing = None
    await until(lambda: not machine.queues[1].active)
    await machine.settled()  # although the other worker cannot write
    machine.fail_writes(None)
    assert [await is_valid(service, tokens[4]) for service in machine.services] == [False, False]
    new = await log_in(there)
    await asyncio.sleep(0.05)
    assert [await is_valid(service, new) for service in machine.services] == [True, True]


async def test_queues_that_are_full_together_accept_nothing(machine: Machine) -> None:
    """Each queue has room for its own revocations, but not for those of both."""
    here, there = machine.services
    tokens = [await log_in(here) for _ in range(5)]
    machine.fail_writes(StoreUnavailable())
    for token, service in zip(tokens, (here, there, here, there), strict=False):
        await service.tokens.log_out([token], "192.0.2.1")
    assert [await is_valid(service, tokens[4]) for service in machine.services] == [None, None]
    machine.fail_writes(None)
    await machine.settled()
    assert [await is_valid(service, tokens[4]) for service in machine.services] == [False, False]


async def test_revocations_of_one_turn_share_a_message(scene: Scene) -> None:
    """They wait for its answer. A worker without others sends none."""
    sent: list[RevocationUpdate] = []
    scene.queue.publish = sent.append
    digests = [number.to_bytes(32) for number in range(50)]
    waiting = [asyncio.create_task(scene.queue.share([digest])) for digest in digests]
    waiting.append(asyncio.create_task(scene.queue.share([b"x" * 32], missing=True)))
    for _ in range(3):
        await asyncio.sleep(0)
    [update] = sent
    assert (update.revoked, update.missing, update.outdated) == (set(digests), {b"x" * 32}, False)
    assert not any(task.done() for task in waiting)
    scene.queue.answered(update.number)
    await asyncio.gather(*waiting)
    scene.queue.alone = True
    await scene.queue.share(digests)
    await asyncio.sleep(0)
    assert sent == [update]


async def test_a_worker_that_never_answers_is_not_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation_queue, "ANSWER_TIMEOUT", 0.05)
    sent: list[RevocationUpdate] = []
    scene.queue.publish = sent.append
    began = time.monotonic()
    await scene.queue.share(None)
    assert time.monotonic() - began > 0.04
    [update] = sent
    assert update.outdated
    scene.queue.answered(update.number)  # too late: it changes nothing


def test_one_message_hands_over_100_000_revocations() -> None:
    """It takes less time than a heartbeat, and the main process holds no more than MAX_HELD."""
    held = HeldRevocations()
    digests = [number.to_bytes(32) for number in range(MAX_HELD + 1)]
    began = time.process_time()
    held.apply(RevocationUpdate(held=dict.fromkeys(digests, "192.0.2.0/24")))
    order = decode_order(encode_order(Serve(Path("x"), Settings(), held.snapshot())))
    assert isinstance(order, Serve)
    assert len(order.held.held) == len(held) == MAX_HELD
    assert time.process_time() - began < HEARTBEAT
    held.apply(RevocationUpdate(written=digests))
    assert len(held) == 0
