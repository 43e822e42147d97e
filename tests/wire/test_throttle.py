"""Wrong passwords delay the next attempt: for known and unknown names, per network, on every worker."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from tests.support.servers import HandClock, Server, exchange, log_in, probe, worker, write_config
from tokenauth.web.asgi_extensions import LOGGED_ONCE
from tokenauth.web.client_address import client_address

FREE = 5
NETWORK_FREE = 20
"""A fifth of the default, to spend fewer logins."""
FORGET = 3600
LONGEST = 900

_networks = count(1)

WIDE_ADMIN = "".join(chr(ord(letter) + 0xFEE0) for letter in "admin")
"""The name in full-width letters. They normalize to the same name."""


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all failure counters, so that tests are independent."""
    clock.advance(25 * 3600)


@pytest.fixture(scope="module")
def settings() -> str:
    return "[server]\nworkers = 2"


@pytest.fixture(scope="module")
def proxy(directory: Path, clock: HandClock) -> Iterator[Server]:
    """Run a worker that trusts X-Forwarded-For from this machine."""
    home = directory / "proxied"
    home.mkdir()
    tables = '[server]\ntrusted_proxies = ["127.0.0.1", "10.0.0.0/8"]\n'
    tables += f"[throttle]\nnetwork_free = {NETWORK_FREE}"
    with worker(write_config(home, tables), clock) as running:
        yield running


@pytest.fixture(scope="module")
def proxied(proxy: Server) -> Iterator[httpx.Client]:
    with proxy.client() as connected:
        yield connected


@pytest.fixture
def home() -> str:
    """Return an address in a new network."""
    return f"203.0.{next(_networks)}.7"


def attempt(
    client: httpx.Client, username: str = "ann", password: str = "wrong", *forwarded: str | bytes
) -> httpx.Response:
    """Try to log in, optionally with X-Forwarded-For headers."""
    headers = [(b"X-Forwarded-For", value.encode() if isinstance(value, str) else value) for value in forwarded]
    return client.post("/api/token", json={"username": username, "password": password}, headers=headers)


def statuses(client: httpx.Client, tries: int, username: str = "ann", *forwarded: str) -> list[int]:
    """Return the statuses of repeated attempts with a wrong password."""
    return [attempt(client, username, "wrong", *forwarded).status_code for _ in range(tries)]


def login_bytes(username: str, password: str, forwarded: str = "") -> bytes:
    """Return the bytes of a login request."""
    body = f'{{"username": "{username}", "password": "{password}"}}'.encode()
    extra = f"X-Forwarded-For: {forwarded}\r\n" if forwarded else ""
    return f"POST /api/token HTTP/1.1\r\nHost: x\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


def all_at_once(ports: Sequence[int], tries: int, sent: bytes) -> list[int]:
    """Send the same bytes over many connections at once, alternating between the ports; return sorted statuses."""
    with ThreadPoolExecutor(tries) as threads:
        return sorted(threads.map(lambda number: exchange(ports[number % len(ports)], sent)[0], range(tries)))


def test_after_five_failures_the_right_password_waits(client: httpx.Client, clock: HandClock) -> None:
    assert statuses(client, FREE) == [401] * FREE
    for password in ("wrong", "ann-secret"):
        throttled = attempt(client, "ann", password)
        assert throttled.status_code == 429
        assert throttled.headers["retry-after"] == "1"
        assert throttled.headers["cache-control"] == "no-store"
        assert throttled.json()["error"] == "too_many_attempts"
    clock.advance(1)
    assert attempt(client, "ann", "ann-secret").status_code == 200


def test_a_throttled_attempt_is_not_counted(client: httpx.Client, clock: HandClock) -> None:
    statuses(client, FREE)
    assert statuses(client, 20) == [429] * 20
    clock.advance(1)
    assert attempt(client).status_code == 401
    assert attempt(client).headers["retry-after"] == "2"


def test_the_delay_doubles_up_to_a_quarter_of_an_hour(client: httpx.Client, clock: HandClock) -> None:
    statuses(client, FREE)
    delays = []
    for _ in range(13):
        delays.append(int(attempt(client).headers["retry-after"]))
        clock.advance(delays[-1] - 0.5)
        assert attempt(client).headers["retry-after"] == "1"
        clock.advance(0.5)
        assert attempt(client).status_code == 401
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, LONGEST, LONGEST, LONGEST]


