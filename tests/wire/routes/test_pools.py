"""The pool routes over sockets, on two workers that share a database."""

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.support.connections import Connection
from tests.support.pool_users import Lease, PoolUser, refusal
from tests.support.servers import HandClock, Server

NAMES = ["any", "three", "waiting", "v1.2_a-b", "guarded"]
ROUTES = [
    ("GET", ""),
    ("GET", "/POOL"),
    ("POST", "/POOL/tokens"),
    ("GET", "/POOL/tokens/t"),
    ("DELETE", "/POOL/tokens/t"),
    ("POST", "/POOL/leases"),
    ("PUT", "/POOL/leases/t"),
    ("DELETE", "/POOL/leases/t"),
]


@pytest.fixture(scope="module")
def settings() -> str:
    return """
    [pools.any]
    [pools.three]
    capacity = 3
    [pools.waiting]
    token_ttl = "5m"
    lease_ttl = 90
    [pools."v1.2_a-b"]
    lease_ttl = 1.5
    [pools.guarded]
    scope = "write"
    manage_scope = "read"
    """


@pytest.fixture(scope="module")
def connections(server: Server, sibling: Server) -> Iterator[tuple[Connection, Connection]]:
    with Connection(server.port) as here, Connection(sibling.port) as other:
        yield here, other


@pytest.fixture
def admin(connections: tuple[Connection, Connection]) -> PoolUser:
    """Log in as admin at one worker, and empty all pools."""
    user = PoolUser(connections[0])
    for name in NAMES[:-1]:
        user.empty(name)
    return user


@pytest.fixture
def ann(connections: tuple[Connection, Connection]) -> PoolUser:
    """Log in at the other worker as a user with the scopes `read` and `write`."""
    return PoolUser(connections[1], "ann")


@pytest.fixture
def sibling_admin(connections: tuple[Connection, Connection]) -> PoolUser:
    """Log in as admin at the other worker."""
    return PoolUser(connections[1])


@pytest.fixture
def bob(connections: tuple[Connection, Connection]) -> PoolUser:
    """Log in at the first worker as a user without scopes."""
    return PoolUser(connections[0], "bob")


def row(
    name: str, capacity: int | None = None, available: int = 0, leased: int = 0, manager: bool = True
) -> dict[str, object]:
    """Return the listing of a pool."""
    return {
        **{"name": name, "capacity": capacity, "available": available, "leased": leased},
        **{"waiting": 0, "manager": manager},
    }


def test_pools_are_listed_with_their_token_counts(admin: PoolUser, sibling_admin: PoolUser, ann: PoolUser) -> None:
    admin.generate("any", 3)
    admin.generate("three", 2)
    sibling_admin.assign("three")
    open_to_all = [row("any", None, 3, 0), row("three", 3, 1, 1), row("waiting"), row("v1.2_a-b")]
    assert admin.call("GET") == (200, {"pools": open_to_all})
    not_managed = [{**pool, "manager": False} for pool in open_to_all]
    assert ann.call("GET") == (200, {"pools": [*not_managed, row("guarded")]})
    order = ["name", "capacity", "available", "leased", "waiting", "manager"]
    assert list(admin.ask("GET").json()["pools"][0]) == order


def test_a_user_lists_leases_and_places_in_all_pools(
    admin: PoolUser, ann: PoolUser, bob: PoolUser, clock: HandClock
) -> None:
    ann.empty("guarded")
    for pool in ("three", "any"):
        admin.generate(pool)
    mine, others = ann.assign("three", "ci-7"), bob.assign("any", "laptop")
    now = int(clock())
    for user, request in ((bob, "b"), (ann, "a")):
        wish = {"request": request, "wait": 0, "holder": f"job {request}"}
        assert user.call("POST", "/any/leases", wish)[0] == 202
    assert ann.mine() == {
        "leases": [
            {
                **{"pool": "three", "token": mine.token, "holder": "ci-7", "fence": mine.fence},
                **{"leased_at": now, "lease_expiry_time": mine.expiry_time},
            }
        ],
        "places": [
            {
                **{"pool": "any", "request": "a", "position": 2, "waiting": 2, "since": now},
                **{"holder": "job a", "count": 1},
            }
        ],
        "next": None,
    }
    assert [lease["token"] for lease in bob.mine()["leases"]] == [others.token]
    assert admin.mine() == {"leases": [], "places": [], "next": None}
    assert {pool["name"]: pool["waiting"] for pool in bob.call("GET")[1]["pools"]}["any"] == 2
    for user, request in ((ann, "a"), (bob, "b")):
        assert user.call("DELETE", f"/any/requests/{request}")[0] == 204


