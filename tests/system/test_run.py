"""`tokenauth run`: a command that runs while a token is leased, and is dead when the lease is over."""

import asyncio
import calendar
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Certificate, make_certificate
from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.ports import free_port
from tests.support.servers import TOKENAUTH, Server, serve, worker, write_config
from tests.support.skipping import skip_without
from tests.support.tcp_proxy import Proxy
from tests.support.wrapped import LOGIN, Wrapper, ended, guard_of, wrapping
from tests.system.test_terminal import OnTerminal, on_terminal
from tokenauth.cli.guard import Command, Terminal
from tokenauth.client import PoolClient, RemoteTokens, TokenAuth
from tokenauth.clock import boottime
from tokenauth.errors import IssuerUnavailable
from tokenauth.models import Login

SLEEP = ("sh", "-c", "echo $$; exec sleep 1000")
STUBBORN = ("sh", "-c", "trap 'echo got TERM' TERM; echo $$; while :; do sleep 0.05; done")


@pytest.fixture(scope="module", autouse=True)
def linux() -> None:
    if sys.platform != "linux":
        skip_without("Linux", "these tests look at processes in /proc, and use the parent-death signal")


@pytest.fixture(scope="module")
def settings() -> str:
    """Return pools. A lease of the steady one lasts longer than any standstill of a machine."""
    return """
        [pools]
        permit = {capacity = 1, prefill = true, lease_ttl = 2}
        steady = {capacity = 1, prefill = true, lease_ttl = 12}
        short = {capacity = 1, prefill = true, lease_ttl = 1}
        long = {capacity = 1, prefill = true, lease_ttl = 600}
        pair = {capacity = 2, prefill = true, lease_ttl = 600}
        phones.members = [{name = "pixel-8", labels = ["arm"]}, {name = "iphone-15", labels = ["arm", "ios"]}]
        guarded = {capacity = 1, prefill = true, scope = "nobody-has-this"}
    """


@pytest.fixture(scope="module")
def server(config_file: Path) -> Iterator[Server]:
    """Run a worker with the real clock: the processes of `tokenauth run` have no other."""
    with worker(config_file) as running:
        yield running


@pytest.fixture
def admin(server: Server) -> Iterator[PoolUser]:
    """Log in as the administrator, and make all tokens free."""
    with Connection(server.port) as connection:
        admin = PoolUser(connection)
        for pool in ("permit", "steady", "long", "pair"):
            admin.empty(pool)
        yield admin


@pytest.fixture
def network(server: Server) -> Iterator[Proxy]:
    """Return the network between `tokenauth run` and the server."""
    with Proxy(server.port) as network:
        yield network


@pytest.fixture
def wrap(tmp_path: Path, admin: PoolUser, network: Proxy) -> Iterator[Wrapper]:
    """Return what starts `tokenauth run`, which connects through the network."""
    with wrapping(tmp_path, f"http://127.0.0.1:{network.port}") as wrapper:
        yield wrapper


def waiting(admin: PoolUser) -> list[dict[str, Any]]:
    """Return the requests that wait for the long lease."""
    status, document = admin.call("GET", "/long/requests")
    assert status == 200, document
    return list(document["requests"])


def is_leased(admin: PoolUser, pool: str) -> bool:
    return admin.counts(pool) == (0, 1)


def rival_leases(admin: PoolUser) -> None:
    """Wait until another client gets the permit."""
    until(lambda: admin.ask("POST", "/permit/leases").status == 201, "another client gets the permit")


def lease_end(admin: PoolUser) -> int:
    return int(admin.members("steady")[0]["lease_expiry_time"])


def test_the_command_gets_the_lease_but_no_login(wrap: Wrapper, admin: PoolUser) -> None:
    run = wrap("--pool", "long", "--holder", "ci-7", "--", "sh", "-c", "env; echo done; sleep 1000")
    run.expect("done")
    (lease,) = admin.members("long")
    variables = dict(line.split("=", 1) for line in run.out.splitlines() if line.startswith("TOKENAUTH_"))
    assert variables == {
        "TOKENAUTH_URL": variables["TOKENAUTH_URL"],
        "TOKENAUTH_LEASE_POOL": "long",
        "TOKENAUTH_LEASE_TOKEN": lease["token"],
        "TOKENAUTH_LEASE_FENCE": str(lease["fence"]),
        "TOKENAUTH_LEASE_MEMBER": "",
    }
    assert (lease["user"], lease["holder"]) == ("ann", "ci-7")


