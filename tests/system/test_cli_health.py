"""`tokenauth health`: what a container's health check learns from it."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate
from tests.support.ports import free_port
from tests.support.servers import Server, serve, write_config
from tests.system.test_cli import mistake, output, run, script


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    home = tmp_path_factory.mktemp("health")
    port = free_port()
    with serve(write_config(home, f'[server]\nhost = "0.0.0.0"\nport = {port}\naccept_risks = ["weak_hash", "no_tls"]'),
               "--port", str(port)) as server:  # fmt: skip
        yield home, server


@pytest.mark.parametrize(("arguments", "answer"), [([], "ok\n"), (["--ready"], "ready\n")])
def test_a_server_that_is_well_exits_with_0(served: tuple[Path, Server], arguments: list[str], answer: str) -> None:
    home, _ = served
    assert output(script(home, "health", *arguments)) == answer


def test_a_url_needs_no_configuration(served: tuple[Path, Server], tmp_path: Path) -> None:
    _, server = served
    assert output(run(tmp_path, "health", "--url", server.url)) == "ok\n"


def test_a_server_on_a_unix_socket_is_asked_there(tmp_path: Path) -> None:
    config = write_config(tmp_path, '[server]\nsocket = "t.sock"\naccept_risks = ["weak_hash"]')
    with serve(config, on_port=False):
        assert output(run(tmp_path, "health", "--ready")) == "ready\n"


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[broken", "not TOML"),
        ('[tokens]\nper_usr = "1"', "per_usr"),
        ('[database]\nurl = "${GONE}"', "GONE"),
        (None, "no such file"),
    ],
    ids=["syntax", "key", "variable", "no file"],
)
@pytest.mark.parametrize(
    "more", ["", '[server]\nsocket = "t.sock"\naccept_risks = ["weak_hash"]'], ids=["port", "socket"]
)
def test_a_mistake_in_the_file_does_not_make_its_server_unhealthy(
    tmp_path: Path, more: str, broken: str | None, said: str, ready: bool
) -> None:
    """A container that is restarted for it could not start again."""
    config = write_config(tmp_path, more)
    with serve(config, on_port=not more):
        if broken is None:
            config.unlink()
        else:
            config.write_text(broken)
        found = script(tmp_path, "health", "--config", str(config), *(["--ready"] if ready else []))
        assert (found.returncode, found.stdout) == (0, "ready\n" if ready else "ok\n"), found.stderr
        assert said in found.stderr
        assert found.stderr.endswith("The server goes on with what it has read before.\n")
    assert said in mistake(run(tmp_path, "health", "--config", str(config)))


def test_a_server_on_a_free_port_is_found(tmp_path: Path) -> None:
    with serve(write_config(tmp_path, "[server]\nport = 0"), "--port", "0"):
        assert output(run(tmp_path, "health")) == "ok\n"


def test_a_store_that_is_gone_is_not_ready_but_alive(tmp_path: Path) -> None:
    with serve(write_config(tmp_path)) as server:
        (tmp_path / "tokenauth.db").rename(tmp_path / "moved.db")
        server.wait("store_file_replaced")
        assert output(run(tmp_path, "health", "--url", server.url)) == "ok\n"
        assert "the database file is missing; put it back, then restart" in mistake(
            run(tmp_path, "health", "--ready", "--url", server.url)
        )


def test_a_server_that_does_not_run_exits_with_1(tmp_path: Path) -> None:
    port = free_port()
    write_config(tmp_path, f"[server]\nport = {port}")
    assert mistake(run(tmp_path, "health")) == f"127.0.0.1:{port}: Connection refused"


def test_a_server_that_hangs_exits_with_1(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run(tmp_path, "health", "--url", url, "--timeout", "0.1")
    assert mistake(done).endswith(": did not answer in time")


@pytest.mark.parametrize("tls", [False, True])
def test_a_server_that_hangs_is_asked_once(tmp_path: Path, tls: bool) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        certificate = make_certificate(tmp_path).settings() if tls else ""
        write_config(tmp_path, f"[server]\nport = {silent.getsockname()[1]}\n{certificate}")
        assert mistake(run(tmp_path, "health", "--timeout", "0.1")).endswith(": did not answer in time")
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_a_server_that_is_another_exits_with_1(tmp_path: Path) -> None:
    for status, body in ((200, b"hello"), (200, b"[]"), (200, json.dumps({"status": "fine"}).encode()), (404, b"{}")):
        with answering(status, body) as url:
            assert f"the answer has status {status}, and is not that of tokenauth" in mistake(
                run(tmp_path, "health", "--url", url)
            )


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Serve this answer, and return the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://localhost", "http://", "http://a:b@localhost", "http://h:99999"]
)
def test_an_address_of_another_form_is_wrong_usage(tmp_path: Path, url: str) -> None:
    done = run(tmp_path, "health", "--url", url)
    assert done.returncode == 2
    assert "--url: must be an address such as 'http://127.0.0.1:8000'." in done.stderr


def test_a_free_port_needs_the_address(tmp_path: Path) -> None:
    write_config(tmp_path, "[server]\nport = 0")
    assert "server.port is 0: name the address of the server with --url." in mistake(run(tmp_path, "health"))
