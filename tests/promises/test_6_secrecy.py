"""Promise 6: the database, logs, metrics and errors contain no token and no password.

Tokens of pools are leased again, so the database stores them. Logs and errors do not contain them.
"""

import base64
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, quote_plus

import pytest
from passlib.hash import argon2

from tests.support.connections import Answer, Connection
from tests.support.journal import serving, until
from tests.support.servers import Server, worker, write_config

TOKENS = 40
# What people may type, with characters that encodings write differently.
PASSWORD = 'c4nary "p\u00e4ss/w\u00f6rd" +1 <&\\>'
WRONG = 'wr0ng "p\u00e4ss/w\u00f6rd" +2 <&\\>'
AS_NAME = 'typed "\u00efn/the" name f\u00efeld <&\\>'
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


def forms(secret: str) -> set[bytes]:
    """Return a secret in each encoding in which it could leak."""
    raw = secret.encode()
    texts = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), raw.hex(), raw.decode("latin-1")}
    texts |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    found = {text.encode() for text in texts} | {secret.encode("utf-16-le"), repr(raw)[2:-1].encode()}
    for shift in range(3):  # base64 of a text that contains the secret at any offset
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found.add(encode(b"\0" * shift + raw)[4:-4])
    return found


def requests_with(token: str) -> Iterator[bytes]:
    """Return valid and invalid requests to every address that carry a token in every place."""
    for target in (
        "/api/token", "/api/me", "/api/tokens", f"/api/tokens/{token}", "/healthz", "/readyz", f"/{token}",
        "/auth", f"/auth/{token}", f"/docs/{token}", "/oauth/introspect", "/oauth/token", f"/oauth/{token}",
        f"/api/pools/{token}", f"/api/pools/canaries/leases/{token}",
    ):  # fmt: skip
        for method in METHODS:
            for query in ("", f"?token={token}", f"?token={token}&token=x", f"?keep={token}", f"?user={token}"):
                ends = target == "/api/token" or (target == "/api/tokens" and query[:5] in {"", "?toke"})
                if method == "DELETE" and ends:
                    continue  # the next requests need the token
                yield f"{method} {target}{query} HTTP/1.1\r\nHost: x\r\nX-Token: {token}\r\n\r\n".encode()
        for header in (
            f"Authorization: Bearer {token}",
            f"X-Token: {token}\r\nAuthorization: Bearer {token[::-1]}",
            f"Authorization: Basic {token}",
            f"Cookie: token={token}",
            f"X-Request-Id: {token}\r\nUser-Agent: {token[:20]}",
        ):
            yield f"GET {target} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode()
    basic = base64.b64encode(f"ann:{token}".encode()).decode()
    for path in ("introspect", "revoke", "token"):
        for body in (f"token={token}", f"token={token}&token=x", f"client_id=ann&client_secret={token}", f"{token}=1"):
            for sent in (f"Authorization: Basic {basic}", f"Authorization: Bearer {token}", f"X-Token: {token}"):
                head = f"POST /oauth/{path} HTTP/1.1\r\nHost: x\r\n{sent}\r\nContent-Length: {len(body)}\r\n"
                yield f"{head}Content-Type: application/x-www-form-urlencoded\r\n\r\n{body}".encode()
    for body in (f'{{"token": "{token}",}}', f'{{"username": "{token}"}}', f'{{"username": 1, "password": "{token}"}}'):
        for kind in ("application/json", "text/plain", "application/json; charset=utf-16"):
            head = f"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            yield (head + body).encode()
    for field in (f'"scopes": ["{token}"]', f'"ttl": "{token}"', f'"{token}": 1', f'"name": "{token}"'):
        body = f'{{"name": "job", {field}}}'.replace('"name": "job", "name"', '"name"')
        head = f"POST /api/tokens HTTP/1.1\r\nHost: x\r\nX-Token: {token}\r\nContent-Length: {len(body)}\r\n\r\n"
        yield (head + body).encode()


def broken_requests_with(token: str) -> Iterator[bytes]:
    """Return requests that are not valid HTTP or are cut off in the middle."""
    yield f"GET /api/token?token={token} HTTP/9.9\r\n\r\n".encode()
    yield f"{token} / HTTP/1.1\r\n\r\n".encode()
    yield f"GET /api/token?token={token} HTTP/1.1\r\nX-Token {token}\r\n\r\n".encode()
    yield f"GET /{token * 200} HTTP/1.1\r\nX-Token: {token * 2000}\r\n\r\n".encode()
    yield f"POST /api/token HTTP/1.1\r\nContent-Length: 500\r\n\r\n{token}".encode()
    yield f"DELETE /api/token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{token}\r\n".encode()


