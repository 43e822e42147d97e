"""tokenauth issues bearer tokens, says whether they are valid, and ends them at once when told to."""

__version__ = "0.1.0"
