"""A client of /api/events that does not read is disconnected, and the memory of the worker stays flat."""

from pathlib import Path

from tests.support.journal import until
from tests.support.servers import log_in, worker, write_config
from tests.support.streaming import EventStream

POOLS = 300
SILENT = 50


def memory(process: int) -> int:
    """Return the resident memory in KiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_clients_that_do_not_read_are_disconnected(tmp_path: Path) -> None:
    """Many pools change every second: a client that reads is told all of it, and is not slowed down."""
    pools = "".join(f"[pools.p{number:03}-{'x' * 40}]\nlease_ttl = '1h'\n" for number in range(POOLS))
    with worker(write_config(tmp_path, f"[server]\naccess_log = true\n{pools}")) as server, server.client() as client:
        token = log_in(client)
        header = {"X-Token": token}
        names = [each["name"] for each in client.get("/api/pools", headers=header).json()["pools"]]
        silent = [EventStream(server.port, token, read=False, buffer=1) for _ in range(SILENT)]
        with EventStream(server.port, token) as reader:
            assert reader.next().name == "hello"
            before = memory(server.process.pid)

            def is_told() -> bool:
                for name in names:
                    client.post(f"/api/pools/{name}/tokens", headers=header)
                return reader.wait("pool", 20).data["name"] in names

            def all_gone() -> bool:
                assert is_told()
                while len(reader.pending()):
                    reader.next()
                return ended() >= SILENT

            def ended() -> int:
                return sum(line["route"] == "/api/events" for line in server.events("request"))

            until(all_gone, "all that do not read are disconnected", 120)
            assert memory(server.process.pid) - before < 20 * 1024
            assert is_told()
        for stream in silent:
            stream.close()
        assert server.errors() == []
