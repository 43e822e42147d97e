"""Clients authenticate by HTTP Basic or in the form, not both (RFC 6749 section 2.3.1), at all endpoints."""

from collections.abc import Callable
from urllib.parse import quote, quote_plus

import httpx
import pytest

from tests.support.servers import Server, exchange, log_in
from tests.wire.oauth.forms import (
    ANN,
    COLON,
    ENDPOINTS,
    FULL_FORMS,
    GATEWAY,
    ODD,
    ONE_VALID_READING,
    UNKNOWN,
    basic,
    fetch,
    form_bytes,
    post,
    refusal,
    send,
)

IN_FORM = {"client_id": GATEWAY[0], "client_secret": GATEWAY[1]}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_client_authenticates_by_basic_or_in_the_form(client: httpx.Client, endpoint: str) -> None:
    form = FULL_FORMS[endpoint]
    assert post(client, endpoint, GATEWAY, **form).status_code == 200
    assert post(client, endpoint, None, **form, **IN_FORM).status_code == 200
    assert post(client, endpoint, GATEWAY, **form, client_id=GATEWAY[0]).status_code == 200


@pytest.mark.parametrize("form", ["basic {}", "BASIC {}", "Basic   {}"])
def test_the_scheme_is_case_insensitive(client: httpx.Client, form: str) -> None:
    header = form.format(basic(":".join(GATEWAY)).removeprefix("Basic "))
    assert send(client, "introspect", header, token=UNKNOWN).status_code == 200


def test_a_client_name_is_case_insensitive(client: httpx.Client) -> None:
    assert post(client, "introspect", ("GateWay", GATEWAY[1]), token=UNKNOWN).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    "more",
    [IN_FORM, {"client_secret": GATEWAY[1]}, {"client_secret": "wrong"}, {"client_id": "ann"}],
    ids=["both", "secret twice", "another secret", "another client"],
)
def test_two_authentication_methods_are_refused(client: httpx.Client, endpoint: str, more: dict[str, str]) -> None:
    assert refusal(post(client, endpoint, GATEWAY, **FULL_FORMS[endpoint], **more)) == (400, "invalid_request")


