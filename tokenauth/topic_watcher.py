"""What clients of /api/events can see, as it was when it was last looked at, and when each part of it changed."""

import asyncio
import secrets
from collections.abc import Collection, Mapping, Sequence, Set

from tokenauth.clock import Clock
from tokenauth.models import ADMIN, Identity
from tokenauth.pools import Pools
from tokenauth.status import Node
from tokenauth.stores.store import Store
from tokenauth.throttle import Throttle

Topic = tuple[str, str]
"""The name of an event, and the pool or user that it is about."""

STATUS_TOPIC: Topic = ("status", "")
THROTTLE_TOPIC: Topic = ("throttle", "")

_KEPT = 60.0
"""Seconds for which a topic is watched after the last client that may see it: it may come back."""


class _Watched:
    """What was last seen of a topic, and at which number of a change."""

    def __init__(self, seen: object, changed: int, until: float) -> None:
        self.seen = seen
        self.changed = changed
        self.until = until


class Watcher:
    """Finds out which topics have changed since it looked before."""

    def __init__(self, pools: Pools, throttle: Throttle, store: Store, node: Node, clock: Clock) -> None:
        self._pools = pools
        self._throttle = throttle
        self._store = store
        self._node = node
        self._clock = clock
        self._watched: dict[Topic, _Watched] = {}
        self._epoch = secrets.token_hex(4)
        self._number = 0

    @property
    def id(self) -> str:
        """The ID of an event that is sent now."""
        return f"{self._epoch}-{self._number}"

    @property
    def watching(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self._watched)

    def visible_to(self, user: Identity) -> Sequence[Topic]:
        """Return the topics whose changes a user may see."""
        pools = [("pool", pool.name) for pool in self._pools.usable_by(user)]
        return [("tokens", user.username), *pools, *([THROTTLE_TOPIC] if ADMIN in user.scopes else [])]

    def unwatched(self, topics: Collection[Topic]) -> Sequence[Topic]:
        return [topic for topic in topics if topic not in self._watched]

    def missed(self, last_id: str, topics: Collection[Topic], new: Collection[Topic]) -> Sequence[Topic] | None:
        """Return what has changed since an event, and what is `new`; None if the event is not of this worker."""
        epoch, _, number = last_id.partition("-")
        if epoch != self._epoch or not (number.isascii() and number.isdigit() and len(number) <= 18):
            return None
        since = int(number)
        return [topic for topic in topics if topic in new or self._watched[topic].changed > since]

    def keep(self, topics: Set[Topic]) -> None:
        """Go on watching these, and after a minute no others."""
        now = asyncio.get_running_loop().time()
        for topic, watched in [*self._watched.items()]:
            if topic in topics:
                watched.until = now + _KEPT
            elif watched.until < now:
                del self._watched[topic]

    async def look_again(self) -> Set[Topic]:
        """Look at all topics that are watched, but for the throttle. Return those that have changed."""
        return await self.look([*self._watched])

    async def look(self, topics: Collection[Topic]) -> Set[Topic]:
        """Look at topics, but for the throttle, and watch them from now on. Return those that have changed.

        Raises StoreUnavailable.
        """
        seen: dict[Topic, object] = {}
        at = self._clock()
        users = [about for name, about in topics if name == "tokens"]
        if users:
            found = await self._store.tokens.fingerprints(users, at)
            seen |= {("tokens", user): found.get(user) for user in users}
        pools = {pool.name: pool for pool in self._pools.usable_by()}
        for about in [about for name, about in topics if name == "pool"]:
            seen["pool", about] = await self._store.pools.fingerprint(pools[about], at)
        return self._note(seen)

    async def look_at_throttle(self) -> Set[Topic]:
        """Look at the throttle. The first time counts as a change: who watches it has seen it at some time before.

        Raises Overloaded after some seconds if the main process does not answer, and StoreUnavailable.
        """
        listed = await self._node.throttled(self._throttle.list_throttled)
        throttled = {each.key for each in await self._throttle.check_throttled(listed)}
        return self._note({THROTTLE_TOPIC: throttled}, new_has_changed=True)

    def _note(self, seen: Mapping[Topic, object], new_has_changed: bool = False) -> Set[Topic]:
        """Remember what was seen, and return what has changed."""
        changed = {topic for topic, value in seen.items() if self._differs(topic, value, new_has_changed)}
        if changed:
            self._number += 1
        until = asyncio.get_running_loop().time() + _KEPT
        for topic, value in seen.items():
            watched = self._watched.get(topic)
            if watched is None:
                self._watched[topic] = _Watched(value, self._number, until)
            elif topic in changed:
                watched.seen, watched.changed = value, self._number
        return changed

    def _differs(self, topic: Topic, value: object, new_has_changed: bool) -> bool:
        watched = self._watched.get(topic)
        return new_has_changed if watched is None else watched.seen != value
