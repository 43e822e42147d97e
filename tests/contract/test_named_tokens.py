"""TokenStore: the names of tokens, and their rotation."""

import asyncio
from typing import Any

import pytest

from tests.contract.conftest import Place, token
from tests.support.servers import START
from tokenauth.errors import AlreadyRotated, InvalidToken, NameTaken, Refusal, TooManyTokens, UnknownToken
from tokenauth.models import Token, TokenKind
from tokenauth.stores.changes.named_tokens import MAX_OF_NAME
from tokenauth.stores.store import TokenStore

CREDENTIALS = [token().credential]
LIMIT = 5


def named(number: int, name: str = "nightly", username: str = "ann", **more: Any) -> Token:
    return token(number, username, name=name, **more)


async def issue(tokens: TokenStore, new: Token, now: float = START) -> Refusal | None:
    return await tokens.issue_named(new, CREDENTIALS, LIMIT, now)


async def rotate(tokens: TokenStore, old: Token, new: Token, overlap: int, now: float = START) -> Refusal | None:
    return await tokens.rotate(old.digest, new, CREDENTIALS, int(now) + overlap, now)


async def test_a_named_token_is_issued_once_per_name(tokens: TokenStore) -> None:
    assert await issue(tokens, named(1, scopes=("read",))) is None
    assert isinstance(await issue(tokens, named(2)), NameTaken)
    assert await issue(tokens, named(3, "NIGHTLY")) is None
    assert await issue(tokens, named(4, username="bob")) is None
    assert await tokens.list("ann", START, 10) == [named(3, "NIGHTLY"), named(1, scopes=("read",))]
    assert await tokens.get(named(2).digest) is None


async def test_a_name_is_free_when_its_token_has_ended(tokens: TokenStore) -> None:
    await issue(tokens, named(1, life=10))
    assert isinstance(await issue(tokens, named(2), START + 9.9), NameTaken)
    assert await issue(tokens, named(2), START + 10) is None
    await tokens.revoke(named(2).digest, START + 10)
    assert await issue(tokens, named(3), START + 10) is None


async def test_a_token_of_an_old_password_has_no_name(tokens: TokenStore) -> None:
    assert await issue(tokens, named(1)._replace(credential="old")) is None
    assert await issue(tokens, named(2)) is None
    assert isinstance(await tokens.issue_named(named(3), ["old", "new"], LIMIT, START), NameTaken)


async def test_more_names_than_the_limit_are_refused(tokens: TokenStore) -> None:
    for number in range(LIMIT):
        assert await issue(tokens, named(number, f"job {number}")) is None
    assert isinstance(await issue(tokens, named(10, "another")), TooManyTokens)
    assert len(await tokens.list("ann", START, 100)) == LIMIT, "none was ended"
    assert await issue(tokens, named(10, "another", "bob")) is None
    await tokens.revoke(named(0).digest, START)
    assert await issue(tokens, named(11, "another")) is None


async def test_of_one_name_at_once_one_is_issued(place: Place, other: Place) -> None:
    for name in ("a", "b", "c", "d"):
        new = [named(100 * ord(name) + number, name) for number in range(8)]
        answers = await asyncio.gather(
            *(issue((place, other)[number % 2].tokens, one) for number, one in enumerate(new))
        )
        assert answers.count(None) == 1
        assert sum(isinstance(answer, NameTaken) for answer in answers) == 7
    assert len(await place.tokens.list("ann", START, 100)) == 4


async def test_the_limit_holds_for_many_at_once(place: Place, other: Place) -> None:
    new = [named(number, f"job {number}") for number in range(30)]
    answers = await asyncio.gather(*(issue((place, other)[number % 2].tokens, one) for number, one in enumerate(new)))
    assert answers.count(None) == LIMIT
    assert sum(isinstance(answer, TooManyTokens) for answer in answers) == 25
    assert len(await other.tokens.list("ann", START, 100)) == LIMIT


async def test_without_overlap_the_old_one_is_revoked(place: Place, other: Place) -> None:
    await issue(place.tokens, named(1))
    assert await other.tokens.get(named(1).digest) == named(1)
    assert await rotate(place.tokens, named(1), named(2), 0) is None
    for each in (place, other):
        assert await each.tokens.get(named(1).digest) is None
        assert await each.tokens.get(named(2).digest) == named(2)
        assert await each.tokens.find(named(1).id) is None


