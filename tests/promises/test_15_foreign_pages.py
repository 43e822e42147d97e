"""15. No foreign page can act: nothing changes through any route, whatever cookies the browser sends along."""

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import cycle, product
from pathlib import Path

import httpx
import pytest

from tests.support.browsing import Visitor, hidden
from tests.support.servers import log_in, probe, worker, write_config
from tests.wire.openapi.configurations import ALL_DIALECTS, with_dialects
from tokenauth.models import public_id
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.values import digest
from tokenauth.web.app import find_routes

SETTINGS = (
    '[browser]\nurl = "http://localhost:8000"\nreturn_to = ["http://localhost:8080"]\n'
    '[oauth]\nissuer = "http://localhost:8000"\n' + with_dialects(**ALL_DIALECTS)
)
EVIL = "https://evil.example"

PAGES: Mapping[str, Mapping[str, str]] = {
    "a foreign page": {"Origin": EVIL, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    "a foreign page, old browser": {"Origin": EVIL},
    "a sandboxed frame": {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
    "a sibling": {"Origin": "http://sibling.localhost:8000", "Sec-Fetch-Site": "same-site"},
}

LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
"""What browsers send with a link or an image, which are a GET. With a POST they always send Origin."""

FIELDS = {
    "username": "bob",
    "password": "bob-secret",
    "client_id": "bob",
    "client_secret": "bob-secret",
    "grant_type": "client_credentials",
    "csrf": "AAAAAAAAAAAAAAAAAAAAAA",
    "rd": "http://localhost:8080/",
    "name": "planted",
    "holder": "evil",
    "count": "1",
}

BODIES: Mapping[str, tuple[str | None, bytes]] = {
    "a form": ("application/x-www-form-urlencoded", str(httpx.QueryParams(FIELDS)).encode()),
    "text": ("text/plain", json.dumps(FIELDS).encode()),
    "a file": ("multipart/form-data; boundary=x", b"--x--"),
    "no type": (None, json.dumps(FIELDS).encode()),
    "nothing": (None, b""),
}


def operations() -> Sequence[tuple[str, str]]:
    """List methods and paths from the table of routes."""
    settings = loader.parse(SETTINGS, {})
    return [
        (method, route.path)
        for route in find_routes(create_service(settings))
        for method in dict.fromkeys(["GET", "POST", *route.handlers])
    ]


OPERATIONS = operations()


@pytest.fixture(scope="module")
def config_file(directory: Path) -> Path:
    return write_config(directory, SETTINGS)


@pytest.fixture(scope="module")
def victim(client: httpx.Client) -> Iterator[Visitor]:
    """Return a browser that is logged in as the administrator."""
    visitor = Visitor(client)
    assert visitor.log_in("admin", "admin").status_code == 303
    token = visitor.cookies["tokenauth"]
    yield visitor
    assert probe(client, token), "the login of the victim lives on"


def state(directory: Path) -> list[list[tuple[object, ...]]]:
    """Return what a request can change: tokens, revocations, leases, failed logins."""
    with closing(sqlite3.connect(directory / "tokenauth.db")) as database:
        return [
            database.execute(query).fetchall()
            for query in (
                "SELECT digest FROM tokens ORDER BY 1",
                "SELECT count(*) FROM revocations",
                "SELECT pool, value, holder, fence FROM pool_tokens ORDER BY 1, 2",
                "SELECT * FROM failures WHERE count > 0 ORDER BY 1",  # a login's refund may be written later
            )
        ]


def fill(path: str, token: str) -> str:
    """Return the path of a route with parameters that exist."""
    found = digest(token.encode())
    assert found is not None
    for name, value in {"id": public_id(found), "pool": "uuids", "name": "uuids", "file": "start.js"}.items():
        path = path.replace(f"{{{name}}}", value)
    return re.sub(r"\{(value|token|request|version)\}", "x", path)


def visits(method: str, every: bool) -> list[tuple[Mapping[str, str], str | None, bytes]]:
    """Return pages and bodies: each with each other, or so that each page and each body is there."""
    pages = [*PAGES.values(), *([LINK] if method == "GET" else [])]
    pairs = product(pages, BODIES.values()) if every else zip(cycle(pages), BODIES.values(), strict=False)
    return [(page, kind, body) for page, (kind, body) in pairs]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["each", "all"])
@pytest.mark.parametrize("with_cookie", [True, False], ids=["with the cookie", "without"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_no_route_lets_a_foreign_page_act(
    client: httpx.Client, victim: Visitor, directory: Path, method: str, path: str, with_cookie: bool, every: bool
) -> None:
    before = state(directory)
    address = fill(path, victim.cookies["tokenauth"])
    assert "{" not in address
    cookie = {"Cookie": "; ".join(f"{name}={value}" for name, value in victim.cookies.items())} if with_cookie else {}
    for page, kind, body in visits(method, every):
        headers = {**page, **cookie, **({"Content-Type": kind} if kind else {})}
        status = client.request(method, address, content=body, headers=headers).status_code
        client.cookies.clear()
        assert status < 500
    assert state(directory) == before


COOKIE_PAGES = {"/", "/login", "/logout"}
API = [(method, path) for method, path in OPERATIONS if path not in COOKIE_PAGES]

CONSOLE = {"X-Tokenauth-Console": "1"}
OWN_PAGE = {**CONSOLE, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}

NOT_THE_CONSOLE: Mapping[str, Mapping[str, str]] = {
    "a program": {},
    "a page of ours without the header": {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:8000"},
    "another value": {**OWN_PAGE, "X-Tokenauth-Console": "2"},
    **{f"{name} with the header": {**page, **CONSOLE} for name, page in PAGES.items()},
    "a link with the header": {**LINK, **CONSOLE},
    "an address that was typed": {**CONSOLE, "Sec-Fetch-Site": "none"},
    "a sibling, old browser": {**CONSOLE, "Origin": "http://sibling.localhost:8000"},
    "another port, old browser": {**CONSOLE, "Origin": "http://localhost:8001"},
}


def of(visitor: Visitor) -> str:
    """Return a Cookie header with the login, also under the names that other configurations use."""
    names = ("tokenauth", "__Host-tokenauth", "__Secure-tokenauth", "token", "X-Token")
    return "; ".join(f"{name}={visitor.cookies['tokenauth']}" for name in names)


@pytest.mark.parametrize(("method", "path"), API, ids=lambda part: part)
def test_the_api_reads_the_cookie_of_the_console_only(
    client: httpx.Client, victim: Visitor, method: str, path: str
) -> None:
    """Else only the pages do, and /auth where the configuration of the proxy says so."""
    address = fill(path, victim.cookies["tokenauth"])
    for page, headers in NOT_THE_CONSOLE.items():
        without = client.request(method, address, headers=headers)
        answer = client.request(method, address, headers={**headers, "Cookie": of(victim)})
        assert answer.status_code == without.status_code, page
        assert "set-cookie" not in answer.headers
        if path.startswith("/api/"):
            assert answer.content == without.content, page


OWN_ORIGIN = {"Origin": "http://localhost:8000"}


@pytest.mark.parametrize(
    "page",
    [OWN_PAGE, {**OWN_PAGE, **OWN_ORIGIN}, {**CONSOLE, **OWN_ORIGIN}, CONSOLE],
    ids=["a GET", "a POST", "a POST, old browser", "a GET, old browser"],
)
def test_the_console_uses_the_cookie(client: httpx.Client, victim: Visitor, page: dict[str, str]) -> None:
    """The comparison above would notice it."""
    answer = client.get("/api/me", headers={**page, "Cookie": of(victim)})
    assert (answer.status_code, answer.json()["username"]) == (200, "admin")
    assert client.get("/api/me", headers=page).status_code == 401
    twice = client.get("/api/me", headers={**page, "Cookie": f"{of(victim)}; tokenauth=planted"})
    assert (twice.status_code, twice.json()["error"]) == (401, "invalid_token")


def test_a_token_in_a_header_wins_over_the_cookie(client: httpx.Client, victim: Visitor) -> None:
    bob = log_in(client, "bob", "bob-secret")
    for headers in ({"X-Token": bob}, {"Authorization": f"Bearer {bob}"}):
        answer = client.get("/api/me", headers={**OWN_PAGE, **headers, "Cookie": of(victim)})
        assert answer.json()["username"] == "bob"
    assert client.get("/api/me", headers={**OWN_PAGE, "X-Token": "x", "Cookie": of(victim)}).status_code == 401


@pytest.mark.parametrize("path", ["/api/token", "/auth", "/oauth/introspect"])
def test_what_checks_tokens_never_reads_it(client: httpx.Client, victim: Visitor, path: str) -> None:
    method = "POST" if path.startswith("/oauth") else "GET"
    without = client.request(method, path, headers=OWN_PAGE)
    answer = client.request(method, path, headers={**OWN_PAGE, "Cookie": of(victim)})
    assert (answer.status_code, answer.content) == (without.status_code, without.content)
    assert answer.status_code in {400, 401}


@pytest.mark.parametrize("origin", [EVIL, "http://app.example.com:3000"], ids=["foreign", "allowed"])
def test_no_preflight_allows_the_header_of_the_console(tmp_path: Path, origin: str) -> None:
    """Not even for the origins that may call the API with a token."""
    allowed = SETTINGS + '\n[server]\ncors_origins = ["http://app.example.com:3000"]\n'
    with worker(write_config(tmp_path, allowed)) as server, server.client() as client:
        asked = {"Origin": origin, "Access-Control-Request-Method": "GET"}
        for path in ("/api/me", "/api/tokens", "/api/pools/uuids"):
            refused = client.options(
                path, headers={**asked, "Access-Control-Request-Headers": "x-tokenauth-console, x-token"}
            )
            assert refused.status_code == 400
            assert "tokenauth-console" not in refused.headers.get("access-control-allow-headers", "").lower()
            assert "access-control-allow-credentials" not in refused.headers
            plain = client.options(path, headers={**asked, "Access-Control-Request-Headers": "x-token"})
            assert plain.status_code == (400 if origin == EVIL else 200)


def test_a_form_of_the_login_page_does_change_something(client: httpx.Client, directory: Path) -> None:
    """The comparison would notice it."""
    visitor, before = Visitor(client), state(directory)
    page = visitor.get("/login").text
    form = {"username": "bob", "password": "bob-secret", "csrf": hidden(page, "csrf")}
    assert visitor.post("/login", form).status_code == 303
    after = state(directory)
    assert after != before
    log_in(client, "bob", "bob-secret")
    assert state(directory) != after
