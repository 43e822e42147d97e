"""Where in the file a setting is."""

import pytest

from tokenauth.settings.lines import find_line

TEXT = """\
# [server]
[ "server" ]
  port = 1
cors_origins = [
    "https://a",
]

[[users]]
username = "ann"
[[users]]
username = "bob"
password = "x"

[pools."a.b"]
capacity = 1
[pools]
c = {capacity = 2}
d.capacity = 3
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("server.port", 3),
        ("server.cors_origins[0]", 4),
        ("server.missing", 2),
        ("users[0].username", 9),
        ("users[1].password", 12),
        ("users[0].password", 8),
        ("users[2].password", None),
        ("pools.a.b.capacity", 15),
        ("pools.c.capacity", 17),
        ("pools.d.capacity", 18),
        ("nothing.like.it", None),
        ("", None),
    ],
)
def test_the_line_of_a_key_is_found(path: str, line: int | None) -> None:
    assert find_line(TEXT, path) == line
