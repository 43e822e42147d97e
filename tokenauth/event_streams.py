"""Server-sent events: hints of what to read again.

An event has no data that needs a right. Each worker looks for changes once a second, once for all of its clients: at
the tokens of those users who are connected, and at the pools that they may use. No client slows another one down: the
changes that it has not been sent are a set of names, which never grows.
"""

import asyncio
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from contextvars import Context
from typing import Literal

import msgspec

from tokenauth.errors import Overloaded, RetryLater
from tokenauth.logs import log, safe_traceback
from tokenauth.models import ADMIN, Identity, Token
from tokenauth.tokens import Tokens
from tokenauth.topic_watcher import STATUS_TOPIC, Topic, Watcher

MAX_STREAMS = 1000
"""Maximum number of clients of one worker."""

MAX_PER_USER = 250
"""Maximum number of clients of one user and worker."""

CHECK = 0.5
"""Seconds between two checks of the clients' tokens."""

LOOK = 1.0
"""Seconds between two looks at the database; more if they are slow, so that they take at most _SHARE of the time."""

_SHARE = 0.02

_MAX_PAUSE = 10.0
"""Seconds between two looks after which _SHARE does not count: one may be slow by chance."""

STATUS = 5.0
"""Seconds between two events for the status, and between two looks at the throttle."""

QUIET = 15.0
"""Seconds without an event after which a comment is sent, so that proxies keep the connection."""

STALLED = 10.0
"""Seconds in which a client must read what was sent, before it is disconnected."""

_RETRY = 3000
"""Milliseconds after which a client connects again."""

_BUSY = 30
"""Seconds after which a client that got no stream may try again."""

Reason = Literal["stop", "logged_out", "unavailable"]
"""Why a stream ends: the server stops; the token is no longer valid; that cannot be checked now."""


class Client:
    """The connection of a client, of which nothing is known."""

    def disconnected(self) -> bool:
        return False

    def server_stops(self) -> bool:
        return False

    def unsent(self) -> int:
        """Return how many bytes wait until the client reads."""
        return 0

    def abort(self) -> None:
        """Disconnect a client that does not read."""


class Stream:
    """The events of one client, as text of the type `text/event-stream`."""

    def __init__(self, user: Identity, token: Token, client: Client) -> None:
        self.user = user
        self.token = token
        self.client = client
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
        if not self.client.unsent():
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now
        elif self.ended or now - self._stalled_since >= STALLED:
            self.client.abort()
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


class Events:
    """The clients of this worker, and the task that sends them what has changed."""

    def __init__(self, tokens: Tokens, watcher: Watcher) -> None:
        self._tokens = tokens
        self._watcher = watcher
        self._streams: set[Stream] = set()
        self._status_due = 0.0
        self._task: asyncio.Task[None] | None = None
        self._throttle_task: asyncio.Task[None] | None = None
        self._stopping = False

    async def open(self, user: Identity, token: Token, client: Client, last_id: str | None) -> Stream:
        """Start a stream. `last_id`: of the last event that the client got. Raises Overloaded, StoreUnavailable.

        While the server stops, the stream ends at once: the client connects again, to the worker that serves then.
        """
        if self._stopping:
            stream = Stream(user, token, client)
            stream.end("stop")
            return stream
        of_user = sum(stream.user.username == user.username for stream in self._streams)
        if len(self._streams) >= MAX_STREAMS or of_user >= MAX_PER_USER:
            raise Overloaded("Too many streams are open. Ask for what you need instead.", _BUSY)
        stream = Stream(user, token, client)
        self._streams.add(stream)
        try:
            topics = self._watcher.visible_to(user)
            new = self._watcher.unwatched(topics)
            await self._watcher.look(new)  # from here on changes are events; the client reads what was before
        except BaseException:
            self._streams.discard(stream)
            raise
        stream.add_event("hello", {"user": user.username, "scopes": user.scopes}, self._watcher.id)
        if last_id:
            missed = self._watcher.missed(last_id, topics, new)
            if missed is None:
                stream.add_event("reset", {}, self._watcher.id)
            else:
                stream.add_changes(missed, self._watcher.id)
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
        tasks = [task for task in (self._task, self._throttle_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        """Check the tokens and look for changes, until there is no client, and none that may come back."""
        loop = asyncio.get_running_loop()
        look_due = 0.0
        while self._streams or self._watcher.watching:
            await asyncio.sleep(CHECK)
            try:
                await self._check_all()
                self._check_status()
                began = loop.time()
                if began >= look_due:
                    await self._look()
                    look_due = loop.time() + pause(loop.time() - began)
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
            if stream.client.disconnected():
                stream.drop()
            elif self._stopping or stream.client.server_stops():
                stream.end("stop")
        streams = [stream for stream in self._streams if not stream.ended]
        users = await self._identify({stream.token.digest: stream.token for stream in streams})
        for stream in streams:
            user = users.get(stream.token.digest, "unavailable")
            if not isinstance(user, Identity):
                stream.end(user)
            elif user != stream.user:
                stream.user = user
                stream.add_event("hello", {"user": user.username, "scopes": user.scopes}, self._watcher.id)
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

    async def _look(self) -> None:
        """Look for changes, and send them to those who may see them."""
        users = {stream.user for stream in self._streams}
        wanted = {topic for user in users for topic in self._watcher.visible_to(user)}
        self._watcher.keep(wanted)
        self._send(await self._watcher.look_again())
        await self._watcher.look(self._watcher.unwatched(wanted))  # after new scopes: those clients read everything

    def _check_status(self) -> None:
        """Every few seconds, have admins read the status, and look at the throttle.

        No other event waits for that: the main process is asked, which may hang.
        """
        now = asyncio.get_running_loop().time()
        admins = [stream for stream in self._streams if ADMIN in stream.user.scopes]
        if now < self._status_due or not admins:
            return
        self._status_due = now + STATUS
        for stream in admins:
            stream.add_changes([STATUS_TOPIC], self._watcher.id)
        if self._throttle_task is None or self._throttle_task.done():
            self._throttle_task = asyncio.create_task(self._look_at_throttle())

    async def _look_at_throttle(self) -> None:
        try:
            self._send(await self._watcher.look_at_throttle())
        except RetryLater:
            pass  # as in _run
        except Exception as error:
            log.error("unexpected_error", at=safe_traceback(error))

    def _send(self, changed: Set[Topic]) -> None:
        if changed:
            for stream in self._streams:
                visible = self._watcher.visible_to(stream.user)
                stream.add_changes([topic for topic in visible if topic in changed], self._watcher.id)


def pause(seconds: float) -> float:
    """Return the seconds to wait after a look that took some `seconds`."""
    return min(max(LOOK - CHECK / 2, seconds / _SHARE), _MAX_PAUSE)


def _format(event: str, data: object) -> str:
    retry = f"retry: {_RETRY}\n" if event == "hello" else ""
    return f"{retry}event: {event}\ndata: {msgspec.json.encode(data).decode()}\n\n"