def test_a_success_clears_the_failure_counter(client: httpx.Client) -> None:
    for _ in range(3):
        assert statuses(client, FREE - 1) == [401] * (FREE - 1)
        assert attempt(client, "ann", "ann-secret").status_code == 200
    assert statuses(client, FREE + 1) == [401] * FREE + [429]


@pytest.mark.parametrize("unknown", ["nobody", "", "x" * 256, "*"])
def test_known_and_unknown_names_are_answered_alike(client: httpx.Client, clock: HandClock, unknown: str) -> None:
    def answers(username: str) -> list[tuple[int, bytes, dict[str, str]]]:
        seen = []
        for step in (0, 0, 0, 0, 0, 0, 0, 1, 0, 1.5, 0.5, 0, 4, 0):
            clock.advance(step)
            answer = attempt(client, username)
            headers = {name: value for name, value in answer.headers.items() if name != "date"}
            seen.append((answer.status_code, answer.content, headers))
        return seen

    known = answers("ann")
    assert answers(unknown) == known
    assert {status for status, _, _ in known} == {401, 429}


def test_failures_are_counted_per_name(client: httpx.Client) -> None:
    assert statuses(client, FREE - 1) == [401] * (FREE - 1)
    log_in(client, "bob", "bob-secret")
    assert statuses(client, 2) == [401, 429]
    log_in(client, "bob", "bob-secret")


@pytest.mark.parametrize("variant", ["ADMIN", "Admin", "aDmIn", WIDE_ADMIN, WIDE_ADMIN.upper()])
def test_variants_of_a_name_share_one_counter(client: httpx.Client, clock: HandClock, variant: str) -> None:
    assert statuses(client, FREE - 2, variant) == [401] * (FREE - 2)
    assert statuses(client, 3, "admin") == [401, 401, 429]
    assert attempt(client, variant, "admin").status_code == 429
    clock.advance(1)
    token = log_in(client, variant)
    assert client.get("/api/me", headers={"X-Token": token}).json()["username"] == "admin"


def test_throttling_does_not_affect_issued_tokens(client: httpx.Client, sibling_client: httpx.Client) -> None:
    token = log_in(client, "ann", "ann-secret")
    assert statuses(client, FREE + 1)[-1] == 429
    for each in (client, sibling_client):
        assert probe(each, token)
        assert each.get("/api/me", headers={"X-Token": token}).status_code == 200
    client.request("DELETE", "/api/token", json={"token": token})
    assert not probe(sibling_client, token)


def test_workers_of_one_database_count_together(client: httpx.Client, sibling_client: httpx.Client) -> None:
    assert statuses(client, 3) == [401] * 3
    assert statuses(sibling_client, 3) == [401, 401, 429]
    assert attempt(client).status_code == 429
    log_in(sibling_client, "bob", "bob-secret")


def test_the_failure_counter_survives_a_restart(tmp_path: Path, clock: HandClock) -> None:
    config = write_config(tmp_path)
    with worker(config, clock) as first, first.client() as client:
        assert statuses(client, FREE) == [401] * FREE
        first.stop()
    with worker(config, clock) as second, second.client() as client:
        assert attempt(client, "ann", "ann-secret").status_code == 429
        clock.advance(1)
        assert attempt(client, "ann", "ann-secret").status_code == 200


@pytest.mark.parametrize(("pause", "then"), [(FORGET - 1, [401, 429]), (FORGET, [401] * FREE + [429])])
def test_failures_are_forgotten_after_an_hour(
    client: httpx.Client, clock: HandClock, pause: float, then: list[int]
) -> None:
    statuses(client, FREE)
    clock.advance(pause)
    assert statuses(client, len(then)) == then


def test_concurrent_wrong_guesses_do_not_pass_the_limit(proxy: Server, home: str) -> None:
    answered = all_at_once([proxy.port], 100, login_bytes("ann", "wrong", home))
    assert answered[:FREE] == [401] * FREE
    assert set(answered[FREE:]) <= {429, 503}, "503: the login queue is full"