def test_the_login_ends_with_the_run(wrap: Wrapper, server: Server) -> None:
    with Connection(server.port) as connection:
        ann = PoolUser(connection, "ann")
        before = ann.count_logins()
        run = wrap("--pool", "long", "--", "sh", "-c", "echo started; sleep 1000")
        run.expect("started")
        assert ann.count_logins() == before + 1
        run.signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
        assert ann.count_logins() == before


def test_labels_choose_the_member(wrap: Wrapper) -> None:
    run = wrap("--pool", "phones", "--label", "arm", "--label", "ios", "sh", "-c", "echo $TOKENAUTH_LEASE_MEMBER")
    assert run.wait() == 0
    assert run.out == "iphone-15\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -9 $$"], 128 + signal.SIGKILL),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_the_exit_status_is_that_of_the_command(
    wrap: Wrapper, admin: PoolUser, command: list[str], status: int
) -> None:
    run = wrap("--pool", "long", *command)
    assert run.wait() == status
    assert admin.counts("long") == (1, 0), "the token is released"
    problems = {
        127: "Error: no-such-command: No such file or directory.\n",
        126: "Error: /etc/passwd: Permission denied.\n",
    }
    assert run.err == problems.get(status, "")


def test_no_free_token_exits_with_75(wrap: Wrapper, admin: PoolUser) -> None:
    admin.assign("long")
    run = wrap("--pool", "long", "true")
    assert run.wait() == 75
    assert run.err.endswith("Error: Could not get a token of the pool long in time.\n")  # a slow server is waited for


def test_a_wait_that_is_too_short_exits_with_75(wrap: Wrapper, admin: PoolUser) -> None:
    admin.assign("long")
    run = wrap("--pool", "long", "--wait", "0.5s", "touch", "ran")
    assert run.wait() == 75
    assert waiting(admin) == []
    assert not (run.directory / "ran").exists()


@pytest.mark.parametrize("login", [{}, {"TOKENAUTH_TOKEN": "t" * 64}], ids=["password", "token"])
@pytest.mark.parametrize("wait", ["0", "1.1s"])
def test_a_server_that_is_away_exits_with_69(wrap: Wrapper, wait: str, login: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    run = wrap("--pool", "long", "--wait", wait, "true", url=url, **login)
    assert run.wait() == 69
    late = f"Waiting for the server at {url}, which has not answered yet.\n"
    problem = f"Error: The server at {url} cannot be reached, or does not answer as tokenauth does.\n"
    # on a busy machine a second can pass before the first attempt has failed
    assert run.err in ({problem, late + problem} if wait == "0" else {late + problem})


def test_a_server_that_restarts_is_waited_for(wrap: Wrapper, tmp_path: Path, settings: str) -> None:
    port = free_port()
    run = wrap("--pool", "long", "--wait", "10m", "echo", "ran", url=f"http://127.0.0.1:{port}")
    until(lambda: "has not answered yet" in run.err, "it waits")
    with serve(write_config(tmp_path, settings), "--port", str(port)):
        assert run.wait() == 0
    assert run.out == "ran\n"


@pytest.mark.parametrize(
    ("pool", "env"),
    [
        ("guarded", {}),
        ("long", {"TOKENAUTH_PASSWORD": "wrong"}),
        ("long", {"TOKENAUTH_TOKEN": "t" * 64}),
    ],
    ids=["scope", "password", "token"],
)
def test_a_refused_user_exits_with_77(wrap: Wrapper, pool: str, env: dict[str, str]) -> None:
    run = wrap("--pool", pool, "true", **env)
    assert run.wait() == 77
    assert run.err.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "env", "problem"),
    [
        (["--pool", "long"], {}, "Missing argument"),
        (["true"], {}, "Missing option '--pool'"),
        (["--pool", "long", "--nonsense", "true"], {}, "No such option '--nonsense'"),
        (["--pool", "long", "--wait", "soon", "true"], {}, "'soon' is not a duration"),
        (["--pool", "nowhere", "true"], {}, "no pool of this name"),
        (["--pool", "..", "true"], {}, "no pool of this name"),
        (["--pool", "long", "--url", "localhost:8000", "true"], {}, "--url or TOKENAUTH_URL: must be http"),
        (["--pool", "long", "--url", "http://localhost:99999", "true"], {}, "--url or TOKENAUTH_URL: must be http"),
        (["--pool", "long", "true"], {"TOKENAUTH_USERNAME": ""}, "Set TOKENAUTH_TOKEN, or"),
        (["--pool", "long", "true"], {"TOKENAUTH_TOKEN": "short"}, "TOKENAUTH_TOKEN is not a token"),
        (["--pool", "long", "true"], {"TOKENAUTH_TOKEN_FILE": "missing"}, "missing cannot be read: No such file"),
        (["--pool", "long", "true"], {"TOKENAUTH_PASSWORD_FILE": "missing"}, "Set TOKENAUTH_PASSWORD or"),
    ],
)
def test_wrong_usage_exits_with_64(wrap: Wrapper, arguments: list[str], env: dict[str, str], problem: str) -> None:
    run = wrap(*arguments, **env)
    assert run.wait() == 64
    assert problem in run.err
    assert "short" not in run.err


