"""The login queue: fair between networks and users, in order for each user, and bounded in length and time."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenauth import login_queue
from tokenauth.errors import ClientGone, Overloaded
from tokenauth.login_queue import LoginQueue, Turn


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay refusals for a short time only."""
    monkeypatch.setattr(login_queue, "REFUSAL_DELAY", 0.01)


async def begin(queue: LoginQueue, turns: Sequence[Turn]) -> list["asyncio.Task[bool]"]:
    """Let turns enter, one after the other."""
    tasks = []
    for turn in turns:
        tasks.append(asyncio.ensure_future(queue.enter(turn)))
        await asyncio.sleep(0)
    return tasks


async def served(queue: LoginQueue, holder: Turn, turns: Sequence[Turn]) -> list[Turn]:
    """Finish the turn with the only slot, then each turn that starts; return their order."""
    order: list[Turn] = []
    await begin(queue, turns)
    running = holder
    while True:
        queue.finish(running)
        following = [turn for turn in turns if turn.running]
        if not following:
            return order
        (running,) = following
        order.append(running)


def turn(network: str, user: str, limits: dict[bytes, int] | None = None) -> Turn:
    """Create the turn of a stranger."""
    return Turn((f"region of {network}", network, user), limits or {})


def known(name: str) -> Turn:
    """Create the turn of a known user."""
    return Turn((name,), {}, known=True)


async def test_networks_and_users_of_a_network_take_turns() -> None:
    queue, holder = LoginQueue(1, 64), turn("x", "x")
    await queue.enter(holder)
    crowd = [turn("a", "ann") for _ in range(3)] + [turn("a", "bob")]
    others = [turn("b", "cid"), turn("c", "dan")]
    order = await served(queue, holder, crowd + others)
    assert order == [crowd[0], others[0], others[1], crowd[3], crowd[1], crowd[2]]


async def test_a_full_queue_drops_from_the_longest_line() -> None:
    queue, holder = LoginQueue(1, 3), turn("x", "x")
    await queue.enter(holder)
    crowd = [turn("a", "ann") for _ in range(3)]
    tasks = await begin(queue, crowd)
    with pytest.raises(Overloaded):
        await queue.enter(turn("a", "ann"))
    late = await begin(queue, [turn("b", "bob")])
    with pytest.raises(Overloaded):
        await tasks[2]
    with pytest.raises(Overloaded):
        await queue.enter(turn("b", "bob"))
    assert not late[0].done()


async def test_a_cancelled_waiter_frees_its_place() -> None:
    queue, holder = LoginQueue(1, 2), turn("x", "x")
    await queue.enter(holder)
    disconnected = [Turn(("region of a", "a", "ann"), {}, disconnected=lambda: True) for _ in range(2)]
    tasks = await begin(queue, disconnected)
    (late,) = await begin(queue, [turn("a", "ann")])
    for task in tasks:
        with pytest.raises(ClientGone):
            await task
    queue.finish(holder)
    assert await late


async def test_no_login_waits_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_queue, "MAX_WAIT", 0.01)
    queue = LoginQueue(1, 2)
    await queue.enter(turn("x", "x"))
    with pytest.raises(Overloaded) as refusal:
        await queue.enter(turn("a", "ann"))
    assert refusal.value.retry_after >= 1


