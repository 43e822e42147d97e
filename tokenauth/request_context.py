"""The request that is being handled, for what is logged meanwhile."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextvars import ContextVar


class RequestContext(ABC):
    """What lines of the log and of the audit log say of a request. Nothing is read before a line is logged."""

    __slots__ = ()

    @abstractmethod
    def trace(self) -> Mapping[str, str]:
        """Return `trace_id` and `span_id`, if the client sent them (W3C Trace Context)."""

    @abstractmethod
    def origin(self) -> Mapping[str, str]:
        """Return who sent it and from where: `by`, `by_token`, `address`, `user_agent` and `request_id`, as known."""


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)
"""None outside of requests. A task inherits it: one that outlives the request is created with a context of its own."""
