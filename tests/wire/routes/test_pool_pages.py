"""The tokens of a pool are listed in pages, ordered by value. Each page continues after the previous one."""

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.support.connections import Connection
from tests.support.pool_users import PoolUser
from tests.support.servers import HandClock, Server

COUNT = 101


@pytest.fixture(scope="module")
def settings() -> str:
    return '[pools.p]\ntoken_ttl = "5m"\ncapacity = 2000'


@pytest.fixture
def admin(server: Server) -> Iterator[PoolUser]:
    """Log in as admin at one worker."""
    with Connection(server.port) as connection:
        yield PoolUser(connection)


@pytest.fixture
def sibling_admin(sibling: Server) -> Iterator[PoolUser]:
    """Log in as admin at the other worker."""
    with Connection(sibling.port) as connection:
        yield PoolUser(connection)


def page(user: PoolUser, query: str) -> tuple[list[str], str | None]:
    """Return the tokens of a page and its `next` cursor."""
    status, document = user.call("GET", f"/p{query}")
    assert status == 200, document
    assert list(document) == ["name", "capacity", "available", "leased", "waiting", "manager", "tokens", "next"]
    return [member["token"] for member in document["tokens"]], document["next"]


def test_an_empty_pool_has_one_page(admin: PoolUser) -> None:
    document = {"name": "p", "capacity": 2000, "available": 0, "leased": 0, "waiting": 0, "manager": True}
    document |= {"tokens": [], "next": None}
    for query in ("", "?limit=1", "?after=x"):
        assert admin.call("GET", f"/p{query}") == (200, document)


def test_a_page_has_100_tokens_by_default(admin: PoolUser, sibling_admin: PoolUser) -> None:
    tokens = sorted(admin.generate("p", COUNT))
    assert page(sibling_admin, "") == (tokens[:100], tokens[99])
    assert page(sibling_admin, f"?after={tokens[99]}") == (tokens[100:], None)
    assert page(sibling_admin, "?limit=1000") == (tokens, None)
    assert page(sibling_admin, f"?limit={COUNT}") == (tokens, None), "`next` is null when no token follows"
    assert page(sibling_admin, f"?limit={COUNT - 1}") == (tokens[:-1], tokens[-2])
    assert page(admin, "?limit=007") == (tokens[:7], tokens[6])


@pytest.mark.parametrize("limit", [1, 7, 34])
def test_the_pages_list_every_token_exactly_once(admin: PoolUser, sibling_admin: PoolUser, limit: int) -> None:
    tokens, listed = sorted(admin.generate("p", COUNT)), list[str]()
    after: str | None = ""
    while after is not None:
        some, after = page(sibling_admin if len(listed) % 2 else admin, f"?limit={limit}&after={after}")
        assert len(some) == limit or after is None
        listed += some
    assert listed == tokens


def test_a_page_continues_after_a_deleted_token(admin: PoolUser, clock: HandClock) -> None:
    first = admin.generate("p", 5)
    clock.advance(200)
    tokens = sorted(first + admin.generate("p", 5))
    assert admin.delete("p", tokens[3]) == (204, None)
    assert page(admin, f"?after={tokens[3]}") == (tokens[4:], None)
    clock.advance(100)
    rest = [token for token in tokens if token not in first and token != tokens[3]]
    assert page(admin, f"?limit={len(rest)}") == (rest, None), "expired tokens are not counted in the limit"
    assert page(admin, f"?after={tokens[0]}") == ([token for token in rest if token > tokens[0]], None)


@pytest.mark.parametrize("after", ["", "\0", " ", "~", "Z" * 64, "é", "\U0001f511", "%", "%' OR 1=1 --", "x" * 2000])
def test_a_page_may_start_after_any_value(admin: PoolUser, after: str) -> None:
    tokens = sorted(admin.generate("p", 20))
    assert page(admin, f"?after={quote(after)}") == ([token for token in tokens if token > after], None)


@pytest.mark.parametrize("query", ["after=%ff", "after=%ed%a0%80", "after", "after=x&after=x"])
def test_an_unusual_query_is_answered(admin: PoolUser, query: str) -> None:
    assert admin.call("GET", f"/p?{query}")[0] == 200


@pytest.mark.parametrize(
    "limit",
    ["", "0", "1001", "-1", "1.0", "1e2", "x", "+1", "%201", "1%00", "0x10", "1_0", "%EF%BC%91", "%C2%B9", str(2**64),
     "9" * 5000],
    ids=range(16),
)  # fmt: skip
def test_a_limit_is_a_whole_number_from_1_to_1000(admin: PoolUser, limit: str) -> None:
    status, document = admin.call("GET", f"/p?limit={limit}")
    assert (status, document["error"]) == (400, "invalid_request")
    assert document["error_description"] == "limit: must be a whole number from 1 to 1000."


@pytest.mark.parametrize("name", ["limit", "after"])
def test_two_values_of_one_parameter_are_refused(admin: PoolUser, name: str) -> None:
    status, document = admin.call("GET", f"/p?{name}=1&{name}=2")
    assert (status, document["error"]) == (400, "invalid_request")
    assert document["error_description"] == f'The query has several different values of "{name}".'
    assert admin.call("GET", f"/p?x={'x' * 8192}")[0] == 400
