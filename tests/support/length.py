"""How long the long fault tests run. `TOKENAUTH_FAULTS=0.1 make faults` runs a tenth of the rounds and minutes."""

import os

LENGTH = float(os.environ.get("TOKENAUTH_FAULTS", "1"))


def scaled(full: float, least: float = 1) -> int:
    """Return a number of rounds or seconds, of which the whole run has `full`."""
    return round(max(full * LENGTH, least))