def provoke(server: Server, tokens: list[str]) -> list[Answer]:
    """Use the tokens in every way; return all answers."""
    answers = []
    connection = Connection(server.port)
    for request in requests_with(tokens[0]):
        if request.startswith(b"HEAD"):
            continue  # the test's client cannot read answers that have a length and no body
        answers.append(connection.send(request))
    for request in broken_requests_with(tokens[1]):
        with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
            raw.sendall(request)
            with suppress(OSError):  # the server may have answered and closed the connection already
                raw.shutdown(socket.SHUT_WR)
            answers.append(Answer(0, raw.recv(65536), b""))
    for name, password in [
        ("ann", PASSWORD + "x"),
        ("ann", WRONG),
        ("unknown", WRONG),
        (AS_NAME, WRONG),
        (AS_NAME, ""),
        ("ann", WRONG * 40),
        (AS_NAME * 20, WRONG),
    ] * 3:
        answers.append(connection.ask("POST", "/api/token", {"username": name, "password": password}))
    answers.append(connection.ask("GET", "/api/tokens", X_Token=tokens[2]))
    for token in tokens[3:6]:
        answers.append(connection.ask("DELETE", "/api/token", {"token": token}))
    connection.close()
    return answers


def requests_for(token: str) -> Iterator[tuple[str, str, object]]:
    """Return valid and invalid requests that have a pool's token in every place."""
    pool = "/api/pools/canaries"
    for spelt in (token, token[:-1], "".join(f"%{ord(letter):02x}" for letter in token), f"{token}/{token}", token * 5):
        for target in (f"{pool}/leases/{spelt}", f"{pool}/tokens/{spelt}", f"{pool}/{spelt}", f"/api/pools/{spelt}"):
            for method in ("GET", "POST", "PUT", "PATCH"):
                yield method, target, {"holder": token} if method == "PUT" else None
    for body in ({"fence": token}, {"holder": [token]}, {"count": token}, token, [token], {token: token}):
        for method, target in (
            ("PUT", f"{pool}/leases/{token}"),
            ("POST", f"{pool}/leases"),
            ("POST", f"{pool}/tokens"),
        ):
            yield method, target, body
    for query in (f"after={token}", f"after={token}&after=x", f"limit={token}", f"{token}&{'x' * 9000}"):
        yield "GET", f"{pool}?{query}", None
        yield "GET", f"/api/pools?{query}", None
    yield "PUT", f"{pool}/leases/{token}", {"holder": "ci-7"}
    yield "GET", f"{pool}/tokens/{token}", None
    yield "DELETE", f"{pool}/leases/{token}", {"holder": "another"}
    yield "DELETE", f"{pool}/leases/{token}", None
    yield "DELETE", f"{pool}/leases/{token}", None
    yield "DELETE", f"{pool}/tokens/{token[::-1]}", None


def use_pool(server: Server, session: str, tokens: list[str], database: Path | None) -> list[Answer]:
    """Use a pool in every way, and add its tokens to `tokens`. With `database`, the table is gone in the end."""
    answers = []
    with Connection(server.port) as connection:
        answers.append(connection.ask("POST", "/api/pools/canaries/tokens", {"count": 20}, X_Token=session))
        tokens += answers[-1].json()["tokens"]
        for _ in range(10):
            answers.append(connection.ask("POST", "/api/pools/canaries/leases", {"holder": "ci-7"}, X_Token=session))
        leased = answers[-1].json()["token"]
        answers.append(connection.ask("DELETE", f"/api/pools/canaries/tokens/{tokens[-1]}", X_Token=session))
        if database is not None:
            with sqlite3.connect(database) as db:
                db.execute("ALTER TABLE pool_tokens RENAME TO broken_too")
            db.close()
        for method, target, body in requests_for(leased):
            answers.append(
                connection.ask(method, target, body, X_Token=session, X_Request_Id=leased, User_Agent=leased)
            )
    with Connection(server.port) as connection:
        request = f"PUT /api/pools/canaries/leases/{leased} HTTP/9.9\r\nX-Token: {leased}\r\n\r\n"
        answers.append(connection.send(request.encode()))
    return answers


def make_named(connection: Connection, login: str) -> list[str]:
    """Make a named token and its successor, and use both."""
    made = connection.ask("POST", "/api/tokens", {"name": "canary"}, X_Token=login).json()
    rotate = f"/api/tokens/{made['id']}/rotate"
    new = connection.ask("POST", rotate, {"overlap": "1h"}, X_Token=login).json()
    for token in (made["token"], new["token"]):
        assert connection.ask("GET", "/api/me", X_Token=token).status == 200
        connection.ask("POST", rotate, {"overlap": token}, X_Token=token)
    return [made["token"], new["token"]]


