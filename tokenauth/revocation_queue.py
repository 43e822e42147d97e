"""Revocations that could not be written yet. They are held in memory, and written as soon as the store is back.

Each worker has a RevocationQueue. The main process has a HeldRevocations and passes each RevocationUpdate on, so that
all workers of the machine refuse what one of them holds. In the same way it passes on what one of them has written to a
store whose other processes learn of that later.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from tokenauth.background import Background
from tokenauth.clock import Clock
from tokenauth.errors import RetryLater, StoreUnavailable
from tokenauth.logs import log, safe_traceback
from tokenauth.models import Instant, public_id

if TYPE_CHECKING:
    from tokenauth.stores.store import Store  # the main process needs no database

MAX_HELD = 100_000
"""Maximum number of revocations held: about 15 MB."""

MAX_PER_NETWORK = 1_000
"""Maximum number held for one network: a client that sends made-up tokens must not fill the queue."""

RETRY = 1.0
"""Seconds between two attempts to write."""

ANSWER_TIMEOUT = 1.25
"""Seconds to wait until the other workers have applied an update. A cache of PostgreSQL's tokens is not used for longer
without its feed (`BOUND`), so a worker that is late then looks each token up."""

_BATCH = 100
"""Number of revocations written at a time. They share a commit."""

_MIN_CLOSE_TIME = 5.0
"""Seconds for which a worker that stops still tries to write, at least."""


class RevocationUpdate(msgspec.Struct, omit_defaults=True):
    """What one worker holds or has revoked, for the others. Times are of the monotonic clock, the same for all."""

    held: dict[bytes, str] = {}
    """Digests of tokens to refuse, each with the network that revoked it."""
    written: list[bytes] = []
    """Digests that have been written to the store since."""
    dropped: int = 0
    """Number of revocations that exceeded MAX_HELD. While there are any, no token may be accepted."""
    dropped_at: Instant = 0.0
    """When the last of those was dropped."""
    all_revoked_at: Instant = 0.0
    """All tokens issued before this time have been revoked."""
    revoked: set[bytes] = set()
    """Digests of tokens that were revoked in the store: no cache may return them."""
    missing: set[bytes] = set()
    """Digests of tokens that the store does not have: they may have been revoked just now."""
    outdated: bool = False
    """Whether the store has revoked tokens that are not named here: no cache may be used until it knows which."""
    number: int = 0
    """Identifies an update whose sender waits until it is applied; 0 if none does."""


class HeldRevocations:
    """The main process's copy of what the workers hold: for new workers, and for the log at the end."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[str, Instant]] = {}
        self._dropped = 0
        self._dropped_at = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def apply(self, update: RevocationUpdate) -> None:
        now = monotonic()
        for digest, network in update.held.items():
            if len(self._held) < MAX_HELD:  # a worker that receives more reports them as dropped
                self._held.setdefault(digest, (network, now))
        self._dropped += update.dropped
        self._dropped_at = max(self._dropped_at, update.dropped_at)
        if self._dropped_at < update.all_revoked_at:
            self._dropped = 0
            self._held = {digest: held for digest, held in self._held.items() if held[1] >= update.all_revoked_at}
        for digest in update.written:
            self._held.pop(digest, None)

    def snapshot(self) -> RevocationUpdate:
        """Return the update that brings a new worker to this state."""
        held = {digest: network for digest, (network, _) in self._held.items()}
        return RevocationUpdate(held=held, dropped=self._dropped, dropped_at=self._dropped_at)

    def log_lost(self) -> None:
        """Log what was never written."""
        _log_lost(self._held, self._dropped)


