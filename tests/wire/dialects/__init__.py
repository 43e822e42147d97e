"""The four dialects over sockets, with two workers on one database."""
