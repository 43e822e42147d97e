"""After a log-out its token is refused, with any encoding, escaping or line wrapping."""

import asyncio
import gzip
import json
import quopri
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, reduce
from itertools import product
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from tests.support.connections import Connection
from tests.support.servers import Server
from tokenauth.values import new_value
from tokenauth.web import logout_tokens
from tokenauth.web.logout_tokens import find_logout_tokens, unpack
from tokenauth.web.requests import MAX_BODY, Request

KIB = 1024
Headers = Sequence[tuple[bytes, bytes]]

CUTS: dict[str, Callable[[str], str]] = {
    "whole": lambda token: token,
    "by a line break": lambda token: f"{token[:40]}\n{token[40:]}",
    "by CRLF": lambda token: f"{token[:1]}\r\n{token[1:]}",
    "by a folded line": lambda token: f"{token[:63]}\r\n {token[63:]}",
    "by a tab": lambda token: f"{token[:32]}\n\t{token[32:]}",
    "by a blank": lambda token: f"{token[:20]} {token[20:]}",
    "by an indented line": lambda token: f"{token[:20]}  \n    {token[20:]}",
    "by a backslash": lambda token: f"{token[:30]}\\\n{token[30:]}",
    "by a backslash and CRLF": lambda token: f"{token[:30]}\\\r\n{token[30:]}",
    "by quoted-printable": lambda token: f"{token[:50]}=\r\n{token[50:]}",
    "in three": lambda token: f"{token[:20]}\n{token[20:50]}\n{token[50:]}",
}

TEXTS: dict[str, Callable[[str], str]] = {
    "JSON": lambda token: f'{{"token": "{token}"}}',
    "JSON, escaped": lambda token: json.dumps({"token": token}),
    "JSON with a trailing comma": lambda token: f'{{"token": "{token}",}}',
    "JSON in single quotes": lambda token: f"{{'token': '{token}'}}",
    "JSON of escapes": lambda token: '{"token": "' + "".join(f"\\u{ord(letter):04x}" for letter in token) + '"}',
    "JSON in JSON": lambda token: json.dumps(json.dumps({"token": token})),
    "escapes in JSON in JSON": lambda token: json.dumps(
        '{"token": "' + "".join(f"\\u{ord(letter):04X}" for letter in token) + '"}'
    ),
    "JavaScript escapes": lambda token: "token='" + "".join(f"\\x{ord(letter):02x}" for letter in token) + "'",
    "a form": lambda token: urlencode({"a": "b", "token": token, "c": "d"}),
    "a percent-encoded form": lambda token: "token=" + "".join(f"%{ord(letter):02x}" for letter in token),
    "a form of JSON": lambda token: urlencode({json.dumps({"token": token}): ""}),
    "a form in a form": lambda token: urlencode({"form": urlencode({"token": token})}),
    "escape()": lambda token: "token=" + "".join(f"%u{ord(letter):04X}" for letter in token),
    "text": lambda token: f"Please log out the token: {token}.\n",
    "bare": lambda token: token,
    "a line": lambda token: f"{token}\n",
    "quoted-printable": lambda token: quopri.encodestring(f"token={token}\n".encode()).decode(),
    "XML": lambda token: f"<token>{token}</token>",
    "YAML": lambda token: f"token: '{token}'",
}

CHARSETS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def deflated(data: bytes) -> bytes:
    """Compress without the zlib header, as some clients send `deflate`."""
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return engine.compress(data) + engine.flush()


