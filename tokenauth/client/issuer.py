"""The issuer of tokens as a client sees it: its address, and the form of its answers."""

from typing import Annotated, TypeVar

import httpx
import msgspec

from tokenauth import values
from tokenauth.models import Identity, Login, Token, public_id
from tokenauth.nesting import json_opens_more_than

Form = TypeVar("Form")

_MAX_NESTED = 100
"""Arrays and objects in an answer. All answers are flat today; later ones may have fields that are not."""

_Name = Annotated[str, msgspec.Meta(min_length=1)]


class Grant(msgspec.Struct):
    """What a login is answered with."""

    token: str
    expiry_time: int

    def __post_init__(self) -> None:
        """Refuse what is no token: it is to stand in a header."""
        if values.digest(self.token.encode()) is None:
            raise ValueError("this is no token")

    def __repr__(self) -> str:
        """Show what may stand in a log."""
        return f"Grant(expiry_time={self.expiry_time!r})"


class Me(msgspec.Struct):
    """What GET /api/me answers."""

    username: _Name
    scopes: tuple[str, ...]
    id: str
    issued_at: int
    expiry_time: int

    def login(self, digest: bytes) -> Login:
        """Return whose token this is. Raises ValueError when the answer is about another one."""
        if self.id != public_id(digest):
            raise ValueError("this is about another token")
        return Login(
            Identity(self.username, self.scopes), Token(digest, self.username, "", self.issued_at, self.expiry_time)
        )


class Error(msgspec.Struct):
    """What a request that is not granted is answered with."""

    error: str


def address(url: str) -> str:
    """Return the address of an issuer without the slash at its end. Raises ValueError, which does not quote it."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in {"http", "https"} or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError("url: must be http:// or https:// and a host, perhaps with a port and a path, and no more")
    return str(parsed).rstrip("/")


def read(response: httpx.Response, form: type[Form]) -> Form:
    """Read the body of an answer. Raises ValueError, which does not quote it, when it has another form."""
    try:
        text = response.content.decode()
        if not json_opens_more_than(_MAX_NESTED, text):
            return msgspec.json.decode(text, type=form)
    except (msgspec.MsgspecError, ValueError):
        pass
    raise ValueError("this is not an answer of tokenauth")


def retry_after(response: httpx.Response) -> int:
    """Say after how many seconds an answer asks to try again."""
    seconds = response.headers.get("retry-after", "")
    return int(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else 1
