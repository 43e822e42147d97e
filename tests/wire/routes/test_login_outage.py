"""The login page while the store is down: it says so with 503, and a log-out works all the same."""

import resource
from pathlib import Path

from tests.support.browsing import Visitor, hidden, text_of
from tests.support.connections import LOGIN, Connection
from tests.support.journal import until
from tests.support.servers import probe, worker, write_config


def test_a_full_disk_refuses_a_login_and_no_log_out(tmp_path: Path) -> None:
    """A limit on the size of files simulates the full disk. The log file is smaller than the limit."""
    config = write_config(tmp_path, '[browser]\nurl = "http://localhost:8000"\n[tokens]\nper_user = 0')
    with worker(config) as server, server.client() as client, Connection(server.port) as connection:
        visitor, other = Visitor(client), Visitor(client)
        assert visitor.log_in().status_code == 303
        token = visitor.cookies["tokenauth"]
        for _ in range(40):  # so that the limit is above the size of the log
            connection.log_in()
        room = (tmp_path / "tokenauth.db-wal").stat().st_size
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        until(lambda: connection.ask("POST", "/api/token", LOGIN).status == 503, "the disk is full")
        description = connection.ask("POST", "/api/token", LOGIN).json()["error_description"]
        assert description.startswith("The database cannot be written, so nothing can be made or changed now; valid")

        answer = other.log_in()
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "the database is unavailable" in text_of(answer.text)
        assert hidden(answer.text, "csrf")
        assert "tokenauth" not in other.cookies

        assert "You are logged in as ann" in text_of(visitor.get("/login").text), "validation does not write"
        answer = visitor.log_out()
        assert (answer.status_code, answer.headers["location"]) == (303, "/logout?done=1")
        assert "tokenauth" not in visitor.cookies
        assert not probe(client, token)
        assert server.events("revocation_held_in_memory")


def test_a_store_that_cannot_be_read_is_503(tmp_path: Path) -> None:
    """No one is told that they are logged out, and the cookie stays."""
    config = write_config(tmp_path, '[browser]\nurl = "http://localhost:8000"\n[tokens]\ncache_size = 1')
    with worker(config) as server, server.client() as client, Connection(server.port) as connection:
        visitor = Visitor(client)
        visitor.log_in()
        connection.log_in()  # takes the only place in the cache
        database = tmp_path / "tokenauth.db"
        for file in (database, Path(f"{database}-wal"), Path(f"{database}-shm")):
            file.rename(f"{file}.moved")
        cookies = dict(visitor.cookies)
        until(lambda: visitor.get("/login").status_code == 503, "the moved file is noticed")
        for path in ("/login", "/"):
            answer = visitor.get(path)
            assert answer.status_code == 503
            assert "the database is unavailable" in text_of(answer.text)
        description = connection.ask("POST", "/api/token", LOGIN).json()["error_description"]
        assert description.startswith("The database is unavailable, so no token can be checked")
        cookie = f"tokenauth={visitor.cookies['tokenauth']}"
        asked = connection.ask("GET", "/auth?cookie&login=redirect", Cookie=cookie, Sec_Fetch_Mode="navigate")
        assert asked.status == 503
        page = visitor.get("/logout")
        assert page.status_code == 200
        assert "Log out" in text_of(page.text)
        assert dict(visitor.cookies) == cookies
