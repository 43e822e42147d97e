"""Without a good answer of the issuer no request passes. No log contains a token."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.servers import Server, worker, write_config
from tests.system.proxies.conftest import Start
from tests.system.proxies.peers import HANG
from tests.system.proxies.running import PRODUCTS, Proxy, find, running

ANSWERS = {
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    "429": b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
    "404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "302": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nX-Auth-User: ann\r\n",
    "too long a head": b"HTTP/1.1 200 OK\r\nX-Auth-User: " + b"a" * 2_000_000 + b"\r\nContent-Length: 0\r\n\r\n",
}

PASS_ON = {
    "caddy": {"302"},
    "haproxy": {"302"},
    "traefik": {"302", "404", "429", "500"},
    "envoy": {"302", "404", "429"},
}
"""Statuses of the issuer, other than 401 and 403, that a proxy forwards to the client."""


def test_no_request_passes_while_the_issuer_is_down(proxy: Proxy, ann: str) -> None:
    assert proxy.ask("/", ann)[0].status == 200
    proxy.relay.stop()
    for tokens in ([ann], [], ["x" * 64]):
        reply, arrived = proxy.ask("/", *tokens)
        assert (reply.status in range(500, 505), arrived) == (True, [])
    proxy.relay.start()
    assert proxy.ask("/", ann)[0].status == 200


def test_a_connection_closed_when_idle_refuses_no_request(proxy: Proxy, ann: str) -> None:
    """The issuer closes idle connections after some seconds, perhaps just when the proxy sends the next request."""
    for _ in range(5):
        assert proxy.ask("/", ann)[0].status == 200
        proxy.relay.hang_up()
        assert proxy.ask("/", ann)[0].status == 200
        if proxy.name != "envoy":  # it does not retry, so its idle timeout must be shorter
            proxy.relay.end_at_next_request()
            assert proxy.ask("/", ann)[0].status == 200


@pytest.mark.parametrize("answer", ANSWERS)
def test_no_other_status_lets_a_request_pass(proxy: Proxy, ann: str, answer: str) -> None:
    with proxy.relay.answering(ANSWERS[answer]):
        reply, arrived = proxy.ask("/", ann)
    assert not arrived
    assert reply.status in range(500, 505) or (str(reply.status) == answer and answer in PASS_ON.get(proxy.name, ()))
    assert proxy.ask("/", ann)[0].status == 200


@pytest.mark.parametrize("name", ["X-Auth-User", "X-Auth-Scopes", "X-Auth-Expires"])
def test_a_missing_user_is_not_taken_from_the_client(proxy: Proxy, ann: str, name: str) -> None:
    with proxy.relay.answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
        _, arrived = proxy.ask("/", ann, headers=[(name, "mallory")])
    assert b"mallory" not in b"".join(value for request in arrived for _, value in request.headers)


def test_no_request_waits_long_for_a_hanging_issuer(start: Start, ann: str) -> None:
    """All proxies at the same time, since each waits for its configured timeout of two seconds."""

    def attempt(name: str) -> None:
        proxy = start(name)
        with proxy.relay.answering(HANG):
            reply, arrived = proxy.ask("/", ann)
        assert (name, reply.status in range(500, 505), arrived) == (name, True, [])
        assert proxy.ask("/", ann)[0].status == 200

    present = [name for name in PRODUCTS if find(name)]
    for name in present:
        start(name)
    with ThreadPoolExecutor(len(present)) as threads:
        list(threads.map(attempt, present))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """Run an issuer whose database is gone, and return it with a token that it issued before."""
    directory = tmp_path_factory.mktemp("broken")
    with worker(write_config(directory)) as issuer, Connection(issuer.port) as connection:
        token = connection.log_in()
        for path in directory.glob("tokenauth.db*"):
            path.unlink()
        until(lambda: connection.ask("GET", "/auth", X_Token=token).status == 503, "the issuer has noticed")
        yield issuer, token


def test_a_broken_store_is_503_not_401(proxy: Proxy, broken: tuple[Server, str]) -> None:
    issuer, token = broken
    with proxy.relay.leading_to(issuer.port):
        reply, arrived = proxy.ask("/", token)
        assert (reply.status, arrived) == (503, [])


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_log_has_a_token(name: str, tmp_path: Path, server: Server, ann: str, bob: str) -> None:
    """Neither tokens in headers nor in a query, whatever fails."""
    headers = [("Referer", f"http://app.example.com/?token={ann}"), ("Authorization", f"Bearer {bob}")]
    headers.append(("Cookie", f"__Secure-tokenauth={ann}"))
    with running(name, tmp_path / name, server.port) as proxy:
        for target in (f"/some-where?token={ann}", f"/reports/?token={ann}", f"/..;/?token={ann}"):
            proxy.ask(target, bob)
            proxy.ask(target, bob, headers=headers)
            proxy.ask(target, headers=headers)
            with proxy.relay.answering(b"junk"):
                proxy.ask(target, bob)
            proxy.relay.stop()
            proxy.ask(target, bob)
            proxy.relay.start()
        proxy.upstream.stop()
        assert proxy.ask(f"/?token={ann}", bob)[0].status in {502, 503}
        proxy.stop()
    logs = b"".join(path.read_bytes() for path in (tmp_path / name).glob("*.log"))
    assert logs.count(b"GET") >= 13
    assert ann.encode() not in logs
    assert bob.encode() not in logs
