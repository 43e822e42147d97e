"""The one queue of logins: who may check a password next.

A login waits here for a free hashing thread, and while as many tries are in flight for its name or network as may
still fail. Networks take turns, and so do the users of one network; within a user it is first come, first served.
The queue is bounded: when it is full, whoever has the most logins waiting loses the newest of them. Nobody waits
longer than PATIENCE, and no work is done for a client that has gone.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from tokenauth.errors import ClientGone, Overloaded

PATIENCE = 5.0
"""Seconds that a login waits at most: HTTP clients commonly give up after that (httpx by default)."""

HOLD = 2.0
"""Seconds after which a login that finds the queue full is refused: less than clients commonly wait."""

MAX_HELD = 2000
"""Logins that wait to be refused; one more is refused at once."""

Gone = Callable[[], bool]
"""Says whether the client has closed its connection, so that nobody would receive the answer."""


def here() -> bool:
    """Say that the client has not gone, where that cannot be known."""
    return False


class Turn:
    """A login's place in the queue, and what it occupies while it is being checked."""

    __slots__ = ("begun", "deadline", "future", "gone", "limits", "network", "slot", "timer", "user")

    def __init__(self, network: str, user: str, limits: Mapping[bytes, int], slot: bool = True, gone: Gone = here):
        """Ask for a turn. `limits`: how many tries may be in flight for each key; `slot`: needs a hashing thread."""
        self.network = network
        self.user = user
        self.limits = limits
        self.slot = slot
        self.gone = gone
        self.begun = False
        self.deadline = 0.0
        self.future: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


class LoginQueue:
    """Gives turns to logins, fairly."""

    def __init__(self, slots: int, room: int) -> None:
        """Let `slots` passwords be hashed at a time, while at most `room` logins wait."""
        self._slots = slots
        self._room = room
        self._running: dict[bytes, int] = {}
        self._lines: dict[str, dict[str, deque[Turn]]] = {}
        self._waiting = 0
        self._held = 0

    async def enter(self, turn: Turn) -> bool:
        """Wait for the turn; the answer is whether it had to wait. Raises Overloaded or ClientGone."""
        if not self._line(turn) and self.fits(turn):
            self._begin(turn)
            return False
        if self._waiting >= self._room:
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

    def _line(self, turn: Turn) -> deque[Turn] | None:
        return self._lines.get(turn.network, {}).get(turn.user)

    def _append(self, turn: Turn, first: bool = False) -> None:
        loop = asyncio.get_running_loop()
        turn.future = loop.create_future()
        turn.deadline = turn.deadline or loop.time() + PATIENCE
        turn.timer = loop.call_at(turn.deadline, self._refuse, turn)
        line = self._lines.setdefault(turn.network, {}).setdefault(turn.user, deque())
        if first:
            line.appendleft(turn)
        else:
            line.append(turn)
        self._waiting += 1

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
        line = self._line(turn)
        if line is None or turn not in line:
            return
        line.remove(turn)
        self._waiting -= 1
        if turn.timer is not None:
            turn.timer.cancel()
        users = self._lines[turn.network]
        if not line:
            del users[turn.user]
            if not users:
                del self._lines[turn.network]

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
        """Have the longest line lose its newest turn. Raises Overloaded when that is the one that asks."""
        for waiting in list(self._all()):
            self._forget_gone(waiting)
        if self._waiting < self._room:
            return
        network = max(self._lines, key=self._length)
        users = self._lines[network]
        user = max(users, key=lambda name: len(users[name]))
        if network == turn.network:
            mine, longest = len(users.get(turn.user, ())), len(users[user])
        else:
            mine, longest = self._length(turn.network), self._length(network)
        if mine + 1 >= longest:
            await self._hold_back()
            raise Overloaded
        self._refuse(users[user][-1])

    async def _hold_back(self) -> None:
        """Let a refused login wait: one that is answered at once comes back at once, and takes the CPU of hashing."""
        if self._held < MAX_HELD:
            self._held += 1
            try:
                await asyncio.sleep(HOLD)
            finally:
                self._held -= 1

    def _length(self, network: str) -> int:
        return sum(map(len, self._lines.get(network, {}).values()))

    def _all(self) -> Iterator[Turn]:
        for users in self._lines.values():
            for line in users.values():
                yield from line

    def _dispatch(self) -> None:
        """Begin every turn that may: each network in its turn, and each of its users."""
        while (turn := self._next()) is not None:
            line, users = self._lines[turn.network][turn.user], self._lines[turn.network]
            self._remove(turn)
            if line:  # to the end of the rotation
                users[turn.user] = users.pop(turn.user)
            if users:
                self._lines[turn.network] = self._lines.pop(turn.network)
            self._begin(turn)
            assert turn.future is not None
            turn.future.set_result(None)

    def _next(self) -> Turn | None:
        """Find the turn that may begin next."""
        for users in list(self._lines.values()):
            for line in list(users.values()):
                while line and self.fits(line[0]):
                    if not self._forget_gone(line[0]):
                        return line[0]
        return None
