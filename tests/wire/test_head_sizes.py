"""The limit of 16 KiB for a head, a chunk's line and trailers is exact, wherever the reads of the socket are cut."""

import re
import socket
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from tests.support.journal import serving
from tests.support.servers import Server, write_config

LIMIT = 16 * 1024
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b"a=\r\n\r\n" + b"b" * 894
LENGTH = b"DELETE /api/token?token=a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
CHUNKED = b"DELETE /api/token?token=a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(write_config(tmp_path_factory.mktemp("heads"))) as server:
        yield server


def head(size: int, more: bytes = b"", method: bytes = b"GET /healthz") -> bytes:
    """Return a head of this size."""
    start = b"%b HTTP/1.1\r\nHost: x\r\n%b" % (method, more)
    fields = b""
    while (left := size - len(start) - len(fields) - 2) > 1000:
        fields += b"x: %b\r\n" % (b"v" * 800)
    return start + fields + b"x: %b\r\n\r\n" % (b"v" * (left - 5))


def framings(size: int) -> dict[str, tuple[bytes, bytes, int]]:
    """Return, by name: what comes first, what has the size, and how many answers there are before it."""
    delete = b"DELETE /api/token?token=a"
    return {
        "alone": (b"", head(size), 0),
        "length": (b"", head(size, b"Content-Length: 2\r\n", delete) + b"{}", 0),
        "chunked": (b"", head(size, b"Transfer-Encoding: chunked\r\n", delete) + b"2\r\n{}\r\n0\r\n\r\n", 0),
        "behind GET": (GET, head(size), 1),
        "behind a body": (LENGTH, head(size), 1),
        "behind chunks": (CHUNKED + b"6\r\n\r\n\r\n{}\r\n0\r\nt: v\r\n\r\n", head(size), 1),
        "after a blank line": (b"\r\n", head(size), 0),
        "after two blank lines": (GET + b"\r\n\r\n", head(size), 1),
        "upgrade": (b"", head(size, b"Connection: upgrade\r\nUpgrade: h2c\r\n"), 0),
        "expect": (b"", head(size, b"Expect: 100-continue\r\nContent-Length: 2\r\n", delete) + b"{}", 0),
        "chunk line": (CHUNKED, b"2;" + b"e" * (size - 4) + b"\r\n{}\r\n0\r\n\r\n", 0),
        "later chunk line": (CHUNKED + b"2\r\n\r\n\r\n", b"2;" + b"e" * (size - 4) + b"\r\n{}\r\n0\r\n\r\n", 0),
        "trailers": (CHUNKED + b"2\r\n{}\r\n0;e\r\n", b"t: v\r\nt: " + b"v" * (size - 13) + b"\r\n\r\n", 0),
    }


def cuts(first: bytes, second: bytes) -> dict[str, Sequence[bytes]]:
    data, border = first + second, len(first)
    odd = sorted({0, 1, border, border + 1, border + 999, len(data) - 1, len(data), *range(1023, len(data), 1021)})
    ends = sorted({0, max(0, border - 1), border + 16380, border + 16382, border + 16384, len(data)})
    return {
        "one write": [data],
        "two": [part for part in (first, second) if part],
        "odd": [data[a:b] for a, b in pairwise(odd) if data[a:b]],
        "ends": [data[a:b] for a, b in pairwise(ends) if data[a:b]],
        "bytes": [first[:1], first[1:], *(second[i : i + 1] for i in range(40)), second[40:-40]]
        + [bytes([byte]) for byte in second[-40:]],
    }


@pytest.mark.parametrize(
    "size", [LIMIT, LIMIT + 1, *(pytest.param(size, marks=pytest.mark.faults) for size in (LIMIT - 1, LIMIT + 2))]
)
@pytest.mark.parametrize("name", framings(LIMIT))
def test_the_limit_is_exact_in_every_cut(server: Server, name: str, size: int) -> None:
    first, second, before = framings(size)[name]
    wanted = [200] * before + [200 if size <= LIMIT else 431]
    found = {cut: statuses(server.port, parts) for cut, parts in cuts(first, second).items()}
    assert found == dict.fromkeys(found, wanted)


