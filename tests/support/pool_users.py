"""Users of pools, over connections that never retry."""

from typing import Any, NamedTuple

from tests.support.connections import Answer, Connection

PASSWORDS = {"admin": "admin", "ann": "ann-secret", "bob": "bob-secret"}

REFUSALS = {
    "token_required": (401, "Send a token in the X-Token or the Authorization: Bearer header."),
    "invalid_token": (401, "The token is not valid: it is unknown, expired or revoked. Log in again."),
    "unknown_pool": (404, "There is no pool of this name."),
    "forbidden": (403, "The lease belongs to another user."),
    "insufficient_scope": (403, "This needs the scope 'admin'."),
    "not_found": (404, "The pool has no such token."),
    "pool_full": (409, "The pool has no capacity for that many tokens. None was generated."),
    "no_free_token": (409, "The pool has no free token."),
    "lease_lost": (409, "The token is no longer leased to you: stop using what it guards."),
}
"""Error code -> status and description."""


class Lease(NamedTuple):
    """The fields of a lease in a response, in their order."""

    token: str
    holder: str
    fence: int
    expiry_time: int
    expires_in: int


def parse(answer: Answer) -> tuple[int, Any]:
    """Return the status and the document of a response, or None for an empty body."""
    if answer.status == 204:
        assert answer.body == b""
        assert "content-length" not in answer.headers
        return answer.status, None
    assert answer.headers["content-type"] == "application/json"
    return answer.status, answer.json()


def refusal(code: str) -> tuple[int, Any]:
    """Return the status and the document of a refusal."""
    status, description = REFUSALS[code]
    return status, {"error": code, "error_description": description}


class PoolUser:
    """A logged-in user with a connection to one worker."""

    def __init__(self, connection: Connection, username: str = "admin") -> None:
        self._connection = connection
        self.token = connection.log_in(username, PASSWORDS[username])

    def count_logins(self) -> int:
        """Return how many live tokens the user has."""
        return len(self._connection.ask("GET", "/api/tokens", X_Token=self.token).json()["tokens"])

    def ask(self, method: str, path: str = "", document: object = None) -> Answer:
        """Send a request below /api/pools, and check that the response is not cacheable."""
        answer = self._connection.ask(method, f"/api/pools{path}", document, X_Token=self.token)
        assert answer.headers["cache-control"] == "no-store"
        return answer

    def call(self, method: str, path: str = "", document: object = None) -> tuple[int, Any]:
        """Send a request and return the status and the document of the response."""
        return parse(self.ask(method, path, document))

    def mine(self, after: str = "") -> Any:
        """Return a page of the user's leases and places in line."""
        status, document = parse(self.ask_for_mine(after))
        assert status == 200, document
        return document

    def ask_for_mine(self, after: str = "") -> Answer:
        return self._connection.ask("GET", f"/api/leases?after={after}", X_Token=self.token)

    def generate(self, pool: str, count: int = 1) -> list[str]:
        """Generate tokens and return them."""
        status, document = self.call("POST", f"/{pool}/tokens", {"count": count})
        assert status == 201, document
        return list(document["tokens"])

    def assign(self, pool: str, holder: str | None = None) -> Lease:
        """Lease a token."""
        status, document = self.call("POST", f"/{pool}/leases", None if holder is None else {"holder": holder})
        assert status == 201, document
        assert list(document) == list(Lease._fields)
        return Lease(**document)

    def keep_alive(self, pool: str, token: str, **check: object) -> tuple[int, Any]:
        """Extend a lease."""
        return self.call("PUT", f"/{pool}/leases/{token}", check or None)

    def release(self, pool: str, token: str, **check: object) -> tuple[int, Any]:
        """Release a token."""
        return self.call("DELETE", f"/{pool}/leases/{token}", check or None)

    def delete(self, pool: str, token: str) -> tuple[int, Any]:
        return self.call("DELETE", f"/{pool}/tokens/{token}")

    def members(self, pool: str) -> list[dict[str, Any]]:
        """Return the first page of the tokens of a pool."""
        status, document = self.call("GET", f"/{pool}?limit=1000")
        assert status == 200, document
        return list(document["tokens"])

    def counts(self, pool: str) -> tuple[int, int]:
        """Return the number of free and of leased tokens of a pool."""
        status, document = self.call("GET", f"/{pool}?limit=1")
        assert status == 200, document
        return document["available"], document["leased"]

    def empty(self, pool: str) -> None:
        """Delete all tokens of a pool. A prefilled pool generates new ones."""
        for member in self.members(pool):
            assert self.delete(pool, member["token"]) == (204, None)