def test_many_leases_of_a_user_are_listed_in_pages(admin: PoolUser, ann: PoolUser, bob: PoolUser) -> None:
    for _ in range(12):
        admin.generate("any", 100)
        assert ann.call("POST", "/any/leases", {"count": 100})[0] == 201
    assert ann.call("POST", "/any/leases", {"request": "a", "wait": 0})[0] == 202
    assert bob.mine() == {"leases": [], "places": [], "next": None}
    first = ann.mine()
    assert (len(first["leases"]), first["places"]) == (1000, [])
    second = ann.mine(first["next"])
    assert (len(second["leases"]), len(second["places"]), second["next"]) == (200, 1, None)
    assert ann.mine("leases--any") == first
    assert ann.mine("places--any") == {"leases": [], "places": second["places"], "next": None}
    assert len({lease["token"] for page in (first, second) for lease in page["leases"]}) == 1200
    assert ann.call("DELETE", "/any/requests/a")[0] == 204


@pytest.mark.parametrize(
    "after",
    ["x", "places-any", "places--guarded", "leases-1.0-1", "leases-1-1-any", "leases-1.0-1-guarded", "lines-1.0-1-any"],
)
def test_a_cursor_that_no_page_has_is_refused(bob: PoolUser, after: str) -> None:
    assert bob.ask_for_mine(after).status == 400


def test_only_users_with_its_scope_see_a_pool(bob: PoolUser, ann: PoolUser) -> None:
    for method, path in ROUTES[1:]:
        answer = bob.ask(method, path.replace("POOL", "guarded"))
        assert answer.status == 403
        assert answer.json() == {"error": "insufficient_scope", "error_description": "This needs the scope 'write'."}
        challenge = 'Bearer realm="tokenauth", error="insufficient_scope", scope="write"'
        assert answer.headers["www-authenticate"] == challenge
    assert "guarded" not in str(bob.call("GET"))
    assert bob.call("GET", "/guarded2") == refusal("unknown_pool")
    ann.empty("guarded")
    (token,) = ann.generate("guarded")
    assert ann.assign("guarded").token == token


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_valid_token_no_pool_is_shown(
    connections: tuple[Connection, Connection], method: str, path: str
) -> None:
    for pool in ("any", "guarded", "unknown"):
        for headers, code in [({}, "token_required"), ({"X_Token": "u" * 64}, "invalid_token")]:
            for connection in connections:
                answer = connection.ask(method, "/api/pools" + path.replace("POOL", pool), **headers)
                assert (answer.status, answer.json()) == refusal(code)
                error = ', error="invalid_token"' if headers else ""
                assert answer.headers["www-authenticate"] == f'Bearer realm="tokenauth"{error}'
                assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "name",
    ["unknown", "Any", "any%20", "%00", "%ff", "%e2%82", "%F0%9F%94%91", "..", ".*", "'--", "{pool}", "x" * 5000],
    ids=range(12),
)
def test_a_pool_that_is_not_configured_is_unknown(admin: PoolUser, name: str) -> None:
    for method, path in ROUTES[1:]:
        assert admin.call(method, path.replace("POOL", name)) == refusal("unknown_pool")


def test_a_name_may_be_percent_encoded(admin: PoolUser, sibling_admin: PoolUser) -> None:
    (token,) = admin.generate("%76%31%2E2_a%2Db")
    assert sibling_admin.assign("v1.2_a-b").token == token
    encoded = "".join(f"%{ord(letter):02X}" for letter in token)
    assert sibling_admin.release("v1%2e2_a-b", encoded) == (204, None)
    assert admin.call("GET", f"/v1.2_a-b/tokens/{encoded}")[0] == 200


