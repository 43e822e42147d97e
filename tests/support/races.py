"""Holders that race for the tokens of a pool, crash at random, and record the answers that they get."""

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from random import Random
from typing import Protocol

from tests.support.connections import Answer, Closed, Connection, NoAnswer, Refused
from tests.support.history import Grant, HandTime, History, Operation, Outcome, Time
from tests.support.journal import until

HANGUP_RATE = 0.03
"""The share of requests after which the client disconnects without waiting for the answer."""


STALE: Sequence[Operation] = ["release", "keep_alive"]
"""What clients try with leases that may have ended."""


class PoolApi(Protocol):
    """One client's access to a pool. None is a refusal. Each method may raise NoAnswer."""

    def assign(self, holder: str) -> Grant | None: ...

    def keep_alive(self, holder: str, grant: Grant) -> Grant | None: ...

    def release(self, holder: str, grant: Grant) -> Grant | None: ...

    def generate(self) -> Grant | None: ...

    def delete(self, token: str) -> Grant | None: ...


class Holder:
    """A client that sends random requests, correct and stale ones."""

    def __init__(
        self, name: str, api: PoolApi, history: History, chance: Random, made: MutableSequence[str] | None = None
    ) -> None:
        """Lease tokens through `api`. With `made`, the list of generated tokens, also generate and delete tokens."""
        self._name = name
        self._api = api
        self._history = history
        self._chance = chance
        self._made = made
        self._leases = 0
        self._held: list[tuple[str, Grant]] = []
        self._past: list[tuple[str, Grant]] = []

    def step(self) -> None:
        """Send one random request."""
        choice = self._chance.random()
        try:
            if self._past and choice < 0.1:  # a lease that was released, forgotten or lost
                self._touch(self._chance.choice(STALE), *self._chance.choice(self._past[-9:]))
            elif self._made is not None and choice < 0.3:
                self._change_pool(self._made)
            elif self._held and choice < 0.85:
                self._use(self._held.pop(self._chance.randrange(len(self._held))))
            else:
                self.assign()
        except NoAnswer:
            pass  # the client forgets the lease, as if it had crashed

    def assign(self) -> Grant | None:
        """Lease a token."""
        self._leases += 1
        lease = f"{self._name}/{self._leases}"
        grant = self._history.record("assign", lambda: self._api.assign(self._name), lease)
        if grant is not None:
            self._held.append((lease, grant))
        return grant

    def _use(self, held: tuple[str, Grant]) -> None:
        """Keep a lease alive, release it, or forget it."""
        choice = self._chance.random()
        self._past.append(held)
        if choice < 0.6:
            if self._touch("keep_alive", *held):
                self._held.append(self._past.pop())
        elif choice < 0.85:
            self._touch("release", *held)

    def _touch(self, operation: Operation, lease: str, grant: Grant) -> bool:
        ask = self._api.release if operation == "release" else self._api.keep_alive
        answer = self._history.record(operation, lambda: ask(self._name, grant), lease, *grant)
        assert answer in {None, grant}, f"{operation} of {grant} returned {answer}"
        return answer is not None

    def _change_pool(self, made: MutableSequence[str]) -> None:
        """Generate a token, or delete one, which may be leased."""
        if not made or self._chance.random() < 0.5:
            new = self._history.record("generate", self._api.generate)
            if new is not None:
                made.append(new.token)
        else:
            token = self._chance.choice(made[-9:])
            self._history.record("delete", lambda: self._api.delete(token), token=token)


