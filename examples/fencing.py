"""Why a lease alone is not mutual exclusion, and how its fence helps.

Ann leases the only permit to write into a notebook, then her program is paused. Her lease ends, Bob leases the permit
and writes. Then Ann's program resumes and writes, too. No lock service can prevent that: any process may be paused
between its last check and its next write. The notebook can: each lease of a token has a higher number than the one
before, its fence, and every write carries the fence of its lease.

In one terminal, with leases of two seconds (`make install` installs what the example needs):

    TIMER_DURATION=2 make install serve

In another:

    .venv/bin/python examples/fencing.py
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import httpx


class Notebook:
    """A resource that accepts every write."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, fence: int, text: str) -> bool:
        """Add a line. Return whether it was accepted."""
        self.lines.append(text)
        return True


class FencedNotebook(Notebook):
    """A resource that remembers the highest fence it has seen, and refuses every lower one."""

    highest = 0

    def write(self, fence: int, text: str) -> bool:
        """Add a line, unless a write under a later lease came first."""
        if fence < self.highest:
            return False
        self.highest = fence
        return super().write(fence, text)


class Permit:
    """A lease of the only token of a pool."""

    def __init__(self, pool: httpx.Client, holder: str) -> None:
        """Lease the token."""
        answer = pool.post("leases", json={"holder": holder})
        if answer.status_code == 409:
            raise SystemExit("The permit is leased. See `tokenauth pool show NAME` and `tokenauth pool release`.")
        self.lease: dict[str, Any] = answer.raise_for_status().json()
        self.fence: int = self.lease["fence"]
        self._pool = pool

    def keep_alive(self) -> bool:
        """Extend the lease. Return False if it was lost."""
        body = {"holder": self.lease["holder"], "fence": self.fence}
        return self._pool.put(f"leases/{self.lease['token']}", json=body).is_success

    def release(self) -> None:
        """End the lease."""
        body = {"holder": self.lease["holder"], "fence": self.fence}
        self._pool.request("DELETE", f"leases/{self.lease['token']}", json=body).raise_for_status()


def run(notebook: Notebook, pool: httpx.Client, sleep: Callable[[float], object]) -> bool:
    """Let Ann and Bob write. Return whether the notebook accepted Ann's write after her lease had ended."""
    ann = Permit(pool, "ann")
    notebook.write(ann.fence, "Ann: the balance is 100.")
    sleep(ann.lease["expires_in"] + 1)

    bob = Permit(pool, "bob")
    notebook.write(bob.fence, "Bob: I take out 100. The balance is 0.")

    accepted = notebook.write(ann.fence, "Ann: I take out 100. The balance is 0.")
    assert not ann.keep_alive(), "the keep-alive of a lease that has ended must fail"
    bob.release()
    return accepted


def main(arguments: list[str] | None = None, sleep: Callable[[float], object] = time.sleep) -> None:
    """Run the story twice: with a notebook that checks fences, and with one that does not."""
    parser = argparse.ArgumentParser(description="Why fences matter.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pool", default="permits", help="a pool of one token")
    parser.add_argument("--username", default="admin")
    parser.add_argument("--password", default="admin")
    chosen = parser.parse_args(arguments)
    with httpx.Client(base_url=chosen.url) as client:
        credentials = {"username": chosen.username, "password": chosen.password}
        token = client.post("/api/token", json=credentials).raise_for_status().json()["token"]
    with httpx.Client(base_url=f"{chosen.url}/api/pools/{chosen.pool}/", headers={"X-Token": token}) as pool:
        for notebook in (FencedNotebook(), Notebook()):
            accepted = run(notebook, pool, sleep)
            print(f"{type(notebook).__name__}: Ann's late write was {'accepted' if accepted else 'refused'}.")
            print("".join(f"    {line}\n" for line in notebook.lines))


if __name__ == "__main__":
    main()
