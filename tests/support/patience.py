"""Lets stores wait for a busy machine longer than those of a service do."""

import pytest

from tokenauth.stores import circuit_breaker
from tokenauth.stores.postgres import connections
from tokenauth.stores.sqlite import reader_threads

LONG = 60.0


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengthen the timeouts of stores that are opened from now on: for tests that do not test them."""
    for module in (circuit_breaker, connections):
        monkeypatch.setattr(module, "TIMEOUT", LONG)
    monkeypatch.setattr(circuit_breaker, "PROBE_TIMEOUT", LONG)
    monkeypatch.setattr(reader_threads, "_WAIT", LONG)
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT", LONG)
    for setting in ("statement_timeout", "idle_in_transaction_session_timeout"):
        monkeypatch.setitem(connections._SETTINGS, setting, f"{LONG:g}s")
    monkeypatch.setattr(connections, "_BEGIN_PROBE", connections._BEGIN_PROBE.replace("'500ms'", f"'{LONG:g}s'"))