class HttpPoolApi:
    """A pool over HTTP. Each request goes to a random worker, and some disconnect before the answer."""

    def __init__(
        self,
        ports: Sequence[int],
        login: str,
        pool: str,
        chance: Random,
        hangup_rate: float = HANGUP_RATE,
        outages: bool = False,
    ) -> None:
        """Connect lazily. The caller may change `ports` at any time. `outages`: the store may be down sometimes."""
        self._ports = ports
        self._login = login
        self._path = f"/api/pools/{pool}"
        self._chance = chance
        self._hangup_rate = hangup_rate
        self._outages = outages
        self._connections: dict[int, _Connection] = {}

    def assign(self, holder: str) -> Grant | None:
        answer = self._ask("POST", "leases", {"holder": holder}, refusals={409: "no_free_token"})
        return answer and _granted(answer, holder)

    def keep_alive(self, holder: str, grant: Grant) -> Grant | None:
        answer = self._ask("PUT", f"leases/{grant.token}", {"holder": holder, "fence": grant.fence}, refusals=_LOST)
        return answer and _granted(answer, holder)

    def release(self, holder: str, grant: Grant) -> Grant | None:
        check = {"holder": holder, "fence": grant.fence}
        return self._ask("DELETE", f"leases/{grant.token}", check, refusals=_LOST) and grant

    def generate(self) -> Grant | None:
        answer = self._ask("POST", "tokens", refusals={409: "pool_full"})
        return answer and Grant(answer.json()["tokens"][0])

    def delete(self, token: str) -> Grant | None:
        return self._ask("DELETE", f"tokens/{token}", refusals={404: "not_found"}) and Grant(token)

    def tokens(self) -> set[str]:
        answer = self._ask("GET", "?limit=1000", refusals={})
        assert answer is not None
        return {token["token"] for token in answer.json()["tokens"]}

    def leased(self) -> int:
        answer = self._ask("GET", "?limit=1", refusals={})
        assert answer is not None
        return int(answer.json()["leased"])

    def close(self) -> None:
        while self._connections:
            self._connections.popitem()[1].close()

    def _ask(self, method: str, path: str, document: object = None, *, refusals: dict[int, str]) -> Answer | None:
        """Send a request to any reachable worker. Raises NoAnswer."""
        target = f"{self._path}/{path}" if path[0] != "?" else self._path + path
        answer = None
        for gone in self._connections.keys() - set(self._ports):
            self._connections.pop(gone).close()
        while answer is None:
            port = self._chance.choice(self._ports)
            try:
                connection = self._connections.get(port) or _Connection(port)
                self._connections[port] = connection
                connection.hangs_up = self._chance.random() < self._hangup_rate
                answer = connection.ask(method, target, document, X_Token=self._login)
            except (Refused, Closed, NoAnswer) as error:
                if port in self._connections:
                    self._connections.pop(port).close()
                if isinstance(error, NoAnswer):
                    raise
        if answer.status < 300:
            return answer
        if answer.status == 503 and self._outages:  # the request may have been executed or not
            assert (answer.headers["retry-after"], answer.json()["error"]) == ("1", "store_unavailable"), answer
            raise NoAnswer
        assert refusals.get(answer.status) == answer.json()["error"], (method, path, answer)
        return None


class _Connection(Connection):
    """A connection that can be closed as soon as a request was sent."""

    hangs_up = False

    def send(self, request: bytes) -> Answer:
        if not self.hangs_up:
            return super().send(request)
        with suppress(OSError):
            self._socket.sendall(request)
        self.close()
        raise NoAnswer


_LOST = {409: "lease_lost", 404: "not_found"}


def _granted(answer: Answer, holder: str) -> Grant:
    document = answer.json()
    assert document["holder"] == holder, answer
    return Grant(document["token"], document["fence"])


CAPACITIES = {"permits": 10, "bounded": 5}

POOLS = f"""
[pools.permits]
capacity = {CAPACITIES["permits"]}
prefill = true
lease_ttl = %(lease_ttl)s

[pools.bounded]
capacity = {CAPACITIES["bounded"]}
lease_ttl = %(lease_ttl)s
"""
"""The pools of a race."""


