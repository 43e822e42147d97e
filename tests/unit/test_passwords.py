"""Passwords: which ones verify, what unknown names cost, and what happens when too many requests wait."""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from passlib.hash import argon2, bcrypt, pbkdf2_sha256, scrypt

from tokenauth.errors import ConfigError, InvalidCredentials, Overloaded
from tokenauth.models import User
from tokenauth.passwords import Passwords
from tokenauth.risks import SHIPPED_HASH
from tokenauth.settings.model import PasswordSettings

CHEAP = PasswordSettings(memory_kib=64, time_cost=2, threads=1, queue=2)
WORD = "correct horse battery staple"

# Those of bcrypt are written out: passlib tests bcrypt for a second before it makes the first hash.
HASHES = {
    "argon2id": argon2.using(type="ID", memory_cost=64, time_cost=2, parallelism=1).hash(WORD),
    "argon2id-lanes": argon2.using(type="ID", memory_cost=64, time_cost=1, parallelism=4).hash(WORD),
    "argon2i": argon2.using(type="I", memory_cost=64, time_cost=2, parallelism=1).hash(WORD),
    "bcrypt": "$2b$04$kygwPyB9qU5JU7ZUsCgEDujcV4EpglcwXIBVqx6/PURWdhUZt/gHC",
    "bcrypt-2a": "$2a$04$TVNzf3L7ajdhRo5c532NOuttm2PuJJlEQsq6stVo6lk4BWS1JZoIW",
    "scrypt": scrypt.using(rounds=4).hash(WORD),
    "pbkdf2_sha256": pbkdf2_sha256.using(rounds=1000).hash(WORD),
}

ODD_PASSWORDS = {
    "NUL": "correct\x00horse",
    "only NUL": "\x00",
    "73 bytes": "x" * 73,
    "1,024 characters": "é" * 1024,
    "lone surrogate": "\ud800",
    "empty": "",
}


USERS = {name: User(name, hashed) for name, hashed in HASHES.items()}
"""A user for each scheme, named after it."""


@contextmanager
def passwords_of(users: Mapping[str, User]) -> Iterator[Passwords]:
    """Make passwords at the lowest useful cost, one thread and a queue of two."""
    made = Passwords(CHEAP, users)
    yield made
    made.close()


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    """Make passwords of a user for each scheme."""
    with passwords_of(USERS) as made:
        yield made


async def right(passwords: Passwords, word: str, name: str) -> bool:
    """Return whether a word is the password of a name."""
    try:
        await passwords.verify([(name, word)])
    except InvalidCredentials:
        return False
    return True


def test_a_hash_is_argon2id_at_the_configured_cost(passwords: Passwords) -> None:
    assert passwords.hash(WORD).startswith("$argon2id$v=19$m=64,t=2,p=1$")
    assert passwords.hash(WORD) != passwords.hash(WORD), "each has its own salt"


@pytest.mark.parametrize("scheme", HASHES)
async def test_every_scheme_accepts_only_the_right_password(passwords: Passwords, scheme: str) -> None:
    assert await passwords.verify([(scheme, WORD)]) == (USERS[scheme], WORD)
    for wrong in (WORD + " ", WORD.upper(), WORD[:-1], f" {WORD}"):
        assert not await right(passwords, wrong, scheme)


@pytest.mark.parametrize("scheme", HASHES)
@pytest.mark.parametrize("odd", ODD_PASSWORDS)
async def test_what_a_scheme_cannot_hash_is_just_wrong(passwords: Passwords, scheme: str, odd: str) -> None:
    assert not await right(passwords, ODD_PASSWORDS[odd], scheme)
    assert await right(passwords, WORD, scheme), "and the executor still works"


async def test_bcrypt_compares_more_than_72_bytes() -> None:
    with passwords_of({"ann": User("ann", bcrypt.using(rounds=4).hash("x" * 72))}) as passwords:
        assert await right(passwords, "x" * 72, "ann")
        assert not await right(passwords, "x" * 73, "ann")


@pytest.mark.parametrize("word", ["p\u00e4ssw\u00f6rt", "\U0001f511" * 20, "é" * 1024, " blanks at both ends "])
async def test_a_password_is_not_normalized(word: str) -> None:
    with passwords_of({}) as passwords:
        hashed = passwords.hash(word)
    with passwords_of({"ann": User("ann", hashed)}) as passwords:
        assert await right(passwords, word, "ann")
        assert not await right(passwords, word.strip() + "x", "ann")


