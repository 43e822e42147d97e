"""What the commands share: options, one-line errors, the service, and printing."""

import asyncio
import errno
import io
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tokenauth.errors import ConfigError, Refusal, StartError
from tokenauth.logs import json_text, printable

if TYPE_CHECKING:
    from tokenauth.service import Service
    from tokenauth.settings.model import PasswordSettings

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
                click.echo(f"Error: {printable(str(error))}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Exit with 1 for errors that the operator can fix."""
        try:
            return super().invoke(ctx)
        except (ConfigError, StartError, Refusal) as error:
            raise click.ClickException(printable(str(error))) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader closed the pipe: click exits quietly
                raise
            raise click.ClickException(printable(str(error))) from None
        except UnicodeError:
            raise click.ClickException("The input is not UTF-8.") from None


config_option = click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    help="Configuration file. Default: $TOKENAUTH_CONFIG, ./tokenauth.toml or ./config.toml.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
password_option = click.option(
    "--password-stdin", is_flag=True, help="Read the password from the first line of standard input."
)


def with_service(
    config_file: str | None, use: Callable[["Service"], Coroutine[Any, Any, T]], create: bool = False
) -> T:
    """Run `use` with the configured service. Without `create`, the database must exist."""
    from tokenauth.service import create_service
    from tokenauth.settings import loader

    async def run() -> T:
        path = loader.find(config_file)
        settings = loader.load(path)
        with loader.naming(path):
            service = create_service(settings, serving=create)
        async with service.running():
            return await use(service)

    return asyncio.run(run())


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


def config_path(config_file: str | None) -> Path:
    """Return the path of the configuration file."""
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


def show(rows: Sequence[dict[str, Any]], as_json: bool, what: str, instants: tuple[str, ...] = ()) -> None:
    """Print rows as JSON, or as a table that shows the columns `instants` as dates. `what` is the plural noun."""
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(f"No {what}.")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, no_wrap=key == "id" or key in instants, overflow="fold")
    for row in rows:
        shown = {key: _date(row[key]) for key in instants}
        table.add_row(*map(_cell, {**row, **shown}.values()))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 1000  # do not wrap lines for programs
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def count(number: int, noun: str) -> str:
    """Return "1 token", "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def utf8(argument: str) -> str:
    """Return an argument. Raises UnicodeEncodeError if it is not UTF-8."""
    argument.encode()
    return argument


def print_json(document: object) -> None:
    click.echo(json_text(document, indent=2))


def _date(instant: int | None) -> str | None:
    return None if instant is None else f"{datetime.fromtimestamp(instant, UTC):%Y-%m-%d %H:%M:%S}Z"


def _cell(content: object) -> str:
    if content is None:
        return ""
    return printable(" ".join(content) if isinstance(content, list) else str(content))
