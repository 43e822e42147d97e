"""See what is lent from the pools, and step in."""

from typing import Any

import click

from tokenauth.cli.base import Lines, config_option, json_option, print_json, show, text, whole, with_service
from tokenauth.errors import LeaseLost
from tokenauth.logs import audit


@click.group(cls=Lines)
def pool() -> None:
    """See what is lent from the pools, and step in. Running servers go by it at once."""


@pool.command("list", epilog="Example: tokenauth pool list --json")
@config_option
@json_option
def pool_list(config_file: str | None, as_json: bool) -> None:
    """List the pools: how many tokens each has, and how many are lent."""

    async def count(service: Any) -> list[dict[str, Any]]:
        rows = []
        for one in service.pools.usable_by():
            available, leased = await service.pools.count(one)
            rows.append({"name": one.name, "capacity": one.capacity, "available": available, "leased": leased})
        return rows

    show(with_service(config_file, count), as_json, "pools")


@pool.command("show", epilog="Example: tokenauth pool show licences")
@config_option
@json_option
@click.argument("name")
@click.option("--after", metavar="TOKEN", default="", help="Begin after this token.")
def pool_show(config_file: str | None, as_json: bool, name: str, after: str) -> None:
    """List the tokens of the pool NAME, at most 1,000, and who holds them."""

    async def members(service: Any) -> list[dict[str, Any]]:
        terms = service.pools.find(name)
        rows = []
        for token in await service.pools.list_tokens(terms, text(after)):
            lease = token.lease(service.clock())
            row = {"token": token.value, "expiry_time": whole(terms.expires_at(token)), "fence": token.fence}
            row |= {"user": lease and token.username, "holder": lease and lease.holder}
            row |= {"lease_expiry_time": lease and int(lease.until)}
            rows.append(row)
        return rows

    show(with_service(config_file, members), as_json, "tokens", instants=("expiry_time", "lease_expiry_time"))


@pool.command("generate", epilog="Example: tokenauth pool generate vouchers --count 10")
@config_option
@json_option
@click.argument("name")
@click.option("--count", metavar="N", type=int, default=1, help="How many; 1 to 1,000.")
def pool_generate(config_file: str | None, as_json: bool, name: str, count: int) -> None:
    """Add free tokens to the pool NAME, all or none, and print them."""
    made = with_service(config_file, lambda service: service.pools.generate(service.pools.find(name), count))
    audit("pool_tokens_generated", pool=name, count=len(made))
    if as_json:
        print_json(made)
    else:
        click.echo("\n".join(made))


@pool.command("release", epilog="Example: tokenauth pool release licences 3f0c...")
@config_option
@click.argument("name")
@click.argument("token")
def pool_release(config_file: str | None, name: str, token: str) -> None:
    """End the lease of TOKEN in the pool NAME, whoever holds it: it can be lent anew at once."""
    try:
        with_service(config_file, lambda service: service.pools.release(service.pools.find(name), text(token)))
    except LeaseLost:
        raise click.ClickException("The token is not lent.") from None
    audit("pool_lease_released", pool=name)
    click.echo("released 1 token")


@pool.command("delete", epilog="Example: tokenauth pool delete licences 3f0c...")
@config_option
@click.argument("name")
@click.argument("token")
def pool_delete(config_file: str | None, name: str, token: str) -> None:
    """Delete TOKEN from the pool NAME, free or lent. A pool with `prefill` gets a new one for it."""
    with_service(config_file, lambda service: service.pools.delete(service.pools.find(name), text(token)))
    audit("pool_token_deleted", pool=name)
    click.echo("deleted 1 token")