def members(data: bytes, count: int) -> bytes:
    """Compress as a gzip file of several members."""
    size = max(1, -(-len(data) // count))
    return b"".join(gzip.compress(data[at : at + size]) for at in range(0, len(data), size))


def with_file_name(data: bytes) -> bytes:
    """Compress with a file name in the gzip header."""
    plain = gzip.compress(data)
    return plain[:3] + b"\x08" + plain[4:10] + b"body.json\0" + plain[10:]


ENCODINGS: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "none": (b"", bytes),
    "identity": (b"identity", bytes),
    "gzip": (b"gzip", gzip.compress),
    "x-gzip": (b"X-GZIP", gzip.compress),
    "gzip, two members": (b"gzip", lambda data: members(data, 2)),
    "gzip, five members": (b"gzip", lambda data: members(data, 5)),
    "gzip with a name": (b"gzip", with_file_name),
    "gzip with trailing data": (b"gzip", lambda data: gzip.compress(data) + b"\0\0junk"),
    "gzip with a wrong checksum": (b"gzip", lambda data: gzip.compress(data)[:-8] + b"12345678"),
    "truncated gzip": (b"gzip", lambda data: gzip.compress(data)[:-5]),
    "deflate": (b"deflate", zlib.compress),
    "deflate, without a header": (b"deflate", deflated),
    "deflate with a wrong checksum": (b"deflate", lambda data: zlib.compress(data)[:-4] + b"1234"),
    "gzip declared as deflate": (b"deflate", gzip.compress),
    "deflate declared as gzip": (b"gzip", zlib.compress),
    "gzip that is not declared": (b"", gzip.compress),
    "gzip declared as br": (b"br", gzip.compress),
    "plain text declared as gzip": (b"gzip", bytes),
    "plain text declared as deflate": (b"deflate", bytes),
    "gzip in gzip": (b"gzip, gzip", lambda data: gzip.compress(gzip.compress(data))),
    "gzip in gzip, declared once": (b"gzip", lambda data: gzip.compress(gzip.compress(data))),
    "deflate in gzip": (b"deflate, gzip", lambda data: gzip.compress(zlib.compress(data))),
    "deflate without a header in gzip": (b"deflate,identity,gzip", lambda data: gzip.compress(deflated(data))),
    "gzip in deflate": (b"gzip, deflate", lambda data: deflated(gzip.compress(data))),
    "three deep": (b"deflate, gzip, deflate", lambda data: deflated(members(zlib.compress(data), 2))),
}


def write(token: str, cut: str, form: str, charset: str, encoding: str) -> tuple[Headers, bytes]:
    """Return the headers and the body of a log-out."""
    declared, encode = ENCODINGS[encoding]
    headers = [(b"content-encoding", declared)] if declared else []
    return headers, encode(TEXTS[form](CUTS[cut](token)).encode(charset))


def find(headers: Headers, body: bytes, query: bytes = b"") -> list[bytes]:
    """Return the tokens found in a log-out, in process."""
    return asyncio.run(reading(headers, body, query))


async def reading(headers: Headers, body: bytes, query: bytes = b"") -> list[bytes]:
    """Return the tokens found in a log-out."""
    scope = {"type": "http", "headers": list(headers), "query_string": query}

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return list(await find_logout_tokens(Request(scope, receive)))


Combination = tuple[str, str, str, str]

PAIRS = [
    *product(CUTS, TEXTS, ["utf-8"], ["none"]),
    *product(["whole"], TEXTS, CHARSETS, ["none"]),
    *product(["by a line break"], TEXTS, ["utf-8"], ENCODINGS),
    *product(CUTS, ["JSON"], CHARSETS, ["three deep"]),
]


async def missed(combinations: Iterable[Combination]) -> list[Combination]:
    """Return the combinations in which a token is not found."""
    tokens = {combination: new_value() for combination in combinations}
    return [
        combination
        for combination, token in tokens.items()
        if token.encode() not in await reading(*write(token, *combination))
    ]


async def test_a_token_is_found_in_every_form() -> None:
    assert await missed(PAIRS) == []


@pytest.mark.faults
async def test_a_token_is_found_in_all_combinations() -> None:
    assert await missed(product(CUTS, TEXTS, CHARSETS, ENCODINGS)) == []


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    with Connection(server.port) as connected:
        yield connected


def test_no_log_out_leaves_a_token_alive(connection: Connection) -> None:
    """Over a socket, with a sample of the combinations."""

    @settings(max_examples=40)
    @given(*(st.sampled_from(list(some)) for some in (CUTS, TEXTS, CHARSETS, ENCODINGS)), st.booleans())
    def check(cut: str, form: str, charset: str, encoding: str, chunked: bool) -> None:
        token = connection.log_in()
        headers, body = write(token, cut, form, charset, encoding)
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        if chunked:
            framed = b"".join(b"%x\r\n%s\r\n" % (len(body[at:][:50]), body[at:][:50]) for at in range(0, len(body), 50))
            lines, body = lines + b"Transfer-Encoding: chunked\r\n", framed + b"0\r\n\r\n"
        else:
            lines += b"Content-Length: %d\r\n" % len(body)
        answer = connection.send(b"DELETE /api/token HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n" + body)
        assert (answer.status, answer.json()) == (200, {"valid": False, "expiry_time": None})
        assert not connection.valid(token)

    check()


@pytest.mark.parametrize("form", ["a form", "a percent-encoded form", "JSON of escapes", "bare"])
def test_a_token_in_the_query_is_found_in_every_spelling(form: str) -> None:
    token = new_value()
    for cut in CUTS.values():
        assert token.encode() in find((), b"", quote(TEXTS[form](cut(token)), safe="=&%\\").encode())


TOKEN = "T1" * 32
OTHER = "O2" * 32
SENT = ((b"x-token", TOKEN.encode()),)


NAMING: dict[str, Callable[[str], str]] = {
    "JSON": lambda token: json.dumps({"token": token, "why": "lost"}),
    "JSON with a trailing comma": lambda token: f'{{"token": "{token}",}}\n',
    "JSON with the name twice": lambda token: f'{{"token": "x", "token": "{token}"}}',
    "an escaped name": lambda token: f'{{"to\\u006ben": "{token}"}}',
    "a cut value": lambda token: f'{{"token": "{token[:9]}\n{token[9:]}"}}',
    "a form": lambda token: f"a=b&token={token}",
    "an escaped form": lambda token: f"to%6ben={token[:9]}%0A{token[9:]}",
}
OTHER_CONTENT: dict[str, Callable[[str], str]] = {
    "nothing": lambda _: "",
    "an empty object": lambda _: "{}",
    "a value that is not a token": lambda _: '{"token": "x"}',
    "malformed data": lambda _: "\x1f\x8b broken",
    "another name": lambda token: json.dumps({"csrf_token": token}),
    "another case": lambda token: json.dumps({"Token": token}),
    "a nested object": lambda token: json.dumps({"a": {"token": token}}),
    "an object in a list": lambda token: json.dumps([{"token": token}]),
    "a list of values": lambda token: json.dumps({"token": [token]}),
    "a value that looks like a form": lambda token: json.dumps({"why": "&token=expired&", "device": token}),
    "a value with a form in it": lambda token: json.dumps({"why": f"a&token={token}&b"}),
    "a form of another name": lambda token: f"csrfmiddlewaretoken={token}",
    "a form of another case": lambda token: f"TOKEN={token}",
    "a form with similar names": lambda token: f"_token={token}&token_={token}&token[]={token}",
    "a bare token": lambda token: token,
    "a quoted token": lambda token: f'"{token}"\n',
    "text": lambda token: f"the token {token}",
    "a multipart boundary": lambda token: f"--{token}\r\n",
    "too deep": lambda token: json.dumps({"token": token, "a": [[]] * 40}),
    "too long": lambda token: json.dumps({"a": "x" * MAX_BODY, "token": token}),
    "too many": lambda token: "a=b&" * 100 + f"token={token}",
}


@pytest.mark.parametrize("charset", CHARSETS[:5])
@pytest.mark.parametrize("form", NAMING)
def test_a_token_named_token_spares_the_header(form: str, charset: str) -> None:
    """An admin sends their own token in the header to end the token of another user."""
    body = NAMING[form](OTHER)
    assert find(SENT, body.encode(charset)) == [OTHER.encode()]
    assert find([*SENT, (b"content-encoding", b"gzip")], gzip.compress(body.encode(charset))) == [OTHER.encode()]


@pytest.mark.parametrize("form", OTHER_CONTENT)
def test_with_other_content_the_header_token_ends(form: str) -> None:
    """Text that looks like a token ends if it is one, and so does the token in the header."""
    body = OTHER_CONTENT[form](OTHER)
    assert find(SENT, body.encode()) == [*[OTHER.encode()] * (OTHER in body), TOKEN.encode()]


@pytest.mark.parametrize(
    ("query", "spared"),
    [("token={}", True), ("a=b&token={}", True), ("to%6ben={}", True), ("_token={}", False), ("Token={}", False),
     ("{}", False), ("a=token&b={}", False), ("token=x", False)],
)  # fmt: skip
def test_a_query_that_names_a_token_spares_the_header(query: str, spared: bool) -> None:
    assert (TOKEN.encode() in find(SENT, b"", query.format(OTHER).encode())) is not spared


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "x"])
def test_with_an_unknown_encoding_the_header_token_ends(encoding: str) -> None:
    for body in (b"\x28\xb5\x2f\xfd" + bytes(range(256)), bytes(range(256)) * 8):
        assert find([*SENT, (b"content-encoding", encoding.encode())], body) == [TOKEN.encode()]