WRONG: dict[str, tuple[str | None, dict[str, str]]] = {
    "no credentials": (None, {}),
    "a wrong secret": (basic("gateway:wrong"), {}),
    "an unknown name": (basic("nobody:gateway-secret"), {}),
    "no secret": (basic("gateway:"), {}),
    "no name": (basic(":gateway-secret"), {}),
    "the secret of another client": (basic("gateway:ann-secret"), {}),
    "a wrong secret in the form": (None, {"client_id": "gateway", "client_secret": "wrong"}),
    "an unknown name in the form": (None, {"client_id": "nobody", "client_secret": "gateway-secret"}),
    "no name in the form": (None, {"client_secret": "gateway-secret"}),
    "no secret in the form": (None, {"client_id": "gateway"}),
    "an empty secret in the form": (None, {"client_id": "gateway", "client_secret": ""}),
    "percent-encoded twice": (None, {"client_id": "gateway", "client_secret": "gateway%2dsecret"}),
    "another scheme": ("Digest username=gateway", {}),
    "a scheme without credentials": ("Basic", {}),
    "the fields of the token API": (None, {"username": "gateway", "password": "gateway-secret"}),
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_credentials_are_401_with_a_challenge(client: httpx.Client, endpoint: str, wrong: str) -> None:
    authorization, more = WRONG[wrong]
    answer = send(client, endpoint, authorization, **FULL_FORMS[endpoint], **more)
    assert refusal(answer) == (401, "invalid_client")
    assert answer.headers["www-authenticate"].startswith('Basic realm="tokenauth"')


def test_a_refusal_does_not_reveal_the_mistake(client: httpx.Client) -> None:
    answers = []
    for authorization, more in WRONG.values():
        answer = send(client, "token", authorization, **FULL_FORMS["token"], **more)
        headers = {name: value for name, value in answer.headers.items() if name != "date"}
        answers.append((answer.status_code, answer.content, headers))
        post(client, "token", GATEWAY, **FULL_FORMS["token"])
    assert all(each == answers[0] for each in answers)


@pytest.mark.parametrize("endpoint", ["token", "revoke"])
@pytest.mark.parametrize("header", ["Authorization: Bearer {}", "X-Token: {}"])
def test_a_token_does_not_authenticate_a_client(
    server: Server, client: httpx.Client, endpoint: str, header: str
) -> None:
    line = header.format(log_in(client, *GATEWAY))
    sent = form_bytes(endpoint, "none", FULL_FORMS[endpoint]).replace(b"Authorization: none", line.encode())
    status, headers, body = exchange(server.port, sent)
    assert status == 401
    assert b"invalid_client" in body
    assert headers["www-authenticate"].startswith("Basic")


UNREADABLE = {
    "not Base64": "Basic gateway:gateway-secret",
    "truncated Base64": basic("gateway:gateway-secret")[:-3],
    "a space in Base64": basic(":".join(GATEWAY)).replace("Z2F0", "Z2F0 "),
    "junk in Base64": basic(":".join(GATEWAY)).replace("Z2F0", "Z2F0!"),
    "no colon": basic("gateway"),
    "empty credentials": basic(b""),
    "not ASCII": "Basic \u00e4\u00e4\u00e4\u00e4",
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("sent", UNREADABLE)
def test_an_unreadable_header_is_400(server: Server, endpoint: str, sent: str) -> None:
    status, _, body = exchange(server.port, form_bytes(endpoint, UNREADABLE[sent], FULL_FORMS[endpoint]))
    assert (status, b"invalid_request" in body) == (400, True)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_two_identical_headers_are_refused(server: Server, endpoint: str) -> None:
    right = basic(":".join(GATEWAY))
    sent = form_bytes(endpoint, right, FULL_FORMS[endpoint], f"Authorization: {right}")
    status, _, body = exchange(server.port, sent)
    assert (status, b"invalid_request" in body) == (400, True)


ENCODINGS = {
    "raw, in UTF-8": ":".join(ODD).encode(),
    "raw, in latin-1": ":".join(ODD).encode("latin-1"),
    "encoded as in a form": ":".join(map(quote_plus, ODD)).encode(),
    "encoded as in a URL": ":".join(quote(part, safe="") for part in ODD).encode(),
    "every byte encoded": ":".join("".join(f"%{byte:02x}" for byte in part.encode()) for part in ODD).encode(),
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_odd_names_and_secrets_work_encoded_and_raw(client: httpx.Client, endpoint: str, encoding: str) -> None:
    assert send(client, endpoint, basic(ENCODINGS[encoding]), **FULL_FORMS[endpoint]).status_code == 200
    with_id = send(client, endpoint, basic(ENCODINGS[encoding]), **FULL_FORMS[endpoint], client_id=ODD[0])
    assert with_id.status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_colon_in_a_name_needs_encoding_or_the_form(client: httpx.Client, endpoint: str) -> None:
    form = FULL_FORMS[endpoint]
    assert send(client, endpoint, basic(":".join(map(quote_plus, COLON))), **form).status_code == 200
    assert post(client, endpoint, None, **form, client_id=COLON[0], client_secret=COLON[1]).status_code == 200
    assert refusal(post(client, endpoint, COLON, **form)) == (401, "invalid_client")


@pytest.mark.parametrize("client_and_secret", [ODD, COLON], ids=["odd", "colon"])
def test_the_form_is_decoded_once(client: httpx.Client, client_and_secret: tuple[str, str]) -> None:
    name, secret = client_and_secret
    right = {"client_id": name, "client_secret": secret}
    assert post(client, "introspect", None, token=UNKNOWN, **right).status_code == 200
    for part, value in right.items():
        twice = {**right, part: quote_plus(value)}
        assert refusal(post(client, "introspect", None, token=UNKNOWN, **twice)) == (401, "invalid_client")


@pytest.mark.parametrize("encode", [str, quote_plus], ids=["raw", "encoded"])
@pytest.mark.parametrize("which", ONE_VALID_READING)
def test_one_valid_reading_is_enough(client: httpx.Client, which: str, encode: Callable[[str], str]) -> None:
    sent = basic(":".join(map(encode, ONE_VALID_READING[which])))
    assert send(client, "introspect", sent, token=UNKNOWN).status_code == 200


def test_a_token_of_a_client_is_a_login_of_the_user(client: httpx.Client) -> None:
    token = fetch(client, ANN)
    me = client.get("/api/me", headers={"Authorization": f"Bearer {token}"}).json()
    assert (me["username"], me["scopes"]) == ("ann", ["read", "write"])
