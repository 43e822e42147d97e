"""The command `tokenauth run`: lease a token, run another command while the lease is kept alive, release the token."""

import asyncio
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenauth import errors, values
from tokenauth.cli.guard import Command, Ended, Terminal
from tokenauth.clock import boottime
from tokenauth.logs import printable
from tokenauth.settings import durations

if TYPE_CHECKING:
    from tokenauth.client.pools import AsyncLease, AsyncPoolClient

_LEASE_LOST = 76
_LOGIN = ("TOKENAUTH_TOKEN", "TOKENAUTH_USERNAME", "TOKENAUTH_PASSWORD")
_STATUSES: dict[type[errors.Refusal], int] = {
    errors.NoFreeToken: os.EX_TEMPFAIL,
    errors.PlaceLost: os.EX_TEMPFAIL,
    errors.TooManyLeases: os.EX_TEMPFAIL,
    errors.TooManyPlaces: os.EX_TEMPFAIL,
    errors.LeaseLost: _LEASE_LOST,
    errors.Forbidden: os.EX_NOPERM,
    errors.InsufficientScope: os.EX_NOPERM,
    errors.InvalidCredentials: os.EX_NOPERM,
    errors.InvalidToken: os.EX_NOPERM,
    errors.RetryLater: os.EX_UNAVAILABLE,
    errors.Refusal: os.EX_USAGE,
}
_SHOWN_EVERY = 60
"""Seconds between two lines about the place in the line, where there is no terminal."""

_LATE = 1.0
"""Seconds after which it says that the server has not answered."""