def test_two_workers_allow_at_most_one_extra_share(server: Server, sibling: Server, clock: HandClock) -> None:
    for _ in range(8):
        clock.advance(FORGET)
        answered = all_at_once([server.port, sibling.port], 40, login_bytes("ann", "wrong"))
        assert set(answered) == {401, 429}
        assert FREE <= answered.count(401) <= FREE + FREE // 2


@pytest.mark.parametrize("failed_before", [0, FREE - 1])
def test_concurrent_right_logins_all_succeed(
    server: Server, sibling: Server, client: httpx.Client, failed_before: int
) -> None:
    statuses(client, failed_before)
    assert all_at_once([server.port, sibling.port], 30, login_bytes("ann", "ann-secret")) == [200] * 30


def test_another_network_is_not_throttled(proxied: httpx.Client, home: str) -> None:
    assert statuses(proxied, FREE + 1, "ann", home) == [401] * FREE + [429]
    neighbour = home.removesuffix("7") + "200"
    assert attempt(proxied, "ann", "ann-secret", neighbour).status_code == 429
    assert attempt(proxied, "ann", "ann-secret", "198.51.100.7").status_code == 200
    assert attempt(proxied, "ann", "ann-secret").status_code == 200
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 429


def test_an_ipv6_network_is_a_64_prefix(proxied: httpx.Client) -> None:
    for number in range(FREE):
        assert attempt(proxied, "ann", "wrong", f"2001:db8:0:1:{number + 1:x}::7").status_code == 401
    assert attempt(proxied, "ann", "wrong", "[2001:db8:0:1:ffff::8]:4711").status_code == 429
    assert attempt(proxied, "ann", "wrong", "2001:db8:0:2::7").status_code == 401


def test_a_mapped_address_counts_as_its_ipv4_address(proxied: httpx.Client, home: str) -> None:
    assert statuses(proxied, FREE, "ann", f"::ffff:{home}") == [401] * FREE
    assert attempt(proxied, "ann", "wrong", home).status_code == 429


def test_a_forwarded_address_is_not_trusted_by_default(server: Server, client: httpx.Client) -> None:
    answers = []
    for number in range(FREE + 1):
        spoofed = f"198.51.{number}.7"
        headers = {"X-Forwarded-For": spoofed, "X-Real-IP": spoofed, "Forwarded": f"for={spoofed}"}
        credentials = {"username": "ann", "password": "wrong"}
        answers.append(client.post("/api/token", json=credentials, headers=headers).status_code)
    assert answers == [401] * FREE + [429]
    (noticed,) = server.events("forwarded_for_ignored")
    assert noticed["peer"] == "127.0.0.0/24"
    assert "trusted_proxies" in noticed["action"]
    token = log_in(client, "bob", "bob-secret", headers={"X-Forwarded-For": "198.51.100.7"})
    assert client.get("/api/tokens", headers={"X-Token": token}).json()["tokens"][0]["address"] == "127.0.0.1"


@pytest.mark.parametrize(
    "chain",
    [
        ("198.51.{n}.7, {home}",),
        ("198.51.{n}.7, {home}, 10.1.2.3",),
        ("198.51.{n}.7, {home}, 127.0.0.1, 10.1.2.{n}",),
        ("198.51.{n}.7", "{home}"),
        ("198.51.{n}.7, {home}, ::ffff:10.1.2.{n}",),
        ("198.51.{n}.7, {home}, [::ffff:127.0.0.1]:80{n}, 10.1.2.3",),
        ("junk {n}, {home}:{n}",),
    ],
)
def test_the_client_is_the_last_untrusted_address(proxied: httpx.Client, home: str, chain: tuple[str, ...]) -> None:
    chains = [[part.format(n=number, home=home) for part in chain] for number in range(1, FREE + 2)]
    assert [attempt(proxied, "ann", "wrong", *sent).status_code for sent in chains] == [401] * FREE + [429]
    token = log_in(proxied, "bob", "bob-secret", headers=[("X-Forwarded-For", part) for part in chains[0]])
    assert proxied.get("/api/tokens", headers={"X-Token": token}).json()["tokens"][0]["address"] == home