def test_a_token_in_a_file_is_a_login(wrap: Wrapper, admin: PoolUser, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{admin.token}\n")
    run = wrap("--pool", "long", *SLEEP, TOKENAUTH_TOKEN_FILE=str(tmp_path / "token"), TOKENAUTH_USERNAME="")
    run.command()
    assert admin.members("long")[0]["user"] == "admin"


def test_the_lease_is_kept_while_the_command_runs(wrap: Wrapper, admin: PoolUser) -> None:
    run = wrap("--pool", "steady", *SLEEP)
    command = run.command()
    first = lease_end(admin)
    until(lambda: lease_end(admin) > first, "the lease is kept alive")
    assert not ended(command)
    os.kill(command, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert admin.counts("steady") == (1, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on_to_the_command(wrap: Wrapper, admin: PoolUser, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    run = wrap("--pool", "long", "sh", "-c", f"trap 'exit 5' {name}; echo $$; while :; do sleep 0.05; done")
    run.command()
    run.signal(number)
    assert run.wait() == 5
    assert admin.counts("long") == (1, 0)


EXTENDED = [pytest.param(number, marks=pytest.mark.extended) for number in (signal.SIGHUP, signal.SIGINT)]
STOPPING = pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGTERM, *EXTENDED])


@STOPPING
@pytest.mark.parametrize(
    ("at", "is_run", "is_released"),
    [
        ("once POST /api/token", False, True),
        ("always POST /api/token", False, True),
        ("once POST /api/pools/long/leases", False, True),
        ("always POST /api/pools/long/leases", False, True),
        ("once DELETE /api/pools/long/leases/", True, True),
        ("always DELETE /api/pools/long/leases/", True, False),
        ("once DELETE /api/token", True, True),
        ("always DELETE /api/token", True, True),
    ],
)
def test_a_signal_before_or_after_the_command_runs(
    wrap: Wrapper, admin: PoolUser, number: signal.Signals, at: str, is_run: bool, is_released: bool
) -> None:
    """Before, it is the status. After, it is that of the command; the second signal exits at once."""
    run = wrap("--pool", "long", "sh", "-c", "echo it ran; exit 7", INTERRUPTED_AT=f"{number} {at}")
    assert run.wait() == (7 if is_run else 128 + number), run.err
    assert run.out == ("it ran\n" if is_run else "")
    assert run.err == ""
    assert admin.counts("long") == ((1, 0) if is_released else (0, 1))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGWINCH])
