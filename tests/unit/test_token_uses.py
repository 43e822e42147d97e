"""Uses of tokens: what is noted, when it is written, and what happens while it cannot be."""

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing

import pytest

from tests.contract.conftest import token
from tests.support.journal import locked
from tests.support.servers import START
from tests.support.services import Opener
from tokenauth import token_uses
from tokenauth.errors import InvalidToken, NotRenewable, StoreUnavailable
from tokenauth.login_queue import never_disconnected
from tokenauth.models import Instant, IssuedToken, Token, Use
from tokenauth.service import Service
from tokenauth.settings import loader
from tokenauth.token_uses import Uses

IDLE, TTL = 400, 3600
SLIDING = f"idle = {IDLE}\nttl = {TTL}"


async def log_in(service: Service, slides: bool = True, scopes: tuple[str, ...] | None = None) -> IssuedToken:
    return await service.tokens.grant(service.users["ann"], "", "", never_disconnected, scopes, slides=slides)


async def use(service: Service, issued: IssuedToken, touch: bool = True) -> Token | None:
    return await service.tokens.validate(issued.value.encode(), touch)


async def stored(service: Service, issued: IssuedToken) -> Token:
    """Return the token as it is in the store."""
    found = await service.store.tokens.find(issued.token.id)
    assert found is not None
    return found


async def test_without_idle_lifetimes_are_fixed_to_the_second(opener: Opener) -> None:
    service = await opener.open(f"ttl = {TTL}")
    issued = await log_in(service)
    assert (issued.token.expires_at, issued.token.max_expires_at) == (int(START) + TTL, None)
    opener.now += TTL - 0.001
    assert await use(service, issued) == issued.token
    with pytest.raises(NotRenewable):
        await service.tokens.uses.renew(issued.token)
    opener.now = START + TTL
    assert await use(service, issued) is None


async def test_a_login_with_a_ttl_of_its_own_is_not_ended_by_idle(opener: Opener) -> None:
    """Such as one with "Stay logged in"."""
    service = await opener.open(SLIDING)
    plain = await service.tokens.issue("ann", "ann-secret", "", "")
    remembered = await service.tokens.issue("ann", "ann-secret", "", "", ttl=30 * 86400)
    assert (plain.token.expires_at, plain.token.max_expires_at) == (int(START) + 500, int(START) + TTL)
    assert (remembered.token.expires_at, remembered.token.max_expires_at) == (int(START) + 30 * 86400, None)
    opener.now += 29 * 86400
    assert await use(service, plain) is None
    assert await use(service, remembered) == remembered.token


@pytest.mark.parametrize(("tokens", "period"), [("", 3600), (SLIDING, 3600), ('idle = "20h"', 5 * 3600)])
async def test_the_last_use_is_written_once_in_a_period(opener: Opener, tokens: str, period: int) -> None:
    """Of tokens whose lifetime is fixed."""
    service = await opener.open(f"{tokens}\n".replace(f"ttl = {TTL}", 'ttl = "24h"'))
    issued = await log_in(service, slides=False, scopes=("read",))
    for after, written in ((period - 1, None), (period, period), (2 * period - 1, period), (2 * period, 2 * period)):
        opener.now = START + after
        assert await use(service, issued) is not None
        await service.tokens.uses.flush()
        last = (await stored(service, issued)).last_used_at
        assert last == (None if written is None else START + written)
        assert (await stored(service, issued)).expires_at == issued.token.expires_at


async def test_the_use_of_a_fixed_lifetime_writes_no_index_on_sqlite(opener: Opener) -> None:
    service = await opener.open()
    issued = await log_in(service)
    wal = opener.database.with_name(f"{opener.database.name}-wal")
    with closing(sqlite3.connect(opener.database)) as db:
        [(size,)] = db.execute("PRAGMA page_size")
        roots = dict(db.execute("SELECT rootpage, name FROM sqlite_master WHERE tbl_name = 'tokens' AND rootpage > 0"))
    opener.now += 3600
    assert await use(service, issued) is not None
    before = wal.stat().st_size
    await service.tokens.uses.flush()
    written = wal.read_bytes()[before:]
    assert (await stored(service, issued)).last_used_at == opener.now
    pages = {int.from_bytes(written[frame : frame + 4]) for frame in range(0, len(written), 24 + size)}
    assert [name for page, name in roots.items() if page in pages] == ["tokens"]