def test_an_invalid_forwarded_address_is_throttled(proxied: httpx.Client) -> None:
    junk: list[str | bytes] = [
        "a",
        "unknown",
        "1.2.3",
        "1.2.3.4.5",
        "256.1.1.1",
        "::zz",
        "_hidden",
        "1.2.3.4, b",
        "' OR 1=1",
        b"\xff",
    ]
    answers = [attempt(proxied, "ann", "wrong", address).status_code for address in junk]
    assert answers == [401] * FREE + [429] * (len(junk) - FREE)


@pytest.mark.parametrize("empty", ["", " ", ",", ", ,"])
def test_an_empty_forwarded_address_is_throttled(proxied: httpx.Client, empty: str) -> None:
    sent = login_bytes("ann", "wrong").replace(b"Host: x\r\n", f"Host: x\r\nX-Forwarded-For: {empty}\r\n".encode())
    port = proxied.base_url.port
    assert port is not None
    assert [exchange(port, sent)[0] for _ in range(FREE + 1)] == [401] * FREE + [429]


def fail_logins(proxied: httpx.Client, home: str, tries: int = NETWORK_FREE) -> None:
    """Fail to log in, with a new unknown name each time."""
    assert [attempt(proxied, f"name-{number}", "wrong", home).status_code for number in range(tries)] == [401] * tries


