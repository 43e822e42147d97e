"""Holders that race for the tokens of a pool, crash at random, and write down what they were answered."""

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from random import Random
from typing import Protocol

from tests.support.connections import Answer, Closed, Connection, NoAnswer, Refused
from tests.support.history import Grant, HandTime, History, Outcome, Time, Verb
from tests.support.journal import until

HASTE = 0.03
"""One in this many requests is abandoned before its answer."""


STALE: Sequence[Verb] = ["release", "keep_alive"]
"""What clients try with leases that may be over."""


class Lender(Protocol):
    """One client's way to a pool. None is a refusal; anything may raise NoAnswer."""

    def assign(self, holder: str) -> Grant | None:
        """Take a token."""

    def keep_alive(self, holder: str, grant: Grant) -> Grant | None:
        """Ask for more time."""

    def release(self, holder: str, grant: Grant) -> Grant | None:
        """Give a token back."""

    def generate(self) -> Grant | None:
        """Make a token."""

    def delete(self, token: str) -> Grant | None:
        """Delete a token."""


class Holder:
    """A client that does at random what clients do, well behaved or not."""

    def __init__(
        self, name: str, lender: Lender, history: History, chance: Random, made: MutableSequence[str] | None = None
    ) -> None:
        """Borrow from `lender`; with `made`, the tokens that holders have generated, also generate and delete."""
        self._name = name
        self._lender = lender
        self._history = history
        self._chance = chance
        self._made = made
        self._leases = 0
        self._held: list[tuple[str, Grant]] = []
        self._past: list[tuple[str, Grant]] = []

    def step(self) -> None:
        """Do one thing."""
        choice = self._chance.random()
        try:
            if self._past and choice < 0.1:  # a stale claim: that lease was released, forgotten or lost
                self._touch(self._chance.choice(STALE), *self._chance.choice(self._past[-9:]))
            elif self._made is not None and choice < 0.3:
                self._breed(self._made)
            elif self._held and choice < 0.85:
                self._go_on(self._held.pop(self._chance.randrange(len(self._held))))
            else:
                self.take()
        except NoAnswer:
            pass  # whatever it was about is forgotten, as by a client that has crashed

    def take(self) -> Grant | None:
        """Take a token."""
        self._leases += 1
        lease = f"{self._name}/{self._leases}"
        grant = self._history.record("assign", lambda: self._lender.assign(self._name), lease)
        if grant is not None:
            self._held.append((lease, grant))
        return grant

    def _go_on(self, held: tuple[str, Grant]) -> None:
        """Keep a lease alive, release it, or forget it."""
        choice = self._chance.random()
        self._past.append(held)
        if choice < 0.6:
            if self._touch("keep_alive", *held):
                self._held.append(self._past.pop())
        elif choice < 0.85:
            self._touch("release", *held)

    def _touch(self, verb: Verb, lease: str, grant: Grant) -> bool:
        ask = self._lender.release if verb == "release" else self._lender.keep_alive
        answer = self._history.record(verb, lambda: ask(self._name, grant), lease, *grant)
        assert answer in {None, grant}, f"{verb} of {grant} was answered with {answer}"
        return answer is not None

    def _breed(self, made: MutableSequence[str]) -> None:
        """Generate a token, or delete one that may be leased."""
        if not made or self._chance.random() < 0.5:
            new = self._history.record("generate", self._lender.generate)
            if new is not None:
                made.append(new.token)
        else:
            token = self._chance.choice(made[-9:])
            self._history.record("delete", lambda: self._lender.delete(token), token=token)


