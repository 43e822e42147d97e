"""OAuth clients for tests: their credentials, forms and headers."""

import base64
import json
from urllib.parse import urlencode

import httpx
from passlib.hash import argon2

from tests.support.servers import USERS

UNKNOWN = "u" * 64
INACTIVE = b'{"active":false}\n'

GATEWAY = ("gateway", "gateway-secret")
"""A client with the scope `introspect`."""

ANN = ("ann", "ann-secret")

ODD = ("o+d%64 \u00fc", "p+s%73:w \u00e4~/?%")
"""A name and a secret that are changed by percent-encoding, within latin-1."""

COLON = ("co:lon", ":%3a:\u20ac")
"""A name that HTTP Basic can carry only percent-encoded, and a secret outside latin-1."""

ONE_VALID_READING = {
    "a name that takes 270 characters to encode": ("\u5b57" * 30, "secret-of-30"),
    "a secret that takes 1,800 characters to encode": ("long", "\u5b57" * 200),
    "a secret that would decode to a NUL": ("null", "100%00 sure"),
}
"""Clients whose credentials are invalid in one of the two readings of HTTP Basic (raw and percent-decoded)."""

FULL_FORMS: dict[str, dict[str, str]] = {
    "token": {"grant_type": "client_credentials"},
    "introspect": {"token": UNKNOWN},
    "revoke": {"token": UNKNOWN},
}
"""For each endpoint, a form that gets 200 when the gateway sends it."""

ENDPOINTS = tuple(FULL_FORMS)


def table(name: str, secret: str, *scopes: str) -> str:
    """Return the configuration of a user, with a hash of the lowest cost."""
    hashed = argon2.using(type="ID", memory_cost=8, time_cost=1, parallelism=1).hash(secret)
    return f"[[users]]\nusername = {json.dumps(name)}\npassword = {json.dumps(hashed)}\nscopes = {json.dumps(scopes)}\n"


CLIENTS = "\n".join(
    [USERS, *(table(*each, "introspect") for each in (GATEWAY, ODD, COLON, *ONE_VALID_READING.values()))]
)
"""The users of all tests, and the clients."""


def post(client: httpx.Client, endpoint: str, auth: tuple[str, str] | None = GATEWAY, **form: str) -> httpx.Response:
    """Send a form, with HTTP Basic credentials that are not percent-encoded, as most clients do."""
    return client.post(f"/oauth/{endpoint}", data=form, auth=auth or httpx.USE_CLIENT_DEFAULT)


def send(client: httpx.Client, endpoint: str, authorization: str | None, **form: str) -> httpx.Response:
    """Send a form with an Authorization header."""
    headers = {} if authorization is None else {"Authorization": authorization}
    return client.post(f"/oauth/{endpoint}", data=form, headers=headers)


def basic(credentials: str | bytes) -> str:
    """Return the header for `name:secret`, without percent-encoding."""
    plain = credentials.encode() if isinstance(credentials, str) else credentials
    return f"Basic {base64.b64encode(plain).decode()}"


def fetch(client: httpx.Client, auth: tuple[str, str] = ANN) -> str:
    """Fetch a token."""
    answer = post(client, "token", auth, grant_type="client_credentials")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def active(client: httpx.Client, token: str) -> bool:
    """Return whether a token is active, by introspection."""
    answer = post(client, "introspect", token=token)
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["active"])


def form_bytes(endpoint: str, authorization: str, body: bytes | dict[str, str], *lines: str) -> bytes:
    """Return the bytes of a request."""
    sent = body if isinstance(body, bytes) else urlencode(body).encode()
    head = [f"POST /oauth/{endpoint} HTTP/1.1", "Host: x", f"Authorization: {authorization}"]
    head += ["Content-Type: application/x-www-form-urlencoded", f"Content-Length: {len(sent)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + sent


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Check that an error has the form of RFC 6749 section 5.2. Return its status and code."""
    document = answer.json()
    assert set(document) == {"error", "error_description"}
    assert document["error_description"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    return answer.status_code, document["error"]
