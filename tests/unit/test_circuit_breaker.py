"""The circuit breaker in front of a database."""

import asyncio

from tokenauth.stores.circuit_breaker import Circuit


async def test_a_probe_from_before_it_opened_closes_nothing() -> None:
    """The outage would end without what its end does: places in line would lapse."""
    probes = asyncio.Queue[asyncio.Event]()

    async def probe() -> None:
        end = asyncio.Event()
        probes.put_nowait(end)
        await end.wait()

    circuit = Circuit(probe, "store_not_writable", "store_writable_again", probe_ends_outage=True)
    circuit.start_probe()
    async with asyncio.timeout(20):
        first = await probes.get()
        circuit.open("it is locked")
        first.set()
        second = await probes.get()
        assert circuit.problem == "it is locked"
        second.set()
        await circuit.wait_for_probe()
    assert circuit.problem is None
    await circuit.stop()