@pytest.mark.parametrize("at", ["POST /api/token", "POST /api/pools/long/leases", "DELETE /api/pools/long/leases/"])
def test_other_signals_are_for_the_command_only(wrap: Wrapper, number: signal.Signals, at: str) -> None:
    run = wrap("--pool", "long", "sh", "-c", "exit 7", INTERRUPTED_AT=f"{number} once {at}")
    assert (run.wait(), run.err) == (7, "")


@STOPPING
def test_a_command_that_a_signal_ends_has_its_status(wrap: Wrapper, admin: PoolUser, number: signal.Signals) -> None:
    run = wrap("--pool", "long", *SLEEP)
    run.command()
    run.signal(number)
    assert run.wait() == 128 + number
    assert admin.counts("long") == (1, 0)


@STOPPING
def test_a_signal_ends_the_wait_and_leaves_the_line(wrap: Wrapper, admin: PoolUser, number: signal.Signals) -> None:
    admin.assign("long")
    run = wrap("--pool", "long", "--wait", "10m", "touch", "ran")
    until(lambda: bool(waiting(admin)), "it waits")
    run.signal(number)
    assert run.wait() == 128 + number
    assert waiting(admin) == []
    assert not (run.directory / "ran").exists()


def test_a_command_waits_for_its_turn(wrap: Wrapper, admin: PoolUser) -> None:
    before = admin.assign("long")
    run = wrap("--pool", "long", "--wait", "10m", "--holder", "ci-7", *SLEEP)
    until(lambda: "Waiting" in run.err, "it waits")
    assert run.err.endswith("Waiting for a token of the pool long: place 1 of 1.\n")
    assert [request["holder"] for request in waiting(admin)] == ["ci-7"]
    admin.release("long", before.token)
    run.command()
    assert admin.members("long")[0]["fence"] == before.fence + 1


@pytest.mark.parametrize("pool", ["short", "permit"])
def test_a_short_lease_is_whole_after_a_wait(wrap: Wrapper, admin: PoolUser, pool: str) -> None:
    """An answer has whole seconds: what is left of a lease of a second would be none. A busy machine may lose some."""

    def succeeds() -> bool:
        admin.assign(pool)  # lapses by itself
        return wrap("--pool", pool, "--wait", "10m", "sleep", "0.2").wait() == 0

    assert any(succeeds() for _ in range(5))


def test_several_tokens_are_lists_of_words(wrap: Wrapper, admin: PoolUser) -> None:
    script = 'for token in $TOKENAUTH_LEASE_TOKEN; do echo "$token"; done; echo "$TOKENAUTH_LEASE_FENCE"; sleep 1000'
    run = wrap("--pool", "pair", "--count", "2", "--ttl", "90", "sh", "-c", script)
    until(lambda: run.out.count("\n") == 3, "it has written all lines")
    *tokens, fences = run.out.splitlines()
    leased = {lease["token"]: lease["fence"] for lease in admin.members("pair")}
    assert leased == dict(zip(tokens, map(int, fences.split()), strict=True))
    run.signal(signal.SIGTERM)
    run.wait()
    assert admin.counts("pair") == (2, 0)


def test_a_lost_network_kills_before_anyone_gets_the_token(wrap: Wrapper, admin: PoolUser, network: Proxy) -> None:
    run = wrap("--pool", "permit", "--kill-after", "0.5s", *STUBBORN)
    command, began = run.command(), time.time()
    network.cut()
    rival_leases(admin)
    assert ended(command)
    assert "got TERM" in run.out, "it had time to stop"
    network.heal()
    assert run.wait() == 76
    said = "Error: The lease could not be kept, so the command was ended. The server at http://"
    since = (
        r"\S+ could not be reached, or has not answered as tokenauth does, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\.\n"
    )
    found = re.search(re.escape(said) + since, run.err)
    assert found, run.err
    instant = calendar.timegm(time.strptime(found[0][-25:-6], "%Y-%m-%d %H:%M:%S"))
    assert int(began) <= instant <= time.time()
    assert is_leased(admin, "permit"), "the lease of the rival was not released"


def test_a_frozen_network_is_like_a_cut_one(wrap: Wrapper, admin: PoolUser, network: Proxy) -> None:
    run = wrap("--pool", "permit", "--kill-after", "0", *STUBBORN)
    command = run.command()
    network.freeze()
    rival_leases(admin)
    assert ended(command)
    network.heal()
    assert run.wait() == 76


