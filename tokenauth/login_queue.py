"""The one queue of logins: who may check a password next.

A login waits here for a free hashing thread, and while as many tries are in flight for its name or network as may
still fail. There are two classes, each with a room of its own: users who are known at their place, and strangers.
So no number of strangers takes the place of a known user. Known users go first, but while both wait one turn of
STRANGERS is a stranger's.

Within a class, turns are shared out level by level: between the names of known users, whatever their places, so that
an attacker with one account and many networks has the share of one; and between the regions of strangers, then their
networks, then their names. Within one name it is first come, first served. When a class is full, the child with the
most logins waiting, level by level, loses its newest. Nobody waits longer than PATIENCE, and no work is done for a
client that has gone.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from tokenauth.errors import ClientGone, Overloaded

PATIENCE = 5.0
"""Seconds that a login waits at most: HTTP clients commonly give up after that (httpx by default)."""

HOLD = 2.0
"""Seconds after which a login that finds the queue full is refused: less than clients commonly wait."""

MAX_HELD = 2000
"""Logins that wait to be refused; one more is refused at once."""

STRANGERS = 4
"""Of so many turns in a row one is a stranger's, while known users and strangers wait."""

Gone = Callable[[], bool]
"""Says whether the client has closed its connection, so that nobody would receive the answer."""


def here() -> bool:
    """Say that the client has not gone, where that cannot be known."""
    return False


class Turn:
    """A login's place in the queue, and what it occupies while it is being checked."""

    __slots__ = ("begun", "deadline", "future", "gone", "known", "limits", "path", "slot", "timer")

    def __init__(
        self,
        path: Sequence[str],
        limits: Mapping[bytes, int],
        slot: bool = True,
        gone: Gone = here,
        known: bool = False,
    ) -> None:
        """Ask for a turn. `limits`: how many tries may be in flight for each key; `slot`: needs a hashing thread.

        `path`: between what turns are shared out, level by level; as long as all others of its class.
        """
        self.path = path
        self.known = known
        self.limits = limits
        self.slot = slot
        self.gone = gone
        self.begun = False
        self.deadline = 0.0
        self.future: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


