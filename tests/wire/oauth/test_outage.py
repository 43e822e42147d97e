"""While the store is down, endpoints answer 503 with Retry-After, never "inactive" and never "revoked"."""

import resource
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import Server, worker, write_config
from tests.wire.oauth.forms import ANN, CLIENTS, FULL_FORMS, GATEWAY, INACTIVE, UNKNOWN, active, fetch, post, send


def is_outage(answer: httpx.Response) -> bool:
    """Return whether a response is 503, and check its form."""
    if answer.status_code != 503:
        return False
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"] == "store_unavailable"
    assert answer.headers["cache-control"] == "no-store"
    return True


def limit(server: Server, size: int) -> None:
    """Limit the size of the files of a server, to simulate a full disk."""
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_failed_revocation_is_never_a_success(tmp_path: Path) -> None:
    config = write_config(tmp_path, "[tokens]\nper_user = 0", CLIENTS)
    with worker(config) as server, server.client() as client:
        kept, held, ended = (fetch(client) for _ in range(3))
        assert active(client, kept)
        limit(server, (tmp_path / "tokenauth.db-wal").stat().st_size)
        until(lambda: is_outage(post(client, "token", ANN, **FULL_FORMS["token"])), "no token is issued")
        refused = server.events("login_refused")
        assert {(event["user"], event["reason"]) for event in refused} == {("ann", "store_unavailable")}

        assert is_outage(post(client, "revoke", ANN, token=kept))
        assert active(client, kept), "it was not revoked"
        assert is_outage(post(client, "token", ("ann", "wrong"), **FULL_FORMS["token"])), (
            "the attempt cannot be counted"
        )
        assert post(client, "revoke", ANN, token=UNKNOWN).status_code == 200

        assert client.request("DELETE", "/api/token", json={"token": held}).status_code == 200
        assert server.events("revocation_held_in_memory")
        assert post(client, "introspect", token=held).content == INACTIVE, "this worker refuses it"
        for _ in range(3):
            assert is_outage(post(client, "revoke", ANN, token=held)), "other workers still accept it"
        assert is_outage(post(client, "revoke", ANN, token=ended))

        limit(server, resource.RLIM_INFINITY)
        until(
            lambda: post(client, "revoke", ANN, token=held).status_code == 200,
            "it is written when there is space again",
        )
        assert post(client, "revoke", ANN, token=ended).status_code == 200
        server.kill()
    with worker(config) as server, server.client() as client:
        assert active(client, kept)
        assert not active(client, held)
        assert not active(client, ended)


def _delete(database: Path) -> None:
    for name in ("", "-wal", "-shm"):
        database.with_name(database.name + name).unlink(missing_ok=True)


def _truncate(database: Path) -> None:
    with database.open("r+b") as file:
        file.truncate()


@pytest.mark.parametrize("damage", [_delete, pytest.param(_truncate, marks=pytest.mark.faults)])
def test_a_damaged_store_never_reports_inactive(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """The server checks its files every second. Until then an answer may be correct, but is never wrong."""
    config = write_config(tmp_path, users=CLIENTS)
    with worker(config) as server, server.client() as client:
        tokens = [fetch(client) for _ in range(20)]
        caller = fetch(client, GATEWAY)
        assert active(client, tokens[0])
        damage(tmp_path / "tokenauth.db")

        def down() -> bool:
            answers = [post(client, "introspect", token=token) for token in tokens]
            answers += [send(client, "introspect", f"Bearer {caller}", token=token) for token in tokens]
            assert all(is_outage(answer) or answer.json()["active"] for answer in answers), answers
            unknown = post(client, "introspect", token=UNKNOWN)
            assert is_outage(unknown) or unknown.content == INACTIVE
            return all(map(is_outage, [*answers, unknown]))

        until(down, "every answer is 503")
        for token in (tokens[1], UNKNOWN):
            assert is_outage(post(client, "revoke", ANN, token=token))
            assert is_outage(post(client, "introspect", token=token))
        assert is_outage(send(client, "introspect", f"Bearer {UNKNOWN}", token=tokens[1])), (
            "the token of the caller cannot be checked either"
        )
        for auth in (ANN, ("ann", "wrong"), ("bob", "bob-secret"), ("nobody", "x")):
            assert is_outage(post(client, "token", auth, **FULL_FORMS["token"])), "a secret cannot be checked either"
        assert server.process.poll() is None