@pytest.mark.parametrize("kill_after", [0, 0.1])
async def test_a_command_is_dead_before_its_lease_is_over(kill_after: float) -> None:
    command = Command(STUBBORN, Terminal(), kill=True)
    await command.connect()
    end = boottime() + 1
    assert await command.run({}, 60, end, kill_after) == (128 + signal.SIGKILL, True, "")
    assert boottime() < end


async def test_a_short_lease_can_be_used_almost_to_its_end() -> None:
    command = Command(STUBBORN, Terminal(), kill=True)
    await command.connect()
    end = boottime() + 1
    assert await command.run({}, 0.1, end, 0) == (128 + signal.SIGKILL, True, "")
    assert boottime() > end - 0.02


async def test_a_lost_lease_leaves_the_whole_time_to_stop(tmp_path: Path) -> None:
    """Also if the guard hears of it late."""
    started = tmp_path / "started"
    script = f"trap '' TERM; echo $PPID > {started}.new; mv {started}.new {started}; exec sleep 1000"
    command = Command(("sh", "-c", script), Terminal(), kill=True)
    await command.connect()
    running = asyncio.create_task(command.run({}, 60, boottime() + 60, 0.3))
    async with asyncio.timeout(60):
        while not started.exists():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)
    guard = int(started.read_text())
    os.kill(guard, signal.SIGSTOP)
    command.end()
    await asyncio.sleep(0.25)
    continued_at = boottime()
    os.kill(guard, signal.SIGCONT)
    assert await running == (128 + signal.SIGKILL, True, "")
    assert boottime() > continued_at + 0.3


async def test_a_signal_reaches_a_command_that_has_just_been_started() -> None:
    """Also while its process is made: one of several signals comes then."""
    for _ in range(12):
        command = Command(("sleep", "1000"), Terminal(), kill=True)
        await command.connect()
        running = asyncio.create_task(command.run({}, 60, boottime() + 10, 0))
        await asyncio.sleep(0)  # until its first wait
        command.extend(boottime() + 5)
        command.signal(signal.SIGTERM)
        assert await running == (128 + signal.SIGTERM, False, "")


def test_an_outage_shorter_than_the_lease_kills_nothing(wrap: Wrapper, admin: PoolUser, network: Proxy) -> None:
    run = wrap("--pool", "steady", "--kill-after", "0.1s", *SLEEP)
    command = run.command()
    first = lease_end(admin)
    network.freeze()
    until(lambda: lease_end(admin) <= first and bool(network.connections), "a keep-alive hangs")
    network.heal()
    until(lambda: lease_end(admin) > first, "the lease is kept alive again")
    assert not ended(command)


def test_a_stopped_wrapper_does_not_delay_the_kill(wrap: Wrapper, admin: PoolUser) -> None:
    run = wrap("--pool", "permit", *STUBBORN)
    command = run.command()
    run.stop()
    rival_leases(admin)
    assert ended(command)
    run.signal(signal.SIGCONT)
    assert run.wait() == 76
    assert is_leased(admin, "permit"), "the lease of the rival was not released"


def test_a_killed_wrapper_ends_the_command_and_lapses(wrap: Wrapper, admin: PoolUser) -> None:
    run = wrap("--pool", "permit", "--kill-after", "0.5s", *STUBBORN)
    command = run.command()
    run.signal(signal.SIGKILL)
    run.expect("got TERM")
    rival_leases(admin)
    assert ended(command)


def test_killing_all_of_tokenauth_kills_the_command(wrap: Wrapper) -> None:
    run = wrap("--pool", "long", *STUBBORN)
    command = run.command()
    guard = guard_of(run.process.pid)
    run.stop()
    os.kill(guard, signal.SIGKILL)
    run.signal(signal.SIGKILL)
    until(lambda: ended(command), "the command is killed")