class _Node:
    """The turns that wait below one part of a path, in the order of their rotation; a leaf has a line of them."""

    __slots__ = ("children", "line", "size")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.line: deque[Turn] = deque()
        self.size = 0

    def leaf(self, path: Sequence[str]) -> "_Node | None":
        """Return the node at the end of a path."""
        node: _Node | None = self
        for part in path:
            node = None if node is None else node.children.get(part)
        return node

    def add(self, turn: Turn, first: bool) -> None:
        """Have a turn wait, in front of its line or behind it."""
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
        """Take a turn out; say whether it waited."""
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
        """Have what has had a turn wait for all others, at each level."""
        node = self
        for part in path:
            child = node.children.pop(part, None)
            if child is None:
                return
            node.children[part] = child
            node = child

    def turns(self) -> Iterator[Turn]:
        """Go through all turns, a line at a time."""
        yield from self.line
        for child in self.children.values():
            yield from child.turns()

    def lines(self) -> Iterator[deque[Turn]]:
        """Go through the lines in the order of their rotation."""
        if self.line:
            yield self.line
        for child in list(self.children.values()):
            yield from child.lines()

    def longest(self, path: Sequence[str]) -> Turn | None:
        """Return the turn that has to make room for a new one with this path; None if that is the new one itself."""
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
    """Gives turns to logins, fairly."""

    def __init__(self, slots: int, room: int) -> None:
        """Let `slots` passwords be hashed at a time, while at most `room` known users and `room` strangers wait."""
        self._slots = slots
        self._room = room
        self._running: dict[bytes, int] = {}
        self._waiting = {True: _Node(), False: _Node()}
        self._passed = 0
        self._held = 0

    async def enter(self, turn: Turn) -> bool:
        """Wait for the turn; the answer is whether it had to wait. Raises Overloaded or ClientGone."""
        waiting = self._waiting[turn.known]
        if waiting.leaf(turn.path) is None and self.fits(turn):
            self._begin(turn)
            return False
        if waiting.size >= self._room:
            await self._make_room(turn)
        self._append(turn)
        await self._wait(turn)
        return True

    async def again(self, turn: Turn) -> None:
        """Give the turn back and wait for the next one, before all others of the user. Raises as `enter` does."""
        self._end(turn)
        self._append(turn, first=True)
        self._dispatch()
        await self._wait(turn)

    def fits(self, turn: Turn) -> bool:
        """Whether a turn may begin now, in view of those that have begun."""
        if turn.slot and self._slots <= 0:
            return False
        running = self._running
        return all(running.get(key, 0) < limit for key, limit in turn.limits.items())

    def goes_on(self, turn: Turn, limits: Mapping[bytes, int]) -> bool:
        """Hold a turn that has begun to other limits; say whether it may go on under them."""
        self._count(turn.limits, -1)
        goes_on = all(self._running.get(key, 0) < limit for key, limit in limits.items())
        turn.limits = limits
        self._count(turn.limits, 1)
        return goes_on

    def release(self, turn: Turn) -> None:
        """Give up the hashing thread, and go on counting as a try in flight."""
        if turn.slot:
            turn.slot = False
            self._slots += 1
            self._dispatch()

    def leave(self, turn: Turn) -> None:
        """End a turn, if it has begun."""
        if turn.begun:
            self._end(turn)
            self._dispatch()

    def _begin(self, turn: Turn) -> None:
        turn.begun = True
        self._count(turn.limits, 1)
        self._slots -= turn.slot

    def _end(self, turn: Turn) -> None:
        turn.begun = False
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
        turn.deadline = turn.deadline or loop.time() + PATIENCE
        turn.timer = loop.call_at(turn.deadline, self._refuse, turn)
        self._waiting[turn.known].add(turn, first)

    async def _wait(self, turn: Turn) -> None:
        assert turn.future is not None
        try:
            await turn.future
        except asyncio.CancelledError:
            self._remove(turn)
            self.leave(turn)  # the turn had come, perhaps, and the task was cancelled before it took it
            raise

    def _remove(self, turn: Turn) -> None:
        """Take a turn out of the queue, if it waits there."""
        if self._waiting[turn.known].remove(turn) and turn.timer is not None:
            turn.timer.cancel()

    def _refuse(self, turn: Turn) -> None:
        """Take a turn out of the queue and tell its login to retry later."""
        self._remove(turn)
        if turn.future is not None and not turn.future.done():
            turn.future.set_exception(Overloaded())

    def _forget_gone(self, turn: Turn) -> bool:
        """Take a turn out whose client has gone; say whether it had."""
        gone = turn.gone()
        if gone:
            self._remove(turn)
            if turn.future is not None and not turn.future.done():
                turn.future.set_exception(ClientGone())
        return gone

    async def _make_room(self, turn: Turn) -> None:
        """Have the longest line of its class lose its newest turn. Raises Overloaded when that is the one that asks."""
        waiting = self._waiting[turn.known]
        for each in list(waiting.turns()):
            self._forget_gone(each)
        if waiting.size < self._room:
            return
        loser = waiting.longest(turn.path)
        if loser is None:
            await self._hold_back()
            raise Overloaded
        self._refuse(loser)

    async def _hold_back(self) -> None:
        """Let a refused login wait: one that is answered at once comes back at once, and takes the CPU of hashing."""
        if self._held < MAX_HELD:
            self._held += 1
            try:
                await asyncio.sleep(HOLD)
            finally:
                self._held -= 1

    def _dispatch(self) -> None:
        """Begin every turn that may, in the order of both rotations."""
        while (turn := self._next()) is not None:
            waiting = self._waiting[turn.known]
            self._remove(turn)
            waiting.rotate(turn.path)
            self._passed = self._passed + 1 if turn.known and self._waiting[False].size else 0
            self._begin(turn)
            assert turn.future is not None
            turn.future.set_result(None)

    def _next(self) -> Turn | None:
        """Find the turn that may begin next."""
        strangers_first = self._passed >= STRANGERS - 1
        for known in (not strangers_first, strangers_first):
            for line in self._waiting[known].lines():
                while line and self.fits(line[0]):
                    if not self._forget_gone(line[0]):
                        return line[0]
        return None
