"""`tokenauth systemd-unit`: prints a unit for this installation."""

import sys
from importlib.resources import files

import click

PREFIX = "/opt/tokenauth"
"""The virtual environment that the file names."""


@click.command("systemd-unit", epilog="Example: tokenauth systemd-unit > /etc/systemd/system/tokenauth.service")
def systemd_unit() -> None:
    """Print a unit file for systemd.

    It runs this installation as the user tokenauth, with the configuration /etc/tokenauth/config.toml and the database
    in /var/lib/tokenauth.
    """
    unit = files("tokenauth.cli").joinpath("tokenauth.service").read_text(encoding="utf-8")
    click.echo(unit.replace(PREFIX, sys.prefix), nl=False)
