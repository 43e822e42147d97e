"""TokenAuth: which origins receive the token, also after redirects. None receives the password."""

from collections.abc import Iterator

import httpx
import pytest

from tests.wire.client.issuers import Hand
from tests.wire.client.sites import OPTIONS, Issuer, Kind, Seen, Site, site
from tokenauth.client import TokenAuth
from tokenauth.errors import IssuerUnavailable


@pytest.fixture(params=["threads", "tasks"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


@pytest.fixture(params=[False, True], ids=["X-Token", "bearer"])
def bearer(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def home() -> Iterator[Site]:
    """Serve an issuer and a guarded service."""
    with site(Issuer()) as running:
        yield running


@pytest.fixture
def elsewhere() -> Iterator[Site]:
    """Serve another origin."""
    with site(lambda request: (200, {}, b"thanks")) as running:
        yield running


def test_the_token_is_sent_in_the_chosen_header(kind: Kind, home: Site, wall: Hand, bearer: bool) -> None:
    auth = TokenAuth(home.url, "ann", "ann-secret", bearer=bearer, clock=wall)
    for _ in range(2):
        assert kind.send(auth, "GET", f"{home.url}/x", headers={} if bearer else {"X-Token": "stale"}).is_success
    value = "1".zfill(64)
    for request in home.seen[1:]:
        sent = {name: request.headers.get(name) for name in ("x-token", "authorization")}
        expected = {"x-token": value, "authorization": None}
        assert sent == ({"x-token": None, "authorization": f"Bearer {value}"} if bearer else expected)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_carries_no_token(
    kind: Kind, home: Site, elsewhere: Site, wall: Hand, bearer: bool, status: int
) -> None:
    issuer = home.answer
    home.answer = lambda request: (
        issuer(request) if request.path != "/away" else (status, {"Location": f"{elsewhere.url}/taken"}, b"")
    )
    auth = TokenAuth(home.url, "ann", "ann-secret", bearer=bearer, clock=wall)
    answer = kind.send(auth, "POST", f"{home.url}/away", content=b"body", follow_redirects=True)
    assert answer.text == "thanks"
    assert home.seen[-1].token is not None
    assert [request.path for request in elsewhere.seen] == ["/taken"]
    value = "1".zfill(64)
    assert not [text for request in elsewhere.seen for text in request.headers.values() if value in text]


def test_a_redirect_in_one_origin_keeps_only_the_bearer(kind: Kind, home: Site, wall: Hand, bearer: bool) -> None:
    issuer = home.answer
    home.answer = lambda request: issuer(request) if request.path != "/x" else (307, {"Location": "/x/"}, b"")
    auth = TokenAuth(home.url, "ann", "ann-secret", bearer=bearer, clock=wall)
    answer = kind.send(auth, "POST", f"{home.url}/x", content=b"body", follow_redirects=True)
    assert answer.status_code == (200 if bearer else 401)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("away", [False, True], ids=["same origin", "another"])
def test_a_redirected_login_does_not_resend_the_password(
    kind: Kind, home: Site, elsewhere: Site, wall: Hand, status: int, away: bool
) -> None:
    target = elsewhere if away else home
    grant = b'{"token": "%064d", "expiry_time": 1900000000}'

    def answer(request: Seen) -> tuple[int, dict[str, str], bytes]:
        if request.path == "/api/token":
            return status, {"Location": f"{target.url}/taken"}, b""
        return 200, {}, grant % 5

    home.answer = elsewhere.answer = answer
    auth = TokenAuth(home.url, "ann", "ann-secret", clock=wall)
    with pytest.raises(IssuerUnavailable):
        kind.send(auth, "GET", f"{home.url}/x", follow_redirects=True)
    assert not [request for request in elsewhere.seen if b"ann-secret" in request.body]
    assert [request.path for request in home.seen if b"ann-secret" in request.body] == ["/api/token"]


def test_by_default_the_first_origin_gets_the_token(kind: Kind, home: Site, elsewhere: Site, wall: Hand) -> None:
    auth = TokenAuth(home.url, "ann", "ann-secret", clock=wall)
    with site(lambda request: (200, {}, b"")) as third:
        for address in (home.url, elsewhere.url, home.url, elsewhere.url):
            assert kind.send(auth, "GET", f"{address}/x").is_success
        with pytest.raises(ValueError, match=f"no token for {third.url}: name it in `origins`"):
            kind.send(auth, "GET", f"{third.url}/x?secret=1")
        assert third.seen == []


def test_with_origins_only_those_and_the_issuer_get_it(kind: Kind, home: Site, elsewhere: Site, wall: Hand) -> None:
    with site(lambda request: (200, {}, b"")) as third:
        auth = TokenAuth(home.url, "ann", "ann-secret", origins=[third.url, "https://example.com"], clock=wall)
        for address in (third.url, home.url):
            assert kind.send(auth, "GET", f"{address}/x").is_success
    with pytest.raises(ValueError, match="origins"):
        kind.send(auth, "GET", f"{elsewhere.url}/x")
    assert elsewhere.seen == []


def test_a_redirect_followed_by_hand_carries_no_token(home: Site, elsewhere: Site, wall: Hand, bearer: bool) -> None:
    issuer = home.answer
    home.answer = lambda request: (
        issuer(request) if request.path != "/away" else (302, {"Location": f"{elsewhere.url}/taken"}, b"")
    )
    auth = TokenAuth(home.url, "ann", "ann-secret", bearer=bearer, clock=wall)
    with httpx.Client(auth=auth, **OPTIONS) as client:
        client.get(f"{home.url}/x")
        following = client.get(f"{home.url}/away").next_request
        assert following is not None
        client.send(following, auth=None)
    assert [request.token for request in elsewhere.seen] == [None]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://a.example", "https://A.example:443/x?y", True),
        ("http://a.example:80", "http://a.example", True),
        ("https://a.example", "http://a.example", False),
        ("https://a.example", "https://a.example:8443", False),
        ("https://a.example", "https://a.example.org", False),
        ("https://a.example", "https://a.example@b.example", False),
        ("https://a.example", "https://b.a.example", False),
    ],
)
def test_an_origin_is_scheme_host_and_port(one: str, other: str, same: bool) -> None:
    auth = TokenAuth("https://issuer.example", "ann", "ann-secret", origins=[one])
    flow = auth.sync_auth_flow(httpx.Request("GET", other))
    if same:
        assert next(flow).url == "https://issuer.example/api/token"
    else:
        with pytest.raises(ValueError, match="origins"):
            next(flow)


def test_a_string_is_not_a_list_of_origins() -> None:
    with pytest.raises(TypeError):
        TokenAuth("https://issuer.example", "ann", "ann-secret", origins="https://a.example")
