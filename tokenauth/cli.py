"""The operator's words: serve, check, migrate, users, tokens."""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tokenauth import __version__, logs
from tokenauth.errors import ConfigError, Refusal, StartError

if TYPE_CHECKING:
    from tokenauth.app import Service

T = TypeVar("T")


class Lines(click.Group):
    """A group of commands whose failures are one line each, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with 1 for what the operator can mend."""
        try:
            return super().invoke(ctx)
        except (ConfigError, StartError, Refusal) as error:
            raise click.ClickException(str(error)) from None
        except UnicodeError:
            raise click.ClickException("what was typed or piped in is not UTF-8") from None


config_option = click.option(
    "--config", "config_file", metavar="FILE", help="The configuration. Else $TOKENAUTH_CONFIG, else ./config.toml."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
password_option = click.option(
    "--password-stdin", is_flag=True, help="Read the password from the first line of standard input."
)


@click.group(cls=Lines, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tokenauth")
def main() -> None:
    """Issue bearer tokens, say whether they are valid, and end them at once."""
    logs.configure(quiet=True)


@main.command(epilog="Example: tokenauth serve --config /etc/tokenauth/config.toml --workers 2")
@config_option
@click.option("--host", metavar="H", help="Listen here instead of server.host.")
@click.option("--port", metavar="P", type=int, help="Listen there instead of server.port; 0 takes a free one.")
@click.option("--workers", metavar="N", type=int, help="Run so many processes instead of server.workers.")
def serve(config_file: str | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Serve until SIGTERM. SIGHUP takes up a changed configuration without refusing a request."""
    from tokenauth import configfile, server

    logs.configure()
    sys.exit(server.serve(configfile.find(config_file), host, port, workers))


@main.command(epilog="Example: tokenauth check && systemctl reload tokenauth")
@config_option
@json_option
def check(config_file: str | None, as_json: bool) -> None:
    """Say what is wrong or risky about the configuration; exit with 1 if it cannot be served."""
    from tokenauth import configfile
    from tokenauth.passwords import Passwords
    from tokenauth.risks import find_risks, unacceptable
    from tokenauth.stores.open import open_store

    path = configfile.find(config_file)
    settings = configfile.load(path)
    open_store(settings.database.url, settings.tokens.cache_size)
    passwords = Passwords(settings.passwords)
    passwords.check(settings.directory.values())
    risks = find_risks(settings, passwords)
    error = unacceptable(settings, risks)
    if as_json:
        _print_json({"ok": error is None, "error": error, "risks": [risk._asdict() for risk in risks]})
    else:
        for risk in risks:
            click.echo(f"risk: {risk.name}: {risk.text}")
        if error is None:
            click.echo(f"{path}: ok, {len(settings.directory)} users, {len(risks)} risks")
    if error is not None:
        raise ConfigError(f"{path}: {error}")


@main.command(epilog="Example: tokenauth migrate --config /etc/tokenauth/config.toml")
@config_option
def migrate(config_file: str | None) -> None:
    """Bring the database's schema up to date, as `serve` does too. Safe while servers run."""
    from tokenauth.stores.schema import HEAD

    async def nothing(_: Any) -> None:
        return None

    _with_service(config_file, nothing)
    click.echo(f"schema: {HEAD}")


@main.command("hash-password", epilog="Example: echo 'a long password' | tokenauth hash-password --password-stdin")
@config_option
@password_option
def hash_password(config_file: str | None, password_stdin: bool) -> None:
    """Print the hash of a password for config.toml, at the configured cost."""
    click.echo(_hash(config_file, password_stdin))


@main.group(cls=Lines)
def user() -> None:
    """Edit the users in config.toml; its comments stay. A running server takes it up at SIGHUP."""


@user.command("add", epilog="Example: tokenauth user add ann --scope reports --scope admin")
@config_option
@password_option
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, metavar="SCOPE", help="A scope of the user; may be repeated.")
def user_add(config_file: str | None, password_stdin: bool, name: str, scopes: tuple[str, ...]) -> None:
    """Let NAME log in."""
    from tokenauth.users import UserFile

    file = UserFile(_path(config_file))
    file.add(name, lambda: _hash(config_file, password_stdin), scopes)
    click.echo(f"added {name!r} to {file.path}; a running server takes it up at SIGHUP")


@user.command("passwd", epilog="Example: tokenauth user passwd admin")
@config_option
@password_option
@click.argument("name")
def user_passwd(config_file: str | None, password_stdin: bool, name: str) -> None:
    """Give NAME a new password. The tokens issued for the old one end with it."""
    from tokenauth.users import UserFile

    file = UserFile(_path(config_file))
    file.change_password(name, lambda: _hash(config_file, password_stdin))
    click.echo(f"changed the password of {name!r} in {file.path}; a running server takes it up at SIGHUP")


@user.command("remove", epilog="Example: tokenauth user remove ann")
@config_option
@click.argument("name")
def user_remove(config_file: str | None, name: str) -> None:
    """Take NAME out. The user's tokens end with it."""
    from tokenauth.users import UserFile

    file = UserFile(_path(config_file))
    file.remove(name)
    click.echo(f"removed {name!r} from {file.path}; a running server takes it up at SIGHUP")


@user.command("list", epilog="Example: tokenauth user list --json")
@config_option
@json_option
def user_list(config_file: str | None, as_json: bool) -> None:
    """List who may log in."""
    from tokenauth import configfile

    users = configfile.load(configfile.find(config_file)).directory.values()
    rows = [{"username": one.username, "scopes": list(one.scopes)} for one in users]
    _show(rows, as_json)


@main.group(cls=Lines)
def tokens() -> None:
    """See and end the tokens in the database. Running servers refuse an ended token at once."""


@tokens.command("list", epilog="Example: tokenauth tokens list --user ann --json")
@config_option
@json_option
@click.option("--user", "username", metavar="NAME", help="Only this user's.")
def tokens_list(config_file: str | None, as_json: bool, username: str | None) -> None:
    """List live tokens, newest first, at most 1,000. Their values are not known to anybody."""
    from tokenauth.config import canonical

    name = None if username is None else canonical(_text(username))
    found = _with_service(config_file, lambda service: service.tokens.live(name))
    rows: list[dict[str, Any]] = [
        {
            "id": token.id,
            "username": token.username,
            "issued_at": int(token.issued_at),
            "expiry_time": token.expires_at,
            "address": token.address,
            "user_agent": token.user_agent,
        }
        for token in found
    ]
    _show(rows, as_json, instants=("issued_at", "expiry_time"))


@tokens.command("revoke", epilog="Examples: tokenauth tokens revoke --user ann; tokenauth tokens revoke --all")
@config_option
@click.option("--user", "username", metavar="NAME", help="All of this user's.")
@click.option("--id", "id_", metavar="ID", help="The one with this id.")
@click.option("--all", "everybody", is_flag=True, help="Everybody's.")
def tokens_revoke(config_file: str | None, username: str | None, id_: str | None, everybody: bool) -> None:
    """End tokens, of a user, by id, or all."""
    from tokenauth.config import canonical

    if sum([username is not None, id_ is not None, everybody]) != 1:
        raise click.UsageError("Say exactly one of --user NAME, --id ID and --all.")
    if id_ is not None:
        wanted = id_
        _with_service(config_file, lambda service: service.tokens.revoke_id(wanted, None))
        click.echo("revoked 1 token")
        return
    name = None if username is None else canonical(_text(username))
    count = _with_service(config_file, lambda service: service.tokens.revoke_all(name))
    click.echo(f"revoked {count} tokens")


def _with_service(config_file: str | None, use: Callable[["Service"], Coroutine[Any, Any, T]]) -> T:
    """Open the store that the configuration names, use it, and close it."""
    from tokenauth import configfile
    from tokenauth.app import create_service

    async def run() -> T:
        service = create_service(configfile.load(configfile.find(config_file)))
        async with service.running():
            return await use(service)

    return asyncio.run(run())


def _path(config_file: str | None) -> Path:
    from tokenauth import configfile

    return configfile.find(config_file)


def _hash(config_file: str | None, password_stdin: bool) -> str:
    """Ask for a password and hash it; without a configuration, at the cost that is the default."""
    from tokenauth import configfile
    from tokenauth.config import Config
    from tokenauth.passwords import MAX_LENGTH, MIN_LENGTH, Passwords

    path = configfile.find(config_file)
    terms = configfile.load(path).passwords if config_file or path.exists() else Config().passwords
    if password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    password.encode()  # a lone surrogate stands for a byte that is not UTF-8
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise click.ClickException(f"a password has {MIN_LENGTH} to {MAX_LENGTH} characters")
    return Passwords(terms).hash(password)


def _show(rows: Sequence[dict[str, Any]], as_json: bool, instants: tuple[str, ...] = ()) -> None:
    """Print rows: as JSON, or as a table in which instants are dates."""
    if as_json:
        _print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for key in rows[0] if rows else ("nothing",):
        table.add_column(key, no_wrap=key == "id", overflow="fold")
    for row in rows:
        shown = {key: f"{datetime.fromtimestamp(row[key], UTC):%Y-%m-%d %H:%M:%S}Z" for key in instants}
        cells = {**row, **shown}.values()
        table.add_row(*(" ".join(cell) if isinstance(cell, list) else str(cell) for cell in cells))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1000  # who pipes wants whole lines
    console.print(table)


def _text(argument: str) -> str:
    """Return an argument. Raises UnicodeEncodeError if it was not UTF-8."""
    argument.encode()
    return argument


def _print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2))
