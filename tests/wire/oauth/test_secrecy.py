"""No secret and no token appears in the log, in errors, or in responses other than the one that issues it."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

from tests.promises.test_6_secrecy import forms as spellings
from tests.support.connections import Answer, Connection
from tests.support.servers import worker, write_config
from tests.wire.oauth.forms import ENDPOINTS, basic, form_bytes, table

SECRET = 'c4nary "p\u00e4ss/w\u00f6rd" +1 <&\\>'
WRONG = 'wr0ng "p\u00e4ss/w\u00f6rd" +2 <&\\>'
AS_NAME = 'typed "\u00efn/the" name f\u00efeld <&\\>'


def requests_with(token: str) -> Iterator[bytes]:
    """Return requests with a secret or a token in every place, expected or not."""
    for endpoint in ENDPOINTS:
        for secret in (SECRET, WRONG, AS_NAME, token):
            places = {"grant_type": secret, "scope": secret, "token": secret, "token_type_hint": secret, secret: secret}
            right = {"token": "x", "grant_type": "client_credentials"}
            for field, value in places.items():
                yield form_bytes(endpoint, basic(f"canary:{SECRET}"), {**right, "scope": "x", field: value})
            yield form_bytes(endpoint, basic(f"canary:{secret}x"), right)
            yield form_bytes(endpoint, basic(f"{AS_NAME}:{secret}"), right)
            yield form_bytes(endpoint, basic(secret), right)
            yield form_bytes(endpoint, f"Bearer {token}", right)
            yield form_bytes(endpoint, f"Bearer {token[::-1]}", right)
            yield form_bytes(endpoint, basic(f"canary:{secret}")[:-1], right)
            yield form_bytes(endpoint, basic(f"{secret * 9}:{secret * 30}"), right)
            for form in (
                {"client_id": AS_NAME, "client_secret": secret},
                {"client_id": secret},
                {"client_secret": secret},
                {"client_id": "canary", "client_secret": f"{secret}\0"},
            ):
                yield form_bytes(endpoint, "", {**right, **form})
                yield form_bytes(endpoint, basic(f"canary:{SECRET}"), {**right, **form})
            yield form_bytes(f"{endpoint}?{urlencode({'client_secret': secret})}", "", right)
            yield form_bytes(f"{endpoint}/{urlencode({'': secret})}", "", right)
            yield form_bytes(endpoint, "", urlencode({"token": secret}).encode() * 2)
            yield form_bytes(endpoint, "", secret.encode("latin-1"))


def test_no_secret_and_no_token_is_repeated_or_logged(tmp_path: Path) -> None:
    settings = "[server]\naccess_log = true\n[throttle]\nfree = 200\nnetwork_free = 1000000"
    users = "[passwords]\nmemory_kib = 8\ntime_cost = 1\n" + table("canary", SECRET, "introspect")
    answers: list[Answer] = []
    with worker(write_config(tmp_path, settings, users)) as server, Connection(server.port) as connection:
        grant = form_bytes("token", basic(f"canary:{SECRET}"), {"grant_type": "client_credentials"})
        tokens = [str(connection.send(grant).json()["access_token"]) for _ in range(3)]
        answers += [connection.send(sent) for sent in requests_with(tokens[0])]
        with sqlite3.connect(tmp_path / "tokenauth.db") as db:
            db.execute("ALTER TABLE tokens RENAME TO broken")
        db.close()
        answers += [connection.send(sent) for sent in requests_with(tokens[1])]
        log = server.log.read_bytes()
    assert {answer.status for answer in answers} >= {200, 400, 401, 404, 503}
    for event in ("request", "login_failed", "token_issued", "token_revoked"):
        assert f'"event":"{event}"'.encode() in log, "events that could contain secrets were logged"
    received = b"\n".join(answer.head + answer.body for answer in answers)
    for secret in (*tokens, SECRET, WRONG, AS_NAME):
        for spelling in spellings(secret):
            assert spelling not in log, spelling
            assert spelling not in received, spelling
