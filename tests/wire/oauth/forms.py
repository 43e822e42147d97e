"""Clients of OAuth for tests: who they are, and how they write a form and a header."""

import base64
import json
from urllib.parse import urlencode

import httpx
from passlib.hash import argon2

from tests.support.servers import USERS

UNKNOWN = "u" * 64
INACTIVE = b'{"active":false}'

GATEWAY = ("gateway", "gateway-secret")
"""The caller that may introspect."""

ANN = ("ann", "ann-secret")

ODD = ("o+d%64 \u00fc", "p+s%73:w \u00e4~/?%")
"""A name and a secret with all that percent-encoding is about, in latin-1."""

COLON = ("co:lon", ":%3a:\u20ac")
"""A name that HTTP Basic cannot hold unless it is encoded, and a secret beyond latin-1."""

UNEVEN = {
    "a name that takes 270 characters to encode": ("\u5b57" * 30, "secret-of-30"),
    "a secret that takes 1,800 characters to encode": ("long", "\u5b57" * 200),
    "a secret that would decode to a NUL": ("null", "100%00 sure"),
}
"""Clients of whose names and secrets one reading of HTTP Basic could be nobody's."""

FULL_FORMS: dict[str, dict[str, str]] = {
    "token": {"grant_type": "client_credentials"},
    "introspect": {"token": UNKNOWN},
    "revoke": {"token": UNKNOWN},
}
"""For each endpoint, a form that is answered 200 when the gateway sends it."""

ENDPOINTS = tuple(FULL_FORMS)


def table(name: str, secret: str, *scopes: str) -> str:
    """Write the table of a user in the configuration, with a hash at the lowest cost."""
    hashed = argon2.using(type="ID", memory_cost=8, time_cost=1, parallelism=1).hash(secret)
    return f"[[users]]\nusername = {json.dumps(name)}\npassword = {json.dumps(hashed)}\nscopes = {json.dumps(scopes)}\n"


CLIENTS = "\n".join([USERS, *(table(*each, "introspect") for each in (GATEWAY, ODD, COLON, *UNEVEN.values()))])
"""The users of all tests, and clients beside them."""


def post(client: httpx.Client, endpoint: str, auth: tuple[str, str] | None = GATEWAY, **form: str) -> httpx.Response:
    """Send a form to an endpoint, with HTTP Basic as most clients write it: not percent-encoded."""
    return client.post(f"/oauth/{endpoint}", data=form, auth=auth or httpx.USE_CLIENT_DEFAULT)


def send(client: httpx.Client, endpoint: str, authorization: str | None, **form: str) -> httpx.Response:
    """Send a form with an Authorization header as it is."""
    headers = {} if authorization is None else {"Authorization": authorization}
    return client.post(f"/oauth/{endpoint}", data=form, headers=headers)


def basic(credentials: str | bytes) -> str:
    """Write the header for `name:secret` as it is."""
    plain = credentials.encode() if isinstance(credentials, str) else credentials
    return f"Basic {base64.b64encode(plain).decode()}"


def fetch(client: httpx.Client, auth: tuple[str, str] = ANN) -> str:
    """Fetch a token and return its value."""
    answer = post(client, "token", auth, grant_type="client_credentials")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def active(client: httpx.Client, token: str) -> bool:
    """Introspect a token."""
    answer = post(client, "introspect", token=token)
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["active"])


def form_bytes(endpoint: str, authorization: str, body: bytes | dict[str, str], *lines: str) -> bytes:
    """Write a request as it goes over the wire."""
    sent = body if isinstance(body, bytes) else urlencode(body).encode()
    head = [f"POST /oauth/{endpoint} HTTP/1.1", "Host: x", f"Authorization: {authorization}"]
    head += ["Content-Type: application/x-www-form-urlencoded", f"Content-Length: {len(sent)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + sent


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the code of an error, which has the form of RFC 6749 section 5.2."""
    document = answer.json()
    assert set(document) == {"error", "error_description"}
    assert document["error_description"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    return answer.status_code, document["error"]
