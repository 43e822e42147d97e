"""The SQLite engine: what differs from other databases."""
