"""Held revocations, as the main process knows them: each of its workers refuses them, whichever worker took them."""

from collections.abc import Iterable
from time import monotonic

import msgspec

from tokenauth.logs import log
from tokenauth.models import Instant, public_id

MAX_HELD = 100_000
"""Revocations that are held at the most: about 15 MB."""


class News(msgspec.Struct, omit_defaults=True):
    """What a process tells the others of the revocations that the store could not take."""

    held: dict[bytes, str] = {}
    """The digests of tokens to refuse, each with the network that revoked it."""
    written: list[bytes] = []
    """The digests that the store has taken since."""
    dropped: int = 0
    """How many more were revoked than can be held: no token may be accepted."""
    dropped_at: Instant = 0.0
    """When the last of those was revoked, by the monotonic clock, which all processes of a machine share."""
    all_ended: Instant = 0.0
    """All tokens have been ended that were issued before this time of the monotonic clock."""


class RevocationLedger:
    """Keeps what the workers hold, for new workers, and for the log if nobody could write it until the end."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[str, Instant]] = {}
        self._dropped = 0
        self._dropped_at = 0.0

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._held)

    def take(self, news: News) -> None:
        """Take in what a worker says."""
        now = monotonic()
        for digest, network in news.held.items():
            if len(self._held) < MAX_HELD:  # a worker that is given more will say that it has dropped them
                self._held.setdefault(digest, (network, now))
        self._dropped += news.dropped
        self._dropped_at = max(self._dropped_at, news.dropped_at)
        if self._dropped_at < news.all_ended:
            self._dropped = 0
            self._held = {digest: held for digest, held in self._held.items() if held[1] >= news.all_ended}
        for digest in news.written:
            self._held.pop(digest, None)

    def news(self) -> News:
        """Return what a new worker must know."""
        held = {digest: network for digest, (network, _) in self._held.items()}
        return News(held=held, dropped=self._dropped, dropped_at=self._dropped_at)

    def log_lost(self) -> None:
        """Log what was not written, at the end."""
        log_lost(self._held, self._dropped)


def log_lost(held: Iterable[bytes], dropped: int) -> None:
    """Log revocations that end with this process: an operator can repeat them."""
    for digest in held:
        log.error("revocation_lost", id=public_id(digest), action="revoke it by id once the store is back")
    if dropped:
        log.error("revocations_lost", count=dropped, action="revoke all tokens once the store is back")
