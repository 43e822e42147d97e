"""Every route of pools for every kind of caller: what it answers, and that a refused request changes nothing."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from tests.support.connections import Answer, Connection
from tests.support.servers import Server

PASSWORD = "bob-secret"
HASH = "$argon2id$v=19$m=8,t=1,p=1$LIVwzhljLKW0tvbeW2tNqQ$9JC3XMtZhQy2Oi5GB4ktwLx5ktUmIdEa8FXN6h6E8S4"
SCOPES = {"user": ["use"], "owner": ["use"], "manager": ["use", "manage"], "stranger": ["manage", "admin"]}
POOLS = ("lab", "phones")


@pytest.fixture(scope="module")
def settings() -> str:
    users = (
        f'[[users]]\nusername = "{name}"\npassword = "{HASH}"\nscopes = {scopes}\n' for name, scopes in SCOPES.items()
    )
    pools = (f'[pools.{name}]\nscope = "use"\nmanage_scope = "manage"\n' for name in POOLS)
    members = (f'[[pools.phones.members]]\nname = "{name}"\nlabels = ["arm"]\n' for name in ("moto", "pixel", "nokia"))
    return "\n".join([*users, *pools, *members])


NO_TOKEN, INVALID = (401, "token_required"), (400, "invalid_request")
NO_SCOPE, FORBIDDEN = (403, "insufficient_scope"), (403, "forbidden")
UNKNOWN_POOL, UNKNOWN_MEMBER, UNKNOWN_REQUEST = (404, "unknown_pool"), (404, "unknown_member"), (404, "not_found")
OK, CREATED, DONE = (200, None), (201, None), (204, None)

Expected = tuple[int, str | None]


class Case(NamedTuple):
    """A request, and its answer to a user of the pool, to the owner of the lease in the path, and to a manager."""

    method: str
    path: str
    user: Expected
    owner: Expected
    manager: Expected
    body: Mapping[str, Any] | None = None
    stranger: Expected = NO_SCOPE
    """To someone with a login and without the scope of the pool."""


LEASE, TOKEN = "/{pool}/leases/{held}", "/{pool}/tokens/{held}"
LINE = "/{pool}/requests"

CASES = [
    Case("GET", "", OK, OK, OK, stranger=OK),
    Case("GET", "/{pool}", OK, OK, OK),
    Case("GET", "/nowhere", UNKNOWN_POOL, UNKNOWN_POOL, UNKNOWN_POOL, stranger=UNKNOWN_POOL),
    Case("POST", "/{pool}/leases", CREATED, CREATED, CREATED),
    Case("POST", "/{pool}/leases", CREATED, CREATED, CREATED, {"holder": "owner"}),
    Case("PUT", LEASE, FORBIDDEN, OK, FORBIDDEN),
    Case("PUT", LEASE, FORBIDDEN, OK, FORBIDDEN, {"holder": "ci-7", "fence": 1}),
    Case("DELETE", LEASE, FORBIDDEN, DONE, FORBIDDEN),
    Case("DELETE", LEASE, FORBIDDEN, DONE, FORBIDDEN, {"holder": "ci-7", "fence": 1}),
    Case("DELETE", f"{LEASE}?force=true", NO_SCOPE, NO_SCOPE, DONE, {"reason": "stuck", "fence": 1}),
    Case("DELETE", f"{LEASE}?force=true&take=true", NO_SCOPE, NO_SCOPE, OK, {"reason": "mine"}),
    Case("DELETE", f"{LEASE}?take=true", INVALID, INVALID, INVALID),
    Case("DELETE", LEASE, INVALID, INVALID, INVALID, {"reason": "stuck"}),
    Case("GET", TOKEN, OK, OK, OK),
    Case("DELETE", TOKEN, NO_SCOPE, NO_SCOPE, DONE),
    Case("GET", LINE, OK, OK, OK),
    Case("DELETE", f"{LINE}/{{request}}", UNKNOWN_REQUEST, DONE, UNKNOWN_REQUEST),
    Case("DELETE", f"{LINE}/{{request}}?user=owner", NO_SCOPE, DONE, DONE),
    Case("POST", "/{pool}/leases", CREATED, CREATED, CREATED, {"wait": 0}),
    Case("POST", "/{pool}/leases", NO_SCOPE, NO_SCOPE, CREATED, {"wait": 0, "priority": 1}),
    Case("POST", "/lab/tokens", NO_SCOPE, NO_SCOPE, CREATED),
    Case("POST", "/phones/tokens", NO_SCOPE, NO_SCOPE, (409, "pool_full")),
    Case("PUT", "/phones/members/moto/reservation", NO_SCOPE, NO_SCOPE, OK, {"until": "1h", "for": "owner"}),
    Case("PUT", "/phones/members/razr/reservation", NO_SCOPE, NO_SCOPE, UNKNOWN_MEMBER, {"until": "1h"}),
    Case("PUT", "/lab/members/moto/reservation", NO_SCOPE, NO_SCOPE, UNKNOWN_MEMBER, {"until": "1h"}),
    Case("DELETE", "/phones/members/moto/reservation", NO_SCOPE, NO_SCOPE, DONE),
    Case("DELETE", "/phones/members/razr/reservation", NO_SCOPE, NO_SCOPE, UNKNOWN_MEMBER),
]


class Scene:
    """The callers, over one connection, and a pool whose token is leased by `owner` to the holder `ci-7`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.tokens: dict[str, str | None] = {"nobody": None}
        for name in SCOPES:
            self.tokens[name] = connection.log_in(name, PASSWORD)
        for kind, name, scopes in (
            ("manager who sends a token for use only", "manager", ["use"]),
            ("manager who sends a token for managing only", "manager", ["manage"]),
            ("owner who sends a token without scopes", "owner", []),
        ):
            wanted = {"name": kind[-20:], "scopes": scopes, "ttl": "2h"}
            answer = connection.ask("POST", "/api/tokens", wanted, X_Token=self.tokens[name] or "")
            assert answer.status == 201, answer
            self.tokens[kind] = answer.json()["token"]

    def ask(self, caller: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        token = self.tokens[caller]
        headers = {} if token is None else {"X_Token": token}
        return self._connection.ask(method, f"/api/pools{path}", body, **headers)

    def lease(self, pool: str) -> tuple[str, int]:
        """Empty a pool, and lease a token of it to `owner`; return it and its fence."""
        for token in self.tokens_of(pool, "manager"):
            assert self.ask("manager", "DELETE", f"/{pool}/tokens/{token['token']}").status == 204
        if pool == "lab":
            assert self.ask("manager", "POST", "/lab/tokens", {"count": 2}).status == 201
        for name in ("moto", "pixel", "nokia") if pool == "phones" else ():
            assert self.ask("manager", "DELETE", f"/phones/members/{name}/reservation").status == 204
        answer = self.ask("owner", "POST", f"/{pool}/leases", {"holder": "ci-7"})
        assert answer.status == 201, answer
        return answer.json()["token"], answer.json()["fence"]

    def wait(self, pool: str) -> str:
        """Let `owner` wait for one token more than the pool has, and return the id of the request."""
        while (answer := self.ask("owner", "POST", f"/{pool}/leases", {"wait": 0})).status == 201:
            pass
        assert answer.status == 202, answer
        return str(answer.json()["request"])

    def tokens_of(self, pool: str, caller: str) -> list[dict[str, Any]]:
        return list(self.ask(caller, "GET", f"/{pool}").json()["tokens"])


EXPECTED: Mapping[str, Callable[[Case], Expected]] = {
    "nobody": lambda case: NO_TOKEN,
    "stranger": lambda case: case.stranger,
    "user": lambda case: case.user,
    "owner": lambda case: case.owner,
    "manager": lambda case: case.manager,
    "manager who sends a token for use only": lambda case: case.user,
    "manager who sends a token for managing only": lambda case: case.stranger,
    "owner who sends a token without scopes": lambda case: case.stranger,
}
"""What each kind of caller is answered."""


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Connection]:
    with Connection(server.port) as opened:
        yield opened


