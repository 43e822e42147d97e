"""Wrong passwords make the next try wait: the same for every name, for one network only, and on every worker."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx
import pytest

from tests.support.servers import HandClock, Server, exchange, log_in, probe, worker, write_config
from tokenauth.web import requests

FREE = 5
NETWORK_FREE = 100
FORGET = 3600
LONGEST = 900

_networks = count(1)

WIDE_ADMIN = "".join(chr(ord(letter) + 0xFEE0) for letter in "admin")
"""The name in full-width letters, which mean the same."""


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Let every failed login be forgotten, so that tests do not meet."""
    clock.advance(25 * 3600)


@pytest.fixture(scope="module")
def settings() -> str:
    return "[server]\nworkers = 2"


@pytest.fixture(scope="module")
def proxy(directory: Path, clock: HandClock) -> Iterator[Server]:
    """Run a worker that believes this machine about whom a request is from."""
    behind = directory / "proxied"
    behind.mkdir()
    with worker(write_config(behind, '[server]\ntrusted_proxies = ["127.0.0.1", "10.0.0.0/8"]'), clock) as running:
        yield running


@pytest.fixture(scope="module")
def proxied(proxy: Server) -> Iterator[httpx.Client]:
    with proxy.client() as connected:
        yield connected


@pytest.fixture
def home() -> str:
    """Think of an address in a network of its own."""
    return f"203.0.{next(_networks)}.7"


def attempt(
    client: httpx.Client, username: str = "ann", password: str = "wrong", *forwarded: str | bytes
) -> httpx.Response:
    """Try to log in, perhaps through proxies that say for whom."""
    headers = [(b"X-Forwarded-For", held.encode() if isinstance(held, str) else held) for held in forwarded]
    return client.post("/api/token", json={"username": username, "password": password}, headers=headers)


def statuses(client: httpx.Client, tries: int, username: str = "ann", *forwarded: str) -> list[int]:
    """Try a wrong password some times."""
    return [attempt(client, username, "wrong", *forwarded).status_code for _ in range(tries)]


def login_bytes(username: str, password: str, forwarded: str = "") -> bytes:
    """Write a login as it goes over the wire."""
    body = f'{{"username": "{username}", "password": "{password}"}}'.encode()
    extra = f"X-Forwarded-For: {forwarded}\r\n" if forwarded else ""
    return f"POST /api/token HTTP/1.1\r\nHost: x\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


def all_at_once(ports: Sequence[int], tries: int, sent: bytes) -> list[int]:
    """Send the same bytes over many connections at the same time, to the ports in turn."""
    with ThreadPoolExecutor(tries) as crowd:
        return sorted(crowd.map(lambda number: exchange(ports[number % len(ports)], sent)[0], range(tries)))


def test_after_five_failures_even_the_right_one_waits(client: httpx.Client, clock: HandClock) -> None:
    assert statuses(client, FREE) == [401] * FREE
    for password in ("wrong", "ann-secret"):
        held_up = attempt(client, "ann", password)
        assert held_up.status_code == 429
        assert held_up.headers["retry-after"] == "1"
        assert held_up.headers["cache-control"] == "no-store"
        assert held_up.json()["error"] == "too_many_attempts"
    clock.advance(1)
    assert attempt(client, "ann", "ann-secret").status_code == 200


def test_a_try_that_is_held_up_costs_nothing(client: httpx.Client, clock: HandClock) -> None:
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


def test_a_success_clears_what_was_counted(client: httpx.Client) -> None:
    for _ in range(3):
        assert statuses(client, FREE - 1) == [401] * (FREE - 1)
        assert attempt(client, "ann", "ann-secret").status_code == 200
    assert statuses(client, FREE + 1) == [401] * FREE + [429]


@pytest.mark.parametrize("nobody", ["nobody", "", "x" * 256, "*"])
def test_known_and_unknown_names_are_answered_alike(client: httpx.Client, clock: HandClock, nobody: str) -> None:
    def answers(username: str) -> list[tuple[int, bytes, dict[str, str]]]:
        seen = []
        for step in (0, 0, 0, 0, 0, 0, 0, 1, 0, 1.5, 0.5, 0, 4, 0):
            clock.advance(step)
            answer = attempt(client, username)
            headers = {name: value for name, value in answer.headers.items() if name != "date"}
            seen.append((answer.status_code, answer.content, headers))
        return seen

    known, unknown = answers("ann"), answers(nobody)
    assert known == unknown
    assert {status for status, _, _ in known} == {401, 429}


def test_names_are_counted_apart(client: httpx.Client) -> None:
    assert statuses(client, FREE - 1) == [401] * (FREE - 1)
    log_in(client, "bob", "bob-secret")
    assert statuses(client, 2) == [401, 429]
    log_in(client, "bob", "bob-secret")


