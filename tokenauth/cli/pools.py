"""The commands for pools."""

import shlex
import time
from typing import TYPE_CHECKING, Any

import click

from tokenauth.cli.base import (
    LIMIT,
    CommandGroup,
    config_option,
    config_path,
    json_option,
    note_limit,
    print_json,
    record_change,
    relative,
    show_table,
    utf8,
    with_service,
)
from tokenauth.errors import AlreadyReserved, LeaseLost, UnknownPool
from tokenauth.logs import printable
from tokenauth.models import LeaseCheck, Member

if TYPE_CHECKING:
    from tokenauth.models import Instant, Pool, PoolToken
    from tokenauth.service import Service

_SHORT = 8
"""Characters by which a table names a token, and a command finds it."""


@click.group(cls=CommandGroup)
def pool() -> None:
    """List, add, release and delete the tokens of pools.

    Running servers apply each change at once.
    """


@pool.command("list", epilog="Example: tokenauth pool list --json")
@config_option
@json_option
def pool_list(config_file: str | None, as_json: bool) -> None:
    """List the pools, with their tokens and waiting requests."""

    async def count(service: "Service") -> list[dict[str, Any]]:
        return [await _count(service, pool) for pool in service.pools.usable_by()]

    rows = with_service(config_file, count)
    if as_json:
        print_json({"pools": rows})
    else:
        show_table(rows, "pools")


async def _count(service: "Service", pool: "Pool") -> dict[str, Any]:
    reserved = None
    if pool.members:
        available, leased, reserved = pool.count(await service.pools.members(pool), service.clock())
    else:
        available, leased = await service.pools.count(pool)
    waiting = await service.pools.count_waiting(pool)
    counts = {"available": available, "leased": leased, "waiting": waiting, "reserved": reserved}
    return {"name": pool.name, "capacity": pool.capacity, **counts}


@pool.command("show", epilog="Example: tokenauth pool show licences")
@config_option
@json_option
@click.argument("name")
@click.option("--after", metavar="TOKEN", default="", help="Start after this token, written in full.")
@click.option("--full", is_flag=True, help="Show the tokens in full. With --json they always are.")
def pool_show(config_file: str | None, as_json: bool, name: str, after: str, full: bool) -> None:
    """List the tokens of a pool and who holds them.

    The beginning of a token is enough for `pool release` and `pool delete`. It lists at most 1,000: continue with
    --after and the last token. Of a pool with members it lists all, ordered by name.
    """

    async def list_tokens(service: "Service") -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
        pool = _find(service, name, config_file)
        if pool.members:
            found = await service.pools.members(pool)
        else:
            found = await service.pools.list_tokens(pool, utf8(after), LIMIT + 1)
        shown = found if pool.members else found[:LIMIT]
        rows = [_row(pool, token, service.clock()) for token in shown]
        return await _count(service, pool), rows, len(shown) < len(found)

    counts, rows, continues = with_service(config_file, list_tokens)
    if as_json:
        print_json({**counts, "tokens": rows, "next": rows[-1]["token"] if continues else None})
    else:
        shown = [_flat(row) if full else {**_flat(row), "token": f"{row['token'][:_SHORT]}…"} for row in rows]
        show_table(shown, "tokens", ("expiry_time", "leased_at", "lease_expiry_time", "reserved_until"))
    if continues:
        note_limit(rows, "continue with --after and the last token, which --full shows")