class Sockets:
    """The HTTP of tokenauth: each request goes to one worker or another, and some hang up before the answer."""

    def __init__(
        self,
        ports: Sequence[int],
        login: str,
        pool: str,
        chance: Random,
        haste: float = HASTE,
        outages: bool = False,
    ) -> None:
        """Connect when needed; `ports` may change meanwhile. `outages`: the store may be down now and then."""
        self._ports = ports
        self._login = login
        self._path = f"/api/pools/{pool}"
        self._chance = chance
        self._haste = haste
        self._outages = outages
        self._connections: dict[int, _Connection] = {}

    def assign(self, holder: str) -> Grant | None:
        """Take a token."""
        answer = self._ask("POST", "leases", {"holder": holder}, refusals={409: "no_free_token"})
        return answer and _granted(answer, holder)

    def keep_alive(self, holder: str, grant: Grant) -> Grant | None:
        """Ask for more time."""
        answer = self._ask("PUT", f"leases/{grant.token}", {"holder": holder, "fence": grant.fence}, refusals=_LOST)
        return answer and _granted(answer, holder)

    def release(self, holder: str, grant: Grant) -> Grant | None:
        """Give a token back."""
        claim = {"holder": holder, "fence": grant.fence}
        return self._ask("DELETE", f"leases/{grant.token}", claim, refusals=_LOST) and grant

    def generate(self) -> Grant | None:
        """Make a token."""
        answer = self._ask("POST", "tokens", refusals={409: "pool_full"})
        return answer and Grant(answer.json()["tokens"][0])

    def delete(self, token: str) -> Grant | None:
        """Delete a token."""
        return self._ask("DELETE", f"tokens/{token}", refusals={404: "not_found"}) and Grant(token)

    def tokens(self) -> set[str]:
        """List the tokens that there are."""
        answer = self._ask("GET", "?limit=1000", refusals={})
        assert answer is not None
        return {token["token"] for token in answer.json()["tokens"]}

    def leased(self) -> int:
        """Return the number of leased tokens."""
        answer = self._ask("GET", "?limit=1", refusals={})
        assert answer is not None
        return int(answer.json()["leased"])

    def close(self) -> None:
        """Disconnect."""
        while self._connections:
            self._connections.popitem()[1].close()

    def _ask(self, method: str, path: str, document: object = None, *, refusals: dict[int, str]) -> Answer | None:
        """Ask any worker that can be reached. Raises NoAnswer."""
        target = f"{self._path}/{path}" if path[0] != "?" else self._path + path
        answer = None
        while answer is None:
            port = self._chance.choice(self._ports)
            try:
                connection = self._connections.get(port) or _Connection(port)
                self._connections[port] = connection
                connection.hasty = self._chance.random() < self._haste
                answer = connection.ask(method, target, document, X_Token=self._login)
            except (Refused, Closed, NoAnswer) as trouble:
                if port in self._connections:
                    self._connections.pop(port).close()
                if isinstance(trouble, NoAnswer):
                    raise
        if answer.status < 300:
            return answer
        if answer.status == 503 and self._outages:  # it may have been done or not
            assert (answer.headers["retry-after"], answer.json()["error"]) == ("1", "store_unavailable"), answer
            raise NoAnswer
        assert refusals.get(answer.status) == answer.json()["error"], (method, path, answer)
        return None


