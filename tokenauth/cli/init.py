"""`tokenauth init`: write a configuration of one's own."""

import os
import secrets
from pathlib import Path

import click

from tokenauth.cli.base import (
    hash_new,
    options,
    password_option,
    program,
    read_new_password,
    record_change,
    require_terminal,
    utf8,
)
from tokenauth.errors import ConfigError
from tokenauth.logs import printable


@click.command(epilog="Examples: tokenauth init; tokenauth init --yes -c /etc/tokenauth/config.toml")
@click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    help="File to write. Default: $TOKENAUTH_CONFIG or ./tokenauth.toml.",
)
@click.option("--username", metavar="NAME", help="The first user. Default: admin.")
@password_option
@click.option(
    "--set",
    "sets",
    metavar="TABLE.KEY=VALUE",
    multiple=True,
    help="A setting, such as server.port=8001. May be repeated.",
)
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: without --password-stdin, make a password and print it.")
def init(config_file: str | None, username: str | None, password_stdin: bool, sets: tuple[str, ...], yes: bool) -> None:
    """Write a small configuration with one user.

    The user has the scope admin. It never overwrites a file. Without --config, all commands find it in the
    working directory.
    """
    from tokenauth.settings import loader
    from tokenauth.settings.model import Settings
    from tokenauth.settings.starter import starter

    path = Path(config_file or os.environ.get("TOKENAUTH_CONFIG") or loader.OWN)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists, and init overwrites nothing; edit it, or name another file with --config")
    if not path.parent.is_dir():
        problem = f"{path.parent} is not a directory;" if path.parent.exists() else "create its directory, or"
        raise ConfigError(f"{path}: cannot be created: {problem} name another file with --config")
    if not yes and not password_stdin:
        require_terminal("Pass --yes, and the password with --password-stdin or none to have one made.")
        username = username or click.prompt("User name", default="admin", err=True)
    made = secrets.token_urlsafe(15) if yes and not password_stdin else None
    password = made or read_new_password(password_stdin)
    name = utf8(username or "admin")
    text = starter(
        {"username": name, "password": hash_new(Settings().passwords, password), "scopes": ["admin"]}, [*sets]
    )
    _write(path, text)
    record_change("configuration_written", str(path), file=str(path), user=name)
    if made is not None:
        click.echo(f"Password of {printable(name)}: {made}")
        click.echo("It is stored as a hash only, and cannot be shown again.", err=True)
    click.echo(f"Wrote {printable(str(path))}.", err=True)
    if path == loader.OWN and loader.SHIPPED.exists():
        click.echo(f"Commands in this directory now use it instead of {loader.SHIPPED}.", err=True)
    click.echo(f"Next: {program()} serve{options(config_file)} (restart it if it runs)", err=True)


def _write(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: exists, and init overwrites nothing") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be created: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
