"""Dialects translate: the HTTP of another service in, one call of `Pools`, that service's HTTP out."""
