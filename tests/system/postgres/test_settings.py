"""The parameters of each connection to PostgreSQL, and their documentation for operators of a PgBouncer."""

import re

from tests.support.servers import ROOT
from tokenauth.stores.postgres.connections import _SETTINGS

GUIDE = (ROOT / "docs" / "scaling.md").read_text()


def test_the_guide_gives_pgbouncer_every_parameter_sent() -> None:
    ignored = re.findall(r"^ignore_startup_parameters = (.*)$", GUIDE, re.MULTILINE)
    assert [line.split(",") for line in ignored] == [[name for name in _SETTINGS if name != "application_name"]]
    of_the_role = dict(re.findall(r"^ALTER ROLE tokenauth SET (\w+) = '(.*)';$", GUIDE, re.MULTILINE))
    of_the_connection = {name for name in _SETTINGS if name.startswith("tcp_")} | {"application_name"}
    assert of_the_role == {name: value for name, value in _SETTINGS.items() if name not in of_the_connection}
