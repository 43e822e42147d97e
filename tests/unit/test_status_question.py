"""What a worker asks its main process: each request waits its own time for the answer."""

import asyncio

import pytest

from tokenauth.errors import Overloaded
from tokenauth.server.totals import Totals
from tokenauth.server.worker import StatusQuestion

PATIENCE = 0.2


async def test_a_request_that_gives_up_spoils_no_other() -> None:
    status, sent = Totals(1).status([]), []
    question = StatusQuestion(lambda: sent.append("question"), PATIENCE)
    first = asyncio.create_task(question.ask())
    await asyncio.sleep(0)
    question._patience = 60
    second = asyncio.create_task(question.ask())
    with pytest.raises(Overloaded):
        await first
    question.answer(status)
    assert await second is status
    assert len(sent) == 1


async def test_a_question_that_was_lost_is_asked_again() -> None:
    status, sent = Totals(1).status([]), []
    question = StatusQuestion(lambda: sent.append("question"), PATIENCE)
    with pytest.raises(Overloaded):
        await question.ask()
    again = asyncio.create_task(question.ask())
    await asyncio.sleep(0)
    assert len(sent) == 2
    question.answer(status)
    assert await again is status
