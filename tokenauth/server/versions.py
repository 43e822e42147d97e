"""The releases of uvicorn that the private names in `server/` were tested with. A test compares it with the package."""

from importlib.metadata import version

KNOWN_UVICORN = ("0.53.", "0.54.")


def uvicorn_version() -> str:
    return version("uvicorn")
