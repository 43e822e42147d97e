"""Hashes in the configuration: each is either refused at the start, or a password can be verified against it."""

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from time import process_time

import pytest
from argon2.low_level import Type, hash_secret
from passlib.hash import argon2, pbkdf2_sha256, scrypt

from tests.support.length import scaled
from tokenauth.errors import ConfigError, InvalidCredentials
from tokenauth.models import User
from tokenauth.passwords import Passwords, machine_memory_kib
from tokenauth.settings.model import PasswordSettings

WORD = "correct horse battery staple"
CHEAP = PasswordSettings(memory_kib=8, time_cost=1, threads=1)


def argon(lanes: int = 1, kind: str = "ID", **sizes: int) -> str:
    """Make an argon2 hash at the lowest cost."""
    made = argon2.using(type=kind, memory_cost=8 * lanes, time_cost=1, parallelism=lanes, **sizes)
    return str(made.hash(WORD))


# Those of bcrypt are written out: passlib tests bcrypt for a second before it makes the first hash.
VALID = {
    "argon2id": argon(),
    "argon2i": argon(kind="I"),
    "argon2d": argon(kind="D"),
    "argon2id, four lanes": argon(4),
    "argon2id, short": argon(salt_size=8, digest_size=16),
    "argon2id, long": argon(salt_size=48, digest_size=64),
    "argon2i of version 16": hash_secret(WORD.encode(), b"somesalt", 1, 8, 1, 32, Type.I, 16).decode(),
    "bcrypt": "$2b$04$8S1Ap3KajMiYD4ih78oo0O87b30WwXAk50zITw424N3bMk6SL5w0W",
    "bcrypt 2a": "$2a$04$HUelqIvb.573bFw7z4n1oe7GsBNJQw.0DTba.gCgd5Aygo/KRCbGG",
    "bcrypt 2y": "$2y$04$EKTjpg8nAgB3wrgQ6C.OY.1eKnvx1Nh3MT8X3cFkect9mEYnJ/rm2",
    "bcrypt 2": "$2$04$gQ3STzqlAjUBAg6AyXYipuFp5HaVdM6QPqaTxfmBC151BTmlhjhD.",
    "scrypt": scrypt.using(rounds=1, block_size=1).hash(WORD),
    "scrypt 7": scrypt.using(rounds=1, block_size=1, ident="$7$").hash(WORD),
    "pbkdf2_sha256": pbkdf2_sha256.using(rounds=1).hash(WORD),
    "pbkdf2_sha256, no salt": pbkdf2_sha256.using(rounds=1, salt=b"").hash(WORD),
}

ALTERNATIVE_FORMS = {
    "argon2i without a version": VALID["argon2i of version 16"].replace("$v=16$", "$"),
    "bcrypt with unused bits": "$2b$04$abcdefghijklmnopqrstuv" + "A" * 31,
    "pbkdf2_sha256 in plain Base64": VALID["pbkdf2_sha256"].replace(".", "+"),
}

PIECES = [
    *"$,=.+/-_aZ09 \n\t\0",
    *("$$", "==", "v=16$", "v=18$", "v=20$", "m=8", "t=0", "p=0", "data=AAAA,", ",data=AAAA", ",keyid=AAAA", "$2x$"),
    *(
        "-1",
        "+1",
        "00",
        "1_0",
        "1e3",
        "4294967296",
        "9" * 400,
        "9" * 5000,
        "\u0661",
        "\uff11",
        "\u00e9",
        "%s",
    ),
]
"""Texts to insert into hashes: separators, and digits and letters that programs read differently."""

SECONDS = 0.05
"""Hashes that take longer are not computed here."""


def mutations(hashed: str) -> Iterator[str]:
    """Yield a hash with parts cut, doubled, swapped, replaced and inserted at every position."""
    for at in range(len(hashed) + 1):
        head, tail = hashed[:at], hashed[at:]
        yield head
        yield tail
        yield head + tail[1:]
        yield head + tail[:1] + tail
        for piece in PIECES:
            yield head + piece + tail
            yield head + piece + tail[len(piece) :]
    parts = hashed.split("$")
    for one in range(len(parts)):
        yield "$".join(parts[:one] + parts[one + 1 :])
        for other in range(len(parts)):
            swapped = list(parts)
            swapped[one], swapped[other] = parts[other], parts[one]
            yield "$".join(swapped)
            yield "$".join([*parts[:one], parts[other], *parts[one:]])
            yield "$".join([*parts[:one], "", *parts[other:]])


