"""The commands for tokens."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from tokenauth.cli.base import (
    CommandGroup,
    config_option,
    config_path,
    confirm,
    count,
    json_option,
    note_limit,
    print_json,
    progress,
    record_change,
    show_table,
    utf8,
    with_service,
    yes_option,
)
from tokenauth.cli.pools import check_reason, record_release
from tokenauth.errors import InsufficientScope, UnknownToken
from tokenauth.logs import printable

if TYPE_CHECKING:
    from tokenauth.models import IssuedToken, Token, TokenKind
    from tokenauth.named_tokens import Requester
    from tokenauth.service import Service
    from tokenauth.tokens import Tokens

_FOUND = 3
"""Exit status of a scan that found live tokens."""

_PART = 1 << 20
"""Bytes of a file that are searched at once."""

_OVERLAP = 8 * 1024
"""Bytes that are searched again with the next part: more than the longest encoding of a token takes."""


@click.group(cls=CommandGroup)
def tokens() -> None:
    """List, issue, rotate and revoke tokens, and find leaks.

    Running servers refuse a revoked token at once.
    """


@tokens.command("list", epilog="Example: tokenauth tokens list --user ann --json")
@config_option
@json_option
@click.option("--user", "username", metavar="NAME", help="Only tokens of this user.")
@click.option("--kind", type=click.Choice(["login", "named"]), help="Only tokens of this kind.")
def tokens_list(config_file: str | None, as_json: bool, username: str | None, kind: "TokenKind | None") -> None:
    """List live tokens, newest first, at most 1,000.

    Their values are not stored and cannot be shown. The last use is noted at most once an hour, and not in the first
    hour. A token without scopes has all that its user has. A running server accepts tokens with the status user_removed
    or password_changed until it is reloaded.
    """
    from tokenauth.settings.model import canonical

    name = None if username is None else canonical(utf8(username))
    found = with_service(config_file, lambda service: service.tokens.list_unexpired(name, kind))
    _show([_row(token, status) for token, status in found], as_json, "tokens")
    note_limit(found, "narrow the list with --user or --kind")


@tokens.command("issue", epilog="Example: tokenauth tokens issue --user ci --name nightly --scope reports --ttl 90d")
@config_option
@click.option("--user", "username", metavar="NAME", required=True, help="Whose token it is.")
@click.option("--name", metavar="TEXT", required=True, help="The name of the token.")
@click.option("--scope", "scopes", multiple=True, metavar="SCOPE", help="Limit it to this scope. Repeat for several.")
@click.option("--ttl", metavar="DURATION", help="Such as 90d or 12h. Default: tokens.named_ttl.")
def tokens_issue(config_file: str | None, username: str, name: str, scopes: tuple[str, ...], ttl: str | None) -> None:
    """Issue a named token and print it.

    Only the token goes to standard output, so that it can be piped to where it is needed. It cannot be shown again.
    Without --scope, it always has all scopes of its user.
    """
    from tokenauth.settings.model import canonical

    owner = canonical(utf8(username))

    async def issue(service: "Service") -> "IssuedToken":
        if owner not in service.users:
            problem = f"No user {owner!r} in {config_path(config_file)}."
            raise click.ClickException(printable(f"{problem} `tokenauth user list` shows the names."))
        try:
            return await service.named_tokens.issue(owner, utf8(name), scopes or None, ttl, _requester())
        except InsufficientScope:
            has = service.users[owner].scopes
            lacking = " ".join(dict.fromkeys(scope for scope in scopes if scope not in has))
            noun, theirs = "scopes" if " " in lacking else "scope", " ".join(has) or "none"
            problem = f"The user {owner!r} does not have the {noun} {lacking!r}. Theirs are: {theirs}."
            raise click.ClickException(printable(problem)) from None

    issued = with_service(config_file, issue, changes=True)
    new = issued.token
    granted = {"name": name, "scopes": new.scopes, "expires_at": new.expires_at}
    record_change("named_token_issued", config_file, user=owner, id=new.id, **granted)
    _print_issued(issued)


@tokens.command("rotate", epilog="Example: tokenauth tokens rotate 8b1f6de0c4a25973f8e0d2b6 --overlap 1h")
@config_option
@click.argument("id_", metavar="ID")
@click.option("--overlap", metavar="DURATION", default="0", help="How long the old token stays valid. Default: 0.")
def tokens_rotate(config_file: str | None, id_: str, overlap: str) -> None:
    """Print a successor of the named token ID.

    It has the same name, scopes and lifetime. Only the token goes to standard output. The old token ends after the
    overlap.
    """
    try:
        issued = with_service(
            config_file, lambda service: service.named_tokens.rotate(id_, None, overlap, _requester()), changes=True
        )
    except UnknownToken as error:
        raise click.ClickException(f"{error} `tokenauth tokens list` shows the ids.") from None
    new = issued.token
    granted = {"name": new.name, "scopes": new.scopes, "expires_at": new.expires_at}
    record_change("named_token_rotated", config_file, user=new.username, id=id_, new_id=new.id, **granted)
    _print_issued(issued)


@tokens.command("scan", epilog="Examples: git log -p | tokenauth tokens scan; tokenauth tokens scan --revoke app.log")
@config_option
@json_option
@click.option("--revoke", is_flag=True, help="Revoke what is found.")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.pass_context
def tokens_scan(
    context: click.Context, config_file: str | None, as_json: bool, revoke: bool, files: tuple[str, ...]
) -> None:
    """Find live tokens in files, or in standard input.

    It lists them as `tokens list` does, without their values. Exit with 3 if it finds any, also with --revoke. Exit
    with 1 if it finds none and a file cannot be read.
    """
    unreadable: list[str] = []

    async def end(service: "Service", token: "Token") -> None:
        with suppress(UnknownToken):  # someone else was faster
            await service.tokens.revoke_id(token.id, None)
            record_change("token_revoked", config_file, user=token.username, id=token.id)

    async def scan(service: "Service") -> list[dict[str, Any]]:
        rows = []
        for file in files or ("-",):
            found, problem = await _find_in(service.tokens, file)
            unreadable.extend(problem)
            for token, status in found.values():
                if revoke:
                    await service.tokens.background.finish(end(service, token))
                rows.append({**_row(token, "revoked" if revoke else status), "file": file})
        return rows

    rows = with_service(config_file, scan)
    if rows or as_json or not unreadable:
        _show(rows, as_json, "live tokens")
    for problem in unreadable:
        click.echo(f"Error: {printable(problem)}", err=True)
    context.exit(_FOUND if rows else 1 if unreadable else 0)


@tokens.command("revoke", epilog="Examples: tokenauth tokens revoke --user ann --leases; tokenauth tokens revoke --all")
@config_option
@click.option("--user", "username", metavar="NAME", help="All tokens of this user.")
@click.option("--id", "id_", metavar="ID", help="The token with this id.")
@click.option("--all", "everyone", is_flag=True, help="All tokens of all users. On a terminal, asks first.")
@click.option("--leases", is_flag=True, help="Also end the leases of the user, and their places in line.")
@click.option("--reason", metavar="TEXT", help="Why the leases end: their holders see it. Needs --leases.")
@yes_option
def tokens_revoke(
    config_file: str | None,
    username: str | None,
    id_: str | None,
    everyone: bool,
    leases: bool,
    reason: str | None,
    yes: bool,
) -> None:
    """Revoke login and named tokens: of a user, by id, or all.

    Without --leases, leases go on: after a new login, their clients can extend them. Exit with 1 if there is nothing to
    end.
    """
    from tokenauth.settings.model import canonical

    if sum([username is not None, id_ is not None, everyone]) != 1:
        raise click.UsageError("Pass exactly one of --user NAME, --id ID and --all.")
    if leases and username is None:
        raise click.UsageError("--leases needs --user.")
    if reason is not None and not leases:
        raise click.UsageError("--reason needs --leases.")
    check_reason(reason)
    if id_ is not None:
        _revoke_one(config_file, id_)
        return
    name = None if username is None else canonical(utf8(username))
    if everyone:
        confirm("Revoke all tokens of all users? Everyone must log in again, and named tokens end.", yes)

    ended = _Ended()
    try:
        with_service(config_file, lambda service: _revoke_all(service, config_file, name, leases, reason, ended))
    finally:  # what was done is recorded, also if the database failed then
        nothing = not (ended.tokens or ended.leases or ended.requests)
        if ended.known or not nothing:
            counted = {"leases": ended.leases, "requests": ended.requests} if leases else {}
            who = "(all)" if name is None else name
            event = "tokens_revoked" if ended.all else "revocation_interrupted"
            record_change(event, config_file, user=who, kind="all", count=ended.tokens, **counted)
    if not ended.known and nothing and not ended.going_on:
        what = "tokens, leases or places in line" if leases else "tokens"
        problem = f"No user {name!r} in {config_path(config_file)}, and no {what} of a user with that name."
        raise click.ClickException(printable(f"{problem} `tokenauth user list` shows the names."))
    rest = _describe_rest(ended.going_on)
    if nothing:
        also = ", no lease and no place in line" if leases else ""
        raise click.ClickException(printable("No tokens." if name is None else f"{name!r} has no tokens{also}.{rest}"))
    if leases:
        others = f"{count(ended.leases, 'lease')} and {count(ended.requests, 'place')} in line"
        click.echo(printable(f"Ended {count(ended.tokens, 'token')}, {others} of {name}."))
    else:
        click.echo(f"Revoked {count(ended.tokens, 'token')}.{rest}")


def _revoke_one(config_file: str | None, id_: str) -> None:
    try:
        revoked = with_service(config_file, lambda service: service.tokens.revoke_id(id_, None), changes=True)
    except UnknownToken as error:
        raise click.ClickException(f"{error} `tokenauth tokens list` shows the ids.") from None
    record_change("token_revoked", config_file, user=revoked.username, id=id_)
    click.echo("Revoked 1 token.")


async def _revoke_all(
    service: "Service", config_file: str | None, name: str | None, leases: bool, reason: str | None, ended: "_Ended"
) -> None:
    """Revoke the tokens of a user, or of all users, and with `leases` end theirs. What is done is noted in `ended`."""
    tell = progress("Revoked {} so far.", "token")

    def note(number: int) -> None:
        ended.tokens = number
        if tell is not None:
            tell(number)

    ended.known = name is None or name in service.users
    await service.store.tokens.revoke_all(name, service.clock(), progress=note)  # the caller logs and audits it
    if name is not None and leases:
        ends = service.pools.end_leases_and_places(name, reason)

        async def end_next() -> bool:
            found = await anext(ends, None)
            if found is None:
                return False
            pool, token = found
            if token is None:
                ended.requests += 1
            else:
                ended.leases += 1
                record_release(config_file, pool.name, token, reason)
            return True

        while await service.tokens.background.finish(end_next()):  # what is ended is recorded, also after Ctrl-C
            pass
    ended.all = True
    if name is not None and not leases:
        ended.going_on = await service.pools.count_leases_of(name)


@dataclass
class _Ended:
    """What was ended, whether that is all there was, and how many leases of the user go on."""

    known: bool = False
    all: bool = False
    tokens: int = 0
    leases: int = 0
    requests: int = 0
    going_on: int = 0


def _describe_rest(leases: int) -> str:
    if not leases:
        return ""
    return f" {leases} leases go on: --leases ends them." if leases > 1 else " 1 lease goes on: --leases ends it."


def _row(token: "Token", status: str) -> dict[str, Any]:
    return {
        "id": token.id,
        "user": token.username,
        "status": status,
        "kind": token.kind,
        "name": token.name,
        "scopes": None if token.scopes is None else list(token.scopes),
        "issued_at": int(token.issued_at),
        "expiry_time": token.expires_at,
        "last_used_at": None if token.last_used_at is None else int(token.last_used_at),
        "address": token.address,
        "user_agent": token.user_agent,
    }


def _show(rows: list[dict[str, Any]], as_json: bool, what: str) -> None:
    """Print tokens. A table always says what is known of their last use: an operator looks for it after a leak."""
    from tokenauth.user_agents import short_name

    if as_json:
        print_json({"tokens": rows})
        return
    for row in rows:
        row["user_agent"] = short_name(row["user_agent"])
        row["last_used_at"] = row["last_used_at"] or "none noted"
        if row["status"] == "valid":
            row["status"] = None
    show_table(rows, what, ("issued_at", "expiry_time", "last_used_at"))


async def _find_in(tokens: "Tokens", file: str) -> tuple[dict[str, tuple["Token", str]], list[str]]:
    """Find the tokens in a file of any size, by id. Also say why the rest of it cannot be read, if so."""
    found: dict[str, tuple[Token, str]] = {}
    try:
        with click.open_file(file, "rb") as stream:
            before = b""
            while part := stream.read(_PART):
                found |= {token.id: (token, status) for token, status in await tokens.find_in(before + part)}
                before = (before + part)[-_OVERLAP:]
    except OSError as error:
        return found, [f"{file}: cannot be read: {error.strerror}."]
    return found, []


def _requester() -> "Requester":
    from tokenauth.named_tokens import Requester

    return Requester(user_agent="tokenauth command")


def _print_issued(issued: "IssuedToken") -> None:
    click.echo(issued.value)
    if sys.stderr.isatty():
        end = f"{datetime.fromtimestamp(issued.token.expires_at, UTC):%Y-%m-%d %H:%M:%S}Z"
        click.echo(f"It is valid until {end}, and cannot be shown again. Its id is {issued.token.id}.", err=True)
