"""Short names for User-Agent headers."""

_BROWSERS = (
    ("Edg/", "Edge"),
    ("OPR/", "Opera"),
    ("Firefox/", "Firefox"),
    ("FxiOS/", "Firefox"),
    ("CriOS/", "Chrome"),
    ("Chrome/", "Chrome"),
    ("Safari/", "Safari"),
)
_SYSTEMS = (
    ("Android", "Android"),
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Windows", "Windows"),
    ("Mac OS X", "macOS"),
    ("CrOS", "ChromeOS"),
    ("Linux", "Linux"),
)
"""What is in a User-Agent, and whose it is. The first that matches counts: most browsers also name others."""

_LENGTH = 40
"""Characters of what is returned for a User-Agent that has no short name."""


def short_name(user_agent: str) -> str:
    """Return a short name of a browser and its system, or else the beginning of its User-Agent."""
    if user_agent.startswith("Mozilla/"):
        browser, system = (
            next((name for mark, name in known if mark in user_agent), None) for known in (_BROWSERS, _SYSTEMS)
        )
        if browser and system:
            return f"{browser} on {system}"
    return user_agent if len(user_agent) <= _LENGTH else f"{user_agent[: _LENGTH - 1]}…"
