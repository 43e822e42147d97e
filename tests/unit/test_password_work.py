"""The cost of a login does not show which users exist. The tests record the hashes that are computed."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from argon2.low_level import Type, hash_secret
from passlib.hash import argon2, bcrypt, pbkdf2_sha256, scrypt

from tests.support.steps import Call, calls_of_threads, hashes
from tokenauth.errors import InvalidCredentials
from tokenauth.models import User
from tokenauth.passwords import Passwords
from tokenauth.settings.model import PasswordSettings

CHEAP = PasswordSettings(memory_kib=16, time_cost=1, threads=1)
WORD = "correct horse battery staple"


def argon(memory: int, rounds: int, lanes: int = 1, kind: str = "ID", **sizes: int) -> str:
    """Make an argon2 hash of some cost."""
    made = argon2.using(type=kind, memory_cost=memory, time_cost=rounds, parallelism=lanes, **sizes)
    return str(made.hash(WORD))


COSTS = {
    "argon2id": argon(16, 1),
    "argon2id, more memory": argon(32, 1),
    "argon2id, more passes": argon(16, 2),
    "argon2id, more lanes": argon(32, 1, lanes=2),
    "argon2id, a longer salt": argon(16, 1, salt_size=24),
    "argon2id, a longer digest": argon(16, 1, digest_size=64),
    "argon2i": argon(16, 1, kind="I"),
    "argon2d": argon(16, 1, kind="D"),
    "argon2i of version 16": hash_secret(WORD.encode(), b"somesalt", 1, 16, 1, 32, Type.I, 16).decode(),
    "bcrypt": "$2b$04$/EF3jB1rWxZ9j.gQjOshy.K2F7/vAFBCqmd6DFGyF8XBx3prECi9m",
    "bcrypt, more rounds": "$2b$05$dM7sqFNQ5QEUbfDYZzu6FeJkyn4UmkvkyafQel40YOw6ttorSE8Zy",
    "bcrypt 2a": "$2a$04$oJqUDgpC9GRuAPDUS97R6O/96kPquu1B5HXuXzmhlXX8caCq/lHk.",
    "bcrypt 2y": "$2y$04$11vQUNlBNiDc5LLJ/ELnleI6BSzM18Rnr3V9g0Uys2ksfVCUmBKb2",
    "scrypt": scrypt.using(rounds=4).hash(WORD),
    "scrypt, more rounds": scrypt.using(rounds=5).hash(WORD),
    "scrypt, larger blocks": scrypt.using(rounds=4, block_size=16).hash(WORD),
    "scrypt, twice": scrypt.using(rounds=4, parallelism=2).hash(WORD),
    "scrypt 7": scrypt.using(rounds=4, ident="$7$").hash(WORD),
    "pbkdf2_sha256": pbkdf2_sha256.using(rounds=100).hash(WORD),
    "pbkdf2_sha256, more rounds": pbkdf2_sha256.using(rounds=200).hash(WORD),
}

LENGTHS = (0, 1, 8, 36, 71, 72, 73, 256, 1024)
SENT = [letter * length for length in LENGTHS for letter in ("x", "é")] + ["\ud800", "x" * 80 + "\0"]
"""Passwords of many lengths in characters and bytes, and some that cannot be hashed."""


class Watched(NamedTuple):
    """Passwords, and the calls of their thread."""

    passwords: Passwords
    calls: list[Call]

    async def work(self, name: str, password: str = "wrong") -> str:
        """Try a wrong password; return the hash that was computed for it."""
        self.calls.clear()
        with pytest.raises(InvalidCredentials):
            await self.passwords.verify([(name, password)])
        (work,) = hashes(self.calls)
        return work


@contextmanager
def watched(users: Mapping[str, str]) -> Iterator[Watched]:
    """Record the calls of the thread that hashes for users with these hashes."""
    passwords = Passwords(CHEAP, {name: User(name, hashed) for name, hashed in users.items()})
    with calls_of_threads() as calls:
        yield Watched(passwords, calls)
    passwords.close()


@pytest.mark.parametrize("cost", COSTS)
async def test_an_unknown_name_costs_what_the_only_user_does(cost: str) -> None:
    """With any settings in [passwords] and any length of the password."""
    with watched({"ann": COSTS[cost]}) as seen:
        assert await seen.passwords.verify([("ann", WORD)])
        works = {await seen.work(name, sent) for name in ("ann", "unknown", "") for sent in SENT}
    assert len(works) == 1


async def test_an_unknown_name_costs_the_same_each_time() -> None:
    """In each worker and on each node, with any order of users and any password."""
    names = [f"name-{number}" for number in range(60)]
    found = []
    for users in (COSTS, dict(reversed(COSTS.items()))):
        with watched(users) as seen:
            found += [[await seen.work(name, sent) for name in names] for sent in ("", "x" * 73)]
            users_work = {await seen.work(name) for name in COSTS}
    assert found[0] == found[1] == found[2] == found[3]
    assert 5 < len(set(found[0])) <= len(users_work), "must differ between names"
    assert set(found[0]) <= users_work


async def test_unknown_names_cost_what_the_users_do() -> None:
    """If four in ten users have bcrypt, four in ten unknown names cost bcrypt."""
    shares = {"bcrypt": 4, "scrypt": 3, "argon2id": 2, "pbkdf2_sha256": 1}
    users = {
        f"{cost} {number}": bcrypt.using(rounds=4).hash("x") if cost == "bcrypt" else COSTS[cost]
        for cost, share in shares.items()
        for number in range(share)
    }
    attempts = 600
    with watched(users) as seen:
        drawn = Counter([await seen.work(f"unknown {number}") for number in range(attempts)])
        for cost, share in shares.items():
            expected = share / 10
            deviation = (expected * (1 - expected) / attempts) ** 0.5
            assert abs(drawn.pop(await seen.work(f"{cost} 0")) / attempts - expected) < 5 * deviation, cost
    assert not drawn


async def test_a_change_of_one_user_changes_few_unknown_names() -> None:
    """As few as for users. Otherwise a reload would show which names do not exist."""
    users = {f"user {number}": argon(16 + 8 * (number % 4), 1) for number in range(40)}
    names = [f"name-{number}" for number in range(200)]
    changes: list[dict[str, str]] = [
        {**users, "new": COSTS["bcrypt"]},
        {**users, "user 0": argon(16, 1)},
        {name: hashed for name, hashed in users.items() if name != "user 0"},
    ]
    with watched(users) as seen:
        before = [await seen.work(name) for name in names]
    for changed in changes:
        with watched(changed) as seen:
            after = [await seen.work(name) for name in names]
        differing = sum(was != now for was, now in zip(before, after, strict=True))
        assert differing < len(names) / 3


async def test_without_users_a_name_costs_what_new_hashes_do() -> None:
    with watched({"ann": argon(16, 1)}) as seen:
        new = await seen.work("ann")
    with watched({}) as seen:
        assert await seen.work("unknown") == new


async def test_a_users_password_fits_no_unknown_name() -> None:
    names = random.Random(7).sample(range(10_000), 50)
    with watched(COSTS) as seen:
        for name in names:
            await seen.work(str(name), WORD)


async def test_negligible_hashes_need_no_thread() -> None:
    """As soon as one user has another hash, all are computed in threads."""
    negligible = {"ann": pbkdf2_sha256.using(rounds=1).hash(WORD), "bob": pbkdf2_sha256.using(rounds=9).hash(WORD)}
    for users, in_threads in ((negligible, False), ({**negligible, "eve": COSTS["argon2id"]}, True)):
        with watched(users) as seen:
            assert await seen.passwords.verify([("ann", WORD)])
            with pytest.raises(InvalidCredentials):
                await seen.passwords.verify([("unknown", WORD)])
        assert bool(hashes(seen.calls)) is in_threads
