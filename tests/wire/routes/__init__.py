"""The routes, asked over real sockets."""
