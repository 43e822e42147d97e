"""Tests with proxies, browsers, databases and processes."""