class Aftermath(NamedTuple):
    """The files, the tokens of users and of a pool, and all answers."""

    directory: Path
    tokens: list[str]
    answers: list[Answer]
    pool_tokens: list[str]
    pool_answers: list[Answer]


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """Send everything that could leave a trace, twice: the second time with a broken database. End with kill -9."""
    directory = tmp_path_factory.mktemp("canaries")
    cheap = argon2.using(type="ID", memory_cost=8, time_cost=1, parallelism=1).hash(PASSWORD)
    users = "[passwords]\nmemory_kib = 8\ntime_cost = 1\n"
    users += "".join(
        f'[[users]]\nusername = "{name}"\npassword = "{cheap}"\nscopes = ["admin"]\n' for name in ("ann", "ben")
    )
    audit = f'[audit]\nfile = "{directory}/audit.jsonl"\n'
    config = write_config(directory, f"[server]\naccess_log = true\n{audit}[pools.canaries]", users)
    done = Aftermath(directory, [], [], [], [])
    for broken in (False, True):
        with serving(config, "--workers", "2") as server:
            with Connection(server.port) as connection:
                mine = [connection.log_in("ben" if broken else "ann", PASSWORD) for _ in range(TOKENS)]
                mine += make_named(connection, mine[0])
            done.tokens.extend(mine)
            database = directory / "tokenauth.db"
            done.pool_answers.extend(use_pool(server, mine[0], done.pool_tokens, database if broken else None))
            if broken:
                with sqlite3.connect(database) as db:
                    db.execute("ALTER TABLE tokens RENAME TO broken")
                db.close()
            done.answers.extend(provoke(server, mine))
            if not broken:
                server.wait("token_revoked")  # threads write the log and the audit log
                until(lambda: '"logout"' in (directory / "audit.jsonl").read_text(), "log-outs are audited")
            server.kill()
    return done


def test_no_file_or_log_contains_a_token_or_password(aftermath: Aftermath) -> None:
    """Neither the database, nor the write-ahead log, nor the log of any process contains a canary in any form."""
    directory, tokens, *_ = aftermath
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {"tokenauth.db", "tokenauth.db-wal", "server-0.log", "server-1.log"} <= {path.name for path in files}
    log = (directory / "server-0.log").read_text() + (directory / "server-1.log").read_text()
    for event in ("request", "login_failed", "token_issued", "token_revoked", "login_refused", "named_token_rotated"):
        assert f'"event":"{event}"' in log, "the canaries must have reached code that logs"
    for action in ("login", "logout", "issue_token", "rotate_token", "access"):
        assert f'"action":"{action}"' in (directory / "audit.jsonl").read_text()
    for secret in (*tokens, PASSWORD, WRONG, AS_NAME):
        for form in forms(secret):
            assert not [path.name for path in files if form in path.read_bytes()], form


def test_no_log_or_error_contains_a_pool_token(aftermath: Aftermath) -> None:
    """The database stores them in clear, since they are leased again."""
    directory, _, _, pool_tokens, pool_answers = aftermath
    logs = b"".join(path.read_bytes() for path in (*directory.glob("server-*.log"), directory / "audit.jsonl"))
    for route in (
        "",
        "/{pool}",
        "/{pool}/leases",
        "/{pool}/tokens",
        "/{pool}/leases/{token}",
        "/{pool}/tokens/{token}",
    ):
        assert f'"route":"/api/pools{route}"'.encode() in logs
    assert b'"event":"store_not_writable"' in logs, "the canaries must have reached code that logs"
    assert {answer.status for answer in pool_answers} >= {200, 201, 204, 400, 404, 405, 409, 503}
    errors = b"\n".join(answer.head + answer.body for answer in pool_answers if answer.status >= 400)
    database = b"".join(path.read_bytes() for path in directory.glob("tokenauth.db*"))
    assert len(pool_tokens) == 40
    assert pool_tokens[0].encode() in database
    for token in pool_tokens:
        for form in forms(token):
            assert form not in logs, form
            assert form not in errors, form


def test_no_later_answer_repeats_a_token_or_password(aftermath: Aftermath) -> None:
    """For every kind of refusal, from 400 to 503."""
    _, tokens, answers, *_ = aftermath
    assert {answer.status for answer in answers} >= {200, 400, 401, 403, 404, 405, 415, 429, 503}
    everything = b"\n".join(answer.head + answer.body for answer in answers)
    for secret in (*tokens, PASSWORD, WRONG, AS_NAME):
        for form in forms(secret):
            assert form not in everything, form


def test_a_leaked_database_gives_no_login(tmp_path: Path) -> None:
    """It stores the hash of a token's value, which is not accepted as a token."""
    with worker(write_config(tmp_path)) as server, Connection(server.port) as connection:
        token = connection.log_in()
        with sqlite3.connect(tmp_path / "tokenauth.db") as db:
            (row,) = db.execute("SELECT * FROM tokens").fetchall()
        db.close()
        assert sha256(token.encode()).digest() in row
        for value in row:
            for text in {str(value), value.hex() if isinstance(value, bytes) else ""} - {""}:
                assert not connection.valid(quote(text))
                assert connection.ask("GET", "/api/me", X_Token=text.encode("ascii", "ignore").decode()).status != 200


def test_only_the_owner_can_read_the_database(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    mask = os.umask(0)
    try:
        with serving(config) as server, Connection(server.port) as connection:
            connection.log_in()
            for path in tmp_path.glob("tokenauth.db*"):
                assert path.stat().st_mode & 0o077 == 0, path.name
    finally:
        os.umask(mask)