class RevocationQueue:
    """Holds revocations until they are written, and refuses their tokens until then.

    A full queue drops revocations. Then it is not known which tokens are revoked, so none is accepted. When the store
    can be written again, all tokens are revoked and the queue is emptied.
    """

    def __init__(self, store: "Store", clock: Clock) -> None:
        self.held: dict[bytes, str] = {}
        """Digests, each with the network that revoked it."""
        self.active = False
        """Whether anything is held or was dropped. While it is False, no token is refused."""
        self.publish: Callable[[RevocationUpdate], None] | None = None
        """Sends an update to the main process; None if there is none."""
        self.alone = False
        """Whether this is the only worker of the machine: then nobody needs to apply its updates."""
        self.close_deadline = 0.0
        """When `close` gives up, in the time of the event loop; it tries for _MIN_CLOSE_TIME in any case."""
        self.handed_over = False
        """Whether other workers write what is held after this one stops."""
        self._per_network = Counter[str]()
        self._store = store
        self._clock = clock
        self._dropped = 0
        self._dropped_at = 0.0
        self._started = self._closing = False
        self._writing: asyncio.Task[None] | None = None
        self._update: RevocationUpdate | None = None
        self._awaited: asyncio.Event | None = None  # of the update that is not sent yet
        self._unanswered: dict[int, tuple[asyncio.Event, asyncio.TimerHandle]] = {}
        self._number = 0
        self._background = Background()

    @property
    def problem(self) -> str | None:
        """Why no token can be accepted, or None."""
        return "too many revocations wait to be written: no token is accepted until then" if self._dropped else None

    def refuses(self, digest: bytes) -> bool:
        """Return whether a token is revoked here. Raises StoreUnavailable while that is not known."""
        if self._dropped:
            raise StoreUnavailable
        return digest in self.held

    def start(self) -> None:
        """Start to write: the store is open."""
        self._started = True
        self._publish()
        self._changed()

    def add(self, digest: bytes, network: str) -> bool:
        """Hold a revocation that could not be written. Return False if the network has used up its share.

        The update is sent to the main process in the next iteration of the event loop.
        """
        if digest in self.held:
            return True
        if self._per_network[network] >= MAX_PER_NETWORK:
            return False
        if self._hold(digest, network):
            log.error("revocation_held_in_memory", id=public_id(digest), held=len(self.held))
            self._outgoing().held[digest] = network
        self._changed()
        return True

    async def share(self, digests: Collection[bytes] | None, missing: bool = False) -> None:
        """Have the other workers refuse tokens that were revoked in the store; None: which tokens is not known.

        Once this returns they do, or ANSWER_TIMEOUT is over. All that is shared in one iteration of the event loop is
        sent in one message. `missing`: the store does not have the tokens, and this process has not revoked them.
        """
        if self._has_others:
            update = self._outgoing()
            if digests is None:
                update.outdated = True
            elif missing:
                update.missing.update(digests)
            else:
                update.revoked.update(digests)
            await self.applied()

    async def applied(self) -> None:
        """Wait until the other workers have applied all that is held here, or ANSWER_TIMEOUT is over."""
        if self._has_others:
            self._outgoing()
            if self._awaited is None:
                self._awaited = asyncio.Event()
            await self._awaited.wait()
        else:
            await asyncio.sleep(0)  # the main process is notified before the client gets an answer

    def answered(self, number: int) -> None:
        """End the wait for an update: all workers have applied it, or it is too late."""
        if number in self._unanswered:
            event, timeout = self._unanswered.pop(number)
            timeout.cancel()
            event.set()

    @property
    def _has_others(self) -> bool:
        return self.publish is not None and self._started and not self.alone

    def apply(self, update: RevocationUpdate) -> None:
        """Refuse what another worker holds or has revoked."""
        if update.outdated:
            self._store.tokens.forget(None)
        if update.revoked:
            self._store.tokens.forget(update.revoked)
        if update.missing:
            self._store.tokens.forget_missing(update.missing)
        for digest, network in update.held.items():
            if digest not in self.held:
                self._hold(digest, network)
        if update.dropped:
            self._dropped += update.dropped
            self._dropped_at = monotonic()
        self._all_revoked(update.all_revoked_at)
        self._changed()

    async def close(self) -> None:
        """Try to write what is held until the deadline, and log what is lost. With `handed_over`, others write it."""
        self._closing = True
        if self._writing is not None:
            self._writing.cancel()
        earliest = asyncio.get_running_loop().time() + _MIN_CLOSE_TIME
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(self.close_deadline, earliest)):
                await self._background.close()
                if not self.handed_over:
                    await self._write_all()
        self._publish()
        if self.publish is None:  # otherwise the main process logs it, unless another worker writes it
            _log_lost(self.held, self._dropped)

    def _hold(self, digest: bytes, network: str) -> bool:
        """Hold one more. Return False if it was dropped."""
        self._per_network[network] += 1
        if not self._dropped and len(self.held) < MAX_HELD:
            self.held[digest] = network
            return True
        if not self._dropped:
            log.error("revocation_queue_full", held=len(self.held), action="all tokens end when the store is back")
        self._dropped += 1
        self._dropped_at = monotonic()
        update = self._outgoing()
        update.dropped += 1
        update.dropped_at = self._dropped_at
        return False

    def _changed(self) -> None:
        self.active = bool(self.held or self._dropped)
        if self.active and self._started and not self._closing and self._writing is None:
            self._writing = asyncio.create_task(self._write_later(), context=Context())

    def _outgoing(self) -> RevocationUpdate:
        """Return the update that is published in the next iteration of the event loop."""
        if self._update is None:
            self._update = RevocationUpdate()
            if self._started:
                asyncio.get_running_loop().call_soon(self._publish)
        return self._update

    def _publish(self) -> None:
        update, self._update = self._update, None
        event, self._awaited = self._awaited, None
        if update is not None and self.publish is not None:
            if event is not None:
                self._number += 1
                update.number = self._number
                timeout = asyncio.get_running_loop().call_later(ANSWER_TIMEOUT, self.answered, update.number)
                self._unanswered[update.number] = event, timeout
            self.publish(update)
        elif event is not None:
            event.set()

    async def _write_later(self) -> None:
        try:
            await asyncio.sleep(RETRY)
            await self._write_all()
        finally:
            self._writing = None

    async def _write_all(self) -> None:
        while self.active:
            await self._write()
            if self.active:
                await asyncio.sleep(RETRY)

    async def _write(self) -> None:
        if self._dropped:
            await self._revoke_all()
            return
        size = 1  # if the first one fails, the others would fail too
        while self.held:
            batch = list(islice(self.held, size))
            if not any(await self._background.finish(self._write_batch(batch))):
                return
            size = _BATCH

    async def _write_batch(self, digests: Sequence[bytes]) -> Sequence[bool]:
        return await asyncio.gather(*map(self._write_one, digests))

    async def _revoke_all(self) -> None:
        began = monotonic()
        try:
            with logged_revocation(log.warning, user="(all)", kind="all", reason="revocation_queue_full") as note:
                await self._store.tokens.revoke_all(None, self._clock(), progress=note)
        except Exception as error:
            _log_unexpected(error)
            return
        self._outgoing().all_revoked_at = began
        self._all_revoked(began)

    def _all_revoked(self, began: float) -> None:
        """Empty the queue if nothing was dropped after `began`."""
        if self._dropped and self._dropped_at < began:
            self.held.clear()
            self._per_network.clear()
            self._dropped = 0
            self._changed()

    async def _write_one(self, digest: bytes) -> bool:
        try:
            removed = await self._store.tokens.revoke(digest, self._clock())
        except Exception as error:
            _log_unexpected(error)
            if digest in self.held:  # move it to the end: one that cannot be written must not delay the others
                self.held[digest] = self.held.pop(digest)
            return False
        network = self.held.pop(digest, None)
        if network is not None:
            self._per_network[network] -= 1
            if not self._per_network[network]:
                del self._per_network[network]
        self._outgoing().written.append(digest)
        self._changed()
        if removed:
            log.info("token_revoked", id=public_id(digest), late=True)
        return True


@contextmanager
def logged_revocation(log_end: Callable[..., object], **fields: str) -> Iterator[Callable[[int], object]]:
    """Log how many tokens the block revokes, also if it fails or is cancelled after some. It notes the number so far.

    log_end: logs it if it does not fail.
    """
    count = 0

    def note(number: int) -> None:
        nonlocal count
        count = number

    try:
        yield note
    except BaseException:
        if count:
            log.warning("revocation_interrupted", count=count, **fields)
        raise
    log_end("tokens_revoked", count=count, **fields)


def _log_lost(held: Iterable[bytes], dropped: int) -> None:
    for digest in held:
        id = public_id(digest)
        log.error("revocation_lost", id=id, action=f"run `tokenauth tokens revoke --id {id}` once the store is back")
    if dropped:
        log.error("revocations_lost", count=dropped, action="revoke all tokens once the store is back")


def _log_unexpected(error: Exception) -> None:
    if not isinstance(error, RetryLater):  # that the store is down is already known
        log.error("unexpected_error", at=safe_traceback(error))
