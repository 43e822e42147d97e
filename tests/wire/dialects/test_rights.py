"""Dialects that require a token: users change their own leases only, and only managers change free tokens."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.support.servers import HandClock, log_in, write_config
from tests.wire.dialects.conftest import ALL_FOUR, API_PASSWORD, Reply, Wire, connect, reply, start

SIMPLE, POOL, GENERATOR = "/simple-token-implement", "/token-pool/api", "/random-token-generator"
ALL_AVAILABLE = "All tokens are already available."


@pytest.fixture(scope="module")
def own_clock(tmp_path_factory: pytest.TempPathFactory) -> HandClock:
    """Create a clock that the tests set."""
    return HandClock(tmp_path_factory.mktemp("clock") / "clock", create=True)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, own_clock: HandClock) -> Iterator[Sequence[httpx.Client]]:
    """Run two workers whose dialects require a token."""
    text = ALL_FOUR.replace('\nprefix = "', '\nrequire_token = true\nprefix = "').replace("300", "86400")
    with ExitStack() as stack:
        yield connect(stack, start(stack, write_config(tmp_path_factory.mktemp("rights"), text), own_clock))


@pytest.fixture(scope="module")
def users(guarded: Sequence[httpx.Client]) -> dict[str, Wire]:
    """Log in all users."""
    passwords = {"admin": "admin", "ann": "ann-secret", "bob": "bob-secret"}
    tokens = {name: log_in(guarded[0], name, password) for name, password in passwords.items()}
    return {name: Wire(guarded, X_Token=token, X_API_PASSWORD=API_PASSWORD) for name, token in tokens.items()}


def refused(answer: Reply) -> bool:
    """Return whether a scope is missing."""
    return (answer.status, answer.document["error"]) == (403, "insufficient_scope")


def leases(users: dict[str, Wire], pool: str) -> list[tuple[str, str]]:
    """List the holders of leases, ordered by the end of the lease."""
    shown: Any = users["ann"].ask("GET", f"/api/pools/{pool}").document["tokens"]
    return [(lease["user"], lease["holder"]) for lease in shown]


def test_recycling_ends_only_an_own_lease(users: dict[str, Wire], own_clock: HandClock) -> None:
    """For leases of the dialect and native ones, and no matter how many older leases others have."""
    ann, bob = users["ann"], users["bob"]
    assert ann.ask("POST", "/api/pools/permits/leases", {"holder": "job-1"}).status == 201
    own_clock.advance(1)
    assert ann.ask("POST", f"{SIMPLE}/issue_token").document["available_tokens"] == 1
    assert bob.ask("POST", f"{SIMPLE}/recycle_token") == reply(
        400, {"message": ALL_AVAILABLE, "available_tokens": 1, "info": "No info provided"}
    )
    own_clock.advance(1)
    assert bob.ask("GET", f"{SIMPLE}/issue_token").document["available_tokens"] == 0
    assert bob.ask("GET", f"{SIMPLE}/recycle_token").document["available_tokens"] == 1
    assert bob.ask("GET", f"{SIMPLE}/recycle_token").status == 400
    assert leases(users, "permits") == [("ann", "job-1"), ("ann", "ann")]
    assert ann.ask("POST", f"{SIMPLE}/recycle_token").document["available_tokens"] == 2
    assert leases(users, "permits") == [("ann", "ann")], "the oldest lease was released"
    assert ann.ask("POST", f"{SIMPLE}/recycle_token").document["available_tokens"] == 3
    assert users["admin"].ask("POST", f"{SIMPLE}/recycle_token").status == 400


def test_only_managers_keep_free_tokens_alive(users: dict[str, Wire]) -> None:
    """Otherwise users without the right to generate tokens could keep them forever."""
    ann, bob, admin = users["ann"], users["bob"], users["admin"]
    first, second = (admin.post(f"{POOL}/token_pool/").document["token"] for _ in range(2))
    assert ann.post(f"{POOL}/block_token/") == reply(200, {"blocked_token": first})
    assert refused(bob.post(f"{POOL}/keep_alive/{second}"))
    assert bob.post(f"{POOL}/keep_alive/{first}").document["error"] == "forbidden", "it is leased to ann"
    assert ann.post(f"{POOL}/keep_alive/{first}").status == 200
    assert admin.post(f"{POOL}/keep_alive/{second}").status == 200
    assert bob.post(f"{POOL}/keep_alive/00000000-0000-4000-8000-000000000000").status == 400

    first, second = admin.post(f"{GENERATOR}/generate", {"count": 2}).document["tokens"]
    mine = ann.post(f"{GENERATOR}/assign").document["token"]
    free = second if mine == first else first
    assert refused(bob.post(f"{GENERATOR}/keep-alive", {"token": free}))
    assert refused(bob.post(f"{GENERATOR}/keep-alive"))
    assert ann.post(f"{GENERATOR}/keep-alive", {"token": mine}).status == 200
    assert admin.post(f"{GENERATOR}/keep-alive", {"token": free}).status == 200
    assert admin.post(f"{GENERATOR}/keep-alive") == reply(200, {"message": "TTL extended successfully for 1 tokens"})


def test_an_own_lease_that_has_ended_is_refused(users: dict[str, Wire], own_clock: HandClock) -> None:
    users["admin"].post(f"{GENERATOR}/generate")
    mine = users["bob"].post(f"{GENERATOR}/assign").document["token"]
    own_clock.advance(61)
    assert refused(users["bob"].post(f"{GENERATOR}/keep-alive", {"token": mine}))