MANY = b"".join(b"%064d," % number for number in range(2000))
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a bomb": lambda: gzip.compress(bytes(10_000_000)),
    "a bomb of letters": lambda: gzip.compress(b"a" * 10_000_000),
    "a bomb of escapes": lambda: gzip.compress(b"%41" * 1_000_000),
    "a bomb of JSON escapes": lambda: gzip.compress(b"\\u0041" * 500_000),
    "a bomb of tokens": lambda: gzip.compress(MANY),
    "a bomb of blanks": lambda: gzip.compress(b"a " * 1_000_000),
    "a bomb in a bomb": lambda: gzip.compress(gzip.compress(b"a," * 10_000_000)),
    "empty members": lambda: gzip.compress(b"") * 3000,
    "members of bombs": lambda: gzip.compress(bytes(100_000)) * 300,
    "empty blocks": lambda: b"\0\0\0\xff\xff" * 13_000,
    "50 layers": lambda: reduce(lambda data, _: gzip.compress(data), range(50), b"x"),
}


@cache
def hostile(attack: str) -> bytes:
    return HOSTILE[attack]()


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("declared", [b"", b"gzip", b"deflate", b"gzip, deflate, gzip, deflate, gzip", b"gzip," * 2000])
def test_the_size_of_an_unpacked_body_is_bounded(attack: str, declared: bytes) -> None:
    body = hostile(attack)[: logout_tokens.MAX_SEARCHED]
    readings = unpack({"headers": [(b"content-encoding", declared)] if declared else []}, body)
    assert readings[0] == body
    assert len(readings) <= 1 + logout_tokens.MAX_LAYERS
    assert sum(map(len, readings[1:])) <= logout_tokens.MAX_INFLATED