class Race:
    """Twenty holders in a prefilled pool, and ten in a pool whose tokens they generate and delete."""

    def __init__(self, ports: Sequence[int], time: Time, lease_ttl: float, seed: int, outages: bool = False) -> None:
        """Prepare the unused pools of POOLS. The caller may change `ports` at any time.

        `outages`: the store may be down sometimes.
        """
        self.histories = {pool: History(time) for pool in CAPACITIES}
        self._lease_ttl = lease_ttl
        self._ports = ports
        self._seed = seed
        self._outages = outages
        self._late_outages = 0
        self._made: list[str] = []
        with Connection(ports[0]) as connection:
            self._login = connection.log_in()
        with self._reliable("permits") as api:
            for token in api.tokens():
                self.histories["permits"].record("generate", partial(Grant, token))
        with self._reliable("bounded") as api:
            for _ in range(CAPACITIES["bounded"] + 1):
                made = self.histories["bounded"].record("generate", api.generate)
                self._made += [] if made is None else [made.token]

    @property
    def length(self) -> int:
        """The number of requests so far."""
        return sum(len(history.events) for history in self.histories.values())

    def is_eventful(self) -> bool:
        """Whether every kind of event has happened."""
        try:
            for pool, history in self.histories.items():
                check_eventful(history, CAPACITIES[pool])
        except AssertionError:
            return False
        return True

    @contextmanager
    def running(self, more: Callable[[], bool], between: Callable[[], object]) -> Iterator[None]:
        """Run the holders while `more` returns True. Raises their errors."""
        pools = ["permits"] * 20 + ["bounded"] * 10
        with ThreadPoolExecutor(len(pools)) as threads:
            running = [threads.submit(self._run, pool, number, more, between) for number, pool in enumerate(pools)]
            try:
                yield
            finally:
                for one in running:  # an error of a holder explains why a test timed out
                    one.result()

    def finish(self, pass_time: Callable[[], object] = lambda: None) -> None:
        """Let all leases end. Check that no promise was broken, and that each remaining token can be leased once."""
        for pool, history in self.histories.items():
            with self._reliable(pool, self._outages) as api:
                last = Holder("last", api, history, Random(0))
                tokens, taken = until(
                    lambda: self._lease_all(api, last) if not pass_time() else None,  # noqa: B023
                    "all leases have ended, and the store is up",
                )
            found = history.violations(self._lease_ttl, CAPACITIES[pool])
            assert not found, "\n".join([f"{len(found)} violations", *found[:9]])
            assert taken == tokens, f"cannot be leased again: {tokens - taken}; are no tokens: {taken - tokens}"
            check_remaining(history, tokens)
            check_eventful(history, CAPACITIES[pool])

    def _lease_all(self, api: "HttpPoolApi", last: Holder) -> tuple[set[str], set[str]] | None:
        """Return all tokens, and those that `last` could lease; None while leases run, and in an outage.

        It asks once more than there are tokens. That is refused, unless the first lease has ended by then: else the
        history shows two leases of a token. When the leases have ended, one outage more is allowed.
        """
        ended = False
        try:
            if api.leased():
                return None
            tokens = api.tokens()
            ended = True
            return tokens, {grant.token for _ in range(len(tokens) + 1) if (grant := last.assign()) is not None}
        except NoAnswer:
            self._late_outages += ended
            if not self._outages or self._late_outages > 1:
                raise
            return None

    def _run(self, pool: str, number: int, more: Callable[[], bool], between: Callable[[], object]) -> None:
        chance = Random(f"{self._seed} {number}")
        made = self._made if pool == "bounded" else None
        with closing(HttpPoolApi(self._ports, self._login, pool, chance, outages=self._outages)) as api:
            holder = Holder(f"client {number}", api, self.histories[pool], chance, made)
            while more():
                holder.step()
                between()

    def _reliable(self, pool: str, outages: bool = False) -> "closing[HttpPoolApi]":
        return closing(HttpPoolApi(self._ports, self._login, pool, Random(self._seed), hangup_rate=0, outages=outages))


def check_remaining(history: History, tokens: set[str]) -> None:
    """Check that exactly the tokens remain that were generated and not deleted."""
    named: dict[tuple[Operation, Outcome], set[str]] = defaultdict(set)
    for event in history.events:
        named[event.operation, event.outcome].add(event.token)
    made, deleted = named["generate", Outcome.DONE], named["delete", Outcome.DONE]
    lost = made - deleted - named["delete", Outcome.UNKNOWN] - tokens
    assert not lost, f"generated, never deleted, but gone: {lost}"
    assert not tokens & deleted, f"deleted, but still there: {tokens & deleted}"
    assert tokens <= made or named["generate", Outcome.UNKNOWN], f"never generated, but there: {tokens - made}"


def check_eventful(history: History, capacity: int) -> None:
    """Check that the race covered every outcome, and that more leases lapsed than there are tokens."""
    for operation in ("assign", "keep_alive", "release"):
        assert history.count(operation, Outcome.DONE), f"{operation} never succeeded"
        assert history.count(operation, Outcome.REFUSED), f"{operation} was never refused"
    assert any(event.outcome is Outcome.UNKNOWN for event in history.events), "all requests were answered"
    asked = [event for event in history.events if event.outcome is not Outcome.REFUSED]
    ended = {
        (event.operation, event.lease or event.token) for event in asked if event.operation in {"release", "delete"}
    }
    lapsed = history.count("assign") - len(ended) - capacity
    assert lapsed > capacity, f"only {lapsed} leases lapsed"


def run_race(ports: Sequence[int], time: HandTime, lease_ttl: float, requests: int) -> None:
    """Race for `requests` requests. The clock jumps during them, often to just before a lease ends."""
    race, chance = Race(ports, time, lease_ttl, seed=8), Random(8)

    def jump() -> None:
        if chance.random() < 0.02:
            time.advance(chance.choice([0.5, lease_ttl / 2, lease_ttl - 0.5]))

    with race.running(lambda: race.length < requests, jump):
        pass
    race.finish(lambda: time.advance(lease_ttl))


def release_late(history: History, time: HandTime, ttl: float, one: PoolApi, other: PoolApi) -> None:
    """Let A sleep past the end of its lease, B get the token, A release it, and C get it, too."""
    history.record("generate", one.generate)
    stale = Holder("a", one, history, Random(1)).assign()
    assert stale is not None
    time.advance(ttl)
    assert Holder("b", other, history, Random(2)).assign() is not None
    history.record("release", lambda: one.release("a", stale), "a/1", *stale)
    Holder("c", other, history, Random(3)).assign()
    time.advance(ttl)
