"""Tests in one process, without sockets."""
