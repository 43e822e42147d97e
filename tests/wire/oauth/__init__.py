"""Tests of OAuth 2.0: the four endpoints on the wire, and clients and resource servers that nobody here wrote."""
