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
    require_terminal,
    utf8,
)
from tokenauth.errors import ConfigError
from tokenauth.logs import audit, printable

_TEMPLATE = """\
# The configuration of tokenauth. docs/configuration.md explains all settings; what is not here has a default.
# `tokenauth check` looks for mistakes and risks. After a change: `tokenauth reload`.

[server]
host = "127.0.0.1"      # only this machine can reach it; "0.0.0.0": everyone
port = 8000
cors_origins = []       # origins whose web pages may call, such as "https://app.example.com"
trusted_proxies = []    # reverse proxies in front of it, such as "127.0.0.1"

[database]
url = "sqlite+aiosqlite:///tokenauth.db"   # three slashes: relative to the working directory; four: absolute

[tokens]
ttl = "24h"             # lifetime of a login

# A login page for people, for all hosts of a domain: docs/browser-login.md
# [browser]
# url = "https://auth.example.com"
# domain = "example.com"
# return_to = ["https://*.example.com"]

# Tokens to lease, to limit how many clients use something at once: docs/pools.md
# [pools.licences]
# capacity = 3
# prefill = true
# lease_ttl = "60s"

# Users: `tokenauth user add NAME`, `tokenauth user passwd NAME`.
"""


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
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: without --password-stdin, make a password and print it.")
def init(config_file: str | None, username: str | None, password_stdin: bool, yes: bool) -> None:
    """Write a small configuration with one user.

    The user has the scope admin. It never overwrites a file. Without --config, all commands find it in the
    working directory.
    """
    from tokenauth.settings import loader
    from tokenauth.settings.model import Settings

    path = Path(config_file or os.environ.get("TOKENAUTH_CONFIG") or loader.OWN)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists, and init overwrites nothing; edit it, or name another file with --config")
    if not yes and not password_stdin:
        require_terminal("Pass --yes, and the password with --password-stdin or none to have one made.")
        username = username or click.prompt("User name", default="admin", err=True)
    made = secrets.token_urlsafe(15) if yes and not password_stdin else None
    password = made or read_new_password(password_stdin)
    name = utf8(username or "admin")
    text = _text(name, hash_new(Settings().passwords, password))
    _write(path, text)
    audit("configuration_written", file=str(path), user=name)
    if made is not None:
        click.echo(f"Password of {printable(name)}: {made}")
        click.echo("It is stored as a hash only, and cannot be shown again.", err=True)
    click.echo(f"Wrote {printable(str(path))}.", err=True)
    if path == loader.OWN and loader.SHIPPED.exists():
        click.echo(f"Commands in this directory now use it instead of {loader.SHIPPED}.", err=True)
    click.echo(f"Next: {program()} serve{options(config_file)} (restart it if it runs)", err=True)


def _text(name: str, password_hash: str) -> str:
    """Return a valid configuration with this user. Raises ConfigError if the name cannot be used."""
    from tokenauth.settings import loader
    from tokenauth.settings.user_file import with_user

    text = with_user(_TEMPLATE, {"username": name, "password": password_hash, "scopes": ["admin"]})
    loader.parse(text)
    return text


def _write(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: exists, and init overwrites nothing") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