def test_failures_over_many_names_slow_unknown_clients(proxied: httpx.Client, clock: HandClock, home: str) -> None:
    fail_logins(proxied, home)
    throttled = attempt(proxied, "admin", "admin", home)
    assert (throttled.status_code, throttled.headers["retry-after"]) == (429, str(FORGET // NETWORK_FREE))
    assert attempt(proxied, "admin", "admin", "198.51.100.7").status_code == 200
    clock.advance(FORGET // NETWORK_FREE)
    assert attempt(proxied, "admin", "admin", home).status_code == 200
    assert attempt(proxied, "bob", "bob-secret", home).status_code == 200, "a success is not counted"
    assert statuses(proxied, 2, "nobody", home) == [401, 429]


def test_others_failures_do_not_slow_a_known_client(proxied: httpx.Client, home: str) -> None:
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    neighbour = home.removesuffix("7") + "200"
    fail_logins(proxied, neighbour, NETWORK_FREE - FREE)
    assert statuses(proxied, FREE, "ann", neighbour) == [401] * FREE
    assert [attempt(proxied, name, "wrong", neighbour).status_code for name in ("ann", "nobody")] == [429, 429]
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    assert attempt(proxied, "bob", "bob-secret", home).status_code == 429, "bob has not logged in from there before"
    assert statuses(proxied, FREE + 1, "ann", home) == [401] * FREE + [429]


def test_a_login_refunds_its_typo_to_the_network(proxied: httpx.Client, home: str) -> None:
    addresses = [home.removesuffix("7") + str(number) for number in range(NETWORK_FREE // 2)]
    for address in addresses:
        assert statuses(proxied, 2, "ann", address) == [401, 401]
        assert attempt(proxied, "ann", "ann-secret", address).status_code == 200
    fail_logins(proxied, home)
    assert attempt(proxied, "nobody", "wrong", home).status_code == 429


def test_a_success_refunds_only_its_own_name_and_place(proxied: httpx.Client, home: str) -> None:
    """Otherwise an attacker with one account could guess the passwords of all others without limit."""
    neighbour = home.removesuffix("7") + "200"
    for number in range(NETWORK_FREE):
        assert attempt(proxied, f"name-{number}", "wrong", home).status_code == 401
        if number < FREE:
            assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
            assert attempt(proxied, "bob", "bob-secret", neighbour).status_code == 200
    assert attempt(proxied, "admin", "admin", neighbour).status_code == 429


def test_a_client_is_known_for_thirty_days_after_a_login(proxied: httpx.Client, clock: HandClock, home: str) -> None:
    days = 86400
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    clock.advance(20 * days)
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    clock.advance(30 * days - 1)
    fail_logins(proxied, home)
    assert attempt(proxied, "ann", "wrong", home).status_code == 401
    clock.advance(1)
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 429


@pytest.mark.parametrize("name", ["ann", "nobody"])
def test_a_name_is_bounded_over_all_networks_of_an_attacker(proxied: httpx.Client, clock: HandClock, name: str) -> None:
    """A /48 has 65,536 networks with five guesses each. The limit per name is 10 guesses, then 5 an hour."""
    clock.advance(25 * 3600)
    sources = [f"2001:db8:7:{number:x}::1" for number in range(12)]
    assert [attempt(proxied, name, "wrong", source).status_code for source in sources] == [401] * 10 + [429] * 2
    clock.advance(720)
    assert [attempt(proxied, name, "wrong", source).status_code for source in sources[-2:]] == [401, 429]
    others = [f"2001:db8:{number:x}::1" for number in range(0x10, 0x80)]
    answers = [attempt(proxied, name, "wrong", source) for source in others]
    tried = sum(answer.status_code == 401 for answer in answers)
    assert tried == 20 * FREE - 11 + 2, "two of the earlier failures have been forgotten"
    assert {int(answer.headers["retry-after"]) for answer in answers[tried:]} == {360}


def test_a_flood_of_guesses_spares_known_clients(proxied: httpx.Client, home: str) -> None:
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    sources = [f"{number}.9.9.9" for number in range(1, 121)]
    answers = [attempt(proxied, "ann", "wrong", source).status_code for source in sources]
    assert answers == [401] * 100 + [429] * 20
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    assert attempt(proxied, "ann", "ann-secret", "198.51.100.7").status_code == 429


def test_a_48_prefix_is_bounded_over_all_names(proxied: httpx.Client, clock: HandClock) -> None:
    """Four times as many failures from one /48 as from one network, and as many more an hour."""
    tried = 0
    for number in range(4 * NETWORK_FREE + 1):
        tried += attempt(proxied, f"name-{number}", "wrong", f"2001:db8:9:{number:x}::1").status_code == 401
    assert tried == 4 * NETWORK_FREE
    assert attempt(proxied, "nobody", "wrong", "2001:db8:a::1").status_code == 401


@pytest.mark.parametrize("unknown", ["", "nobody"])
def test_an_unknown_name_does_not_block_its_network(
    proxied: httpx.Client, clock: HandClock, home: str, unknown: str
) -> None:
    fail_logins(proxied, home)
    clock.advance(FORGET // NETWORK_FREE)
    for name, status in [(unknown, 401), ("ann", 429)]:
        assert exchange(proxied.base_url.port or 0, login_bytes(name, "wrong", home))[0] == status


@pytest.mark.parametrize(
    ("client", "forwarded", "noticed"),
    [
        ("127.0.0.1", ["198.51.100.7"], True),
        ("127.0.0.1", ["198.51.100.7", "10.0.0.1"], True),
        ("198.51.100.7", ["198.51.100.7"], False),
        ("198.51.100.7", ["junk", "198.51.100.7:4711, 10.0.0.1"], False),
        ("::ffff:198.51.100.7", ["::ffff:198.51.100.7"], False),
        ("127.0.0.1", [], False),
    ],
)
def test_only_an_untrusted_proxy_is_logged(client: str, forwarded: list[str], noticed: bool) -> None:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    logged: set[str] = set()
    with capture_logs() as events:
        for _ in range(2):
            client_address({"client": (client, 4711), "headers": headers, "state": {LOGGED_ONCE: logged}})
    assert [event["event"] for event in events] == ["forwarded_for_ignored"] * noticed


def test_each_network_of_an_untrusted_proxy_is_logged_once() -> None:
    """At most 100 of them: strangers can send the header from any number of networks."""
    logged: set[str] = set()
    headers = [(b"x-forwarded-for", b"198.51.100.7")]
    with capture_logs() as events:
        for number in (*range(150), *range(150)):
            client_address(
                {"client": (f"10.0.{number}.{number}", 1), "headers": headers, "state": {LOGGED_ONCE: logged}}
            )
    assert [event["peer"] for event in events] == [f"10.0.{number}.0/24" for number in range(100)]
