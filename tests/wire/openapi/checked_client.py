"""A client that checks each response against the document, and values for requests."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx

from tests.support.servers import log_in
from tests.wire.openapi.configurations import API_PASSWORD
from tests.wire.openapi.conformance import Documented, Operation

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
PASSWORD = {"X-API-PASSWORD": API_PASSWORD}
NO_TOKEN = "00000000-0000-4000-8000-000000000000"

_EXAMPLES = {
    **{"token": NO_TOKEN, "id": "0" * 24},
    **{"file": "start.js", "name": "none", "request": "x", "version": "x"},
}
BODIES: dict[str | None, dict[str, Any]] = {
    None: {},
    JSON: {"json": {"username": "ann", "password": "ann-secret", "token": NO_TOKEN, "client_id": "me"}},
    FORM: {"data": {"grant_type": "client_credentials", "token": "x", "client_id": "ann", "client_secret": "x"}},
}
"""A body of each content type that every operation can read."""


def example_path(operation: Operation, pool: str = "uuids") -> str:
    """Return the path of an operation, with parameters that may not exist."""
    return operation.path.format(pool=pool, **_EXAMPLES)


class CheckedClient:
    """Sends requests and checks each response against the document."""

    def __init__(self, client: httpx.Client, documented: Documented) -> None:
        self.client = client
        self._documented = documented

    def send(self, method: str, path: str, user: str = "", **options: Any) -> httpx.Response:
        """Send a request, with a token of `user` if given."""
        headers = dict(options.pop("headers", {}))
        if user:
            headers["X-Token"] = self.token(user)
        answer = self.client.request(method, path, headers=headers, **options)
        self._documented.check(answer)
        return answer

    def send_to(self, operation: Operation, user: str = "", **options: Any) -> httpx.Response:
        """Send a request to an operation, at its example path."""
        return self.send(operation.method, example_path(operation), user, **options)

    def token(self, user: str) -> str:
        """Log in and return the token."""
        return log_in(self.client, user, "admin" if user == "admin" else f"{user}-secret")


class Call(NamedTuple):
    """A request, and the user that sends it."""

    method: str
    path: str
    user: str = ""
    options: Mapping[str, Any] = MappingProxyType({})


def client_form(secret: str = "ann-secret", **fields: str) -> dict[str, Any]:
    """Return a form with the credentials of a client."""
    return {"data": {"client_id": "ann", "client_secret": secret, **fields}}


def login(password: str, username: str = "ann") -> dict[str, Any]:
    """Return the body of a login."""
    return {"json": {"username": username, "password": password}}


GRANT = {"grant_type": "client_credentials"}
