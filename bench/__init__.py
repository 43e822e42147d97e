"""Compares tokenauth with the bare HTTP server that it runs on: `make bench`."""
