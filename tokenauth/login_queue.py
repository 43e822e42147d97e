"""The login queue: decides which login checks its password next.

A login waits here for a free hashing thread, and while too many other attempts for its name or network are running.
There are two classes, each with its own limit: known users, who have logged in from their location before, and
strangers. So no number of strangers can take the place of a known user. Known users go first, but while both classes
wait, one turn of STRANGER_SHARE goes to a stranger.

Within a class, turns rotate at each level of a path. For known users the path is the name, whatever the location: an
attacker with one account and many networks has the share of one user. For strangers it is the region, then the network,
then the name. Within one name, the order is first come, first served.

When a class is full, the child with the most waiting logins, at each level, loses its newest. A login waits at most
MAX_WAIT seconds. A login whose client has disconnected is dropped.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from tokenauth.errors import ClientGone, Overloaded

MAX_WAIT = 5.0
"""Seconds that a login waits at most. Many HTTP clients give up after that, httpx by default."""

REFUSAL_DELAY = 2.0
"""Seconds before a login is refused because the queue is full. It must be less than clients wait."""

MAX_DELAYED = 2000
"""Logins that wait to be refused at the same time; further ones are refused at once."""

STRANGER_SHARE = 4
"""One turn in this many goes to a stranger while known users and strangers wait."""

DisconnectCheck = Callable[[], bool]
"""Returns whether the client has disconnected, so that no one would receive the answer."""


def never_disconnected() -> bool:
    """Return False, for callers that cannot know whether the client has disconnected."""
    return False


class Turn:
    """A login's place in the queue, and what it occupies while its password is checked."""

    __slots__ = ("deadline", "disconnected", "future", "known", "limits", "path", "running", "slot", "timer")

    def __init__(
        self,
        path: Sequence[str],
        limits: Mapping[bytes, int],
        slot: bool = True,
        disconnected: DisconnectCheck = never_disconnected,
        known: bool = False,
    ) -> None:
        """Create a turn, to be passed to `LoginQueue.enter`.

        `path` names what turns rotate between, level by level. All paths of a class have the same length. `limits` has
        the number of attempts that may run at the same time for each key. `slot`: whether a hashing thread is needed.
        """
        self.path = path
        self.known = known
        self.limits = limits
        self.slot = slot
        self.disconnected = disconnected
        self.running = False
        self.deadline = 0.0
        self.future: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


class _Node:
    """The turns that wait below one part of a path, in order of rotation. A leaf has them in a line."""

    __slots__ = ("children", "line", "size")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.line: deque[Turn] = deque()
        self.size = 0

    def leaf(self, path: Sequence[str]) -> "_Node | None":
        node: _Node | None = self
        for part in path:
            node = None if node is None else node.children.get(part)
        return node

    def add(self, turn: Turn, first: bool) -> None:
        """Add a turn at the front or at the end of its line."""
        node = self
        node.size += 1
        for part in turn.path:
            node = node.children.setdefault(part, _Node())
            node.size += 1
        if first:
            node.line.appendleft(turn)
        else:
            node.line.append(turn)

    def remove(self, turn: Turn) -> bool:
        """Remove a turn; return whether it was there."""
        leaf = self.leaf(turn.path)
        if leaf is None or turn not in leaf.line:
            return False
        leaf.line.remove(turn)
        node = self
        node.size -= 1
        for part in turn.path:
            child = node.children[part]
            child.size -= 1
            if not child.size:
                del node.children[part]
            node = child
        return True

    def rotate(self, path: Sequence[str]) -> None:
        """Move a path to the end of the rotation, at each level: it has just had a turn."""
        node = self
        for part in path:
            child = node.children.pop(part, None)
            if child is None:
                return
            node.children[part] = child
            node = child

    def turns(self) -> Iterator[Turn]:
        """Yield all turns, one line after the other."""
        yield from self.line
        for child in self.children.values():
            yield from child.turns()

    def lines(self) -> Iterator[deque[Turn]]:
        """Yield the lines in order of rotation."""
        if self.line:
            yield self.line
        for child in list(self.children.values()):
            yield from child.lines()

    def displaced_by(self, path: Sequence[str]) -> Turn | None:
        """Return the turn that a new one with this path displaces, or None if the new one must be refused."""
        node, mine = self, True
        for part in path:
            name = max(node.children, key=lambda child: node.children[child].size)
            if mine and name != part:
                own = node.children.get(part)
                if (0 if own is None else own.size) + 1 >= node.children[name].size:
                    return None
                mine = False
            node = node.children[name]
        return None if mine else node.line[-1]


