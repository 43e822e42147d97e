"""tokenauth issues, validates and revokes bearer tokens, and leases tokens from pools."""

import os
import re
from contextlib import suppress
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenauth.web.middleware import TokenMiddleware

__version__ = "0.1.0"
__all__ = ["TokenMiddleware"]


@cache
def build() -> str:
    """Return the `installed_build` as it was at the first call. A server asks for it when it starts."""
    return installed_build()


def installed_build() -> str:
    """Return the version with a digest of the package's files, which tells two builds of one version apart.

    Both are read from the files: an upgrade may have replaced those that run. A wheel and its checkout have the same.
    It takes about 10 milliseconds.
    """
    package = os.path.dirname(__file__)
    digest = sha256()
    version = __version__
    for directory, names, files in os.walk(package):
        names[:] = sorted({*names} - {"migrations", "__pycache__"})  # a checkout has the migrations elsewhere
        for name in sorted(files):
            # Editors make such files beside the one that is edited; Emacs makes links to nothing.
            if name.endswith((".py", ".js", ".html", ".css")) and not name.startswith("."):
                path = os.path.join(directory, name)
                with suppress(OSError), open(path, "rb") as file:
                    content = file.read()
                    digest.update(f"{path.removeprefix(package)}\0".encode() + content + b"\0")
                    if path == __file__ and (found := re.search(rb'^__version__ = "([\w.]+)"', content, re.MULTILINE)):
                        version = found[1].decode()
    return f"{version}+{digest.hexdigest()[:8]}"


def __getattr__(name: str) -> object:
    # Imported on first use: most commands do not need it.
    if name == "TokenMiddleware":
        from tokenauth.web.middleware import TokenMiddleware

        return TokenMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
