"""The HTTP protocol where metrics are on: it measures each request."""

import asyncio
from collections.abc import Mapping
from time import perf_counter

from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from tokenauth.metrics import FIRST_BUCKET, Durations, add_duration
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.web.asgi_extensions import DURATIONS, EVENTS
from tokenauth.web.routing import route_path


class MeteredProtocol(BoundedProtocol):
    """Adds the duration of each answered request to the Durations of the application, by route.

    A duration begins when the head has been received and the requests before it have been answered. So it includes the
    time that the request waits for the event loop. Answers of the protocol itself, such as 431, are not counted.

    This is no middleware: one more coroutine around each request, and one more `send`, would cost more.
    """

    _durations: Durations
    _by_route: Mapping[str, Mapping[str, list[float]]]
    _began = 0.0
    _answered: Scope

    def _begin(self, transport: asyncio.Transport) -> None:
        super()._begin(transport)
        self._durations = self.app_state[DURATIONS]
        self._by_route = self._durations.by_route

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle.scope  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)
        self._began = perf_counter()

    def on_response_complete(self) -> None:
        seconds = perf_counter() - self._began
        scope = self._answered
        try:
            counts = self._by_route[scope["route"].path][scope["method"]]
        except KeyError:  # the first one of its kind, or an unknown path
            route = route_path(scope)
            if route == EVENTS:  # it lasts as long as a page is open
                BoundedProtocol.on_response_complete(self)
                return
            counts = self._durations.find(route, scope["method"])
        if seconds <= FIRST_BUCKET:  # as nearly always; a call would cost a third of all this
            counts[0] += 1
            counts[-1] += seconds
        else:
            add_duration(counts, seconds)
        BoundedProtocol.on_response_complete(self)
