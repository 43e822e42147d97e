"""The command `tokenauth`, and its subcommands for the whole service. Others have modules of their own."""

import asyncio
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from tokenauth import build, logs
from tokenauth.cli import NOHUP
from tokenauth.cli.audit import audit_log
from tokenauth.cli.base import (
    CommandGroup,
    append_to_audit_log,
    config_option,
    confirm,
    count,
    json_option,
    new_hash,
    options,
    password_option,
    print_json,
    program,
    with_service,
    yes_option,
)
from tokenauth.cli.copy import copy
from tokenauth.cli.health import health
from tokenauth.cli.init import init
from tokenauth.cli.pools import pool
from tokenauth.cli.run import run
from tokenauth.cli.systemd_unit import systemd_unit
from tokenauth.cli.throttle import throttle
from tokenauth.cli.tokens import tokens
from tokenauth.cli.users import user
from tokenauth.errors import ConfigError
from tokenauth.logs import printable

if TYPE_CHECKING:
    from tokenauth.service import Service


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:  # the digest is computed only then
        click.echo(f"tokenauth, version {build()}")
        context.exit()


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-V",
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Issue, check and revoke bearer tokens, and lease tokens from pools."""
    logs.configure(quiet=True)


for command in (init, health, systemd_unit, copy, user, tokens, pool, throttle, audit_log, run):
    main.add_command(command)


@main.command(epilog="Example: tokenauth serve --config /etc/tokenauth/config.toml --workers 2")
@config_option
@click.option("--host", metavar="H", help="Address to listen on, instead of server.host.")
@click.option("-p", "--port", metavar="P", type=int, help="Port, instead of server.port; 0 picks a free one.")
@click.option("--workers", metavar="N", type=int, help="Number of processes, instead of server.workers.")
def serve(config_file: str | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Run the server.

    Stop it with SIGTERM or Ctrl-C, or close its terminal. SIGHUP reloads the configuration without dropping a request.
    """
    logs.configure()
    try:
        from tokenauth.server import serve as server
        from tokenauth.settings import loader
    except ImportError as error:
        logs.log.critical("start_failed", detail=logs.describe(error))
        sys.exit(3)
    path = loader.find(config_file)
    sys.exit(server.serve(path, host, port, workers, NOHUP, server.Invocation(program(), options(config_file))))


@main.command(epilog="Example: tokenauth check && tokenauth reload")
@config_option
@json_option
@click.option("--deep", is_flag=True, help="The same as `tokenauth doctor`.")
def check(config_file: str | None, as_json: bool, deep: bool) -> None:
    """Check the configuration for mistakes and risks.

    Exit with 1 if `tokenauth serve` would refuse it here and for this user. Changes nothing. Not checked without
    --deep: whether the port is free, and whether a PostgreSQL server answers.
    """
    if deep:
        from tokenauth.cli.doctor import diagnose

        diagnose(config_file, as_json)
    from tokenauth.audit.log import find_problem
    from tokenauth.risks import Risk, check_accepted, find_risks
    from tokenauth.server import tls
    from tokenauth.server.listener import check_address
    from tokenauth.service import create_service
    from tokenauth.settings import loader
    from tokenauth.stores.open import check_files
    from tokenauth.web.app import find_routes

    path = loader.find(config_file)
    risks: list[Risk] = []
    mistake = None
    try:
        settings = loader.load(path)
        with loader.naming(path):
            service = create_service(settings)
            find_routes(service)
            risks = find_risks(settings, service.passwords, path)
            check_address(settings.server)
            check_accepted(settings, risks)
            pair = tls.read(settings.server)
            check_files(settings.database)
    except ConfigError as error:
        mistake = error
    if as_json:
        found = [risk._asdict() for risk in risks]
        print_json({"ok": mistake is None, "error": None if mistake is None else str(mistake), "risks": found})
    else:
        for risk in risks:
            click.echo(printable(f"risk: {risk.name}: {risk.text}"))
        if mistake is None and pair is not None and (validity := tls.Validity(pair)).refused:
            click.echo(
                printable(f"warning: server.tls_certificate: clients refuse it: {validity.problem}; {tls.RENEW}")
            )
        if mistake is None and (problem := find_problem(settings.audit)):
            click.echo(printable(f"warning: audit log: {problem}"))
    if mistake is not None:
        raise mistake
    if not as_json:
        click.echo(printable(_PRIVATE if settings.exposure is None else f"{settings.exposure}."))
        if settings.metrics.exposure is not None:
            click.echo(printable(f"{settings.metrics.exposure}."))
        counts = (
            count(len(settings.users_by_name), "user"),
            count(len(settings.pools), "pool"),
            count(len(risks), "risk"),
        )
        if relative := loader.describe_relative_paths(settings):
            click.echo(printable(f"R{relative[1:]}."))
        if not settings.users:
            click.echo("Nobody can log in: add a user with `tokenauth user add NAME`.")
        click.echo(printable(f"{path}: ok, {', '.join(counts)}"))


