"""What clients of /api/events are told: that something which they may see has changed, so that they read it again.

An event has no data that needs a right. Each worker looks for changes once a second, once for all of its clients: at
the tokens of those users who are connected, and at the pools that they may use. No client slows another one down: what
a client is told is kept as a set of names until its connection takes it, so it never grows.
"""

import asyncio
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Literal, NamedTuple

import msgspec

from tokenauth.clock import Clock
from tokenauth.errors import Overloaded, RetryLater
from tokenauth.logs import log, safe_traceback
from tokenauth.models import ADMIN, Identity, Token
from tokenauth.pools import Pools
from tokenauth.status import Node
from tokenauth.stores.store import Store
from tokenauth.throttle import Throttle
from tokenauth.tokens import Tokens

MAX_STREAMS = 1000
"""Maximum number of clients of one worker."""

MAX_PER_USER = 250
"""Maximum number of clients of one user and worker."""

CHECK = 0.5
"""Seconds between two checks of the clients' tokens."""

LOOK = 1.0
"""Seconds between two looks at the database. They take at most _SHARE of the time."""

_SHARE = 0.02

STATUS = 5.0
"""Seconds between two events for the status, and between two looks at the throttle."""

QUIET = 15.0
"""Seconds without an event after which a comment is sent, so that proxies keep the connection."""

STALLED = 10.0
"""Seconds in which a client must read what was sent, before it is disconnected."""

_KEPT = 60.0
"""Seconds for which changes are looked for after the last client that wants to know: it may come back."""

_RETRY = 3000
"""Milliseconds after which a client connects again."""

_BUSY = 30
"""Seconds after which a client that got no stream may try again."""

Topic = tuple[str, str]
"""The name of an event, and the pool or user that it is about."""

STATUS_TOPIC: Topic = ("status", "")
THROTTLE_TOPIC: Topic = ("throttle", "")

Reason = Literal["stop", "logged_out", "unavailable"]
"""Why a stream ends: the server stops; the token is no longer valid; that cannot be checked now."""


class Connection(NamedTuple):
    """What a stream needs to know of its connection, and to do with it."""

    disconnected: Callable[[], bool] = lambda: False
    """Whether the client has disconnected."""
    stopping: Callable[[], bool] = lambda: False
    """Whether the server stops."""
    unsent: Callable[[], int] = lambda: 0
    """How many bytes wait until the client reads."""
    abort: Callable[[], object] = lambda: None
    """Disconnects a client that does not read."""


class Stream:
    """The events of one client, as text of the type `text/event-stream`."""

    def __init__(self, user: Identity, token: Token, connection: Connection) -> None:
        self.user = user
        self.token = token
        self.connection = connection
        self.ended = False
        self._changes: dict[Topic, None] = {}
        self._lines: list[str] = []
        self._last_id = ""
        self._comment = self._bye = ""
        self._wakeup = asyncio.Event()
        self._sent_at = asyncio.get_running_loop().time()
        self._stalled_since: float | None = None

    def add_changes(self, topics: Iterable[Topic], id: str) -> None:
        """Send an event for each topic; one that waits already is sent once.

        `id`: with it, the client can later ask for what it has missed since.
        """
        self._changes.update(dict.fromkeys(topics))
        if self._changes:
            self._last_id = id
            self._wakeup.set()

    def add_event(self, event: str, data: object, id: str) -> None:
        """Send an event that is not about a change. A stream has few of them, so each is kept."""
        self._lines.append(_format(event, data))
        self._last_id = id
        self._wakeup.set()

    def end(self, reason: Reason) -> None:
        """Say why, and end."""
        if not self.ended:
            self.ended = True
            self._bye = _format("bye", {"reason": reason})
            self._wakeup.set()

    def drop(self) -> None:
        """End the stream of a client that has disconnected."""
        self.ended = True
        self._wakeup.set()

    def keep_alive(self, now: float) -> None:
        """Send something that clients ignore, if nothing was sent for a while."""
        if now - self._sent_at >= QUIET:
            self._sent_at = now
            self._comment = ":\n\n"
            self._wakeup.set()

    def check_reading(self, now: float) -> None:
        """Disconnect a client that does not read."""
        if not self.connection.unsent():
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now
        elif self.ended or now - self._stalled_since >= STALLED:
            self.connection.abort()
            self.drop()

    async def next(self) -> bytes:
        """Wait for something to send, and return it."""
        await self._wakeup.wait()
        self._wakeup.clear()
        self._sent_at = asyncio.get_running_loop().time()
        lines, self._lines = self._lines, []
        changes, self._changes = self._changes, {}
        lines += [_format(name, {"name": about} if name == "pool" else {}) for name, about in changes]
        if lines:  # with the last one: a client that has it has all
            lines[-1] = f"id: {self._last_id}\n{lines[-1]}"
        text = "".join([*lines, self._comment, self._bye])
        self._comment = ""
        return text.encode()


