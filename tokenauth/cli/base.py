"""What the commands share: options, one-line errors, the service, and printing."""

import asyncio
import errno
import io
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tokenauth import logs
from tokenauth.background import outlast
from tokenauth.errors import ConfigError, CopyError, Refusal, StartError
from tokenauth.logs import json_text, printable

if TYPE_CHECKING:
    from tokenauth.service import Service
    from tokenauth.settings.model import PasswordSettings, Settings

T = TypeVar("T")


class CommandGroup(click.Group):
    """A group of commands that report an error in one line, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line. Output that the encoding of the terminal does not have is escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # of the output of --help and --version
            with suppress(OSError):
                click.echo(f"Error: {_word(error)}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Exit with 1 for errors that the operator can fix, and with 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except (ConfigError, StartError, CopyError, Refusal) as error:
            raise click.ClickException(printable(str(error))) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader closed the pipe: click exits quietly
                raise
            raise click.ClickException(_word(error)) from None
        except UnicodeError:
            raise click.ClickException("The input is not UTF-8.") from None


def _word(error: OSError) -> str:
    """Return which file an error of the system is about, and what it is, without its number."""
    file = "" if error.filename is None else f"{error.filename}: "
    return printable(f"{file}{error.strerror}" if error.strerror else str(error))


config_option = click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    help="Configuration file. Default: $TOKENAUTH_CONFIG, ./tokenauth.toml or ./config.toml.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
password_option = click.option(
    "--password-stdin", is_flag=True, help="Read the password from the first line of standard input."
)


def with_service(
    config_file: str | None,
    use: Callable[["Service"], Coroutine[Any, Any, T]],
    create: bool = False,
    changes: bool = False,
) -> T:
    """Run `use` with the configured service. Without `create`, the database must exist.

    changes: it makes one change, which the caller records. So the first Ctrl-C does not interrupt it; the second does.
    """
    from tokenauth.service import create_service
    from tokenauth.settings import loader

    async def run() -> T:
        path = loader.find(config_file)
        settings = loader.load(path)
        with loader.naming(path):
            service = create_service(settings, serving=create)
        async with service.running():
            if not changes:
                return await use(service)
            change, _ = await outlast(use(service))
            return change.result()

    return asyncio.run(run())


def record_change(event: str, config_file: str | None, **fields: object) -> None:
    """Log a change that the operator has made, in the system's log and in the audit log."""
    append_to_audit_log(config_file, logs.log_command(event, **fields))


def append_to_audit_log(config_file: str | None, event: Mapping[str, object]) -> None:
    """Write an event into the audit log, if there is one. If that fails, say so: what was done stays."""
    from tokenauth.audit.log import append_now, find_problem

    try:
        settings = load_settings(config_file).audit
        append_now(settings, event)
    except ConfigError as error:
        reason = str(error)
    except OSError as error:
        reason = ": ".join(filter(None, (error.strerror, find_problem(settings))))
    else:
        return
    click.echo(printable(f"Warning: this is missing in the audit log, which cannot be written: {reason}"), err=True)


def program() -> str:
    """Return how a person in this directory runs this program."""
    name = sys.argv[0]
    if name.endswith("__main__.py"):
        return "python -m tokenauth"
    found = shutil.which("tokenauth")
    return "tokenauth" if found is not None and os.path.abspath(name) == found else shlex.quote(name)


def options(config_file: str | None) -> str:
    """Return the options, after a blank, that another command needs to use the same configuration."""
    return "" if config_file is None else f" -c {shlex.quote(config_file)}"


def load_settings(config_file: str | None) -> "Settings":
    """Return the settings of the configuration. Raises ConfigError."""
    from tokenauth.settings import loader

    return loader.load(loader.find(config_file))


def config_path(config_file: str | None) -> Path:
    from tokenauth.settings import loader

    return loader.find(config_file)


def new_hash(config_file: str | None, password_stdin: bool) -> str:
    """Ask for a password and hash it, at the default cost if there is no configuration file."""
    from tokenauth.settings import loader
    from tokenauth.settings.model import Settings

    path = loader.find(config_file)
    settings = loader.load(path).passwords if config_file or path.exists() else Settings().passwords
    return hash_new(settings, read_new_password(password_stdin))


def read_new_password(password_stdin: bool) -> str:
    """Read a password from standard input, or ask for it."""
    password = _read_password() if password_stdin else _ask_password()
    reason = _password_problem(password)
    if reason is not None:
        raise click.ClickException(reason)
    return password


def hash_new(settings: "PasswordSettings", password: str) -> str:
    from tokenauth.passwords import CannotHash, Passwords

    try:
        return Passwords(settings).hash(password)
    except CannotHash as error:
        raise click.ClickException(f"The hash cannot be computed on this machine now: {error}") from None


def _read_password() -> str:
    line = sys.stdin.readline()
    if not line:
        raise click.ClickException("The standard input is empty: pass the password in its first line.")
    return line.rstrip("\r\n")