_PRIVATE = (
    "Only this machine can reach the service. If a reverse proxy passes requests on to it, set server.trusted_proxies."
)


@main.command(epilog="Example: tokenauth reload --config /etc/tokenauth/config.toml")
@config_option
def reload(config_file: str | None) -> None:
    """Reload the configuration of the running server.

    Wait for the result. A server that refuses the new configuration keeps the old one: the command says why, and exits
    with 1. Run it as the user of the service, or as root. It finds the server by the configuration file.
    """
    from tokenauth.server.control import ask_for_reload
    from tokenauth.settings import loader

    path = loader.find(config_file)
    refused = False
    for pid, answer in ask_for_reload(path).items():
        shown = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in answer.changes.items()]
        changes = "; ".join([*shown, *answer.restart_needed]) or "nothing has changed"
        if answer.accepted:
            append_to_audit_log(config_file, {"event": "reload_ordered", "server": pid, "by": logs.operator()})
            click.echo(printable(f"Reloaded by process {pid}: {changes}."))
            if answer.detail:
                click.echo(f"Warning: {answer.detail}", err=True)
        else:
            refused = True
            click.echo(
                printable(f"Error: refused by process {pid}, which keeps its settings: {answer.detail}"), err=True
            )
    if refused:
        sys.exit(1)


@main.command(epilog="Example: tokenauth doctor --config /etc/tokenauth/config.toml")
@config_option
@json_option
def doctor(config_file: str | None, as_json: bool) -> None:
    """Check the configuration, the database and this machine.

    Each line says what to do. Exit with 1 if there is an error: something that keeps the service from starting or
    working. Changes nothing. Run it as the user of the service and in its directory.
    """
    from tokenauth.cli.doctor import diagnose

    diagnose(config_file, as_json)


@main.command(epilog="Example: tokenauth migrate --config /etc/tokenauth/config.toml")
@config_option
@yes_option
def migrate(config_file: str | None, yes: bool) -> None:
    """Upgrade the database schema.

    `tokenauth serve` does the same when it starts. An upgrade is logged as `schema_upgraded`. Servers can keep
    running, unless the upgrade starts a new generation: then stop those of the older release first. On a terminal,
    it asks before that, unless --yes.
    """
    logs.configure(direct=True)
    from tokenauth.audit.records import ACTS
    from tokenauth.settings import loader
    from tokenauth.stores import schema
    from tokenauth.stores.open import examine

    async def do_nothing(_: "Service") -> None:
        return None

    if sys.stderr.isatty():
        path = loader.find(config_file)
        settings = loader.load(path)
        with loader.naming(path):
            had = asyncio.run(examine(settings.database)).schema
        if had is not None and not schema.serves(had):
            click.echo(f"The database has schema {had}. Upgrading it to {schema.HEAD} may take minutes.", err=True)
            if schema.starts_generation(had):
                confirm(f"Have a backup. {schema.STOP_FIRST} Go on?", yes)

    def observe(event: Mapping[str, object]) -> None:
        if event["event"] in ACTS:
            append_to_audit_log(config_file, {**event, "by": logs.operator()})

    with logs.observed(observe):
        with_service(config_file, do_nothing, create=True)
    click.echo(f"The database has schema {schema.HEAD}.")


@main.command("hash-password", epilog="Example: echo 'a long password' | tokenauth hash-password --password-stdin")
@config_option
@password_option
def hash_password(config_file: str | None, password_stdin: bool) -> None:
    """Print the hash of a password, for config.toml.

    Its cost is that of [passwords] in the configuration.
    """
    click.echo(new_hash(config_file, password_stdin))
