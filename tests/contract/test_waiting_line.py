"""The waiting line of a pool: its order, places that are kept, safe repetition, and what cannot be passed."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.contract.conftest import Place
from tests.support.servers import START
from tokenauth.errors import LeaseLost, NoFreeToken, PlaceLost, Refusal, RequestDiffers, TooManyPlaces
from tokenauth.models import START_OF_LINE, Grant, LeaseCheck, LeaseRequest, PlaceCursor, Pool, PoolToken
from tokenauth.models import Place as InLine
from tokenauth.stores.store import PoolStore
from tokenauth.waiting_line import MAX_PLACES, REMEMBERED

POOL = Pool("p", lease_ttl=60, capacity=10)
KEEP = 40.0


async def ask(
    pools: PoolStore,
    id: str,
    now: float = START,
    user: str = "ann",
    count: int = 1,
    priority: int = 0,
    keep: float | None = KEEP,
    ttl: float | None = None,
    pool: Pool = POOL,
    known: bool = False,
) -> Grant | LeaseRequest | Refusal:
    """Ask for leases; the holder is named for the request."""
    return await pools.ask(pool, user, id, f"holder of {id}", now, count, priority, ttl, keep=keep, known=known)


def tokens(answer: object) -> Sequence[PoolToken]:
    """Return the tokens that were granted."""
    assert isinstance(answer, Grant), answer
    return answer.tokens


async def in_line(pools: PoolStore, now: float = START) -> list[str]:
    """Return the ids of those who wait, in order."""
    return [request.id for request in await pools.list_requests(POOL, now, 1000)]


async def turns(pools: PoolStore, *ids: str, now: float = START, user: str = "ann") -> list[str]:
    """Let a worker that has these requests serve them; return which were."""
    waiting = await pools.list_requests(POOL, now, 1000)
    asks = {request.key: request.asks for request in waiting if request.key in {(user, id) for id in ids}}
    may = await pools.may_have_turn(POOL, asks, now)
    served = [grant.request.id for grant in await pools.take_turns(POOL, asks, now)]
    assert may or not served, "a worker that looks first would not have served them"
    return served


async def lease_all(pools: PoolStore, count: int = 1) -> list[str]:
    """Generate tokens and lease all of them."""
    values = [f"t{number}" for number in range(count)]
    assert await pools.generate(POOL, values, START)
    for _ in values:
        assert (await pools.assign(POOL, "x", START)).token
    return values


async def test_a_request_is_served_at_once_where_a_token_is_free(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    [token] = tokens(await ask(pools, "a"))
    assert token == PoolToken("p", "t1", START + 60, "holder of a", 1, username="ann", leased_at=START)
    assert await in_line(pools) == []


async def test_a_request_waits_and_is_served_in_its_turn(pools: PoolStore) -> None:
    [value] = await lease_all(pools)
    for number, id in enumerate("abc"):
        waiting = await ask(pools, id, START + number)
        assert isinstance(waiting, LeaseRequest)
        assert waiting.kept_until == START + number + KEEP
        assert await pools.find_place(POOL, ("ann", id), START + 3) == InLine(number + 1, number + 1)
    assert await turns(pools, "a", "b", "c", now=START + 3) == []
    await pools.release(POOL, value, START + 4)
    assert await turns(pools, "b", "c", now=START + 4) == [], "its turn is a's, whose worker is another one"
    assert await turns(pools, "a", "b", "c", now=START + 4) == ["a"]
    assert await in_line(pools, START + 4) == ["b", "c"]
    assert await pools.find_place(POOL, ("ann", "c"), START + 4) == InLine(2, 2)
    assert await pools.find_place(POOL, ("ann", "a"), START + 4) is None


async def test_a_release_serves_the_first_with_one_commit(place: Place) -> None:
    pools = place.pools
    [value] = await lease_all(pools)
    for number, id in enumerate("abc"):
        await ask(pools, id, START + number)
    before = place.commits()
    released, [grant] = await pools.hand_over(POOL, value, {("ann", "a"): 1, ("ann", "b"): 1}, START + 3)
    assert place.commits() - before == 1
    assert released is not None
    assert (released.before.holder, released.token.holder, released.token.free_at) == ("x", None, START + 3)
    assert (grant.request.id, [token.fence for token in grant.tokens]) == ("a", [2])
    assert tokens(await ask(pools, "a", START + 3)) == grant.tokens
    assert [token.unlogged for token in grant.before] == [None], "it was released, and has not lapsed"
    _, granted = await pools.hand_over(POOL, value, {("ann", "c"): 1}, START + 4)
    assert granted == [], "its turn is b's, whose worker is another one"
    assert (await pools.assign(POOL, "late", START + 4)).token is None
    assert await turns(pools, "b", "c", now=START + 4) == ["b"]


async def test_a_release_that_is_refused_serves_nobody(pools: PoolStore) -> None:
    [value] = await lease_all(pools)
    await ask(pools, "a")
    await pools.generate(POOL, ["free"], START)
    refused, granted = await pools.hand_over(POOL, value, {("ann", "a"): 1}, START, LeaseCheck("y"))
    assert refused is not None
    assert (refused.granted, granted) == (False, [])
    assert await pools.hand_over(POOL, "unknown", {("ann", "a"): 1}, START) == (None, [])
    assert await turns(pools, "a") == ["a"]


async def test_releases_at_once_serve_each_request_once(pools: PoolStore, other: Place) -> None:
    """Also a copy of a request that was asked for again since."""
    values = await lease_all(pools, 5)
    for id in "abcd":
        await ask(pools, id)
    await ask(other.pools, "b")
    here = {("ann", id): 1 for id in "abd"}
    there = {("ann", "b"): 2, ("ann", "c"): 1}
    again = {("ann", "a"): 1}
    steps = [(pools, here), (other.pools, there), (pools, again), (other.pools, there), (pools, here)]
    done = await asyncio.gather(
        *(store.hand_over(POOL, value, asks, START) for value, (store, asks) in zip(values, steps, strict=True))
    )
    granted = [
        (grant.request.id, store is pools) for (store, _), (_, all) in zip(steps, done, strict=True) for grant in all
    ]
    assert all(released is not None and released.granted for released, _ in done)
    left = await turns(pools, "a", "d") + await turns(other.pools, "b", "c")
    assert sorted([id for id, _ in granted] + left) == [*"abcd"]
    assert all(here is (id in "ad") for id, here in granted), "b was asked for again, elsewhere"
    assert (await pools.count(POOL, START)) == (1, 4)


async def test_nobody_passes_those_who_wait(pools: PoolStore, other: Place) -> None:
    values = await lease_all(pools, 2)
    await ask(pools, "a")
    await pools.release(POOL, values[0], START + 1)
    for store in (pools, other.pools):
        assert (await store.assign(POOL, "late", START + 1)).token is None
        assert (await store.assign(POOL, "late", START + 1, counted=True)).left == 0
        assert isinstance(await ask(store, "late", START + 1, keep=None), NoFreeToken)
        assert isinstance(await ask(store, f"after {id(store)}", START + 1), LeaseRequest)
    await pools.release(POOL, values[1], START + 1)
    assert (await pools.assign(POOL, "late", START + 1)).token is None, "three wait for two tokens"
    assert await turns(pools, "a", now=START + 1) == ["a"]


async def test_what_no_one_in_line_can_use_is_left_to_others(pools: PoolStore) -> None:
    values = await lease_all(pools, 2)
    await ask(pools, "a")
    for value in values:
        await pools.release(POOL, value, START + 1)
    got = await asyncio.gather(*(pools.assign(POOL, "late", START + 1) for _ in range(3)))
    assert [each.token is not None for each in got].count(True) == 1
    assert await turns(pools, "a", now=START + 1) == ["a"]


async def test_a_count_gathers_and_is_not_passed(pools: PoolStore) -> None:
    values = await lease_all(pools, 3)
    await ask(pools, "three", count=3)
    await ask(pools, "one", START + 1)
    for value in values[:2]:
        await pools.release(POOL, value, START + 2)
        assert await turns(pools, "three", "one", now=START + 2) == []
        assert (await pools.assign(POOL, "late", START + 2)).token is None
    await pools.release(POOL, values[2], START + 3)
    assert await turns(pools, "three", "one", now=START + 3) == ["three"]
    again = tokens(await ask(pools, "three", START + 3, count=3))
    assert sorted(token.value for token in again) == values


async def test_a_point_of_priority_is_a_minute_of_waiting(pools: PoolStore) -> None:
    await lease_all(pools)
    await ask(pools, "first", START, keep=9999)
    await ask(pools, "second", START + 61, keep=9999)
    await ask(pools, "low", START + 62, priority=-1, keep=9999)
    await ask(pools, "raised", START + 119, priority=1, keep=9999)
    await ask(pools, "a minute later", START + 123, keep=9999)
    await ask(pools, "too late", START + 181, priority=2, keep=9999)
    wanted = ["first", "raised", "second", "too late", "low", "a minute later"]
    assert await in_line(pools, START + 200) == wanted


async def test_who_comes_later_is_never_before(pools: PoolStore) -> None:
    """The clock of one process is behind."""
    await lease_all(pools)
    await ask(pools, "a", START + 5)
    await ask(pools, "b", START + 3)
    assert await in_line(pools, START + 5) == ["a", "b"]


async def test_a_user_has_places_among_all_who_wait(pools: PoolStore) -> None:
    """They are numbered in the line of all users, and listed in order. Lapsed places and other pools are left out."""
    await lease_all(pools)
    for now, (user, id, priority) in enumerate(
        [("ann", "a1", 0), ("bob", "b", 0), ("ann", "a2", 5), ("ann", "gone", 0)]
    ):
        await ask(pools, id, START + now, user, priority=priority, keep=5 if id == "gone" else KEEP)
    await ask(pools, "elsewhere", START, "ann", pool=Pool("q", lease_ttl=60))

    async def of(user: str, after: PlaceCursor = START_OF_LINE) -> list[tuple[str, tuple[int, int]]]:
        found, _, following = await pools.list_places_of(POOL, user, START + 20, after)
        assert following is None
        assert {request.holder for request, _ in found} == {f"holder of {request.id}" for request, _ in found}
        return [(request.id, (place.position, place.waiting)) for request, place in found]

    assert await of("ann") == [("a2", (1, 3)), ("a1", (2, 3))]
    [first] = await pools.list_requests(POOL, START + 20, 1)
    assert await of("ann", after=first.cursor) == [("a1", (2, 3))]
    assert await of("eve") == []


async def test_a_place_lapses_unless_it_is_asked_for_again(pools: PoolStore) -> None:
    [value] = await lease_all(pools)
    await ask(pools, "dead")
    await ask(pools, "alive", START + 1)
    await ask(pools, "alive", START + 30)
    await pools.release(POOL, value, START + 30)
    assert await turns(pools, "alive", now=START + KEEP - 0.001) == []
    assert await in_line(pools, START + KEEP) == ["alive"]
    assert await turns(pools, "dead", "alive", now=START + KEEP) == ["alive"]
    assert await pools.find_place(POOL, ("ann", "dead"), START + KEEP) is None
    assert isinstance(await ask(pools, "dead", START + KEEP), LeaseRequest), "it joins again, at the end"
    assert await pools.find_place(POOL, ("ann", "dead"), START + KEEP) == InLine(1, 1)


async def test_a_repeated_request_keeps_its_place(pools: PoolStore) -> None:
    await lease_all(pools)
    for id in "ab":
        await ask(pools, id)
    first = await ask(pools, "a", START + 20)
    assert isinstance(first, LeaseRequest)
    assert (first.since, first.kept_until) == (START, START + 20 + KEEP)
    assert await in_line(pools, START + KEEP) == ["a"]
    assert isinstance(await ask(pools, "a", START + 21, keep=None), NoFreeToken)
    assert await in_line(pools, START + 59) == ["a"], "that one neither takes nor keeps it"


async def test_a_repeated_request_has_the_same_lease(pools: PoolStore, other: Place) -> None:
    await pools.generate(POOL, ["t1", "t2", "t3"], START)
    for keep in (KEEP, None):
        got = tokens(await ask(pools, f"a{keep}", count=1, keep=keep))
        for store in (pools, other.pools):
            assert tokens(await ask(store, f"a{keep}", START + 59, keep=keep)) == got
    kept = await pools.keep_alive(POOL, "t1", START + 59)
    assert kept is not None
    assert tokens(await ask(pools, f"a{KEEP}", START + 100)) == [kept.after]
    assert (await pools.count(POOL, START + 59)).leased == 2


@pytest.mark.parametrize("how", ["lapse", "release", "delete", "replace", "lease to another"])
async def test_a_repeated_request_whose_lease_is_over_is_lost(pools: PoolStore, how: str) -> None:
    await pools.generate(POOL, ["t1"], START)
    await ask(pools, "a")
    now = START + (60 if how == "lapse" else 1)
    if how == "release":
        await pools.release(POOL, "t1", now)
    elif how in {"delete", "replace"}:
        await pools.delete(POOL, "t1", now, "t2" if how == "replace" else None)
        assert how == "delete" or (await pools.assign(POOL, "holder of a", now, "ann")).token is not None
    elif how == "lease to another":
        await pools.force_end(POOL, "t1", now, "bob", holder="bob")
    for _ in range(2):
        assert isinstance(await ask(pools, "a", now), LeaseLost)
    while await pools.purge(POOL, now, 1000):
        pass
    assert isinstance(await ask(pools, "a", now + REMEMBERED - 1), LeaseLost)


async def test_a_request_asked_for_only_if_known_gets_no_new_place(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1", "t2"], START)
    assert isinstance(await ask(pools, "a", known=True), PlaceLost)
    assert tokens(await ask(pools, "a")) == tokens(await ask(pools, "a", known=True))
    assert await pools.count(POOL, START) == (1, 1)


async def test_a_count_is_without_what_those_who_wait_will_have(pools: PoolStore) -> None:
    await lease_all(pools)
    await pools.generate(POOL, [f"more {number}" for number in range(5)], START)
    assert isinstance(await ask(pools, "a", count=9), LeaseRequest)
    lower = replace(POOL, capacity=8)  # from now on, nobody waits for that request
    first = await pools.assign(lower, "x", START, counted=True)
    assert (first.token is not None, first.left) == (True, 4)
    assert isinstance(await ask(pools, "b", count=2), LeaseRequest)
    second = await pools.assign(lower, "x", START, counted=True)
    assert (second.token is not None, second.left) == (True, 1)
    limited = replace(lower, per_user=1)
    third = await pools.assign(limited, "x", START, counted=True)
    assert (third.token is not None, third.left) == (True, 2), "who may not have more holds up nobody"


async def test_the_same_id_with_other_terms_is_refused(pools: PoolStore) -> None:
    await lease_all(pools)
    await ask(pools, "a")
    for other_terms in (ask(pools, "a", count=2), ask(pools, "a", priority=1), ask(pools, "a", ttl=9)):
        assert isinstance(await other_terms, RequestDiffers)
    assert isinstance(await ask(pools, "a", user="bob"), LeaseRequest), "ids belong to users"
    assert isinstance(await ask(pools, "a", pool=replace(POOL, name="q")), LeaseRequest), "and to pools"


async def test_requests_at_the_same_time_get_different_tokens(pools: PoolStore, other: Place) -> None:
    await pools.generate(POOL, [f"t{number}" for number in range(7)], START)
    answers = await asyncio.gather(
        *(ask((pools, other.pools)[n % 2], f"r{n}", START, count=1 + n % 2) for n in range(10)),
        *(ask(pools, "twice", START) for _ in range(2)),
    )
    granted = {grant.request.id: grant.tokens for grant in answers if isinstance(grant, Grant)}
    values = [token.value for leases in granted.values() for token in leases]
    assert len(values) == len(set(values)) >= 6, "the last one may be withheld for a request of two"
    assert answers[-1] == answers[-2] or isinstance(answers[-1], Grant)


async def test_a_request_without_an_id_leaves_nothing(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1", "t2", "t3"], START)
    answers = await asyncio.gather(*(pools.ask(POOL, "ann", None, "x", START, count=2) for _ in range(2)))
    assert sorted(type(answer).__name__ for answer in answers) == ["Grant", "NoFreeToken"]
    assert (await pools.count(POOL, START)).leased == 2
    assert await pools.purge(POOL, START + 9 * REMEMBERED, 9) == 0


async def test_a_user_has_at_most_so_many_places(pools: PoolStore) -> None:
    await lease_all(pools)
    await asyncio.gather(*(ask(pools, f"r{number}") for number in range(MAX_PLACES)))
    assert isinstance(await ask(pools, "one more"), TooManyPlaces)
    assert isinstance(await ask(pools, "r7"), LeaseRequest)
    assert isinstance(await ask(pools, "other user", user="bob"), LeaseRequest)
    assert len(await in_line(pools)) == MAX_PLACES


async def test_a_place_is_given_up(pools: PoolStore) -> None:
    await lease_all(pools)
    places = {id: await ask(pools, id) for id in "abc"}
    seen = {id: place for id, place in places.items() if isinstance(place, LeaseRequest)}
    await ask(pools, "c")
    assert await pools.leave(POOL, ("ann", "a"), START)
    assert not await pools.leave(POOL, ("ann", "a"), START)
    assert not await pools.leave(POOL, ("bob", "b"), START)
    assert await pools.leave(POOL, ("ann", "b"), START + 1, keep=10, seen=seen["b"])
    assert not await pools.leave(POOL, ("ann", "c"), START + 1, seen=seen["c"]), (
        "it was asked for again at the same instant"
    )
    assert await in_line(pools, START + 10) == ["b", "c"]
    assert await in_line(pools, START + 11) == ["c"]


@pytest.mark.parametrize("keep", [None, 10.0])
async def test_what_a_gone_client_was_granted_is_taken_back(pools: PoolStore, keep: float | None) -> None:
    [value] = await lease_all(pools)
    await ask(pools, "a")
    await ask(pools, "b", START + 1)
    await pools.release(POOL, value, START + 2)
    [granted] = await pools.take_turns(POOL, {("ann", "a"): 1}, START + 2)
    assert await pools.put_back(POOL, granted.request, keep, START + 3)
    assert not await pools.put_back(POOL, granted.request, keep, START + 3)
    assert await in_line(pools, START + 3) == (["b"] if keep is None else ["a", "b"])
    assert await turns(pools, "a", "b", now=START + 4) == ["b" if keep is None else "a"]


async def test_a_client_that_asked_again_keeps_its_lease(pools: PoolStore, other: Place) -> None:
    await pools.generate(POOL, ["t1"], START)
    first = await ask(pools, "a")
    assert isinstance(first, Grant)
    again = tokens(await ask(other.pools, "a"))
    assert not await pools.put_back(POOL, first.request, 10, START)
    assert tokens(await ask(pools, "a")) == again
    assert (await pools.count(POOL, START)).leased == 1


async def test_a_lapsed_lease_goes_to_the_first_in_line(pools: PoolStore) -> None:
    await lease_all(pools)
    await ask(pools, "a", keep=100)
    assert (await pools.assign(POOL, "late", START + 60)).token is None
    assert await turns(pools, "a", now=START + 59.999) == []
    assert await turns(pools, "a", now=START + 60) == ["a"]


async def test_those_who_wait_get_no_withheld_token(pools: PoolStore) -> None:
    """The capacity was lowered while all tokens were leased."""
    pool = replace(POOL, capacity=2, prefill=True)
    await pools.fit(pool, ["t0", "t1"], START)
    for _ in range(2):
        await pools.assign(pool, "x", START)
    await ask(pools, "a", pool=pool)
    lowered = replace(pool, capacity=1)
    await pools.fit(lowered, (), START)
    tokens_now = await pools.list_tokens(lowered, START, "", 9)
    kept = next(token.value for token in tokens_now if not token.retired)
    await pools.release(lowered, kept, START + 1)
    assert await turns(pools, "a", now=START + 1) == [], "the retired token is still leased"
    retired = next(token.value for token in tokens_now if token.retired)
    await pools.release(lowered, retired, START + 2)
    assert await turns(pools, "a", now=START + 2) == ["a"]


async def test_more_may_be_withheld_than_is_read_at_once(pools: PoolStore) -> None:
    """1,000 free tokens are withheld, and one is left."""
    pool = replace(POOL, capacity=2001, prefill=True)
    assert await pools.fit(pool, [f"t{number}" for number in range(2001)], START) == 0
    await asyncio.gather(*(pools.assign(pool, "x", START) for _ in range(2001)))
    lowered = replace(pool, capacity=1001)
    await ask(pools, "a", pool=lowered)
    assert await pools.fit(lowered, (), START) == 0
    kept = [token.value for token in await pools.list_tokens(lowered, START, "", 2001) if not token.retired]
    await asyncio.gather(*(pools.release(lowered, value, START + 1) for value in kept[1:]))
    assert await pools.take_turns(lowered, {("ann", "a"): 1}, START + 1) == []
    _, [grant] = await pools.hand_over(lowered, kept[0], {("ann", "a"): 1}, START + 1)
    assert len(grant.tokens) == 1


async def test_who_can_no_longer_be_served_holds_up_nobody(pools: PoolStore) -> None:
    """The capacity was lowered."""
    values = await lease_all(pools, 3)
    for id in ("three", "also three"):
        await ask(pools, id, count=3)
    await ask(pools, "two", count=2)
    await ask(pools, "one")
    lowered, asks = replace(POOL, capacity=2), {("ann", "one"): 1}
    await pools.release(lowered, values[0], START)
    assert not await pools.may_have_turn(lowered, asks, START), "it is two's turn"
    await pools.leave(lowered, ("ann", "two"), START)
    assert await pools.may_have_turn(lowered, asks, START)
    [grant] = await pools.take_turns(lowered, asks, START)
    assert [token.value for token in grant.tokens] == values[:1]
    await pools.release(lowered, values[0], START)
    assert (await pools.assign(lowered, "late", START)).token is not None


async def test_leases_last_as_long_as_the_request_asked(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    [token] = tokens(await ask(pools, "a", ttl=5))
    assert token.free_at == START + 5
    kept = await pools.keep_alive(POOL, "t1", START + 4)
    assert kept is not None
    assert kept.token.free_at == START + 9


async def test_the_sweeper_forgets_old_requests(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    await ask(pools, "granted")
    await ask(pools, "lapsed")
    later = START
    for _ in range(5):
        later += 30
        await pools.keep_alive(POOL, "t1", later)
    lapsed = await pools.note_lapsed(POOL, START, later, 10)
    assert ([place.id for place in lapsed.places], lapsed.leases) == (["lapsed"], [])
    assert await pools.purge(POOL, later, 10) == 0
    assert isinstance(await ask(pools, "granted", later), Grant)
    later += 3 * REMEMBERED
    for _ in range(3):
        await pools.purge(POOL, later, 10)
        later += REMEMBERED
    assert not isinstance(await ask(pools, "granted", later), LeaseLost), "it is a new request"


async def test_a_lapsed_place_is_noted_once(pools: PoolStore) -> None:
    await lease_all(pools)
    first = await ask(pools, "a", keep=10)
    await ask(pools, "b", START + 1, keep=10)
    assert not any(await pools.note_lapsed(POOL, START, START + 9.9, 10))
    [place] = (await pools.note_lapsed(POOL, START, START + 10.5, 10)).places
    assert isinstance(first, LeaseRequest)
    assert replace(place, number=first.number) == first
    assert [place.id for place in (await pools.note_lapsed(POOL, START, START + 11, 10)).places] == ["b"]
    assert not any(await pools.note_lapsed(POOL, START, START + 12, 10))


@pytest.mark.parametrize("retired", [False, True])
async def test_a_lapsed_lease_is_noted_once(pools: PoolStore, retired: bool) -> None:
    values = await lease_all(pools, 3)
    await pools.keep_alive(POOL, "t1", START + 1)
    if retired:
        assert await pools.fit(replace(POOL, capacity=0, prefill=True), (), START + 2) == 0
    assert not any(await pools.note_lapsed(POOL, START, START + 59.9, 10))
    noted = [(await pools.note_lapsed(POOL, START, START + 62, 2)).leases for _ in range(3)]
    assert [[token.value for token in tokens] for tokens in noted] == [["t0", "t2"], ["t1"], []]
    assert {token.leased_at for tokens in noted for token in tokens} == {START}
    if not retired:
        again = [await pools.assign(POOL, "y", START + 63) for _ in values]
        assert [answer.lapsed for answer in again] == [None] * 3
        later = [await pools.assign(POOL, "z", START + 123) for _ in values]
        assert [answer.lapsed is not None for answer in later] == [True] * 3
        assert not any(await pools.note_lapsed(POOL, START, START + 124, 10))


async def test_what_lapsed_long_ago_is_not_looked_at(pools: PoolStore) -> None:
    await lease_all(pools, 2)
    await pools.release(POOL, "t0", START + 1)
    assert not any(await pools.note_lapsed(POOL, START + 60.1, START + 99, 10))
    assert [token.value for token in (await pools.note_lapsed(POOL, START + 60, START + 99, 10)).leases] == ["t1"]