def test_a_killed_guard_ends_the_run(wrap: Wrapper, admin: PoolUser) -> None:
    run = wrap("--pool", "long", *STUBBORN)
    command = run.command()
    os.kill(guard_of(run.process.pid), signal.SIGKILL)
    assert run.wait() == 70
    assert ended(command)
    assert admin.counts("long") == (1, 0)


def test_background_processes_of_the_command_die_too(wrap: Wrapper, admin: PoolUser) -> None:
    """The command itself ends at SIGTERM, what it has started does not."""
    script = "(trap '' TERM; while :; do sleep 0.05; done) & echo $!; wait"
    run = wrap("--pool", "permit", "--kill-after", "0.5s", "sh", "-c", script)
    child = run.command()
    run.stop()
    rival_leases(admin)
    assert ended(child)


@pytest.mark.parametrize(
    ("query", "did"), [("force=true", "ended"), ("force=true&take=true", "taken over")], ids=["ended", "taken over"]
)
def test_a_forced_release_ends_the_command(wrap: Wrapper, admin: PoolUser, query: str, did: str) -> None:
    run = wrap("--pool", "permit", "--kill-after", "0.5s", *SLEEP)
    command = run.command()
    token = admin.members("permit")[0]["token"]
    assert admin.ask("DELETE", f"/permit/leases/{token}?{query}", {"reason": "device is stuck"}).status in {200, 204}
    assert run.wait() == 76
    assert ended(command)
    why = f"The manager 'admin' has {did} your lease. Reason: device is stuck."
    assert run.err == f"Error: The lease could not be kept, so the command was ended. {why}\n"


def test_on_lost_warn_lets_the_command_go_on(wrap: Wrapper, admin: PoolUser, network: Proxy) -> None:
    run = wrap("--pool", "permit", "--on-lost", "warn", "sh", "-c", "echo $$; while [ ! -e end ]; do sleep 0.05; done")
    command = run.command()
    network.cut()
    rival_leases(admin)
    until(lambda: "The lease is lost. The command goes on without it." in run.err, "it says so")
    assert not ended(command)
    (run.directory / "end").touch()
    assert run.wait() == 76, "0 would say that all went well"


@contextmanager
def shell(directory: Path, url: str, **jobs: str) -> Iterator[OnTerminal]:
    """Run an interactive shell on a terminal. The jobs are scripts in its directory: so their text is not shown."""
    for name, script in jobs.items():
        (directory / name).write_text(script)
    variables = " ".join(f"{name}={value}" for name, value in {**LOGIN, "TOKENAUTH_URL": url}.items())
    with on_terminal(directory, f"export {variables}; exec bash --norc --noprofile --noediting -i 2>&1") as found:
        found.type("PS1='prompt-'; run=\"$TOKENAUTH run --pool long\"")
        found.expect("prompt-")
        yield found


def test_the_command_has_the_terminal_and_job_control(tmp_path: Path, server: Server, admin: PoolUser) -> None:
    job = "echo ready; read line; echo line=$line; read line; echo second=$line; exec sleep 1000"
    with shell(tmp_path, server.url, job=job) as terminal:
        terminal.type("$run -- sh job")
        terminal.expect("ready")
        terminal.type("hello")
        terminal.expect("line=hello")
        terminal.press("Z")
        terminal.expect("Stopped")
        terminal.expect("prompt-")
        terminal.type("fg")
        terminal.type("again")
        terminal.expect("second=again")
        terminal.press("C")
        terminal.expect("prompt-")
        assert admin.counts("long") == (1, 0)
        terminal.type("echo status=$?")
        terminal.expect("status=130")


@pytest.mark.extended
def test_a_command_in_the_background_stops_when_it_reads(tmp_path: Path, server: Server, admin: PoolUser) -> None:
    with shell(tmp_path, server.url, job="echo ready; read line; echo line=$line") as terminal:
        terminal.type("$run -- sh job & sleep 0.1")
        terminal.expect("ready")
        terminal.type("wait %1")
        terminal.expect("Stopped")
        terminal.type("fg")
        terminal.type("hello")
        terminal.expect("line=hello")
        terminal.expect("prompt-")
        assert admin.counts("long") == (1, 0)


