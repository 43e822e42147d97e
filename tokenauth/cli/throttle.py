"""The commands for logins that are throttled after failed ones."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from tokenauth.cli.base import (
    CommandGroup,
    config_option,
    config_path,
    json_option,
    load_settings,
    print_json,
    record_change,
    show_table,
    utf8,
    with_service,
)
from tokenauth.logs import printable

if TYPE_CHECKING:
    from tokenauth.models import Throttled
    from tokenauth.service import Service


@click.group(cls=CommandGroup)
def throttle() -> None:
    """List and clear throttled logins.

    Running servers apply each change at once.
    """


@throttle.command("list", epilog="Example: tokenauth throttle list --json")
@config_option
@json_option
def throttle_list(config_file: str | None, as_json: bool) -> None:
    """List the users and networks that must wait after failed logins.

    The longest wait is first. It lists at most 100. Names of unknown users are not shown: they may be passwords. Run it
    as the user of the service, or as root. It finds the server by the configuration file, as `tokenauth reload` does.
    """
    rows: list[dict[str, Any]] = [
        {**each._asdict(), "until": math.ceil(each.until)} for each in _find_throttled(config_file)
    ]
    if as_json:
        print_json({"throttled": rows})
        return
    shown = [{"who": _WHO.get(row.pop("kind"), row["user"]), **row, "user": None} for row in rows]
    show_table(shown, "throttled logins", ("until",))


_WHO = {"network": "(everyone)", "unknown": "(unknown names)"}


@throttle.command("clear", epilog="Examples: tokenauth throttle clear ann; tokenauth throttle clear 203.0.113.0/24")
@config_option
@click.argument("who", metavar="NAME|NETWORK")
@click.option("--from", "address", metavar="ADDRESS", help="Where the user logs in from, if `throttle list` lacks it.")
def throttle_clear(config_file: str | None, who: str, address: str | None) -> None:
    """Forget the failed logins of a user, or of a network as a whole.

    The next login is checked at once. For a user, it clears the addresses in `tokenauth throttle list`, and those where
    the wait ended within the last hour; with --from, that address only. A network is a /24 or /16, or an IPv6 /64 or
    /48. Exit with 1 if no failed login is counted there.
    """
    from tokenauth.addresses import is_address, network, read_range
    from tokenauth.settings.model import canonical

    name, addresses = canonical(utf8(who)), read_range(who)
    if name in load_settings(config_file).users_by_name:
        if address is not None and not is_address(address):
            raise click.BadParameter("must be an IP address.", param_hint="--from")
        listed = [] if address is None else [address]
        if address is None:
            listed = [each.address for each in _find_refused(config_file) if each.user == name]
        if not listed:
            problem = f"{name!r} is not throttled, as far as the servers of this machine know."
            raise click.ClickException(printable(f"{problem} Pass --from ADDRESS to clear an address."))

        async def clear_user(service: "Service") -> Sequence[str]:
            return [one for one in listed if await service.throttle.clear_user(name, one, "")]

        cleared = with_service(config_file, clear_user, changes=True)
        for one in cleared:
            record_change("throttle_cleared", config_file, user=name, addresses=network(one))
            click.echo(printable(f"{name} can log in from {one} again."))
    elif addresses is not None:
        if address is not None:
            raise click.UsageError("--from needs the name of a user.")
        wanted = addresses

        async def clear_network(service: "Service") -> Sequence[str]:
            return [wanted] if await service.throttle.clear_network(wanted, "") else []

        cleared = with_service(config_file, clear_network, changes=True)
        if cleared:
            record_change("throttle_cleared", config_file, range=wanted)
            click.echo(f"The failed logins from {wanted} are forgotten. Those of each name there stay.")
    else:
        problem = f"{who!r} is no user in {config_path(config_file)}, and no network such as 203.0.113.0/24."
        raise click.ClickException(printable(f"{problem} `tokenauth throttle list` shows who has to wait."))
    if not cleared:
        raise click.ClickException("No failed login is counted there.")


def _find_throttled(config_file: str | None) -> "Sequence[Throttled]":
    """Return who has to wait now. The servers know whom they have refused, and the store, until when."""
    listed = _find_refused(config_file)
    return with_service(config_file, lambda service: service.throttle.check_throttled(listed))


def _find_refused(config_file: str | None) -> "Sequence[Throttled]":
    """Return whom the servers have refused, also if the wait was over not long ago."""
    from tokenauth.server.control import ask_who_is_throttled

    return ask_who_is_throttled(config_path(config_file))
