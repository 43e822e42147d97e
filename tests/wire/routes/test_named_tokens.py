"""POST /api/tokens and POST /api/tokens/{id}/rotate: tokens that users make for programs."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.servers import HandClock, Server, log_in, probe
from tokenauth.values import new_named_value, new_value

DAY = 24 * 3600
LIMIT = 4

Header = dict[str, str]


@pytest.fixture(scope="module")
def settings() -> str:
    return f"""
        [tokens]
        per_user = 6
        named_ttl = "10d"
        max_named_ttl = "30d"
        named_per_user = {LIMIT}

        [pools.open]
        capacity = 5
        prefill = true

        [pools.narrow]
        capacity = 5
        prefill = true
        scope = "write"
    """


@pytest.fixture(autouse=True)
def _next_month(clock: HandClock) -> None:
    """Expire all named tokens."""
    clock.advance(31 * DAY)


@pytest.fixture
def ann(client: httpx.Client) -> Header:
    """Log in as a user with the scopes `read` and `write`."""
    return header(log_in(client, "ann", "ann-secret"))


@pytest.fixture
def admin(client: httpx.Client) -> Header:
    return header(log_in(client))


def header(token: str) -> Header:
    return {"X-Token": token}


def post(client: httpx.Client, who: Header, **body: Any) -> httpx.Response:
    return client.post("/api/tokens", headers=who, json=body)


def make(client: httpx.Client, who: Header, name: str = "nightly", **body: Any) -> dict[str, Any]:
    answer = post(client, who, name=name, **body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def rotate(client: httpx.Client, who: Header, id: str, **body: Any) -> httpx.Response:
    return client.post(f"/api/tokens/{id}/rotate", headers=who, json=body)


def me(client: httpx.Client, token: str) -> dict[str, Any]:
    answer = client.get("/api/me", headers=header(token))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def listed(client: httpx.Client, who: Header) -> list[dict[str, Any]]:
    return list(client.get("/api/tokens", headers=who).json()["tokens"])


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]


def test_a_named_token_works_on_every_worker(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock, ann: Header
) -> None:
    answer = post(client, ann, name="nightly", scopes=["read"], ttl="2d")
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    end = int(clock()) + 2 * DAY
    token = made.pop("token")
    assert made == {"id": made["id"], "name": "nightly", "scopes": ["read"], "expiry_time": end}
    for each in (client, sibling_client):
        assert me(each, token) == {
            "username": "ann",
            "scopes": ["read"],
            "kind": "named",
            "name": "nightly",
            "id": made["id"],
            "issued_at": int(clock()),
            "expiry_time": end,
        }
        assert each.get("/api/token", headers=header(token)).json() == {"valid": True, "expiry_time": end}


def test_a_named_value_is_64_letters_with_a_checksum(client: httpx.Client, ann: Header) -> None:
    token = make(client, ann)["token"]
    assert re.fullmatch(r"tkn[A-Za-z0-9]{61}", token)
    assert re.fullmatch(r"[A-Za-z0-9]{64}", log_in(client))


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [
        ({}, 10 * DAY),
        ({"ttl": None}, 10 * DAY),
        ({"ttl": 1}, 1),
        ({"ttl": 3600}, 3600),
        ({"ttl": "1"}, 1),
        ({"ttl": "90s"}, 90),
        ({"ttl": "1.5h"}, 5400),
        ({"ttl": "30d"}, 30 * DAY),
        ({"ttl": 30 * DAY}, 30 * DAY),
    ],
)
def test_a_token_ends_after_its_ttl_to_the_second(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock, ann: Header, ttl: Any, seconds: int
) -> None:
    made = make(client, ann, **ttl)
    assert made["expiry_time"] == int(clock()) + seconds
    clock.set(made["expiry_time"] - 0.001)
    assert probe(client, made["token"])
    assert probe(sibling_client, made["token"])
    clock.set(made["expiry_time"])
    assert not probe(client, made["token"])
    assert not probe(sibling_client, made["token"])


@pytest.mark.parametrize(
    "ttl",
    ["30.1d", "31d", "1y", 30 * DAY + 1, 10**30, "9" * 400, 0, -1, 0.5, "0s", "", "d", "1 week", "∞", True, [], {}],
)
def test_no_token_lives_longer_than_the_maximum(client: httpx.Client, ann: Header, ttl: object) -> None:
    assert refusal(post(client, ann, name="nightly", ttl=ttl)) == (400, "invalid_request")
    assert len(listed(client, ann)) == 1


def test_without_scopes_it_has_all_of_the_user_s(client: httpx.Client, ann: Header) -> None:
    made = make(client, ann)
    assert made["scopes"] is None
    assert me(client, made["token"])["scopes"] == ["read", "write"]
    none = make(client, ann, "no scopes", scopes=[])
    assert none["scopes"] == []
    assert me(client, none["token"])["scopes"] == []
    twice = make(client, ann, "twice", scopes=["write", "read", "write"])
    assert me(client, twice["token"])["scopes"] == ["read", "write"]


@pytest.mark.parametrize(
    ("scopes", "named", "logged"),
    [
        (["admin"], "admin", "admin"),
        (["read", "admin"], "admin", "admin"),
        (["READ"], "READ", "(unknown)"),
        (["x" * 31, "x" * 64], "(unknown)", "(unknown)"),
        (["nobody-has-this", "admin", "admin"], "nobody-has-this admin", "(unknown) admin"),
    ],
)
def test_a_scope_that_the_user_lacks_is_refused(
    client: httpx.Client, server: Server, ann: Header, scopes: list[str], named: str, logged: str
) -> None:
    answer = post(client, ann, name="nightly", scopes=scopes)
    assert refusal(answer) == (403, "insufficient_scope")
    assert answer.json()["error_description"] == (
        f"You do not have the scope{'s' * (' ' in named)} {named}. Yours are: read write."
    )
    assert answer.headers["www-authenticate"] == 'Bearer realm="tokenauth", error="insufficient_scope"'
    assert len(listed(client, ann)) == 1
    assert server.events("access_denied")[-1]["scope"] == logged, "other text may be a secret"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "x" * 65},
        {"name": " nightly"},
        {"name": "nightly "},
        {"name": " "},
        {"name": "night\nly"},
        {"name": "night\x00ly"},
        {"name": "night\u202ely"},
        {"name": "\u200b"},
        {"name": "nightly\u3164"},
        {"name": "\u2800"},
        {"name": None},
        {"name": 5},
        {"name": new_value()},
        {"name": new_named_value()},
        {"name": "nightly", "scopes": ["read write"]},
        {"name": "nightly", "scopes": [""]},
        {"name": "nightly", "scopes": ['re"ad']},
        {"name": "nightly", "scopes": "read"},
        {"name": "nightly", "scopes": [None]},
        {"name": "nightly", "scope": ["read"]},
        {"name": "nightly", "expires": "never"},
    ],
)
def test_a_malformed_request_makes_no_token(client: httpx.Client, ann: Header, body: dict[str, Any]) -> None:
    answer = client.post("/api/tokens", headers=ann, json=body)
    assert refusal(answer) == (400, "invalid_request")
    assert new_value().isalnum()
    assert not any(len(word) >= 64 for word in re.findall(r"\w+", answer.text)), "a secret is not repeated"
    assert len(listed(client, ann)) == 1


@pytest.mark.parametrize("name", ["a", "x y" + "z" * 61, "Größe 3 / prod", "日本", "'; DROP TABLE tokens --"])
def test_a_name_comes_back_as_it_was_given(client: httpx.Client, ann: Header, name: str) -> None:
    assert me(client, make(client, ann, name)["token"])["name"] == name


def test_only_a_full_login_makes_tokens(client: httpx.Client, ann: Header) -> None:
    made = make(client, ann)
    form = {"grant_type": "client_credentials", "scope": "read write"}
    narrowed = client.post("/oauth/token", data=form, auth=("ann", "ann-secret")).json()["access_token"]
    for token in (made["token"], narrowed):
        assert refusal(post(client, header(token), name="another")) == (403, "forbidden")
        assert refusal(rotate(client, header(token), made["id"])) == (403, "forbidden")
    full = client.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=("ann", "ann-secret")).json()
    assert make(client, header(full["access_token"]), "by a client")
    assert post(client, {}, name="another").status_code == 401
    assert probe(client, made["token"])


def test_a_name_is_taken_while_its_token_lives(client: httpx.Client, clock: HandClock, ann: Header) -> None:
    first = make(client, ann)
    assert refusal(post(client, ann, name="nightly")) == (409, "name_taken")
    assert make(client, header(log_in(client, "bob", "bob-secret")))
    client.delete(f"/api/tokens/{first['id']}", headers=ann)
    second = make(client, ann, ttl=60)
    clock.advance(60)
    assert not probe(client, second["token"])
    assert make(client, ann)


def test_of_one_name_at_once_one_is_made(client: httpx.Client, sibling_client: httpx.Client, ann: Header) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: post((client, sibling_client)[n % 2], ann, name="nightly"), range(8)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
    assert sum(entry["kind"] == "named" for entry in listed(client, ann)) == 1


def test_one_too_many_is_refused_and_ends_nobody(
    client: httpx.Client, sibling_client: httpx.Client, ann: Header
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: post((client, sibling_client)[n % 2], ann, name=f"job {n}"), range(9)))
    made = [answer.json()["token"] for answer in answers if answer.status_code == 201]
    assert len(made) == LIMIT
    assert {refusal(answer) for answer in answers if answer.status_code != 201} == {(409, "too_many_tokens")}
    assert all(probe(sibling_client, token) for token in made)


def test_logins_and_named_tokens_have_their_own_limits(client: httpx.Client, ann: Header) -> None:
    made = [make(client, ann, f"job {number}")["token"] for number in range(LIMIT)]
    logins = [log_in(client, "ann", "ann-secret") for _ in range(6)]
    assert all(probe(client, token) for token in [*made, *logins])
    assert not probe(client, ann["X-Token"]), "the oldest login ended"


def test_kind_chooses_what_ends(client: httpx.Client, sibling_client: httpx.Client) -> None:
    for query, ended in [
        ("", {"login"}),
        ("?kind=login", {"login"}),
        ("?kind=named", {"named"}),
        ("?kind=all", {"login", "named"}),
        ("?kind=named&keep=current", {"named"}),
        ("?kind=all&keep=current", {"named"}),
    ]:
        ann = header(log_in(client, "ann", "ann-secret"))
        name = f"job{query}"
        tokens = {"login": ann["X-Token"], "named": make(client, ann, name)["token"]}
        assert all(probe(sibling_client, token) for token in tokens.values())
        answer = client.delete(f"/api/tokens{query}", headers=ann)
        assert answer.json() == {"revoked": len(ended)}, query
        for each in (client, sibling_client):
            assert {kind for kind, token in tokens.items() if not probe(each, token)} == ended, query
        for token in tokens.values():
            client.delete("/api/token", headers=header(token))


@pytest.mark.parametrize(
    ("query", "kinds"),
    [
        ("", ["named", "login"]),
        ("?kind=all", ["named", "login"]),
        ("?kind=login", ["login"]),
        ("?kind=named", ["named"]),
    ],
)
def test_kind_chooses_what_is_listed(client: httpx.Client, ann: Header, query: str, kinds: list[str]) -> None:
    make(client, ann)
    answer = client.get(f"/api/tokens{query}", headers=ann)
    assert [entry["kind"] for entry in answer.json()["tokens"]] == kinds


@pytest.mark.parametrize("kind", ["", "logins", "Named", "named,login", "login&kind=named"])
def test_an_unknown_kind_lists_nothing(client: httpx.Client, ann: Header, kind: str) -> None:
    assert refusal(client.get(f"/api/tokens?kind={kind}", headers=ann)) == (400, "invalid_request")


@pytest.mark.parametrize("kind", ["", "logins", "Named", "named,login", "login&kind=named"])
def test_an_unknown_kind_ends_nothing(client: httpx.Client, ann: Header, kind: str) -> None:
    made = make(client, ann)
    assert refusal(client.delete(f"/api/tokens?kind={kind}", headers=ann)) == (400, "invalid_request")
    assert probe(client, made["token"])
    assert probe(client, ann["X-Token"])


def test_the_list_says_what_each_token_is(client: httpx.Client, clock: HandClock, ann: Header) -> None:
    made = make(client, ann, scopes=["read"])
    named, login = listed(client, ann)
    assert named == {
        "id": made["id"],
        "user": "ann",
        "kind": "named",
        "name": "nightly",
        "scopes": ["read"],
        "issued_at": int(clock()),
        "expiry_time": made["expiry_time"],
        "last_used_at": None,
        "address": "127.0.0.1",
        "user_agent": named["user_agent"],
        "current": False,
    }
    assert (login["kind"], login["name"], login["scopes"], login["current"]) == ("login", None, None, True)
    assert made["token"] not in client.get("/api/tokens", headers=ann).text


def test_a_narrowed_admin_acts_for_nobody_else(client: httpx.Client, admin: Header, ann: Header) -> None:
    weak, strong = make(client, admin, "weak", scopes=[]), make(client, admin, "strong", scopes=["admin"])
    for path in ("/api/tokens?user=ann", f"/api/tokens/{make(client, ann)['id']}?user=ann"):
        assert refusal(client.delete(path, headers=header(weak["token"]))) == (403, "insufficient_scope")
    assert client.get("/api/tokens?user=ann", headers=header(strong["token"])).status_code == 200


def test_an_admin_rotates_only_their_own_tokens(client: httpx.Client, admin: Header, ann: Header) -> None:
    """Otherwise they would get a token of another user."""
    made = make(client, ann)
    assert refusal(rotate(client, admin, made["id"])) == (404, "not_found")
    assert client.post(f"/api/tokens/{made['id']}/rotate?user=ann", headers=admin).status_code == 400
    assert probe(client, made["token"])


def test_pools_and_proxies_see_the_scopes_of_the_token(client: httpx.Client, ann: Header) -> None:
    read, write = (make(client, ann, scope, scopes=[scope])["token"] for scope in ("read", "write"))
    for token, status in [(read, 403), (write, 201)]:
        assert client.post("/api/pools/narrow/leases", headers=header(token)).status_code == status
        assert client.post("/api/pools/open/leases", headers=header(token)).status_code == 201
    names = [
        [pool["name"] for pool in client.get("/api/pools", headers=header(token)).json()["pools"]]
        for token in (read, write)
    ]
    assert names == [["open"], ["open", "narrow"]]
    for scope, status in [("read", 200), ("write", 403)]:
        answer = client.get("/auth", params={"scope": scope}, headers=header(read))
        assert answer.status_code == status
    assert client.get("/auth", headers=header(read)).headers["x-auth-scopes"] == "read"
    assert client.get("/auth", headers=ann).headers["x-auth-scopes"] == "read write"


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "application/json"])
def test_a_leak_is_ended_by_anyone_who_finds_it(
    client: httpx.Client, sibling_client: httpx.Client, ann: Header, kind: str | None
) -> None:
    made = [make(client, ann, name)["token"] for name in ("one", "two")]
    text = f"2026-11-28 curl -H 'X-Token: {made[0]}' https://example.com\n+ TOKEN={made[1]} ./nightly\n"
    headers = {"Content-Type": kind} if kind else {}
    answer = client.request("DELETE", "/api/token", content=text, headers=headers)
    assert answer.json() == {"valid": False, "expiry_time": None}
    assert not any(probe(sibling_client, token) for token in made)


@pytest.mark.parametrize(
    "ttl", ["1e3", "1e400", "-0", "01", "1" * 5000, '"\\ud800"', '"1\\u0000d"', '"\u0663d"', "[[[[]]]]"]
)
def test_no_odd_number_makes_a_server_error(client: httpx.Client, ann: Header, ttl: str) -> None:
    for path in ("/api/tokens", "/api/tokens/x/rotate"):
        body = f'{{"name": "odd", "ttl": {ttl}}}' if path.endswith("tokens") else f'{{"overlap": {ttl}}}'
        headers = {**ann, "Content-Type": "application/json"}
        answer = client.post(path, content=body.encode(), headers=headers)
        assert answer.status_code in {201, 400, 404}, answer.text


def test_a_rotated_token_has_a_successor(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock, ann: Header
) -> None:
    old = make(client, ann, scopes=["read"], ttl="5d")
    assert probe(sibling_client, old["token"])
    clock.advance(DAY)
    ann = header(log_in(client, "ann", "ann-secret"))
    answer = rotate(client, ann, old["id"])
    assert answer.status_code == 201
    new = answer.json()
    assert new["token"] != old["token"]
    assert (new["name"], new["scopes"], new["expiry_time"]) == ("nightly", ["read"], int(clock()) + 5 * DAY)
    for each in (sibling_client, client):
        assert not probe(each, old["token"])
        assert me(each, new["token"])["scopes"] == ["read"]


@pytest.mark.parametrize("overlap", ["1h", 3600, "3600"])
def test_an_overlap_ends_to_the_second_in_every_cache(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock, ann: Header, overlap: object
) -> None:
    old = make(client, ann)
    for each in (client, sibling_client):
        assert probe(each, old["token"])
    new = rotate(client, ann, old["id"], overlap=overlap).json()
    end = int(clock()) + 3600
    for each in (client, sibling_client):
        assert each.get("/api/token", headers=header(old["token"])).json() == {"valid": True, "expiry_time": end}
        assert each.get("/auth", headers=header(old["token"])).headers["x-auth-expires"] == str(end)
    assert [entry["expiry_time"] for entry in listed(client, ann)][:2] == [new["expiry_time"], end]
    clock.set(end - 0.001)
    assert all(probe(each, old["token"]) for each in (client, sibling_client))
    clock.set(end)
    assert not any(probe(each, old["token"]) for each in (client, sibling_client))
    assert all(probe(each, new["token"]) for each in (client, sibling_client))


def test_an_overlap_never_lengthens_a_life(client: httpx.Client, clock: HandClock, ann: Header) -> None:
    old = make(client, ann, ttl=60)
    new = rotate(client, ann, old["id"], overlap="30d").json()
    assert new["expiry_time"] == int(clock()) + 60
    assert me(client, old["token"])["expiry_time"] == old["expiry_time"]


def test_a_token_is_rotated_once(client: httpx.Client, ann: Header) -> None:
    old = make(client, ann)
    new = rotate(client, ann, old["id"], overlap="1h").json()
    assert refusal(rotate(client, ann, old["id"], overlap="1h")) == (409, "already_rotated")
    assert refusal(post(client, ann, name="nightly")) == (409, "name_taken")
    newest = rotate(client, ann, new["id"]).json()
    assert [probe(client, each["token"]) for each in (old, new, newest)] == [True, False, True]
    assert refusal(rotate(client, ann, new["id"])) == (404, "not_found")
    assert client.delete(f"/api/tokens/{newest['id']}", headers=ann).status_code == 204
    assert refusal(rotate(client, ann, old["id"])) == (409, "already_rotated"), "it would live only for an hour"


def test_only_a_live_named_token_is_rotated(client: httpx.Client, clock: HandClock, ann: Header) -> None:
    login = next(entry["id"] for entry in listed(client, ann) if entry["current"])
    made = make(client, ann, ttl=60)
    for id in (login, "0" * 24, "nightly", made["id"].upper(), made["id"][:-1]):
        assert refusal(rotate(client, ann, id)) == (404, "not_found")
    clock.advance(60)
    assert refusal(rotate(client, ann, made["id"])) == (404, "not_found")


@pytest.mark.parametrize("overlap", [-1, "-1s", "soon", "1w", 1.5, None, True, "99999d", 10**30])
def test_a_malformed_overlap_changes_nothing(client: httpx.Client, ann: Header, overlap: object) -> None:
    made = make(client, ann)
    assert refusal(rotate(client, ann, made["id"], overlap=overlap)) == (400, "invalid_request")
    assert refusal(rotate(client, ann, made["id"], overlp=1)) == (400, "invalid_request")
    assert me(client, made["token"])["expiry_time"] == made["expiry_time"]
    assert len(listed(client, ann)) == 2


def test_of_rotations_at_once_one_succeeds(client: httpx.Client, sibling_client: httpx.Client, ann: Header) -> None:
    made = make(client, ann)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: rotate((client, sibling_client)[n % 2], ann, made["id"]), range(6)))
    assert sorted(answer.status_code for answer in answers)[:1] == [201]
    assert sum(answer.status_code == 201 for answer in answers) == 1
    assert sum(entry["kind"] == "named" for entry in listed(client, ann)) == 1


def test_named_tokens_are_logged_without_their_value(client: httpx.Client, server: Server, ann: Header) -> None:
    made = make(client, ann, "logged")
    new = rotate(client, ann, made["id"], overlap=60).json()
    issued, rotated = server.events("named_token_issued")[-1], server.events("named_token_rotated")[-1]
    common = {"user": "ann", "name": "logged", "scopes": None, "network": "127.0.0.0/24", "level": "info"}
    for event in (issued, rotated):
        del event["timestamp"]
    assert [event.pop("expires_at") for event in (issued, rotated)] == [made["expiry_time"], new["expiry_time"]]
    assert issued == {"event": "named_token_issued", "id": made["id"], **common}
    assert rotated == {"event": "named_token_rotated", "id": made["id"], "new_id": new["id"], "overlap": 60, **common}
    text = server.log.read_text()
    assert made["token"] not in text
    assert new["token"] not in text


@pytest.mark.parametrize(
    "ttl", ["\u0661\u0662h", "5 ", "1 h", "1.999s", "0.5s", "1\n", "9" * 5000, "1." + "0" * 40 + "1h"]
)
def test_a_ttl_is_ascii_and_whole_seconds(client: httpx.Client, ann: Header, ttl: str) -> None:
    assert refusal(post(client, ann, name="nightly", ttl=ttl)) == (400, "invalid_request")


def test_composed_and_decomposed_names_are_one(client: httpx.Client, ann: Header) -> None:
    made = make(client, ann, "cafe\N{COMBINING ACUTE ACCENT}")
    assert made["name"] == "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert post(client, ann, name=made["name"]).status_code == 409
