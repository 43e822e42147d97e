"""The address of a client is an IP address or "unknown", for any header from a trusted proxy."""

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.servers import log_in, worker, write_config
from tokenauth.web.client_address import client_address

ADDRESSES = st.ip_addresses().map(str)
ZONES = st.builds("{}%{}".format, st.ip_addresses(v=6), st.text(min_size=1))


@given(st.text() | ADDRESSES | ZONES | st.builds("{}{}".format, ADDRESSES, st.text()))
@example("x" * 5000)
@example("fe80::1%" + "x" * 5000)
@example("1.2.3.4\x9b31m")
def test_a_client_address_is_an_ip_or_unknown(sent: str) -> None:
    kept = client_address({"client": (sent, 0), "headers": []})
    assert kept == "unknown" or ip_address(kept)
    assert len(kept) <= 45
    assert "%" not in kept


@given(st.ip_addresses())
def test_a_valid_client_address_is_kept(sent: object) -> None:
    kept = client_address({"client": (str(sent), 0), "headers": []})
    assert ip_address(kept) == (getattr(sent, "ipv4_mapped", None) or sent)
    assert client_address({}) == ""


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """Connect to a worker that trusts X-Forwarded-For from this machine and logs every request."""
    config = write_config(
        tmp_path_factory.mktemp("behind"), '[server]\ntrusted_proxies = ["127.0.0.1"]\naccess_log = true'
    )
    with worker(config) as server, server.client() as client:
        yield client, server.log


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:DB8::7", "2001:db8::7"),
        ("[2001:db8::7]:4711", "2001:db8::7"),
        ("203.0.113.7:4711", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("::FFFF:cb00:7107", "203.0.113.7"),
        ("x" * 5000, "unknown"),
        ("fe80::1%" + "x" * 5000, "fe80::1"),
        ("203.0.113.7 \u00c2\u009b31m", "unknown"),
        ("_hidden", "unknown"),
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode(),
)
def test_only_ip_addresses_are_stored_or_logged(behind: tuple[httpx.Client, Path], sent: str, kept: str) -> None:
    client, log = behind
    token = log_in(client, headers=[(b"X-Forwarded-For", sent.encode("latin-1"))])
    listed = client.get("/api/tokens", headers={"X-Token": token}).json()["tokens"]
    assert next(row["address"] for row in listed if row["current"]) == kept
    assert sent not in log.read_text() or sent == kept
    assert "\x9b" not in log.read_text()


def test_an_untrusted_proxy_is_logged_once(tmp_path: Path) -> None:
    """For the addresses that it sends, and for the pages that it asks about."""
    page = {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "localhost:8000", "X-Forwarded-Uri": "/"}
    config = write_config(tmp_path, '[browser]\nurl = "http://localhost:8000"')
    with worker(config) as server, server.client() as client:
        for _ in range(2):
            log_in(client, headers={"X-Forwarded-For": "203.0.113.7"})
            assert client.get("/auth?cookie", headers=page).status_code == 401
        for event in ("forwarded_for_ignored", "forwarded_page_ignored"):
            assert [each["peer"] for each in server.events(event)] == ["127.0.0.0/24"]
