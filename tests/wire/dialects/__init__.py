"""Transcripts of the four dialects, over sockets, with two workers on one database."""
