"""OAuth 2.0: the four endpoints over sockets, and third-party clients and resource servers."""
