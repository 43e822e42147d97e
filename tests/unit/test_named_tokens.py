"""Named tokens when the configuration changes: users, passwords, scopes and limits."""

import pytest

from tests.support.servers import START
from tests.support.services import Opener
from tokenauth.errors import AlreadyRotated, InvalidToken, NameTaken, StoreUnavailable, UnknownToken
from tokenauth.models import IssuedToken, User
from tokenauth.named_tokens import Requester
from tokenauth.service import Service

DAY = 86400
REQUESTER = Requester()


async def issue(service: Service, name: str = "nightly", scopes: list[str] | None = None) -> IssuedToken:
    return await service.named_tokens.issue("ann", name, scopes, None, REQUESTER)


async def scopes_of(service: Service, issued: IssuedToken) -> tuple[str, ...] | None:
    login = await service.tokens.identify(issued.value.encode())
    return None if login is None else login.user.scopes


def change(service: Service, password: str | None = None, scopes: tuple[str, ...] | None = None) -> None:
    """Change ann as a reload does."""
    old = service.users["ann"]
    ends = service.settings.tokens.named_tokens_end_with_password
    new = User("ann", password or old.password_hash, old.scopes if scopes is None else scopes, ends)
    service.users["ann"] = new


async def test_scopes_are_decided_at_each_use(opener: Opener) -> None:
    service = await opener.open()
    limited, full = await issue(service, "limited", ["write", "read"]), await issue(service, "full")
    assert (await scopes_of(service, limited), await scopes_of(service, full)) == (("read", "write"),) * 2
    change(service, scopes=("write", "new"))
    assert (await scopes_of(service, limited), await scopes_of(service, full)) == (("write",), ("write", "new"))
    change(service, scopes=("new",))
    assert await scopes_of(service, limited) == ()
    change(service, scopes=("read",))
    assert await scopes_of(service, limited) == ("read",)


async def test_it_ends_with_the_password_and_frees_its_name(opener: Opener) -> None:
    service = await opener.open()
    old = await issue(service)
    change(service, "another hash")
    assert await scopes_of(service, old) is None
    assert await service.tokens.list_live("ann") == []
    with pytest.raises(UnknownToken):
        await service.named_tokens.rotate(old.token.id, "ann", 0, REQUESTER)
    assert await scopes_of(service, await issue(service)) == ("read", "write")


async def test_it_can_outlive_a_password(opener: Opener) -> None:
    service = await opener.open("named_tokens_end_with_password = false")
    made = await issue(service)
    login = await service.tokens.grant(service.users["ann"], "", "", lambda: False)
    change(service, "another hash")
    assert await scopes_of(service, made) == ("read", "write")
    assert await scopes_of(service, login) is None, "logins end in any case"
    with pytest.raises(NameTaken):
        await issue(service)
    assert await scopes_of(service, await service.named_tokens.rotate(made.token.id, "ann", 0, REQUESTER)) is not None


async def test_what_has_ended_stays_so_when_the_setting_changes(opener: Opener) -> None:
    strict = await opener.open()
    old = await issue(strict, "old")
    lenient = await opener.open("named_tokens_end_with_password = false")
    lasting = await issue(lenient, "lasting")
    assert await scopes_of(lenient, old) is not None
    assert await scopes_of(strict, lasting) is None, "the stricter setting applies at once"
    change(lenient, "another hash")
    assert await scopes_of(lenient, old) is None, "it was issued to end with the password"
    assert await scopes_of(lenient, lasting) is not None


async def test_it_ends_with_its_user(opener: Opener) -> None:
    for setting in ("true", "false"):
        service = await opener.open(f"named_tokens_end_with_password = {setting}")
        made = await issue(service, setting)
        service.change_users(["ann"], {})
        assert await scopes_of(service, made) is None
        with pytest.raises(InvalidToken):
            await issue(service, "another")
        with pytest.raises(UnknownToken):
            await service.named_tokens.rotate(made.token.id, None, 0, REQUESTER)


async def test_each_successor_lives_as_long_as_the_first(opener: Opener) -> None:
    service = await opener.open()
    token = (await service.named_tokens.issue("ann", "nightly", None, "5d", REQUESTER)).token
    for age in (1, 1.5 * DAY, 5 * DAY - 60):  # the last one is near the end of the token
        opener.now = int(token.issued_at) + age
        new = (await service.named_tokens.rotate(token.id, "ann", "1h", REQUESTER)).token
        assert new.expires_at - int(new.issued_at) == 5 * DAY
        with pytest.raises(AlreadyRotated):
            await service.named_tokens.rotate(token.id, "ann", 0, REQUESTER)
        token = new


async def test_a_shorter_maximum_applies_to_a_rotation(opener: Opener) -> None:
    service = await opener.open()
    made = await service.named_tokens.issue("ann", "nightly", None, "300d", REQUESTER)
    shorter = await opener.open('named_ttl = "5d"\nmax_named_ttl = "30d"')
    opener.now += DAY
    new = (await shorter.named_tokens.rotate(made.token.id, "ann", "1h", REQUESTER)).token
    assert new.expires_at == int(START) + 31 * DAY


async def test_none_is_made_while_all_would_be_revoked(opener: Opener) -> None:
    """A full queue of revocations revokes every token once the store can be written."""
    service = await opener.open()
    made = await issue(service)
    service.tokens.revocations._dropped = 1
    for attempt in (issue(service, "another"), service.named_tokens.rotate(made.token.id, "ann", 0, REQUESTER)):
        with pytest.raises(StoreUnavailable):
            await attempt
    service.tokens.revocations._dropped = 0


async def test_a_held_revocation_keeps_a_token_from_rotation(opener: Opener) -> None:
    """Otherwise a thief of the login token could replace a token that was just revoked."""
    service = await opener.open()
    made = await issue(service)
    assert service.tokens.revocations.add(made.token.digest, "network")
    with pytest.raises(UnknownToken):
        await service.named_tokens.rotate(made.token.id, "ann", 0, REQUESTER)