async def test_no_password_fits_without_users(passwords: Passwords) -> None:
    for word in (WORD, "", "any password"):
        assert not await right(passwords, word, "unknown")


async def test_the_right_one_of_several_readings_is_found(passwords: Passwords) -> None:
    """They count as one attempt: each is hashed, but they take only one place in the queue."""
    pairs = [("unknown", WORD), ("scrypt", "wrong"), ("bcrypt", WORD), ("argon2i", "wrong")]
    for _ in pairs:
        pairs.append(pairs.pop(0))
        assert await passwords.verify(pairs) == (USERS["bcrypt"], WORD)
    with pytest.raises(InvalidCredentials):
        await passwords.verify([("unknown", WORD), ("scrypt", "wrong")])
    answers = await asyncio.gather(*(passwords.verify(pairs) for _ in range(4)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [tuple] * 3 + [Overloaded]


@pytest.mark.parametrize("change", ["removed", "another password", "other scopes"])
async def test_a_change_of_the_user_during_hashing_applies(change: str) -> None:
    was = User("ann", HASHES["argon2id"])
    now = {"removed": {}, "another password": {"ann": User("ann", HASHES["bcrypt"])}}
    now["other scopes"] = {"ann": User("ann", was.password_hash, ("read",))}
    users = {"ann": was}
    with passwords_of(users) as passwords:
        asked = asyncio.ensure_future(passwords.verify([("ann", WORD)]))
        await asyncio.sleep(0)
        users.clear()
        users.update(now[change])
        (found,) = await asyncio.gather(asked, return_exceptions=True)
    if change == "other scopes":
        assert found == (users["ann"], WORD)
    else:
        assert isinstance(found, InvalidCredentials)


async def test_the_queue_has_a_bounded_number_of_places(passwords: Passwords) -> None:
    asked = [("argon2id", WORD)]
    for _ in range(3):  # the places must become free again
        answers = await asyncio.gather(*(passwords.verify(asked) for _ in range(8)), return_exceptions=True)
        assert answers[:3] == [(USERS["argon2id"], WORD)] * 3, "one in the thread and two in the queue"
        assert [type(answer) for answer in answers[3:]] == [Overloaded] * 5


async def test_a_wrong_password_frees_its_memory_share(passwords: Passwords) -> None:
    for name in ("bcrypt", "unknown"):
        for word in ("wrong", "\x00", "\ud800"):
            asked = [(name, word)]
            answers = await asyncio.gather(*(passwords.verify(asked) for _ in range(3)), return_exceptions=True)
            assert [type(answer) for answer in answers] == [InvalidCredentials] * 3


async def test_cancelled_callers_take_no_memory_from_others(passwords: Passwords) -> None:
    await hang_up([asyncio.create_task(passwords.verify([("unknown", WORD)])) for _ in range(3)])
    await until_there_is_room(lambda: passwords.verify([("unknown", WORD)]), InvalidCredentials)


async def hang_up(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel callers before they are answered."""
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ended] == [asyncio.CancelledError] * 3


async def until_there_is_room(ask: Callable[[], Awaitable[object]], answer: type) -> None:
    """Wait until there are three free places."""
    async with asyncio.timeout(20):
        free = 0
        while free < 3:
            await asyncio.sleep(0.01)
            answers = await asyncio.gather(*(ask() for _ in range(3)), return_exceptions=True)
            free = [type(each) for each in answers].count(answer)


async def test_the_event_loop_runs_while_passwords_are_hashed() -> None:
    """In at least one of ten attempts, since a busy machine can delay the loop."""
    passwords = Passwords(PasswordSettings(memory_kib=32768, time_cost=3, threads=1))
    turns = 0
    for _ in range(10):
        task = asyncio.create_task(passwords.verify([("unknown", WORD)]))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        assert isinstance(task.exception(), InvalidCredentials)
        if turns > 20:
            break
    passwords.close()
    assert turns > 20


@pytest.mark.parametrize(
    "unreadable",
    [
        "",
        "admin",
        "x" * 10_000,
        hashlib.sha256(b"admin").hexdigest(),
        "$argon2id$",
        "$argon2id$v=19$m=8",
        HASHES["argon2id"][:-1] + "!",
        "$2b$12$short",
        HASHES["bcrypt"][:-1],
        HASHES["bcrypt"].replace("$04$", "$99$"),
        "$scrypt$ln=4",
        "$pbkdf2-sha256$x$y$z",
        "$1$salt$qJH7.N4xYta3aEG/dfqo/0",
        "\u00e4\u00f6\u00fc",
        f"{HASHES['argon2id']}\n",
    ],
    ids=range(15),
)
def test_an_unreadable_hash_is_a_configuration_error(unreadable: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Passwords(CHEAP, {"bob": User("bob", HASHES["scrypt"]), "ann": User("ann", unreadable)})
    assert str(refusal.value).startswith("users[1].password: the password of 'ann' is not a hash that can be verified")
    assert "\n" not in str(refusal.value)
    if len(unreadable) > 7:
        assert unreadable not in str(refusal.value)


def compose(text: str) -> str:
    """Return what Docker Compose makes of a value: it replaces variables, here all unset."""
    return re.sub(r"\$([A-Za-z_]\w*)", "", text)


EATEN = {
    "argon2 by Compose": compose(SHIPPED_HASH),
    "argon2 by a shell": re.sub(r"\$(\w)\w*", "", SHIPPED_HASH),
    "bcrypt with one": HASHES["bcrypt"].replace("$", "")[:-1] + "$",
    "bcrypt with none": HASHES["bcrypt"].replace("$", ""),
    "scrypt by Compose": compose(HASHES["scrypt"]),
    "only the first": HASHES["argon2id"].removeprefix("$"),
    "pbkdf2 by Compose": compose(HASHES["pbkdf2_sha256"]),
}


@pytest.mark.parametrize("hashed", EATEN.values(), ids=EATEN)
def test_a_hash_without_its_dollars_is_recognised(hashed: str) -> None:
    with pytest.raises(ConfigError, match=r"it lacks `\$` signs; if it came through Docker Compose") as refusal:
        Passwords(CHEAP, {"ann": User("ann", hashed)})
    assert hashed not in str(refusal.value)


@pytest.mark.parametrize(
    "hashed",
    ["short", "", "$1$salt$qJH7.N4xYta3aEG/dfqo/0", HASHES["argon2id"][:-1], "$2b$12$x"],
    ids=["short", "empty", "md5", "cut argon2id", "cut bcrypt"],
)
def test_other_broken_hashes_get_no_hint_of_dollars(hashed: str) -> None:
    with pytest.raises(ConfigError, match="is not a hash") as refusal:
        Passwords(CHEAP, {"ann": User("ann", hashed)})
    assert "Compose" not in str(refusal.value)


def argon(memory: int, rounds: int, lanes: int = 1, type: str = "ID") -> str:
    """Make a hash of some cost."""
    return str(argon2.using(type=type, memory_cost=memory, time_cost=rounds, parallelism=lanes).hash(WORD))


@pytest.mark.parametrize(
    ("hashed", "weak"),
    [
        pytest.param(argon(64, 2), False, id="as configured"),
        pytest.param(argon(32, 2), True, id="less memory"),
        pytest.param(argon(64, 1), True, id="less time"),
        pytest.param(argon(128, 2), False, id="more memory"),
        pytest.param(argon(64, 3), False, id="more time"),
        pytest.param(argon(128, 3, lanes=4), False, id="more of everything"),
        pytest.param(argon(64, 2, type="I"), True, id="another argon2"),
        pytest.param(HASHES["bcrypt"], True, id="16 rounds of bcrypt"),
        pytest.param(
            "$2b$12$C7FjG/iht/rq97m3F/IBAOvqVtDstadzbEPCkl1Kq3EIZIQen3k/q", False, id="4,096 rounds of bcrypt"
        ),
        pytest.param(scrypt.using(rounds=4).hash(WORD), True, id="16 rounds of scrypt"),
        pytest.param("$scrypt$ln=14,r=8,p=1$c2FsdA$" + "A" * 43, False, id="16 MiB of scrypt"),
        pytest.param("$scrypt$ln=14,r=1,p=1$c2FsdA$" + "A" * 43, True, id="2 MiB of scrypt"),
        pytest.param(pbkdf2_sha256.using(rounds=10).hash(WORD), True, id="10 rounds of pbkdf2"),
    ],
)
def test_a_hash_is_weak_when_it_costs_an_attacker_less(passwords: Passwords, hashed: str, weak: bool) -> None:
    _, is_weak = passwords.assess(User("ann", hashed))
    assert is_weak is weak