@pytest.mark.parametrize(
    "token",
    ["unknown", "u" * 64, "%00", "%ff", "%0d%0aX-Evil:%201", "..", "'%20OR%201=1--", "%F0%9F%94%91", "x" * 5000],
    ids=range(9),
)
def test_an_unknown_token_of_a_pool_is_not_found(admin: PoolUser, token: str) -> None:
    for method, path in [route for route in ROUTES if route[1].endswith("/t")]:
        assert admin.call(method, f"{path[:-1].replace('POOL', 'any')}{token}") == refusal("not_found")


def test_deleted_and_foreign_tokens_are_not_found(admin: PoolUser, sibling_admin: PoolUser) -> None:
    token, deleted = admin.generate("any", 2)
    assert sibling_admin.delete("any", deleted) == (204, None)
    for pool, absent in [("three", token), ("any", deleted)]:
        for method, path in [route for route in ROUTES if route[1].endswith("/t")]:
            assert admin.call(method, f"{path[:-1].replace('POOL', pool)}{absent}") == refusal("not_found")
    assert [member["token"] for member in sibling_admin.members("any")] == [token]


@pytest.mark.parametrize(
    ("document", "count"),
    [(None, 1), ({}, 1), ({"count": 1}, 1), ({"count": 3}, 3), ({"count": 1000}, 1000)],
)
def test_one_token_is_generated_by_default(
    admin: PoolUser, sibling_admin: PoolUser, document: object, count: int
) -> None:
    status, answered = admin.call("POST", "/waiting/tokens", document)
    assert (status, list(answered)) == (201, ["tokens"])
    assert len(set(answered["tokens"])) == len(answered["tokens"]) == count
    assert all(re.fullmatch("[A-Za-z0-9]{64}", token) for token in answered["tokens"])
    assert sibling_admin.counts("waiting") == (count, 0)
    assert [member["token"] for member in sibling_admin.members("waiting")] == sorted(answered["tokens"])


def test_generating_above_capacity_makes_none(admin: PoolUser, sibling_admin: PoolUser) -> None:
    assert admin.call("POST", "/three/tokens", {"count": 4}) == refusal("pool_full")
    assert sibling_admin.counts("three") == (0, 0)
    admin.generate("three", 2)
    sibling_admin.assign("three")
    assert sibling_admin.call("POST", "/three/tokens", {"count": 2}) == refusal("pool_full")
    assert admin.counts("three") == (1, 1)
    (last,) = sibling_admin.generate("three")
    assert admin.call("POST", "/three/tokens") == refusal("pool_full")
    assert sibling_admin.delete("three", last) == (204, None)
    assert len(admin.generate("three")) == 1


def test_a_deletion_is_seen_by_all_workers_at_once(admin: PoolUser, sibling_admin: PoolUser) -> None:
    admin.generate("any", 2)
    leased = sibling_admin.assign("any")
    (free,) = {member["token"] for member in sibling_admin.members("any")} - {leased.token}
    for token in (free, leased.token):
        assert admin.delete("any", token) == (204, None)
        assert sibling_admin.delete("any", token) == refusal("not_found")
    assert sibling_admin.keep_alive("any", leased.token) == refusal("not_found")
    assert sibling_admin.counts("any") == (0, 0)


def test_an_assign_answers_with_the_lease_and_its_end(
    admin: PoolUser, sibling_admin: PoolUser, clock: HandClock
) -> None:
    tokens = admin.generate("any", 2)
    now = int(clock())
    assert sibling_admin.assign("any", "ci-7") == Lease(tokens[0], "ci-7", 1, now + 60, 60)
    assert admin.assign("any") == Lease(tokens[1], "admin", 1, now + 60, 60)
    (token,) = admin.generate("waiting")
    assert sibling_admin.assign("waiting") == Lease(token, "admin", 1, now + 90, 90)
    clock.advance(0.75)
    (token,) = admin.generate("v1.2_a-b")
    assert sibling_admin.assign("v1.2_a-b") == Lease(token, "admin", 1, now + 2, 1), (
        "rounded down: never longer than the lease"
    )


