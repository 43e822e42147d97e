"""Members of pools over HTTP: names and labels in answers, reservations, and what a user can lease."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.connections import Connection
from tests.support.pool_users import PoolUser, refusal
from tests.support.servers import HandClock, Server

DAY = 86400
NONE_FREE = (
    409,
    {"error": "no_free_token", "error_description": "The pool has no free member that you may lease now."},
)


@pytest.fixture(scope="module")
def settings() -> str:
    return """
    [pools.phones]
    lease_max = "90s"
    [[pools.phones.members]]
    name = "pixel-8"
    labels = ["android", "arm"]
    note = "shelf 3"
    [[pools.phones.members]]
    name = "moto"
    labels = ["android"]
    [pools.single]
    capacity = 5
    prefill = true
    per_user = 1
    reclaim_delay = "15s"
    [pools.plain]
    [pools.none]
    capacity = 0
    """


@pytest.fixture
def admin(server: Server, now: int) -> Iterator[PoolUser]:
    """Log in as admin, the manager of all pools, and end all reservations. Leases of earlier tests have lapsed."""
    with Connection(server.port) as connection:
        user = PoolUser(connection)
        for name in ("pixel-8", "moto"):
            assert user.call("DELETE", f"/phones/members/{name}/reservation") == (204, None)
        yield user


@pytest.fixture
def ann(sibling: Server, now: int) -> Iterator[PoolUser]:
    with Connection(sibling.port) as connection:
        yield PoolUser(connection, "ann")


@pytest.fixture
def bob(server: Server, now: int) -> Iterator[PoolUser]:
    with Connection(server.port) as connection:
        yield PoolUser(connection, "bob")


def lease(user: PoolUser, *labels: str, pool: str = "phones", **more: object) -> tuple[int, Any]:
    """Ask for a lease of a member with these labels."""
    return user.call("POST", f"/{pool}/leases", {"labels": labels, **more})


def reserve(user: PoolUser, name: str = "moto", query: str = "", **body: object) -> tuple[int, Any]:
    """Ask for a reservation."""
    return user.call("PUT", f"/phones/members/{name}/reservation{query}", body)


def test_a_lease_has_the_name_and_labels_of_its_member(ann: PoolUser, now: int) -> None:
    status, leased = lease(ann, "arm", holder="ci-7")
    assert status == 201
    assert leased == {
        "token": leased["token"], "holder": "ci-7", "fence": leased["fence"], "expiry_time": now + 60,
        "expires_in": 60, "max_expiry_time": now + 90, "name": "pixel-8", "labels": ["android", "arm"],
    }  # fmt: skip
    status, kept = ann.keep_alive("phones", leased["token"])
    assert (status, kept) == (200, leased)
    assert lease(ann, "arm")[0] == 409


def test_all_users_see_all_members_and_who_has_them(
    admin: PoolUser, ann: PoolUser, bob: PoolUser, clock: HandClock, now: int
) -> None:
    _, leased = lease(ann, "moto", holder="ci-7")
    reserve(admin, "pixel-8", until="2h", note="battery swap")
    clock.advance(10)
    for user in (admin, ann, bob):
        status, shown = user.call("GET", "/phones")
        assert status == 200
        assert [shown[key] for key in ("capacity", "available", "leased", "reserved", "next")] == [2, 0, 1, 1, None]
        moto, pixel = shown["tokens"]
        values = {member.pop("token", None) for member in (moto, pixel)}
        assert (leased["token"] in values) is (user is not bob)
        assert moto == {
            "expiry_time": None, "user": "ann", "holder": "ci-7", "fence": leased["fence"], "leased_at": now,
            "lease_expiry_time": now + 60, "max_expiry_time": now + 90, "name": "moto", "labels": ["android"],
            "note": "",
        }  # fmt: skip
        assert pixel == {
            "expiry_time": None, "name": "pixel-8", "labels": ["android", "arm"], "note": "shelf 3",
            "reservation": {"until": now + 7200, "note": "battery swap", "for": None, "by": "admin"},
        }  # fmt: skip
    (listed,) = (pool for pool in bob.call("GET")[1]["pools"] if pool["name"] == "phones")
    assert listed == {
        "name": "phones",
        "capacity": 2,
        "available": 0,
        "leased": 1,
        "waiting": 0,
        "manager": False,
        "reserved": 1,
    }


def test_a_lapsed_lease_shows_its_user_no_token(ann: PoolUser, clock: HandClock) -> None:
    _, leased = lease(ann, "moto")
    assert ann.members("phones")[0]["token"] == leased["token"]
    clock.advance(60)
    assert "token" not in ann.members("phones")[0]


def test_members_come_in_pages_ordered_by_name(bob: PoolUser) -> None:
    _, first = bob.call("GET", "/phones?limit=1")
    assert ([member["name"] for member in first["tokens"]], first["next"]) == (["moto"], "moto")
    _, second = bob.call("GET", "/phones?limit=1&after=moto")
    assert ([member["name"] for member in second["tokens"]], second["next"]) == (["pixel-8"], None)


@pytest.mark.parametrize("labels", [["ios"], ["android", "ios"], ["moto", "arm"], ["moto", "pixel-8"], [""], ["\0"]])
def test_labels_that_no_member_has_are_400(ann: PoolUser, labels: list[str]) -> None:
    status, answer = lease(ann, *labels)
    assert (status, answer["error"]) == (400, "invalid_request")
    assert answer["error_description"] == "labels: no member of this pool has all of them."


def test_labels_need_a_pool_with_members(ann: PoolUser) -> None:
    status, answer = lease(ann, "android", pool="plain")
    assert (status, answer["error_description"]) == (400, "labels: this pool has no members with labels.")
    assert lease(ann, pool="none") == refusal("no_free_token")
    assert lease(ann, *["android"] * 21)[0] == 400


def test_a_reservation_keeps_a_member_from_others(
    admin: PoolUser, ann: PoolUser, bob: PoolUser, clock: HandClock, now: int
) -> None:
    status, member = reserve(admin, until=now + 100, **{"for": "BOB"})
    assert (status, member["name"]) == (200, "moto")
    assert member["reservation"] == {"until": now + 100, "note": None, "for": "bob", "by": "admin"}
    assert lease(ann, "moto") == NONE_FREE
    assert lease(bob)[1]["name"] == "moto"
    clock.advance(61)
    assert lease(ann, "moto") == NONE_FREE
    clock.advance(39)
    assert lease(ann, "moto")[0] == 201


def test_a_refused_lease_says_when_the_reservation_ends(admin: PoolUser, ann: PoolUser) -> None:
    reserve(admin, until="5m")
    answer = ann.ask("POST", "/phones/leases", {"labels": ["moto"]})
    assert (answer.status, answer.headers["retry-after"]) == (409, "300")


def test_a_leased_member_is_reserved_for_later(admin: PoolUser, ann: PoolUser, clock: HandClock, now: int) -> None:
    _, leased = lease(ann, "moto")
    assert reserve(admin, until="1h")[0] == 200
    clock.advance(50)
    assert ann.keep_alive("phones", leased["token"])[1]["expiry_time"] == now + 90, "not past lease_max"
    assert ann.keep_alive("phones", leased["token"])[1]["expires_in"] == 40
    clock.advance(40)
    assert ann.keep_alive("phones", leased["token"]) == refusal("lease_lost")
    assert lease(ann, "moto") == NONE_FREE
    assert admin.call("DELETE", "/phones/members/moto/reservation") == (204, None)
    assert lease(ann, "moto")[0] == 201


UNTIL = "until: must be an instant in Unix seconds, or a duration from now such as '2h', and in at most 366 days."


@pytest.mark.parametrize(
    "until", [-1, 0, 1, 10**40, -(10**40), "0s", "-1s", "367d", "soon", "", "1.5s", "99999999999999d", "2 h"]
)
def test_an_end_in_the_past_or_too_far_is_400(admin: PoolUser, until: object) -> None:
    assert reserve(admin, until=until)[1].get("error_description") == UNTIL
    assert "reservation" not in admin.members("phones")[0]


def test_the_end_of_a_reservation_may_equal_its_bounds(admin: PoolUser, now: int) -> None:
    for until, status in ((now, 400), (now + 1, 200), (now + 366 * DAY, 200), (now + 366 * DAY + 1, 400)):
        assert reserve(admin, until=until)[0] == status, until - now
    assert reserve(admin, until="366d")[1]["reservation"]["until"] == now + 366 * DAY


TOKEN_LIKE = "aB3" * 21 + "x"


@pytest.mark.parametrize(
    "body", [{}, {"until": None}, {"until": 1.5}, {"until": "1h", "note": ""}, {"until": "1h", "note": "a\nb"},
             {"until": "1h", "note": "x" * 257}, {"until": "1h", "note": TOKEN_LIKE}, {"until": "1h", "for": ""},
             {"until": "1h", "for": TOKEN_LIKE}, {"until": "1h", "for": "a\0b"}, {"until": "1h", "user": "bob"}]
)  # fmt: skip
def test_a_wrong_reservation_is_400_and_changes_nothing(admin: PoolUser, body: dict[str, object]) -> None:
    status, answer = admin.call("PUT", "/phones/members/moto/reservation", body)
    assert (status, answer["error"]) == (400, "invalid_request")
    assert TOKEN_LIKE not in str(answer)
    assert "reservation" not in admin.members("phones")[0]


def test_a_reservation_is_replaced_by_its_maker(admin: PoolUser, now: int) -> None:
    for until, note in ((now + 50, "first"), (now + 10, "second")):
        assert reserve(admin, until=until, note=note)[1]["reservation"]["note"] == note


def test_reservations_are_logged(admin: PoolUser, server: Server, now: int) -> None:
    reserve(admin, until=now + 77, note="logged", **{"for": "bob"})
    line = server.wait("member_reserved", note="logged")
    wanted = {"pool": "phones", "member": "moto", "until": now + 77, "user": "bob", "by": "admin"}
    assert wanted.items() <= line.items()
    assert admin.call("DELETE", "/phones/members/moto/reservation") == (204, None)
    assert {"pool": "phones", "member": "moto", "by": "admin"}.items() <= server.wait("member_unreserved").items()


@pytest.mark.parametrize("name", ["razr", "Moto", "moto%20", "..%2fmoto", "x" * 300, "%00"])
def test_an_unknown_member_is_404(admin: PoolUser, name: str) -> None:
    assert reserve(admin, name, until="1h")[0] == 404
    assert admin.call("DELETE", f"/phones/members/{name}/reservation")[0] == 404


def test_a_member_that_is_deleted_is_replaced(admin: PoolUser, ann: PoolUser) -> None:
    before = {member["name"]: member["token"] for member in admin.members("phones")}
    _, leased = lease(ann, "moto")
    assert admin.delete("phones", before["moto"]) == (204, None)
    after = {member["name"]: member["token"] for member in admin.members("phones")}
    assert after["pixel-8"] == before["pixel-8"]
    assert after["moto"] != before["moto"]
    assert lease(ann, "moto")[1]["fence"] == leased["fence"] + 1


def test_a_lease_lasts_for_its_own_ttl(ann: PoolUser, clock: HandClock, now: int) -> None:
    for ttl, seconds in ((20, 20), ("30s", 30)):
        _, leased = lease(ann, ttl=ttl)
        assert (leased["expires_in"], leased["expiry_time"]) == (seconds, now + seconds)
        assert ann.release("phones", leased["token"]) == (204, None)
    _, leased = lease(ann, ttl=20)
    clock.advance(5)
    kept = ann.keep_alive("phones", leased["token"])[1]
    assert (kept["expires_in"], kept["expiry_time"]) == (20, now + 25)
    for ttl in (0, -1, 61, "2m", "x", 10**30):
        status, answer = lease(ann, ttl=ttl)
        assert (status, answer["error_description"][:28]) == (400, "ttl: must be a duration from")


def test_a_user_leases_at_most_per_user(ann: PoolUser, bob: PoolUser, clock: HandClock) -> None:
    assert lease(ann, pool="single", holder="a")[0] == 201
    status, answer = lease(ann, pool="single", holder="b")
    assert (status, answer["error"]) == (409, "too_many_leases")
    _, leased = lease(bob, pool="single", holder="a")
    assert lease(bob, pool="single")[0] == 409
    assert bob.release("single", leased["token"]) == (204, None)
    assert lease(bob, pool="single")[0] == 201
    clock.advance(60)
    assert ann.counts("single") == (3, 2), "they lapsed, and are not reclaimed yet"
    assert lease(ann, pool="single")[0] == 409
    clock.advance(15)
    assert ann.counts("single") == (5, 0)
    assert lease(ann, pool="single")[0] == 201


def test_a_request_waits_for_the_member_with_its_labels(admin: PoolUser, ann: PoolUser, bob: PoolUser) -> None:
    _, held = lease(ann, "arm")
    status, waits = lease(bob, "android", "arm", wait=0, request="mine")
    assert (status, waits["position"]) == (202, 1)
    assert lease(ann)[1]["name"] == "moto", "it withholds only what it could use"
    assert ann.call("GET", "/phones/requests")[1]["requests"][0]["labels"] == ["android", "arm"]
    assert lease(bob, "arm", "android", "arm", wait=0, request="mine")[0] == 202, "the same labels in another order"
    assert lease(bob, "arm", wait=0, request="mine")[1]["error"] == "request_differs"
    assert ann.release("phones", held["token"]) == (204, None)
    status, granted = lease(bob, "android", "arm", wait=0, request="mine")
    assert (status, granted["name"], granted["request"]) == (201, "pixel-8", "mine")


def test_a_count_above_the_matching_members_is_400(ann: PoolUser) -> None:
    assert lease(ann, "arm", count=2)[1]["error_description"] == "count: is more than the pool has of these, 1."
    assert lease(ann, count=3)[0] == 400
    assert lease(ann, pool="single", count=2)[1]["error_description"] == "count: is more than one user may lease, 1."
    status, answer = lease(ann, "android", count=2)
    assert (status, {each["name"] for each in answer["leases"]}) == (201, {"moto", "pixel-8"})
