"""The routes over sockets."""
