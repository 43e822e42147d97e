"""Tests of HTTP, over sockets where that matters."""
