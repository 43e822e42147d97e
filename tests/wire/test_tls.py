"""TLS by the service itself: the same HTTP, certificates that are renewed while it serves, and clients that stall."""

import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest

from tests.support.certificates import Certificate, make_certificate, make_expired
from tests.support.framing import sequences
from tests.support.journal import background, serving, until
from tests.support.main_process import workers_of
from tests.support.scraping import SETTINGS, Scraper
from tests.support.servers import TOKENAUTH, Server, serve, write_config
from tokenauth.errors import ConfigError
from tokenauth.server import tls
from tokenauth.settings.model import ServerSettings

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def trusting(*certificates: Path) -> ssl.SSLContext:
    """Return what a client needs that trusts these certificates only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for certificate in certificates:
        context.load_verify_locations(certificate)
    return context


def wrap(connection: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    try:
        return context.wrap_socket(connection, server_hostname="127.0.0.1")
    except BaseException:
        connection.close()
        raise


def connect(server: Server, context: ssl.SSLContext) -> ssl.SSLSocket:
    return wrap(socket.create_connection(("127.0.0.1", server.port), 30), context)


def ask(connection: socket.socket, request: bytes = HEALTH) -> int:
    """Send a request without a body, read the answer, and return its status; 0 if the connection was closed."""
    connection.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return 0
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < length:
        body += connection.recv(65536)
    return int(head[9:12])


def organization(connection: ssl.SSLSocket) -> str:
    """Return the name of the server's certificate."""
    found = connection.getpeercert()
    assert found is not None
    return str(found["subject"]).partition("'organizationName', '")[2].partition("'")[0]


@contextmanager
def secured(directory: Path, certificate: Certificate, *arguments: str) -> Iterator[Server]:
    config = write_config(directory, f"[server]\n{certificate.settings()}")
    with serve(config, *arguments) as server:
        context = trusting(certificate.certificate)

        def answers() -> bool:
            with suppress(OSError), connect(server, context) as connection:
                return ask(connection) == 200
            return False

        until(answers, "the server answers")
        yield server


@pytest.fixture(scope="module")
def one(directory: Path) -> Certificate:
    return make_certificate(directory)


@pytest.fixture(scope="module")
def server(directory: Path, one: Certificate) -> Iterator[Server]:
    with secured(directory, one) as found:
        yield found


