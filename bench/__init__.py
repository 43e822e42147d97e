"""Measures tokenauth beside the bare HTTP server that it runs on: `make bench`."""