@pytest.mark.parametrize("variant", ["ADMIN", "Admin", "aDmIn", WIDE_ADMIN, WIDE_ADMIN.upper()])
def test_variants_of_a_name_are_one_user_and_counted_as_one(
    client: httpx.Client, clock: HandClock, variant: str
) -> None:
    assert statuses(client, FREE - 2, variant) == [401] * (FREE - 2)
    assert statuses(client, 3, "admin") == [401, 401, 429]
    assert attempt(client, variant, "admin").status_code == 429
    clock.advance(1)
    token = log_in(client, variant)
    assert client.get("/api/me", headers={"X-Token": token}).json()["username"] == "admin"


def test_a_token_that_was_issued_is_never_touched(client: httpx.Client, sibling_client: httpx.Client) -> None:
    token = log_in(client, "ann", "ann-secret")
    assert statuses(client, FREE + 1)[-1] == 429
    for asked in (client, sibling_client):
        assert probe(asked, token)
        assert asked.get("/api/me", headers={"X-Token": token}).status_code == 200
    client.request("DELETE", "/api/token", json={"token": token})
    assert not probe(sibling_client, token)


def test_workers_of_one_database_count_together(client: httpx.Client, sibling_client: httpx.Client) -> None:
    assert statuses(client, 3) == [401] * 3
    assert statuses(sibling_client, 3) == [401, 401, 429]
    assert attempt(client).status_code == 429
    log_in(sibling_client, "bob", "bob-secret")


def test_what_was_counted_survives_a_restart(tmp_path: Path, clock: HandClock) -> None:
    config = write_config(tmp_path)
    with worker(config, clock) as first, first.client() as client:
        assert statuses(client, FREE) == [401] * FREE
        first.stop()
    with worker(config, clock) as second, second.client() as client:
        assert attempt(client, "ann", "ann-secret").status_code == 429
        clock.advance(1)
        assert attempt(client, "ann", "ann-secret").status_code == 200


@pytest.mark.parametrize(("pause", "then"), [(FORGET - 1, [401, 429]), (FORGET, [401] * FREE + [429])])
def test_what_was_counted_is_forgotten_after_an_hour(
    client: httpx.Client, clock: HandClock, pause: float, then: list[int]
) -> None:
    statuses(client, FREE)
    clock.advance(pause)
    assert statuses(client, len(then)) == then


def test_concurrent_wrong_guesses_do_not_pass_the_limit(proxy: Server, home: str) -> None:
    answered = all_at_once([proxy.port], 100, login_bytes("ann", "wrong", home))
    assert answered[:FREE] == [401] * FREE
    assert set(answered[FREE:]) <= {429, 503}, "503 is for those that the login queue has no room for"


def test_two_workers_let_through_at_most_one_share_more(server: Server, sibling: Server, clock: HandClock) -> None:
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


def test_another_network_is_not_held_up(proxied: httpx.Client, home: str) -> None:
    assert statuses(proxied, FREE + 1, "ann", home) == [401] * FREE + [429]
    neighbour = home.removesuffix("7") + "200"
    assert attempt(proxied, "ann", "ann-secret", neighbour).status_code == 429
    assert attempt(proxied, "ann", "ann-secret", "198.51.100.7").status_code == 200
    assert attempt(proxied, "ann", "ann-secret").status_code == 200
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 429


def test_a_network_of_ipv6_is_64_bits_wide(proxied: httpx.Client) -> None:
    for number in range(FREE):
        assert attempt(proxied, "ann", "wrong", f"2001:db8:0:1:{number + 1:x}::7").status_code == 401
    assert attempt(proxied, "ann", "wrong", "[2001:db8:0:1:ffff::8]:4711").status_code == 429
    assert attempt(proxied, "ann", "wrong", "2001:db8:0:2::7").status_code == 401


def test_a_mapped_address_is_the_ipv4_address_that_it_maps(proxied: httpx.Client, home: str) -> None:
    assert statuses(proxied, FREE, "ann", f"::ffff:{home}") == [401] * FREE
    assert attempt(proxied, "ann", "wrong", home).status_code == 429


def test_a_forwarded_address_is_not_believed_by_default(server: Server, client: httpx.Client) -> None:
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
    answers = [attempt(proxied, "ann", "wrong", held).status_code for held in junk]
    assert answers == [401] * FREE + [429] * (len(junk) - FREE)


@pytest.mark.parametrize("empty", ["", " ", ",", ", ,"])
def test_an_empty_forwarded_address_is_throttled(proxied: httpx.Client, empty: str) -> None:
    sent = login_bytes("ann", "wrong").replace(b"Host: x\r\n", f"Host: x\r\nX-Forwarded-For: {empty}\r\n".encode())
    port = proxied.base_url.port
    assert port is not None
    assert [exchange(port, sent)[0] for _ in range(FREE + 1)] == [401] * FREE + [429]


def spend(proxied: httpx.Client, home: str, tries: int = NETWORK_FREE) -> None:
    """Fail to log in with names that nobody has."""
    assert [attempt(proxied, f"name-{number}", "wrong", home).status_code for number in range(tries)] == [401] * tries


