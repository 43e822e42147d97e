"""SIGHUP: users that were removed or have a new secret lose their tokens and the remembered secret."""

from pathlib import Path

from tests.promises.test_3_reload import reload
from tests.support.connections import Connection
from tests.support.journal import serving
from tests.support.servers import write_config
from tests.wire.oauth.forms import INACTIVE, UNKNOWN, basic, form_bytes, table

CHEAP = "[passwords]\nmemory_kib = 8\ntime_cost = 1\n"


def send_form(port: int, endpoint: str, credentials: str, token: str) -> tuple[int, bytes]:
    """Send a form over a new connection, since a reload closes the others."""
    form = {"token": token, "grant_type": "client_credentials"}
    with Connection(port) as connection:
        answer = connection.send(form_bytes(endpoint, basic(credentials), form))
    return answer.status, answer.body


def test_sighup_ends_secrets_and_tokens_of_changed_clients(tmp_path: Path) -> None:
    cid, guard = table("cid", "cid-secret", "read"), table("guard", "guard-secret", "introspect")
    old = (
        cid
        + guard
        + table("gateway", "old-secret", "introspect")
        + table("ann", "ann-secret")
        + table("bob", "bob-secret")
    )
    new = cid.replace("read", "write") + guard.replace("introspect", "read")
    new += table("gateway", "new-secret", "introspect") + table("ann", "ann-secret")
    config = write_config(tmp_path, users=CHEAP + old)
    with serving(config) as server:
        with Connection(server.port) as connection:
            tokens = {name: connection.log_in(name, f"{name}-secret") for name in ("ann", "bob", "cid")}
        for credentials in ("gateway:old-secret", "guard:guard-secret"):  # the server remembers the secrets now
            for token in tokens.values():
                status, body = send_form(server.port, "introspect", credentials, token)
                assert (status, b'"active":true' in body) == (200, True)
        write_config(tmp_path, users=CHEAP + new)
        reload(server, 1)
        for name in ("ann", "bob"):  # ann has a new hash of the same secret; bob was removed
            assert send_form(server.port, "introspect", "gateway:new-secret", tokens[name]) == (200, INACTIVE)
        _, body = send_form(server.port, "introspect", "gateway:new-secret", tokens["cid"])
        assert b'"scope":"write"' in body, "the scopes are the new ones"
        for credentials, status in [
            ("gateway:old-secret", 401),
            ("gateway:new-secret", 200),
            ("guard:guard-secret", 403),
            ("ann:ann-secret", 403),
            ("bob:bob-secret", 401),
        ]:
            assert send_form(server.port, "introspect", credentials, UNKNOWN)[0] == status, credentials
