"""Counts refusals that repeat, so that clients without a password cannot fill the audit log.

Refusals are a group if they have the same user, network, target and result. The first one is a record at once. Those
that follow within PERIOD are one record at its end, with their number, and so on until a PERIOD has none.

There are at most MAX_GROUPS such groups at a time. Further refusals are grouped by user and result only, and those of
more than MAX_GROUPS users by result. So memory is bounded, and so is the number of records in a minute.
"""

from collections.abc import Mapping, Sequence
from math import inf

from tokenauth.addresses import network
from tokenauth.audit.records import make_record
from tokenauth.request_context import RequestContext

REPEATED = frozenset(
    {"login_failed", "login_refused", "login_not_checked", "access_denied", "revocation_held_in_memory"}
)
"""Events that are counted. Anyone can cause those of failed logins, and of log-outs that wait for the store."""

PERIOD = 60.0
"""Seconds for which refusals are counted."""

MAX_GROUPS = 20
"""Groups at a time, and users at a time beyond them. The sizes in docs/audit.md follow from it."""

_Record = dict[str, object]

_SHARED = frozenset({"time", "action", "result", "via", "host", "pid"})

_FIELDS = (None, _SHARED | {"user"}, _SHARED)
"""Fields of the records of groups by user, network and target (all fields), by user, and by result."""


class _Group:
    """Refusals that are counted together. `record` is that of the first one of the period."""

    __slots__ = ("count", "ends_at", "record")

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at
        self.count = 0
        self.record: _Record = {}

    def take(self) -> _Record:
        """Return the record of what was counted, and start again."""
        details = self.record.get("details")
        record = self.record | {"details": {**(details if isinstance(details, dict) else {}), "count": self.count}}
        self.count, self.record = 0, {}
        return record


class Repeats:
    """The refusals of a process. Times are those of any clock in seconds. Not thread-safe."""

    def __init__(self) -> None:
        self._levels: Sequence[dict[tuple[object, ...], _Group]] = [{} for _ in _FIELDS]

    def add(self, event: Mapping[str, object], request: RequestContext | None, now: float) -> _Record | None:
        """Return the record to write now for an event; None if the event is counted, for a record of `due`."""
        kind = event["event"], event.get("reason")
        user = event.get("user")
        keys = (*kind, user, _network(event, request), event.get("route")), (*kind, user), kind
        for groups, key, fields in zip(self._levels, keys, _FIELDS, strict=True):
            group = groups.get(key)
            if group is None and (len(groups) < MAX_GROUPS or key is kind):
                group = groups[key] = _Group(now + PERIOD)
                if fields is None:
                    return make_record(event, request)
            if group is not None:
                if not group.count:
                    made = make_record(event, request)
                    group.record = made if fields is None else {name: made[name] for name in made if name in fields}
                group.count += 1
                break
        return None

    def due(self, now: float = inf) -> list[_Record]:
        """Return the records of the periods that have ended; without `now`, of all."""
        records = []
        for groups in self._levels:
            for key, group in [*groups.items()]:
                if group.ends_at <= now:
                    if group.count:
                        records.append(group.take())
                        group.ends_at = now + PERIOD
                    else:
                        del groups[key]
        return records

    def next_due(self) -> float | None:
        """Return when `due` has to be called; None if nothing is counted."""
        return min((group.ends_at for groups in self._levels for group in groups.values()), default=None)


def _network(event: Mapping[str, object], request: RequestContext | None) -> object:
    found = event.get("network")
    return network(request.origin().get("address", "")) if found is None and request is not None else found