class _Connection(Connection):
    """One that can hang up as soon as it has sent a request."""

    hasty = False

    def send(self, request: bytes) -> Answer:
        """Send a request and perhaps read its answer. Raises Closed or NoAnswer."""
        if not self.hasty:
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
    """Twenty holders in a pool of permits, and ten in a pool whose tokens are made and deleted meanwhile."""

    def __init__(self, ports: Sequence[int], time: Time, lease_ttl: float, seed: int, outages: bool = False) -> None:
        """Enter the pools of POOLS, which nobody has used before; `ports` may change meanwhile.

        `outages`: the store may be down now and then.
        """
        self.histories = {pool: History(time) for pool in CAPACITIES}
        self._lease_ttl = lease_ttl
        self._ports = ports
        self._seed = seed
        self._outages = outages
        self._made: list[str] = []
        with Connection(ports[0]) as connection:
            self._login = connection.log_in()
        with self._calm("permits") as lender:
            for token in lender.tokens():
                self.histories["permits"].record("generate", partial(Grant, token))
        with self._calm("bounded") as lender:
            for _ in range(CAPACITIES["bounded"] + 1):
                made = self.histories["bounded"].record("generate", lender.generate)
                self._made += [] if made is None else [made.token]

    @property
    def length(self) -> int:
        """Say how many requests there were so far."""
        return sum(len(history.events) for history in self.histories.values())

    @contextmanager
    def running(self, more: Callable[[], bool], between: Callable[[], object]) -> Iterator[None]:
        """Have the holders race for as long as `more` says so; what goes wrong in one of them is raised."""
        pools = ["permits"] * 20 + ["bounded"] * 10
        with ThreadPoolExecutor(len(pools)) as threads:
            running = [threads.submit(self._run, pool, number, more, between) for number, pool in enumerate(pools)]
            yield
            for one in running:
                one.result()

    def finish(self, pass_time: Callable[[], object] = lambda: None) -> None:
        """Let all leases lapse. No promise was broken, and each token that should be there can be had, once."""
        for pool, history in self.histories.items():
            with self._calm(pool) as lender:
                until(lambda: not pass_time() and lender.leased() == 0, "all leases have lapsed")
                tokens = lender.tokens()
                last = Holder("last", lender, history, Random(0))
                taken = {grant.token for _ in range(len(tokens) + 1) if (grant := last.take()) is not None}
            found = history.violations(self._lease_ttl, CAPACITIES[pool])
            assert not found, "\n".join([f"{len(found)} times a promise was broken", *found[:9]])
            assert history.events[-1].outcome is Outcome.REFUSED, "one more was lent than there are"
            assert taken == tokens, f"never lent again: {tokens - taken}"
            check_remaining(history, tokens)
            check_eventful(history, CAPACITIES[pool])

    def _run(self, pool: str, number: int, more: Callable[[], bool], between: Callable[[], object]) -> None:
        chance = Random(f"{self._seed} {number}")
        made = self._made if pool == "bounded" else None
        with closing(Sockets(self._ports, self._login, pool, chance, outages=self._outages)) as lender:
            holder = Holder(f"client {number}", lender, self.histories[pool], chance, made)
            while more():
                holder.step()
                between()

    def _calm(self, pool: str) -> "closing[Sockets]":
        return closing(Sockets(self._ports, self._login, pool, Random(self._seed), haste=0))


def check_remaining(history: History, tokens: set[str]) -> None:
    """Every token is there that was made and not deleted, and no other."""
    named: dict[tuple[Verb, Outcome], set[str]] = defaultdict(set)
    for event in history.events:
        named[event.verb, event.outcome].add(event.token)
    made, deleted = named["generate", Outcome.DONE], named["delete", Outcome.DONE]
    lost = made - deleted - named["delete", Outcome.UNKNOWN] - tokens
    assert not lost, f"made, not deleted, and gone: {lost}"
    assert not tokens & deleted, f"deleted and still there: {tokens & deleted}"
    assert tokens <= made or named["generate", Outcome.UNKNOWN], f"there, and nobody made it: {tokens - made}"


def check_eventful(history: History, capacity: int) -> None:
    """Everything happened that a race is about, and more leases lapsed than there are tokens."""
    for verb in ("assign", "keep_alive", "release"):
        assert history.count(verb, Outcome.DONE), f"{verb} was never done"
        assert history.count(verb, Outcome.REFUSED), f"{verb} was never refused"
    assert any(event.outcome is Outcome.UNKNOWN for event in history.events), "all requests were answered"
    asked = [event for event in history.events if event.outcome is not Outcome.REFUSED]
    ended = {(event.verb, event.lease or event.token) for event in asked if event.verb in {"release", "delete"}}
    lapsed = history.count("assign") - len(ended) - capacity
    assert lapsed > capacity, f"only {lapsed} leases lapsed"


def run_race(ports: Sequence[int], time: HandTime, lease_ttl: float, requests: int) -> None:
    """Race for this many requests. Time jumps meanwhile, often to just before a lease ends."""
    race, chance = Race(ports, time, lease_ttl, seed=8), Random(8)

    def jump() -> None:
        if chance.random() < 0.02:
            time.advance(chance.choice([0.5, lease_ttl / 2, lease_ttl - 0.5]))

    with race.running(lambda: race.length < requests, jump):
        pass
    race.finish(lambda: time.advance(lease_ttl))
