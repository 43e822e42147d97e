"""The server and a strict reader of HTTP agree on where each request ends, or the connection is closed."""

import random
import re
from itertools import islice

from tests.support.framing import INNER, Reading, Stream, read, sequences
from tests.support.speaking import Outcome, Recorder, options, speak

REFUSALS = {400, 431}


def judge(stream: Stream, outcome: Outcome, reads: bool) -> str | None:
    """Say what is wrong with what came of a stream, where an app reads the bodies or answers without them."""
    expected = [_routed(request, reads) for request in stream.requests]
    executed = outcome.executed
    last = len(executed) - 1
    if 0 <= last < len(expected) and outcome.closed and executed[last].body is None:  # refused in the middle
        expected[last] = expected[last]._replace(body=None)
    if executed != expected[: len(executed)]:
        return "something is executed that the strict reader does not read"
    refused = bool(outcome.statuses) and outcome.statuses[-1] in REFUSALS
    answers = outcome.statuses[:-1] if refused else outcome.statuses
    due = {sum(request.body is not None for request in executed)}
    if not reads:  # the last one may be refused before it is answered, when its body turns out to be none
        due = {len(executed), len(executed) - refused}
    if set(answers) > {299} or len(answers) not in due:
        return "there is not one answer to each request"
    if refused and not outcome.closed:
        return "the connection goes on after a refusal"
    if not outcome.closed and (not stream.valid or len(executed) < len(expected)):
        return "the connection goes on, and the readers do not agree"
    return None


def _routed(request: Reading, reads: bool) -> Reading:
    """Write a request as an app is given it."""
    target = re.sub(rb"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#]*", b"", request.target).partition(b"#")[0]
    path, _, query = target.partition(b"?")
    target = (path or b"/") + (b"?" + query if query else b"")
    return Reading(request.method, target, request.body if reads else None)


async def disagreements(seed: int, count: int) -> list[str]:
    """Try odd streams; return those on which the readers disagree, with what is wrong."""
    config, source, found = options(Recorder(reads=True)), random.Random(seed), []
    for segments in islice(sequences(seed, odd=True), count):
        reads, hurry = source.random() < 0.7, source.random() < 0.5
        outcome = await speak(segments, reads, hurry, config)
        stream = read(b"".join(segments))
        if not stream.valid and not outcome.closed:  # the server may still wait for the end of what is no request
            segments.append(b"\r\n\r\n" + INNER * 2)
            outcome = await speak(segments, reads, hurry, config)
        fault = judge(stream, outcome, reads)
        if fault is not None:
            found.append(f"{fault} ({reads=}, {hurry=}): {segments}\n{outcome}\n{stream}")
    return found


async def test_two_readers_agree_on_what_a_request_is() -> None:
    assert await disagreements(seed=1, count=600) == []


async def test_every_proper_request_is_answered_however_it_is_cut() -> None:
    config = options(Recorder(reads=True))
    for segments in islice(sequences(seed=2, odd=False), 400):
        stream = read(b"".join(segments))
        outcome = await speak(segments, True, len(segments) % 2 == 0, config)
        assert judge(stream, outcome, reads=True) is None, segments
        assert outcome.statuses == [299] * len(stream.requests), segments