def _row(pool: "Pool", token: "PoolToken", now: "Instant") -> dict[str, Any]:
    """Return a token with its lease. In a pool with members, tokens have a name and do not expire."""
    lease, expires_at, ends_by = token.lease(now), pool.expires_at(token), pool.lease_ends_by(token)
    name = token.member if pool.members else None
    member = None if name is None else pool.members.get(name, Member(name))
    reservation = pool.reservation(token, now) if member else None
    return {
        "name": name,
        "labels": member and list(member.labels),
        "token": token.value,
        "expiry_time": None if expires_at is None else int(expires_at),
        "fence": token.fence,
        "user": lease and token.username,
        "holder": lease and lease.holder,
        "leased_at": lease and token.leased_at and int(token.leased_at),
        "lease_expiry_time": lease and int(lease.until),
        "max_expiry_time": lease and ends_by and int(ends_by),
        "reservation": reservation
        and {
            "until": int(reservation.until),
            "note": reservation.note or None,
            "for": reservation.username,
            "by": reservation.by or None,
        },
        "note": member and member.note,
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for a table, which shows one note, and not how long the lease can be kept alive."""
    shown = {key: row[key] for key in row if key not in {"reservation", "note", "max_expiry_time"}}
    found = row["reservation"] or {}
    reserved = {f"reserved_{key}": found.get(key) for key in ("until", "for", "by")}
    return {**shown, **reserved, "note": found.get("note") or row["note"] or None}


@pool.command("line", epilog="Example: tokenauth pool line licences")
@config_option
@json_option
@click.argument("name")
def pool_line(config_file: str | None, as_json: bool, name: str) -> None:
    """List who waits for tokens of a pool, in order.

    It lists at most 1,000. A higher priority comes before a longer wait: one point counts as a minute.
    """

    async def list_line(service: "Service") -> tuple[int, list[dict[str, Any]]]:
        waiting, found = await service.pools.list_requests(_find(service, name, config_file), LIMIT)
        return waiting, [
            {
                "position": position,
                "user": request.username,
                "holder": request.holder,
                "since": int(request.since),
                "count": request.count,
                "priority": request.priority,
                "labels": [*request.labels],
                "request": request.id,
            }
            for position, request in enumerate(found, 1)
        ]

    waiting, rows = with_service(config_file, list_line)
    if as_json:
        print_json({"waiting": waiting, "requests": rows})
    else:
        show_table([{**row, "request": None} for row in rows], "requests in line", ("since",))
    note_limit(rows, "later places are not shown")


@pool.command("generate", epilog="Example: tokenauth pool generate vouchers --count 10")
@config_option
@json_option
@click.argument("name")
@click.option("--count", metavar="N", type=click.IntRange(1, 1000), default=1, help="Number of tokens; 1 if not given.")
def pool_generate(config_file: str | None, as_json: bool, name: str, count: int) -> None:
    """Add free tokens to a pool and print them.

    All are added, or none if they would exceed the capacity of the pool.
    """
    values = with_service(
        config_file, lambda service: service.pools.generate(_find(service, name, config_file), count), changes=True
    )
    record_change("pool_tokens_generated", config_file, pool=name, count=len(values))
    if as_json:
        print_json({"tokens": values})
    else:
        click.echo("\n".join(values))


@pool.command("release", epilog="Example: tokenauth pool release phones pixel-8 --force --reason 'device is stuck'")
@config_option
@click.argument("name")
@click.argument("token", metavar="TOKEN|MEMBER")
@click.option("--force", is_flag=True, help="End the lease of a user.")
@click.option("--reason", metavar="TEXT", help="Why, for the log. Needs --force.")
def pool_release(config_file: str | None, name: str, token: str, force: bool, reason: str | None) -> None:
    """End the lease of a token, or of a member by its name.

    The first 8 characters of the token are enough. A lease that belongs to a user needs --force. Another client can
    lease the token at once.
    """
    if reason is not None and not force:
        raise click.UsageError("--reason needs --force.")

    async def release(service: "Service") -> "PoolToken":
        pool, fence = _find(service, name, config_file), None
        value = await _find_token(service, pool, utf8(token))
        if not force:
            found = await service.pools.get(pool, value)
            lease, fence = found.lease(service.clock()), found.fence
            if lease is not None and found.username is not None:
                raise click.ClickException(
                    f"The lease belongs to {found.username!r}, holder {lease.holder!r}: add --force to end it."
                )
        return await service.pools.force_release(pool, value, LeaseCheck(fence=fence), "", reason)

    check_reason(reason)
    try:
        ended = with_service(config_file, release, changes=True)
    except LeaseLost:
        raise click.ClickException("The token is not leased.") from None
    record_release(config_file, name, ended, reason)
    click.echo("Released 1 token.")


def check_reason(reason: str | None) -> None:
    """Raise InvalidRequest for a text that cannot be a reason."""
    from tokenauth.pools import check_label

    if reason is not None:
        check_label(utf8(reason), "reason")


def record_release(config_file: str | None, pool: str, ended: "PoolToken", reason: str | None) -> None:
    """Log that the operator has ended a lease. `ended` is the token as it was."""
    record_change(
        "pool_lease_released",
        config_file,
        pool=pool,
        **({} if ended.member is None else {"member": ended.member}),
        user=ended.username,
        holder=ended.holder,
        fence=ended.fence,
        reason=reason,
    )


@pool.command("reserve", epilog="Example: tokenauth pool reserve phones pixel-8 --until 2h --note 'battery swap'")
@config_option
@click.argument("name")
@click.argument("member")
@click.option("--until", metavar="DURATION", required=True, help="How long from now, such as 30m, 2h or 1d.")
@click.option("--note", metavar="TEXT", help="Why; all users of the pool see it.")
@click.option("--for", "user", metavar="USER", help="Let this user lease the member.")
@click.option("--force", is_flag=True, help="Replace the reservation of a user.")
def pool_reserve(
    config_file: str | None, name: str, member: str, until: str, note: str | None, user: str | None, force: bool
) -> None:
    """Keep a member from being leased for some time.

    If the member is leased, that lease goes on. After it, no one can lease the member until the reservation ends.
    """
    from tokenauth.pools import check_label
    from tokenauth.settings import durations
    from tokenauth.settings.model import canonical

    if durations.parse_exact(until) is None:
        problem = f"{until!r} is not a duration from now: write a number and s, m, h or d, such as 30m, 2h or 1d."
        raise click.BadParameter(problem, param_hint="--until")
    shown = "" if note is None else check_label(utf8(note), "note")
    username = None if user is None else canonical(check_label(utf8(user), "for"))

    async def reserve(service: "Service") -> "tuple[PoolToken, Instant]":
        found = _find(service, name, config_file)
        return await service.pools.reserve(found, member, until, username, shown, "", force), service.clock()

    try:
        token, now = with_service(config_file, reserve, changes=True)
    except AlreadyReserved as error:
        ends = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(error.until))
        problem = f"{error.by} has reserved this member until {ends}: add --force to replace the reservation."
        raise click.ClickException(printable(problem)) from None
    reservation, lease = token.reservation, token.lease(now)
    end = reservation and int(reservation.until)
    record_change("pool_member_reserved", config_file, pool=name, member=member, until=end, user=username, note=shown)
    click.echo("Reserved 1 member.")
    if lease is not None and token.username != username:
        who = "A client" if token.username is None else token.username
        ends = relative(lease.until, now)
        click.echo(
            printable(
                f"{who} (holder {lease.holder}) still has it. The lease ends {ends} unless its client extends it;"
                f" `tokenauth pool release {shlex.quote(name)} {shlex.quote(member)} --force` ends it now."
            )
        )


@pool.command("unreserve", epilog="Example: tokenauth pool unreserve phones pixel-8")
@config_option
@click.argument("name")
@click.argument("member")
def pool_unreserve(config_file: str | None, name: str, member: str) -> None:
    """End the reservation of a member, also that of another manager."""
    with_service(
        config_file,
        lambda service: service.pools.unreserve(_find(service, name, config_file), member, ""),
        changes=True,
    )
    record_change("pool_member_unreserved", config_file, pool=name, member=member)
    click.echo("The member is not reserved.")


@pool.command("delete", epilog="Example: tokenauth pool delete licences 3f0c...")
@config_option
@click.argument("name")
@click.argument("token")
def pool_delete(config_file: str | None, name: str, token: str) -> None:
    """Delete a token, free or leased.

    The first 8 characters of the token are enough. A pool with `prefill` or with members gets a new token in its place.
    """

    async def delete(service: "Service") -> None:
        pool = _find(service, name, config_file)
        if token in pool.members:
            problem = f"{token!r} is a member: remove it from {config_path(config_file)} and reload the servers."
            raise click.ClickException(printable(f"{problem} `tokenauth pool release` ends its lease."))
        await service.pools.delete(pool, await _find_token(service, pool, utf8(token)))

    with_service(config_file, delete, changes=True)
    record_change("pool_token_deleted", config_file, pool=name)
    click.echo("Deleted 1 token.")


async def _find_token(service: "Service", pool: "Pool", text: str) -> str:
    """Return the token of the member with this name, or the only one that begins with this text, or else the text."""
    for member in await service.pools.members(pool) if pool.members else ():
        if member.member == text:
            return member.value
    if len(text) < _SHORT:
        return text
    # They are ordered by code point: those that begin with the text come next after it.
    first = await service.pools.list_tokens(pool, text, 2)
    found = [token.value for token in first if token.value.startswith(text)]
    if len(found) > 1:
        raise click.ClickException("More than one token begins with that: write more of it.")
    return found[0] if found else text


def _find(service: "Service", name: str, config_file: str | None) -> "Pool":
    """Return a pool. The error names all pools, as over HTTP it must not."""
    try:
        return service.pools.find(name)
    except UnknownPool:
        known = ", ".join(pool.name for pool in service.pools.usable_by()) or "none"
        raise UnknownPool(f"There is no pool {name!r} in {config_path(config_file)}; known are: {known}.") from None
