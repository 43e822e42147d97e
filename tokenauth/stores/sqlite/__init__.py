"""SQLite: what differs from the other databases."""