async def verifiable(hashed: str) -> bool:
    """Return whether a hash is accepted. If so, a password must be right or wrong, with no other outcome."""
    user = User("ann", hashed)
    try:
        passwords = Passwords(CHEAP, {"ann": user})
    except ConfigError:
        return False
    for candidate in (("ann", WORD), ("ann", "wrong"), ("unknown", WORD)):
        if passwords.assess(user)[0].seconds < SECONDS:
            with suppress(InvalidCredentials):
                assert await passwords.verify([candidate]) == (user, WORD)
    passwords.close()
    return True


@pytest.mark.parametrize("name", [*VALID, *ALTERNATIVE_FORMS])
async def test_a_hash_that_can_be_verified_is_accepted(name: str) -> None:
    assert await verifiable((VALID | ALTERNATIVE_FORMS)[name])


@pytest.mark.parametrize("name", ["argon2i without a version", "pbkdf2_sha256 in plain Base64", *VALID])
async def test_a_hash_is_verified_in_any_accepted_form(name: str) -> None:
    user = User("ann", (VALID | ALTERNATIVE_FORMS)[name])
    passwords = Passwords(CHEAP, {"ann": user})
    assert await passwords.verify([("ann", WORD)]) == (user, WORD)
    passwords.close()


async def check_all(hashes: list[str]) -> None:
    """Check hashes. Some must be accepted and some refused."""
    accepted = [await verifiable(hashed) for hashed in hashes]
    assert 0 < sum(accepted) < len(accepted)


@pytest.mark.parametrize("name", VALID)
async def test_a_changed_hash_is_refused_or_can_be_verified(name: str) -> None:
    """A different sample for each name. `make faults` tests a larger one."""
    changed = sorted(set(mutations(VALID[name])))
    await check_all(random.Random(name).sample(changed, 120))


@pytest.mark.faults
@pytest.mark.parametrize("name", VALID)
async def test_a_hash_changed_twice_is_refused_or_can_be_verified(name: str) -> None:
    once = sorted(set(mutations(VALID[name])))
    chance = random.Random(name)
    await check_all(chance.sample(once, scaled(300, 50)))
    for hashed in chance.sample(once, scaled(75, 10)):
        await verifiable(chance.choice(list(mutations(hashed))))  # of some kinds, all are refused


@pytest.mark.parametrize(
    "hashed",
    [
        VALID["argon2id"].replace("p=1$", "p=1,data=AAAA$"),
        VALID["argon2id"].replace("p=1$", "p=1,keyid=AAAA$"),
        *(VALID[name].rpartition("$")[0] for name in VALID if not name.startswith("bcrypt")),
        *(VALID[name][:-1] for name in VALID),
        *(VALID[name][:29] for name in VALID if name.startswith("bcrypt ")),
        VALID["bcrypt"].replace("$2b$", "$2x$"),
        VALID["argon2id, four lanes"].replace("m=32", "m=31"),
        VALID["scrypt"].replace("ln=1,r=1", "ln=16,r=1"),
    ],
    ids=range(34),
)
def test_a_hash_that_can_never_be_verified_is_refused(hashed: str) -> None:
    with pytest.raises(ConfigError, match=r"^users\[0\]\.password: the password of 'ann' is not a hash that "):
        Passwords(CHEAP, {"ann": User("ann", hashed)})


