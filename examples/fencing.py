"""Why a lease alone is not mutual exclusion, and what its fence adds.

Ann leases the only permit to write into a notebook, then her program is paused. Her lease lapses, Bob leases the
permit and writes; then Ann's program resumes and writes, too. No lock service can stop it: any process may be paused
between its last look at the clock and its next write. The notebook can, because each lease of a token has a higher
number than the one before, its fence, and every write says under which fence it comes.

In one terminal, with leases of two seconds (`make install` brings what the example needs):

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
    """A resource that takes what it gets."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, fence: int, text: str) -> bool:
        """Add a line, and say whether that was done."""
        self.lines.append(text)
        return True


class FencedNotebook(Notebook):
    """A resource that remembers the highest fence it saw, and refuses every lower one."""

    highest = 0

    def write(self, fence: int, text: str) -> bool:
        """Add a line, unless somebody has written under a later lease."""
        if fence < self.highest:
            return False
        self.highest = fence
        return super().write(fence, text)


class Permit:
    """The only token of a pool, for one holder."""

    def __init__(self, pool: httpx.Client, holder: str) -> None:
        """Borrow it."""
        answer = pool.post("leases", json={"holder": holder})
        if answer.status_code == 409:
            raise SystemExit("Somebody has it: see `tokenauth pool show NAME` and `tokenauth pool release`.")
        self.lease: dict[str, Any] = answer.raise_for_status().json()
        self.fence: int = self.lease["fence"]
        self._pool = pool

    def keep_alive(self) -> bool:
        """Ask for more time; False means that the lease was lost."""
        claim = {"holder": self.lease["holder"], "fence": self.fence}
        return self._pool.put(f"leases/{self.lease['token']}", json=claim).is_success

    def release(self) -> None:
        """Give it back."""
        claim = {"holder": self.lease["holder"], "fence": self.fence}
        self._pool.request("DELETE", f"leases/{self.lease['token']}", json=claim).raise_for_status()


def run(notebook: Notebook, pool: httpx.Client, sleep: Callable[[float], object]) -> bool:
    """Let Ann and Bob write into a notebook; say whether it took what Ann wrote when her lease was over."""
    ann = Permit(pool, "ann")
    notebook.write(ann.fence, "Ann: the balance is 100.")
    sleep(ann.lease["expires_in"] + 1)

    bob = Permit(pool, "bob")
    notebook.write(bob.fence, "Bob: I take out 100. The balance is 0.")

    taken = notebook.write(ann.fence, "Ann: I take out 100. The balance is 0.")
    assert not ann.keep_alive(), "a keep-alive would have told her; but she may be paused after it, too"
    bob.release()
    return taken


def main(arguments: list[str] | None = None, sleep: Callable[[float], object] = time.sleep) -> None:
    """Tell the story twice: with a notebook that looks at fences, and with one that does not."""
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
            taken = run(notebook, pool, sleep)
            print(f"{type(notebook).__name__}: Ann's late write was {'taken' if taken else 'refused'}.")
            print("".join(f"    {line}\n" for line in notebook.lines))


if __name__ == "__main__":
    main()
