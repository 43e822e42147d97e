"""What the application and its HTTP server agree on beyond ASGI. Each of them also works without the other."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, Self

from starlette.types import Scope

_NAME, _VALUE = re.compile(rb"[a-z0-9-]+"), re.compile(rb"[ -~]*")
_INTERPRETED = frozenset({b"connection", b"content-length", b"transfer-encoding"})
"""What a server reads in the headers of an answer, to know where its body ends and whether the connection does."""

CLIENT = "tokenauth.client"
"""The extension in a request's scope that tells of its connection.

`gone`: whether the client has disconnected; `stopping`: whether the server stops; `transport`: for long answers only.
"""

EVENTS = "/api/events"
"""The address of streams. The server does not measure how long they last."""


def client_disconnected(scope: Mapping[str, Any]) -> bool:
    """Return whether the client has disconnected, so that no one would receive the answer. Costs next to nothing.

    It is False under a server that does not offer the extension.
    """
    try:
        return bool(scope["extensions"][CLIENT]["gone"])
    except KeyError:
        return False


REFUSAL_RULES = "tokenauth.refusal_rules"
"""The key of the lifespan state under which the application passes its RefusalRules to the server."""


DURATIONS = "tokenauth.durations"
"""The key of the lifespan state under which the application passes the Durations that the server adds to."""


LOGGED_ONCE = "tokenauth.logged_once"
"""The key of the lifespan state under which the application keeps the events that it logs only once."""


def logged_once(scope: Mapping[str, Any]) -> set[str]:
    """Return the events that this application logs only once, and has logged. The caller adds to them."""
    found: set[str] = scope.get("state", {}).get(LOGGED_ONCE, set())
    return found


AT_ONCE = "tokenauth.at_once"
"""The key of the lifespan state under which the application passes what it can answer without a task.

It has, by path, a route, which the server puts into the scope, and its AtOnce.
"""


AnswerAtOnce = Callable[[], tuple[bytes, bytes] | None]
"""Returns an answer with status 200: the lines of its headers, with the Content-Length, and its body; or None."""


AtOnce = Callable[[Scope], AnswerAtOnce | None]
"""Looks at a GET request without a body that has just been read, and returns what may answer it; or None.

The server asks for the answer in the next iteration of the event loop. So no task is made for it, which would be a
sixth of its time. If either returns None or raises an exception, the application is called.
"""


class RefusalRules(NamedTuple):
    """What the server must know to refuse a request that the application never sees, such as one with a broken head."""

    cors_origins: Collection[str] = ()
    """Origins whose pages may read the refusal."""

    fail_closed_paths: Collection[str] = ()
    """Paths where a refusal is always 401, because a reverse proxy asks there whether to let a request pass."""


class RenderedHeaders(tuple[tuple[bytes, bytes], ...]):
    """The headers of an answer, and the lines that are sent for them.

    They are made once for many answers. The server then sends the lines, and does not check and join the headers for
    each answer, which takes 3 microseconds. To middleware and to other servers they are a sequence like any other.
    """

    content_length: int
    lines: bytes
    plain: bool
    """Whether the content length is all that the server has to know of them: not if they close the connection."""

    def __new__(cls, content_length: int, headers: Iterable[tuple[bytes, bytes]]) -> Self:
        """Take the length of the body, and all headers, with names in lower case. Raises ValueError for others."""
        made = super().__new__(cls, headers)
        if not all(_NAME.fullmatch(name) and _VALUE.fullmatch(value) for name, value in made):
            raise ValueError("not a header of an answer")
        interpreted = [header for header in made if header[0] in _INTERPRETED]
        made.plain = interpreted == [(b"content-length", b"%d" % content_length)] or not (interpreted or content_length)
        made.content_length = content_length
        made.lines = b"".join(b"%b: %b\r\n" % header for header in made)
        return made