def test_only_tls_1_2_and_later_are_spoken(server: Server, one: Certificate) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = trusting(one.certificate)
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        with connect(server, context) as connection:
            assert ask(connection) == 200
            assert connection.version() == version.name.replace("v1_", "v1.")
            assert connection.selected_alpn_protocol() == "http/1.1"
    old = subprocess.run(
        ["openssl", "s_client", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0", "-connect", f"127.0.0.1:{server.port}"],
        input="",
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "Cipher is (NONE)" in old.stdout


def test_what_is_no_tls_is_closed_without_a_log_line(server: Server, one: Certificate) -> None:
    for sent in (HEALTH, b"\0" * 100, b"\x16\x03\x01\x00\x05hello", b""):
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert b"HTTP/" not in connection.recv(65536)
    with connect(server, trusting(one.certificate)) as connection:
        assert ask(connection) == 200
        connection.unwrap()  # the client ends its side
    with connect(server, trusting(one.certificate)) as connection:
        assert ask(connection) == 200
    assert server.errors() == []
    assert server.events("library_message") == []


def exchange(connection: socket.socket, segments: list[bytes]) -> bytes:
    """Send segments, and return what is answered until the connection closes, without the times."""
    data = b""
    with closing(connection), suppress(OSError):
        connection.settimeout(30)
        connection.sendall(b"".join(segments))
        while part := connection.recv(65536):
            data += part
    return b"\r\n".join(line for line in data.split(b"\r\n") if not line.lower().startswith(b"date:"))


def test_malformed_requests_are_answered_as_without_tls(server: Server, one: Certificate, directory: Path) -> None:
    plain = directory / "plain"
    plain.mkdir()
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with serving(write_config(plain)) as other:
        for segments in islice(sequences(seed=3, odd=True), 60):
            sent = [*segments, b"\r\n\r\n", last]
            expected = exchange(socket.create_connection(("127.0.0.1", other.port), 30), sent)
            assert exchange(connect(server, trusting(one.certificate)), sent) == expected, segments


def test_a_refusal_can_be_read_while_the_body_is_sent(server: Server, one: Certificate) -> None:
    """Closing both sides at once would reset the connection, and the client could lose the answer."""
    for size in (100_000, 4_000_000):
        head = f"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
        answer = exchange(connect(server, trusting(one.certificate)), [head, b"x" * size])
        assert answer.startswith(b"HTTP/1.1 413 "), answer


def test_a_large_answer_is_complete(server: Server, one: Certificate) -> None:
    with connect(server, trusting(one.certificate)) as connection:
        for _ in range(3):
            assert ask(connection, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n") == 200


def copy(source: Certificate, target: Certificate) -> None:
    """Renew a certificate as certbot and Kubernetes do: by a rename."""
    for old, new in zip(source, target, strict=True):
        shutil.copy(old, f"{new}.new")
        os.replace(f"{new}.new", new)


def test_a_renewed_certificate_is_served_after_a_reload(tmp_path: Path) -> None:
    """Without a lost request, over old connections and over new ones."""
    old, new = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new")
    shown = Certificate(tmp_path / "tls.pem", tmp_path / "tls.key")
    copy(old, shown)
    context = trusting(old.certificate, new.certificate)
    with secured(tmp_path, shown, "--workers", "2") as server, ExitStack() as stack:
        kept = stack.enter_context(connect(server, context))

        def probe() -> None:
            nonlocal kept
            if ask(kept, HEALTH) != 200:
                kept.close()  # as clients do: the old worker waits for it
                kept = stack.enter_context(connect(server, context))
                assert ask(kept) == 200

        def probe_once() -> None:
            with connect(server, context) as connection:
                assert ask(connection, HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) == 200

        until(lambda: len(server.events("started")) == 2, "both workers serve")
        with background(probe_once):
            copy(new, shown)
            server.process.send_signal(signal.SIGHUP)

            def old_workers_ended() -> bool:
                probe()
                return len(server.events("stopped")) == 2

            until(old_workers_ended, "the old workers ended")
        for _ in range(5):
            with connect(server, context) as connection:
                assert organization(connection) == "new"
        kept.close()
        assert server.errors() == []
        assert server.stop() == 0


def test_a_broken_renewal_leaves_the_old_certificate(tmp_path: Path) -> None:
    """Also in a worker that starts later: it gets what the main process has read."""
    old, new = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new")
    shown = Certificate(tmp_path / "tls.pem", tmp_path / "tls.key")
    copy(old, shown)
    context = trusting(old.certificate, new.certificate)
    with secured(tmp_path, shown) as server:
        shutil.copy(new.certificate, shown.certificate)  # and not its key
        server.process.send_signal(signal.SIGHUP)
        refused = server.wait("reload_refused")
        assert f"server.tls_key: {shown.key} does not belong to the certificate in" in refused["detail"]
        os.kill(workers_of(server)[0], signal.SIGKILL)
        server.wait("worker_replaced")
        until(lambda: len(server.events("started")) == 2, "a new worker serves")
        with connect(server, context) as connection:
            assert (ask(connection), organization(connection)) == (200, "old")
        shutil.copy(new.key, shown.key)
        server.process.send_signal(signal.SIGHUP)
        server.wait("reloaded")
        server.wait("stopped")
        with connect(server, context) as connection:
            assert (ask(connection), organization(connection)) == (200, "new")


@pytest.mark.extended
def test_stalled_clients_do_not_hold_up_a_stop(tmp_path: Path, one: Certificate) -> None:
    """One that has begun no handshake, and one that is idle, and so does not answer the end of TLS."""
    with (
        secured(tmp_path, one) as server,
        socket.create_connection(("127.0.0.1", server.port), 30),
        connect(server, trusting(one.certificate)) as idle,
    ):
        assert ask(idle) == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, "less than the 30 seconds of grace"
        assert server.errors() == []


def test_queued_connections_are_answered_at_a_stop(tmp_path: Path, one: Certificate) -> None:
    """SIGSTOP holds the workers while clients connect. Their handshakes end while the workers stop."""
    context, answers = trusting(one.certificate), list[int]()
    with secured(tmp_path, one, "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        workers = workers_of(server)
        for process in workers:
            os.kill(process, signal.SIGSTOP)
        sockets = [socket.create_connection(("127.0.0.1", server.port), 60) for _ in range(20)]

        def run(connection: socket.socket) -> None:
            with wrap(connection, context) as wrapped:
                answers.append(ask(wrapped))

        threads = [threading.Thread(target=run, args=[each]) for each in sockets]
        for thread in threads:
            thread.start()
        server.process.send_signal(signal.SIGTERM)
        server.wait("stopping")
        for process in workers:
            os.kill(process, signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert answers == [200] * 20
        assert server.process.wait(60) == 0


def test_a_client_that_has_read_all_does_not_delay_a_stop(tmp_path: Path, one: Certificate) -> None:
    """It keeps its connection and does not end TLS."""
    request = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with secured(tmp_path, one) as server, connect(server, trusting(one.certificate)) as client:
        client.sendall(request)
        assert sum(iter(lambda: len(client.recv(1 << 20)), 0)) > 100_000
        assert server.stop() == 0
        assert server.errors() == []


def test_a_renewal_with_which_no_client_connects_is_refused(tmp_path: Path, one: Certificate) -> None:
    """A program that adds each renewal to the file, in place of replacing it, ends there."""
    shown = Certificate(tmp_path / "tls.pem", tmp_path / "tls.key")
    copy(one, shown)
    with secured(tmp_path, shown) as server:
        shown.certificate.write_bytes(one.certificate.read_bytes() * 302)
        server.process.send_signal(signal.SIGHUP)
        refused = server.wait("reload_refused")
        assert (
            f"server.tls_certificate: {shown.certificate} has 302 certificates, which is too large" in refused["detail"]
        )
        with connect(server, trusting(one.certificate)) as connection:
            assert ask(connection) == 200


def mistake(certificate: Certificate) -> str:
    with pytest.raises(ConfigError) as refusal:
        tls.read(ServerSettings(tls_certificate=str(certificate.certificate), tls_key=str(certificate.key)))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def broken_files(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Yield names and contents of broken files, and what is said of them."""
    first, second, *others = good.splitlines(keepends=True)
    yield "empty", b"", "is empty"
    yield "blank", b"\r\n", "is empty"
    yield "binary", bytes(range(256)) * 10, "has no "
    yield "page", b"<html>404</html>", "has no "
    yield "wide", good.decode().encode("utf-16"), "has no "
    yield "large", b"# a comment\n" * 100_000 + good, "has more than 1 MiB"
    yield "cut", good[: len(good) // 2], "has a "
    yield "cut at the end", good[:-10], "has a "
    yield "without a line", b"".join([first, *others]), "is damaged"
    yield "with another line", b"".join([first, b"!" * 64 + b"\n", second, *others]), "is damaged"


def test_each_broken_pair_is_named(tmp_path: Path, one: Certificate) -> None:
    other = make_certificate(tmp_path, "other")
    pem, key = one
    assert "does not belong to the certificate in" in mistake(Certificate(pem, other.key))
    rsa = tmp_path / "rsa"
    subprocess.run(["openssl", "genrsa", "-out", str(rsa), "2048"], check=True, capture_output=True)
    assert "does not belong to the certificate in" in mistake(Certificate(pem, rsa))
    put = "; put it there, or change server.tls_"
    none = f"{tmp_path / 'none'} cannot be read: No such file or directory{put}"
    assert mistake(Certificate(tmp_path / "none", key)) == f"server.tls_certificate: {none}certificate"
    assert mistake(Certificate(pem, tmp_path / "none")) == f"server.tls_key: {none}key"
    assert mistake(Certificate(pem, tmp_path)).startswith("server.tls_key: ")
    assert "has no certificate in PEM form" in mistake(Certificate(key, key))
    assert "has no private key in PEM form" in mistake(Certificate(pem, pem))
    for kind, what in (("certificate", f"certificate 1 in {tmp_path}/"), ("key", f"the private key in {tmp_path}/")):
        for name, content, problem in broken_files(one[kind == "key"].read_bytes()):
            file = tmp_path / f"{kind} {name}"
            file.write_bytes(content)
            pair = Certificate(file, key) if kind == "certificate" else Certificate(pem, file)
            says = f"{what}{file.name} {problem}" if problem == "is damaged" else f"{file} {problem}"
            assert mistake(pair).startswith(f"server.tls_{kind}: {says}")
            assert "; " in mistake(pair)
    unusual = make_certificate(tmp_path, "unusual", curve="secp224r1")
    assert "no client can connect with " in mistake(unusual)
    assert "renew both, with an RSA key" in mistake(unusual)
    locked = tmp_path / "locked"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:hunter2", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    assert "is encrypted; store it without a passphrase" in mistake(Certificate(pem, locked))


def test_a_certificate_with_too_many_names_is_refused(tmp_path: Path, one: Certificate) -> None:
    """Also with that of its issuer in the same file."""
    names = ",".join(f"DNS:name-{number:050}.example.com" for number in range(1600))  # 110 KB; clients take 100
    large = make_certificate(tmp_path, "large", f"issuerAltName={names}")
    expected = f"server.tls_certificate: the certificate in {large.certificate} is too large for clients"
    assert mistake(large) == f"{expected}; renew it for fewer names"
    large.certificate.write_bytes(large.certificate.read_bytes() + one.certificate.read_bytes())
    assert mistake(large).startswith(expected)


def test_one_file_can_have_both(tmp_path: Path, one: Certificate) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(one.certificate.read_bytes() + one.key.read_bytes())
    pair = tls.read(ServerSettings(tls_certificate=str(both), tls_key=str(both)))
    assert pair is not None
    assert "PRIVATE" not in repr(pair).replace("BEGIN PRIVATE", "") or "key=" not in repr(pair)


def test_a_broken_pair_ends_the_start_with_its_reason(tmp_path: Path, one: Certificate) -> None:
    other = make_certificate(tmp_path, "other")
    config = write_config(tmp_path, f"[server]\n{Certificate(one.certificate, other.key).settings()}")
    command = [TOKENAUTH, "serve", "-c", str(config), "-p", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "configuration_refused" in done.stderr
    assert "does not belong to the certificate" in done.stderr
    assert "Traceback" not in done.stderr


def read(certificate: Certificate) -> tls.KeyPair:
    pair = tls.read(ServerSettings(tls_certificate=str(certificate.certificate), tls_key=str(certificate.key)))
    assert pair is not None
    return pair


def validity(certificate: Certificate) -> tls.Validity:
    return tls.Validity(read(certificate))


def test_the_validity_of_a_certificate_is_known(tmp_path: Path, one: Certificate) -> None:
    good = validity(one)
    assert (good.names, good.problem) == (("127.0.0.1", "localhost"), "")
    assert good.until is not None
    expired = validity(make_expired(tmp_path))
    assert expired.problem == "certificate has expired"
    assert expired.until is not None
    assert expired.until < good.until


@pytest.mark.parametrize("usage", ["clientAuth", "codeSigning"])
def test_the_end_is_known_whatever_the_certificate_is_for(tmp_path: Path, usage: str) -> None:
    made = make_certificate(tmp_path, usage, f"extendedKeyUsage={usage}")
    found = validity(made)
    assert found.problem == "unsuitable certificate purpose"
    assert found.until is not None
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-in", made.certificate], check=True, capture_output=True, text=True
    )
    assert found.until.timestamp() == ssl.cert_time_to_seconds(shown.stdout.strip().removeprefix("notAfter="))


@contextmanager
def descriptors(left: int) -> Iterator[None]:
    """Let this process open at most `left` more files."""
    first = os.dup(0)
    os.close(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_the_end_is_unknown_and_nothing_fails(one: Certificate) -> None:
    """Reading takes one descriptor, and trying the certificate a second one."""
    pair = read(one)
    for left in (0, 1):
        with descriptors(left):
            found, text = tls.Validity(pair), mistake(one)
        assert (found.until, found.names) == (None, ())
        assert "Too many open files" in found.problem
        assert "Too many open files" in text


def add_comments(source: Certificate, target: Certificate, encoding: str) -> None:
    """Copy a certificate with what `openssl pkcs12` writes before it, in a name's letters."""
    for old, new in zip(source, target, strict=True):
        new.write_bytes("Bag Attributes\n    friendlyName: Müller\n".encode(encoding) + old.read_bytes())


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_comment_in_the_files_may_have_any_letters(tmp_path: Path, encoding: str) -> None:
    """At the start and after a reload, which retires the old worker."""
    old, new = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new", "extendedKeyUsage=serverAuth")
    shown = Certificate(tmp_path / "tls.pem", tmp_path / "tls.key")
    add_comments(old, shown, encoding)
    context = trusting(old.certificate, new.certificate)
    with serve(write_config(tmp_path, f"{SETTINGS}[server]\n{shown.settings()}")) as server:
        scraper = Scraper(server)
        server.wait("started")
        with connect(server, context) as connection:
            assert (ask(connection), organization(connection)) == (200, "old")
        add_comments(new, shown, encoding)
        server.process.send_signal(signal.SIGHUP)
        server.wait("reloaded")
        server.wait("stopped")
        with connect(server, context) as connection:
            assert (ask(connection), organization(connection)) == (200, "new")
        end = validity(new).until
        assert end is not None
        assert scraper.value("tls_certificate_expiry_timestamp_seconds") == end.timestamp()
        assert server.errors() == []
        assert server.stop() == 0


def test_the_end_of_the_certificate_is_a_metric(tmp_path: Path, one: Certificate) -> None:
    """Of the one in use: a renewed one counts after the reload, and also an expired one is shown."""
    shown = Certificate(tmp_path / "tls.pem", tmp_path / "tls.key")
    copy(make_expired(tmp_path), shown)
    with serve(write_config(tmp_path, f"{SETTINGS}[server]\n{shown.settings()}")) as server:
        scraper = Scraper(server)
        refused = server.wait("certificate_refused")
        assert (refused["reason"], refused["action"]) == ("certificate has expired", "renew it, then reload")
        before = scraper.value("tls_certificate_expiry_timestamp_seconds")
        assert before is not None
        assert before < time.time()
        copy(one, shown)
        assert scraper.value("tls_certificate_expiry_timestamp_seconds") == before
        server.process.send_signal(signal.SIGHUP)
        server.wait("reloaded")
        assert server.events("certificate_refused") == [refused]
        after = scraper.value("tls_certificate_expiry_timestamp_seconds")
        assert after is not None
        assert after > time.time()
