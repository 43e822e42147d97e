"""TokenStore: what it stores, revokes and lists."""

import asyncio

import pytest

from tests.contract.conftest import Place, token
from tests.support.servers import START
from tokenauth.errors import StoreUnavailable
from tokenauth.models import START_OF_TOKENS, Token
from tokenauth.stores import store as stores
from tokenauth.stores.store import TokenStore

ODD_TEXTS = ["", "Ann O'Neill; DROP TABLE tokens --", "%", "_", "жанна", "\U0001f511", "x" * 256]


async def left(tokens: TokenStore, wanted: list[Token]) -> list[Token]:
    """Return which of some tokens are still there."""
    return [one for one in wanted if await tokens.get(one.digest) is not None]


async def test_what_was_added_is_got_as_an_equal_record(tokens: TokenStore) -> None:
    given = Token.new(bytes(range(32)), "ann", "fingerprint", START + 0.123456, int(START) + 5, "10.0.0.1", "curl/8")
    await tokens.issue(given, 0, START)
    assert await tokens.find(given.id) == given
    assert await tokens.list("ann", START, 10) == [given]


async def test_a_lookup_returns_all_but_who_asked_for_it(tokens: TokenStore) -> None:
    given = Token.new(bytes(range(32)), "ann", "fingerprint", START + 0.123456, int(START) + 5, "10.0.0.1", "curl/8")
    await tokens.issue(given, 0, START)
    for _ in ("from the store", "from the cache"):
        assert await tokens.get(given.digest) == given._replace(address="", user_agent="")


@pytest.mark.parametrize("scopes", [None, (), ("reports",), ("reports", "admin")])
async def test_a_named_token_comes_back_with_its_scopes(tokens: TokenStore, scopes: tuple[str, ...] | None) -> None:
    given = token(name="nightly run", scopes=scopes)
    await tokens.issue(given, 0, START)
    assert await tokens.get(given.digest) == given
    assert await tokens.find(given.id) == given
    assert await tokens.list("ann", START, 10) == [given]


async def test_the_latest_end_and_the_last_use_are_kept(tokens: TokenStore) -> None:
    given = token(max_expires_at=int(START) + 1000)._replace(used_at=START + 0.25)
    await tokens.issue(given, 0, START)
    assert await tokens.get(given.digest) == given


async def test_text_comes_back_as_it_was_given(tokens: TokenStore) -> None:
    for text in ODD_TEXTS:
        given = token(username=text, address=text, user_agent=text)
        await tokens.issue(given, 3, START)
        assert await tokens.find(given.id) == given
        assert await tokens.list(text, START, 10) == [given]
        assert await tokens.revoke_all(text, START) == 1


async def test_an_unknown_digest_finds_no_token(tokens: TokenStore) -> None:
    await tokens.issue(token(1), 0, START)
    assert await tokens.get(token(2).digest) is None
    assert await tokens.get(b"") is None


async def test_a_missed_token_is_found_as_soon_as_it_is_issued(place: Place, other: Place) -> None:
    assert await other.tokens.get(token().digest) is None
    await place.tokens.issue(token(), 0, START)
    assert await other.tokens.get(token().digest) == token()


async def test_an_expired_token_is_still_got_and_found(tokens: TokenStore) -> None:
    await tokens.issue(token(life=-50, age=100), 0, START)
    assert await tokens.get(token().digest) == token(life=-50, age=100)
    assert await tokens.find(token().id) == token(life=-50, age=100)


async def test_one_digest_is_never_two_tokens(tokens: TokenStore) -> None:
    await tokens.issue(token(), 0, START)
    with pytest.raises(Exception, match=r".") as refusal:
        await tokens.issue(token(username="bob"), 0, START)
    assert not isinstance(refusal.value, StoreUnavailable)
    assert await tokens.get(token().digest) == token()


async def test_a_revoked_token_is_not_found_or_listed(tokens: TokenStore) -> None:
    await tokens.issue(token(1), 0, START)
    await tokens.issue(token(2), 0, START)
    assert await tokens.get(token(1).digest) is not None
    assert await tokens.revoke(token(1).digest, START) is True
    assert await tokens.get(token(1).digest) is None
    assert await tokens.find(token(1).id) is None
    assert await tokens.list(None, START, 10) == [token(2)]
    assert await tokens.get(token(2).digest) == token(2)


async def test_removing_twice_is_true_and_then_false(tokens: TokenStore) -> None:
    await tokens.issue(token(), 0, START)
    assert [await tokens.revoke(token().digest, START) for _ in range(2)] == [True, False]