@pytest.mark.extended
def test_a_command_in_a_pipeline_leaves_others_the_terminal(tmp_path: Path, server: Server, admin: PoolUser) -> None:
    """Keys that send signals reach it all the same."""
    pager = "read data; echo data=$data; read line < /dev/tty; echo line=$line; exec cat"
    with shell(tmp_path, server.url, job="echo ready; exec sleep 1000", pager=pager) as terminal:
        terminal.type("$run -- sh job | sh pager")
        terminal.expect("data=ready")
        terminal.type("hello")
        terminal.expect("line=hello")
        terminal.press("C")
        terminal.expect("prompt-")
        assert admin.counts("long") == (1, 0)
        terminal.type("$run -- sh -c 'read line; echo line=$line' | cat")
        terminal.type("again")
        terminal.expect("line=again")


def test_a_terminal_shows_the_place_in_one_line(tmp_path: Path, server: Server, admin: PoolUser) -> None:
    before = admin.assign("long")
    with shell(tmp_path, server.url) as terminal:
        terminal.type("$run --wait 10m -- echo go")
        terminal.expect("\r\x1b[KWaiting for a token of the pool long: place 1 of 1.")
        admin.release("long", before.token)
        terminal.expect("\r\x1b[Kgo")


def test_the_terminal_is_given_back_to_a_script(tmp_path: Path, server: Server, admin: PoolUser) -> None:
    with shell(tmp_path, server.url, script="$run -- true; read line; echo line=$line") as terminal:
        terminal.type('export run="$TOKENAUTH run --pool long"; sh script')
        terminal.type("hello")
        terminal.expect("line=hello")


