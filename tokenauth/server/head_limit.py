"""A limit on request heads for uvicorn's httptools protocol."""

_BLANK_LINE = b"\r\n\r\n"


class HeadLimit:
    """Counts the bytes of a request head that has not ended yet.

    This is written so that it can be proposed to uvicorn; it depends on nothing else here.

    The problem: llhttp limits neither the number of headers nor their size, and `HttpToolsProtocol` keeps all of them
    until the head ends. One client that never ends its head makes the server use all memory of the machine. The h11
    protocol refuses such a head: `h11_max_incomplete_event_size` is 16 KiB by default. httptools has no such setting.

    The fix: `data_received` counts what it has fed to the parser while a head is incomplete.

        self.parser.feed_data(data)
        if self.scope is not None and "method" not in self.scope:  # set by on_headers_complete
            if self.head_limit.exceeded(self.scope, data):
                self.send_431_response()
        elif self.head_limit.size:
            self.head_limit.reset()

    A request that arrives in one piece costs only the first comparison. A head that ends within the data is not
    counted: it can be one read of the socket (64 KiB in asyncio, 256 KiB in uvloop) larger than the limit. For an exact
    limit, feed at most `left` bytes at a time.

    The lines between the chunks of a body and after the last one (chunk extensions, trailers) have no limit in llhttp
    either. A protocol that limits them calls `add` for them, and `reset` at the end of each.
    """

    __slots__ = ("_head", "_limit", "size")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._head: object = None
        self.size = 0
        """Bytes of the incomplete head so far; 0 between requests."""

    @property
    def left(self) -> int:
        """Bytes of the head until the limit; the whole limit once the head has exceeded it."""
        return self._limit - self.size if self.size < self._limit else self._limit

    def exceeded(self, head: object, data: bytes) -> bool:
        """Count data that ended inside a head; return whether the head will be larger than the limit.

        `head` is an object that identifies the request. The first data of a head may begin with the end of the request
        before it, which is not counted if it has no body, and with blank lines, which are never counted.
        """
        if head is not self._head:
            before = data.rfind(_BLANK_LINE)
            data = data[0 if before < 0 else before + len(_BLANK_LINE) :].lstrip(b"\r\n")
            self._head, self.size = head, 0
        return self.add(data)

    def add(self, data: bytes) -> bool:
        """Count data of the same part; return whether the part will be larger than the limit."""
        self.size += len(data)
        return self.size >= self._limit  # it has not ended: at least one byte is missing

    def reset(self) -> None:
        """Start again with the next head."""
        self._head, self.size = None, 0