async def test_removing_what_never_was_is_false(tokens: TokenStore) -> None:
    assert await tokens.revoke(token().digest, START) is False


async def test_of_two_removals_at_once_one_is_true(place: Place, other: Place) -> None:
    """Within one process they share a commit; between two they do not."""
    for number in range(10):
        await place.tokens.issue(token(number), 0, START)
        removals = [each.tokens.revoke(token(number).digest, START) for each in (place, other, place, other)]
        assert sorted(await asyncio.gather(*removals)) == [False, False, False, True]


async def test_an_expired_token_can_be_removed(tokens: TokenStore) -> None:
    await tokens.issue(token(life=-50, age=100), 0, START)
    assert await tokens.revoke(token().digest, START) is True
    assert await tokens.get(token().digest) is None


@pytest.mark.parametrize(
    ("username", "keep", "ended"),
    [
        ("ann", None, {1, 2}),
        ("bob", None, {3}),
        ("nobody", None, set()),
        ("ANN", None, set()),
        ("%", None, set()),
        ("", None, set()),
        (None, None, {1, 2, 3}),
        ("ann", 1, {2}),
        ("ann", 3, {1, 2}),
        ("ann", 9, {1, 2}),
        (None, 2, {1, 3}),
    ],
)
async def test_revoke_all_ends_the_tokens_of_one_or_all_users(
    tokens: TokenStore, username: str | None, keep: int | None, ended: set[int]
) -> None:
    added = {1: token(1), 2: token(2), 3: token(3, "bob")}
    for one in added.values():
        await tokens.issue(one, 0, START)
    kept = None if keep is None else token(keep).digest
    assert await tokens.revoke_all(username, START, kept) == len(ended)
    assert await left(tokens, list(added.values())) == [one for number, one in added.items() if number not in ended]
    assert await tokens.revoke_all(username, START, kept) == 0


