"""One interface for both clients, so that each test covers both."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from anyio import move_on_after
from anyio.from_thread import BlockingPortal, start_blocking_portal

from tests.support.servers import NO_TLS
from tokenauth.client.lease import Grant
from tokenauth.client.pools import AsyncLease, AsyncPoolClient, PoolClient

KINDS = ["threads", "asyncio"]


class Watch:
    """The monotonic clock of a client, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Lost(Protocol):
    """The event of a lost lease."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Held(Protocol):
    token: str
    holder: str
    fence: int
    name: str | None
    labels: tuple[str, ...]

    @property
    def ends_at(self) -> float:
        """When it ends, by the client's clock."""

    @property
    def grants(self) -> tuple[Grant, ...]:
        """All tokens."""

    @property
    def lost(self) -> Lost:
        """Set when it is over."""

    def check(self) -> None:
        """Raise LeaseLost when it is over."""


class Client(Protocol):
    @property
    def lease(self) -> Callable[..., AbstractContextManager[Held]]:
        """Hold a token. The arguments are those of `PoolClient.lease`."""


Connect = Callable[..., Client]
"""Makes a client of either kind. The arguments are those of PoolClient."""


@contextmanager
def connecting(kind: str) -> Iterator[Connect]:
    """Yield what makes clients of a kind. They are closed at the end."""
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal()) if kind == "asyncio" else None

        def connect(url: str, **options: Any) -> Client:
            options = {"verify": NO_TLS, **options}
            if portal is None:
                return stack.enter_context(PoolClient(url, **options))
            return _Client(
                portal, stack.enter_context(portal.wrap_async_context_manager(AsyncPoolClient(url, **options)))
            )

        yield connect


class _Client:
    """An AsyncPoolClient, used from outside its event loop."""

    def __init__(self, portal: BlockingPortal, client: AsyncPoolClient) -> None:
        self._portal = portal
        self._client = client

    @contextmanager
    def lease(self, pool: str, **options: Any) -> Iterator[Held]:
        """Hold a token."""
        held = self._client.lease(pool, **options)
        with self._portal.wrap_async_context_manager(held) as lease:
            yield _Held(self._portal, lease)


class _Held:
    """A lease of an AsyncPoolClient, used from outside its event loop. It is also its own `lost`."""

    def __init__(self, portal: BlockingPortal, lease: AsyncLease) -> None:
        self.token, self.holder, self.fence, self.grants = lease.token, lease.holder, lease.fence, lease.grants
        self.name, self.labels = lease.name, lease.labels
        self._portal = portal
        self._lease = lease

    def __repr__(self) -> str:
        return repr(self._lease)

    @property
    def ends_at(self) -> float:
        """When it ends, by the client's clock."""
        return self._lease.ends_at

    @property
    def lost(self) -> Lost:
        """Set when it is over."""
        return self

    def check(self) -> None:
        """Raise LeaseLost when it is over."""
        self._portal.call(self._lease.check)

    def is_set(self) -> bool:
        """Whether it is lost."""
        return self._portal.call(self._lease.lost.is_set)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is lost."""
        return self._portal.call(self._wait, timeout)

    async def _wait(self, seconds: float | None) -> bool:
        with move_on_after(seconds):
            await self._lease.lost.wait()
        return self._lease.lost.is_set()
