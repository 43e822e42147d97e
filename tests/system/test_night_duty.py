"""What docs/production.md says for when something happens: its commands, in their order, with what they find."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.support.auditing import wait_for
from tests.support.documents import blocks, read, section
from tests.support.journal import until
from tests.support.ports import free_port
from tests.support.servers import Server, log_in, probe, serve, write_config
from tests.support.skipping import skip_without
from tests.system.test_cli import run

GUIDE = read("docs/production.md")

SETTINGS = """
[server]
port = {port}
[throttle]
delay = "10m"
[audit]
file = "{directory}/audit.jsonl"
[pools.phones]
lease_ttl = "1h"
members = [{{ name = "pixel-8" }}, {{ name = "iphone-15" }}]
"""


def commands(heading: str) -> list[str]:
    """Return the commands below a heading, one a line."""
    found = [line for block in blocks(section(GUIDE, f"### {heading}"), "sh") for line in block.splitlines()]
    assert found, heading
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    config = write_config(tmp_path, SETTINGS.format(directory=tmp_path, port=port))
    with serve(config, "--workers", "1", on_port=False) as running:
        yield running


def follow(server: Server, heading: str, words: Mapping[str, str] | None = None) -> list[str]:
    """Run the commands below a heading as an operator does. Return what each has printed."""
    return [_run(server, line, words or {}) for line in commands(heading)]


def _run(server: Server, line: str, words: Mapping[str, str]) -> str:
    home = server.log.parent
    line, _, comment = (part.strip() for part in line.partition("#"))
    found = re.fullmatch(r"exits with (\d)", comment)
    status = int(found[1]) if found else 0
    for word, replacement in words.items():
        line = re.sub(rf"\b{word}\b", replacement, line)
    if line == "sudo systemctl reload tokenauth":
        line = "tokenauth reload"
    line = line.removeprefix("sudo ").replace(" -o tokenauth -g tokenauth", "")  # these files are the test's own
    if line.startswith("tokenauth "):
        stdin = ["--password-stdin"] if " passwd " in line else []
        done = run(home, *shlex.split(line)[1:], *stdin, stdin="a long password\n")
    else:
        if shutil.which(shlex.split(line)[0]) is None:
            skip_without(line.split()[0], "install it")
        for there, here in {
            "https://auth.example.com": server.url, "localhost:8000": server.url,
            "/var/lib/tokenauth": str(home), "/var/log/tokenauth": str(home),
        }.items():  # fmt: skip
            line = line.replace(there, here)
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def named_token(client: httpx.Client, token: str, name: str) -> tuple[str, str]:
    """Make a named token; return its value and its id."""
    answer = client.post("/api/tokens", json={"name": name}, headers={"X-Token": token}).json()
    return answer["token"], answer["id"]


def test_a_leaked_token_is_found_and_ended(server: Server) -> None:
    with server.client() as client:
        mine, other = log_in(client, "ann", "ann-secret"), log_in(client, "ann", "ann-secret")
        leaked, _ = named_token(client, mine, "nightly")
        _, replaced = named_token(client, mine, "weekly")
        leak = server.log.parent / "leak.txt"
        leak.write_text(f"curl -H 'X-Token: {leaked}'\n")
        id = client.get("/api/me", headers={"X-Token": mine}).json()["id"]
        *first, _, revoked, new = follow(
            server,
            "A token has leaked",
            {"NAME": "ann", "TOKEN": other, "tokens revoke --id ID": f"tokens revoke --id {id}", "ID": replaced},
        )
        looked, scanned, again, acts = first
        assert all(part in looked for part in ("ann", "nightly", "127.0.0.1", "none noted", "last use"))
        assert "revoked" in scanned
        assert again == "No live tokens.\n"
        assert "login ok, by ann" in acts
        assert "issue_token ok, by ann" in acts
        assert revoked.startswith("Revoked 1 token.")
        assert [probe(client, token) for token in (leaked, other, mine, new.split()[0])] == [False, False, False, True]


def test_a_person_leaves_and_nothing_is_left(server: Server) -> None:
    with server.client() as client:
        token = log_in(client, "ann", "ann-secret")
        headers = {"X-Token": token}
        lease = client.post("/api/pools/phones/leases", json={}, headers=headers).json()
        assert lease["fence"] == 1
        removed, reloaded, ended, proof = follow(server, "A person leaves")
        assert "tokens revoke --user ann --leases" in removed
        assert "users removed: ann" in reloaded
        assert "Ended 1 token, 1 lease and 0 places in line of ann.\n" in ended
        assert "no tokens, leases or places in line of a user with that name." in proof
        assert not probe(client, token)
        body = {"username": "ann", "password": "ann-secret"}
        assert client.post("/api/token", json=body).status_code == 401
        admin = {"X-Token": log_in(client)}
        shown = client.get("/api/pools/phones", headers=admin).json()
        assert (shown["leased"], shown["available"]) == (0, 2)


def test_a_password_that_is_known_is_changed(server: Server) -> None:
    with server.client() as client:
        token = log_in(client, "bob", "bob-secret")
        *_, listed = follow(server, "A password is known to others")
        assert listed == "No tokens.\n"
        assert not probe(client, token)
        assert log_in(client, "bob", "a long password")


def test_a_victim_of_guessing_is_let_in(server: Server) -> None:
    with server.client() as client:
        for _ in range(6):
            client.post("/api/token", json={"username": "ann", "password": "wrong"})
        until(lambda: "ann " in _run(server, "tokenauth throttle list", {}), "the worker has reported")
        wait_for(server.log.with_name("audit.jsonl"), action="login", result="too_many_attempts")
        before, acts, _, after = follow(server, "Someone guesses passwords")
        assert re.search(r"ann  127\.0\.0\.1  5         in ([5-9]|10)m", before)
        assert "login invalid_credentials, user ann, from 127.0.0.1" in acts
        assert "login too_many_attempts, user ann, from 127.0.0.1" in acts
        assert after == "No throttled logins.\n"
        assert log_in(client, "ann", "ann-secret")


def test_a_stuck_lease_is_ended_and_its_device_kept(server: Server) -> None:
    with server.client() as client:
        headers = {"X-Token": log_in(client, "ann", "ann-secret")}
        asked = {"labels": ["pixel-8"], "holder": "job 7"}
        assert client.post("/api/pools/phones/leases", json=asked, headers=headers).status_code == 201
        before, reserved, _, after = follow(server, "A lease is stuck")
        assert "job 7" in before
        assert "ann (holder job 7) still has it. The lease ends in 1h" in reserved
        assert "repair" in after
        assert "job 7" not in after
        assert client.post("/api/pools/phones/leases", json=asked, headers=headers).status_code == 409


def test_a_small_pool_shows_who_waits_and_who_has_it(server: Server) -> None:
    with server.client() as client:
        for name, asked in (("ann", {"count": 2, "holder": "job 7"}), ("bob", {"wait": 0, "holder": "job 8"})):
            headers = {"X-Token": log_in(client, name, f"{name}-secret")}
            assert client.post("/api/pools/phones/leases", json=asked, headers=headers).is_success
        waits, leased = follow(server, "A pool is too small", {"licences": "phones"})
        assert ("job 8" in waits, "job 7" in waits) == (True, False)
        assert ("job 8" in leased, "job 7" in leased) == (False, True)


def test_what_to_look_at_after_an_outage_finds_nothing(server: Server) -> None:
    checked, answer = follow(server, "Answers are 503")
    assert ("0 errors" in checked, answer) == (True, "ready\n")
    _, answer, verified, _ = follow(server, "The disk is full")
    assert (answer, verified[:3]) == ("ready\n", "ok:")
    assert follow(server, "The database restarts") == ["ready\n"]
    checked, _, verified = follow(server, "The audit log cannot be written")
    assert ("0 errors" in checked, verified[:3]) == (True, "ok:")
    assert "0 errors" in follow(server, "A certificate expires")[-1]
    follow(server, "An upgrade")


def test_an_audit_log_with_a_break_begins_again(server: Server) -> None:
    with server.client() as client:
        log_in(client)
        file = server.log.parent / "audit.jsonl"
        wait_for(file, action="login")
        file.with_name("audit.jsonl.1").write_bytes(b"x\n")
        found, *_, last = follow(server, "The audit log has a break")
        assert json.loads(found)["problems"][0]["file"] == f"{file}.1"
        assert "ok: " in last
        assert "are not here" in last


def test_a_refused_reload_says_why_and_is_repeated(server: Server) -> None:
    config = server.log.parent / "config.toml"
    right = config.read_text()
    config.write_text(right.replace("[audit]", "[audi]"))
    assert "there is no such key" in run(config.parent, "reload").stderr
    config.write_text(right)
    follow(server, "A reload is refused")
    wait_for(config.with_name("audit.jsonl"), action="reload", result="ok")
    acts = _run(server, commands("A reload is refused")[-1], {})
    assert [line.partition("  ")[2].partition(",")[0] for line in acts.splitlines()] == ["reload refused", "reload ok"]
