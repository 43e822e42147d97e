"""TokenStore: uses extend tokens, never shorten them, and revive none that was revoked."""

import asyncio
from typing import TypeVar

import pytest

from tests.contract.conftest import Place, token
from tests.support.servers import START
from tokenauth.models import LATE_USE, Token, Use
from tokenauth.stores.engine import Change
from tokenauth.stores.store import TokenStore

A = TypeVar("A")

FIRST = int(START) + 100
LATEST = int(START) + 1000


def sliding(number: int = 1, username: str = "ann") -> Token:
    """Make a token that ends at FIRST, and that uses extend until LATEST."""
    return token(number, username, max_expires_at=LATEST)


def use(number: int = 1, after: float = 50, life: int = 150, stale: float = 3600, needed: float = 110) -> Use:
    """Make a use some seconds after START that extends the token until `life` seconds after START."""
    used_at = START + after
    return Use(token(number).digest, used_at, int(START) + life, used_at - stale, START + needed)


async def noted(tokens: TokenStore, *uses: Use, now: float = START + 50) -> list[Token]:
    return list((await tokens.note_uses(uses, now)).values())


async def test_a_use_extends_a_token_in_every_process(place: Place, other: Place) -> None:
    for number in (1, 2):
        await place.tokens.issue(sliding(number), 0, START)
        assert await other.tokens.get(sliding(number).digest) == sliding(number)
    extended = sliding(1)._replace(used_at=START + 50, expires_at=FIRST + 50)
    assert await noted(place.tokens, use(1)) == [extended]
    assert await place.tokens.get(extended.digest) == extended
    assert await other.tokens.get_current(extended.digest) == extended
    assert await other.tokens.get(extended.digest) == extended
    assert await other.tokens.list("ann", FIRST, 10) == [extended]
    assert await other.tokens.get_current(sliding(2).digest) == sliding(2)


async def test_no_use_extends_beyond_the_latest_end(tokens: TokenStore) -> None:
    await tokens.issue(sliding(), 0, START)
    (extended,) = await noted(tokens, use(life=5000))
    assert extended.expires_at == LATEST
    (same,) = await noted(tokens, use(after=60, life=9000, needed=9000))
    assert same == extended


async def test_a_use_never_shortens_a_token(tokens: TokenStore) -> None:
    await tokens.issue(sliding(), 0, START)
    (extended,) = await noted(tokens, use(after=50, life=150))
    assert await noted(tokens, use(after=40, life=140, needed=1000, stale=-1000)) == [extended]
    (later,) = await noted(tokens, use(after=60, life=120, needed=1000))
    assert later == extended._replace(used_at=START + 60)


async def test_a_use_that_is_not_due_is_not_written(tokens: TokenStore) -> None:
    """Another process has written a later one: the caller gets what the store has."""
    await tokens.issue(sliding(), 0, START)
    (extended,) = await noted(tokens, use(after=50, needed=110))
    assert await noted(tokens, use(after=60, life=160, needed=150)) == [extended]
    assert await noted(tokens, use(after=60, life=160, needed=150.5)) != [extended]


async def test_a_use_without_an_end_is_noted_and_extends_nothing(tokens: TokenStore) -> None:
    """Uses with an end are written in the same transaction."""
    for number in (1, 2):
        await tokens.issue(sliding(number), 0, START)
    found = await noted(tokens, use(1, stale=0)._replace(end=None), use(2))
    assert found == [
        sliding(1)._replace(used_at=START + 50),
        sliding(2)._replace(used_at=START + 50, expires_at=FIRST + 50),
    ]
    assert await noted(tokens, use(1, after=40, stale=-1000)._replace(end=None)) == found[:1]


@pytest.mark.parametrize("named", [None, "nightly"])
async def test_a_fixed_lifetime_gets_the_last_use_only(tokens: TokenStore, named: str | None) -> None:
    fixed = token(name=named)
    await tokens.issue(fixed, 0, START)
    assert await noted(tokens, use(after=50, needed=1000)) == [fixed]
    assert await noted(tokens, use(after=50, needed=1000, stale=50.5)) == [fixed]
    assert await noted(tokens, use(after=50, needed=1000, stale=50)) == [fixed._replace(used_at=START + 50)]


async def test_no_use_revives_a_revoked_token(place: Place, other: Place) -> None:
    for number in (1, 2, 3):
        await place.tokens.issue(sliding(number), 0, START)
        assert await other.tokens.get(sliding(number).digest) is not None
    await place.tokens.revoke(sliding(1).digest, START)
    await place.tokens.revoke_all("ann", START)
    for each in (place, other):
        assert await noted(each.tokens, *map(use, (1, 2, 3))) == []
        assert [await each.tokens.get(sliding(number).digest) for number in (1, 2, 3)] == [None, None, None]
    assert await place.tokens.list(None, START, 10) == []


