"""The configuration of dialects: prefixes, required tokens, and combinations that are refused."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.servers import HandClock, log_in, serve, shipped, shipped_with_dialects, write_config
from tests.system.test_cli import mistake, run
from tests.wire.dialects.conftest import API_PASSWORD, Wire, connect, reply, rows, start
from tokenauth.errors import ConfigError
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.web.app import build_app

GUARDED = f"""
[pools.permits]
capacity = 2
prefill = true
scope = "read"
[pools.uuids]
scope = "read"
manage_scope = "read"
[pools.owned]
scope = "read"
manage_scope = "read"
[dialects.simple-token-implement]
pool = "permits"
password = "{API_PASSWORD}"
require_token = true
[dialects.token-pool]
pool = "uuids"
require_token = true
[dialects.random-token-generator]
pool = "uuids"
prefix = "/v1/random-token-generator"
require_token = true
[dialects.token-management-service]
pool = "owned"
require_token = true
"""

ROUTES = [
    ("GET", "/issue_token"),
    ("POST", "/recycle_token"),
    ("GET", "/tokens"),
    ("POST", "/api/token_pool/"),
    ("DELETE", "/api/token_pool"),
    ("POST", "/api/block_token/"),
    ("POST", "/api/keep_alive/00000000-0000-4000-8000-000000000000"),
    ("POST", "/v1/random-token-generator/generate"),
    ("POST", "/v1/random-token-generator/assign"),
    ("POST", "/v1/random-token-generator/unblock"),
    ("DELETE", "/v1/random-token-generator/delete"),
    ("POST", "/v1/random-token-generator/keep-alive"),
    ("POST", "/generate-token"),
    ("POST", "/assign-token"),
    ("POST", "/keep-alive"),
    ("POST", "/unblock-token"),
    ("DELETE", "/delete-token"),
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[httpx.Client]]:
    """Run two workers whose dialects require a token, most of them at the paths of the originals."""
    home = tmp_path_factory.mktemp("guarded")
    config, clock = write_config(home, GUARDED), HandClock(home / "clock", create=True)
    with ExitStack() as stack:
        yield connect(stack, start(stack, config, clock))


@pytest.fixture(scope="module")
def tokens(guarded: Sequence[httpx.Client]) -> dict[str, str]:
    """Log in all users."""
    passwords = {"admin": "admin", "ann": "ann-secret", "bob": "bob-secret"}
    return {name: log_in(guarded[0], name, password) for name, password in passwords.items()}


def wire_of(clients: Sequence[httpx.Client], token: str) -> Wire:
    """Send requests with the token of a user."""
    return Wire(clients, X_Token=token, X_API_PASSWORD=API_PASSWORD)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_dialect_with_login_refuses_without_a_token(guarded: Sequence[httpx.Client], method: str, path: str) -> None:
    wire = Wire(guarded, X_API_PASSWORD=API_PASSWORD)
    for sent, code, challenge in (
        ({}, "token_required", 'Bearer realm="tokenauth"'),
        ({"X-Token": "u" * 64}, "invalid_token", 'Bearer realm="tokenauth", error="invalid_token"'),
    ):
        answer = wire.send(method, path, headers=sent)
        assert (answer.status_code, answer.json()["error"]) == (401, code)
        assert answer.headers["www-authenticate"] == challenge


def test_a_logged_in_user_holds_its_lease(guarded: Sequence[httpx.Client], tokens: dict[str, str]) -> None:
    wire = wire_of(guarded, tokens["ann"])
    wire.post("/api/token_pool/")
    pooled = wire.post("/api/block_token/").document["blocked_token"]
    [generated] = wire.post("/v1/random-token-generator/generate").document["tokens"]
    assert wire.post("/v1/random-token-generator/assign") == reply(200, {"token": generated})
    shown = wire.ask("GET", "/api/pools/uuids").document["tokens"]
    assert {token["token"]: token["holder"] for token in shown} == {pooled: "ann", generated: "ann"}
    assert wire.post("/v1/random-token-generator/unblock", {"token": pooled}).status == 200, "the dialects share a pool"
    assert wire.post("/api/block_token/") == reply(200, {"blocked_token": pooled})


def test_a_permit_needs_the_login_and_the_password(guarded: Sequence[httpx.Client], tokens: dict[str, str]) -> None:
    assert Wire(guarded, X_Token=tokens["ann"]).ask("GET", "/issue_token") == reply(401, {"error": "Unauthorized"})
    wire = wire_of(guarded, tokens["ann"])
    assert wire.ask("GET", "/issue_token").document["available_tokens"] == 1
    shown = wire.ask("GET", "/api/pools/permits").document["tokens"]
    assert [token["holder"] for token in shown if "holder" in token] == ["ann"]
    assert wire.ask("GET", "/recycle_token").document["available_tokens"] == 2


def test_without_capacity_a_request_makes_at_most_1000(guarded: Sequence[httpx.Client], tokens: dict[str, str]) -> None:
    wire = wire_of(guarded, tokens["ann"])
    before = wire.ask("GET", "/api/pools/uuids").document["available"]
    for count in (1001, 2**63, 2**70):
        answer = wire.post("/v1/random-token-generator/generate", {"count": count})
        assert (answer.status, answer.document["error"]) == (400, "invalid_request")
        assert "count" in answer.document["error_description"]
    assert wire.ask("GET", "/api/pools/uuids").document["available"] == before
    assert len(wire.post("/v1/random-token-generator/generate", {"count": 1000}).document["tokens"]) == 1000


def test_a_named_client_is_the_holder_for_any_login(guarded: Sequence[httpx.Client], tokens: dict[str, str]) -> None:
    wire = Wire(guarded, Authorization=f"Bearer {tokens['ann']}")
    token = wire.post("/generate-token").document["token"]
    assert wire.post("/assign-token", {"client_id": "ci-7"}) == reply(200, {"token": token})
    assert wire.post("/keep-alive", {"token": token, "client_id": "ann"}).status == 403
    assert wire.post("/keep-alive", {"token": token, "client_id": "ci-7"}).status == 200
    shown = wire.ask("GET", "/api/pools/owned").document["tokens"]
    assert [member["holder"] for member in shown] == ["ci-7"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_scoped_pool_is_closed_to_other_users(
    guarded: Sequence[httpx.Client], tokens: dict[str, str], method: str, path: str
) -> None:
    for name in ("bob", "admin"):
        answer = wire_of(guarded, tokens[name]).send(method, path)
        assert answer.status_code == 403, answer.text
        assert answer.json()["error"] == "insufficient_scope"
        assert 'scope="read"' in answer.headers["www-authenticate"]


POOL = "[pools.p]\n"
TOKEN_POOL, GENERATOR, SERVICE, SIMPLE = (
    f'[dialects.{name}]\npool = "p"\n'
    for name in ("token-pool", "random-token-generator", "token-management-service", "simple-token-implement")
)
COLLIDING = '[pools.p]\n[pools.q]\n[dialects.random-token-generator]\npool = "p"\n' + SERVICE.replace('"p"', '"q"')
FORMATS = "dialects.token-management-service.pool: the tokens in [pools.p] have the form of another dialect; give each"

MISTAKES: dict[str, tuple[str, str]] = {
    "no pools": (TOKEN_POOL, "dialects.token-pool.pool: must be one of the pools (none): there is no [pools.p]"),
    "other pools": (
        f"[pools.q]\n[pools.r]\n{SERVICE}",
        "dialects.token-management-service.pool: must be one of the pools (q, r): there is no [pools.p]",
    ),
    "permits without prefill": (
        f'{POOL}capacity = 1\n{SIMPLE}password = "x"',
        "dialects.simple-token-implement.pool: [pools.p] must have prefill = true",
    ),
    "an impossible scope": (
        f'{POOL}scope = "read"\n{GENERATOR}',
        "dialects.random-token-generator.require_token: must be true, because [pools.p] needs a scope",
    ),
    "a scope and a password": (
        f'{POOL}scope = "read"\nprefill = true\ncapacity = 1\n{SIMPLE}password = "x"',
        "dialects.simple-token-implement.require_token: must be true, because [pools.p] needs a scope",
    ),
    "no password": (f"{POOL}prefill = true\ncapacity = 1\n{SIMPLE}", "dialects.simple-token-implement.password: is "),
    "a password that does not fit into a header": (
        f'{POOL}prefill = true\ncapacity = 1\n{SIMPLE}password = "a b"', "dialects.simple-token-implement.password: ",
    ),
    "two token formats": (f"{POOL}{TOKEN_POOL}{SERVICE}", FORMATS),
    "two token formats, two prefixes": (f'{POOL}{GENERATOR}prefix = "/a"\n{SERVICE}prefix = "/b"', FORMATS),
    "one path of two dialects": (
        COLLIDING,
        "dialects.token-management-service and dialects.random-token-generator: both answer /keep-alive; ",
    ),
    "one path of two dialects with a prefix": (
        COLLIDING.replace('pool = "p"', 'prefix = "/a"\npool = "p"').replace('pool = "q"', 'prefix = "/a"\npool = "q"'),
        "dialects.token-management-service and dialects.random-token-generator: both answer /a/keep-alive; ",
    ),
    "a native path": (
        f'{POOL}{GENERATOR}prefix = "/api/pools"',
        "dialects.random-token-generator and tokenauth itself: both answer /api/pools/",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_invalid_setting_is_one_line_with_its_key(mistake: str) -> None:
    text, expected = MISTAKES[mistake]
    with pytest.raises(ConfigError) as refusal:
        build_app(create_service(loader.parse(text, {})))
    assert str(refusal.value).startswith(expected)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["token-pool", "simple-token-implement"])
def test_a_prefix_is_empty_or_a_path(name: str) -> None:
    password = 'password = "x"\n' if name == "simple-token-implement" else ""
    text = f'{POOL}prefill = true\ncapacity = 1\n[dialects.{name}]\npool = "p"\n{password}prefix = '
    for right in ("", "/x", "/v1.0/a_b~c-d"):
        build_app(create_service(loader.parse(f'{text}"{right}"', {})))
    for wrong in ("x", "/", "/x/", "x/y", "//x", "/x//y", "/x y", "/{x}", "/x?y", "/x#y", "/%41", "/é"):
        with pytest.raises(ConfigError, match=rf"^dialects\.{name}\.prefix: must be empty or a path such as"):
            loader.parse(f'{text}"{wrong}"', {})


def test_check_names_colliding_dialects_and_the_path(tmp_path: Path) -> None:
    write_config(tmp_path, COLLIDING)
    assert names_both(mistake(run(tmp_path, "check")))


def test_serve_names_colliding_dialects_and_stops(tmp_path: Path) -> None:
    write_config(tmp_path, COLLIDING)
    done = run(tmp_path, "serve", "--port", "0")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    [error] = [line for line in lines if "/keep-alive" in line]
    assert names_both(error)
    assert not any("Traceback" in line or '"started"' in line for line in lines)


def names_both(line: str) -> bool:
    """Return whether a line names both dialects and the path."""
    named = ("dialects.random-token-generator", "dialects.token-management-service", "/keep-alive")
    return all(name in line for name in named)


def test_the_shipped_dialects_use_the_environment(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(shipped_with_dialects())
    started = time.time()
    env = {"TOTAL_TOKENS": "2", "TIMER_DURATION": "90", "API_PASSWORD": "of-the-environment"}
    with serve(tmp_path / "config.toml", "--workers", "2", env=env) as server, server.client() as client:
        simple, pool, generator, service = (
            Wire([client], f"/{name}", X_API_PASSWORD=env["API_PASSWORD"])
            for name in ("simple-token-implement", "token-pool", "random-token-generator", "token-management-service")
        )
        assert simple.ask("GET", "/tokens", headers={"X-API-PASSWORD": "change-me"}).status == 401
        assert [simple.ask("GET", "/issue_token").status for _ in range(3)] == [200, 200, 429]
        assert started <= rows(tmp_path / "config.toml", "permits")[0][3] - 90 <= time.time()
        token = pool.post("/api/token_pool/").document["token"]
        assert pool.post("/api/block_token/") == reply(200, {"blocked_token": token})
        assert generator.post("/generate", {"count": 6}).status == 400
        assert len(generator.post("/generate", {"count": 5}).document["tokens"]) == 5
        made = [service.post("/generate-token") for _ in range(11)]
        assert [answer.status for answer in made] == [201] * 10 + [403]


@pytest.mark.parametrize(("name", "key"), [("TOTAL_TOKENS", "capacity"), ("TIMER_DURATION", "lease_ttl")])
def test_a_wrong_environment_value_is_named(name: str, key: str) -> None:
    for value in ("many", "-1", "1e999", "[]"):
        with pytest.raises(ConfigError, match=rf"pools\.permits\.{key}: "):
            loader.parse(shipped(), {name: value})
