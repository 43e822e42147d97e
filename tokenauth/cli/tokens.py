"""The commands for tokens."""

from typing import TYPE_CHECKING, Any

import click

from tokenauth.cli.base import CommandGroup, config_option, config_path, count, json_option, show, utf8, with_service
from tokenauth.errors import UnknownToken
from tokenauth.logs import audit, printable

if TYPE_CHECKING:
    from tokenauth.service import Service


@click.group(cls=CommandGroup)
def tokens() -> None:
    """List and revoke login tokens.

    Running servers refuse a revoked token at once.
    """


@tokens.command("list", epilog="Example: tokenauth tokens list --user ann --json")
@config_option
@json_option
@click.option("--user", "username", metavar="NAME", help="Only tokens of this user.")
def tokens_list(config_file: str | None, as_json: bool, username: str | None) -> None:
    """List live tokens, newest first, at most 1,000.

    Their values are not stored and cannot be shown. A running server accepts tokens with the status user_removed or
    password_changed until it is reloaded.
    """
    from tokenauth.settings.model import canonical

    name = None if username is None else canonical(utf8(username))
    found = with_service(config_file, lambda service: service.tokens.list_unexpired(name))
    rows: list[dict[str, Any]] = [
        {
            "id": token.id,
            "username": token.username,
            "issued_at": int(token.issued_at),
            "expiry_time": token.expires_at,
            "address": token.address,
            "user_agent": token.user_agent,
            "status": status,
        }
        for token, status in found
    ]
    show(rows, as_json, "tokens", instants=("issued_at", "expiry_time"))


@tokens.command("revoke", epilog="Examples: tokenauth tokens revoke --user ann; tokenauth tokens revoke --all")
@config_option
@click.option("--user", "username", metavar="NAME", help="All tokens of this user.")
@click.option("--id", "id_", metavar="ID", help="The token with this id.")
@click.option("--all", "everyone", is_flag=True, help="All tokens of all users.")
def tokens_revoke(config_file: str | None, username: str | None, id_: str | None, everyone: bool) -> None:
    """Revoke tokens: of one user, by id, or all.

    Exit with 1 if the user or the token does not exist. A user without tokens is no error.
    """
    from tokenauth.settings.model import canonical

    if sum([username is not None, id_ is not None, everyone]) != 1:
        raise click.UsageError("Pass exactly one of --user NAME, --id ID and --all.")
    if id_ is not None:
        wanted = id_
        try:
            with_service(config_file, lambda service: service.tokens.revoke_id(wanted, None))
        except UnknownToken as error:
            raise click.ClickException(f"{error} `tokenauth tokens list` shows the ids.") from None
        audit("token_revoked", id=wanted)
        click.echo("Revoked 1 token.")
        return
    name = None if username is None else canonical(utf8(username))

    async def revoke(service: "Service") -> tuple[int, bool]:
        return await service.tokens.revoke_all(name), name is None or name in service.users

    number, known = with_service(config_file, revoke)
    if not known and not number:
        problem = f"No user {name!r} in {config_path(config_file)}, and no tokens of a user with that name."
        raise click.ClickException(printable(f"{problem} `tokenauth user list` shows the names."))
    audit("tokens_revoked", user="(all)" if name is None else name, count=number)
    click.echo(f"Revoked {count(number, 'token')}.")
