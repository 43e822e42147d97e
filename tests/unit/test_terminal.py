"""Whether SIGHUP comes from a closed terminal. The terminal itself is in tests/system/test_terminal.py."""

from tokenauth.server.terminal import Terminal


class Fake:
    """A terminal and a clock that the test moves."""

    def __init__(self) -> None:
        self.open = True
        self.now = 100.0

    def watch(self, watch: bool = True) -> Terminal:
        return Terminal(watch, lambda: self.open, lambda: self.now)


def test_a_hangup_after_the_terminal_closed_ends() -> None:
    fake = Fake()
    terminal = fake.watch()
    assert not terminal.hung_up()
    fake.now += 60
    fake.open = False
    assert terminal.hung_up()


def test_a_hangup_just_before_the_terminal_closes_ends() -> None:
    fake = Fake()
    terminal = fake.watch()
    assert not terminal.hung_up()
    fake.now += 1.1
    fake.open = False
    assert terminal.check()


def test_a_hangup_long_after_the_terminal_closed_reloads() -> None:
    """A job in the background gets no SIGHUP when its shell ends, so a later one is the operator's."""
    fake = Fake()
    terminal = fake.watch()
    fake.open = False
    assert not terminal.check()
    fake.now += 10
    assert not terminal.hung_up()
    assert not terminal.check()


def test_without_a_terminal_or_under_nohup_it_reloads() -> None:
    fake = Fake()
    ignored = fake.watch(watch=False)
    fake.open = False
    assert not ignored.hung_up()
    assert not fake.watch().hung_up()