async def test_remove_all_ends_as_many_as_there_are_in_steps(
    tokens: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a million tokens, no transaction may take longer than a statement may."""
    monkeypatch.setattr(stores, "_STEP", 3)
    added = [token(number) for number in range(10)]
    for one in added:
        await tokens.issue(one, 0, START)
    await tokens.issue(token(10, "bob"), 0, START)
    assert await tokens.revoke_all("ann", START, added[4].digest) == 9
    assert await left(tokens, added) == [added[4]]
    assert await tokens.revoke_all(None, START) == 2


async def test_remove_all_counts_the_live_tokens_that_it_ended(tokens: TokenStore) -> None:
    await tokens.issue(token(1, life=10), 0, START)
    await tokens.issue(token(2, life=11), 0, START)
    assert await tokens.revoke_all("ann", START + 10) == 1
    assert await tokens.get(token(2).digest) is None
    assert await tokens.list(None, START, 10) in [[], [token(1, life=10)]]


async def test_two_concurrent_revoke_alls_count_each_token_once(place: Place, other: Place) -> None:
    await asyncio.gather(*(place.tokens.issue(token(number), 0, START) for number in range(20)))
    counts = await asyncio.gather(*(each.tokens.revoke_all("ann", START) for each in (place, other, place)))
    assert sum(counts) == 20


async def test_a_token_is_found_by_its_public_id(tokens: TokenStore) -> None:
    for number in range(12):
        await tokens.issue(token(number), 0, START)
    for number in range(12):
        assert await tokens.find(token(number).id) == token(number)
    assert await tokens.find(token(12).id) is None


async def test_ids_at_the_ends_of_their_range_are_distinct(tokens: TokenStore) -> None:
    low = Token.new(bytes(32), "ann", "", START, int(START) + 1)
    high = Token.new(b"\xff" * 32, "ann", "", START, int(START) + 1)
    middle = Token.new(bytes(11) + b"\x01" + b"\xff" * 20, "ann", "", START, int(START) + 1)
    for one in (low, high, middle):
        await tokens.issue(one, 0, START)
        assert await tokens.find(one.id) == one


MALFORMED = [
    "",
    "0",
    "zz" * 12,
    token().id[:-1],
    token().id[:-2],
    token().id + "00",
    token().digest.hex(),
    "\x00" * 24,
    "\ud800" * 24,
    "٣" * 24,
    "%" * 24,
    f" {token().id}",
    f"{token().id}\n",
    f"{token().id[:12]} {token().id[12:]}",
]


async def test_a_malformed_id_finds_no_token(tokens: TokenStore) -> None:
    await tokens.issue(token(), 0, START)
    for malformed in MALFORMED:
        assert await tokens.find(malformed) is None, ascii(malformed)


async def test_a_list_is_newest_first_up_to_its_limit(tokens: TokenStore) -> None:
    added = [token(number, age=5 - number) for number in range(5)]
    for one in added:
        await tokens.issue(one, 0, START)
    for limit in (0, 1, 3, 5, 1000):
        assert await tokens.list("ann", START, limit) == added[::-1][:limit]


async def test_a_list_has_one_users_tokens_or_everybodys(tokens: TokenStore) -> None:
    anns, bobs = token(1, "ann", age=1), token(2, "bob", age=2)
    for one in (bobs, anns):
        await tokens.issue(one, 0, START)
    assert await tokens.list("ann", START, 10) == [anns]
    assert await tokens.list("bob", START, 10) == [bobs]
    assert await tokens.list("nobody", START, 10) == []
    assert await tokens.list(None, START, 10) == [anns, bobs]


async def test_a_list_has_live_tokens_only(tokens: TokenStore) -> None:
    """The boundary belongs to the end: at `expires_at` a token is over."""
    await tokens.issue(token(life=10), 0, START)
    assert await tokens.list("ann", START + 9.999, 10) == [token(life=10)]
    assert await tokens.list("ann", START + 10, 10) == []
    assert await tokens.list(None, START + 10, 10) == []


async def test_all_tokens_are_listed_by_their_end(tokens: TokenStore) -> None:
    """Page after page, the latest end first, each once, also among those that end in the same second."""
    added = [token(number, "ann" if number % 2 else "bob", life=[10, 30, 30, 30, 20, 5][number]) for number in range(6)]
    for one in added:
        await tokens.issue(one, 0, START)
    expected = sorted(added[:5], key=lambda one: (one.expires_at, one.digest), reverse=True)
    after, found = START_OF_TOKENS, list[Token]()
    while page := await tokens.list_by_end(after, START + 5, 2):
        found += page
        after = page[-1].expires_at, bytes.fromhex(page[-1].id)
    assert found == expected


async def test_purge_deletes_what_has_expired_and_nothing_else(tokens: TokenStore) -> None:
    for number in range(4):
        await tokens.issue(token(number, life=number), 0, START)
    assert await tokens.purge(START + 1.999, 100) == 2
    assert [await tokens.find(token(number).id) is None for number in range(4)] == [True, True, False, False]
    assert await tokens.purge(START + 1.999, 100) == 0


async def test_at_expires_at_a_token_is_purged(tokens: TokenStore) -> None:
    await tokens.issue(token(life=10), 0, START)
    assert await tokens.purge(START + 9.999, 100) == 0
    assert await tokens.purge(START + 10, 100) == 1


async def test_purge_takes_the_oldest_up_to_its_limit(tokens: TokenStore) -> None:
    for number in (3, 1, 4, 2, 0):
        await tokens.issue(token(number, life=number), 0, START)
    assert await tokens.purge(START + 50, 0) == 0
    for done in (2, 4):
        assert await tokens.purge(START + 50, 2) == 2
        found = [number for number in range(5) if await tokens.find(token(number).id)]
        assert found == list(range(done, 5))
    assert await tokens.purge(START + 50, 2) == 1


async def test_a_purged_token_is_gone_or_at_least_expired(place: Place, other: Place) -> None:
    """A cache need not know of a purge: what it still returns has expired."""
    await place.tokens.issue(token(life=10), 0, START)
    assert await other.tokens.get(token().digest) is not None
    await place.tokens.purge(START + 10, 100)
    for each in (place, other):
        assert await each.tokens.get(token().digest) in {None, token(life=10)}
        assert await each.tokens.find(token().id) is None
        assert await each.tokens.revoke(token().digest, START + 10) is False


async def test_tokens_are_counted_by_when_they_expire(tokens: TokenStore) -> None:
    assert await tokens.last_expiry() == 0
    for number, life in enumerate((1, 2, 2, 3, 100)):
        await tokens.issue(token(number, life=life), 0, START)
    assert await tokens.last_expiry() == START + 100
    assert await tokens.count_expiring(START + 2, START + 3, 10) == 2
    assert await tokens.count_expiring(START + 1, START + 100, 10) == 4
    assert await tokens.count_expiring(START, START + 101, 3) == 3
    assert await tokens.count_expiring(START + 101, START + 200, 3) == 0
