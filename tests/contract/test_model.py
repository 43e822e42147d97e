"""TokenStore against a model: in any order of operations, a revoked token is never returned."""

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.conftest import STORES, Opener, Place, Places, Templates, token
from tests.support.servers import START
from tokenauth.models import Token

Step = tuple[str, int, int, int]
"""What is done, through which process, and two numbers for it to choose by."""

OFTEN = ["add", "add", "get", "get", "get", "remove"]
KINDS = [*OFTEN, "remove_all", "keep", "purge", "purge_revocations", "list", "find", "later"]

step = st.tuples(st.sampled_from(KINDS), st.integers(0, 1), st.integers(0, 7), st.integers(0, 3))


@dataclass
class Model:
    """What a token store must answer, from a dict."""

    now: float = START
    added: list[Token] = field(default_factory=list)
    there: dict[bytes, Token] = field(default_factory=dict)
    purged: set[bytes] = field(default_factory=set)

    def pick(self, number: int) -> Token:
        """Choose one of the latest tokens, there or not."""
        return self.added[-1 - number % len(self.added)] if self.added else token(-1)

    def live(self, username: str | None) -> list[Token]:
        """List live tokens, newest first."""
        found = [one for one in self.there.values() if username in {None, one.username} and one.expires_at > self.now]
        return sorted(found, key=lambda one: -one.issued_at)

    def end(self, *ended: Token) -> None:
        """End tokens."""
        for one in ended:
            del self.there[one.digest]

    def may_get(self, one: Token) -> set[Token | None]:
        """Return what `get` may return: a purged token is gone, or still cached though expired."""
        return {self.there.get(one.digest), one} if one.digest in self.purged else {self.there.get(one.digest)}


async def act(model: Model, place: Place, kind: str, which: int, amount: int) -> None:
    """Do one step in the store and in the model, and compare the answers."""
    tokens, name, one = place.tokens, "ann" if amount % 2 else "bob", model.pick(which)
    model.now += 0.25  # issued_at orders tokens only when no two are equal
    now = model.now
    if kind == "add":
        life = int(now - START) + 1 + which * 3
        new = token(len(model.added), name, age=START - now, life=life)
        await tokens.issue(new, amount, now)
        model.added.append(new)
        model.there[new.digest] = new
        model.end(*model.live(name)[amount or len(model.added) :])
    elif kind == "get":
        assert await tokens.get(one.digest) in model.may_get(one)
    elif kind == "find":
        assert await tokens.find(one.id) == model.there.get(one.digest)
    elif kind == "list":
        assert await tokens.list(name if which % 2 else None, now, 5) == model.live(name if which % 2 else None)[:5]
    elif kind == "remove":
        assert await tokens.revoke(one.digest, now) is (one.digest in model.there)
        if one.digest in model.there:
            model.end(one)
    elif kind in {"remove_all", "keep"}:
        keep = one.digest if kind == "keep" else None
        username = name if amount else None
        ended = [each for each in model.live(username) if each.digest != keep]
        assert await tokens.revoke_all(username, now, keep) == len(ended)
        model.end(*ended)
    elif kind == "purge":
        expired = sorted(
            (each for each in model.there.values() if each.expires_at <= now), key=lambda each: each.expires_at
        )
        assert await tokens.purge(now, amount) == len(expired[:amount])
        for each in list(model.there.values()):  # of those that expired in one second, any may be the first
            if each.expires_at <= now and await tokens.find(each.id) is None:
                model.purged.add(each.digest)
                model.end(each)
    elif kind == "purge_revocations":
        await place.store.purge_revocations(now, which)
    else:
        model.now += which


async def live_through(opener: Opener, directory: Path, size: int, script: list[Step]) -> None:
    """Do all steps, then get every token from both processes."""
    places, model = Places(opener, directory), Model()
    both = [await places.open(size), await places.open(size)]
    try:
        for kind, who, which, amount in script:
            await act(model, both[who], kind, which, amount)
        for place in both:
            for one in model.added:
                assert await place.tokens.get(one.digest) in model.may_get(one)
            assert await place.tokens.list(None, model.now, 1000) == model.live(None)
    finally:
        await places.close_all()


@pytest.mark.parametrize("name", STORES)
def test_what_was_removed_is_never_returned(templates: Templates, name: str) -> None:
    @settings(max_examples=8, database=None)
    @given(st.lists(step, min_size=15, max_size=60), st.integers(1, 4))
    def holds(script: list[Step], size: int) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            directory = templates.fresh(name, Path(scratch) / "store")
            asyncio.run(live_through(STORES[name], directory, size, script))

    holds()
