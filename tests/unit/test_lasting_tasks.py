"""Tasks that a request starts and that outlive it: what they log is not of that request, and they do not keep it."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.servers import HandClock, write_config
from tokenauth.event_streams import LOOK, Client, Events
from tokenauth.request_context import current_request
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.stores.postgres.lookup import Lookup
from tokenauth.topic_watcher import Watcher
from tokenauth.web.http_context import set_current_request


async def test_events_are_not_of_the_first_client(tmp_path: Path, hand_clock: HandClock) -> None:
    seen: list[object] = []
    looked_again = asyncio.Event()

    def clock() -> float:
        if seen:
            looked_again.set()
        seen.append(current_request.get())
        return hand_clock()

    service = create_service(loader.load(write_config(tmp_path)), hand_clock)
    async with service.running():
        issued = await service.tokens.issue("ann", "ann-secret", "127.0.0.1", "")
        user = service.tokens.owner(issued.token)
        assert user is not None
        watcher = Watcher(service.pools, service.throttle, service.store, service.node, clock)
        events = Events(service.tokens, watcher)
        set_current_request({"type": "http", "headers": []})
        await events.open(user, issued.token, Client(), None)
        async with asyncio.timeout(60 * LOOK):
            await looked_again.wait()
        await events.shut_down()
    assert seen[0] is not None
    assert seen[1:] == [None] * len(seen[1:])


async def test_a_stream_opened_at_a_stop_says_bye(tmp_path: Path, hand_clock: HandClock) -> None:
    service = create_service(loader.load(write_config(tmp_path)), hand_clock)
    async with service.running():
        issued = await service.tokens.issue("ann", "ann-secret", "127.0.0.1", "")
        user = service.tokens.owner(issued.token)
        assert user is not None
        service.events.stop()
        stream = await service.events.open(user, issued.token, Client(), None)
        assert stream.ended
        assert await stream.next() == b'event: bye\ndata: {"reason":"stop"}\n\n'


async def test_look_ups_are_not_of_the_first_request() -> None:
    seen = []

    async def fetch(keys: Sequence[bytes]) -> Mapping[bytes, int]:
        seen.append(current_request.get())
        return {}

    set_current_request({"type": "http", "headers": []})
    assert await Lookup(fetch).find(b"key") == {}
    assert seen == [None]
