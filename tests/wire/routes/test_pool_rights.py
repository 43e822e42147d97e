"""Rights on leases: only its user may use a lease, managers may force a release, others see only the holders."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.connections import Connection
from tests.support.pool_users import PoolUser, refusal
from tests.support.servers import HandClock, Server

SECRET = re.compile("[A-Za-z0-9]{64}")


@pytest.fixture(scope="module")
def settings() -> str:
    return """
    [pools.p]
    [pools.lab]
    manage_scope = "write"
    [pools.filled]
    capacity = 5
    prefill = true
    """


@pytest.fixture
def admin(server: Server) -> Iterator[PoolUser]:
    """Log in as admin, the manager of the pool `p`, and empty the pool."""
    with Connection(server.port) as connection:
        user = PoolUser(connection)
        user.empty("p")
        yield user


@pytest.fixture
def ann(sibling: Server) -> Iterator[PoolUser]:
    """Log in at the other worker as a manager of the pool `lab`."""
    with Connection(sibling.port) as connection:
        yield PoolUser(connection, "ann")


@pytest.fixture
def bob(server: Server) -> Iterator[PoolUser]:
    """Log in as a user without scopes."""
    with Connection(server.port) as connection:
        yield PoolUser(connection, "bob")


@pytest.mark.parametrize("extra", [{}, {"holder": "ci"}, {"fence": 1}, {"holder": "ci", "fence": 1}, {"fence": 9}])
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_only_its_user_may_change_a_lease(
    admin: PoolUser, ann: PoolUser, bob: PoolUser, method: str, extra: dict[str, Any]
) -> None:
    admin.generate("p")
    lease = ann.assign("p", "ci")
    for user in (bob, admin):
        assert user.call(method, f"/p/leases/{lease.token}", extra) == refusal("forbidden")
    assert ann.keep_alive("p", lease.token, holder="ci", fence=1)[0] == 200
    assert ann.release("p", lease.token) == (204, None)


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_lapsed_lease_is_lost_then_forbidden(
    admin: PoolUser, ann: PoolUser, bob: PoolUser, clock: HandClock, method: str
) -> None:
    admin.generate("p")
    lease = ann.assign("p")
    clock.advance(60)
    for user in (ann, bob):
        assert user.call(method, f"/p/leases/{lease.token}", {"fence": 1}) == refusal("lease_lost")
    assert bob.assign("p").token == lease.token
    assert ann.call(method, f"/p/leases/{lease.token}", {"fence": 1}) == refusal("forbidden")


def test_other_users_see_holders_and_no_values(admin: PoolUser, ann: PoolUser, bob: PoolUser) -> None:
    admin.generate("p", 3)
    own, other = bob.assign("p", "mine"), ann.assign("p", "ci-7")
    seen = {member["holder"]: member for member in bob.members("p")}
    assert seen["mine"]["token"] == own.token
    assert set(seen) == {"mine", "ci-7"}, "free tokens are counted, not listed"
    assert {key: seen["ci-7"][key] for key in ("user", "lease_expiry_time")} == {
        "user": "ann",
        "lease_expiry_time": other.expiry_time,
    }
    assert "token" not in seen["ci-7"]
    assert len(admin.members("p")) == 3
    assert {member.get("token") for member in admin.members("p")} >= {own.token, other.token}


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_pages_of_leases_show_no_values(admin: PoolUser, ann: PoolUser, bob: PoolUser, limit: int) -> None:
    admin.generate("p", 6)
    for number in range(5):
        ann.assign("p", f"ci-{number}")
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        answer = bob.ask("GET", f"/p?limit={limit}&after={after}")
        assert SECRET.search(answer.body.decode()) is None
        page = answer.json()
        assert len(page["tokens"]) <= limit
        seen += [member["holder"] for member in page["tokens"]]
        after = page["next"]
    assert sorted(seen) == [f"ci-{number}" for number in range(5)]


@pytest.mark.parametrize(
    "after", ["x", "1", "-", "1-", "-1", "nan-1", "inf-1", "1-1e3", "1-" + "9" * 30, "-1-1", "1-_1"]
)
def test_an_invalid_cursor_is_named(admin: PoolUser, bob: PoolUser, after: str) -> None:
    answer = bob.ask("GET", f"/p?after={after}")
    assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
    assert "after" in answer.json()["error_description"]


@pytest.mark.parametrize(("method", "path"), [("POST", "tokens"), ("DELETE", "tokens/{token}")])
def test_only_managers_change_tokens(admin: PoolUser, ann: PoolUser, bob: PoolUser, method: str, path: str) -> None:
    (token,) = admin.generate("p")
    for user in (ann, bob):
        assert user.call(method, f"/p/{path.format(token=token)}") == refusal("insufficient_scope")
    assert admin.call(method, f"/p/{path.format(token=token)}")[0] in {201, 204}


def test_a_pool_names_the_scope_of_its_managers(admin: PoolUser, ann: PoolUser) -> None:
    (token,) = ann.generate("lab")
    assert admin.call("POST", "/lab/tokens")[0] == 403
    assert admin.assign("lab").token == token
    assert ann.call("DELETE", f"/lab/leases/{token}?force=true", {"reason": "late"}) == (204, None)
    assert ann.delete("lab", token) == (204, None)


NOT_ENDED = (
    refusal("lease_lost")[0],
    {
        "error": "lease_lost",
        "error_description": "The token is free, or under another lease than you named. No lease was ended.",
    },
)
"""The refusal for a manager. It differs from the refusal for a holder, which is about its own lease."""


def test_managers_release_by_force_with_a_reason(admin: PoolUser, ann: PoolUser, bob: PoolUser) -> None:
    admin.generate("p")
    lease = ann.assign("p", "ci")
    forced = f"/p/leases/{lease.token}?force=true"
    assert bob.call("DELETE", forced, {"reason": "x"}) == refusal("insufficient_scope")
    for wrong in ({"reason": ""}, {"reason": 1}, {"reason": "a\nb"}, {"reason": "x" * 257}, {"raeson": "x"}):
        assert admin.call("DELETE", forced, wrong)[0] == 400
    assert admin.call("DELETE", f"/p/leases/{lease.token}?force=yes", {"reason": "x"})[0] == 400
    for other in ({"fence": 2}, {"holder": "cd"}):
        assert admin.call("DELETE", forced, other) == NOT_ENDED
    assert ann.keep_alive("p", lease.token)[0] == 200
    assert admin.call("DELETE", forced, {"reason": "device is stuck", "fence": 1}) == (204, None)
    assert ann.keep_alive("p", lease.token)[1]["error"] == "lease_lost"
    assert admin.call("DELETE", forced, {"reason": "again"}) == NOT_ENDED


def told(answer: tuple[int, Any]) -> str:
    """Return what the client of a lost lease is told."""
    status, document = answer
    assert (status, document["error"]) == (409, "lease_lost"), document
    return str(document["error_description"])


@pytest.mark.parametrize(
    ("query", "did"), [("force=true", "ended"), ("force=true&take=true", "taken over")], ids=["ended", "taken over"]
)
def test_the_holder_is_told_who_ended_its_lease(
    admin: PoolUser, ann: PoolUser, bob: PoolUser, query: str, did: str
) -> None:
    admin.generate("p")
    lease = ann.assign("p", "ci")
    forced = f"/p/leases/{lease.token}?{query}"
    assert admin.call("DELETE", forced, {"reason": "device is stuck"})[0] in {200, 204}
    sentence = f"The manager 'admin' has {did} your lease. Reason: device is stuck."
    for verb in (ann.keep_alive, ann.release):
        for check in ({}, {"holder": "ci"}, {"fence": 1}, {"holder": "ci", "fence": 1}):
            assert told(verb("p", lease.token, **check)) == sentence
        for other in ({"fence": 2}, {"holder": "cd"}):
            assert "admin" not in str(verb("p", lease.token, **other))
        assert "admin" not in str(bob.keep_alive("p", lease.token, fence=1)), "it was not this user's lease"
    again = bob.assign("p") if did == "ended" else admin.keep_alive("p", lease.token)[1]
    assert told(ann.keep_alive("p", lease.token, fence=1)) == sentence, "also while another user has the token"
    if did == "ended":
        assert told(ann.keep_alive("p", lease.token)) == sentence
        assert bob.release("p", again.token) == (204, None)
        assert told(ann.keep_alive("p", lease.token, fence=1)) == sentence
        assert ann.keep_alive("p", lease.token) == refusal("lease_lost"), "it is about the latest lease"
    assert admin.call("DELETE", f"/p/tokens/{lease.token}") == (204, None)


def test_a_released_lease_was_not_ended_by_a_manager(admin: PoolUser, ann: PoolUser) -> None:
    admin.generate("p")
    lease = ann.assign("p")
    assert admin.call("DELETE", f"/p/leases/{lease.token}?force=true") == (204, None)
    assert told(ann.keep_alive("p", lease.token)) == "The manager 'admin' has ended your lease."
    assert ann.assign("p").token == lease.token
    assert ann.release("p", lease.token) == (204, None)
    assert ann.release("p", lease.token) == refusal("lease_lost")


def test_a_forced_release_is_logged(admin: PoolUser, ann: PoolUser, server: Server) -> None:
    admin.generate("p")
    lease = ann.assign("p", "ci")
    admin.call("DELETE", f"/p/leases/{lease.token}?force=true", {"reason": "device is stuck"})
    line = server.wait("lease_forced", reason="device is stuck", taken=False)
    assert {key: line[key] for key in ("pool", "user", "holder", "by", "reason", "fence", "taken")} == {
        "pool": "p", "user": "ann", "holder": "ci", "by": "admin", "reason": "device is stuck", "fence": 1,
        "taken": False,
    }  # fmt: skip
    assert lease.token not in str(line)


def test_a_manager_takes_a_lease_over_in_one_step(
    admin: PoolUser, ann: PoolUser, bob: PoolUser, server: Server, clock: HandClock
) -> None:
    admin.generate("p")
    lease = ann.assign("p", "ci")
    clock.advance(30)
    take = f"/p/leases/{lease.token}?force=true&take=true"
    assert bob.call("DELETE", take) == refusal("insufficient_scope")
    assert admin.call("DELETE", take, {"fence": 2}) == NOT_ENDED
    status, taken = admin.call("DELETE", take, {"holder": "ci", "fence": 1, "reason": "I need it"})
    assert status == 200
    assert taken == {
        "token": lease.token, "holder": "admin", "fence": 2, "expiry_time": lease.expiry_time + 30, "expires_in": 60,
    }  # fmt: skip
    assert ann.keep_alive("p", lease.token)[1]["error"] == "lease_lost"
    assert bob.keep_alive("p", lease.token) == refusal("forbidden")
    assert admin.keep_alive("p", lease.token, fence=2)[0] == 200
    line = server.wait("lease_forced", taken=True, reason="I need it")
    assert (line["user"], line["holder"], line["fence"], line["by"]) == ("ann", "ci", 1, "admin")
    assert admin.release("p", lease.token) == (204, None)
    assert admin.call("DELETE", take) == NOT_ENDED


def test_nobody_takes_a_lease_over_without_force(admin: PoolUser, ann: PoolUser) -> None:
    admin.generate("p")
    lease = ann.assign("p")
    for user in (admin, ann):
        status, answer = user.call("DELETE", f"/p/leases/{lease.token}?take=true")
        assert (status, answer["error_description"]) == (400, "take: goes with ?force=true only.")
    assert ann.keep_alive("p", lease.token)[0] == 200