def test_failures_over_many_names_slow_unknown_clients(proxied: httpx.Client, clock: HandClock, home: str) -> None:
    spend(proxied, home)
    held_up = attempt(proxied, "admin", "admin", home)
    assert (held_up.status_code, held_up.headers["retry-after"]) == (429, "36")
    assert attempt(proxied, "admin", "admin", "198.51.100.7").status_code == 200
    clock.advance(36)
    assert attempt(proxied, "admin", "admin", home).status_code == 200
    assert attempt(proxied, "bob", "bob-secret", home).status_code == 200, "a success takes nothing"
    assert statuses(proxied, 2, "nobody", home) == [401, 429]


def test_others_failures_do_not_slow_a_known_client(proxied: httpx.Client, home: str) -> None:
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    neighbour = home.removesuffix("7") + "200"
    spend(proxied, neighbour, NETWORK_FREE - FREE)
    assert statuses(proxied, FREE, "ann", neighbour) == [401] * FREE
    assert [attempt(proxied, name, "wrong", neighbour).status_code for name in ("ann", "nobody")] == [429, 429]
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    assert attempt(proxied, "bob", "bob-secret", home).status_code == 429, "who never logged in there is a stranger"
    assert statuses(proxied, FREE + 1, "ann", home) == [401] * FREE + [429]


def test_a_login_refunds_its_typo_to_the_network(proxied: httpx.Client, home: str) -> None:
    places = [home.removesuffix("7") + str(number) for number in range(NETWORK_FREE // 2)]
    for place in places:
        assert statuses(proxied, 2, "ann", place) == [401, 401]
        assert attempt(proxied, "ann", "ann-secret", place).status_code == 200
    spend(proxied, home)
    assert attempt(proxied, "nobody", "wrong", home).status_code == 429


def test_a_success_refunds_only_its_own_name_and_place(proxied: httpx.Client, home: str) -> None:
    """Or whoever has a user of their own could guess at all others for as long as they like."""
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
    spend(proxied, home)
    assert attempt(proxied, "ann", "wrong", home).status_code == 401
    clock.advance(1)
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 429


@pytest.mark.parametrize("name", ["ann", "nobody"])
def test_a_name_is_bounded_over_all_networks_of_an_attacker(proxied: httpx.Client, clock: HandClock, name: str) -> None:
    """A /48 has 65,536 networks of which each had five guesses: 10 guesses now, then 5 an hour."""
    clock.advance(25 * 3600)
    sources = [f"2001:db8:7:{number:x}::1" for number in range(12)]
    assert [attempt(proxied, name, "wrong", source).status_code for source in sources] == [401] * 10 + [429] * 2
    clock.advance(720)
    assert [attempt(proxied, name, "wrong", source).status_code for source in sources[-2:]] == [401, 429]
    others = [f"2001:db8:{number:x}::1" for number in range(0x10, 0x80)]
    answers = [attempt(proxied, name, "wrong", source) for source in others]
    tried = sum(answer.status_code == 401 for answer in answers)
    assert tried == 20 * FREE - 11 + 2, "less the two that were forgotten meanwhile"
    assert {int(answer.headers["retry-after"]) for answer in answers[tried:]} == {360}


def test_a_flood_at_a_name_spares_its_known_clients(proxied: httpx.Client, home: str) -> None:
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    crowd = [f"{number}.9.9.9" for number in range(1, 121)]
    answers = [attempt(proxied, "ann", "wrong", source).status_code for source in crowd]
    assert answers == [401] * 100 + [429] * 20
    assert attempt(proxied, "ann", "ann-secret", home).status_code == 200
    assert attempt(proxied, "ann", "ann-secret", "198.51.100.7").status_code == 429


def test_a_network_of_networks_is_bounded_over_all_names(proxied: httpx.Client, clock: HandClock) -> None:
    """400 failures from one /48, then 400 an hour."""
    tried = 0
    for number in range(4 * NETWORK_FREE + 1):
        tried += attempt(proxied, f"name-{number}", "wrong", f"2001:db8:9:{number:x}::1").status_code == 401
    assert tried == 4 * NETWORK_FREE
    assert attempt(proxied, "nobody", "wrong", "2001:db8:a::1").status_code == 401


@pytest.mark.parametrize("nobody", ["", "nobody"])
def test_no_name_stops_the_logins_of_its_network(
    proxied: httpx.Client, clock: HandClock, home: str, nobody: str
) -> None:
    spend(proxied, home)
    clock.advance(36)
    for name, status in [(nobody, 401), ("ann", 429)]:
        assert exchange(proxied.base_url.port or 0, login_bytes(name, "wrong", home), timeout=3)[0] == status


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
def test_only_a_proxy_that_is_not_trusted_is_noticed(client: str, forwarded: list[str], noticed: bool) -> None:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    requests.noticed.clear()
    for _ in range(2):
        requests.client_address({"type": "http", "client": (client, 4711), "headers": headers})
    assert requests.noticed == [client] * noticed