class LoginQueue:
    """Shares hashing threads fairly between logins."""

    def __init__(self, slots: int, room: int) -> None:
        """Let `slots` logins hash at a time, while at most `room` known users and `room` strangers wait."""
        self._slots = slots
        self._room = room
        self._running: dict[bytes, int] = {}
        self._waiting = {True: _Node(), False: _Node()}
        self._known_in_a_row = 0
        self._delayed = 0

    @property
    def size(self) -> int:
        """The number of logins that wait."""
        return sum(waiting.size for waiting in self._waiting.values())

    async def enter(self, turn: Turn) -> bool:
        """Wait for the turn; return whether it had to wait. Raises Overloaded or ClientGone."""
        waiting = self._waiting[turn.known]
        if waiting.leaf(turn.path) is None and self._can_start(turn):
            self._start(turn)
            return False
        if waiting.size >= self._room:
            await self._make_room(turn)
        self._append(turn)
        await self._wait(turn)
        return True

    async def enter_again(self, turn: Turn) -> None:
        """Give the turn back and wait for the next one, ahead of all others of the user. Raises as `enter` does."""
        self._end(turn)
        self._append(turn, first=True)
        self._dispatch()
        await self._wait(turn)

    def change_limits(self, turn: Turn, limits: Mapping[bytes, int]) -> bool:
        """Replace the limits of a running turn; return whether it is within the new ones."""
        self._count(turn.limits, -1)
        within = all(self._running.get(key, 0) < limit for key, limit in limits.items())
        turn.limits = limits
        self._count(turn.limits, 1)
        return within

    def release_slot(self, turn: Turn) -> None:
        """Free the hashing thread. The attempt is still running."""
        if turn.slot:
            turn.slot = False
            self._slots += 1
            self._dispatch()

    def finish(self, turn: Turn) -> None:
        if turn.running:
            self._end(turn)
            self._dispatch()

    def _can_start(self, turn: Turn) -> bool:
        """Return whether a turn may start now, in addition to those that are running."""
        if turn.slot and self._slots <= 0:
            return False
        running = self._running
        for key, limit in turn.limits.items():  # noqa: SIM110 - in half of the time of `all`
            if running.get(key, 0) >= limit:
                return False
        return True

    def _start(self, turn: Turn) -> None:
        turn.running = True
        self._count(turn.limits, 1)
        self._slots -= turn.slot

    def _end(self, turn: Turn) -> None:
        turn.running = False
        self._count(turn.limits, -1)
        self._slots += turn.slot

    def _count(self, keys: Mapping[bytes, int], change: int) -> None:
        for key in keys:
            count = self._running.get(key, 0) + change
            if count:
                self._running[key] = count
            else:
                del self._running[key]

    def _append(self, turn: Turn, first: bool = False) -> None:
        loop = asyncio.get_running_loop()
        turn.future = loop.create_future()
        turn.deadline = turn.deadline or loop.time() + MAX_WAIT
        turn.timer = loop.call_at(turn.deadline, self._refuse, turn)
        self._waiting[turn.known].add(turn, first)

    async def _wait(self, turn: Turn) -> None:
        assert turn.future is not None
        try:
            await turn.future
        except asyncio.CancelledError:
            self._remove(turn)
            self.finish(turn)  # the turn may have started just before the task was cancelled
            raise

    def _remove(self, turn: Turn) -> None:
        """Remove a turn from the queue if it waits there."""
        if self._waiting[turn.known].remove(turn) and turn.timer is not None:
            turn.timer.cancel()

    def _refuse(self, turn: Turn) -> None:
        """Remove a turn from the queue; its login raises Overloaded."""
        self._remove(turn)
        if turn.future is not None and not turn.future.done():
            turn.future.set_exception(Overloaded())

    def _drop_if_disconnected(self, turn: Turn) -> bool:
        """Remove a turn if its client has disconnected; return whether it has."""
        disconnected = turn.disconnected()
        if disconnected:
            self._remove(turn)
            if turn.future is not None and not turn.future.done():
                turn.future.set_exception(ClientGone())
        return disconnected

    async def _make_room(self, turn: Turn) -> None:
        """Refuse the newest turn of the longest line of its class. Raises Overloaded if that is `turn` itself."""
        waiting = self._waiting[turn.known]
        for each in list(waiting.turns()):
            self._drop_if_disconnected(each)
        if waiting.size < self._room:
            return
        displaced = waiting.displaced_by(turn.path)
        if displaced is None:
            await self._delay_refusal()
            raise Overloaded
        self._refuse(displaced)

    async def _delay_refusal(self) -> None:
        """Delay a refusal: a client that is refused at once retries at once, and takes the CPU that hashing needs."""
        if self._delayed < MAX_DELAYED:
            self._delayed += 1
            try:
                await asyncio.sleep(REFUSAL_DELAY)
            finally:
                self._delayed -= 1

    def _dispatch(self) -> None:
        """Start every turn that may start, in order of rotation."""
        while (turn := self._next()) is not None:
            waiting = self._waiting[turn.known]
            self._remove(turn)
            waiting.rotate(turn.path)
            self._known_in_a_row = self._known_in_a_row + 1 if turn.known and self._waiting[False].size else 0
            self._start(turn)
            assert turn.future is not None
            if not turn.future.done():  # else its task was just cancelled, and will end the turn: see `_wait`
                turn.future.set_result(None)

    def _next(self) -> Turn | None:
        strangers_first = self._known_in_a_row >= STRANGER_SHARE - 1
        for known in (not strangers_first, strangers_first):
            waiting = self._waiting[known]
            for line in waiting.lines() if waiting.size else ():  # mostly nobody waits
                while line and self._can_start(line[0]):
                    if not self._drop_if_disconnected(line[0]):
                        return line[0]
        return None