def test_it_starts_without_the_server(tmp_path: Path) -> None:
    """It loads neither the configuration nor the database, and needs no configuration file."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", TOKENAUTH, "run", "--pool", "p", "--url", "http://127.0.0.1:9", "true"],
        cwd=tmp_path, env={**os.environ, **LOGIN}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 69, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tokenauth.client.pools" in loaded
    unwanted = {"sqlalchemy", "starlette", "uvicorn", "rich.text", "tokenauth.service", "tokenauth.settings.loader"}
    assert loaded & unwanted == set()


@pytest.mark.parametrize("loaded", ["tokenauth.cli.guard", "tokenauth.client", "httpx", "tokenauth.client.pools"])
def test_an_interrupt_at_the_start_is_no_failure(tmp_path: Path, loaded: str) -> None:
    """The process ends as of the signal: by itself, or with the status that a shell shows for it."""
    tokenauth = Path(sys.executable).with_name("tokenauth")
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", tokenauth, "run", "--pool", "p", "--url", "http://127.0.0.1:9",
         "--wait", "1m", "true"],
        cwd=tmp_path, env={**os.environ, **LOGIN}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert any(line.split()[-1:] == [loaded] for line in process.stderr), "it is loaded"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode in {-signal.SIGINT, 128 + signal.SIGINT}, rest


def test_without_httpx_it_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['httpx'] = None; from tokenauth.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--pool", "p", "--url", "http://127.0.0.1:9", "true"],
        cwd=tmp_path, env={**os.environ, **LOGIN}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 64
    assert done.stderr.endswith("the extra `client` of tokenauth-server; in a checkout, `make install`.\n")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Certificate]]:
    """Serve https with a certificate that is signed by itself."""
    home = tmp_path_factory.mktemp("secured")
    made = make_certificate(home)
    config = write_config(home, f"[server]\n{made.settings()}[pools.permit]\ncapacity = 1\nprefill = true")
    with serve(config) as running:
        yield f"https://127.0.0.1:{running.port}", made


@pytest.mark.parametrize("token", [False, True], ids=["a_password", "a_token"])
def test_a_certificate_that_is_not_trusted_is_named(
    wrap: Wrapper, secured: tuple[str, Certificate], token: bool
) -> None:
    """At once, however long it may wait."""
    url, _ = secured
    login = {"TOKENAUTH_TOKEN": "a" * 64} if token else {}
    run = wrap("--pool", "permit", "--wait", "10m", "true", url=url, SSL_CERT_FILE="", **login)
    assert run.wait() == 69
    fix = "name the file of its issuer's certificate in SSL_CERT_FILE"
    problem = f"Error: The server at {url} has a certificate that is not trusted: self-signed certificate: {fix}.\n"
    assert run.err.replace("self signed", "self-signed") == problem


def test_the_file_of_an_issuer_is_trusted(wrap: Wrapper, secured: tuple[str, Certificate]) -> None:
    url, made = secured
    run = wrap("--pool", "permit", "echo", "leased", url=url, SSL_CERT_FILE=str(made.certificate))
    assert (run.wait(), run.out, run.err) == (0, "leased\n", "")


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("", "`tokenauth run` and the Python clients do not trust it here: self-signed certificate"),
        ("other.pem", "`tokenauth run` and the Python clients do not trust it here: self-signed certificate"),
        ("one.pem", ""),
        ("none", "whether clients trust it cannot be found out: No such file or directory"),
    ],
)
def test_doctor_trusts_what_the_clients_trust(secured: tuple[str, Certificate], file: str, found: str) -> None:
    """OpenSSL reads both variables, and so trusts the certificate; the clients read one of them."""
    _, made = secured
    home = made.certificate.parent
    make_certificate(home, "other")
    (home / "trusted").mkdir(exist_ok=True)
    shutil.copy(made.certificate, home / "trusted")
    subprocess.run(["openssl", "rehash", home / "trusted"], check=True)
    env = {"SSL_CERT_FILE": str(home / file) if file else "", "SSL_CERT_DIR": str(home / "trusted") if file else ""}
    assert _trust(home, env) == found


def test_doctor_asks_openssl_without_the_clients(secured: tuple[str, Certificate]) -> None:
    _, made = secured
    distrust = "programs that trust OpenSSL's issuers do not trust it here: self-signed certificate"
    without = "import sys; sys.modules['httpx'] = None; from tokenauth.cli.main import main; main()"
    for file, found in ((str(made.certificate), ""), ("", distrust)):
        assert _trust(made.certificate.parent, {"SSL_CERT_FILE": file}, sys.executable, "-c", without) == found


def _trust(home: Path, env: Mapping[str, str], *program: str) -> str:
    """Return what doctor says of who trusts the certificate."""
    command = [*(program or [TOKENAUTH]), "doctor", "--json"]
    done = subprocess.run(command, cwd=home, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    (finding,) = [one for one in json.loads(done.stdout)["checks"] if one["check"] == "certificate"]
    assert finding["status"] == "ok"
    text = finding["text"].replace("self signed", "self-signed")
    return str(text.partition(" UTC")[2].removeprefix("; "))


@pytest.mark.parametrize("name", ["none", "one.key"])
def test_a_file_that_has_no_certificate_is_wrong_usage(
    wrap: Wrapper, secured: tuple[str, Certificate], name: str
) -> None:
    url, made = secured
    file = made.certificate.with_name(name)
    run = wrap("--pool", "permit", "true", url=url, SSL_CERT_FILE=str(file))
    assert run.wait() == 64
    assert f"Error: SSL_CERT_FILE: {file} cannot be used: " in run.err


@pytest.mark.parametrize("trusted", [False, True])
def test_the_clients_of_python_trust_that_issuer(
    secured: tuple[str, Certificate],
    trusted: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, made = secured
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate) if trusted else "")
    auth = TokenAuth(url, "ann", "ann-secret")

    async def identify() -> Login | None:
        async with RemoteTokens(url) as tokens:
            return await tokens.identify(b"a" * 64)

    with nullcontext() if trusted else pytest.raises(IssuerUnavailable):
        assert asyncio.run(identify()) is None
    said = "its certificate is not trusted: self-signed certificate: name the file"
    assert (said in caplog.text) is not trusted
    with PoolClient(url, auth=auth) as pools:
        if trusted:
            with pools.lease("permit") as lease:
                assert lease.failing_since is None
        else:
            with pytest.raises(IssuerUnavailable) as refused, pools.lease("permit", wait=600):
                pass
            assert "SSL_CERT_FILE" in refused.value.distrust
            assert str(refused.value).startswith("The certificate of tokenauth is not trusted: self-signed certificate")