async def test_refusals_are_delayed_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that are refused at once retry at once, and leave no CPU for hashing."""
    monkeypatch.setattr(login_queue, "MAX_DELAYED", 3)
    queue = LoginQueue(1, 1)
    await queue.enter(turn("x", "x"))
    await begin(queue, [turn("a", "ann")])
    ended: list[int] = []

    async def is_delayed(number: int) -> bool:
        began = asyncio.get_running_loop().time()
        with pytest.raises(Overloaded):
            await queue.enter(turn("a", "ann"))
        ended.append(number)
        return asyncio.get_running_loop().time() - began > 0.9 * login_queue.REFUSAL_DELAY

    delayed = await asyncio.gather(*map(is_delayed, range(5)))
    assert (delayed[:3], ended[:2]) == ([True] * 3, [3, 4]), "of five at the same time, the last two are not delayed"
    assert await is_delayed(5)


async def test_the_limit_of_a_key_bounds_running_turns() -> None:
    queue = LoginQueue(10, 64)
    turns = [turn("a", "ann", {b"k": 2}) for _ in range(4)]
    await begin(queue, turns)
    assert [each.running for each in turns] == [True, True, False, False]
    assert not queue.change_limits(turns[0], {b"k": 1}), "must wait when the limit is lower"
    queue.finish(turns[1])
    assert queue.change_limits(turns[0], {b"k": 2})
    assert turns[2].running


async def test_a_cancelled_login_gives_up_its_place_or_turn() -> None:
    queue, holder = LoginQueue(1, 64), turn("x", "x")
    await queue.enter(holder)
    turns = [turn("a", name) for name in "abc"]
    tasks = await begin(queue, turns)
    tasks[0].cancel()
    await asyncio.sleep(0)
    queue.finish(holder)
    tasks[1].cancel()  # its turn has started, but its task has not run yet
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [each.running for each in turns] == [False, False, True]


async def test_a_login_cancelled_in_the_same_instant_is_skipped() -> None:
    queue, holder = LoginQueue(1, 64), turn("x", "x")
    await queue.enter(holder)
    turns = [turn("a", name) for name in "ab"]
    tasks = await begin(queue, turns)
    tasks[0].cancel()  # its task has not run yet, so the turn is still in the queue
    queue.finish(holder)
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert await tasks[1]
    assert [each.running for each in turns] == [False, True]


async def test_strangers_take_no_place_of_a_known_user() -> None:
    queue, holder = LoginQueue(1, 64), turn("x", "x")
    await queue.enter(holder)
    crowd = [turn(f"{number}.1.1.0/24", f"name{number}") for number in range(64)]
    await begin(queue, crowd)
    with pytest.raises(Overloaded):
        await queue.enter(turn("new", "ann"))
    users = [known(f"user{number}") for number in range(64)]
    tasks = await begin(queue, users)
    assert not any(task.done() for task in tasks)
    queue.finish(holder)
    assert users[0].running


async def test_strangers_get_one_turn_of_four_if_both_wait() -> None:
    queue, holder = LoginQueue(1, 64), turn("x", "x")
    await queue.enter(holder)
    users, crowd = [known(f"user{number}") for number in range(8)], [turn(f"{number}", "ann") for number in range(4)]
    order = await served(queue, holder, crowd + users)
    assert [each.known for each in order] == [True, True, True, False] * 2 + [True, True, False, False]


async def test_one_account_has_one_share_over_all_networks() -> None:
    queue, holder = LoginQueue(1, 8), turn("x", "x")
    await queue.enter(holder)
    flood, ann = [known("eve") for _ in range(8)], known("ann")
    tasks = await begin(queue, [*flood, ann])
    await asyncio.sleep(0)
    assert isinstance(tasks[7].exception(), Overloaded)
    queue.finish(holder)
    assert flood[0].running
    queue.finish(flood[0])
    assert ann.running


async def test_many_networks_of_one_region_make_room_for_another() -> None:
    queue, holder = LoginQueue(1, 8), turn("x", "x")
    await queue.enter(holder)
    crowd = [Turn(("2001:db8::/48", f"2001:db8:0:{number}::/64", f"name{number}"), {}) for number in range(8)]
    tasks = await begin(queue, crowd)
    newcomer = Turn(("192.0.0.0/16", "192.0.2.0/24", "ann"), {})
    await begin(queue, [newcomer])
    await asyncio.sleep(0)
    assert [type(task.exception()) for task in tasks if task.done()] == [Overloaded]
    queue.finish(holder)
    running = next(each for each in crowd if each.running)
    queue.finish(running)
    assert newcomer.running, "its region has the second turn"


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "known"]), st.sampled_from("xyz"), st.integers(0, 2), st.booleans()),
        max_size=40,
    ),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_random_logins_are_served_or_refused_in_order(
    coming: list[tuple[str, str, int, bool]], slots: int, room: int
) -> None:
    """No more turns run than the limits allow, each line keeps its order, and no turn is left at the end."""

    async def run() -> None:
        queue = LoginQueue(slots, room)
        running: list[Turn] = []
        begun: list[Turn] = []
        turns, tasks = [], []
        for network, user, key, leaves in coming:
            path = (user,) if network == "known" else ("region", network, user)
            new = Turn(path, {bytes([key]): 2}, known=network == "known")
            turns.append(new)
            tasks += await begin(queue, [new])
            if leaves and running:
                queue.finish(running.pop(0))
                await asyncio.sleep(0)
            fresh = [each for each in turns if each.running and each not in begun]
            running += fresh
            begun += fresh
            assert sum(each.running for each in turns) <= slots
            for one in range(3):
                assert sum(each.running and bytes([one]) in each.limits for each in turns) <= 2
        while running:
            queue.finish(running.pop(0))
            await asyncio.sleep(0)
            fresh = [each for each in turns if each.running and each not in begun]
            running += fresh
            begun += fresh
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in ended} <= {bool, Overloaded}
        for line in {(each.known, *each.path) for each in turns}:
            places = [turns.index(each) for each in begun if (each.known, *each.path) == line]
            assert places == sorted(places)

    asyncio.run(run())
