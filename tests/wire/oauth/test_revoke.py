"""POST /oauth/revoke ends a token (RFC 7009). After a 200 the token is not valid."""

from collections.abc import Callable

import httpx
import pytest

from tests.support.servers import HandClock, log_in, probe
from tests.wire.oauth.forms import ANN, GATEWAY, INACTIVE, UNKNOWN, active, fetch, post, refusal

Obtain = Callable[[httpx.Client], str]


@pytest.mark.parametrize("obtain", [fetch, lambda client: log_in(client, *ANN)], ids=["of a client", "of a user"])
@pytest.mark.parametrize("by", [ANN, GATEWAY, ("bob", "bob-secret")], ids=lambda by: str(by[0]))
def test_the_bearer_may_revoke_a_token_on_all_workers(
    client: httpx.Client, sibling_client: httpx.Client, obtain: Obtain, by: tuple[str, str]
) -> None:
    token, other = obtain(client), obtain(client)
    for each in (client, sibling_client):
        assert active(each, token)
    answer = post(client, "revoke", by, token=token)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["cache-control"] == "no-store"
    for each in (sibling_client, client):
        assert post(each, "introspect", token=token).content == INACTIVE
        assert not probe(each, token)
        assert each.get("/api/me", headers={"Authorization": f"Bearer {token}"}).status_code == 401
        assert active(each, other), "other tokens of the user stay active"


def test_one_worker_revokes_what_the_other_has_cached(client: httpx.Client, sibling_client: httpx.Client) -> None:
    for _ in range(20):
        token = fetch(client)
        assert active(client, token)
        post(sibling_client, "revoke", ANN, token=token)
        assert not active(client, token)


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "pickle", ""])
def test_the_token_type_hint_is_ignored(client: httpx.Client, hint: str) -> None:
    token = fetch(client)
    assert post(client, "revoke", ANN, token=token, token_type_hint=hint).status_code == 200
    assert not active(client, token)


def test_an_invalid_token_is_answered_like_a_valid_one(client: httpx.Client, clock: HandClock) -> None:
    expired = fetch(client)
    clock.advance(25 * 3600)
    revoked, valid = fetch(client), fetch(client)
    post(client, "revoke", ANN, token=revoked)
    answers = []
    for token in (valid, revoked, expired, UNKNOWN, "u", "\u00e4" * 32, "\0", "x" * 15_000):
        answer = post(client, "revoke", ANN, token=token)
        answers.append((answer.status_code, answer.content, {**answer.headers, "date": ""}))
    assert answers[0][:2] == (200, b"")
    assert all(each == answers[0] for each in answers)


@pytest.mark.parametrize("form", [{}, {"token": ""}, {"Token": UNKNOWN}], ids=str)
def test_a_form_without_a_token_is_400_and_revokes_none(client: httpx.Client, form: dict[str, str]) -> None:
    token = fetch(client)
    answer = client.post(
        "/oauth/revoke", data={"x": "y", **form}, auth=ANN, headers={"X-Token": token}, params={"token": token}
    )
    assert refusal(answer) == (400, "invalid_request")
    assert active(client, token)


def test_an_unknown_client_revokes_nothing(client: httpx.Client) -> None:
    token = fetch(client)
    for auth in (("ann", "wrong"), ("nobody", "x"), None):
        assert refusal(post(client, "revoke", auth, token=token)) == (401, "invalid_client")
    assert active(client, token)