_STOPPING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_FORWARDED = (*_STOPPING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


class _WrongUsage(click.UsageError):
    exit_code = os.EX_USAGE


class _RunCommand(click.Command):
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _WrongUsage(error.format_message(), error.ctx) from None


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = value if isinstance(value, float) else durations.parse(value)
        if seconds is None:
            self.fail(f"{value!r} is not a duration such as '10m', '30s' or a number of seconds.", param, ctx)
        return seconds


class _Number(click.IntRange):
    def _describe_range(self) -> str:
        return f"{self.min} to {self.max}"


@click.command(
    cls=_RunCommand,
    context_settings={"allow_interspersed_args": False},
    epilog="Example: tokenauth run --pool licences --wait 10m -- make test",
)
@click.option(
    "--url", metavar="URL", envvar="TOKENAUTH_URL", show_envvar=True, required=True, help="Address of the server."
)
@click.option("--pool", metavar="NAME", required=True, help="The pool to lease from.")
@click.option(
    "--wait",
    metavar="DURATION",
    type=_Duration(),
    default=0.0,
    help="How long to wait in line, such as 10m or 30s. Default: 0.",
)
@click.option("--count", metavar="N", type=_Number(1, 100), default=1, help="Lease N tokens, all or none. Default: 1.")
@click.option(
    "--label",
    "labels",
    metavar="LABEL",
    multiple=True,
    help="Only members with this label. Repeat it for members that have all of several.",
)
@click.option(
    "--priority",
    metavar="N",
    type=_Number(-100, 100),
    default=0,
    help="A higher one is served earlier. Above 0, you must be a manager of the pool. Default: 0.",
)
@click.option(
    "--ttl", metavar="DURATION", type=_Duration(), help="Length of the lease. Default and maximum: that of the pool."
)
@click.option("--holder", metavar="TEXT", help="What others see as the holder of the lease. Default: the user.")
@click.option(
    "--kill-after",
    metavar="DURATION",
    type=_Duration(),
    default=5.0,
    help="Time between SIGTERM and SIGKILL if the lease cannot be kept. Default: 5s, at most a third of the lease.",
)
@click.option(
    "--on-lost",
    type=click.Choice(["kill", "warn"]),
    default="kill",
    help="What to do if the lease cannot be kept: end the command before it is over (kill), or say so (warn).",
)
@click.argument("command", nargs=-1, required=True, metavar="[--] COMMAND [ARGUMENT]...")
def run(url: str, kill_after: float, on_lost: str, command: tuple[str, ...], **terms: Any) -> None:
    r"""Run COMMAND while a token of a pool is leased.

    It is a client of the server at --url and needs no configuration file. It logs in with a named token in
    $TOKENAUTH_TOKEN, or with $TOKENAUTH_USERNAME and $TOKENAUTH_PASSWORD. $TOKENAUTH_TOKEN_FILE and
    $TOKENAUTH_PASSWORD_FILE name files that contain them.

    The command gets $TOKENAUTH_LEASE_TOKEN, $TOKENAUTH_LEASE_FENCE, $TOKENAUTH_LEASE_POOL and
    $TOKENAUTH_LEASE_MEMBER.

    The exit status is that of the command, 128 + the number of the signal that ended it, or:

    \b
    64  wrong usage
    69  the server cannot be reached
    70  the process that guards COMMAND was killed
    75  no token was free in time
    76  the lease was lost
    77  no permission
    """
    login = _take_login()
    kill = on_lost == "kill"
    running = Command(command, Terminal(), kill=kill)
    client = _connect(url, login)
    _exit(*_Run(url, terms, kill_after, running, kill=kill).run(client))


def _take_login() -> dict[str, str]:
    """Return the variables of the login, and remove them from the environment, which the command will get."""
    login = {}
    for name in _LOGIN:
        value, file = os.environ.pop(name, ""), os.environ.pop(f"{name}_FILE", "")
        if value and file:
            raise _WrongUsage(f"Set {name} or {name}_FILE, not both.")
        if file:
            try:
                value = Path(file).read_text().partition("\n")[0].rstrip("\r")
            except (OSError, UnicodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise _WrongUsage(f"{name}_FILE: {file} cannot be read: {reason}.") from None
        login[name] = value
    if not login["TOKENAUTH_TOKEN"] and not (login["TOKENAUTH_USERNAME"] and login["TOKENAUTH_PASSWORD"]):
        raise _WrongUsage("Set TOKENAUTH_TOKEN, or TOKENAUTH_USERNAME and TOKENAUTH_PASSWORD, to log in.")
    return login


def _connect(url: str, login: dict[str, str]) -> "AsyncPoolClient":
    # httpx would load rich for a command of its own, which takes a fifth of a start. This process ends without rich.
    sys.modules["rich"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        from tokenauth.client import AsyncPoolClient, TokenAuth
    except ImportError:
        raise _WrongUsage(
            "httpx is missing: install the extra `client` of tokenauth-server; in a checkout, `make install`."
        ) from None
    token = login["TOKENAUTH_TOKEN"]
    if token and values.digest(token.encode(errors="replace")) is None:
        raise _WrongUsage("TOKENAUTH_TOKEN is not a token.")
    try:
        if token:
            return AsyncPoolClient(url, headers={"X-Token": token})
        auth = TokenAuth(url, login["TOKENAUTH_USERNAME"], login["TOKENAUTH_PASSWORD"])
        return AsyncPoolClient(url, auth=auth, log_out=True)
    except OSError as error:  # ssl.SSLError is one, for a file that has no certificate
        file = os.environ.get("SSL_CERT_FILE", "")
        raise _WrongUsage(f"SSL_CERT_FILE: {file} cannot be used: {error.strerror or error}.") from None
    except ValueError as error:
        raise _WrongUsage(str(error).replace("url:", "--url or TOKENAUTH_URL:")) from None


def _exit(status: int, problem: str) -> None:
    """Exit at once, also if a thread waits for the address of the server."""
    if problem:
        _complain(problem)
    os._exit(status)


def _complain(problem: str) -> None:
    with suppress(OSError):
        click.echo(printable(f"Error: {problem}"), err=True)


class _Progress:
    """Shows the place in the line: in one line on a terminal, else in a line for each change, at most every minute."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._shown = ""
        self._next_at = -math.inf

    def show(self, position: int, waiting: int) -> None:
        text = f"Waiting for {self._what}: place {position} of {waiting}."
        if self._terminal or (text != self._shown and boottime() >= self._next_at):
            self._next_at = boottime() + _SHOWN_EVERY
            self._show(text)
        self._shown = text

    def show_late(self, url: str) -> None:
        """Say that the server has not answered, if it has not."""
        if not self._shown:
            self._show(f"Waiting for the server at {printable(url)}, which has not answered yet.")

    def _show(self, text: str) -> None:
        self._shown = text
        self._write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")

    def clear(self) -> None:
        if self._terminal and self._shown:
            self._shown = ""
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            click.echo(text, err=True, nl=False)


class _Run:
    def __init__(self, url: str, terms: dict[str, Any], kill_after: float, command: Command, *, kill: bool) -> None:
        count, pool = terms["count"], terms["pool"]
        self._what = f"{'a token' if count == 1 else f'{count} tokens'} of the pool {printable(pool)}"
        self._progress = _Progress(self._what)
        self._url = url
        self._terms = terms
        self._kill_after = kill_after
        self._command = command
        self._kills = kill
        self._started = False
        self._lease_lost = False
        self._lease: AsyncLease | None = None
        self._signal: signal.Signals | None = None
        self._outcome: tuple[int, str] | None = None  # once the command has ended
        self._main_task: asyncio.Task[tuple[int, str]] | None = None

    def run(self, pools: "AsyncPoolClient") -> tuple[int, str]:
        """Return the exit status, and the problem if there is one."""
        try:
            return asyncio.Runner().run(self._main(pools))
        except errors.NoFreeToken:
            return os.EX_TEMPFAIL, f"Could not get {self._what} in time."
        except errors.IssuerUnavailable as error:
            problem = "cannot be reached, or does not answer as tokenauth does"
            if error.distrust:
                problem = f"has a certificate that is not trusted: {error.distrust}"
            return os.EX_UNAVAILABLE, f"The server at {self._url} {problem}."
        except errors.Refusal as error:
            kind = next(kind for kind in type(error).__mro__ if kind in _STATUSES)
            return _STATUSES[kind], str(error)
        finally:
            self._progress.clear()

    async def _main(self, pools: "AsyncPoolClient") -> tuple[int, str]:
        await self._command.connect()
        self._main_task = asyncio.current_task()
        for number in _FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                asyncio.get_running_loop().add_signal_handler(number, self._take_signal, number)
        late = asyncio.get_running_loop().call_later(_LATE, self._progress.show_late, self._url)
        try:
            async with pools, pools.lease(**self._terms, on_wait=self._progress.show) as lease:
                late.cancel()
                self._outcome = self._judge(await self._run_command(lease))
        except asyncio.CancelledError:
            if self._signal is None:
                raise
            return 128 + self._signal, ""
        return self._outcome

    def _judge(self, ended: Ended) -> tuple[int, str]:
        """Return the exit status for a command that has ended, and the problem if there is one."""
        if ended.problem:
            return ended.status, f"{self._command}: {ended.problem}."
        if ended.lease_over:
            return _LEASE_LOST, f"The lease could not be kept, so the command was ended.{self._describe_loss()}"
        if self._lease_lost:
            return ended.status or _LEASE_LOST, f"The lease was lost while the command ran.{self._describe_loss()}"
        return ended.status, ""

    async def _run_command(self, lease: "AsyncLease") -> Ended:
        self._progress.clear()
        environment = {
            "TOKENAUTH_LEASE_POOL": self._terms["pool"],
            "TOKENAUTH_LEASE_TOKEN": " ".join(grant.token for grant in lease.grants),
            "TOKENAUTH_LEASE_FENCE": " ".join(str(grant.fence) for grant in lease.grants),
            "TOKENAUTH_LEASE_MEMBER": " ".join(grant.name or "" for grant in lease.grants).strip(),
        }
        kill_after = min(self._kill_after, lease.ttl / 3)
        self._started, self._lease = True, lease
        lease.on_change = lambda: self._follow(lease)
        try:
            return await self._command.run(environment, lease.ttl, lease.ends_at, kill_after)
        finally:
            lease.on_change = None

    def _follow(self, lease: "AsyncLease") -> None:
        """Tell the guard when the lease ends, after a keep-alive or a refusal of it."""
        if not lease.lost.is_set():
            self._command.extend(lease.ends_at)
        elif not self._lease_lost:
            self._lease_lost = True
            self._command.end()
            if not self._kills:
                _complain(f"The lease is lost. The command goes on without it.{self._describe_loss()}")

    def _describe_loss(self) -> str:
        """Return what the server has said of the end of the lease, or since when it has not answered."""
        if self._lease is None:
            return ""
        if self._lease.lost_reason:
            return f" {self._lease.lost_reason}"
        if self._lease.failing_since is None:
            return ""
        since = time.gmtime(time.time() - (boottime() - self._lease.failing_since))
        problem = "could not be reached, or has not answered as tokenauth does"
        return f" The server at {self._url} {problem}, since {time.strftime('%Y-%m-%d %H:%M:%S', since)} UTC."

    def _take_signal(self, number: signal.Signals) -> None:
        """Pass a signal on to the command. Before it is started, stop waiting; the second signal exits at once.

        After it has ended, its lease is still to be released: only the second signal exits at once, as it has ended.
        """
        if self._started and self._outcome is None:
            self._command.signal(number)
        elif number in _STOPPING:
            if self._signal is not None:
                _exit(*(self._outcome or (128 + number, "")))
            self._signal = number
            if self._outcome is None and self._main_task is not None:
                self._main_task.cancel()