COSTLY = {
    "64 GiB of argon2": ("$argon2id$v=19$m=67108864,t=1,p=1", "needs 64 GiB of memory"),
    "a billion passes": ("$argon2id$v=19$m=8,t=1000000000,p=1", "takes about 8,000 seconds"),
    "a thousand threads": ("$argon2id$v=19$m=8000,t=1,p=1000", "takes 1000 threads"),
    "31 of bcrypt": ("$2b$31$", "takes about 128,849 seconds"),
    "18 of bcrypt": ("$2b$18$", "takes about 16 seconds"),
    "24 of scrypt": ("$scrypt$ln=24,r=8,p=1", "needs 16 GiB of memory"),
    "many times of scrypt": ("$scrypt$ln=14,r=8,p=1000", "takes about 52 seconds"),
    "4 billion of pbkdf2": ("$pbkdf2-sha256$4000000000", "takes about 1,200 seconds"),
}


def with_digest(head: str) -> str:
    """Complete a hash of some cost, without computing it."""
    if head.startswith("$2b$"):
        return head + "." * 53
    return f"{head}${'A' * 22}${'A' * 43}"


@pytest.mark.parametrize("name", COSTLY)
def test_a_hash_that_costs_too_much_is_refused(name: str) -> None:
    head, expected = COSTLY[name]
    hashed = with_digest(head)
    with pytest.raises(ConfigError) as refusal:
        Passwords(CHEAP, {"ann": User("ann", hashed)})
    assert str(refusal.value).startswith(f"users[0].password: the password hash of 'ann' {expected} to check")
    assert str(refusal.value).endswith("; run `tokenauth user passwd ann`")
    assert hashed not in str(refusal.value)


@pytest.mark.parametrize(("memory_kib", "time_cost"), [(1 << 20, 100), (1 << 18, 100)])
def test_settings_that_cost_too_much_are_refused(memory_kib: int, time_cost: int) -> None:
    with pytest.raises(ConfigError, match=r"^passwords: a hash of this memory_kib and time_cost takes about"):
        Passwords(PasswordSettings(memory_kib=memory_kib, time_cost=time_cost))


def test_the_memory_of_this_process_is_known() -> None:
    assert 64 * 1024 < machine_memory_kib() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024


def test_the_default_cost_is_far_from_too_much() -> None:
    cost = Passwords(PasswordSettings()).new_cost
    assert cost.seconds < 0.1
    assert cost.memory_kib < 32 * 1024


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        ("$argon2id$v=19$m=16384,t=1,p=1", "$argon2id$v=19$m=16384,t=2,p=1"),
        ("$argon2id$v=19$m=8192,t=2,p=4", "$argon2id$v=19$m=16384,t=2,p=4"),
        ("$2b$08$", "$2b$09$"),
        ("$scrypt$ln=12,r=8,p=1", "$scrypt$ln=13,r=8,p=1"),
        ("$pbkdf2-sha256$50000", "$pbkdf2-sha256$100000"),
    ],
)
def test_twice_the_work_has_twice_the_estimate(once: str, twice: str) -> None:
    users = {name: User(name, with_digest(name)) for name in (once, twice)}
    passwords = Passwords(CHEAP, users)
    estimates = [passwords.assess(user)[0].seconds for user in users.values()]
    assert estimates[1] == pytest.approx(2 * estimates[0], rel=0.1)
    passwords.close()


@pytest.mark.faults
async def test_the_estimates_are_of_the_right_order() -> None:
    """Within a factor of 20 in CPU time: machines differ, and a busy one lets threads of low priority wait."""
    users = {
        "argon2": User("argon2", with_digest("$argon2id$v=19$m=16384,t=1,p=1")),
        "argon2, lanes": User("argon2, lanes", with_digest("$argon2id$v=19$m=8192,t=2,p=4")),
        "bcrypt": User("bcrypt", with_digest("$2b$08$")),
        "scrypt": User("scrypt", with_digest("$scrypt$ln=12,r=8,p=1")),
        "pbkdf2_sha256": User("pbkdf2_sha256", with_digest("$pbkdf2-sha256$50000")),
    }
    passwords = Passwords(CHEAP, users)
    for name, user in users.items():
        taken = []
        for _ in range(3):
            began = process_time()
            with pytest.raises(InvalidCredentials):
                await passwords.verify([(name, WORD)])
            taken.append(process_time() - began)
        assert 0.05 < min(taken) / passwords.assess(user)[0].seconds < 20, name
    passwords.close()