@pytest.fixture
def scene(connection: Connection) -> Scene:
    return Scene(connection)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method} {case.path} {case.body or ''}")
def test_each_caller_gets_the_answer_of_their_role(scene: Scene, case: Case, pool: str) -> None:
    for caller, expected in EXPECTED.items():
        held, fence = scene.lease(pool)
        request = scene.wait(pool) if LINE in case.path else ""
        before = scene.tokens_of(pool, "manager")
        body = case.body and {key: fence if key == "fence" else value for key, value in case.body.items()}
        answer = scene.ask(caller, case.method, case.path.format(pool=pool, held=held, request=request), body)
        error = answer.json().get("error") if answer.body else None
        assert (answer.status, error) == expected(case), (caller, answer)
        if answer.status >= 400 or case.method == "GET":
            assert scene.tokens_of(pool, "manager") == before, caller
        if request:
            left = scene.ask("owner", "DELETE", f"/{pool}/requests/{request}").status
            assert left == (404 if answer.status == 204 else 204), caller


@pytest.mark.parametrize("pool", POOLS)
def test_each_caller_sees_the_values_of_their_role(scene: Scene, pool: str) -> None:
    held, fence = scene.lease(pool)
    values = {token["token"] for token in scene.tokens_of(pool, "manager")}
    assert held in values
    for caller, expected in {
        "user": set(), "owner": {held}, "manager": values, "manager who sends a token for use only": set(),
    }.items():  # fmt: skip
        answer = scene.ask(caller, "GET", f"/{pool}")
        assert {value for value in values if value in answer.body.decode()} == expected, caller
        (leased,) = (token for token in answer.json()["tokens"] if "holder" in token)
        assert (leased["user"], leased["holder"], leased["fence"]) == ("owner", "ci-7", fence), caller
        assert leased["lease_expiry_time"] - leased["leased_at"] == 60, caller
    listed = {caller: scene.ask(caller, "GET", "").json()["pools"] for caller in EXPECTED if caller != "nobody"}
    request = scene.wait(pool)
    for caller, sees in {"user": False, "owner": True, "manager": True}.items():
        (waits,) = scene.ask(caller, "GET", f"/{pool}/requests").json()["requests"]
        assert (waits["user"], waits["position"], waits["count"]) == ("owner", 1, 1), caller
        assert (waits.get("request") == request) is sees, caller
    assert scene.ask("owner", "DELETE", f"/{pool}/requests/{request}").status == 204
    usable = {caller for caller, pools in listed.items() if pools}
    assert usable == {"user", "owner", "manager", "manager who sends a token for use only"}


def test_the_cases_have_every_route_of_pools(server: Server) -> None:
    with server.client() as client:
        document = client.get("/openapi.json").json()
    routes = {
        (method.upper(), path.removeprefix("/api/pools"))
        for path, methods in document["paths"].items()
        if path.startswith("/api/pools")
        for method in methods
    }
    names = {"held": "token", "lab": "{pool}", "phones": "{pool}", "moto": "{name}"}
    cases = set()
    for case in CASES:
        path = case.path.partition("?")[0].replace("{held}", "{token}")
        words = [names.get(word, word) for word in path.split("/")]
        cases.add((case.method, "/".join(words)))
    assert routes - cases == set()