async def test_no_use_revives_a_purged_token(place: Place, other: Place) -> None:
    await place.tokens.issue(sliding(), 0, START)
    assert await other.tokens.get(sliding().digest) == sliding()
    assert await place.tokens.purge(FIRST, 10) == 1
    assert await noted(other.tokens, use()) == []
    assert await other.tokens.get(sliding().digest) is None


async def test_a_use_is_written_shortly_after_the_end(tokens: TokenStore) -> None:
    for number in (1, 2):
        await tokens.issue(sliding(number), 0, START)
    last = FIRST + LATE_USE - 1
    (extended,) = await noted(tokens, use(1, after=99, life=300), now=last + 0.9)
    assert extended.expires_at == int(START) + 300
    assert await noted(tokens, use(2, after=99, life=300), now=last + 1) == [sliding(2)]


async def test_revoking_all_ends_what_a_late_use_could_extend(place: Place, other: Place) -> None:
    """They have expired, so they are not counted, and no use of before revives them."""
    await place.tokens.issue(sliding(1), 0, START)
    await place.tokens.issue(token(2), 0, START)
    await place.tokens.issue(token(3, life=500), 0, START)
    await place.tokens.issue(sliding(4, "bob"), 0, START)
    now = FIRST + 0.5
    assert await place.tokens.revoke_all("ann", now) == 1
    kept = [await noted(other.tokens, use(number, after=99, life=300, needed=200), now=now) for number in (1, 2, 3, 4)]
    assert [len(each) for each in kept] == [0, 1, 0, 1]
    assert await place.tokens.list(None, now, 10) == kept[3]
    assert await place.tokens.revoke_all(None, FIRST + 1) == 1
    assert await noted(place.tokens, use(4, after=200, life=400), now=FIRST + 1) == []


async def test_uses_and_revocations_at_once_do_not_block_each_other(place: Place, other: Place) -> None:
    """In any order of tokens; what is revoked stays so."""
    numbers = range(60)
    for number in numbers:
        await place.tokens.issue(sliding(number, f"user{number % 3}"), 0, START)
    uses = [use(number, needed=200) for number in numbers]
    backwards = [place.tokens.revoke(sliding(number).digest, START) for number in reversed(range(0, 60, 2))]
    await asyncio.gather(
        other.tokens.note_uses(uses, START),
        *backwards,
        place.tokens.note_uses(uses[::-1], START),
        other.tokens.revoke_all("user1", START),
        other.tokens.note_uses(uses, START),
    )
    left = {number for number in numbers if number % 2 and number % 3 != 1}
    for each in (place, other):
        assert {one.digest for one in await noted(each.tokens, *uses)} == {sliding(number).digest for number in left}
        assert {number for number in numbers if await each.tokens.get(sliding(number).digest)} == left
    found = await place.tokens.list(None, START, 100)
    assert {one.expires_at for one in found} == {int(START) + 150}


async def test_an_extended_login_counts_as_live(tokens: TokenStore) -> None:
    """It counts towards `per_user`, and is not purged before its new end."""
    await tokens.issue(sliding(1), 2, START)
    await noted(tokens, use(1))
    assert await tokens.purge(FIRST + 49, 10) == 0
    await tokens.issue(token(2, age=-120, life=500), 2, START + 120)
    await tokens.issue(token(3, age=-121, life=500), 2, START + 121)
    assert await tokens.get(sliding(1).digest) is None
    await tokens.issue(sliding(4, "bob"), 2, START)
    await noted(tokens, use(4))
    assert await tokens.purge(FIRST + 50, 10) == 1


async def test_a_use_read_before_a_rotation_shows_no_later_end(
    place: Place, other: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token whose life became shorter is not replaced in a cache by what was read before."""
    named = token(1, name="nightly", life=900)
    await place.tokens.issue(named, 0, START)
    assert await other.tokens.get(named.digest) == named
    successor = token(2, name="nightly", life=900)
    apply = other.engine.apply

    async def rotated_meanwhile(change: Change[A]) -> A:
        answer = await apply(change)
        await place.tokens.rotate(named.digest, successor, [named.credential], int(START) + 60, START)
        assert await other.tokens.get(named.digest) is not None
        return answer

    monkeypatch.setattr(other.engine, "apply", rotated_meanwhile)
    assert await noted(other.tokens, use(1, stale=50)) == [named._replace(used_at=START + 50)]
    found = await other.tokens.get(named.digest)
    assert found is not None
    assert found.expires_at == int(START) + 60
