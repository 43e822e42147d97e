"""The waiting line of a pool: who goes before whom, and who gets which of the free tokens. No I/O."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence

from tokenauth.models import Instant, LeaseRequest, Pool, PoolToken

POINT = 60.0
"""Seconds of waiting that one point of priority is worth.

All who wait gain on those who come later at the same pace, so the order of two requests never changes: a request of
priority 5 goes ahead of all of priority 0 that came up to 5 minutes before it, and of no others. Nobody starves: with
priorities from -100 to 100, no request that comes more than 200 minutes later goes ahead.
"""

KEPT = 10.0
"""Seconds for which a place is kept after the end of the wait that its client asked for."""

REMEMBERED = 3600.0
"""Seconds for which a granted request is remembered after its leases are over, at least."""

MAX_PLACES = 1000
"""Maximum number of places that one user has in the line of one pool."""

LAST = 2**62
"""The number from which requests are counted that have no row: of equal turns, theirs come last."""

Row = tuple[int, PoolToken]
"""A token and its number."""

MayUse = Callable[[LeaseRequest, PoolToken], bool]


def new_request(
    pool: Pool,
    username: str,
    id: str,
    holder: str,
    count: int = 1,
    priority: int = 0,
    ttl: float | None = None,
    labels: tuple[str, ...] = (),
    since: Instant = 0.0,
    kept_until: Instant = 0.0,
    number: int = LAST,
) -> LeaseRequest:
    """Return a request that waits since an instant."""
    turn = since - POINT * priority
    terms = holder, count, priority, ttl, labels
    return LeaseRequest(number, pool.name, username, id, *terms, since, turn, kept_until)


def find_use(pool: Pool, now: Instant) -> MayUse:
    """Return a function that says whether a request could use a free token of a pool."""
    if not pool.members:
        return lambda request, _: not request.labels
    return lambda request, token: pool.can_lease(token, request.username or None, request.labels, now)


def skip_hopeless(pool: Pool, line: Iterable[LeaseRequest]) -> Iterator[LeaseRequest]:
    """Yield those who wait without those for more tokens than the pool can have since its settings were changed.

    They would hold up all others until their places lapse. Those over `per_user` hold up nobody.
    """
    most: dict[tuple[str, ...], float] = {}
    for request in line:
        if request.labels not in most:
            most[request.labels] = pool.matching(request.labels)
        if request.count <= most[request.labels]:
            yield request


def share_out(
    line: Iterable[LeaseRequest], free: Sequence[Row], may_use: MayUse, quotas: MutableMapping[str, int] | None = None
) -> Iterator[tuple[LeaseRequest, Sequence[Row]]]:
    """Yield the requests that can be served now, each with its tokens.

    line: those who wait, in order. No more of it is read than is needed.
    free: the tokens that can be leased, the one that has been free longest first.
    may_use: whether a request could use a token.
    quotas: how many more tokens each user may lease, if that is limited. It is reduced by what is yielded.

    A request that lacks tokens withholds those that it could use, so nobody later takes what someone earlier could use.
    One for more than its user may lease now withholds none.
    """
    left = list(free)
    hopeless: set[tuple[str, Sequence[str]]] = set()  # users and labels for which no token is left
    for request in line:
        if not left:
            return
        if quotas is not None and request.username and quotas[request.username] < request.count:
            continue
        kind = request.username, request.labels
        if kind in hopeless:
            continue
        usable = [row for row in left if may_use(request, row[1])]
        taken = usable[: request.count]
        if len(taken) == request.count:
            if quotas is not None and request.username:
                quotas[request.username] -= request.count
            yield request, taken
        if len(taken) == len(usable):
            hopeless.add(kind)
        numbers = {number for number, _ in taken}
        left = [row for row in left if row[0] not in numbers]
