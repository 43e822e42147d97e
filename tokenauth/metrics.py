"""What a worker counts, and the names under which the main process publishes it. Plain numbers: no library, no lock."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from tokenauth.errors import Forbidden, InsufficientScope, InvalidToken, Refusal, RetryLater
from tokenauth.models import Throttled

Key = tuple[str, ...]
"""The name of a family, and the values of its labels."""

Counts = dict[Key, list[float]]
"""What only grows. A counter is one number; a histogram has buckets and a sum; a summary a count and a sum."""

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the durations of requests, in seconds. One more bucket has all longer ones."""

FIRST_BUCKET = BUCKETS[0]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

OTHERS = "(others)"
"""The label of the requests that an address answers only with a valid token. Each of those is a validation, too."""


class Family(NamedTuple):
    """Metrics of one name. `merge` says what a gauge of all workers is."""

    name: str
    kind: Literal["counter", "histogram", "summary", "gauge"]
    labels: Sequence[str]
    help: str
    merge: Literal["sum", "max", "min"] = "max"


FAMILIES = (
    Family("logins_total", "counter", ("result",), "Logins: ok, or the code of the refusal."),
    Family("throttle_refusals_total", "counter", (), "Logins that were refused because of earlier failed ones."),
    Family("validations_total", "counter", ("route", "result"), "Tokens that were checked."),
    Family("request_seconds", "histogram", ("method", "route"), "From the head of a request to the end of its answer."),
    Family("live_tokens", "gauge", (), "Tokens in the database that have not expired, about once a minute."),
    Family("password_queue", "gauge", (), "Logins that wait for a hashing thread.", "sum"),
    Family("revocations_held", "gauge", (), "Log-outs that could not be written yet. Their tokens are refused."),
    Family("store_up", "gauge", (), "1 if all workers can use the database, else 0.", "min"),
    Family("feed_age_seconds", "gauge", (), "Seconds since the worker that is furthest behind knew all revocations."),
    Family("audit_up", "gauge", (), "1 if all processes could write the audit log, else 0.", "min"),
    Family("audit_lost_total", "counter", (), "Acts that are missing in the audit log."),
    Family("pool_capacity", "gauge", ("pool",), "Configured capacity; without one, the tokens that exist."),
    Family("pool_leased", "gauge", ("pool",), "Tokens that are leased."),
    Family("pool_waiting", "gauge", ("pool",), "Requests that wait in line."),
    Family("pool_granted_total", "counter", ("pool",), "Leases."),
    Family("pool_denied_total", "counter", ("pool",), "Requests that got nothing and did not wait."),
    Family("pool_lapsed_total", "counter", ("pool",), "Leases that ended because nobody extended or released them."),
    Family("pool_forced_total", "counter", ("pool",), "Leases that a manager ended."),
    Family("pool_wait_seconds", "summary", ("pool",), "How long requests waited in line before they were granted."),
    Family("pool_hold_seconds", "summary", ("pool",), "How long leases lasted that were released or have lapsed."),
    # The main process knows these itself.
    Family("workers", "gauge", (), "Workers that report."),
    Family("workers_configured", "gauge", (), "Workers that the configuration asks for."),
    Family("worker_crashes_total", "counter", (), "Workers that ended by themselves, or hung and were killed."),
    Family("config_last_reload_successful", "gauge", (), "0 if the last reload that was begun was refused, else 1."),
    Family("config_last_reload_success_timestamp_seconds", "gauge", (), "When the configuration in use was loaded."),
    Family("tls_certificate_expiry_timestamp_seconds", "gauge", (), "When the certificate in use expires."),
    Family("build_info", "gauge", ("version",), "The version that runs; the value is always 1."),
)


class Snapshot(msgspec.Struct):
    """What one worker has counted since its start, and how it is doing."""

    counts: Counts
    gauges: dict[Key, float]
    throttled: Sequence[Throttled] = ()
    """Whom this worker has refused, and who still has to wait."""


class ValidationCounts:
    """Validations at one route, by result. A request without a token is none."""

    __slots__ = ("denied", "invalid", "unavailable", "valid")

    def __init__(self) -> None:
        self.valid = self.invalid = self.denied = self.unavailable = 0

    def refuse(self, error: Exception) -> None:
        """Count a validation that ended with this exception."""
        if isinstance(error, InvalidToken):
            self.invalid += 1
        elif isinstance(error, InsufficientScope | Forbidden):
            self.denied += 1
        elif isinstance(error, RetryLater) or not isinstance(error, Refusal):
            self.unavailable += 1

    def by_result(self) -> Mapping[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Durations:
    """The durations of requests by route and method, in buckets."""

    def __init__(self) -> None:
        self.by_route: dict[str, dict[str, list[float]]] = {}

    def find(self, route: str, method: str) -> list[float]:
        """Return the number of requests in each bucket, and at the end the sum of seconds, for `add_duration`.

        `route` is the template of a path, and unknown methods are one: clients cannot make up labels.
        """
        methods = self.by_route.setdefault(route, {})
        return methods.setdefault(method if method in _METHODS else "(other)", [0.0] * (len(BUCKETS) + 2))


def add_duration(counts: list[float], seconds: float) -> None:
    """Count a request of this duration."""
    counts[bisect_left(BUCKETS, seconds)] += 1
    counts[-1] += seconds


class Metrics:
    """What the HTTP side of one worker counts. The services count for themselves."""

    def __init__(self) -> None:
        self.durations = Durations()
        self._validations: dict[str, ValidationCounts] = {}

    def validations(self, route: str) -> ValidationCounts:
        """Return the counts of a route, which are the same at each call."""
        return self._validations.setdefault(route, ValidationCounts())

    def counts(self) -> Counts:
        """Return a copy of all counts."""
        found: Counts = {}
        for route, validations in self._validations.items():
            for result, number in validations.by_result().items():
                found["validations_total", route, result] = [number]
        for route, methods in self.durations.by_route.items():
            for method, durations in methods.items():
                found["request_seconds", method, route] = durations.copy()
        return found


def add(total: Counts, more: Mapping[Key, Sequence[float]]) -> None:
    """Add counts to a total."""
    for key, numbers in more.items():
        found = total.get(key)
        total[key] = list(numbers) if found is None else [a + b for a, b in zip(found, numbers, strict=True)]
