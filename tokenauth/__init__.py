"""tokenauth issues, validates and revokes bearer tokens, and leases tokens from pools."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenauth.web.middleware import TokenMiddleware

__version__ = "0.1.0"
__all__ = ["TokenMiddleware"]


def __getattr__(name: str) -> object:
    # Imported on first use: most commands do not need it.
    if name == "TokenMiddleware":
        from tokenauth.web.middleware import TokenMiddleware

        return TokenMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
