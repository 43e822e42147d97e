"""Killed workers lose nothing, and leases and tokens expire while they are down. Uses the paths of the originals."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.journal import until
from tests.support.servers import START, HandClock, Server, write_config
from tests.wire.dialects.conftest import ALL_FOUR, API_PASSWORD, Wire, connect, execute, fill, reply, rows, start

KILLED_AT, RESTARTED_AT = 20, 35
NOT_ASSIGNED = reply(404, {"error": "Token not assigned"})


class Restarted(NamedTuple):
    """Two workers that were killed and started again, and the tokens from before."""

    wire: Wire
    clock: HandClock
    config: Path
    tokens: dict[str, str]

    def at(self, seconds: float) -> None:
        """Set the time to a number of seconds after the first request."""
        self.clock.set(START + seconds)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarted]:
    """Issue, block and assign on new workers; kill them 20 seconds later, and start them 15 seconds after that."""
    home = tmp_path_factory.mktemp("restart")
    text = ALL_FOUR.replace("lease_ttl = 60\n\n[pools.owned]", "lease_ttl = 15\n\n[pools.owned]")
    for name in ("simple-token-implement", "token-pool", "random-token-generator"):
        text = text.replace(f'prefix = "/{name}"\n', "")
    config, clock, tokens = write_config(home, text), HandClock(home / "clock", create=True), {}
    with ExitStack() as stack:
        servers = start(stack, config, clock)
        wire = wire_to(stack, servers)
        fill(config, "uuids", 1500, START - 300)
        assert wire.ask("GET", "/issue_token").document["available_tokens"] == 2
        tokens["pool, free"] = wire.post("/api/token_pool/").document["token"]
        tokens["generator, leased"], tokens["generator, free"] = wire.post("/generate", {"count": 2}).document["tokens"]
        tokens["service, leased"] = wire.post("/token-management-service/generate-token").document["token"]
        clock.set(START + 10)
        assert wire.ask("GET", "/issue_token").document["available_tokens"] == 1
        tokens["pool, blocked"] = wire.post("/api/block_token/").document["blocked_token"]
        assert tokens["pool, blocked"] == tokens["pool, free"]
        tokens["pool, free"] = wire.post("/api/token_pool/").document["token"]
        assert wire.post("/assign").document["token"] == tokens["generator, leased"]
        answer = wire.post("/token-management-service/assign-token", {"client_id": "ann"})
        assert answer.document["token"] == tokens["service, leased"]
        clock.set(START + KILLED_AT)
        for server in servers:
            server.kill()
        clock.set(START + RESTARTED_AT)
        servers = start(stack, config, clock)
        # wait for the sweep: it stops halfway if the clock jumps past the end of its claim
        until(lambda: expired(config) == 0, "the expired rows are gone")
        yield Restarted(wire_to(stack, servers), clock, config, tokens)


def expired(config: Path) -> int:
    """Count the rows of tokens that expired long ago."""
    ((count,),) = execute(config, "SELECT count(*) FROM pool_tokens WHERE pool = 'uuids' AND free_at <= ?", START - 300)
    return int(count)


def wire_to(stack: ExitStack, servers: Sequence[Server]) -> Wire:
    """Send requests to both workers."""
    return Wire(connect(stack, servers), X_API_PASSWORD=API_PASSWORD)


def test_a_lease_that_ended_while_down_is_over(restarted: Restarted) -> None:
    """In the Redis services a stopped listener misses that, and the token stays leased forever."""
    assert restarted.wire.post("/unblock", {"token": restarted.tokens["generator, leased"]}) == NOT_ASSIGNED


def test_a_restart_keeps_only_live_permits_leased(restarted: Restarted) -> None:
    for seconds, free in ((35, 2), (39.9, 2), (40, 3)):
        restarted.at(seconds)
        assert restarted.wire.ask("GET", "/tokens") == reply(200, {"available_tokens": free})


def test_workers_that_start_together_prefill_once(restarted: Restarted) -> None:
    assert len(rows(restarted.config, "permits")) == 3


def test_a_restart_keeps_a_token_blocked_for_its_minute(restarted: Restarted) -> None:
    restarted.at(69.9)
    assert restarted.wire.post("/api/block_token/") == reply(200, {"blocked_token": restarted.tokens["pool, free"]})
    assert restarted.wire.post("/api/block_token/") == reply(404, {"error": "No free tokens"})
    kept = reply(200, {"message": "Token keep-alive refreshed"})
    leased = {"token": restarted.tokens["service, leased"], "client_id": "bob"}
    assert restarted.wire.post("/token-management-service/keep-alive", leased).status == 403
    assert restarted.wire.post("/token-management-service/keep-alive", {**leased, "client_id": "ann"}) == kept
    restarted.at(70)
    assert restarted.wire.post("/api/block_token/") == reply(200, {"blocked_token": restarted.tokens["pool, blocked"]})


def test_a_restart_keeps_the_expiry_of_free_tokens(restarted: Restarted) -> None:
    restarted.at(299.9)
    free = {"token": restarted.tokens["generator, free"]}
    assert restarted.wire.post("/unblock", free) == NOT_ASSIGNED
    restarted.at(300)
    assert restarted.wire.post("/unblock", free) == reply(404, {"error": "Token not found"})


def test_rows_of_expired_tokens_are_deleted(restarted: Restarted) -> None:
    """The documentation of token-pool lists this as missing. The sweeper does it in its first second."""
    assert expired(restarted.config) == 0
    assert len(rows(restarted.config, "uuids")) == 2
