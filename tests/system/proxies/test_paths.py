"""A request that an application may read as a path below /reports needs the scope."""

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from posixpath import normpath
from urllib.parse import unquote_to_bytes

import pytest

from tests.system.proxies.peers import ask
from tests.system.proxies.running import Proxy

DETOURS = [
    "/reports/x",
    "/reports/../x",
    "/reports/..",
    "/reports/..;/x",
    "/reports/..%2fx",
    "/reports/%2e%2e/x",
    "/reports;x=y/",
    "/reports#x",
    "/reports%2f",
    "/reports%2f..%2f..%2fx",
    "/reports%3b/",
    "/reports%23",
    "/reports\\..\\x",
    "//reports/",
    "///reports",
    "//x/../reports/",
    "/./reports",
    "/%2e/reports",
    "/.;/reports/",
    "/;x/reports",
    "/;/reports",
    "/x/../reports/",
    "/x/..;/reports/",
    "/x/..;y=z/reports/",
    "/x/%2e%2e/reports/",
    "/x/.%2e/reports/",
    "/x%2f..%2freports/",
    "/x/..%2freports/",
    "/x/..%5creports/",
    "/x\\..\\reports/",
    "/%5creports",
    "/\\reports",
    "/%2freports/",
    "/%2Freports/",
    "/%72eports/",
    "/%72%65%70%6f%72%74%73/",
    "/%2572eports/",
    "/%252freports/",
    "/x/%252e%252e/reports/",
    "/x#/../reports/",
    "/x;/../reports/",
    "/x%00/../reports/",
    "/x%3f/../reports/",
    "/x%23/../reports/",
    "/../reports/",
    "/..//reports/",
    "/x//../reports/",
    "/x/y/../..//reports/",
    "http://app.example.com/reports/",
    "http://app.example.com//reports/",
    "http://other.example.com/x/../reports/",
    "HTTP://app.example.com/%72eports/",
]


def readings(target: bytes) -> set[bytes]:
    """Return all paths that a target may mean to an application that decodes and normalizes in any order."""
    path = re.sub(rb"^[a-zA-Z]+://[^/]*", b"", target.partition(b"?")[0])
    found, todo = set[bytes](), {path}
    while todo:
        path = todo.pop()
        found.add(path)
        todo |= {
            unquote_to_bytes(path),
            path.partition(b"#")[0],
            re.sub(rb";[^/]*", b"", path),
            path.replace(b"\\", b"/"),
            re.sub(rb"/+", b"/", path),
            re.sub(rb"/+", b"/", normpath(path)) if path.startswith(b"/") else path,
        } - found
    return found


def is_report(target: bytes) -> bool:
    """Whether some application may read it as a path below /reports."""
    return any(path == b"/reports" or path.startswith(b"/reports/") for path in readings(target))


def test_no_detour_leads_to_the_reports(proxy: Proxy, bob: str) -> None:
    for target in DETOURS:
        assert is_report(target.encode())
        reply, arrived = proxy.ask(target, bob)
        assert not [request.target for request in arrived if is_report(request.target)], target
        assert reply.status in {400, 403, 404} or arrived, target
        assert proxy.ask(target)[1] == [], target


ODD = ["%", "%z", "%zz", "%2", "%2g", "%g2", "%%", "%%72", "%2%65", "%e", "%u0072", "% ", "%+1", "%0x", "%00", "%c0%af"]
DETOUR = [
    "",
    "/..",
    "/../x",
    "/..;/x",
    "/.;/",
    "/;",
    ";a=b",
    "\\",
    "/..\\x",
    "//",
    "%2f",
    "%2e%2e",
    "/%2e%2e/x",
    "%5c",
    "%23",
]
FRAMES = [
    *(
        "/reports/{odd}{detour}",
        "/reports{detour}{odd}",
        "/reports{odd}/",
        "/{odd}/..{detour}/reports/1",
        "/reports/{odd}?x",
    ),
    *(
        "/{odd}{detour}/../reports/1",
        "/x{detour}/../reports/{odd}",
        "{detour}/reports/{odd}",
        "//reports{detour}/{odd}",
    ),
    *(
        "/x/../reports/{odd}{detour}",
        "/%72eports/{odd}{detour}",
        "/%2e/reports/{odd}{detour}",
        "/.{detour}/reports/{odd}",
    ),
    "http://app.example.com/reports/{odd}{detour}",
]


def list_broken(every: bool) -> list[str]:
    """Fill in the frames in every way, or so that each frame gets each odd escape and each detour once."""
    found = set[str]()
    for (place, frame), (number, odd) in product(enumerate(FRAMES), enumerate(ODD)):
        detours = DETOUR if every else [DETOUR[(place + number) % len(DETOUR)]]
        found |= {frame.format(odd=odd, detour=detour) for detour in detours}
    return sorted(target for target in found if " " not in target and target.startswith(("/", "http")))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["pairs", "all"])
def test_no_broken_escape_leads_to_the_reports(proxy: Proxy, bob: str, every: bool) -> None:
    """A path that cannot be decoded is refused, or needs the scope. No rule may be skipped for it."""
    proxy.upstream.take()
    with ThreadPoolExecutor(8) as threads:
        asked = threads.map(lambda target: ask(proxy.port, target, [("X-Token", bob)]).status, list_broken(every))
    assert set(asked) <= {200, 400, 403, 404}
    assert [request.target for request in proxy.upstream.take() if is_report(request.target)] == []


@pytest.mark.parametrize("target", ["*", "/", "//", "/?", "/_auth/any", "/_auth/reports", "/auth", "x", "/x\ty"])
def test_no_odd_target_passes_without_a_token(proxy: Proxy, target: str) -> None:
    reply, arrived = proxy.ask(target)
    assert (reply.status in {400, 401, 404}, arrived) == (True, [])


@pytest.mark.parametrize(
    "target", ["/a/b", "/a%20b", "/%C3%A4", "/a+b", "/~a", "/a,b", "/a:b@c", "/a.b", "/a/", "/reports%20"]
)
def test_other_paths_reach_the_application_unchanged(proxy: Proxy, ann: str, target: str) -> None:
    reply, [request] = proxy.ask(target + "?q=%2f%25", ann)
    assert reply.status == 200
    path, _, query = request.target.partition(b"?")
    assert (unquote_to_bytes(path), query) == (unquote_to_bytes(target), b"q=%2f%25")