@pytest.mark.parametrize("where", ["body", "lines", "query", "headers"])
def test_all_tokens_that_one_request_names_are_found(where: str) -> None:
    many = [new_value() for _ in range({"query": 110, "headers": 200}.get(where, 1000))]
    sent: dict[str, tuple[Any, ...]] = {
        "body": ((), json.dumps(many, separators=(",", ":"))[: 64 * KIB].encode()),
        "lines": ((), "\n".join(many).encode()),
        "query": ((), b"", "&".join(f"token={token}" for token in many).encode()),
        "headers": ([(b"x-token", token.encode()) for token in many], b""),
    }
    expected = [token.encode() for token in many]
    found = find(*sent[where])
    assert set(expected) - set(found) <= set(expected[970:] if where == "body" else ())


def test_a_log_out_ends_every_token_that_it_names(connection: Connection) -> None:
    """Also behind hundreds of hashes that look like tokens."""
    tokens = [connection.log_in() for _ in range(40)]
    body = json.dumps({"files": [f"{number:064x}" for number in range(300)], "token": tokens}).encode()
    assert connection.ask("DELETE", "/api/token", json.loads(body)).status == 200
    assert [connection.valid(token) for token in tokens] == [False] * 40


def test_no_more_than_64_kib_of_a_body_are_read() -> None:
    """The search gives other tasks a turn between its parts."""
    chunks = []

    async def receive() -> Message:
        chunks.append(1)
        return {"type": "http.request", "body": b"a" * KIB, "more_body": True}

    async def turns() -> int:
        naming = asyncio.ensure_future(
            find_logout_tokens(Request({"type": "http", "headers": [], "query_string": b""}, receive))
        )
        count = 0
        while not naming.done():
            await asyncio.sleep(0)
            count += 1
        return count

    assert asyncio.run(turns()) >= 4
    assert len(chunks) == 64


def test_a_token_is_found_anywhere_in_the_first_64_kib() -> None:
    token = new_value()
    for at in (0, 16 * KIB - 100, 16 * KIB - 32, 32 * KIB - 1, 64 * KIB - 80):
        text = b"x," * (at // 2) + b'"' + token.encode() + b'"'
        assert find((), text) == [token.encode()]