def _ask_password() -> str:
    """Ask until a password fits and was typed twice."""
    from tokenauth.passwords import MAX_LENGTH, MIN_LENGTH

    require_terminal("Pass it with --password-stdin.")
    while True:
        prompt = f"Password ({MIN_LENGTH} to {MAX_LENGTH:,} characters)"
        password: str = click.prompt(prompt, hide_input=True, err=True)
        reason = _password_problem(password)
        if reason is None:
            if click.prompt("The same again", hide_input=True, err=True) == password:
                return password
            reason = "The two passwords differ."
        click.echo(f"Error: {reason}", err=True)


def require_terminal(otherwise: str) -> None:
    """Fail if there is no terminal on which to ask for a password. `otherwise` says what to do."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        if sys.stdin is None or not sys.stdin.isatty():
            raise click.ClickException(f"There is no terminal to ask for the password. {otherwise}") from None


def _password_problem(password: str) -> str | None:
    """Return why this cannot be a new password, or None. Raises UnicodeEncodeError for bytes that are not UTF-8."""
    from tokenauth.passwords import MAX_LENGTH, MIN_LENGTH, password_problem

    password.encode()
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        return f"The password must have {MIN_LENGTH} to {MAX_LENGTH:,} characters."
    return password_problem(password)


def confirm(question: str, yes: bool) -> None:
    """Ask a person on a terminal whether to go on. A script has decided that."""
    if not yes and sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        click.confirm(question, abort=True, err=True)


def progress(text: str, noun: str) -> Callable[[int], None] | None:
    """Return a function that tells a person how many there are so far, once a second; None without a terminal."""
    told_at = time.monotonic()

    def tell(number: int) -> None:
        nonlocal told_at
        if time.monotonic() > told_at + 1:
            told_at = time.monotonic()
            click.echo(text.format(count(number, noun)), err=True)

    return tell if sys.stderr.isatty() else None


_HEADINGS = {
    "issued_at": "issued",
    "expiry_time": "expires",
    "last_used_at": "last use",
    "leased_at": "leased",
    "since": "waits since",
    "until": "wait ends",
    "lease_expiry_time": "lease ends",
    "reserved_until": "reserved until",
    "reserved_for": "reserved for",
    "reserved_by": "reserved by",
    "username": "user",
    "user_agent": "agent",
}
"""What tables call the fields of the JSON, if not by their names."""


def show_table(rows: Sequence[dict[str, Any]], what: str, instants: tuple[str, ...] = ()) -> None:
    """Print rows as a table without empty columns. `what` is the plural noun.

    The columns `instants` are shown relative to now, unless they are texts. On a terminal that is too narrow for the
    table, each row is a block of lines.
    """
    if not rows:
        click.echo(f"No {what}.")
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    now = time.time()
    shown = [
        {
            key: relative(it, now) if key in instants and not isinstance(it, str) else _cell(it)
            for key, it in row.items()
        }
        for row in rows
    ]
    keys = [key for key in rows[0] if any(row[key] for row in shown)]
    headings = {key: _HEADINGS.get(key, key) for key in keys}
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        widths = [max(cell_len(text) for text in (headings[key], *(row[key] for row in shown))) for key in keys]
        if sum(widths) + 2 * (len(widths) - 1) > console.width:
            click.echo("\n".join(_block(row, headings, console.width) for row in shown))
            return
    else:
        console.width = 1000  # do not wrap lines for programs
    table = Table(box=None, pad_edge=False)
    for key in keys:
        table.add_column(headings[key], overflow="fold")
    for row in shown:
        table.add_row(*(row[key] for key in keys))
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _block(row: Mapping[str, str], headings: Mapping[str, str], width: int) -> str:
    """Return a row as lines: its first cell, and below it the others with their headings."""
    first, *others = [key for key in headings if row[key]]
    text = ", ".join(f"{headings[key]} {row[key]}" for key in others)
    return "\n".join([row[first], *textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")])


def count(number: int, noun: str) -> str:
    """Return "1 token", "2,000 tokens"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def utf8(argument: str) -> str:
    """Return an argument. Raises UnicodeEncodeError if it is not UTF-8."""
    argument.encode()
    return argument


LIMIT = 1000
"""Rows that a command lists at most."""


def note_limit(rows: Sequence[object], advice: str) -> None:
    """Say on standard error that a list may go on, so that nobody takes it for the whole."""
    if len(rows) >= LIMIT:
        click.echo(f"There may be more than these {LIMIT:,}: {advice}.", err=True)


def print_json(document: Mapping[str, object]) -> None:
    """Print an object. docs/command-line-json.md describes each: a list is in it, under the name of the API."""
    click.echo(json_text(document, indent=2))


def relative(instant: float | None, now: float) -> str:
    """Return "2h ago", "in 90d", or "" for None. It is rounded as `fromNow` of the console rounds it."""
    if instant is None:
        return ""
    seconds = abs(instant - now)
    rounded = ((int(seconds / size + 0.5), unit, limit) for unit, size, limit in _UNITS)
    number, unit = next((number, unit) for number, unit, limit in rounded if number < limit)
    return f"in {number}{unit}" if instant > now else f"{number}{unit} ago"


_UNITS = (("s", 1, 60), ("m", 60, 60), ("h", 3600, 24), ("d", 86400, math.inf))


def _cell(content: object) -> str:
    if content is None:
        return ""
    return printable(" ".join(content) if isinstance(content, list) else str(content))