async def test_a_look_is_no_use(opener: Opener) -> None:
    service = await opener.open(SLIDING)
    issued = await log_in(service)
    opener.now += IDLE
    assert await use(service, issued, touch=False) == issued.token
    login = await service.tokens.identify(issued.value.encode(), touch=False)
    assert login is not None
    await service.tokens.uses.flush()
    assert await stored(service, issued) == issued.token


async def test_uses_of_many_tokens_share_a_commit(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await opener.open(f"{SLIDING}\nper_user = 0")
    issued = [await log_in(service) for _ in range(30)]
    opener.now += IDLE / 2
    written: list[int] = []
    write = service.store.tokens.note_uses

    async def counted(batch: Sequence[Use], now: Instant) -> Mapping[bytes, Token]:
        written.append(len(batch))
        return await write(batch, now)

    monkeypatch.setattr(service.store.tokens, "note_uses", counted)
    for _ in range(3):
        for one in issued:
            assert await use(service, one) is not None
    monkeypatch.setattr(token_uses, "BATCH", 20)
    await service.tokens.uses.flush()
    await service.tokens.uses.flush()
    assert sorted(written) == [10, 20]
    assert {(await stored(service, one)).expires_at for one in issued} == {int(START) + IDLE // 2 + 500}


async def test_a_use_shortly_before_the_end_is_written_at_once(opener: Opener) -> None:
    service = await opener.open(SLIDING)
    early, late = await log_in(service), await log_in(service)
    opener.now = early.token.expires_at - 2 * token_uses.MAX_INTERVAL
    assert await use(service, early) is not None
    assert service.tokens.uses._timer is not None
    assert service.tokens.uses._timer.when() > asyncio.get_running_loop().time() + 1, "not urgent yet"
    opener.now += 0.5
    assert await use(service, late) is not None
    assert service.tokens.uses._timer.when() <= asyncio.get_running_loop().time() + 0.001
    while (await stored(service, late)).expires_at == late.token.expires_at:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert (await stored(service, early)).used_at == START + 490


async def test_a_use_counts_here_before_it_is_written(opener: Opener) -> None:
    """While the store cannot be written, for a minute after the end that is written; elsewhere not."""
    service, elsewhere = await opener.open(SLIDING), await opener.open(SLIDING)
    issued = await log_in(service)
    with locked(opener.database):
        opener.now = issued.token.expires_at - 0.5
        assert await use(service, issued) is not None
        assert await use(elsewhere, issued, touch=False) is not None
        opener.now = issued.token.expires_at + 59.5
        extended = await use(service, issued, touch=False)
        assert extended is not None
        assert extended.expires_at == issued.token.expires_at - 1 + 500
        assert await use(elsewhere, issued, touch=False) is None
    await flushed(service)
    found = await use(elsewhere, issued, touch=False)
    assert found == await use(service, issued, touch=False)
    assert found is not None
    assert found.expires_at == issued.token.expires_at - 1 + 500


async def test_a_use_that_is_not_written_for_a_minute_is_lost(opener: Opener) -> None:
    service = await opener.open(SLIDING)
    issued = await log_in(service)
    with locked(opener.database):
        opener.now = issued.token.expires_at - 0.5
        assert await use(service, issued) is not None
        opener.now = issued.token.expires_at + 60
        assert await use(service, issued, touch=False) is None
    await flushed(service)
    assert await use(service, issued, touch=False) is None
    assert not service.tokens.uses._notes


async def flushed(service: Service) -> None:
    """Write the uses as soon as the store can be written again."""
    while True:
        try:
            await service.tokens.uses.flush()
        except StoreUnavailable:
            await asyncio.sleep(0.01)
        else:
            return


async def test_a_renewal_says_when_it_is_written_or_fails(opener: Opener) -> None:
    service, elsewhere = await opener.open(SLIDING), await opener.open(SLIDING)
    issued = await log_in(service)
    assert await use(elsewhere, issued) == issued.token
    opener.now += 10
    renewed = await service.tokens.uses.renew(issued.token)
    assert renewed == issued.token._replace(expires_at=int(START) + 510, used_at=START + 10)
    assert await stored(service, issued) == renewed
    assert await use(service, issued, touch=False) == renewed
    opener.now = START + 505
    assert await use(elsewhere, issued, touch=False) == renewed
    opener.now = START + 480
    with locked(opener.database), pytest.raises(StoreUnavailable):
        await service.tokens.uses.renew(renewed)


async def test_a_login_that_has_slid_to_its_end_can_be_renewed(opener: Opener) -> None:
    """It stays as it is: a client need not know when to stop."""
    service = await opener.open(SLIDING)
    token = (await log_in(service)).token
    while token.expires_at < int(START) + TTL:
        opener.now = token.expires_at - 1
        token = await service.tokens.uses.renew(token)
    assert token.max_expires_at == token.expires_at == int(START) + TTL
    opener.now = token.expires_at - 0.5
    assert (await service.tokens.uses.renew(token)).expires_at == token.expires_at


@pytest.mark.parametrize("how", ["revoked", "all revoked", "purged"])
async def test_what_has_ended_elsewhere_is_not_revived(opener: Opener, how: str) -> None:
    """Not by a use that was noted before, and not by a renewal."""
    service, elsewhere = await opener.open(SLIDING), await opener.open(SLIDING)
    issued = await log_in(service)
    opener.now += IDLE
    assert await use(service, issued) is not None
    if how == "revoked":
        await elsewhere.tokens.revoke(issued.value.encode())
    elif how == "all revoked":
        opener.now = issued.token.expires_at + 0.5  # it has expired, and the use that is noted would extend it
        assert await elsewhere.tokens.revoke_all("ann") == 0
    else:
        await elsewhere.store.tokens.purge(issued.token.expires_at, 10)
    await service.tokens.uses.flush()
    for each in (service, elsewhere):
        assert await use(each, issued) is None
        with pytest.raises(InvalidToken):
            await each.tokens.uses.renew(issued.token)
    assert await service.store.tokens.find(issued.token.id) is None


async def test_no_more_uses_are_held_than_the_limit(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens whose uses are held, later ones still are."""
    monkeypatch.setattr(token_uses, "MAX_NOTES", 2)
    service = await opener.open(SLIDING)
    held = Uses(service.store.tokens, lambda: opener.now, IDLE)
    tokens = [token(number, max_expires_at=int(START) + TTL) for number in range(3)]
    for after in (50, 60):
        for one in tokens:
            held.note(one, START + after)
    assert held._notes == {one.digest: START + 60 for one in tokens[:2]}
    await held.flush()
    assert not held._notes
    held.note(tokens[2], START + 60)
    assert tokens[2].digest in held._notes
    await held.close()


async def test_uses_are_written_at_the_end(opener: Opener) -> None:
    service = await opener.open(SLIDING)
    issued = await log_in(service)
    opener.now += IDLE / 2
    assert await use(service, issued) is not None
    await service.tokens.close()
    assert (await stored(service, issued)).used_at == opener.now


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ("idle = 59", "tokens.idle: must be at least 60 s, or 0 (logins live for ttl), not 59"),
        ("idle = 0.5", "tokens.idle: must be at least 60 s, or 0 (logins live for ttl), not 0.5"),
        ("idle = 90", "tokens.idle: must be a multiple of 4 seconds, not 90; write 88"),
        ("idle = 64.5", "tokens.idle: must be a multiple of 4 seconds, not 64.5; write 64"),
        ('idle = "25h"', "tokens.idle: must not be more than ttl"),
        ("idle = -4", "tokens.idle: must be a duration from 0d to 3650d, such as '24h', '5m', '30s' or a number of"),
    ],
)
def test_a_wrong_idle_is_reported_with_what_it_must_be(tokens: str, problem: str) -> None:
    with pytest.raises(Exception, match=r".") as found:
        loader.parse(f"[tokens]\n{tokens}")
    assert str(found.value).startswith(problem)


@pytest.mark.parametrize("idle", ["0", "60", '"2h"', '"24h"'])
def test_a_right_idle_is_accepted(idle: str) -> None:
    assert loader.parse(f"[tokens]\nidle = {idle}").tokens.idle >= 0