class _Watched:
    """What was last seen of a topic, and at which number of a change."""

    def __init__(self, seen: object, changed: int, until: float) -> None:
        self.seen = seen
        self.changed = changed
        self.until = until


class Events:
    """The clients of this worker, and the task that tells them what has changed."""

    def __init__(
        self, tokens: Tokens, pools: Pools, throttle: Throttle, store: Store, node: Node, clock: Clock
    ) -> None:
        self._tokens = tokens
        self._pools = pools
        self._throttle = throttle
        self._store = store
        self._node = node
        self._clock = clock
        self._streams: set[Stream] = set()
        self._watched: dict[Topic, _Watched] = {}
        self._epoch = secrets.token_hex(4)
        self._number = 0
        self._status_due = 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    async def open(self, user: Identity, token: Token, connection: Connection, last_id: str | None) -> Stream:
        """Start a stream. `last_id`: of the last event that the client got. Raises Overloaded, StoreUnavailable.

        While the server stops, the stream ends at once: the client connects again, to the worker that serves then.
        """
        if self._stopping:
            stream = Stream(user, token, connection)
            stream.end("stop")
            return stream
        of_user = sum(stream.user.username == user.username for stream in self._streams)
        if len(self._streams) >= MAX_STREAMS or of_user >= MAX_PER_USER:
            raise Overloaded("Too many streams are open. Ask for what you need instead.", _BUSY)
        stream = Stream(user, token, connection)
        self._streams.add(stream)
        try:
            topics = self._topics(user)
            new = [topic for topic in topics if topic not in self._watched]
            await self._look(new)  # later changes are events, and the client reads all once it has the first event
        except BaseException:
            self._streams.discard(stream)
            raise
        stream.add_event("hello", {"user": user.username, "scopes": user.scopes}, self._id())
        if last_id:
            missed = self._missed(last_id, topics, new)
            if missed is None:
                stream.add_event("reset", {}, self._id())
            else:
                stream.add_changes(missed, self._id())
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())
        if self._stopping:
            stream.end("stop")
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream."""
        self._streams.discard(stream)

    def stop(self) -> None:
        """End all streams at once; from now on none is opened."""
        self._stopping = True
        for stream in self._streams:
            stream.end("stop")

    async def shut_down(self) -> None:
        """Stop looking for changes."""
        self.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _id(self) -> str:
        return f"{self._epoch}-{self._number}"

    def _missed(self, last_id: str, topics: Collection[Topic], new: Collection[Topic]) -> Sequence[Topic] | None:
        """Return what has changed since an event; None if it is not of this worker."""
        epoch, _, number = last_id.partition("-")
        if epoch != self._epoch or not (number.isascii() and number.isdigit() and len(number) <= 18):
            return None
        since = int(number)
        return [topic for topic in topics if topic in new or self._watched[topic].changed > since]

    def _topics(self, user: Identity) -> Sequence[Topic]:
        """Return what a user is told of."""
        pools = [("pool", pool.name) for pool in self._pools.usable_by(user)]
        return [("tokens", user.username), *pools, *([THROTTLE_TOPIC] if ADMIN in user.scopes else [])]

    async def _run(self) -> None:
        """Check the tokens and look for changes, until there is no client, and none that may come back."""
        loop = asyncio.get_running_loop()
        look_due = 0.0
        while self._streams or self._watched:
            await asyncio.sleep(CHECK)
            try:
                await self._check_all()
                began = loop.time()
                if began >= look_due:
                    await self._tell_changes()
                    look_due = began + max(LOOK - CHECK / 2, (loop.time() - began) / _SHARE)
            except RetryLater:
                pass  # the next look finds what has changed meanwhile
            except Exception as error:
                log.error("unexpected_error", at=safe_traceback(error))
        self._task = None

    async def _check_all(self) -> None:
        """End the streams whose tokens are no longer valid, and those of clients that have gone or do not read."""
        now = asyncio.get_running_loop().time()
        for stream in self._streams:
            stream.check_reading(now)
            if stream.connection.disconnected():
                stream.drop()
            elif self._stopping or stream.connection.stopping():
                stream.end("stop")
        streams = [stream for stream in self._streams if not stream.ended]
        users = await self._identify({stream.token.digest: stream.token for stream in streams})
        for stream in streams:
            user = users.get(stream.token.digest, "unavailable")
            if not isinstance(user, Identity):
                stream.end(user)
            elif user != stream.user:
                stream.user = user
                stream.add_event("hello", {"user": user.username, "scopes": user.scopes}, self._id())
            else:
                stream.keep_alive(now)

    async def _identify(self, tokens: Mapping[bytes, Token]) -> Mapping[bytes, Identity | Reason]:
        """Return the users of tokens, or why their streams end. A token that cannot be checked in time is left out."""
        found: dict[bytes, Identity | Reason] = {}

        async def identify(digest: bytes, token: Token) -> None:
            try:
                found[digest] = await self._tokens.identify_again(token) or "logged_out"
            except RetryLater:
                found[digest] = "unavailable"
            except Exception as error:
                log.error("unexpected_error", at=safe_traceback(error))
                found[digest] = "unavailable"

        with suppress(TimeoutError):
            async with asyncio.timeout(CHECK):
                await asyncio.gather(*(identify(digest, token) for digest, token in tokens.items()))
        return found

    async def _tell_changes(self) -> None:
        """Look for changes, and tell those who may know."""
        now = asyncio.get_running_loop().time()
        users = {stream.user for stream in self._streams}
        wanted = {topic for user in users for topic in self._topics(user)}
        for topic, watched in [*self._watched.items()]:
            if topic in wanted:
                watched.until = now + _KEPT
            elif watched.until < now:
                del self._watched[topic]
        due = now >= self._status_due
        await self._look([topic for topic in self._watched if due or topic != THROTTLE_TOPIC])
        new = wanted.difference(self._watched)  # of users whose scopes have changed: their clients read everything
        if new:
            await self._look([*new])
        if due:
            self._status_due = now + STATUS
            for stream in self._streams:
                if ADMIN in stream.user.scopes:
                    stream.add_changes([STATUS_TOPIC], self._id())

    async def _look(self, topics: Collection[Topic]) -> None:
        """Look at topics once, and tell the clients which of them have changed since the look before."""
        if not topics:
            return
        seen: dict[Topic, object] = {}
        at = self._clock()
        users = [about for name, about in topics if name == "tokens"]
        if users:
            found = await self._store.tokens.fingerprints(users, at)
            seen |= {("tokens", user): found.get(user) for user in users}
        pools = {pool.name: pool for pool in self._pools.usable_by()}
        for name, about in topics:
            if name == "pool":
                seen[name, about] = await self._store.pools.fingerprint(pools[about], at)
        if THROTTLE_TOPIC in topics:
            throttled = await self._node.throttled(self._throttle.list_throttled)
            seen[THROTTLE_TOPIC] = {each[:3] for each in throttled if each.until > at}
        changed = {topic for topic, value in seen.items() if self._differs(topic, value)}
        if changed:
            self._number += 1
        until = asyncio.get_running_loop().time() + _KEPT
        for topic, value in seen.items():
            watched = self._watched.get(topic)
            if watched is None:
                self._watched[topic] = _Watched(value, self._number, until)
            elif topic in changed:
                watched.seen, watched.changed = value, self._number
        if changed:
            for stream in self._streams:
                stream.add_changes([topic for topic in self._topics(stream.user) if topic in changed], self._id())

    def _differs(self, topic: Topic, value: object) -> bool:
        watched = self._watched.get(topic)
        return watched is not None and watched.seen != value


def _format(event: str, data: object) -> str:
    retry = f"retry: {_RETRY}\n" if event == "hello" else ""
    return f"{retry}event: {event}\ndata: {msgspec.json.encode(data).decode()}\n\n"