async def test_every_cache_has_the_new_end_of_the_old_one(place: Place, other: Place) -> None:
    await issue(place.tokens, named(1))
    for each in (place, other):
        assert await each.tokens.get(named(1).digest) == named(1)
    assert await rotate(place.tokens, named(1), named(2), 60) is None
    end = int(START) + 60
    for each in (place, other):
        old = await each.tokens.get(named(1).digest)
        assert old is not None
        assert (old.expires_at, old.is_extendable) == (end, False)
        assert await each.tokens.list("ann", START, 10) == [named(2), old]
    assert await place.tokens.list("ann", end, 10) == [named(2)]


async def test_an_overlap_never_extends_the_old_one(tokens: TokenStore) -> None:
    await issue(tokens, named(1, life=10))
    assert await rotate(tokens, named(1, life=10), named(2), 60) is None
    old = await tokens.get(named(1).digest)
    assert old is not None
    assert (old.expires_at, old.is_extendable) == (int(START) + 10, False)


@pytest.mark.parametrize(("life", "overlap"), [(1000, 60), (10, 60)])
async def test_a_token_is_rotated_once(tokens: TokenStore, life: int, overlap: int) -> None:
    """Also after its successor was revoked: the next one would live only as long as the overlap has left it."""
    await issue(tokens, named(1, life=life))
    assert await rotate(tokens, named(1), named(2), overlap) is None
    await tokens.revoke(named(2).digest, START)
    assert isinstance(await rotate(tokens, named(1), named(3), overlap), AlreadyRotated)
    assert isinstance(await rotate(tokens, named(1), named(3), 0), AlreadyRotated)
    assert [one.id for one in await tokens.list("ann", START, 10)] == [named(1).id]


async def test_only_the_newest_of_a_name_is_rotated(tokens: TokenStore) -> None:
    await issue(tokens, named(1))
    await issue(tokens, named(9, "other"))
    assert await rotate(tokens, named(1), named(2), 60) is None
    assert isinstance(await rotate(tokens, named(1), named(3), 60), AlreadyRotated)
    assert isinstance(await rotate(tokens, named(1), named(3), 0), AlreadyRotated)
    assert await tokens.get(named(1).digest) is not None, "nothing was changed"
    assert await rotate(tokens, named(2), named(3), 60) is None
    assert [one.id for one in await tokens.list("ann", START, 10)] == [
        one.id for one in (named(3), named(2), named(9), named(1))
    ]


async def test_an_ended_token_is_not_rotated(tokens: TokenStore) -> None:
    await issue(tokens, named(1, life=10))
    assert isinstance(await rotate(tokens, named(1), named(2), 60, START + 10), UnknownToken)
    assert isinstance(await rotate(tokens, named(7), named(2), 60), UnknownToken)
    await tokens.issue(token(4), 0, START)
    assert isinstance(await rotate(tokens, token(4), named(2), 60), UnknownToken), "a login"
    assert await tokens.get(named(2).digest) is None


async def test_a_name_stays_taken_during_an_overlap(tokens: TokenStore) -> None:
    await issue(tokens, named(1))
    await rotate(tokens, named(1), named(2), 60)
    await tokens.revoke(named(2).digest, START)
    assert isinstance(await issue(tokens, named(3)), NameTaken)
    assert await issue(tokens, named(3), START + 60) is None


async def test_rotations_do_not_use_up_the_names(tokens: TokenStore) -> None:
    for number in range(LIMIT):
        await issue(tokens, named(number, f"job {number}"))
    for number in range(LIMIT):
        name = f"job {number}"
        assert await rotate(tokens, named(number, name), named(number + 100, name), 60) is None
    assert isinstance(await issue(tokens, named(50, "another")), TooManyTokens)


async def test_overlaps_of_one_name_are_limited(tokens: TokenStore) -> None:
    await issue(tokens, named(1))
    for number in range(1, MAX_OF_NAME):
        assert await rotate(tokens, named(number), named(number + 1), 60) is None
    newest = named(MAX_OF_NAME)
    assert isinstance(await rotate(tokens, newest, named(50), 60), TooManyTokens)
    assert await rotate(tokens, newest, named(51), 0) is None, "a leaked token can always be replaced"
    assert await rotate(tokens, named(51), named(52), 60, START + 60) is None, "the others have ended"


