"""Users who borrow from pools, over connections that never retry."""

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
    "pool_full": (409, "The pool has no room for that many tokens. None was generated."),
    "no_free_token": (409, "The pool has no free token."),
    "lease_lost": (409, "The token is no longer leased to you: stop using what it guards."),
}
"""What is refused, and in which words."""


class Lease(NamedTuple):
    """What a borrower is told, in the order in which it is told."""

    token: str
    holder: str
    fence: int
    expiry_time: int
    expires_in: int


def said(answer: Answer) -> tuple[int, Any]:
    """Return the status of an answer and its document; None is no body at all."""
    if answer.status == 204:
        assert answer.body == b""
        assert "content-length" not in answer.headers
        return answer.status, None
    assert answer.headers["content-type"] == "application/json"
    return answer.status, answer.json()


def refusal(code: str) -> tuple[int, Any]:
    """Return what is said where something is refused."""
    status, description = REFUSALS[code]
    return status, {"error": code, "error_description": description}


class Borrower:
    """A user who is logged in and speaks to one worker."""

    def __init__(self, connection: Connection, username: str = "admin") -> None:
        self._connection = connection
        self.token = connection.log_in(username, PASSWORDS[username])

    def ask(self, method: str, path: str = "", document: object = None) -> Answer:
        """Ask for something below /api/pools; no answer may be kept by a cache."""
        answer = self._connection.ask(method, f"/api/pools{path}", document, X_Token=self.token)
        assert answer.headers["cache-control"] == "no-store"
        return answer

    def hears(self, method: str, path: str = "", document: object = None) -> tuple[int, Any]:
        """Ask for something; return the status and the document."""
        return said(self.ask(method, path, document))

    def generate(self, pool: str, count: int = 1) -> list[str]:
        """Add tokens that are free."""
        status, document = self.hears("POST", f"/{pool}/tokens", {"count": count})
        assert status == 201, document
        return list(document["tokens"])

    def assign(self, pool: str, holder: str | None = None) -> Lease:
        """Borrow a token."""
        status, document = self.hears("POST", f"/{pool}/leases", None if holder is None else {"holder": holder})
        assert status == 201, document
        assert list(document) == list(Lease._fields)
        return Lease(**document)

    def keep_alive(self, pool: str, token: str, **claim: object) -> tuple[int, Any]:
        """Let a lease run anew."""
        return self.hears("PUT", f"/{pool}/leases/{token}", claim or None)

    def release(self, pool: str, token: str, **claim: object) -> tuple[int, Any]:
        """Give a token back."""
        return self.hears("DELETE", f"/{pool}/leases/{token}", claim or None)

    def delete(self, pool: str, token: str) -> tuple[int, Any]:
        """Delete a token."""
        return self.hears("DELETE", f"/{pool}/tokens/{token}")

    def members(self, pool: str) -> list[dict[str, Any]]:
        """List the tokens of a pool that are on its first page."""
        status, document = self.hears("GET", f"/{pool}?limit=1000")
        assert status == 200, document
        return list(document["tokens"])

    def counts(self, pool: str) -> tuple[int, int]:
        """Say how many tokens of a pool can be lent, and how many are."""
        status, document = self.hears("GET", f"/{pool}?limit=1")
        assert status == 200, document
        return document["available"], document["leased"]

    def empty(self, pool: str) -> None:
        """Delete all tokens of a pool; where they are replaced, the new ones stay."""
        for member in self.members(pool):
            assert self.delete(pool, member["token"]) == (204, None)
