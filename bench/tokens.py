"""The figures about tokens, logins and the process."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench import load, world
from bench.figures import Figure, Sample, Sampler
from bench.limit import HASH, BareServer, Comparison, bare_argon2
from bench.load import CONNECTIONS
from bench.machine import CORES
from bench.world import MILLION, Running, value

_FEW = 4
"""Connections of slow validations."""

_LOGINS = 16
"""Connections of logins: enough to keep all cores busy, and few enough for the login queue."""

_FLOOD = 128 * len(CORES)
"""Connections of wrong logins: each sends about one per second, and one core hashes about 60 per second."""

_METRICS = '[metrics]\nlisten = "127.0.0.1:0"'

_LOGIN_PAGE = '[browser]\nurl = "http://localhost:8000"'

_WARM = 2
"""Seconds of load before the first round."""


class TokenRows:
    """The figures, and what they share: a directory, a database, the bare function."""

    def __init__(self, directory: Path, bare: BareServer, seconds: int) -> None:
        self._directory = directory
        self._bare = bare
        self._seconds = seconds
        self._full: Path | None = None

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        durable = "durable, 64 connections"
        return (
            Figure("hot", "GET /api/token, 500 hot tokens", 0.80, "", partial(self._probes, "hot")),
            Figure("metered", "GET /api/token, with metrics", 0.80, "", self._metered),
            Figure("me", "GET /api/me", 0.65, "", partial(self._probes, "me")),
            Figure("auth", "GET /auth, forward-auth", 0.75, "", partial(self._probes, "auth")),
            Figure("cookie", "GET /auth?cookie, forward-auth for browsers", 0.70, "", self._cookie),
            Figure("introspect", "POST /oauth/introspect", 0.45, "", partial(self._probes, "introspect")),
            Figure("million", "GET /api/token, 1,000,000 tokens", 0.55, "", partial(self._probes, "million")),
            Figure("issue", f"POST /api/token, {durable}", 0.20, "", self._issue),
            Figure("oauth", f"POST /oauth/token, {durable}", 0.26, "", self._oauth),
            Figure("revoke", f"DELETE /api/token, {durable}", 0.20, "", self._revoke),
            Figure("login", "logins, default hash, of bare argon2", 0.90, "", self._login),
            Figure("flood", "p99 under wrong logins, of idle p99", 4, "x", self._flood, at_most=True),
            Figure("start", "start with 1,000,000 tokens", 0.5, "s", self._start, at_most=True),
            Figure("memory", "memory of a worker, full cache", 100, "MB", self._memory, at_most=True, rounds=1),
        )

    @contextmanager
    def _probes(self, kind: str) -> Iterator[Sampler]:
        """Validate tokens that are all valid."""
        with world.tokenauth(self._million()) as server:
            _check_probe(server, value(0))
            _check_probe(server, value(MILLION - 1))
            me = server.client.get("/api/me", headers={"X-Token": value(7)}).json()
            _require(me["username"] == "user7", f"/api/me answered {me}")
            found = server.client.post("/oauth/introspect", data={"token": value(7)}, auth=("user0", "secret")).json()
            _require(found["active"] and found["username"] == "user7", f"/oauth/introspect answered {found}")
            passed = server.client.get("/auth", params={"scope": "introspect"}, headers={"X-Token": value(7)})
            _require(passed.headers.get("x-auth-user") == "user7", f"/auth answered {passed.status_code}")
            load.run(server.port, kind, _WARM)
            yield lambda: self._compare(server, kind).sample()

    @contextmanager
    def _metered(self) -> Iterator[Sampler]:
        """Validate tokens while requests are counted and measured."""
        with self._serving(_METRICS) as server:
            _check_probe(server, value(0))
            load.run(server.port, "hot", _WARM)
            yield lambda: self._compare(server, "hot").sample()

    @contextmanager
    def _cookie(self) -> Iterator[Sampler]:
        """Validate tokens in cookies, as a reverse proxy asks."""
        with self._serving(_LOGIN_PAGE) as server:
            passed = server.client.get("/auth?cookie", headers={"Cookie": f"tokenauth={value(7)}"})
            _require(passed.headers.get("x-auth-user") == "user7", f"/auth?cookie answered {passed.status_code}")
            load.run(server.port, "cookie", _WARM)
            yield lambda: self._compare(server, "cookie").sample()

    @contextmanager
    def _serving(self, tables: str) -> Iterator[world.Running]:
        """Serve a token of each user, with more tables in the configuration."""
        with self._scratch() as directory:
            config = world.write_config(directory, tables=tables)
            world.fill(config, world.USERS)
            with world.tokenauth(config) as server:
                yield server

    @contextmanager
    def _issue(self) -> Iterator[Sampler]:
        """Log in with a negligible hash, each round into a new database."""

        def sample() -> Sample:
            with self._scratch() as directory:
                config = world.write_config(directory)
                with world.tokenauth(config) as server:
                    _check_login(server)
                    found = self._compare(server, "issue")
                issued = sum(world.counts(config)) - 1  # those beyond `per_user` were revoked
            found.require_changes(issued, CONNECTIONS)
            return found.sample()

        yield sample

    @contextmanager
    def _oauth(self) -> Iterator[Sampler]:
        """Issue tokens to 500 clients whose secrets the server has verified before."""
        with self._scratch() as directory:
            config = world.write_config(directory)
            with world.tokenauth(config) as server:
                load.run(server.port, "oauth", _WARM)

                def sample() -> Sample:
                    before = sum(world.counts(config))
                    found = self._compare(server, "oauth")
                    found.require_changes(sum(world.counts(config)) - before, CONNECTIONS)
                    return found.sample()

                yield sample

    @contextmanager
    def _revoke(self) -> Iterator[Sampler]:
        """Revoke one token after the other, out of a million."""
        with self._scratch() as directory:
            config = world.write_config(directory)
            shutil.copyfile(world.database(self._million()), world.database(config))
            os.sync()
            with world.tokenauth(config) as server:
                last = value(MILLION - 1)
                _check_probe(server, last)
                server.client.request("DELETE", "/api/token", json={"token": last}).raise_for_status()
                _check_probe(server, last, valid=False)
                offset = 0

                def sample() -> Sample:
                    nonlocal offset
                    before, _ = world.counts(config)
                    found = self._compare(server, "revoke", offset)
                    after, _ = world.counts(config)
                    found.require_changes(before - after, CONNECTIONS)
                    offset += found.result.requests + 2 * CONNECTIONS  # wrk does not wait for its last requests
                    return found.sample()

                yield sample

    @contextmanager
    def _login(self) -> Iterator[Sampler]:
        """Log in with the default hash on all cores, and compare with only argon2 on all cores."""
        with self._scratch() as directory, world.tokenauth(world.write_config(directory, "", HASH), None) as server:
            _check_login(server)

            def sample() -> Sample:
                bare = bare_argon2(self._seconds)
                result = load.run(server.port, "issue", self._seconds, _LOGINS)
                _quiet(server)
                return Sample(result.rate / bare, result.rate, result.p99_ms, f"bare argon2 {bare:.0f}/s")

            yield sample

    @contextmanager
    def _flood(self) -> Iterator[Sampler]:
        """Validate slowly, first alone, then during more wrong logins than can be hashed."""
        with self._scratch() as directory:
            config = world.write_config(directory, 'trusted_proxies = ["127.0.0.1/32"]', HASH)
            world.fill(config, world.USERS)
            with world.tokenauth(config, None) as server:
                _check_probe(server, value(0))
                wrong = server.client.post("/api/token", json={"username": "user0", "password": "wrong"})
                _require(wrong.status_code == 401, f"a wrong login was answered {wrong.status_code}")
                yield partial(self._flooded, server)

    def _flooded(self, server: Running) -> Sample:
        idle = load.run(server.port, "calm", self._seconds, _FEW)
        with load.in_background(server.port, "wrong", self._seconds + 1, _FLOOD) as floods:
            time.sleep(1)  # until the login queue is full
            calm = load.run(server.port, "calm", self._seconds, _FEW)
        _quiet(server)
        flood = floods[0]
        refused = f"{flood.rate:.0f} wrong logins/s, {flood.overloaded / flood.requests:.0%} of them 503"
        return Sample(calm.p99_ms / idle.p99_ms, calm.rate, calm.p99_ms, f"idle p99 {idle.p99_ms:.2f} ms; {refused}")

    @contextmanager
    def _start(self) -> Iterator[Sampler]:
        """Start with a million tokens in the file: from exec until /readyz answers 200."""
        config = self._million()

        def sample() -> Sample:
            with world.tokenauth(config) as server:
                return Sample(server.start_seconds)

        yield sample

    @contextmanager
    def _memory(self) -> Iterator[Sampler]:
        """Validate more tokens than the cache holds, then measure the memory of the worker."""
        with world.tokenauth(self._million()) as server:
            _check_probe(server, value(0))

            def sample() -> Sample:
                probed = load.fill_cache(server.port, self._seconds)
                sizes = server.memory()
                shares = f"PSS {sizes['pss']:.0f} MB, main process and its helper {sizes['others']:.0f} MB more"
                return Sample(sizes["rss"], note=f"RSS after {probed:,} tokens; {shares}")

            yield sample

    def _compare(self, server: Running, kind: str, offset: int = 0) -> Comparison:
        return self._bare.compare(lambda: load.run(server.port, kind, self._seconds, offset=offset))

    def _million(self) -> Path:
        """Return the configuration whose database has a million tokens. It is made at the first call."""
        if self._full is None:
            self._full = world.write_config(self._directory / "million")
            world.fill(self._full, MILLION)
        return self._full

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Make a temporary directory for another database."""
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            yield Path(directory)


def _check_probe(server: Running, token: str, valid: bool = True) -> None:
    answer = server.client.get("/api/token", params={"token": token}).json()
    _require(answer["valid"] is valid, f"GET /api/token answered {answer}")


def _check_login(server: Running) -> None:
    answer = server.client.post("/api/token", json={"username": "user0", "password": "secret"}).raise_for_status()
    _check_probe(server, answer.json()["token"])


def _quiet(server: Running) -> None:
    """Wait until the login queue is empty: it would slow down the next measurement."""
    login = {"username": "user0", "password": "secret"}
    deadline = time.monotonic() + 30
    while server.client.post("/api/token", json=login).status_code != 200:
        _require(time.monotonic() < deadline, "after many logins, no login succeeded for 30 s")
        time.sleep(0.1)


def _require(right: bool, problem: str) -> None:
    if not right:
        raise RuntimeError(problem)