@pytest.mark.parametrize("document", [None, {}, {"holder": None}])
def test_without_a_holder_the_user_is_the_holder(admin: PoolUser, sibling_admin: PoolUser, document: object) -> None:
    (token,) = admin.generate("any")
    assert sibling_admin.call("POST", "/any/leases", document)[1]["holder"] == "admin"
    assert admin.call("GET", f"/any/tokens/{token}")[1]["holder"] == "admin"


def test_the_longest_free_token_is_leased_first(admin: PoolUser, sibling_admin: PoolUser, clock: HandClock) -> None:
    first, second = admin.generate("any", 2)
    clock.advance(1)
    (third,) = sibling_admin.generate("any")
    assert [user.assign("any").token for user in (sibling_admin, admin)] == [first, second]
    clock.advance(10)
    assert admin.release("any", second) == (204, None)
    clock.advance(50)  # the lease of the first token lapses after the second was released
    assert [user.assign("any").token for user in (sibling_admin, admin, sibling_admin)] == [third, second, first]


def test_a_refusal_says_when_the_next_lease_ends(admin: PoolUser, sibling_admin: PoolUser, clock: HandClock) -> None:
    clock.set(int(clock()) + 1)
    tokens = admin.generate("any", 2)
    for _ in tokens:
        sibling_admin.assign("any")
        clock.advance(10)

    def retry_after(user: PoolUser) -> str:
        answer = user.ask("POST", "/any/leases")
        assert (answer.status, answer.json()) == refusal("no_free_token")
        return answer.headers["retry-after"]

    assert retry_after(admin) == retry_after(sibling_admin) == "40"
    clock.advance(0.25)
    assert retry_after(admin) == "40"
    assert sibling_admin.keep_alive("any", tokens[0])[0] == 200
    assert retry_after(sibling_admin) == "50"
    clock.advance(49.749)
    assert retry_after(admin) == "1"
    clock.advance(0.001)
    assert admin.assign("any").token == tokens[1]


def test_an_empty_pool_sends_no_retry_after(admin: PoolUser, clock: HandClock) -> None:
    for _ in range(2):
        answer = admin.ask("POST", "/waiting/leases")
        assert (answer.status, answer.json()) == refusal("no_free_token")
        assert "retry-after" not in answer.headers
        admin.generate("waiting", 3)
        clock.advance(300)


@pytest.mark.parametrize("method", ["PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("", "GET, HEAD"),
        ("/any", "GET, HEAD"),
        ("/any/tokens", "POST"),
        ("/any/tokens/t", "GET, HEAD, DELETE"),
        ("/any/leases", "POST"),
        ("/any/leases/t", "PUT, DELETE"),
    ],
)
def test_another_method_is_405_with_the_allowed_ones(admin: PoolUser, method: str, path: str, allowed: str) -> None:
    answer = admin.ask(method, path)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    assert answer.json() == {"error": "method_not_allowed", "error_description": f"This address supports {allowed}."}


@pytest.mark.parametrize("path", ["", "/any", "/any/tokens/TOKEN", "/any/tokens/unknown", "/unknown"])
def test_head_is_get_without_the_body(admin: PoolUser, client: httpx.Client, path: str) -> None:
    (token,) = admin.generate("any")
    path = f"/api/pools{path.replace('TOKEN', token)}"
    head, get = (client.request(method, path, headers={"X-Token": admin.token}) for method in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-length"] == str(len(get.content))
    assert client.head(path).status_code == 401


@pytest.mark.parametrize("path", ["/", "/any/", "/any/tokens/", "/any/leases/", "//leases", "/any/leases/t/", "/any/x"])
def test_other_paths_are_404(admin: PoolUser, path: str) -> None:
    status, document = admin.call("GET", path)
    assert (status, document["error_description"][:33]) == (404, "There is nothing at this address.")