async def test_of_many_rotations_at_once_one_succeeds(place: Place, other: Place) -> None:
    for overlap in (0, 60):
        old = named(overlap, f"job {overlap}")
        await issue(place.tokens, old)
        new = [named(100 + overlap + number, f"job {overlap}") for number in range(8)]
        answers = await asyncio.gather(
            *(rotate((place, other)[number % 2].tokens, old, one, overlap) for number, one in enumerate(new))
        )
        assert answers.count(None) == 1
        left = {one.id for one in await other.tokens.list("ann", START, 100) if one.name == old.name}
        assert len(left) == (2 if overlap else 1)


@pytest.mark.parametrize("overlap", [0, 60])
async def test_a_rotation_and_a_revocation_at_once(place: Place, other: Place, overlap: int) -> None:
    """In either order, the old one is gone, and there is a successor only if it came first."""
    for number in range(10):
        old, new = named(number, f"job {number}"), named(100 + number, f"job {number}")
        await place.tokens.issue_named(old, CREDENTIALS, 100, START)
        refusal, revoked = await asyncio.gather(
            rotate(place.tokens, old, new, overlap), other.tokens.revoke(old.digest, START)
        )
        assert isinstance(refusal, UnknownToken | None)
        for each in (place, other):
            assert await each.tokens.get(old.digest) is None
            assert (await each.tokens.get(new.digest) is None) is (refusal is not None)
        assert revoked or (refusal is None and not overlap)


async def test_a_revoked_login_makes_no_token(place: Place, other: Place) -> None:
    """Also while another process does not know of the revocation yet: its named token would live for months."""
    login, old = token(1), named(2)
    await place.tokens.issue(login, 0, START)
    assert await place.tokens.issue_named(old, CREDENTIALS, LIMIT, START, login.digest) is None
    await place.tokens.revoke(login.digest, START)
    made = await other.tokens.issue_named(named(3, "daily"), CREDENTIALS, LIMIT, START, login.digest)
    rotated = await other.tokens.rotate(old.digest, named(4), CREDENTIALS, int(START), START, login.digest)
    assert (type(made), type(rotated)) == (InvalidToken, InvalidToken)
    assert await place.tokens.list("ann", START, 10) == [old]


async def test_revoking_all_at_once_with_an_issue(place: Place, other: Place) -> None:
    """In either order nothing is left, also of what the revoked login asks for at the same time."""
    for number in range(20):
        login, new = token(2 * number), named(2 * number + 1)
        await place.tokens.issue(login, 0, START)
        await asyncio.gather(
            other.tokens.issue_named(new, CREDENTIALS, LIMIT, START, login.digest),
            place.tokens.revoke_all("ann", START),
        )
        assert await other.tokens.list("ann", START, 10) == []


@pytest.mark.parametrize(("kind", "left"), [("login", {2}), ("named", {1}), (None, set())])
async def test_revoke_all_ends_one_kind_or_both(tokens: TokenStore, kind: TokenKind | None, left: set[int]) -> None:
    await tokens.issue(token(1), 0, START)
    await issue(tokens, named(2))
    assert await tokens.revoke_all("ann", START, kind=kind) == 2 - len(left)
    assert {number for number in (1, 2) if await tokens.get(token(number).digest)} == left


async def test_a_list_of_one_kind_has_no_other_tokens(tokens: TokenStore) -> None:
    await issue(tokens, named(1))
    await tokens.issue(token(2, "bob"), 0, START)
    await tokens.issue(token(3), 0, START)
    await issue(tokens, named(4, "job", "bob"))
    kinds: list[TokenKind | None] = ["login", "named", None]
    listed = {
        (username, kind): [one.id for one in await tokens.list(username, START, 1, kind)]
        for username in ("ann", "bob", "eve", None)
        for kind in kinds
    }
    newest: dict[tuple[str | None, str | None], int] = {
        ("ann", "login"): 3,
        ("ann", "named"): 1,
        ("ann", None): 3,
        ("bob", "login"): 2,
        ("bob", "named"): 4,
        ("bob", None): 4,
        (None, "login"): 3,
        (None, "named"): 4,
        (None, None): 4,
    }
    assert listed == {which: [token(newest[which]).id] if which in newest else [] for which in listed}


async def test_revoke_all_of_one_kind_keeps_one(tokens: TokenStore) -> None:
    for number in range(3):
        await issue(tokens, named(number, f"job {number}"))
    await issue(tokens, named(9, "job", "bob"))
    assert await tokens.revoke_all("ann", START, named(1).digest, "named") == 2
    assert await tokens.revoke_all(None, START, named(1).digest, "named") == 1
    assert await tokens.list(None, START, 10) == [named(1, "job 1")]