def statuses(port: int, parts: Sequence[bytes]) -> list[int]:
    """Send parts, each in its own packet, end this side, and return the status of each answer."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        for part in parts:
            connection.sendall(part)
            connection.settimeout(0.001)
            try:
                data += connection.recv(65536)  # also gives the server time to read the part
            except TimeoutError:
                pass
            except ConnectionError:
                break
        connection.settimeout(20)
        connection.sendall(GET.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        while more := connection.recv(65536):
            data += more
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", data) if status != b"100"]
    return found if found[-1] == 431 else found[:-1]


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /healthz RTSP/1.0\r\nHost: x",
        b"SOURCE / ICE/1.0\r\nHost: x",
        b"GET  /healthz HTTP/1.1\r\nHost: x",
        b"GET /healthz  HTTP/1.1\r\nHost: x",
        b"GET /healthz#f HTTP/1.1\r\nHost: x",
        b"GET /healthz# HTTP/1.1\r\nHost: x",
        b"GET http://u:p@x/healthz HTTP/1.1\r\nHost: x",
        b"GET http://@x/healthz HTTP/1.1\r\nHost: x",
        b"GET ftp://x/healthz HTTP/1.1\r\nHost: x",
        b"GET http:///healthz HTTP/1.1\r\nHost: x",
        b"GET http://x/healthz#f HTTP/1.1\r\nHost: x",
        b"FOO /auth HTTP/1.1\r\nHost: x",
        b"GET /auth\x01 HTTP/1.1\r\nHost: x",
    ],
)
def test_what_is_no_request_is_400_in_every_cut(server: Server, request_: bytes) -> None:
    data = request_ + b"\r\n\r\n"
    for parts in ([data], [data[i : i + 1] for i in range(len(data))], [data[:9], data[9:]]):
        assert first_status(server.port, parts) == 400


@pytest.mark.parametrize("request_", [b"GET /auth HTTP/9.9\r\nHost: x", b"GET  /auth RTSP/1.0", b"GET /auth HTTP/1.1"])
def test_a_broken_request_of_auth_is_401_in_every_cut(server: Server, request_: bytes) -> None:
    data = request_ + b"\r\n\r\n"
    for parts in ([data], [data[i : i + 1] for i in range(len(data))], [data[:9], data[9:]]):
        assert first_status(server.port, parts) == 401


@pytest.mark.parametrize("target", [b"http://x/healthz", b"HTTP://x:80/healthz?a", b"/healthz?a=@b"])
def test_a_complete_address_is_a_target(server: Server, target: bytes) -> None:
    assert first_status(server.port, [b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target]) == 200


def first_status(port: int, parts: Sequence[bytes]) -> int:
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            try:
                connection.sendall(part)
            except ConnectionError:
                break
        return int(connection.recv(65536)[9:12])


REFUSED = {
    "two Hosts": (b"Host: x\r\nHost: x\r\n\r\n", 400),
    "a line without a colon": (b"Host: x\r\nno colon\r\n\r\n", 400),
    "a head that is too long": (b"Host: x\r\nx: " + b"v" * LIMIT + b"\r\n\r\n", 431),
    "a broken chunk": (b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", 400),
}


@pytest.mark.parametrize("first", [b"", b"\r\n", GET], ids=["alone", "after a blank line", "behind GET"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_head_request_gets_no_body(server: Server, what: str, first: bytes) -> None:
    rest, status = REFUSED[what]
    for method in (b"HEAD", b"GET"):
        with socket.create_connection(("127.0.0.1", server.port), 10) as client:
            client.sendall(first + method + b" /api/me HTTP/1.1\r\n" + rest)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        head, _, body = answer.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
        assert (head[:3], bool(body)) == (b"%d" % status, method == b"GET")
        assert b"content-length: " in head
