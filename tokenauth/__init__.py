"""tokenauth issues bearer tokens, says whether they are valid, and ends them at once when told to."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenauth.web.middleware import TokenMiddleware

__version__ = "0.1.0"
__all__ = ["TokenMiddleware"]


def __getattr__(name: str) -> object:
    """Import what this package exports when it is asked for: most of its parts do without."""
    if name == "TokenMiddleware":
        from tokenauth.web.middleware import TokenMiddleware

        return TokenMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
